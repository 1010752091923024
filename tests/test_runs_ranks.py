"""Run notebooks on two ranks, from another working directory: training equals one rank, questions
are answered alike row for row, a stop is saved and taken up, torchrun by hand does the same."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image
from safetensors.torch import load_file

import test_runs
from mini_bases import write_objects
from vlmbench.analysis.ablation import GRADIENT
from vlmbench.run.manifest import Manifest
from warm_kernels import vlmbench

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
    "The command and its kernel are copies of a process that has imported everything."
    words = command(notebook, **values)[2:]
    return vlmbench(*words, cwd=folder, env=os.environ | dict(OMP_NUM_THREADS='1'))


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
    for task in ('vqa_test', 'text_test'):
        assert answers(tmp_path / 'run', task) == answers(one, task)
    logs = [(tmp_path / 'run' / 'ranks' / f'rank-{rank}.log').read_text() for rank in (0, 1)]
    assert 'warning: ' not in ''.join(logs) and 'deprecated' not in ''.join(logs)
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


def asked(folder, notebook, **values):
    done = run(folder, notebook, **values)
    assert done.returncode == 0, done.stderr
    return Manifest(folder / values['out']).read()


def test_layers_are_scored_alike(bases, one, tmp_path):
    "Three batches on two ranks: bit for bit, but for gradients, which are summed in another order."
    given = dict(model=one, data=bases / 'world', samples='vqa_test', limit=6, batch_size=2)
    given |= dict(base=one, greedy=0, share=1.0, device='cpu')
    single = asked(tmp_path, 'layers', out='one', **given)
    both = asked(tmp_path, 'layers', out='two', gpus=2, **given)
    names = [phase['name'] for phase in both['phases']]
    assert names == ['data', 'load', 'measure'] == [phase['name'] for phase in single['phases']]
    a, b = (pd.read_csv(tmp_path / out / 'scores.csv') for out in ('one', 'two'))
    summed = a['metric'].isin(GRADIENT)
    assert summed.any() and {'drop_one_delta', 'revert_one_delta', 'cka'} <= set(a['metric'])
    pd.testing.assert_frame_equal(a[~summed], b[~summed], check_exact=True)
    pd.testing.assert_frame_equal(a[summed], b[summed], rtol=1e-4, atol=1e-9)
    assert single['results'] == both['results'] and (tmp_path / 'two' / 'report.html').exists()
    assert (tmp_path / 'two' / 'ranks' / 'rank-1.log').exists()


def test_pruning_measures_alike(bases, one, tmp_path):
    "The ranking, the losses, the repair's rows and the answers are shared by two ranks."
    given = dict(model=one, data=bases / 'world', k=1, calibration=20, limit=6, batch_size=2)
    given |= dict(importance='drop_one', heal=1.0, heal_tune='full', device='cpu')
    single = asked(tmp_path, 'prune', out='one', **given)
    both = asked(tmp_path, 'prune', out='two', gpus=2, **given)
    for fact in ('removed', 'kept', 'calibration_loss', 'results'):
        assert single[fact] == both[fact], fact
    assert both['results']['targets']['heal'] > 0
    assert answers(tmp_path / 'one', 'vqa_test') == answers(tmp_path / 'two', 'vqa_test')
    for name, tensor in weights(tmp_path / 'one').items():
        assert (weights(tmp_path / 'two')[name] - tensor).norm() <= 1e-5 * tensor.norm() + 1e-7
    done = run(tmp_path, 'prune', out='three', gpus=3, **given)
    assert done.returncode == 1 and 'use 1, 2 ranks' in done.stderr


def test_missing_pictures_are_said_in_one_line(bases, tmp_path):
    "Which rank, which file and row, and why; the traceback is in the log of the rank."
    shutil.copytree(bases / 'world', tmp_path / 'world')
    file = tmp_path / 'world' / 'caption_train.json'
    rows = [row | dict(image='none.png') for row in json.loads(file.read_text())]
    file.write_text(json.dumps(rows))
    given = settings(bases, out='run', gpus=2, data=tmp_path / 'world', precision='bf16')
    done = run(tmp_path, 'train', **given)
    said = done.stdout + done.stderr
    assert done.returncode == 1 and 'Traceback' not in said, said
    why = r'rank [01] of 2 failed: ValueError: 100 samples in a row are bad at draw \d+; the last: '
    why += r'sample \d+ \(id .*, caption_train\.json:\d+\): missing: .*none\.png \(its traceback: '
    assert re.search(why, Manifest(tmp_path / 'run').read()['reason'])
    logs = [(tmp_path / 'run' / 'ranks' / f'rank-{rank}.log').read_text() for rank in (0, 1)]
    assert 'Traceback' in ''.join(logs)


def test_region_questions_are_answered_alike(one, tmp_path):
    "Votes, captions and arrows included; unusable rows are listed once."
    Image.radial_gradient('L').convert('RGB').resize((64, 64)).save(tmp_path / 'a.png')
    boxes = [[2, 2, 24, 24], [36, 2, 60, 24], [2, 36, 24, 60], [36, 36, 60, 60]]
    rows = [
        dict(id=f'v7w-{i}', image='a.png', question='which one ?', bboxes=boxes, answer=boxes[i])
        for i in range(4)
    ]
    rows.append(dict(id='bad', image='missing.png', question='?', bboxes=boxes, answer=boxes[0]))
    (tmp_path / 'v7w-test.json').write_text(json.dumps(rows))
    caption = [dict(id='refcocog-1', image='a.png', bboxes=boxes[:1], answer='a cup')]
    (tmp_path / 'refcocog-test.json').write_text(json.dumps(caption))
    write_objects(tmp_path)
    given = dict(model=one, data=tmp_path, sets=['v7w', 'refcocog', 'arrow'], votes=2)
    given |= dict(metrics=[], batch_size=1, bad_rows=0.5, device='cpu')
    single = asked(tmp_path, 'region_tasks', out='one', **given)
    both = asked(tmp_path, 'region_tasks', out='two', gpus=2, **given)
    assert single['results'] == both['results']
    assert both['results']['v7w']['n'] == 4 and 'v7w vote' in both['results']
    found = [(tmp_path / out / 'results') for out in ('one', 'two')]
    files = [sorted(place.rglob('*.generations.jsonl')) for place in found]
    assert len(files[0]) == 4
    for ours, theirs in zip(*files, strict=True):
        a, b = (path.read_text().splitlines()[1:] for path in (ours, theirs))
        assert a == b, ours.name
    said = [{p.name: p.read_text() for p in place.glob('*.answers.jsonl')} for place in found]
    assert said[0] == said[1] and len(said[0]) == 4  # three sets and a vote
    quarantined = json.loads((tmp_path / 'two' / 'quarantine-v7w.json').read_text())
    assert 'missing.png' in json.dumps(quarantined)


def test_a_bench_gives_its_trainings_the_ranks(bases, tmp_path):
    "On the command line; the rows of a step stay the recipe's, so a layout that fits is needed."
    given = ['--methods', 'llava', '--out', 'b', '--scale', bases / 'mini.json', '--quiet']
    given += ['--data', bases / 'world', '--budget', '0.004', '--gpus', '2']
    words = [sys.executable, '-m', 'vlmbench', 'bench', *map(str, given)]
    done = subprocess.run(
        words, cwd=tmp_path, env=ENV, text=True, capture_output=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stderr + done.stdout
    trained = tmp_path / 'b' / 'llava-s0'
    assert Manifest(trained).read()['parameters']['gpus'] == 2
    assert (trained / 'ranks' / 'rank-1.log').exists() and (tmp_path / 'b/report.html').exists()


def test_what_cannot_be_is_refused_before_anything_is_built(bases, one, tmp_path):
    done = run(tmp_path, 'train', **settings(bases, out='run', gpus=3))
    assert done.returncode == 2 and 'use 1, 2 ranks' in done.stderr
    changed = settings(bases, out='run') | dict(recipe='visual_region')
    done = run(one.parent, 'train', **changed)
    assert done.returncode == 2 and 'completed' in done.stderr
    Manifest(one).update(status='failed')
    try:
        done = run(one.parent, 'train', **settings(bases, out='run', budget=0.008))
        assert done.returncode == 1 and 'stage.budget_targets' in done.stderr
    finally:
        Manifest(one).update(status='completed')
