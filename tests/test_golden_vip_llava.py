"""Golden parity of ViP-LLaVA's model parts, over every case_* folder (VLMBENCH_GOLDEN, default
tests/golden)."""

import json, os
from functools import lru_cache
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
from PIL import Image
from pillow_order import resize_as_pillow_13, vertical_first
from published_inputs import splice
from safetensors.torch import load_file

from vlmbench.data.image import ImageTransform
from vlmbench.checkpoints.llava import (
    TRANSFORMERS,
    VIP_LLAVA,
    from_reference,
    load_projector,
    to_reference,
)
from vlmbench.train.prepare import lora_modules, prepare
from vlmbench.train.recipe import Stage, full, lora

ROOT = Path(os.environ.get('VLMBENCH_GOLDEN', Path(__file__).parent / 'golden')) / 'vip_llava'
CASES = sorted(ROOT.glob('case_*'))
close = lambda a, b, tol: torch.testing.assert_close(a.float(), b.float(), rtol=0, atol=tol)


@lru_cache
def load(folder):
    spec, io = (
        json.loads((folder / 'model.json').read_text()),
        load_file(folder / 'model_io.safetensors'),
    )
    weights = load_file(folder / 'weights_fp16.safetensors')
    return spec, io, weights, from_reference(weights, spec)


@pytest.fixture(params=CASES, ids=lambda p: p.name)
def case(request):
    return request.param


def forward(folder, side='right', grad=False):
    spec, io, _, model = load(folder)
    with torch.set_grad_enabled(grad):
        flat, counts = model.get_image_features(io['pixel_values'].float())
        x = splice(
            model,
            io['input_ids'],
            flat.split(counts.tolist()),
            io['labels'],
            io['attention_mask'],
            spec['tokenizer_model_max_length'],
            side,
        )
        return x, model(**x)


def test_there_are_cases():
    assert CASES


def test_tower_and_projector(case):
    spec, io, _, model = load(case)
    front, pixels = model.model.vision, io['pixel_values'].float()
    with torch.no_grad():
        states = front.tower(pixels, output_hidden_states=True).hidden_states
        for i in spec['feature_layers']:
            close(states[i], io[f'clip_hidden_state_{i}'], 2e-5)
        fused = front.select(pixels)
        close(fused, io['fused_features'], 2e-5)
        close(front.projector.norm(fused), io['layernormed'], 2e-5)
        close(front.projector(fused), io['projected'], 2e-5)


@pytest.mark.parametrize('side', ['right', 'left'])
def test_splice_and_forward(case, side):
    _, io, _, _ = load(case)
    x, out = forward(case, side)
    assert torch.equal(x['labels'], io[f'merged_labels_{side}'])
    assert torch.equal(x['attention_mask'], io[f'merged_mask_{side}'].long())
    close(out.loss.reshape(1), io[f'loss_{side}'], 1e-5)
    if side == 'right':
        close(x['inputs_embeds'], io['merged_embeds_right'], 2e-5)
        keep = x['attention_mask'].bool()
        close(out.logits[keep], io['logits_right'][keep], 2e-5)
    else:
        close(out.logits[:, -io['logits_left'].shape[1] :], io['logits_left'], 2e-5)


def test_gradients(case):
    spec, io, _, model = load(case)
    model.requires_grad_(True)
    model.model.vision.tower.requires_grad_(False)
    model.zero_grad()
    forward(case, grad=True)[1].loss.backward()
    grads = VIP_LLAVA.write({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    for k in io:
        if k.startswith('grad.'):
            close(grads['model.' + k.removeprefix('grad.')], io[k], 1e-5)
    assert set(grads) == set(spec['grad_norms'])
    for k, v in spec['grad_norms'].items():
        assert abs(float(grads[k].norm()) - v) <= 1e-4 * max(1, v), k


def test_generation(case):
    _, io, _, model = load(case)
    n = int((io['gen_prompt'] == -200).sum())
    with torch.no_grad():
        flat, counts = model.get_image_features(io['pixel_values'][: max(n, 1)].float())
        x = splice(model, io['gen_prompt'], flat.split(counts.tolist()))
        new = model.generate(
            inputs_embeds=x['inputs_embeds'],
            attention_mask=x['attention_mask'],
            max_new_tokens=io['gen_tokens'].shape[1] - 1,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    assert new[0].tolist() == io['gen_tokens'][0, 1:].tolist()


def test_optimizer_groups_and_lora(case):
    spec, _, weights, _ = load(case)
    for rate, want in spec['optimizer_groups'].items():
        model = from_reference(weights, spec)
        stage = Stage(
            's',
            dict(
                projector=full(None if rate == 'None' else float(rate)),
                embed=full(),
                layers=full(),
                norm=full(),
                lm_head=full(),
            ),
            'x',
            lr=1e-3,
            steps=1,
            weight_decay=0.01,
            decay_embeddings=True,
        )
        named, ours = dict(model.named_parameters()), {}
        for g in prepare(model, stage).optimizer_groups():
            names = VIP_LLAVA.write({n: named[n] for n in g['param_names']})
            ours.setdefault((g['lr'], g['weight_decay']), set()).update(names)
        theirs = {(1e-3 if g['lr'] is None else g['lr'], g['weight_decay']): g for g in want}
        assert set(ours) == set(theirs)
        for k, g in theirs.items():
            assert len(ours[k]) == g['n_params'] and set(g['params']) <= ours[k]
    prepare(model, Stage('l', dict(layers=lora(4, 8), projector=full()), 'x', lr=1e-3, steps=1))
    assert (
        sorted({n.rpartition('.')[2] for n in lora_modules(model)}) == spec['lora_target_modules']
    )


def stage1_state(model):
    "What the original saves after its first stage."
    return {k: v for k, v in to_reference(model).items() if k.startswith('model.mm_projector.')}


def test_stage1_file(case):
    spec, _, weights, model = load(case)
    state = stage1_state(model)
    assert sorted(state) == spec['stage1_saved_keys']
    other = from_reference({k: v + ('mm_projector' in k) for k, v in weights.items()}, spec)
    load_projector(other, {'base_model.' + k: v for k, v in state.items()})
    assert all(torch.equal(v, stage1_state(other)[k]) for k, v in state.items())
    with pytest.raises(ValueError, match='no projector weights'):
        load_projector(other, {'lm_head.weight': weights['lm_head.weight']})
    with pytest.raises(ValueError, match='missing'):
        from_reference({k: v for k, v in weights.items() if 'final_linear.2' not in k}, spec)


def test_preprocessing(case, monkeypatch):
    """Bit for bit, once the two passes of a resize run in the order of the Pillow that made the
    vectors."""
    monkeypatch.setattr(Image.Image, 'resize', resize_as_pillow_13)
    misc, want = (
        json.loads((case / 'misc.json').read_text()),
        load_file(case / 'preprocess.safetensors'),
    )
    for p in misc['preprocess']:
        t = ImageTransform(
            dict(pad='pad', resize='squash').get(p['mode'], 'crop'),
            misc['size'],
            tuple(misc['mean']),
            tuple(misc['std']),
            background=tuple(misc['pad_colour']),
        )
        got = t(Image.open(case / p['image']).convert('RGB'))[0]['pixel_values']
        assert got.shape == want[p['key']].shape
        close(got, want[p['key']], 1e-6)


def test_the_order_of_passes_is_pillows():
    "The stand-in equals `Image.resize` of this Pillow wherever both shrink in the same order."
    rng, major = np.random.default_rng(0), int(PIL.__version__.split('.')[0])
    for w, h, *new in rng.integers(20, 90, (60, 4)).tolist():
        image = Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8))
        if major >= 13 or not vertical_first((w, h), new):
            assert resize_as_pillow_13(image, new, 3).tobytes() == image.resize(new, 3).tobytes(), (
                w,
                h,
                new,
            )


def test_transformers_parity(case):
    from transformers import AutoConfig, VipLlavaConfig, VipLlavaForConditionalGeneration

    spec, io, weights, _ = load(case)
    used = set(io['input_ids'].flatten().tolist())
    image_id = next(i for i in range(spec['llm']['vocab_size'] - 1, 0, -1) if i not in used)
    ours = from_reference(weights, spec, image_token_id=image_id)
    state = TRANSFORMERS.write(ours.state_dict())
    assert all(
        state[h].equal(weights[r].float())
        for r, h in spec['hf_key_map'].items()
        if r in weights and h in state
    )
    assert len(set(spec['hf_key_map'].values()) & set(state)) == len(
        set(spec['hf_key_map']) & set(weights)
    )
    config = VipLlavaConfig(
        vision_config=AutoConfig.for_model(
            'clip_vision_model', **{**spec['clip_defaults'], **spec['clip']}
        ),
        text_config=ours.config.text_config,
        image_token_index=image_id,
        image_token_id=image_id,
        vision_feature_layers=spec['feature_layers'],
    )
    theirs = VipLlavaForConditionalGeneration(config).eval()
    info = theirs.load_state_dict(state, strict=False)
    assert not info.unexpected_keys and not [
        k for k in info.missing_keys if 'position_ids' not in k
    ]
    count = io['fused_features'].shape[1]
    row = next(r for r in io['input_ids'] if (r == -200).any())[:]
    row = row[: int((row == -200).nonzero()[-1]) + 5].clamp(min=-200)
    ids = torch.tensor(
        [[t for i in row.tolist() for t in ([image_id] * count if i == -200 else [i])]]
    )
    batch = dict(input_ids=ids, pixel_values=io['pixel_values'][: int((row == -200).sum())].float())
    with torch.no_grad():
        close(ours(**batch).logits, theirs(**batch).logits, 2e-5)
        kw = dict(
            max_new_tokens=8,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            suppress_tokens=[image_id],
        )
        assert torch.equal(ours.generate(**batch, **kw), theirs.generate(**batch, **kw))
