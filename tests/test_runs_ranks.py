"""Run notebooks on two ranks, from another working directory: training equals one rank, questions
are answered alike row for row, a stop is saved and taken up, torchrun by hand does the same."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

import test_runs
from vlmbench.run.manifest import Manifest

pytestmark = pytest.mark.ranks
bases = test_runs.bases  # the fixture
ROOT = str(Path(__file__).parents[1])
ENV = {**os.environ, 'PYTHONPATH': ROOT, 'OMP_NUM_THREADS': '1', 'OMP_WAIT_POLICY': 'PASSIVE'}
TWO_LANES = [f'stages.{s}.accumulation=2' for s in ('align', 'instruct')]


def command(notebook, **values):
    "`vlmbench run` with parameters, lists as Python writes them."
    words = [f'{k}={v!r}' if isinstance(v, list) else f'{k}={v}' for k, v in values.items()]
    return ['-m', 'vlmbench', 'run', notebook, '--quiet', *words]


def run(folder, notebook, **values):
    words = [sys.executable, *command(notebook, **values)]
    return subprocess.run(words, cwd=folder, env=ENV, text=True, capture_output=True, timeout=500)


def settings(bases, **more):
    base = test_runs.params(bases)
    base['overrides'] = base['overrides'] + TWO_LANES
    return base | dict(blind=False) | more


@pytest.fixture(scope='module')
def one(bases, tmp_path_factory):
    folder = tmp_path_factory.mktemp('one')
    done = run(folder, 'train', **settings(bases, out='run'))
    assert done.returncode == 0, done.stderr
    return folder / 'run'


def weights(run_folder):
    return load_file(run_folder / 'model' / 'model.safetensors')


def assert_same_end(ours, theirs):
    a, b = weights(ours), weights(theirs)
    assert a.keys() == b.keys()
    for name, tensor in b.items():
        assert (a[name] - tensor).norm() <= 1e-5 * tensor.norm().clamp(min=1e-2), name
    said, expected = (Manifest(folder).read()['results'] for folder in (ours, theirs))
    assert said == expected


def answers(run_folder, task):
    path = next((run_folder / 'results').glob(f'{task}*.generations.jsonl'))
    return [json.loads(line) for line in path.read_text().splitlines()[1:]]


@pytest.mark.parametrize('parallel', ['ddp', 'fsdp'])
def test_two_ranks_train_and_answer_as_one(bases, one, tmp_path, parallel):
    done = run(tmp_path, 'train', **settings(bases, out='run', gpus=2, parallel=parallel))
    assert done.returncode == 0, done.stderr
    assert_same_end(tmp_path / 'run', one)
    assert (tmp_path / 'run' / 'ranks' / 'rank-1.log').exists()


def test_questions_are_shared_and_answered_alike(bases, one, tmp_path):
    ask = dict(model=one, data=bases / 'world', tasks=['vqa_test'], batch_size=2, device='cpu')
    ask |= dict(blind=False)
    assert run(tmp_path, 'evaluate', out='one', **ask).returncode == 0
    done = run(tmp_path, 'evaluate', out='two', gpus=2, **ask)
    assert done.returncode == 0, done.stderr
    by_hand = ['--nproc-per-node', '2', *command('evaluate', out='hand', **ask)]
    done = subprocess.run(
        [sys.executable, '-m', 'torch.distributed.run', *by_hand],
        cwd=tmp_path,
        env=ENV,
        text=True,
        capture_output=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    expected = answers(tmp_path / 'one', 'vqa_test')
    assert len(expected) == 18
    for folder in ('two', 'hand'):
        assert answers(tmp_path / folder, 'vqa_test') == expected


def test_a_stop_is_saved_by_all_ranks_and_taken_up_by_one(bases, one, tmp_path):
    words = settings(bases, out='run', gpus=2, parallel='fsdp', save_every=1)
    with subprocess.Popen(
        [sys.executable, *command('train', **words)],
        cwd=tmp_path,
        env=ENV,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as running:
        states, end = tmp_path / 'run' / 'stages', time.monotonic() + 300
        while not list(states.glob('*/checkpoints/step-*')) and time.monotonic() < end:
            time.sleep(0.1)
        running.send_signal(signal.SIGUSR1)
        assert running.wait(timeout=300) == 75
    assert Manifest(tmp_path / 'run').read()['status'] == 'preempted'
    done = run(tmp_path, 'train', **words | dict(gpus=1, parallel='single'))
    assert done.returncode == 0, done.stderr
    assert_same_end(tmp_path / 'run', one)


def test_what_cannot_be_is_refused_before_anything_is_built(bases, one, tmp_path):
    done = run(tmp_path, 'train', **settings(bases, out='run', gpus=3))
    assert done.returncode == 1 and 'use 1, 2 ranks' in done.stderr
    changed = settings(bases, out='run') | dict(recipe='eve')
    done = run(one.parent, 'train', **changed)
    assert done.returncode == 2 and 'completed' in done.stderr
    Manifest(one).update(status='failed')
    try:
        done = run(one.parent, 'train', **settings(bases, out='run', budget=0.008))
        assert done.returncode == 1 and 'stage.budget_targets' in done.stderr
    finally:
        Manifest(one).update(status='completed')
