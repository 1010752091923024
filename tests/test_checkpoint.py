"""Checkpoints: atomic, hashed, trained tensors only, honest when the disk is full, exported as
ordinary transformers folders."""

import json
import os
import resource
import shutil
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForImageTextToText

from train_stubs import packed_loader, run, tiny_vlm
from vlmbench.train.checkpoint import (
    CheckpointError,
    best_state,
    export,
    join_state,
    latest,
    load_state,
    load_weights,
    merged_state_dict,
    optimizer_tensors,
    save_state,
    split_state,
    state_problem,
)
from vlmbench.train.prepare import lora_modules, prepare
from vlmbench.train.recipe import Stage, full, lora

arrays = st.builds(lambda n: torch.arange(n, dtype=torch.float64), st.integers(0, 4)) | st.builds(
    lambda n: np.arange(n, dtype=np.uint32), st.integers(0, 4)
)
leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | arrays
trees = st.recursive(
    leaves,
    lambda t: (
        st.lists(t, max_size=3)
        | st.lists(t, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=3), t, max_size=3)
        | st.dictionaries(st.integers(), t, max_size=3)
    ),
    max_leaves=12,
)


def same(a, b):
    if isinstance(a, (torch.Tensor, np.ndarray)):
        return (
            type(a) is type(b)
            and a.dtype == b.dtype
            and a.shape == b.shape
            and bool((a == b).all())
        )
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


@settings(max_examples=60, deadline=None)
@given(trees)
def test_any_state_survives_json_and_safetensors(tree):
    js, tensors = split_state(tree)
    assert same(join_state(json.loads(json.dumps(js)), tensors), tree)


def write(out, step, metric=None, value=0.0, **kw):
    return save_state(
        out,
        step,
        dict(w=torch.full((4,), float(step))),
        {'w/exp_avg': torch.zeros(4)},
        dict(step=step),
        dict(i=step),
        dict(a=1),
        metric,
        **kw,
    )


def test_keeps_the_last_and_the_best(tmp_path):
    for step, metric in enumerate([5.0, 1.0, 4.0, 3.0], 1):
        write(tmp_path, step, metric, keep_last=2)
    assert [p.name for p in sorted((tmp_path / 'checkpoints').iterdir())] == [
        'step-00000002',
        'step-00000003',
        'step-00000004',
    ]
    assert (
        best_state(tmp_path).name == 'step-00000002'
        and best_state(tmp_path, 'max').name == 'step-00000003'
    )
    assert latest(tmp_path).name == 'step-00000004'


def test_rewriting_a_step_replaces_it(tmp_path):
    write(tmp_path, 1)
    p = save_state(tmp_path, 1, dict(w=torch.ones(2)), {}, {}, {}, dict(a=1))
    assert load_state(p).weights['w'].tolist() == [1, 1]
    assert [x.name for x in (tmp_path / 'checkpoints').iterdir()] == ['step-00000001']


@pytest.mark.parametrize('damage', ['flip', 'cut', 'missing', 'manifest', 'empty', 'format'])
def test_every_damage_is_seen_and_the_older_state_used(tmp_path, damage):
    good, bad = write(tmp_path, 1), write(tmp_path, 2)
    f = bad / ('manifest.json' if damage in ('manifest', 'format') else 'weights.safetensors')
    data = f.read_bytes()
    if damage == 'flip':
        f.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    if damage == 'cut':
        f.write_bytes(data[:-3])
    if damage == 'missing':
        f.unlink()
    if damage == 'manifest':
        f.write_bytes(data[: len(data) // 2])
    if damage == 'empty':
        shutil.rmtree(bad)
        bad.mkdir()
    if damage == 'format':
        f.write_text(json.dumps({**json.loads(data), 'format': 99}))
    assert state_problem(bad)
    with pytest.warns(UserWarning, match='ignoring training state'):
        assert latest(tmp_path) == good
    with pytest.raises(CheckpointError, match='cannot load training state'):
        load_state(bad)


@pytest.mark.skipif(
    not hasattr(resource, 'RLIMIT_FSIZE') or sys.platform == 'win32',
    reason='needs a file size limit',
)
def test_a_full_disk_leaves_the_previous_state_intact(tmp_path):
    """The operating system refuses to write on (a file size limit stands in for the full disk): a
    clear error, no debris, the old state loads."""
    good = write(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(
            CheckpointError, match=f'could not write .*step-00000002.*{good.name} is intact'
        ):
            save_state(tmp_path, 2, dict(w=torch.ones(100_000)), {}, {}, {}, dict(a=1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in (tmp_path / 'checkpoints').iterdir()] == ['step-00000001'] and latest(
        tmp_path
    ) == good
    assert write(tmp_path, 2).name == 'step-00000002'


def test_one_rank_that_cannot_write_stops_all(tmp_path):
    good, verdicts = write(tmp_path, 1), iter([True, False])
    with pytest.raises(CheckpointError, match='another rank failed'):
        write(tmp_path, 2, agree=lambda ok: next(verdicts))
    assert latest(tmp_path) == good and not (tmp_path / 'checkpoints' / 'step-00000002').exists()


@pytest.mark.parametrize('variant', ['full', 'lora', 'frozen', 'blocks'])
def test_only_what_trains_is_stored(tmp_path, variant):
    model, result = run(tmp_path, variant, steps=2)
    stored = {
        k for f in ('weights', 'optimizer') for k in _keys(result.checkpoint / f'{f}.safetensors')
    }
    fresh = tiny_vlm()
    names = {n for n, _ in fresh.named_parameters()}
    if variant == 'frozen':
        assert {k.split('/')[0] for k in stored} == {n for n in names if 'projector' in n}
    if variant == 'blocks':
        assert {k.split('/')[0] for k in stored} == {
            n for n in names if 'projector' in n or 'language_model.layers.1.' in n
        }
    if variant == 'lora':
        assert not any('base_layer' in k for k in stored) and any('.lora_A.' in k for k in stored)
    if variant == 'full':
        assert {k for k in stored if '/' not in k} == names
    for p in result.checkpoint.iterdir():
        assert p.suffix in ('.json', '.safetensors')


def _keys(path):
    with safe_open(path, 'pt') as f:
        return list(f.keys())


def test_tied_head_is_stored_once(tmp_path):
    stage = Stage('s', dict(embed=full(), projector=full()), data='x', lr=1e-3, steps=1)
    model, result = run(tmp_path, stage=stage, model=tiny_vlm(tie=True))
    keys = _keys(result.checkpoint / 'weights.safetensors')
    assert 'model.language_model.embed_tokens.weight' in keys and 'lm_head.weight' not in keys
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight


def test_weights_that_do_not_fit_are_named():
    p = dict(a=torch.nn.Parameter(torch.zeros(2)), b=torch.nn.Parameter(torch.zeros(2)))
    with pytest.raises(CheckpointError, match=r"missing \['b'\], unexpected \['c'\]"):
        load_weights(p, dict(a=torch.ones(2), c=torch.ones(2)))
    with pytest.raises(CheckpointError, match=r'a has shape \(3,\), the model \(2,\)'):
        load_weights(p, dict(a=torch.ones(3), b=torch.ones(2)))


def batch():
    b = next(iter(packed_loader(prefetch=0)))
    return {k: v for k, v in b.items() if isinstance(v, torch.Tensor) and k != 'labels'}


def lora_model():
    model = tiny_vlm().eval()
    plan = prepare(
        model,
        Stage(
            's',
            dict(
                projector=full(),
                vision=lora(2, 2),
                layers=lora(2, 4, layers=(1,), modules=('q_proj',)),
            ),
            data='x',
            lr=1.0,
            steps=1,
        ),
    )
    with torch.no_grad():
        for p in plan.trainable.values():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)) * 0.1)
    return model


def test_export_is_an_ordinary_folder_and_leaves_the_model_alone(tmp_path):
    model = lora_model()
    with torch.no_grad():
        want = model(**batch()).logits
    folder = export(model, None, tmp_path / 'out')
    assert len(lora_modules(model)) == 1 + 12
    plain = AutoModelForImageTextToText.from_pretrained(folder).eval()
    with torch.no_grad():
        assert torch.allclose(plain(**batch()).logits, want, atol=1e-5)
    assert not any('lora' in k or 'base_layer' in k for k in _keys(folder / 'model.safetensors'))
    with pytest.raises(FileExistsError, match='overwrite=True'):
        export(model, None, folder)
    assert export(model, None, folder, overwrite=True) == folder and [
        p.name for p in tmp_path.iterdir()
    ] == ['out']


def test_unmerged_export_loads_through_peft(tmp_path):
    model = lora_model()
    with torch.no_grad():
        want = model(**batch()).logits
    folder = export(model, None, tmp_path / 'out', merge=False)
    base = AutoModelForImageTextToText.from_pretrained(folder).eval()
    adapted = PeftModel.from_pretrained(base, folder / 'vision_lora', adapter_name='vision_lora')
    adapted.load_adapter(folder / 'layers_lora', adapter_name='layers_lora')
    adapted.base_model.set_adapter(['vision_lora', 'layers_lora'])
    with torch.no_grad():
        assert torch.allclose(adapted.eval()(**batch()).logits, want, atol=1e-5)


def test_merged_state_dict_equals_merging():
    model = lora_model()
    merged = merged_state_dict(model)
    from vlmbench.train.prepare import merge_lora

    merge_lora(model)
    assert set(merged) == set(model.state_dict()) and all(
        torch.allclose(v, merged[k], atol=1e-6) for k, v in model.state_dict().items()
    )


def test_optimizer_state_is_stored_by_full_name():
    p = torch.nn.Parameter(torch.ones(3))
    opt = torch.optim.AdamW([dict(params=[p], param_names=['x.weight'])])
    p.grad = torch.ones(3)
    opt.step()
    assert sorted(optimizer_tensors(opt)) == [
        'x.weight/exp_avg',
        'x.weight/exp_avg_sq',
        'x.weight/step',
    ]


def test_a_state_never_holds_a_pickle_or_a_path_of_this_machine(tmp_path):
    _, result = run(tmp_path, 'frozen', steps=1)
    for p in result.checkpoint.iterdir():
        text = p.read_bytes().decode('latin1')
        assert str(tmp_path) not in text and os.sep + 'home' not in text
