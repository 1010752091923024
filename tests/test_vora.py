"""VoRA: who sees what, packing and padding, merge to a plain language model, published counts, training on text alone, bad input."""
import pytest
import torch
from transformers import AutoModelForCausalLM

from test_vision_lora import IMAGE, awake, inputs, vlm
from vlmbench.methods.vora import (LOSSES, METHOD, PAPER_SCALE, export_language_model, from_reference_name, meta_vora, to_reference, to_reference_name,
                                   recipe)
from vlmbench.models.vision_lora import merge_vision_lora, vision_lora_layers
from vlmbench.train.recipe import RecipeError, Scale, get_scale, override

LORA = dict(layers=2, r=4)
close = lambda a, b, atol=1e-5: torch.testing.assert_close(a, b, atol=atol, rtol=1e-5)


@torch.no_grad()
def test_who_sees_what():
    model, a = awake(vlm(lora=LORA)), inputs()
    base = model(**a, output_hidden_states=True)
    other = model(**{**a, 'pixel_values': a['pixel_values'] + 1}).logits
    close(other[0, :2], base.logits[0, :2])                                            # text before an image
    assert (other[0, 2:] - base.logits[0, 2:]).abs().amax(-1).min() > 1e-4             # the image and what follows
    ids = a['input_ids'].clone()
    ids[0, 6:] = (ids[0, 6:] + 1) % 38
    later = model(**{**a, 'input_ids': ids}).logits
    close(later[0, :6], base.logits[0, :6])                                            # image tokens and later text
    pixels = a['pixel_values'].clone()
    pixels[0, :, 8:, 8:] += 1
    last = model(**{**a, 'pixel_values': pixels}).logits
    assert (last[0, 2] - base.logits[0, 2]).abs().max() > 1e-4                         # the first patch sees the last one


@torch.no_grad()
def test_touching_images_stay_apart():
    model = awake(vlm(lora=LORA))
    ids, pixels = torch.tensor([[1] + [IMAGE] * 8 + [2]]), torch.randn(2, 3, 16, 16)
    changed = torch.cat([pixels[:1], pixels[1:] + 1])
    a, b = (model(input_ids=ids, pixel_values=p).logits for p in (pixels, changed))
    close(a[0, :5], b[0, :5])
    assert (a[0, 5:] - b[0, 5:]).abs().amax(-1).min() > 1e-4


@torch.no_grad()
def test_padding_and_packing():
    model, a = awake(vlm(lora=LORA)), inputs()
    alone = model(**a).logits
    pad = lambda t, v, left: torch.nn.functional.pad(t, (3, 0) if left else (0, 3), value=v)
    for left in (False, True):
        mask = pad(a['attention_mask'], 0, left)
        out = model(input_ids=pad(a['input_ids'], 0, left), attention_mask=mask, pixel_values=a['pixel_values'],
                    position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
        close(out[:, 3:] if left else out[:, :12], alone)
    docs = torch.arange(2).repeat_interleave(12)[None]
    packed = model(input_ids=a['input_ids'].flatten()[None], pixel_values=a['pixel_values'], document_ids=docs).logits
    close(packed.reshape(2, 12, -1), alone)


@torch.no_grad()
def test_merged_is_a_plain_language_model(tmp_path):
    model, text = awake(vlm(lora=LORA)), torch.randint(0, 38, (2, 7))
    with pytest.raises(ValueError, match='not merged'): export_language_model(model, None, tmp_path / 'a')
    before = model(input_ids=text).logits
    merge_vision_lora(model)
    close(model(input_ids=text).logits, before)
    export_language_model(model, None, tmp_path / 'b')
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / 'b').eval()
    close(plain(input_ids=text).logits, before)
    biased = awake(vlm(lora=dict(LORA, extra_bias='zero')))
    merge_vision_lora(biased)
    with pytest.raises(ValueError, match='extra biases are left'): export_language_model(biased, None, tmp_path / 'c')


def test_text_alone_trains_under_gradient_checkpointing():
    model = awake(vlm(lora=LORA)).train()
    for p in model.parameters(): p.requires_grad_(False)
    trained = [p for m in vision_lora_layers(model).values() for p in m.vision_parameters()]
    for p in trained: p.requires_grad_(True)
    ids = torch.randint(0, 38, (2, 9))
    model(input_ids=ids, labels=ids).loss.backward()
    want = [p.grad.clone() for p in trained]
    model.zero_grad()
    model.gradient_checkpointing_enable(dict(use_reentrant=False))
    model(input_ids=ids, labels=ids).loss.backward()
    for p, g in zip(trained, want): close(p.grad, g, 1e-6)


@pytest.mark.parametrize('r, billions', [(1024, 2.21), (512, 1.11)])
def test_published_counts(r, billions):
    model = meta_vora(recipe(PAPER_SCALE, r=r), PAPER_SCALE)
    count = sum(p.numel() for m in vision_lora_layers(model).values() for p in m.vision_parameters())
    assert round(count / 1e9, 2) == billions
    assert round(sum(p.numel() for p in model.model.vision.parameters()) / 1e6, 2) == 7.98


def test_names_both_ways():
    for name in to_reference(vlm(lora=dict(LORA, extra_bias='zero'))): assert to_reference_name(from_reference_name(name)) == name


def test_published_settings():
    pre, tune = recipe(PAPER_SCALE).stages
    assert (pre.lr, pre.schedule, pre.batch_rows * pre.accumulation, round(pre.warmup_ratio * pre.steps)) == (2e-4, 'constant', 256, 100)
    assert (tune.lr, tune.schedule, tune.batch_rows * tune.accumulation, round(tune.warmup_ratio * tune.steps)) == (2e-5, 'cosine', 128, 20)
    assert {g for g, t in pre.trains.items() if t.trains} == {'vision', 'projector'}
    assert all(t.trains for t in tune.trains.values())
    coded = recipe(PAPER_SCALE, finetune='as_coded', extra_bias='reference_random').stage('finetune')
    assert {g for g, t in coded.trains.items() if t.trains} == {'vision', 'projector'}
    assert recipe(get_scale('tiny'), distill='none').stage('pretrain').losses == ()


@pytest.mark.parametrize('kw, match', [(dict(layers=9), 'has 8'), (dict(r=0), "r must be"), (dict(distill='all'), 'distill must be'), (dict(finetune='some'), 'finetune must')])
def test_bad_recipes(kw, match):
    with pytest.raises(RecipeError, match=match): recipe(get_scale('tiny'), **kw)


def test_bad_scales_and_losses():
    tiny = get_scale('tiny').to_dict()
    for change, match in ((dict(image_size=60), 'no multiple'), (dict(image_size=256), 'max_tokens')):
        with pytest.raises(RecipeError, match=match): recipe(Scale.from_dict({**tiny, **change}))
    scale = get_scale('tiny')
    given = recipe(scale)
    with pytest.raises(RecipeError, match="teacher's patches"): METHOD.build(override(given, {'front_end.patch_size': 16}), scale, 0)
    stage = override(given, {'stages.pretrain.losses': (('every_block', 1.),)}).stage('pretrain')
    with pytest.raises(RecipeError, match="no loss 'every_block'"): METHOD.losses(None, None, stage, scale)
    assert set(LOSSES) >= {'block_wise', 'last_block'}
