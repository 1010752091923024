"""Interrupted equals uninterrupted, bit for bit: weights, moments, generators, the half-filled pack
and the next batch; also after a real kill -9."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from train_stubs import StopAfter, a_stage, encode, packed_loader, run, tiny_vlm
from vlmbench.data.mixture import StatefulSampler
from vlmbench.data.packing import BatchLoader
from vlmbench.data.quarantine import Quarantine, TooManyBadRecords
from vlmbench.train.checkpoint import CheckpointError, latest, load_state
from vlmbench.train.loop import Callback, Preempted, train
from vlmbench.train.metrics import read_metrics
from vlmbench.train.process import FolderInUse

HERE = Path(__file__).parent


def same_tree(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_tree(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same_tree, a, b))
    return bool((a == b).all()) if hasattr(a, 'all') else a == b


def assert_same_state(a, b):
    """Two training states agree in weights, optimizer, counters, generators, sampler and
    half-filled pack."""
    a, b = load_state(a), load_state(b)
    assert a.step == b.step
    for part in ('weights', 'optimizer', 'shared', 'local'):
        assert same_tree(getattr(a, part), getattr(b, part)), part


def interrupted(out, after, **kw):
    "Run until `after` steps, get preempted, and continue in a fresh model and loader."
    loader = packed_loader()
    with pytest.raises(Preempted) as e:
        run(out, loader=loader, stop_flag=StopAfter(loader, 2 * after), **kw)
    assert e.value.code == 75 and e.value.path.name == f'step-{after:08d}'
    return run(out, **kw)


@pytest.mark.parametrize('after', [1, 4])
@pytest.mark.parametrize('variant', ['full', 'lora', 'frozen', 'blocks'])
def test_interrupted_equals_uninterrupted(tmp_path, variant, after):
    whole, a = run(tmp_path / 'whole', variant)
    parts, b = interrupted(tmp_path / 'parts', after, variant=variant)
    assert a.step == b.step == 6 and a.done and b.done
    assert_same_state(a.checkpoint, b.checkpoint)
    for (n, p), (m, q) in zip(whole.named_parameters(), parts.named_parameters()):
        assert n == m and torch.equal(p, q), n
    for k in ('loss', 'grad_norm', 'lr/projector', 'targets'):
        assert list(a.history[k]) == list(b.history[k]), k


def test_state_is_inside_a_pack_and_draws_dropout(tmp_path):
    """The resumption tests above mean something: documents wait in the packer at the cut, and
    dropout makes the generator matter."""
    loader = packed_loader()
    with pytest.raises(Preempted):
        run(tmp_path / 'a', loader=loader, stop_flag=StopAfter(loader, 6))
    state = load_state(latest(tmp_path / 'a'))
    assert len(state.local['loader']['waiting']) > 0
    _, with_dropout = run(tmp_path / 'b', dropout=0.1)
    _, without = run(tmp_path / 'c', dropout=0.0)
    assert list(with_dropout.history.loss) != list(without.history.loss)


def test_next_batch_after_resume_is_the_next_batch(tmp_path):
    loader = packed_loader()
    with pytest.raises(Preempted):
        run(tmp_path, loader=loader, stop_flag=StopAfter(loader, 6))
    state, fresh, restored = load_state(latest(tmp_path)), iter(packed_loader()), packed_loader()
    restored.load_state_dict(state.local['loader'])
    for _ in range(6):
        next(fresh)
    a, b = next(fresh), next(iter(restored))
    assert a['sample_ids'] == b['sample_ids'] and all(
        torch.equal(a[k], b[k]) for k in a if isinstance(a[k], torch.Tensor)
    )


def test_bf16_resumes_bit_for_bit(tmp_path):
    _, a = run(tmp_path / 'a', 'lora', precision='bf16', steps=4)
    loader = packed_loader()
    with pytest.raises(Preempted):
        run(
            tmp_path / 'b',
            'lora',
            precision='bf16',
            steps=4,
            loader=loader,
            stop_flag=StopAfter(loader, 4),
        )
    _, b = run(tmp_path / 'b', 'lora', precision='bf16', steps=4)
    assert_same_state(a.checkpoint, b.checkpoint)


def test_budget_in_target_tokens_resumes_at_the_same_place(tmp_path):
    stage = a_stage('frozen', budget_targets=300)
    _, a = run(tmp_path / 'a', stage=stage)
    loader = packed_loader()
    with pytest.raises(Preempted):
        run(tmp_path / 'b', stage=stage, loader=loader, stop_flag=StopAfter(loader, 4))
    _, b = run(tmp_path / 'b', stage=stage)
    assert a.targets == b.targets >= 300 and list(a.history['lr/projector']) == list(
        b.history['lr/projector']
    )
    assert a.targets - a.history.targets.iloc[-1] < 300


def test_metrics_of_a_resumed_run_have_every_step_once(tmp_path):
    "Killed between two states: the lines after the last state are dropped aloud and written again."
    loader = packed_loader()

    def boom(moment):
        if moment.step == 5:
            raise RuntimeError('power cut')

    with pytest.raises(RuntimeError, match='power cut'):
        run(tmp_path, loader=loader, callbacks=[Callback(boom, every=1)])
    assert list(read_metrics(tmp_path).step) == [1, 2, 3, 4, 5]
    with pytest.warns(UserWarning, match='dropped 1 lines after step 4'):
        train(
            tiny_vlm(0.1),
            None,
            a_stage(),
            None,
            tmp_path,
            loader=packed_loader(),
            device='cpu',
            progress_seconds=None,
        )
    assert list(read_metrics(tmp_path).step) == [1, 2, 3, 4, 5, 6]


KILLED = textwrap.dedent("""
    import os, signal, sys
    sys.path.insert(0, sys.argv[3])
    import torch; torch.set_num_threads(1)
    from train_stubs import run
    import vlmbench.train.checkpoint as checkpoint
    where, publish = sys.argv[2], checkpoint.publish
    def killed(tmp, final):
        if final.name == 'step-00000004':
            if where == 'after': publish(tmp, final)
            os.kill(os.getpid(), signal.SIGKILL)
        publish(tmp, final)
    if where != 'never': checkpoint.publish = killed
    run(sys.argv[1], sys.argv[4])
""")


def child(out, where, variant):
    return subprocess.run(
        [sys.executable, '-c', KILLED, str(out), where, str(HERE), variant],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, 'OMP_NUM_THREADS': '1', 'OMP_WAIT_POLICY': 'PASSIVE'},
    )


def test_kill_9_between_write_and_rename(tmp_path, variant='lora'):
    """The process dies with a complete but unpublished state on disk: the run continues from the
    state before it and ends the same."""
    dead = child(tmp_path / 'killed', 'before', variant)
    assert dead.returncode == -signal.SIGKILL, dead.stderr
    left = sorted(p.name for p in (tmp_path / 'killed' / 'checkpoints').iterdir())
    assert left == ['.tmp-step-00000004', 'step-00000002']
    with pytest.warns(UserWarning, match='was never completed'):
        assert latest(tmp_path / 'killed').name == 'step-00000002'
    for out in ('killed', 'whole'):
        done = child(tmp_path / out, 'never', variant)
        assert done.returncode == 0, done.stderr
    assert_same_state(latest(tmp_path / 'killed'), latest(tmp_path / 'whole'))
    assert not list((tmp_path / 'killed' / 'checkpoints').glob('.tmp-*'))


SIGNALLED = textwrap.dedent("""
    import os, signal, sys
    sys.path.insert(0, sys.argv[2])
    import torch; torch.set_num_threads(1)
    from train_stubs import run
    from vlmbench.train.loop import Callback
    def kick(moment):
        if moment.step == 3: os.kill(os.getpid(), signal.Signals[sys.argv[3]])
    run(sys.argv[1], 'frozen', callbacks=[Callback(kick, every=1)], save_every=None)
""")


@pytest.mark.parametrize('name', ['SIGTERM', pytest.param('SIGUSR1', marks=pytest.mark.slow)])
def test_signal_saves_and_exits_75(tmp_path, name):
    p = subprocess.run(
        [sys.executable, '-c', SIGNALLED, str(tmp_path), str(HERE), name],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, 'OMP_NUM_THREADS': '1', 'OMP_WAIT_POLICY': 'PASSIVE'},
    )
    assert p.returncode == 75, p.stderr
    assert latest(tmp_path).name in ('step-00000003', 'step-00000004')
    _, result = run(tmp_path, 'frozen')
    assert result.step == 6 and list(result.history.step) == [1, 2, 3, 4, 5, 6]


def test_resume_none_refuses_a_used_folder(tmp_path):
    run(tmp_path, 'frozen', steps=2)
    with pytest.raises(CheckpointError, match="resume='auto'"):
        run(tmp_path, 'frozen', steps=2, resume=None)


def test_another_stage_seed_or_base_is_refused(tmp_path):
    run(tmp_path, 'frozen', steps=2)
    with pytest.raises(CheckpointError, match='stage.lr: saved 0.003, now 0.1'):
        run(tmp_path, stage=a_stage('frozen', steps=2, lr=0.1))
    with pytest.raises(CheckpointError, match='seed: saved 0, now 1'):
        run(tmp_path, 'frozen', steps=2, seed=1)
    with pytest.raises(CheckpointError, match='base: saved'):
        run(tmp_path, 'frozen', steps=2, model=tiny_vlm(seed=5))
    with pytest.raises(ValueError, match='max_tokens'):
        run(tmp_path, 'frozen', steps=2, loader=packed_loader(max_tokens=40))


def test_allowed_changes_extend_a_finished_run(tmp_path):
    _, a = run(tmp_path, 'frozen', steps=2)
    _, b = run(tmp_path, 'frozen', steps=4, allow_changed=['stage.steps'])
    assert (a.step, b.step) == (2, 4)


def test_a_damaged_newest_state_falls_back_to_the_one_before(tmp_path):
    _, whole = run(tmp_path / 'whole', 'frozen')
    run(tmp_path / 'damaged', 'frozen')
    bad = latest(tmp_path / 'damaged') / 'optimizer.safetensors'
    bad.write_bytes(bad.read_bytes()[:-8])
    with pytest.warns(UserWarning, match='optimizer.safetensors has .* bytes instead of'):
        train(
            tiny_vlm(0.1),
            None,
            a_stage('frozen'),
            None,
            tmp_path / 'damaged',
            loader=packed_loader(),
            device='cpu',
            progress_seconds=None,
        )
    assert_same_state(whole.checkpoint, latest(tmp_path / 'damaged'))


def test_too_many_bad_rows_stop_at_a_saved_state(tmp_path):
    """The run goes on from that state, bit for bit, once the cap allows it; the list of bad rows
    lies beside it."""

    def loader(cap):
        def broken(i):
            if i % 4 == 0:
                raise ValueError('missing: a.jpg')
            return encode(i)

        return BatchLoader(
            range(600),
            broken,
            StatefulSampler(600, seed=0),
            48,
            2,
            buffer=8,
            prefetch=2,
            quarantine=Quarantine(cap, path=tmp_path / 'bad.json'),
        )

    _, a = run(tmp_path / 'a', steps=12, loader=loader(1.0), save_every=None)
    with pytest.raises(
        TooManyBadRecords, match=r'(?s)draws: more than cap=1.00%.*The state is in .*b'
    ) as e:
        run(tmp_path / 'b', steps=12, loader=loader(0.01), save_every=None)
    stopped = latest(tmp_path / 'b')
    assert str(stopped) in str(e.value) and 1 < load_state(stopped).step < 12
    assert 'missing: a.jpg' in (tmp_path / 'bad.json').read_text()
    _, b = run(tmp_path / 'b', steps=12, loader=loader(1.0), save_every=None)
    assert_same_state(a.checkpoint, b.checkpoint)


def test_a_run_whose_states_are_all_damaged_does_not_start_over(tmp_path):
    run(tmp_path, 'frozen', steps=4)
    for state in (tmp_path / 'checkpoints').iterdir():
        weights = state / 'weights.safetensors'
        weights.write_bytes(weights.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match='(?s)step-00000004: weights.*step-00000002'):
        run(tmp_path, 'frozen', steps=4)


def test_a_broken_line_of_metrics_is_set_aside(tmp_path):
    run(tmp_path, 'frozen', steps=2)
    metrics = tmp_path / 'metrics.jsonl'
    whole = metrics.read_bytes()
    metrics.write_bytes(whole + b'{"step": 2, "ev\xff\n{"step": 2')
    with pytest.warns(UserWarning, match='line 5, 6 cannot be read'):
        train(
            tiny_vlm(0.1),
            None,
            a_stage('frozen', 2),
            None,
            tmp_path,
            loader=packed_loader(),
            device='cpu',
            progress_seconds=None,
        )
    assert metrics.read_bytes() == whole
    assert len((tmp_path / 'metrics.broken.jsonl').read_text().splitlines()) == 2


def test_a_second_training_in_the_same_folder_is_refused(tmp_path):
    def again(moment):
        with pytest.raises(FolderInUse, match='is training here'):
            run(tmp_path, 'frozen', steps=2)

    run(tmp_path, 'frozen', steps=2, callbacks=[Callback(again)])
    assert not (tmp_path / 'train.lock').exists()
