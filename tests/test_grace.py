"""A run that is told to stop in the middle of a long step leaves the state before it, within the
seconds that it is given, and goes on from there to the same bits; a second signal ends it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from train_stubs import a_stage, run
from vlmbench.train.checkpoint import latest, load_state

STEPS, SLOW = 4, 2  # steps of two micro-batches, and the one whose second lasts


def train_slowly(out, how):
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
            else:  # one call of a library, in which no handler of Python's runs
                hashlib.pbkdf2_hmac('sha256', b'', b'', 40_000_000)

    heard = nn.modules.module.register_module_forward_hook(
        lambda module, *rest: forward_hook(module, *rest) if is_whole(module) else None
    )
    run(Path(out), stage=a_stage(steps=STEPS, save_every=100), progress_seconds=None)
    heard.remove()


def is_whole(module):
    return type(module).__name__ == 'VLMForConditionalGeneration'


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
