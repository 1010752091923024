"""fp16 with a scaled loss, on a CPU's autocast: it follows fp32, an overflow changes no weight, and
an interrupted run continues bit for bit."""

import functools
import json

import pytest
import torch
from train_stubs import StopAfter, a_stage, packed_loader, run, tiny_vlm

from vlmbench.train.checkpoint import latest, load_state
from vlmbench.train.guard import NonFiniteLoss
from vlmbench.train.metrics import read_metrics
from vlmbench.train.precision import MOST_SKIPPED
from vlmbench.train.process import Preempted
from vlmbench.train.recipe import RecipeError


@pytest.fixture
def overflowing(monkeypatch):
    "A first factor at which the gradients of the tiny model are beyond fp16."
    scaler = functools.partial(torch.amp.GradScaler, init_scale=2.0**30)
    monkeypatch.setattr(torch.amp, 'GradScaler', scaler)


def test_fp16_follows_fp32(tmp_path):
    _, wide = run(tmp_path / 'fp32', dropout=0.0)
    model, half = run(tmp_path / 'fp16', dropout=0.0, precision='fp16')
    assert list(half.history.loss) == pytest.approx(list(wide.history.loss), rel=5e-3)
    assert list(half.history.grad_norm) == pytest.approx(list(wide.history.grad_norm), rel=5e-2)
    assert list(half.history.loss) != list(wide.history.loss)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert set(half.history.loss_scale) == {65536.0} and set(half.history.skipped) == {0}
    assert 'loss_scale' not in wide.history


def test_an_overflow_changes_no_weight_and_is_counted(tmp_path, overflowing):
    start = {name: p.clone() for name, p in tiny_vlm().named_parameters()}
    model, result = run(tmp_path / 'one', dropout=0.0, precision='fp16', steps=1)
    assert result.step == 1 and result.history.skipped.tolist() == [1]
    assert all(torch.equal(p, start[name]) for name, p in model.named_parameters())

    model, result = run(tmp_path / 'more', dropout=0.0, precision='fp16', steps=30)
    skipped = int(result.history.skipped.iloc[-1])
    assert 1 < skipped < MOST_SKIPPED
    assert result.history.skipped.tolist()[:skipped] == list(range(1, skipped + 1))
    assert result.history.loss_scale.iloc[-1] == 2.0 ** (30 - skipped)
    assert any(not torch.equal(p, start[name]) for name, p in model.named_parameters())
    assert result.history.loss.iloc[-1] < result.history.loss.iloc[0]
    for line in result.metrics.read_text().splitlines():
        json.loads(line, parse_constant=lambda word: pytest.fail(f'{word} is no JSON number'))


def test_a_factor_that_falls_without_end_stops_the_run(tmp_path, monkeypatch):
    never = functools.partial(torch.amp.GradScaler, init_scale=2.0**40, backoff_factor=0.999)
    monkeypatch.setattr(torch.amp, 'GradScaler', never)
    with pytest.raises(NonFiniteLoss, match='20 steps in a row'):
        run(tmp_path, dropout=0.0, precision='fp16', steps=40)
    assert read_metrics(tmp_path).skipped.iloc[-1] == MOST_SKIPPED


def test_resumes_bit_for_bit_between_skipped_steps(tmp_path, overflowing):
    whole, a = run(tmp_path / 'a', 'lora', precision='fp16', steps=26)
    loader = packed_loader()
    with pytest.raises(Preempted):
        stop = StopAfter(loader, 8)
        run(tmp_path / 'b', 'lora', precision='fp16', steps=26, loader=loader, stop_flag=stop)
    scale = load_state(latest(tmp_path / 'b')).shared['loss_scale']
    assert scale['in_a_row'] == scale['skipped'] > 0
    parts, b = run(tmp_path / 'b', 'lora', precision='fp16', steps=26)
    assert list(a.history.loss) == list(b.history.loss)
    assert list(a.history.loss_scale) == list(b.history.loss_scale)
    for (name, p), q in zip(whole.named_parameters(), parts.parameters()):
        assert torch.equal(p, q), name


def test_bf16_weights_are_refused_with_the_reason(tmp_path):
    with pytest.raises(RecipeError, match="stored in bf16 .*range fp16 does not have.*'bf16'"):
        run(tmp_path, model=tiny_vlm().bfloat16(), precision='fp16')
    with pytest.raises(RecipeError, match='precision must be one of fp32, bf16, fp16'):
        run(tmp_path, stage=a_stage(), precision='fp8')


def test_frozen_fp16_weights_stay_and_the_model_is_stored_as_it_came(tmp_path):
    model, result = run(tmp_path, 'frozen', model=tiny_vlm().half(), precision='fp16', steps=3)
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    assert result.history.skipped.iloc[-1] == 0 and result.done
