"""Two CPU ranks over gloo: the same step as one rank, text-only batches on one rank, preemption,
and failures that name the rank."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from train_stubs import ENV, RowLoader, a_stage, run, stubs_on_ranks
from vlmbench.train.checkpoint import CheckpointError, latest, load_state
from vlmbench.train.launch import LaunchError, launch
from vlmbench.train.metrics import read_metrics
from vlmbench.train.process import Preempted


def on_two_ranks(function, tmp_path, **kwargs):
    run = dict(out=str(tmp_path / 'run'), **kwargs)
    return stubs_on_ranks(f'train_stubs:{function}', tmp_path, 2, 240, **run)


@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory):
    "Four steps on two ranks."
    folder = tmp_path_factory.mktemp('uninterrupted')
    on_two_ranks('two_rank_run', folder, steps=4)
    return load_state(latest(folder / 'run'), ranks=2)


def test_two_ranks_equal_one(tmp_path, uninterrupted):
    """Rows with images go to rank 0, text-only rows to rank 1: weights and losses equal those of
    one process with both rows."""
    _, result = run(
        tmp_path, dropout=0.0, stage=a_stage('full', 4), loader=RowLoader(0, 1), save_every=None
    )
    one = load_state(result.checkpoint)
    assert one.shared['targets'] == uninterrupted.shared['targets']
    for n, t in one.weights.items():
        assert torch.allclose(t, uninterrupted.weights[n], atol=2e-5), n
    losses = read_metrics(uninterrupted.path.parents[1]).loss
    assert torch.allclose(torch.tensor(result.history.loss), torch.tensor(losses), atol=1e-5)
    with pytest.raises(CheckpointError, match='written by 2 ranks'):
        load_state(uninterrupted.path, ranks=1)


@pytest.mark.slow
def test_a_rank_without_pictures_keeps_up_with_shards(tmp_path, uninterrupted):
    "Under FSDP the rank of the text-only rows runs the front end along, on a blank picture."
    on_two_ranks('two_rank_run', tmp_path, steps=4, parallel='fsdp')
    sharded = load_state(latest(tmp_path / 'run'), ranks=2)
    for name, tensor in sharded.weights.items():
        assert torch.allclose(tensor, uninterrupted.weights[name], atol=2e-5), name


@pytest.mark.slow
def test_two_ranks_preempted_and_resumed_equal_uninterrupted(tmp_path, uninterrupted):
    """One rank is asked to stop: both save the same step and leave; started again, they end where
    an uninterrupted run ends."""
    with pytest.raises(Preempted):
        on_two_ranks('two_rank_run', tmp_path, steps=4, stop_after=2)
    assert latest(tmp_path / 'run').name == 'step-00000002'
    on_two_ranks('two_rank_run', tmp_path, steps=4)
    ended = load_state(latest(tmp_path / 'run'), ranks=2)
    assert ended.step == 4 and all(
        torch.equal(t, uninterrupted.weights[n]) for n, t in ended.weights.items()
    )


def test_sharded_tensors_are_saved_whole_and_put_back(tmp_path):
    """FSDP2: rank 0 writes whole tensors, loading shards them again, and what one rank cannot write
    stops both."""
    on_two_ranks('sharded_state', tmp_path)
    state = load_state(latest(tmp_path / 'run'), ranks=2)
    assert state.step == 1 and {k: tuple(v.shape) for k, v in state.weights.items()} == dict(
        weight=(6, 4), bias=(6,)
    )
    assert state.optimizer['weight/exp_avg'].shape == (6, 4)


@pytest.mark.parametrize('parallel', ['fsdp', pytest.param('ddp', marks=pytest.mark.slow)])
def test_non_finite_on_one_rank_stops_both_with_the_sample_named(tmp_path, parallel):
    with pytest.raises(LaunchError, match='NonFiniteLoss'):
        on_two_ranks('two_rank_run', tmp_path, steps=3, poison=True, parallel=parallel)
    logs = [(tmp_path / 'logs' / f'rank-{r}.log').read_text() for r in (0, 1)]
    assert all('not finite in input pixel_values' in log for log in logs)
    assert '"s0"' in (tmp_path / 'run' / 'nonfinite.json').read_text()
    assert not (tmp_path / 'run' / 'checkpoints').exists()


@pytest.mark.parametrize('failing', [0, 1])
def test_the_rank_that_failed_first_is_named_in_one_line(failing, tmp_path, capfd):
    "Its traceback is in its log and not on the screen; the other rank only lost its neighbour."
    launched = (dict(failing=failing), 2, tmp_path / 'logs', 1)
    with pytest.raises(LaunchError) as failure:
        launch('train_stubs:one_fails', *launched, timeout=120, env=ENV)
    log = tmp_path / 'logs' / f'rank-{failing}.log'
    why = 'ValueError: 7.json row 3: no picture'
    assert str(failure.value) == f'rank {failing} of 2 failed: {why} (its traceback: {log})'
    shown = capfd.readouterr()
    assert shown.out == 'said before\n' and not shown.err
    assert log.read_text().count('Traceback') == 1


PARENT = textwrap.dedent("""
    import sys
    from vlmbench.train.launch import launch
    folder = sys.argv[1]
    launch('train_stubs:sleepy', dict(out=folder), layout=2, log_dir=folder, threads=1)
""")


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return (
        Path(f'/proc/{pid}/stat').read_text().split()[2] != 'Z'
        if Path(f'/proc/{pid}/stat').exists()
        else True
    )


@pytest.mark.skipif(
    sys.platform != 'linux', reason='the death signal of a parent is a Linux facility'
)
def test_killing_the_parent_takes_the_ranks_down(tmp_path):
    parent = subprocess.Popen(
        [sys.executable, '-c', PARENT, str(tmp_path)], env={**os.environ, **ENV}
    )
    wanted, end = [tmp_path / f'pid-{r}' for r in (0, 1)], time.monotonic() + 120
    while (
        not all(p.exists() and p.read_text() for p in wanted)
        and parent.poll() is None
        and time.monotonic() < end
    ):
        time.sleep(0.1)
    pids = [int(p.read_text()) for p in wanted]
    assert all(map(alive, pids))
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    end = time.monotonic() + 30
    while any(map(alive, pids)) and time.monotonic() < end:
        time.sleep(0.1)
    assert not any(map(alive, pids))
