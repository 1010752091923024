"""`build_vlm` on Hub-layout folders: three language models, three towers (vision-only and
two-tower), saved and loaded."""

import json
import warnings

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import (
    Aimv2Config,
    Aimv2Model,
    Aimv2VisionConfig,
    Aimv2VisionModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    pipeline,
)

from vlmbench.data.image import HALF, ImageTransform
from vlmbench.models.vlm import build_vlm, load_tower, module_groups

VOCAB = 300
TEXT = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    eos_token_id=1,
    bos_token_id=0,
    pad_token_id=2,
)
LANGUAGE = dict(
    llama=(LlamaForCausalLM, LlamaConfig(**TEXT)),
    qwen2=(Qwen2ForCausalLM, Qwen2Config(**TEXT, tie_word_embeddings=True)),
    qwen3=(Qwen3ForCausalLM, Qwen3Config(**TEXT, head_dim=8)),
)
SMALL = dict(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=2,
    image_size=16,
    patch_size=8,
)
WORDS = dict(
    hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=50
)
TOWERS = {
    'clip': (CLIPVisionModel, CLIPVisionConfig(**SMALL)),
    'siglip': (SiglipVisionModel, SiglipVisionConfig(**SMALL)),
    'aimv2': (Aimv2VisionModel, Aimv2VisionConfig(**SMALL)),
    'clip-two-towers': (
        CLIPModel,
        CLIPConfig(vision_config=SMALL, text_config=WORDS, projection_dim=8),
    ),
    'siglip-two-towers': (SiglipModel, SiglipConfig(vision_config=SMALL, text_config=WORDS)),
    'aimv2-two-towers': (
        Aimv2Model,
        Aimv2Config(vision_config=SMALL, text_config=WORDS, projection_dim=8),
    ),
    'clip-projected': (CLIPVisionModelWithProjection, CLIPVisionConfig(**SMALL)),
}
PREPROCESSOR = {
    'clip': dict(
        image_processor_type='CLIPImageProcessor',
        size={'shortest_edge': 16},
        crop_size={'height': 16, 'width': 16},
        do_center_crop=True,
        resample=3,
    ),
    'siglip': dict(
        image_processor_type='SiglipImageProcessor',
        size={'height': 16, 'width': 16},
        resample=2,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    ),
}


def bpe(special=('<s>', '</s>', '<pad>'), **tokens):
    tok = Tokenizer(BPE())
    tok.pre_tokenizer, tok.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    tok.train_from_iterator(
        ['what colour is the shape', 'a red square'] * 5,
        trainers.BpeTrainer(
            vocab_size=VOCAB,
            special_tokens=list(special),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    names = dict(bos_token='<s>', eos_token='</s>', pad_token='<pad>')
    return PreTrainedTokenizerFast(
        tokenizer_object=tok, **{**{k: v for k, v in names.items() if v in special}, **tokens}
    )


@pytest.fixture(scope='module')
def hub(tmp_path_factory):
    "Folders as the Hub would give them."
    root = tmp_path_factory.mktemp('hub')
    torch.manual_seed(0)
    for name, (cls, config) in LANGUAGE.items():
        cls(config).save_pretrained(root / name)
        bpe().save_pretrained(root / name)
    for name, (cls, config) in TOWERS.items():
        cls(config).save_pretrained(root / name)
        if (kind := name.split('-')[0]) in PREPROCESSOR:
            (root / name / 'preprocessor_config.json').write_text(json.dumps(PREPROCESSOR[kind]))
    return root


def build(*args, **kw):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        out = build_vlm(*args, **kw)
    return *out, [str(w.message) for w in said]


@pytest.mark.parametrize('tower', TOWERS)
@pytest.mark.parametrize('language', LANGUAGE)
def test_every_pair_builds_answers_and_round_trips(hub, tmp_path, language, tower):
    model, processor, said = build(hub / language, hub / tower, template='vicuna_v1')
    llm = LANGUAGE[language][0].from_pretrained(hub / language)
    whole = TOWERS[tower][0].from_pretrained(hub / tower)
    ids = torch.randint(3, 90, (2, 7))
    with torch.no_grad():
        assert torch.equal(model(ids).logits[..., : len(llm.lm_head.weight)], llm(ids).logits), (
            'text-only is the language model itself'
        )
    theirs = {k.removeprefix('vision_model.'): v for k, v in whole.state_dict().items()}
    assert all(torch.equal(theirs[k], v) for k, v in model.model.vision.tower.state_dict().items())
    assert any("'<image>' added to the tokenizer" in s for s in said)
    assert any('no preprocessor_config.json' in s for s in said) == tower.startswith('aimv2')
    assert processor.transform.mode == ('crop' if tower.startswith('clip') else 'squash')
    assert (processor.transform.mean == HALF) == tower.startswith('siglip')

    image = Image.new('RGB', (30, 20), 'red')
    messages = [
        dict(
            role='user',
            content=[dict(type='image', image=image), dict(type='text', text='what colour')],
        )
    ]
    inputs = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, add_generation_prompt=True
    )
    assert int((inputs['input_ids'] == model.config.image_token_id).sum()) == 4
    settings = dict(max_new_tokens=4, do_sample=False, eos_token_id=None)
    expected = model.generate(**inputs, **settings)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, proc = (
        AutoModelForImageTextToText.from_pretrained(tmp_path),
        AutoProcessor.from_pretrained(tmp_path),
    )
    inputs = proc.apply_chat_template(
        messages, tokenize=True, return_dict=True, add_generation_prompt=True
    )
    assert again.generate(**inputs, **settings).tolist() == expected.tolist()
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
    answer = pipeline('image-text-to-text', model=str(tmp_path), device='cpu')(
        text=messages, return_full_text=False, generate_kwargs=settings
    )[0]['generated_text']
    assert proc.decode(expected[0], skip_special_tokens=True).endswith(answer) and isinstance(
        answer, str
    )
    assert (
        AutoTokenizer.from_pretrained(tmp_path).convert_tokens_to_ids('<image>')
        == model.config.image_token_id
    )


def test_a_tokenizer_with_an_image_token_is_left_alone(hub):
    tok = bpe(special=('<s>', '</s>', '<pad>', '<|image_pad|>'))
    model, processor, said = build(
        LlamaForCausalLM(LANGUAGE['llama'][1]),
        hub / 'clip',
        tokenizer=tok,
        image_token='<|image_pad|>',
    )
    assert said == [] and model.config.image_token_id == 3 == processor.image_token_id
    assert model.lm_head.weight.shape[0] == VOCAB
    out = processor(text='<image> what', images=Image.new('RGB', (8, 8)))
    assert (out['input_ids'] == 3).sum() == 4


@pytest.mark.fault('vip-16')
def test_embedding_grows_only_when_it_must(hub):
    tok = bpe()
    roomy = LlamaForCausalLM(LlamaConfig(**{**TEXT, 'vocab_size': len(tok) + 5}))
    model, _, said = build(roomy, hub / 'clip', tokenizer=tok)
    assert model.lm_head.weight.shape[0] == len(tok) - 1 + 5 and not any(
        'resized' in s for s in said
    )
    tight = LlamaForCausalLM(LlamaConfig(**{**TEXT, 'vocab_size': len(bpe())}))
    before = tight.get_input_embeddings().weight.detach().clone()
    model, _, said = build(tight, hub / 'clip', tokenizer=bpe())
    after = model.get_input_embeddings().weight
    assert any(f'resized from {len(before)} to {len(before) + 1}' in s for s in said)
    assert torch.equal(after[:-1], before) and torch.allclose(after[-1], before.mean(0), atol=1e-6)
    assert model.config.text_config.vocab_size == len(before) + 1 == model.lm_head.weight.shape[0]


def test_new_parts_follow_the_seed_and_nothing_else(hub):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    a, *_ = build(hub / 'llama', hub / 'clip', dict(boundary=True), seed=3)
    assert torch.equal(torch.get_rng_state(), state), 'the global generator is untouched'
    torch.manual_seed(2)
    b, *_ = build(hub / 'llama', hub / 'clip', dict(boundary=True), seed=3)
    c, *_ = build(hub / 'llama', hub / 'clip', dict(boundary=True), seed=4)
    for (n, p), (_, q), (_, r) in zip(*(module_groups(m)['projector'] for m in (a, b, c))):
        assert torch.equal(p, q) and not torch.equal(p, r), n


@pytest.mark.parametrize('dtype', [torch.bfloat16, 'auto'])
def test_one_dtype_for_the_whole_model(hub, dtype):
    model, *_ = build(
        hub / 'qwen3', hub / 'siglip', dict(boundary=True, projector_norm=True), dtype=dtype
    )
    assert {p.dtype for p in model.parameters()} == {
        torch.bfloat16 if dtype != 'auto' else torch.float32
    }


def test_transform_can_be_chosen(hub):
    assert build(hub / 'llama', hub / 'clip', transform='pad')[1].transform.mode == 'pad'
    chosen = ImageTransform('any_aspect', 32, patch=8)
    assert build(hub / 'llama', hub / 'clip', transform=chosen)[1].transform is chosen


@pytest.mark.parametrize('tower', TOWERS)
@pytest.mark.parametrize('front', [dict(), dict(select_layers=[-3, 0])])
def test_dropped_blocks_change_nothing_but_the_cost(hub, tmp_path, tower, front):
    whole, processor, _ = build(hub / 'llama', hub / tower, front)
    short, *_ = build(hub / 'llama', hub / tower, front, drop_unused_blocks=True)
    inputs = processor(text='<image> what', images=Image.new('RGB', (20, 12), 'red'))
    short.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(short(**inputs).logits, whole(**inputs).logits)
        assert torch.equal(
            AutoModelForImageTextToText.from_pretrained(tmp_path)(**inputs).logits,
            whole(**inputs).logits,
        )
    assert short.config.vision_config['backbone']['num_hidden_layers'] == (2 if not front else 1)
    assert sum(p.numel() for p in short.parameters()) < sum(p.numel() for p in whole.parameters())


def test_missing_pad_token_is_announced(hub):
    model, processor, said = build(
        LlamaForCausalLM(LANGUAGE['llama'][1]), hub / 'clip', tokenizer=bpe(special=('<s>', '</s>'))
    )
    assert any('has no pad token' in s for s in said) and processor.tokenizer.pad_token == '</s>'


@pytest.mark.parametrize(
    'cls, config',
    [
        (PhiForCausalLM, PhiConfig(**TEXT)),
        (
            GPT2LMHeadModel,
            GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=2, eos_token_id=1),
        ),
    ],
    ids=['biased-head', 'other-names'],
)
def test_other_language_models(hub, tmp_path, cls, config):
    torch.manual_seed(0)
    llm = cls(config)
    model, processor, _ = build(llm, hub / 'clip', tokenizer=bpe())
    groups = module_groups(model)
    assert sum(map(len, groups.values())) == len(list(model.parameters()))
    assert groups['layers'] and groups['norm'] and groups['embed']
    inputs = processor(text='<image> what', images=Image.new('RGB', (8, 8)))
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(
            AutoModelForImageTextToText.from_pretrained(tmp_path)(**inputs).logits,
            model(**inputs).logits,
        )


def test_refusals(hub, tmp_path):
    soft = Gemma2ForCausalLM(Gemma2Config(**TEXT, head_dim=8, final_logit_softcapping=0.01))
    with pytest.raises(ValueError, match='Gemma2ForCausalLM changes its logits'):
        build(soft, hub / 'clip', tokenizer=bpe())
    with pytest.raises(ValueError, match='tokenizer is needed'):
        build(LlamaForCausalLM(LANGUAGE['llama'][1]), hub / 'clip')
    with pytest.raises(ValueError, match="'backbone' is missing"):
        build(hub / 'llama', transform=ImageTransform())
    with pytest.raises(ValueError, match='pass an ImageTransform'):
        build(hub / 'llama')
    with pytest.raises(ValueError, match="no setting 'layers'"):
        build(hub / 'llama', hub / 'clip', dict(layers=[1]))
    tower = CLIPVisionModel(CLIPVisionConfig(**SMALL))
    tower.save_pretrained(
        tmp_path, state_dict={k: v for k, v in tower.state_dict().items() if 'layers.1' not in k}
    )
    with pytest.raises(ValueError, match='lacks 16 weights of its CLIPVisionModel'):
        load_tower(tmp_path)
