"""Vision LoRA: equality with the base, merging, image tokens only, saving, groups and bad input."""

import copy

import pytest
import torch
from transformers import AutoModelForImageTextToText, LlamaConfig, Qwen2Config, Qwen3Config

from vlmbench.models.vision_lora import (
    LoRASettings,
    VisionLoRALinear,
    add_vision_lora,
    merge_vision_lora,
    vision_lora_layers,
)
from vlmbench.models.vlm import VLMConfig, VLMForConditionalGeneration, module_groups
from vlmbench.train.checkpoint import export

SHAPE = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=40,
)
FAMILIES = dict(llama=LlamaConfig, qwen2=Qwen2Config, qwen3=Qwen3Config)
IMAGE = 39


def vlm(family='qwen2', lora=None, seed=0, **kw):
    torch.manual_seed(seed)
    front = dict(type='vora', patch_size=8, width=16, image_size=16, lora=lora)
    extra = dict(head_dim=8) if family == 'qwen3' else {}
    config = VLMConfig(
        text_config=FAMILIES[family](**SHAPE, **extra),
        vision_config=front,
        image_token_id=IMAGE,
        bidirectional_images=True,
        **kw,
    )
    return VLMForConditionalGeneration(config).eval()


def awake(model, seed=1):
    "B away from zero, so that the update does something."
    torch.manual_seed(seed)
    for m in vision_lora_layers(model).values():
        torch.nn.init.normal_(m.lora_B.weight, std=0.2)
    return model


def inputs(seed=0):
    torch.manual_seed(seed)
    ids = torch.randint(0, 38, (2, 12))
    ids[0, 2:6] = ids[1, 5:9] = IMAGE
    return dict(
        input_ids=ids, pixel_values=torch.randn(2, 3, 16, 16), attention_mask=torch.ones_like(ids)
    )


@pytest.mark.parametrize('family', FAMILIES)
@torch.no_grad()
def test_b_zero_is_the_base(family):
    model, batch = vlm(family, dict(layers=2, r=4)), inputs()
    plain = copy.deepcopy(model)
    merge_vision_lora(plain)
    assert not vision_lora_layers(plain) and len(vision_lora_layers(model)) == 14
    torch.testing.assert_close(
        model(**batch).logits, plain(**batch).logits, atol=1e-6, rtol=1e-6
    )  # copies differ in alignment


@torch.no_grad()
def test_random_extra_biases_are_not_the_base_and_zero_ones_are():
    base = vlm(lora=None)
    for how, same in (('zero', True), ('reference_random', False)):
        model = copy.deepcopy(base)
        add_vision_lora(model.model.language_model, LoRASettings(2, 4, extra_bias=how))
        assert torch.allclose(model(**inputs()).logits, base(**inputs()).logits, atol=1e-6) is same


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('extra', ['none', 'reference_random'])
@torch.no_grad()
def test_merge(family, extra):
    model, batch = awake(vlm(family, dict(layers=2, r=4, scale=0.7, extra_bias=extra))), inputs()
    before = model(**batch).logits
    assert merge_vision_lora(model) == 14
    torch.testing.assert_close(model(**batch).logits, before, atol=1e-5, rtol=1e-5)
    left = model.config.vision_config['lora']
    assert left is None if extra == 'none' else left['merged']
    assert merge_vision_lora(model) == 0


@pytest.mark.parametrize(
    'lora',
    [
        dict(layers=2, r=4),
        dict(layers=1, r=3, extra_bias='reference_random'),
        dict(layers=2, r=4, tokens='image'),
    ],
)
@pytest.mark.parametrize('merged', [False, True])
@torch.no_grad()
def test_save_and_load(lora, merged, tmp_path):
    model, batch = awake(vlm(lora=lora)), inputs()
    if merged:
        if lora.get('tokens') == 'image':
            return
        merge_vision_lora(model)
    export(model, None, tmp_path / 'm')
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / 'm').eval()
    assert torch.equal(again(**batch).logits, model(**batch).logits)
    assert len(vision_lora_layers(again)) == len(vision_lora_layers(model))


@torch.no_grad()
def test_image_tokens_only():
    model = awake(vlm(lora=dict(layers=3, r=4, tokens='image')))
    batch, plain = inputs(), vlm(lora=None)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if '.lora_' not in k})
    text = dict(input_ids=torch.randint(0, 38, (2, 9)))
    torch.testing.assert_close(
        model(**text).logits, plain(**text).logits, atol=1e-6, rtol=0
    )  # text alone: the base model
    got, base = model(**batch).logits, plain(**batch).logits
    torch.testing.assert_close(got[0, :2], base[0, :2], atol=1e-6, rtol=0)  # text before the image
    assert (got[0, 2:] - base[0, 2:]).abs().amax(-1).min() > 0  # the image and what sees it
    with pytest.raises(ValueError, match='cannot be merged'):
        merge_vision_lora(model)
    twin = copy.deepcopy(model)
    torch.testing.assert_close(twin(**batch).logits, got, atol=1e-6, rtol=1e-6)
    twin(**text)
    torch.testing.assert_close(model(**batch).logits, got, atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_image_only_lora_generates_as_it_reads():
    model = awake(vlm(lora=dict(layers=3, r=4, tokens='image')))
    batch = {k: v[:1] for k, v in inputs().items()}
    out = model.generate(
        **batch, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    whole = model(input_ids=out[:, :-1], pixel_values=batch['pixel_values']).logits[0, 11:]
    whole[:, IMAGE] = -torch.inf
    assert torch.equal(whole.argmax(-1), out[0, 12:])


def test_groups():
    model = vlm(lora=dict(layers=2, r=4, extra_bias='zero'))
    groups = {g: {n for n, _ in ps} for g, ps in module_groups(model).items()}
    inside = {n for n in groups['vision'] if n.startswith('model.language_model.')}
    assert sum('.lora_' in n for n in inside) == 28
    assert {n.split('.')[-2] for n in inside if n.endswith('.bias')} == {
        'o_proj',
        'gate_proj',
        'up_proj',
        'down_proj',
    }
    assert any(n.endswith('q_proj.bias') for n in groups['layers'])
    assert not any('.lora_' in n for n in groups['layers'])


def test_initialisation():
    layer = VisionLoRALinear(
        torch.nn.Linear(64, 32, bias=False), LoRASettings(1, 8, extra_bias='reference_random')
    )
    assert not layer.lora_B.weight.any()
    for w in (layer.lora_A.weight, layer.bias):
        assert 0.1 < w.abs().max() <= 64**-0.5 + 1e-6


@pytest.mark.parametrize(
    'bad, match',
    [
        (dict(layers=4, r=4), 'only 3 blocks'),
        (dict(layers=2, r=0), 'lora.r'),
        (dict(layers=0, r=4), 'lora.layers'),
        (dict(layers=2, r=4, modules=['query']), "no linear layer 'query'"),
        (dict(layers=2), "needs \\['r'\\]"),
        (dict(layers=2, r=4, rank=4), 'no setting'),
        (dict(layers=2, r=True), 'lora.r'),
        (dict(layers=2, r=4, scale=0), 'lora.scale'),
        (dict(layers=2, r=4, tokens='text'), 'lora.tokens'),
    ],
)
def test_bad_settings(bad, match):
    with pytest.raises(ValueError, match=match):
        vlm(lora=bad)
