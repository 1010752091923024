"""A run that is told to stop in the middle of a long step leaves the state before it, within the
seconds that it is given, and goes on from there to the same bits, on several ranks too; a second
signal ends it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from rank_server import on_ranks
from train_stubs import a_stage, packed_loader, run
from vlmbench.models.vlm import VLMForConditionalGeneration
from vlmbench.train.checkpoint import latest, load_state
from vlmbench.train.process import Preempted

STEPS, SLOW = 4, 2  # steps of two micro-batches, and the one whose second lasts


def train_slowly(out, how, loader=None, **settings):
    "What the process that is stopped does: one of its steps never ends in time."
    import hashlib

    from torch import nn

    made = []

    def forward_hook(module, args, result):
        made.append(1)
        if len(made) == 2 * SLOW and not Path(out, 'again').exists():
            Path(out, 'slow').touch()
            if how == 'in python':
                time.sleep(60)
            elif how == 'in a library':  # in one call of which no handler of Python's runs
                hashlib.pbkdf2_hmac('sha256', b'', b'', 40_000_000)

    heard = nn.modules.module.register_module_forward_hook(
        lambda module, *rest: forward_hook(module, *rest) if is_whole(module) else None
    )
    stage = a_stage(steps=STEPS, save_every=100)
    run(Path(out), stage=stage, loader=loader, progress_seconds=None, **settings)
    heard.remove()


def on_a_rank(out, parallel, slow):
    "What each of two ranks does: rank 1 is slow, and rank 0 waits for it among the gradients."
    rank = int(os.environ['RANK'])
    os.environ['VLMBENCH_GRACE'] = '8'
    how = 'in python' if slow and rank else 'not at all'
    loader = packed_loader(600, rank=rank, ranks=2, rows=1)
    settings = dict(dropout=0.0, loader=loader, parallel=parallel)
    train_slowly(out, how, **settings)


def is_whole(module):
    return isinstance(module, VLMForConditionalGeneration)


def start(out, how, **env):
    out.mkdir()
    code = f'import test_grace; test_grace.train_slowly({str(out)!r}, {how!r})'
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    process = subprocess.Popen(
        [sys.executable, '-c', code],
        env=os.environ | dict(PYTHONPATH=paths) | env,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not (out / 'slow').exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return process


@pytest.mark.parametrize('how', ['in python', 'in a library'])
def test_the_state_before_the_step_is_left_in_time(how, tmp_path):
    out = tmp_path / 'run'
    process = start(out, how, VLMBENCH_GRACE='6')
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    took = time.monotonic() - began
    assert process.returncode == 75, said
    assert 3 <= took < 12 and 'stopped in the middle of a step' in said  # half of six seconds
    assert load_state(latest(out)).step == SLOW - 1
    (out / 'again').touch()
    _, resumed = run(out, stage=a_stage(steps=STEPS, save_every=100))
    _, whole = run(tmp_path / 'whole', stage=a_stage(steps=STEPS, save_every=100))
    ours, theirs = (load_state(latest(place)) for place in (out, tmp_path / 'whole'))
    assert ours.step == theirs.step == STEPS
    assert ours.weights.keys() == theirs.weights.keys()
    assert all(torch.equal(ours.weights[name], theirs.weights[name]) for name in theirs.weights)
    assert resumed.history.loss.tolist() == whole.history.loss.tolist()


@pytest.mark.ranks
@pytest.mark.parametrize('parallel', ['ddp', 'fsdp'])
def test_two_ranks_give_the_same_step_up(parallel, tmp_path):
    out, whole = tmp_path / 'run', tmp_path / 'whole'
    target, settings = 'test_grace:on_a_rank', dict(parallel=parallel)
    with pytest.raises(Preempted, match='resume from .*step-00000003'):
        slow = (out / 'slow').exists
        on_ranks(target, tmp_path, 2, 50, until=slow, out=str(out), slow=True, **settings)
    said = (tmp_path / 'logs' / 'rank-0.log').read_text()
    assert 'stopped in the middle of a step' in said
    # with half the micro-batches of a step on each rank, the slow one is that of the last step
    assert load_state(latest(out), ranks=2).step == STEPS - 1
    on_ranks(target, tmp_path, 2, 50, out=str(out), slow=False, **settings)
    on_ranks(target, tmp_path, 2, 50, out=str(whole), slow=False, **settings)
    for rank in range(2):
        ours, theirs = (load_state(latest(p), rank=rank, ranks=2) for p in (out, whole))
        assert ours.step == theirs.step == STEPS and ours.weights.keys() == theirs.weights.keys()
        assert all(torch.equal(ours.weights[n], theirs.weights[n]) for n in theirs.weights)
        assert all(torch.equal(ours.optimizer[n], theirs.optimizer[n]) for n in theirs.optimizer)


def test_a_second_signal_ends_it_at_once(tmp_path):
    process = start(tmp_path / 'run', 'in python', VLMBENCH_GRACE='60')
    process.send_signal(signal.SIGTERM)
    time.sleep(1.5)  # sooner, it would be the same signal passed on
    assert process.poll() is None
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert time.monotonic() - began < 10 and process.returncode not in (0, 75)


def test_nothing_of_a_training_that_is_over_is_kept(tmp_path):
    "Its optimizer's moments would lie beside those of the next stage."
    import gc

    gc.collect()
    gc.disable()
    try:
        run(tmp_path / 'run', stage=a_stage(steps=2))
        left = [one for one in gc.get_objects() if type(one).__name__ == 'Trainer']
    finally:
        gc.enable()
    assert not left
