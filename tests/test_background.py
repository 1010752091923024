"""States that a thread writes while the training goes on: the same bytes, waited for where somebody
needs them, raised by name where they fail, and a kill in the middle leaves the one before."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch

from rank_server import on_ranks
from sharding_stubs import background_run
from test_resume import assert_same_state
from train_stubs import StopAfter, packed_loader, run
from vlmbench.train import checkpoint
from vlmbench.train.checkpoint import CheckpointError, latest, load_state
from vlmbench.train.loop import Callback, Preempted
from vlmbench.train.metrics import read_metrics

HERE = Path(__file__).parent


def states(out):
    return sorted(path.name for path in (Path(out) / 'checkpoints').glob('*'))


@pytest.fixture
def slow(monkeypatch):
    "Publishing a state takes a second; holds the threads that did it."
    publish, threads = checkpoint.publish, []

    def slowly(temporary, final):
        threads.append((final.name, threading.current_thread() is threading.main_thread()))
        time.sleep(1)
        publish(temporary, final)

    monkeypatch.setattr(checkpoint, 'publish', slowly)
    return threads


@pytest.mark.parametrize('variant', ['full', 'lora'])
def test_states_are_those_that_the_loop_would_have_written(tmp_path, variant):
    for name, background in (('behind', True), ('before', False)):
        run(tmp_path / name, variant, background=background, keep_last=9)
    assert states(tmp_path / 'behind') == [f'step-0000000{n}' for n in (2, 4, 6)]
    for state in states(tmp_path / 'behind'):
        ours, theirs = (tmp_path / name / 'checkpoints' / state for name in ('behind', 'before'))
        assert_same_state(ours, theirs)


def test_the_loop_goes_on_meanwhile_and_its_end_waits(tmp_path, slow):
    done = []
    seen = Callback(lambda report: done.append((report.step, states(tmp_path))), every=1)
    run(tmp_path, callbacks=[seen], save_every=3, steps=5)
    assert dict(done)[4] == ['.tmp-step-00000003']
    assert slow == [('step-00000003', False), ('step-00000005', True)]
    assert states(tmp_path) == ['step-00000003', 'step-00000005']


def test_a_stop_waits_for_the_state_before_and_its_own(tmp_path, slow):
    loader = packed_loader()
    with pytest.raises(Preempted) as stopped:
        run(tmp_path, loader=loader, stop_flag=StopAfter(loader, 6))
    assert states(tmp_path) == ['step-00000002', 'step-00000003']
    assert stopped.value.path == latest(tmp_path)
    run(tmp_path)
    run(tmp_path / 'whole')
    assert_same_state(latest(tmp_path), latest(tmp_path / 'whole'))


@pytest.mark.parametrize('at_step', [2, 4])
def test_a_failed_write_is_raised_and_the_run_goes_on_later(tmp_path, monkeypatch, at_step):
    publish = checkpoint.publish

    def full(temporary, final):
        if final.name == f'step-0000000{at_step}':
            raise OSError(28, 'No space left on device')
        publish(temporary, final)

    monkeypatch.setattr(checkpoint, 'publish', full)
    pause = Callback(lambda report: time.sleep(0.5), every=1, at_end=False)
    with pytest.raises(CheckpointError, match=rf'step-0000000{at_step}: .*No space left') as said:
        run(tmp_path, callbacks=[pause])
    assert ('is intact' if at_step == 4 else 'No earlier state') in str(said.value)
    # steps 3 and 5 may be made before the thread has failed
    assert at_step < read_metrics(tmp_path).step.max() <= at_step + 2
    monkeypatch.setattr(checkpoint, 'publish', publish)
    run(tmp_path)
    run(tmp_path / 'whole')
    assert_same_state(latest(tmp_path), latest(tmp_path / 'whole'))


def test_a_write_that_fails_during_the_last_step_is_raised_at_the_end(tmp_path, monkeypatch):
    def late(temporary, final):
        time.sleep(1)
        raise OSError(5, 'Input/output error')

    monkeypatch.setattr(checkpoint, 'publish', late)
    with pytest.raises(CheckpointError, match='step-00000004: .*Input/output'):
        run(tmp_path, steps=5, save_every=4)


KILLED = textwrap.dedent("""
    import os, signal, sys, time
    sys.path.insert(0, sys.argv[2])
    import torch; torch.set_num_threads(1)
    from train_stubs import run
    import vlmbench.train.checkpoint as checkpoint
    from vlmbench.train.loop import Callback
    publish = checkpoint.publish
    def hanging(temporary, final):
        if final.name == 'step-00000004': time.sleep(300)
        publish(temporary, final)
    def kill(report):
        if report.step == 5:
            while not list(report.out_dir.glob('checkpoints/.tmp-*/manifest.json')): pass
            os.kill(os.getpid(), signal.SIGKILL)
    checkpoint.publish = hanging
    run(sys.argv[1], callbacks=[Callback(kill, every=1)])
""")


def test_kill_9_while_a_state_is_on_its_way(tmp_path):
    killed = subprocess.run(
        [sys.executable, '-c', KILLED, str(tmp_path / 'killed'), str(HERE)],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, 'OMP_NUM_THREADS': '1', 'OMP_WAIT_POLICY': 'PASSIVE'},
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert states(tmp_path / 'killed') == ['.tmp-step-00000004', 'step-00000002']
    assert read_metrics(tmp_path / 'killed').step.max() == 5
    with pytest.warns(UserWarning, match='was never completed'):
        run(tmp_path / 'killed')
    run(tmp_path / 'whole')
    assert_same_state(latest(tmp_path / 'killed'), latest(tmp_path / 'whole'))


def on_two_ranks(folder, **kwargs):
    folder.mkdir()
    out = str(folder / 'run')
    on_ranks('sharding_stubs:background_run', folder, 2, 200, out=out, **kwargs)
    return folder / 'run'


@pytest.mark.ranks
@pytest.mark.parametrize('parallel', ['ddp', 'fsdp'])
def test_two_ranks_write_together(tmp_path, parallel):
    behind = on_two_ranks(tmp_path / 'behind', parallel=parallel)
    before = on_two_ranks(tmp_path / 'before', parallel=parallel, background=False)
    assert states(behind) == states(before) == [f'step-0000000{n}' for n in (2, 4, 6)]
    for state in states(behind):
        a, b = (load_state(run / 'checkpoints' / state, ranks=2) for run in (behind, before))
        assert a.weights.keys() == b.weights.keys()
        assert all(torch.equal(t, b.weights[n]) for n, t in a.weights.items())
        assert all(torch.equal(t, b.optimizer[n]) for n, t in a.optimizer.items())


@pytest.mark.ranks
@pytest.mark.parametrize(
    'parallel, part', [('ddp', 'trees'), ('fsdp', 'trees'), ('fsdp', 'shards')]
)
def test_what_one_rank_cannot_write_stops_both(tmp_path, parallel, part):
    "Before the ranks meet in the shards, and while one of them waits there for the other."
    failed = on_two_ranks(tmp_path / 'failed', parallel=parallel, fail_on=1, part=part)
    told = [(failed / f'told-{rank}.txt').read_text() for rank in range(2)]
    assert all('could not write' in text and 'step-00000004: ' in text for text in told)
    assert 'No space left' in told[1]
    assert all('step-00000002 is intact' in text for text in told)
    assert states(failed) == ['step-00000002']
    background_run(str(failed))
    assert latest(failed).name == 'step-00000006'
