"""Benchmarks asked while a model trains: every tensor of the run is what it is without them, the
numbers are those of the model at that step, on one rank and on two, whole or in shards."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import test_runs
from mini_bases import first_always, parameters_of
from test_harness import write_choices
from test_lmms import TASK
from vlmbench.demo.serve import world_picture
from vlmbench.evaluate.assess import load_tasks
from vlmbench.evaluate.generate import evaluate
from vlmbench.checkpoints.load import load_vlm
from vlmbench.methods.recipes import find_scale, get_recipe
from vlmbench.run.early import check_early
from vlmbench.run.engine import find_notebook, run_notebook
from vlmbench.run.jobs import train_job
from vlmbench.run.manifest import Manifest, Run
from vlmbench.run.parameters import ParameterError, load_notebook, notebook_parameters
from vlmbench.train.launch import launch
from vlmbench.train.metrics import read_metrics

bases = test_runs.bases  # the fixture
EVERY = dict(harness_every=1, harness_limit=3)
OWN = dict(EVERY, harness_tasks=['vqa_test', 'text_test'])


@pytest.fixture(scope='module')
def task_folder(tmp_path_factory):
    "Task `colours` of lm-eval and tasks `things`, `likely` of lmms-eval."
    import datasets

    folder = tmp_path_factory.mktemp('tasks') / 'tasks'
    write_choices(folder)
    rows = [
        dict(image=world_picture(n), question='what is this ?', answer='three') for n in range(5)
    ]
    datasets.Dataset.from_list(rows).to_parquet(folder / 'rows.parquet')
    (folder / 'pictures.py').write_text("def one(row):\n    return [row['image'].convert('RGB')]\n")
    until = '["\\n"]'
    text = TASK.format(name='things', folder=folder, pictures='one', until=until, longest=4)
    (folder / 'things.yaml').write_text(text)
    likely = text.replace('task: things', 'task: likely').replace(
        'generate_until', 'multiple_choice'
    )
    likely = likely.partition('generation_kwargs')[0] + 'doc_to_choice: [three, red, two]\n'
    likely += 'metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n'
    (folder / 'likely.yaml').write_text(likely)
    return folder


def all_of(task_folder):
    names = ['vqa_test', 'vlm:things', 'vlm:likely', 'text:colours:2']
    return dict(EVERY, harness_tasks=names, harness_folder=str(task_folder))


def job(bases, folder, **more):
    "What `train_job` takes, and a run folder that has begun."
    given = parameters_of('train', **test_runs.params(bases, **more), evaluate=False)
    Run(folder, 'train', given)
    return dict(settings=given, data=str(bases / 'world'), folder=str(folder))


def end(folder):
    return load_file(folder / 'model' / 'model.safetensors')


def assert_equal(ours, theirs):
    a, b = end(ours), end(theirs)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    for stage in sorted(p.name for p in (theirs / 'stages').iterdir()):
        rows = [read_metrics(run / 'stages' / stage) for run in (ours, theirs)]
        same = ['step', 'loss', 'grad_norm', 'samples', 'seen_targets']
        assert rows[0][same].equals(rows[1][same]) and len(rows[0])


def numbers(folder):
    "The numbers of every stage by step."
    return {
        (stage.name, row['step']): {k: v for k, v in row.items() if k not in ('step', 'event')}
        for stage in sorted((folder / 'stages').iterdir())
        for row in read_metrics(stage, 'harness').to_dict('records')
    }


@pytest.mark.parametrize(
    'recipe', first_always(['llava', 'eve', 'vora', 'zero', 'visual_region', 'vip_llava'])
)
def test_nothing_of_it_is_left_in_the_model(bases, tmp_path, recipe):
    short = ['batch_rows=1', 'accumulation=1', 'max_tokens=256', 'steps=2']
    more = dict(recipe=recipe)
    if recipe != 'llava':
        names = [stage.name for stage in get_recipe(recipe, find_scale('tiny')).stages]
        overrides = [f'stages.{stage}.{one}' for stage in names for one in short]
        more |= dict(scale='tiny', overrides=overrides, budget=1.0)
    if recipe == 'vip_llava':  # whose other stages read region rows
        more |= dict(stages=['align'], overrides=overrides[: len(short)])
    train_job(**job(bases, tmp_path / 'plain', **more))
    train_job(**job(bases, tmp_path / 'asked', **more, **OWN))
    assert_equal(tmp_path / 'asked', tmp_path / 'plain')
    found = numbers(tmp_path / 'asked')
    stages = [*(tmp_path / 'plain' / 'stages').iterdir()]
    assert set(found) == {(stage.name, n) for stage in stages for n in read_metrics(stage)['step']}
    assert {name for one in found.values() for name in one} == {'vqa_test', 'text_test'}
    assert numbers(tmp_path / 'plain') == {}


@pytest.mark.slow
def test_all_three_evaluators_and_the_numbers_are_the_models(bases, task_folder, tmp_path):
    more = dict(stages=['align'])
    train_job(**job(bases, tmp_path / 'plain', **more))
    train_job(**job(bases, tmp_path / 'asked', **more, **all_of(task_folder)))
    assert_equal(tmp_path / 'asked', tmp_path / 'plain')
    found = numbers(tmp_path / 'asked')
    last = found[max(found)]
    assert set(last) == {
        'vqa_test',
        'vlm:things/exact_match',
        'vlm:likely/acc',
        'text:colours/acc',
        'text:colours/acc_norm',
    }
    model, processor = load_vlm(tmp_path / 'asked' / 'model', 'cpu')
    task = load_tasks(bases / 'world', ['vqa_test'], 3)['vqa_test']
    assert last['vqa_test'] == pytest.approx(evaluate(model, processor, task).accuracy)
    given = dict(model=str(tmp_path / 'asked' / 'model'), device='cpu', limit=3)
    given |= dict(task_folder=str(task_folder))
    for suite, tasks, where in (
        ('vlm', ['things', 'likely'], ['vlm:things/exact_match', 'vlm:likely/acc']),
        ('text', ['colours:2'], ['text:colours/acc']),
    ):
        from vlmbench.run.harness_job import harness_job

        asked = parameters_of('harness', **given, suite=suite, tasks=tasks)
        Manifest(tmp_path / suite).start('harness', asked)
        said = harness_job(asked, given['model'], str(tmp_path / suite))
        assert [last[name] for name in where] == pytest.approx(list(said['quoted'].values()))


@pytest.mark.slow
def test_nothing_is_left_in_half_precision(bases, task_folder, tmp_path):
    more = dict(stages=['instruct'], precision='bf16')
    train_job(**job(bases, tmp_path / 'plain', **more))
    train_job(**job(bases, tmp_path / 'asked', **more, **all_of(task_folder)))
    assert_equal(tmp_path / 'asked', tmp_path / 'plain')
    assert len(numbers(tmp_path / 'asked')) > 0


@pytest.mark.slow
@pytest.mark.parametrize('parallel', ['ddp', 'fsdp'])
def test_two_ranks_whole_or_in_shards(bases, task_folder, tmp_path, parallel):
    lanes = [f'stages.{stage}.accumulation=2' for stage in ('align', 'instruct')]
    more = dict(parallel=parallel, stages=['instruct'])
    more['overrides'] = test_runs.FEW['overrides'] + lanes
    target = 'vlmbench.run.jobs:train_job'
    asked = all_of(task_folder)
    launch(target, job(bases, tmp_path / 'plain', **more), 2, tmp_path / 'p')
    launch(target, job(bases, tmp_path / 'asked', **more, **asked), 2, tmp_path / 'a')
    assert_equal(tmp_path / 'asked', tmp_path / 'plain')
    one = more | dict(parallel=None)
    train_job(**job(bases, tmp_path / 'one', **one, **asked))
    alone, shared = numbers(tmp_path / 'one'), numbers(tmp_path / 'asked')
    assert alone.keys() == shared.keys()
    for step, values in alone.items():
        assert shared[step] == pytest.approx(values, abs=1e-6)


@pytest.mark.slow
def test_the_command_shows_the_curve_and_the_report_has_it(bases, tmp_path):
    given = test_runs.params(bases, evaluate=False, **OWN)
    assert run_notebook('train', given, tmp_path / 'run', progress=False) == 0
    cells = json.loads((tmp_path / 'run' / 'train.ipynb').read_text())['cells']
    (shown,) = [c for c in cells if 'harness_figure(' in ''.join(c['source'])]
    shown = json.dumps(shown['outputs'])
    assert 'vqa_test' in shown and shown.count('image/png') == 2  # losses and these numbers
    from vlmbench.lab.report import write_report

    page = write_report([tmp_path / 'run'], tmp_path / 'page').read_text()
    assert 'While training' in page and 'vqa_test' in page


def test_wrong_settings_are_refused_before_anything_starts(bases, tmp_path):
    declared = notebook_parameters(load_notebook(find_notebook('train')))
    for given, why in (
        (dict(harness_every=5), 'harness_every=5 must be at least 1 and needs tasks'),
        (dict(harness_every=0, harness_tasks=['vqa_test']), 'harness_every=0 must be'),
        (dict(harness_tasks=['vlm:']), 'names no task'),
        (dict(harness_tasks=['text:a:b']), 'NAME:EXAMPLES'),
        (dict(harness_tasks=['vqa_test'], harness_folder='/nowhere'), 'no such folder'),
    ):
        with pytest.raises(ParameterError, match=why):
            check_early('train', declared, given)
    begun = job(bases, tmp_path / 'run', harness_tasks=['text:no_such_task'])
    with pytest.raises(ValueError, match="task 'no_such_task' is unknown"):
        train_job(**begun)
    assert not (tmp_path / 'run' / 'stages').exists()


def test_importing_a_harness_changes_nothing_of_the_process():
    "lmms-eval silences warnings and lets cut pictures pass where it is imported."
    pytest.importorskip('lmms_eval', exc_type=ImportError)
    code = """
import warnings
from PIL import ImageFile
from vlmbench.evaluate.in_process import SUITES
before = list(warnings.filters)
for suite in SUITES.values():
    suite(dict(tasks=['mme'], task_folder=''))
import lmms_eval.api.task
assert list(warnings.filters) == before, warnings.filters
assert not ImageFile.LOAD_TRUNCATED_IMAGES
"""
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
