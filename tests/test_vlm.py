"""The VLM: packing isolation, masks, generation, loss, checkpointing, precision, peft, saving,
groups."""

import base64
import copy
import re

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from PIL import Image, ImageOps
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import ByteLevel, WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    pipeline,
)
from transformers.pipelines.image_text_to_text import Chat

import vlmbench.models.modeling as modeling
from vlmbench.data.image import ImageTransform
from vlmbench.data.picture import ImageError, load_image
from vlmbench.data.packing import collate_packed, collate_padded
from vlmbench.data.record import ImageRef, Sample, Turn
from vlmbench.data.template import TEMPLATES, from_messages, get_template
from vlmbench.evaluate.generate import prompt_inputs
from vlmbench.models.processor import VLMProcessor
from vlmbench.models.vision import backbone_dict
from vlmbench.models.vlm import (
    GROUPS,
    VLMConfig,
    VLMForConditionalGeneration,
    VLMModel,
    module_groups,
)

IMG, PAD = 4, 0
TEXT = dict(
    vocab_size=48,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    eos_token_id=2,
    pad_token_id=PAD,
)
LANGUAGE = dict(
    llama=LlamaConfig(**TEXT),
    qwen2=Qwen2Config(**TEXT),
    qwen3=Qwen3Config(**TEXT, head_dim=8),
    tied=LlamaConfig(**TEXT, tie_word_embeddings=True),
    sliding=Qwen2Config(**TEXT, use_sliding_window=True, sliding_window=4, max_window_layers=1),
)
CLIP = CLIPVisionConfig(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=2,
    image_size=16,
    patch_size=8,
)


def vlm(language='llama', bidirectional=False, **front):
    torch.manual_seed(0)
    settings = dict(type='encoder', backbone=backbone_dict(CLIP), **front)
    model = VLMForConditionalGeneration(
        VLMConfig(
            text_config=copy.deepcopy(LANGUAGE[language]),
            vision_config=settings,
            image_token_id=IMG,
            bidirectional_images=bidirectional,
        )
    )
    for n, p in model.named_parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.2)
    return model.eval()


def document(words, images=0, seed=0):
    "One document: `images` images, then `words` random words; its last three are targets."
    g = torch.Generator().manual_seed(seed)
    ids = [1, *([IMG] * 4 * images), *torch.randint(5, 48, (words,), generator=g).tolist()]
    return dict(
        input_ids=ids,
        labels=[-100] * (len(ids) - 3) + ids[-3:],
        pixels=torch.randn(images, 3, 16, 16, generator=g),
    )


def packed(*rows, length=None):
    "Rows of documents as a packed batch."
    width = length or max(sum(len(d['input_ids']) for d in r) for r in rows)
    empty = dict(input_ids=PAD, labels=-100, position_ids=0, document_ids=-1, image_ids=-1)
    out = {k: torch.full((len(rows), width), v) for k, v in empty.items()}
    pixels = []
    for i, row in enumerate(rows):
        at = 0
        for j, d in enumerate(row):
            n, s = len(d['input_ids']), slice(at, at + len(d['input_ids']))
            out['input_ids'][i, s] = torch.tensor(d['input_ids'])
            out['labels'][i, s] = torch.tensor(d['labels'])
            out['labels'][i, at] = -100
            out['position_ids'][i, s], out['document_ids'][i, s] = torch.arange(n), j
            first = sum(map(len, pixels))
            slots = out['input_ids'][i, s] == IMG
            out['image_ids'][i, s][slots] = first + torch.arange(int(slots.sum())) // 4
            pixels.append(d['pixels'])
            at += n
    pixels = torch.cat(pixels)
    return {
        **out,
        **(
            dict(pixel_values=pixels, image_sizes=torch.full((len(pixels), 2), 16))
            if len(pixels)
            else {}
        ),
    }


def padded(docs, side='left'):
    width = max(len(d['input_ids']) for d in docs)
    fill = lambda x, v: (
        x + [v] * (width - len(x)) if side == 'right' else [v] * (width - len(x)) + x
    )
    pixels = torch.cat([d['pixels'] for d in docs])
    return dict(
        input_ids=torch.tensor([fill(d['input_ids'], PAD) for d in docs]),
        labels=torch.tensor([fill(d['labels'], -100) for d in docs]),
        attention_mask=torch.tensor([fill([1] * len(d['input_ids']), 0) for d in docs]),
        **(dict(pixel_values=pixels) if len(pixels) else {}),
    )


DOCS = [document(6, 1, 1), document(5, 0, 2), document(7, 2, 3), document(4, 1, 4)]


# --- packing --------------------------------------------------------------------------------------


@pytest.mark.parametrize('bidirectional', [False, True])
@pytest.mark.parametrize('language', LANGUAGE)
def test_packed_equals_each_document_alone(language, bidirectional):
    model = vlm(language, bidirectional)
    batch = packed(DOCS[:2], DOCS[2:], length=29)
    with torch.no_grad():
        together = model(**batch)
        for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
            alone = model(**packed([DOCS[2 * i + j]])).logits[0]
            assert (together.logits[i][batch['document_ids'][i] == j] - alone).abs().max() < 1e-4
        losses = [model(**packed([d])).loss for d in DOCS]
    assert abs(together.loss - sum(losses) / 4) < 1e-5  # three targets each
    positions = batch.pop('position_ids')
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, together.logits), (
            'positions follow from document_ids'
        )
    assert positions.max() == 15


@pytest.mark.parametrize('attn', ['sdpa', 'eager'])
@pytest.mark.parametrize('bidirectional', [False, True])
@pytest.mark.parametrize('language', LANGUAGE)
def test_a_document_never_moves_its_neighbours(language, bidirectional, attn):
    "Change every word and pixel of one document: the others' logits do not move by one bit."
    model = vlm(language, bidirectional)
    model.set_attn_implementation(attn)
    rows = [[DOCS[0], DOCS[2]], [DOCS[3], DOCS[1]]]
    for a in (0, 2, 3):
        words = len(DOCS[a]['input_ids']) - 1 - 4 * len(DOCS[a]['pixels'])
        swapped = [
            [document(words, len(d['pixels']), 99) if d is DOCS[a] else d for d in row]
            for row in rows
        ]
        x, y = packed(*rows), packed(*swapped)
        changed = torch.tensor(
            [
                [d >= 0 and rows[i][d] is DOCS[a] for d in row]
                for i, row in enumerate(x['document_ids'].tolist())
            ]
        )
        with torch.no_grad():
            p, q = model(**x).logits, model(**y).logits
        assert (p - q)[~changed].abs().max() == 0 and (p - q)[changed].abs().max() > 1e-3


@pytest.mark.parametrize('bidirectional', [False, True])
@pytest.mark.parametrize('language', ['llama', 'qwen3', 'sliding'])
def test_back_ends_agree_on_packed_batches(language, bidirectional):
    model, batch = vlm(language, bidirectional), packed(DOCS[:2], DOCS[2:])
    real, logits = batch['document_ids'] >= 0, {}
    for attn in ('sdpa', 'eager', 'flex_attention'):
        model.set_attn_implementation(attn)
        assert model.model.language_model.config._attn_implementation == attn
        # flex attention, uncompiled on a CPU
        with torch.no_grad(), torch.compiler.set_stance('force_eager'):
            logits[attn] = model(**batch).logits[real]
    scale = logits['sdpa'].abs().max()
    assert all((logits['sdpa'] - other).abs().max() < 1e-5 * scale for other in logits.values())


def test_flex_attention_with_bidirectional_images_takes_batches_of_any_shape_on_a_cpu():
    "Compiled for a second shape, torch writes C++ that does not build."
    model = vlm(bidirectional=True)
    for rows in ([DOCS[:2], DOCS[2:]], [DOCS[:1]], [DOCS]):
        logits = {}
        for attn in ('sdpa', 'flex_attention'):
            model.set_attn_implementation(attn)
            with torch.no_grad():
                logits[attn] = model(**packed(*rows)).logits[packed(*rows)['document_ids'] >= 0]
        assert (logits['sdpa'] - logits['flex_attention']).abs().max() < 1e-5 * logits[
            'sdpa'
        ].abs().max()


def test_gradients_do_not_leak_between_documents():
    model = vlm(bidirectional=True)
    batch = packed(DOCS[:3])
    batch['pixel_values'].requires_grad_(True)
    batch['labels'][batch['document_ids'] != 0] = -100
    model(**batch).loss.backward()
    moved = batch['pixel_values'].grad.abs().amax((1, 2, 3))
    assert moved[0] > 0 and moved[1:].max() == 0


# --- bidirectional images -------------------------------------------------------------------------


def test_bidirectional_images_change_only_what_follows_them_and_need_no_ids():
    causal, both = vlm(), vlm(bidirectional=True)
    batch = packed([DOCS[2]])
    plain = {k: batch[k] for k in ('input_ids', 'pixel_values')}
    with torch.no_grad():
        derived, given = both(**plain).logits, both(**batch).logits
        assert torch.allclose(derived, given, atol=1e-6), 'image ids are derived from the images'
        a, b = causal(**plain).logits, both(**plain).logits
    assert torch.allclose(a[:, 0], b[:, 0], atol=1e-6) and (a - b)[:, 1].abs().max() > 1e-3


def test_touching_images_stay_two():
    model, doc = vlm(bidirectional=True), DOCS[2]
    one = model(
        torch.tensor([doc['input_ids']]), doc['pixels'], output_hidden_states=True
    ).hidden_states[1][0]
    other = model(
        torch.tensor([doc['input_ids']]),
        torch.cat([doc['pixels'][:1], torch.randn(1, 3, 16, 16)]),
        output_hidden_states=True,
    ).hidden_states[1][0]
    assert torch.equal(one[1:5], other[1:5]) and not torch.allclose(one[5:9], other[5:9])


# --- generation -----------------------------------------------------------------------------------


@pytest.mark.parametrize('bidirectional', [False, True])
@pytest.mark.parametrize('language', ['llama', 'qwen2', 'qwen3', 'sliding'])
def test_batched_cached_generation_is_one_by_one_generation(language, bidirectional):
    model = vlm(language, bidirectional)
    batch = padded(DOCS)
    del batch['labels']
    width, settings = (
        batch['input_ids'].shape[1],
        dict(max_new_tokens=8, do_sample=False, eos_token_id=None),
    )
    together = model.generate(**batch, **settings)[:, width:]
    for d, row in zip(DOCS, together):
        ids = torch.tensor([d['input_ids']])
        pixels = dict(pixel_values=d['pixels']) if len(d['pixels']) else {}
        alone = model.generate(ids, attention_mask=torch.ones_like(ids), **pixels, **settings)[
            0, ids.shape[1] :
        ]
        assert row.tolist() == alone.tolist()
    assert len(set(map(tuple, together.tolist()))) > 1
    assert (
        model.generate(**batch, **settings, use_cache=False)[:, width:].tolist()
        == together.tolist()
    )
    assert (
        model.generate(**batch, **settings, cache_implementation='static')[:, width:].tolist()
        == together.tolist()
    )
    assert not (together == IMG).any()


@pytest.mark.parametrize('settings', [dict(num_beams=3), dict(num_beams=2, num_return_sequences=2)])
def test_beams_keep_the_images_of_a_row_together(settings):
    model, docs = vlm(), [DOCS[2], DOCS[1], DOCS[0]]  # two images, none, one
    batch = padded(docs)
    del batch['labels']
    args = dict(max_new_tokens=5, do_sample=False, eos_token_id=None, **settings)
    n = settings.get('num_return_sequences', 1)
    together = model.generate(**batch, **args)[:, batch['input_ids'].shape[1] :].view(3, n, -1)
    for d, rows in zip(docs, together):
        ids = torch.tensor([d['input_ids']])
        pixels = dict(pixel_values=d['pixels']) if len(d['pixels']) else {}
        alone = model.generate(ids, attention_mask=torch.ones_like(ids), **pixels, **args)[
            :, ids.shape[1] :
        ]
        assert rows.tolist() == alone.tolist()


def test_prefill_in_two_pieces():
    "A cache continued with more than one token: the second piece sees the first."
    model = vlm(bidirectional=True)
    ids, pixels = torch.tensor([DOCS[2]['input_ids']]), DOCS[2]['pixels']
    with torch.no_grad():
        whole = model(ids, pixels).logits
        first = model(ids[:, :5], pixels[:1], use_cache=True)
        second = model(
            ids[:, 5:], pixels[1:], past_key_values=first.past_key_values, use_cache=True
        )
    assert torch.allclose(whole[:, 5:], second.logits, atol=1e-5)


# --- loss -----------------------------------------------------------------------------------------


def test_training_scores_targets_only_and_loses_nothing():
    model, batch, scored = vlm(), packed(DOCS[:2], DOCS[2:]), []
    model.lm_head.register_forward_hook(lambda m, i, o: scored.append(o.numel() // o.shape[-1]))
    full = model(**batch)
    fast = model.train()(**batch)
    asked = model(**batch, return_logits=True)
    assert fast.logits is None and asked.logits.shape == full.logits.shape == (
        *batch['input_ids'].shape,
        48,
    )
    assert scored == [batch['input_ids'].numel(), 12, batch['input_ids'].numel()]
    assert torch.allclose(fast.loss, full.loss, atol=1e-6) and torch.allclose(
        asked.loss, full.loss, atol=1e-6
    )
    labels = batch['labels']
    by_hand = torch.nn.functional.cross_entropy(
        full.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    )
    assert torch.allclose(full.loss, by_hand, atol=1e-6)
    assert torch.allclose(
        model(**batch, num_items_in_batch=torch.tensor(48)).loss, by_hand / 4, atol=1e-6
    )


def test_sliced_loss_is_the_same(monkeypatch):
    model, batch = vlm().train(), packed(DOCS[:2], DOCS[2:])
    grads = []
    for limit in (2**27, 48 * 5):
        monkeypatch.setattr(modeling, '_SLICE', limit)
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        grads.append(
            [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
        )
    for a, b in zip(*grads, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_no_target_is_a_zero_with_a_graph():
    model, batch = vlm().train(), packed(DOCS[:2])
    batch['labels'][:] = -100
    loss = model(**batch).loss
    loss.backward()
    assert loss.item() == 0 and all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_last_logits_only():
    model, batch = vlm(), packed([DOCS[0]])
    labels = batch.pop('labels')
    with torch.no_grad():
        full, last = model(**batch).logits, model(**batch, logits_to_keep=1).logits
        assert last.shape[1] == 1 and torch.allclose(full[:, -1:], last, atol=1e-6)
        kept, full = (
            model(**batch, labels=labels, logits_to_keep=1).loss,
            model(**batch, labels=labels).loss,
        )
        assert torch.allclose(kept, full, atol=1e-6)


# --- errors ---------------------------------------------------------------------------------------


def test_count_mismatch_names_both_counts():
    model, ids = vlm(), torch.tensor([DOCS[2]['input_ids']])
    with pytest.raises(ValueError, match='8 image tokens .* made 4 features'):
        model(ids, DOCS[2]['pixels'][:1])
    with pytest.raises(ValueError, match='8 image tokens .* no pixel_values'):
        model(ids)
    with pytest.raises(ValueError, match='0 image tokens'):
        model(torch.tensor([[1, 7]]), DOCS[2]['pixels'])
    with pytest.raises(ValueError, match='input_ids are needed'):
        model()
    batch = packed(DOCS[:2])
    with pytest.raises(ValueError, match='ambiguous'):
        model(**batch, attention_mask=torch.ones(1, 1, 17, 17))


def test_flash_attention_is_refused_where_images_see_both_ways():
    model = vlm(bidirectional=True)
    model.model.language_model.config._attn_implementation = 'flash_attention_2'
    with pytest.raises(ValueError, match='cannot keep packed documents'):
        model(**packed(DOCS[:2]))  # rows without such images: tests/test_attention.py


# --- checkpointing, precision, peft ---------------------------------------------------------------


@pytest.mark.parametrize('images', [True, False])
@pytest.mark.parametrize(
    'frozen',
    [
        (),
        ('vision',),
        ('vision', 'embed', 'projector'),
        ('vision', 'projector', 'embed', 'norm', 'lm_head'),
    ],
)
def test_gradient_checkpointing_changes_no_gradient(frozen, images):
    model, batch = (
        vlm().train(),
        packed(*[DOCS[:2], DOCS[2:]] if images else [[DOCS[1]], [DOCS[1]]]),
    )
    for g in frozen:
        for _, p in module_groups(model)[g]:
            p.requires_grad_(False)
    grads = []
    for on in (False, True):
        (model.gradient_checkpointing_enable if on else model.gradient_checkpointing_disable)()
        model.zero_grad()
        model(**batch).loss.backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and any('.layers.' in n for n in grads[0])
    assert all(torch.allclose(grads[0][n], grads[1][n], atol=1e-6) for n in grads[0])
    assert images or not any('vision' in n for n in grads[0])


@pytest.mark.parametrize('bidirectional', [False, True])
def test_bfloat16(bidirectional):
    model, batch = vlm(bidirectional=bidirectional, boundary=True), packed(DOCS[:1])
    batch['input_ids'] = torch.tensor([[1] + [IMG] * 6 + DOCS[0]['input_ids'][5:]])
    batch = {
        **{k: batch[k] for k in ('pixel_values',)},
        'input_ids': batch['input_ids'],
        'labels': batch['input_ids'].masked_fill(batch['input_ids'] == IMG, -100),
    }
    exact = model(**batch).loss
    model = model.to(torch.bfloat16).train()
    # fp32 pixels are cast by the front end
    loss = model(**batch).loss
    loss.backward()
    assert loss.dtype == torch.float32 and abs(loss - exact) < 0.1
    assert all(
        p.grad is None or (p.grad.dtype == torch.bfloat16 and torch.isfinite(p.grad).all())
        for p in model.parameters()
    )


def test_autocast():
    model, batch = vlm().train(), packed(DOCS[:2], DOCS[2:])
    exact = model(**batch).loss
    with torch.autocast('cpu', torch.bfloat16):
        loss = model(**batch).loss
    loss.backward()
    assert (
        loss.dtype == torch.float32
        and abs(loss - exact) < 0.1
        and model.lm_head.weight.grad.dtype == torch.float32
    )


@pytest.mark.parametrize('whole', [False, True], ids=['layers', 'model'])
@pytest.mark.parametrize('checkpointing', [False, True])
def test_peft(whole, checkpointing):
    model, batch = vlm(), packed(DOCS[:2], DOCS[2:])
    before = model(**batch).logits
    linear = [
        n
        for n, m in model.named_modules()
        if 'language_model.layers.1' in n and isinstance(m, torch.nn.Linear)
    ]
    names = '|'.join(map(re.escape, linear))
    config = LoraConfig(r=2, lora_alpha=4, target_modules=f'(?:{names})')
    if whole:
        model = get_peft_model(model, config)
    else:
        inject_adapter_in_model(config, model)
        for n, p in model.named_parameters():
            p.requires_grad_('lora_' in n)
    base = model.get_base_model() if whole else model
    assert torch.equal(model.eval()(**batch).logits, before)
    if checkpointing:
        base.gradient_checkpointing_enable()
    model.train()(**batch).loss.backward()
    grads = {
        n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0
    }
    assert len(grads) == 7 and all('lora_B' in n and 'layers.1.' in n for n in grads)
    groups = module_groups(model)
    assert sum('lora_' in n for n, _ in groups['layers']) == 14
    assert sum(map(len, groups.values())) == len(list(base.named_parameters()))
    generated = model.eval().generate(
        **{k: v for k, v in padded(DOCS).items() if k != 'labels'},
        max_new_tokens=3,
        do_sample=False,
    )
    assert len(generated) == 4


# --- saving ---------------------------------------------------------------------------------------


@pytest.mark.parametrize('language', LANGUAGE)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_save_and_load(tmp_path, language, dtype):
    model = vlm(
        language,
        bidirectional=True,
        select_layers=[-1, 1],
        post_layernorm=True,
        projector_norm=True,
        boundary=True,
    ).to(dtype)
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert (
        type(again) is VLMForConditionalGeneration
        and again.dtype == dtype
        and again.config.bidirectional_images
    )
    a, b = model.state_dict(), again.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert (again.lm_head.weight is again.get_input_embeddings().weight) == (language == 'tied')
    assert again.generation_config.suppress_tokens == [IMG]
    assert {f.name for f in tmp_path.iterdir()} == {
        'config.json',
        'generation_config.json',
        'model.safetensors',
        'modeling_vlmbench.py',
    }
    assert type(AutoModel.from_pretrained(tmp_path)) is VLMModel
    assert type(AutoConfig.from_pretrained(tmp_path)) is VLMConfig


def test_attention_back_end_of_the_language_model_is_a_setting(tmp_path):
    vlm().save_pretrained(tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path, attn_implementation='eager')
    assert model.model.language_model.config._attn_implementation == 'eager'
    with torch.no_grad():
        a, b = model(**packed(DOCS[:2])), vlm()(**packed(DOCS[:2]))
        assert torch.allclose(a.logits, b.logits, atol=1e-4)


def test_missing_weights_are_drawn_by_the_part_they_belong_to(tmp_path):
    """A checkpoint without projector and boundary vectors: those are initialised, everything else
    is loaded."""
    model = vlm(boundary=True)
    kept = {
        k: v
        for k, v in model.state_dict().items()
        if 'projector' not in k and 'oi' not in k.split('.')[-1]
    }
    model.save_pretrained(tmp_path, state_dict=kept)
    again = VLMForConditionalGeneration.from_pretrained(tmp_path)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in kept.items())
    vision = again.model.vision
    assert torch.isfinite(vision.soi).all() and vision.soi.abs().sum() > 0
    bound = vision.projector.mlp[0].in_features ** -0.5  # nn.Linear's own default
    assert (
        0 < vision.projector.mlp[0].weight.abs().max() <= bound
        and vision.projector.mlp[0].bias.abs().max() > 0
    )


# --- groups ---------------------------------------------------------------------------------------


@pytest.mark.parametrize('language', LANGUAGE)
@pytest.mark.parametrize(
    'front',
    [dict(), dict(boundary=True, select_layers=[-1], post_layernorm=True, projector_norm=True)],
)
def test_every_parameter_is_in_one_group(language, front):
    model = vlm(language, **front)
    groups = module_groups(model)
    names = [n for g in groups.values() for n, _ in g]
    assert tuple(groups) == GROUPS and len(set(names)) == len(names)
    assert sorted(names) == sorted(n for n, _ in model.named_parameters())
    prefix = dict(
        vision=('model.vision.tower.',),
        projector=('model.vision.',),
        embed=('model.language_model.embed_tokens.',),
        layers=('model.language_model.layers.',),
        norm=('model.language_model.norm.',),
        lm_head=('lm_head.',),
    )
    assert all(n.startswith(prefix[g]) for g, ps in groups.items() for n, _ in ps)
    assert len(groups['lm_head']) == (language != 'tied') and len(groups['projector']) == (
        4 if not front else 10
    )


def test_unknown_parameters_are_refused():
    model = vlm()
    model.extra = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match='extra.weight belongs to none'):
        module_groups(model)


def test_without_a_front_end_it_is_a_language_model(tmp_path):
    model = VLMForConditionalGeneration(VLMConfig(text_config=LANGUAGE['llama'])).eval()
    model.save_pretrained(tmp_path)
    again, ids = AutoModelForImageTextToText.from_pretrained(tmp_path), torch.tensor([[1, 7, 9]])
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert module_groups(again)['vision'] == module_groups(again)['projector'] == []
    with pytest.raises(ValueError, match='no vision front end'):
        model(ids, torch.zeros(1, 3, 16, 16))


# --- processor ------------------------------------------------------------------------------------


@pytest.fixture
def processor():
    words = [
        '<pad>',
        '<bos>',
        '<eos>',
        '<unk>',
        '<image>',
        '<|system|>',
        '<|user|>',
        '<|assistant|>',
        '<|end|>',
        'what',
        'colour',
        'red',
        'blue',
    ]
    backend = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token='<unk>'))
    tok = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token='<pad>',
        bos_token='<bos>',
        eos_token='<eos>',
        unk_token='<unk>',
        additional_special_tokens=words[4:9],
    )
    tok.backend_tokenizer.pre_tokenizer = WhitespaceSplit()
    return VLMProcessor(
        tok,
        ImageTransform('squash', 16, patch=8),
        dict(type='encoder', backbone=backbone_dict(CLIP)),
        template='world',
    )


def picture(colour, size=(20, 12)):
    return Image.new('RGB', size, colour)


def test_processor_feeds_the_model(processor):
    model = vlm()
    batch = processor(
        text=[
            '<|user|> <image> what',
            '<|user|> what colour what <|assistant|>',
            '<image> <image>',
        ],
        images=[picture('red'), picture('blue'), picture('red')],
    )
    assert batch['image_sizes'].tolist() == [[16, 16]] * 3 and batch['attention_mask'].sum(
        1
    ).tolist() == [6, 5, 8]
    with torch.no_grad():
        out = model(**batch).logits
        one = model(**processor(text='<|user|> <image> what', images=picture('red'))).logits
    assert torch.allclose(out[0, -6:], one[0], atol=1e-5)


def test_training_encoding_and_prompt_agree(processor):
    turns = [
        Turn('user', '<image> what colour'),
        Turn('assistant', 'red'),
        Turn('user', 'what'),
        Turn('assistant', 'blue'),
    ]
    full = processor.encode(Sample('a', turns, [picture('red')]))
    prompt = processor.encode(Sample('a', turns[:3], [picture('red')]), add_generation_prompt=True)
    n = len(prompt.input_ids)
    assert torch.equal(full.input_ids[:n], prompt.input_ids) and torch.equal(
        full.labels[n:], full.input_ids[n:]
    )
    assert full.n_targets == 4 and torch.equal(full.image_ids >= 0, full.input_ids == IMG)


def test_processor_collators_and_model_fit_together(processor):
    """Encoded samples packed, padded right and padded left: the same loss, and the same logits for
    every document."""
    model = vlm(bidirectional=True)
    ask = lambda i, text, n, answer: Sample(
        str(i),
        [Turn('user', '<image> ' * n + text), Turn('assistant', answer)],
        [picture(c) for c in ('red', 'blue')[:n]],
    )
    docs = [
        processor.encode(ask(*a))
        for a in (
            (0, 'what', 1, 'red'),
            (1, 'what colour', 0, 'blue blue'),
            (2, 'colour', 2, 'red blue'),
        )
    ]
    batches = [
        collate_packed([docs[:2], docs[2:]], PAD),
        collate_packed([docs], PAD, length=40),
        collate_padded(docs, PAD),
        collate_padded(docs, PAD, side='left'),
    ]
    seen = []
    for b in batches:
        inputs = {k: v for k, v in b.items() if isinstance(v, torch.Tensor)}
        with torch.no_grad():
            out = model(**inputs)
        seen.append((out.loss, out.logits[b['document_ids'] >= 0]))
    for loss, logits in seen[1:]:
        assert abs(loss - seen[0][0]) < 1e-5 and (logits - seen[0][1]).abs().max() < 1e-4


@pytest.mark.parametrize('mode, size, images', [('any_aspect', 32, 1), ('tiles', 16, 3)])
def test_variable_sizes_and_tiles(processor, mode, size, images):
    transform = ImageTransform(mode, size, patch=8, grid=((16, 32), (32, 16)))
    p = VLMProcessor(processor.tokenizer, transform, processor.front_end, template='world')
    enc = p.encode(
        Sample(
            'a',
            [Turn('user', '<image> what <image>'), Turn('assistant', 'red')],
            [picture('red', (40, 20)), picture('blue', (10, 30))],
        )
    )
    assert len(enc.images) == 2 * images
    per = [p.num_image_tokens(*i['size']) for i in enc.images]
    assert [int((enc.image_ids == k).sum()) for k in range(2 * images)] == per
    batch = p(
        text='<image> what <image>', images=[picture('red', (40, 20)), picture('blue', (10, 30))]
    )
    assert int((batch['input_ids'] == IMG).sum()) == sum(per)
    with torch.no_grad():
        assert torch.isfinite(vlm()(**batch).logits).all()


@pytest.mark.parametrize(
    'call, message',
    [
        (dict(text='<image>'), '1 <image> slots in the text, but 0 images'),
        (dict(text='what', images=['x']), '0 <image> slots'),
        (dict(text=['<image>', 'what'], images=[['a'], ['b']]), 'text 1 has 0'),
        (dict(text=['what'], images=[['a'], []]), 'nested in 2 lists'),
        (dict(images=['a']), 'text is needed'),
        (dict(text='what', videos=['v']), 'not supported'),
    ],
)
def test_processor_errors(processor, call, message):
    with pytest.raises(ValueError, match=message):
        processor(**call)


def test_missing_picture_is_an_image_error(processor, tmp_path):
    with pytest.raises(ValueError, match='missing: '):
        processor(text='<image>', images=str(tmp_path / 'none.png'))


def test_arrays_and_tensors_are_pictures(processor):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (12, 20, 3), dtype=np.uint8)
    want = processor(text='<image>', images=Image.fromarray(pixels))['pixel_values']
    floats = torch.tensor(pixels).permute(2, 0, 1) / 255
    for same in (
        pixels,
        pixels / 255,
        np.moveaxis(pixels, -1, 0),
        torch.tensor(pixels),
        floats,
        floats.double(),
    ):
        assert torch.equal(processor(text='<image>', images=same)['pixel_values'], want)
    for wrong, message in (
        (pixels[..., 0], r'shape \(12, 20\).*give one picture as'),
        (pixels[None], 'give one picture'),
        (pixels / 2.0, 'holds 0 to 127.5; floats are 0 to 1'),
        (pixels.astype(int), 'use uint8'),
        (floats * float('nan'), 'holds nan'),
        (7, 'int is no picture'),
        ({}, 'dict is no picture'),
    ):
        with pytest.raises(ImageError, match=message):
            processor(text='<image>', images=wrong)


def phone_photo(folder, number=6):
    "A file of 24 x 16 stored pixels whose EXIF data says how to turn them."
    pixels = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = number
    Image.fromarray(pixels).save(folder / f'{number}.png', exif=exif)
    return folder / f'{number}.png'


@pytest.mark.parametrize('number', range(1, 9))
def test_a_photo_is_upright_whatever_the_way_in(processor, tmp_path, number):
    path = phone_photo(tmp_path, number)
    processor.transform = ImageTransform('any_aspect', 48, patch=8)
    seen = ImageOps.exif_transpose(Image.open(path))
    want = processor(text='<image>', images=np.asarray(seen))
    assert want['image_sizes'].tolist() == [[48, 32] if number > 4 else [32, 48]]
    talk = [Turn('user', '<image> what')]
    url = 'data:image/png;base64,' + base64.b64encode(path.read_bytes()).decode()
    for way in (
        path,
        str(path),
        path.read_bytes(),
        url,
        ImageRef(path.name, str(tmp_path)),
        Image.open(path),
        load_image(Image.open(path)),
        torch.tensor(np.asarray(seen)),
    ):
        sample = Sample('a', talk, [way])
        message = dict(role='user', content=[dict(type='image', image=way)])
        got = [
            processor(text='<image>', images=way)['pixel_values'],
            processor.image_processor(way)['pixel_values'],
            processor.encode(sample).images[0]['pixel_values'][None],
            prompt_inputs(processor, [sample])['pixel_values'],
        ]
        if isinstance(way, (str, Image.Image)):
            chat = processor.apply_chat_template([message], tokenize=True, return_dict=True)
            got.append(chat['pixel_values'])
        for pixels in got:
            assert torch.equal(pixels, want['pixel_values']), way


@pytest.mark.parametrize('token', ['<image>', '<|system|>'])
def test_processor_cuts_text_and_never_a_picture(processor, token):
    p = VLMProcessor(
        processor.tokenizer,
        processor.transform,
        processor.front_end,
        image_token=token,
        template='world',
    )
    text, image = 'what <image> colour red', picture('red')
    for side, want in (
        ('right', ['what', *[token] * 4]),
        ('left', [*[token] * 4, 'colour', 'red']),
    ):
        p.tokenizer.truncation_side = side
        cut = p(text=text, images=image, truncation=True, max_length=len(want))['input_ids'][
            0
        ].tolist()
        assert p.tokenizer.convert_ids_to_tokens(cut) == want
        with pytest.raises(
            ValueError, match='text 0 has 7 tokens, 4 of them of pictures: max_length=3 would cut'
        ):
            p(text=text, images=image, truncation=True, max_length=3)
    padded = p(text=['what', text], images=image, padding='max_length', max_length=9)
    assert padded['input_ids'].shape == (2, 9) and padded['attention_mask'].sum(1).tolist() == [
        1,
        7,
    ]
    with pytest.raises(TypeError, match='takes no truncate; known besides'):
        p(text='what', truncate=True)


@pytest.mark.parametrize('token', ['<image>', '<|system|>'])
def test_assistant_mask_marks_the_answers(processor, token):
    "Behind pictures, in rows of different lengths: the tokens that are training targets."
    p = VLMProcessor(
        processor.tokenizer,
        processor.transform,
        processor.front_end,
        image_token=token,
        template='world',
    )
    chats = [
        [
            ('user', '<image> what colour'),
            ('assistant', 'red'),
            ('user', 'what'),
            ('assistant', 'blue blue'),
        ],
        [('user', 'what'), ('assistant', 'red')],
    ]
    messages = [
        [
            dict(
                role=r,
                content=[dict(type='image', image=picture('red')), dict(type='text', text=t[8:])]
                if '<image>' in t
                else [dict(type='text', text=t)],
            )
            for r, t in chat
        ]
        for chat in chats
    ]
    out = p.apply_chat_template(
        messages,
        tokenize=True,
        return_dict=True,
        return_tensors='pt',
        return_assistant_tokens_mask=True,
        processor_kwargs=dict(padding=True),
    )
    assert out['assistant_masks'].shape == out['input_ids'].shape
    for ids, mask, chat in zip(out['input_ids'], out['assistant_masks'], chats):
        sample = Sample(
            's', [Turn(r, t) for r, t in chat], [picture('red')] * ('<image>' in chat[0][1])
        )
        enc = p.encode(sample)
        assert ids[-len(enc.input_ids) :].equal(enc.input_ids)
        assert ids[mask.bool()].tolist() == [i for i in enc.labels.tolist() if i != -100]


def test_pipeline_in_batches_answers_as_one_by_one(processor, tmp_path):
    model = vlm()
    model.save_pretrained(tmp_path), processor.save_pretrained(tmp_path)
    ask = pipeline('image-text-to-text', model=str(tmp_path), device='cpu')
    chats = [
        [
            dict(
                role='user',
                content=[dict(type='image', image=picture(c)), dict(type='text', text=t)],
            )
        ]
        for c, t in (('red', 'what colour'), ('blue', 'what'), ('red', 'what colour what blue'))
    ]
    settings = dict(
        return_full_text=False,
        generate_kwargs=dict(max_new_tokens=5, do_sample=False, eos_token_id=None),
    )
    one = [ask(text=c, **settings)[0]['generated_text'] for c in chats]
    assert [
        o[0]['generated_text'] for o in ask(text=chats, batch_size=3, **settings)
    ] == one and len(set(one)) > 1
    ask.save_pretrained(tmp_path / 'again')
    assert VLMProcessor.from_pretrained(tmp_path / 'again').transform == processor.transform
    assert ask.image_processor([picture('red')] * 2)['pixel_values'].shape == (2, 3, 16, 16)


# --- begin tokens


BEGINS = {
    'none': {},
    'post-processor': dict(single='<s> $A'),
    'post-processor with end': dict(single='<s> $A </s>'),
    'add_bos_token': dict(add_bos_token=True),
    'add_eos_token too': dict(add_bos_token=True, add_eos_token=True),
    'another begin token': dict(single='<|begin_of_text|> $A'),
    'no begin token': dict(bos_token=None),
}
MARKS = (
    '<s> </s> <image> <|begin_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|> '
    '<|im_start|> <|im_end|> <|system|> <|user|> <|assistant|> <|end|> '
    '<start_of_turn> <end_of_turn> <|endoftext|> <|end_of_text|>'
).split()


def begin_processor(begin, template=None, chat_template=None):
    "A byte-level tokenizer that adds begin tokens in one of the ways of `BEGINS`."
    settings = dict(BEGINS[begin])
    tok = Tokenizer(BPE())
    tok.pre_tokenizer, tok.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=320,
        show_progress=False,
        initial_alphabet=ByteLevel.alphabet(),
        special_tokens=MARKS,
    )
    tok.train_from_iterator(['USER: hi ASSISTANT: yes what colour'], trainer)
    if single := settings.pop('single', None):
        special = [(m, MARKS.index(m)) for m in ('<s>', '</s>', '<|begin_of_text|>')]
        tok.post_processor = TemplateProcessing(single=single, special_tokens=special)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tok,
        **dict(bos_token='<s>', eos_token='</s>', pad_token='</s>') | settings,
        additional_special_tokens=MARKS,
        chat_template=chat_template,
    )
    front = dict(type='encoder', backbone=backbone_dict(CLIP))
    return VLMProcessor(fast, ImageTransform('squash', 16, patch=8), front, template=template)


def valid(batch):
    "The ids of every row without the padding."
    return [
        i[m.bool()].tolist()
        for i, m in zip(batch['input_ids'], batch['attention_mask'], strict=True)
    ]


@pytest.mark.parametrize('begin', BEGINS)
@pytest.mark.parametrize('template', list(TEMPLATES))
@pytest.mark.fault('two-begin-tokens')
def test_every_road_to_a_prompt_has_the_same_begin_token(begin, template):
    p = begin_processor(begin, template)
    red = picture('red')
    asked = [[('user', '<image>what')], [('user', '<image>what colour is it')]]
    if not get_template(template).captions:
        asked[1] = [('system', 'hi'), *asked[1], ('assistant', 'yes'), ('user', 'hi')]
    messages = [
        [
            dict(
                role=role,
                content=[
                    *[dict(type='image', image=red)] * ('<image>' in text),
                    dict(type='text', text=text.replace('<image>', '')),
                ],
            )
            for role, text in talk
        ]
        for talk in asked
    ]
    want = []
    for talk in messages:
        turns = from_messages(talk, get_template(template).image_sep)
        want.append(
            p.encode(Sample('s', turns, [red]), add_generation_prompt=True).input_ids.tolist()
        )
    texts = p.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    for side in ('left', 'right'):
        pad = dict(padding=True, padding_side=side)
        one_step = p.apply_chat_template(
            messages,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors='pt',
            processor_kwargs=dict(pad),  # which it changes
        )
        two_steps = p(images=[[red], [red]], text=texts, **pad)
        explicit = p(images=[[red], [red]], text=texts, add_special_tokens=True, **pad)
        for road in (one_step, two_steps, explicit):
            assert valid(road) == want
    assert [p(images=red, text=t)['input_ids'][0].tolist() for t in texts] == want
    bos = p.tokenizer.bos_token_id
    for ids in want:
        assert ids[:2].count(bos) <= 1


@pytest.mark.parametrize('begin', BEGINS)
@pytest.mark.parametrize('writes', [True, False])
def test_a_tokenizers_own_template_gets_one_begin_token_both_ways(begin, writes):
    own = "{% for m in messages %}USER: {{ m['content'] }} {% endfor %}"
    p = begin_processor(begin, chat_template=('{{ bos_token }}' if writes else '') + own)
    talk = [dict(role='user', content=[dict(type='text', text='hi')])]
    one = p.apply_chat_template(talk, tokenize=True, return_dict=True, return_tensors='pt')
    two = p(text=p.apply_chat_template(talk, tokenize=False))
    assert one['input_ids'].tolist() == two['input_ids'].tolist()
    ids, bos = two['input_ids'][0].tolist(), p.tokenizer.bos_token_id
    assert ids.count(bos) == (bos is not None and (writes or begin in _ADDS))


_ADDS = ('post-processor', 'post-processor with end', 'add_bos_token', 'add_eos_token too')


def test_raw_text_still_gets_what_the_tokenizer_adds():
    for template in (None, 'vicuna_v1', 'chatml'):
        p = begin_processor('post-processor', template)
        plain = p(text='hi')['input_ids'][0].tolist()
        assert plain == p.tokenizer('hi')['input_ids'] and plain[0] == 0
        bare = p(text='hi', add_special_tokens=False)['input_ids'][0].tolist()
        assert bare == plain[1:]


def test_the_pipeline_sends_the_prompt_that_training_had(tmp_path):
    p, model = begin_processor('post-processor', 'vicuna_v1'), vlm()
    model.resize_token_embeddings(len(p.tokenizer))
    model.config.image_token_id = p.image_token_id
    ask = pipeline('image-text-to-text', model=model, processor=p, device='cpu')
    talk = [
        dict(
            role='user',
            content=[dict(type='image', image=picture('red')), dict(type='text', text='hi')],
        )
    ]
    sent = ask.preprocess(Chat(talk))
    turns = from_messages(talk, '\n')
    want = p.encode(Sample('s', turns, [picture('red')]), add_generation_prompt=True)
    assert sent['input_ids'][0].tolist() == want.input_ids.tolist()
    text = p.apply_chat_template(talk, add_generation_prompt=True, tokenize=False)
    sent = ask.preprocess(dict(images=picture('red'), text=text))
    assert sent['input_ids'][0].tolist() == want.input_ids.tolist()
