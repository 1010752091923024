"""Golden parity of zero's layer maps, surrogates and prediction trajectory, over every case_*
folder (VLMBENCH_GOLDEN, default tests/golden)."""

import json, os
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from vlmbench.analysis.streams import scores, stream
from vlmbench.analysis.trajectory import Trajectory
from vlmbench.models.depth import build_surrogate, causal_lm, depth_of, surrogate_map

ROOT = Path(os.environ.get('VLMBENCH_GOLDEN', Path(__file__).parent / 'golden')) / 'zero'
CASES = sorted(ROOT.glob('case_*'))


@pytest.fixture(params=CASES, ids=lambda p: p.name)
def folder(request):
    return request.param


@lru_cache
def meta(folder):
    return json.loads((folder / 'meta.json').read_text())


@lru_cache
def full_decoder(folder):
    spec = dict(meta(folder)['spec']['llama'])
    model = (
        LlamaForCausalLM(
            LlamaConfig(**spec, bos_token_id=None, eos_token_id=None, pad_token_id=None)
        )
        .float()
        .eval()
    )
    state = {
        k.removeprefix('decoder.'): v
        for k, v in load_file(folder / 'weights.safetensors').items()
        if k.startswith('decoder.')
    }
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= (
        {'lm_head.weight'} if spec.get('tie_word_embeddings') else set()
    )
    return model


def test_there_are_cases():
    assert CASES, f'no case_* folder under {ROOT}'


def test_layer_maps(folder):
    for m in json.loads((folder / 'layer_maps.json').read_text()):
        args = m['n_layers'], m['ranges'], m['num_translators']
        if 'error' in m:
            for reference in (False, True):
                with pytest.raises(ValueError, match='ranges'):
                    surrogate_map(*args, reference)
            continue
        theirs, ours = surrogate_map(*args, reference=True), surrogate_map(*args)
        assert (
            list(theirs.kept) == m['kept_original_layers'] and len(theirs) == m['n_layers_after']
        ), m['name']
        assert list(theirs.translators) == m['translator_positions'], m['name']
        assert list(theirs.trained) == m['optimizer_trains_positions'], m['name']
        assert ours.trained == ours.translators and len(ours) == m['n_layers_after'], m['name']
        if m['num_translators'] == 1:
            assert (ours.kept, ours.translators) == (theirs.kept, theirs.translators), m['name']


@pytest.mark.parametrize('implementation', ['sdpa', 'eager'])
def test_surrogate_logits_and_states(folder, implementation):
    full, golden, m = full_decoder(folder), load_file(folder / 'decoder.safetensors'), meta(folder)
    surrogate = build_surrogate(full, m['spec']['translators_range'], reference=True)
    assert list(depth_of(surrogate).kept) == m['surrogate']['kept_original_layers']
    assert list(depth_of(surrogate).translators) == m['surrogate']['translator_class_positions']
    ids = golden['in.input_ids'].long()
    for name, model in (('full', full), ('srgt', surrogate)):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            out = model(ids, output_hidden_states=True)
        model.set_attn_implementation('sdpa')
        torch.testing.assert_close(out.logits, golden[f'{name}.logits'], rtol=0, atol=5e-5)
        torch.testing.assert_close(
            torch.stack(out.hidden_states)[:, 0], golden[f'{name}.hidden_states'], rtol=0, atol=5e-5
        )


def test_surrogate_exports_as_a_plain_model(folder, tmp_path):
    surrogate = build_surrogate(full_decoder(folder), meta(folder)['spec']['translators_range'])
    causal_lm(surrogate).save_pretrained(tmp_path)
    again, info = LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert (
        not info['missing_keys'] and not info['unexpected_keys'] and type(again) is LlamaForCausalLM
    )
    ids = load_file(folder / 'decoder.safetensors')['in.input_ids'].long()
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, surrogate(ids).logits, rtol=0, atol=0)
    kw = dict(max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert torch.equal(
        again.generate(ids, use_cache=True, **kw), again.generate(ids, use_cache=False, **kw)
    )


def test_qwen_kept_layers(folder):
    spec, kept = meta(folder)['spec'], json.loads((folder / 'qwen.json').read_text())['kept']
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(**spec['qwen'], bos_token_id=None, eos_token_id=None, pad_token_id=None)
    )
    surrogate = build_surrogate(model, spec['qwen_range'])
    assert list(depth_of(surrogate).kept) == kept and surrogate.config.num_hidden_layers == len(
        kept
    )
    assert len(surrogate.config.layer_types) == len(kept)


def test_trajectory(folder):
    golden, traj = load_file(folder / 'trajectory.safetensors'), Trajectory()
    ids = golden['token_ids'].long()
    batches = [
        dict(input_ids=part.clamp(min=0), attention_mask=(part >= 0).long())
        for part in ids.split(8)
    ]
    frame = stream(full_decoder(folder), batches, [traj]).frame
    np.testing.assert_allclose(traj.curves['zero'], golden['kl'].numpy(), rtol=0, atol=1e-4)
    np.testing.assert_allclose(
        scores(frame, 'trajectory_zero', 'text_predicting'),
        golden['kl'].mean(0).numpy(),
        rtol=0,
        atol=1e-4,
    )
    # the vocabulary twin is another quantity
    assert np.abs(traj.curves['vocabulary'][:, :-1] - traj.curves['zero'][:, :-1]).max() > 0.1
