"""lmms-eval asks a model of ours by its entry point, unpatched: its answers against those of
`evaluate` and `ask`."""

import json
import os
import subprocess
import sys
from dataclasses import asdict

import pytest

import vlmbench
from judge_server import scripted
from vlmbench.data.record import Sample, Turn
from vlmbench.data.scene import WorldConfig
from vlmbench.data.world import WorldSize, asset_path, write_world
from vlmbench.demo.serve import world_picture
from vlmbench.evaluate.assess import load_tasks
from vlmbench.evaluate.generate import evaluate
from vlmbench.evaluate.lmms import lmms_class
from vlmbench.evaluate.task_files import write_task
from vlmbench.evaluate.tasks import Task
from vlmbench.run.engine import find_notebook, run_notebook
from vlmbench.run.harness_job import harness_job
from vlmbench.run.manifest import Manifest
from vlmbench.run.parameters import load_notebook, notebook_parameters
from vlmbench.train.launch import launch

TASK = """task: {name}
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {folder}/rows.parquet}}, cache_dir: {folder}/cache}}
test_split: test
output_type: generate_until
doc_to_visual: !function pictures.{pictures}
doc_to_text: '{{{{question}}}}'
doc_to_target: '{{{{answer}}}}'
generation_kwargs: {{until: {until}, max_new_tokens: {longest}, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 0.0}}
"""
PICTURES = """def one(row):
    return [row['image'].convert('RGB')]


def two(row):
    return [row['image'].convert('RGB'), row['other'].convert('RGB')]
"""
QUESTIONS = [
    'what is this ?',
    'how many things are there in the picture ?',
    'what color is the circle ?',
    'how many circles ?',
    'is there a red square ?',
]


def write_tasks(folder, **more):
    "Tasks `things` (one picture), `pairs` (two) and `stopped`, over rows of this folder."
    import datasets

    rows = [
        dict(image=world_picture(n), other=world_picture(n + 9), question=question, answer='three')
        for n, question in enumerate(QUESTIONS)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(rows).to_parquet(folder / 'rows.parquet')
    (folder / 'pictures.py').write_text(PICTURES)
    for name, pictures, until, longest in (
        ('things', 'one', '["\\n"]', 8),
        ('pairs', 'two', '["\\n"]', 8),
        ('stopped', 'one', '["t", "e"]', 8),
    ):
        text = TASK.format(
            name=name, folder=folder, pictures=pictures, until=until, longest=longest
        )
        (folder / f'{name}.yaml').write_text(text)
    return rows


def samples(rows, *columns):
    marks = '<image>\n' * len(columns)
    return [
        Sample(
            str(n),
            [Turn('user', marks + row['question']), Turn('assistant', row['answer'])],
            [row[name] for name in columns],
        )
        for n, row in enumerate(rows)
    ]


@pytest.fixture(scope='module')
def lmms_eval():
    return pytest.importorskip(
        'lmms_eval.evaluator',
        reason='lmms-eval is not installed: pip install --no-deps lmms-eval==0.7.3',
        exc_type=ImportError,
    )


@pytest.fixture(scope='module')
def model():
    return vlmbench.load(asset_path('vlm'), device='cpu')


def answers(found, task):
    rows = sorted(found['samples'][task], key=lambda row: row['doc_id'])
    return [row['filtered_resps'][0] for row in rows]


@pytest.mark.slow
def test_its_answers_are_those_of_evaluate(lmms_eval, model, tmp_path):
    "Batched, by falling length, one picture and two, in the order of the rows; stop strings cut."
    from lmms_eval.tasks import TaskManager

    rows = write_tasks(tmp_path)
    found = lmms_eval.simple_evaluate(
        model=lmms_class()((model.model, model.processor), batch_size=3, device='cpu'),
        tasks=['things', 'pairs', 'stopped'],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        random_seed=None,
        numpy_random_seed=None,
        torch_random_seed=None,
        log_samples=True,
        bootstrap_iters=0,
    )
    things = answers(found, 'things')
    assert things == [str(model.ask(row['image'], row['question'])) for row in rows]
    for task, columns in (('things', ['image']), ('pairs', ['image', 'other'])):
        asked = Task(task, samples(rows, *columns), max_new_tokens=8)
        ours = evaluate(model.model, model.processor, asked, batch_size=2)
        assert answers(found, task) == ours.frame['prediction'].tolist()
        assert found['results'][task]['exact_match,none'] == pytest.approx(ours.accuracy)
    assert len(set(things)) > 2 and answers(found, 'pairs') != things
    before = [min([text.partition(stop)[0] for stop in 'te'], key=len).strip() for text in things]
    assert answers(found, 'stopped') == before != things
    first = lmms_class()((model.model, model.processor), device='cpu', pictures='one')
    shown = TaskManager(include_path=str(tmp_path), include_defaults=False)
    found = lmms_eval.simple_evaluate(model=first, tasks=['pairs'], task_manager=shown)
    assert answers(found, 'pairs') == things


TWO = ['-m', 'accelerate.commands.launch', '--multi_gpu', '--num_processes=2']


def command(tmp_path, *, model, tasks, logs, more=(), ranks=1):
    "A user's command, from another folder; the entry point is read from metadata made afresh."
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    meta = tmp_path / 'metadata'
    if not meta.exists():
        meta.mkdir()
        made = [sys.executable, 'setup.py', '-q', 'egg_info', '--egg-base', str(meta)]
        subprocess.run(made, cwd=root, check=True, capture_output=True)
    line = [sys.executable, *(TWO if ranks == 2 else ()), '-m', 'lmms_eval', '--model', 'vlmbench']
    line += ['--model_args', f'pretrained={model},device=cpu', '--tasks', tasks]
    line += ['--include_path', str(tmp_path), '--batch_size', '2', '--log_samples']
    env = os.environ | dict(
        PYTHONPATH=os.pathsep.join([str(meta), root]), CUDA_VISIBLE_DEVICES='', OMP_NUM_THREADS='1'
    )
    if ranks > 1:  # without it the launcher starts one process where there is no GPU, and is silent
        env['ACCELERATE_USE_CPU'] = 'true'
    line += ['--output_path', str(logs), *more]
    done = subprocess.run(line, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=500)
    printed = done.stdout + done.stderr
    said = printed[-3000:]
    assert done.returncode == 0, said
    for rank in range(ranks):
        assert f'Running on rank {rank} ' in printed, printed[-6000:]
    found = {}
    for task in tasks.split(','):
        logged = sorted(logs.rglob(f'*samples_{task}.jsonl'))
        assert len(logged) == 1, said
        rows = [json.loads(text) for text in logged[0].read_text().splitlines()]
        found[task] = {row['doc_id']: row['filtered_resps'] for row in rows}
    return found


@pytest.mark.slow
def test_the_command_on_one_rank_and_on_two(lmms_eval, model, tmp_path):
    rows = write_tasks(tmp_path)
    for part in (model.model, model.processor):
        part.save_pretrained(tmp_path / 'saved')
    where = dict(model=tmp_path / 'saved', tasks='things,pairs')
    one = command(tmp_path, **where, logs=tmp_path / 'one')
    ours = [str(model.ask(row['image'], row['question'])) for row in rows]
    assert one['things'] == dict(enumerate(ours)) and len(one['pairs']) == len(rows)
    assert command(tmp_path, **where, ranks=2, logs=tmp_path / 'two') == one


JUDGED = """

def asks_nobody(row, results):
    return dict(exact=float(row['answer'] == results[0]))


def grade(row, results):
    from lmms_eval.llm_judge import get_server
    from lmms_eval.llm_judge.protocol import Request, ServerConfig

    how = ServerConfig(model_name='made-up-judge', temperature=0.0, max_tokens=8)
    asked = [dict(role='user', content=results[0])]
    said = get_server('openai', how).evaluate(Request(messages=asked, config=how))
    return dict(grade=float(said.content))


def mean(items, args=None):
    return sum(items) / len(items)
"""


def settings(model, tasks, folder, suite='vlm', **more):
    "All parameters of notebook `harness`."
    declared = notebook_parameters(load_notebook(find_notebook('harness')))
    values = {name: one.default for name, one in declared.items()}
    given = dict(model=str(model), tasks=tasks, suite=suite, task_folder=str(folder))
    return values | given | dict(device='cpu', batch_size=2) | more


def started(folder, asked):
    "A run folder whose run has begun, as a job expects it."
    Manifest(folder).start('harness', asked)
    return str(folder)


def said(folder, task):
    lines = (folder / 'results' / f'{task}.samples.jsonl').read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row['doc_id'] for row in rows] == list(range(len(rows)))
    return [row['filtered_resps'] for row in rows]


@pytest.mark.slow
def test_two_ranks_of_the_job_answer_as_one_and_write_no_weights(lmms_eval, model, tmp_path):
    rows = write_tasks(tmp_path / 'tasks')
    asked = settings(asset_path('vlm'), ['things', 'pairs'], tmp_path / 'tasks')
    where = dict(settings=asked, model=str(asset_path('vlm')))
    one = harness_job(**where, folder=started(tmp_path / 'one', asked))
    two = launch(
        'vlmbench.run.harness_job:harness_job',
        where | dict(folder=started(tmp_path / 'two', asked)),
        2,
        tmp_path / 'ranks',
    )
    ours = [[str(model.ask(row['image'], row['question']))] for row in rows]
    assert said(tmp_path / 'one', 'things') == ours
    for task in ('things', 'pairs'):
        assert said(tmp_path / 'two', task) == said(tmp_path / 'one', task)
        assert two['quoted'][task] == pytest.approx(one['quoted'][task])
    written = {path.suffix for path in tmp_path.joinpath('one').rglob('*.*')}
    assert {'.json', '.csv'} <= written and not {'.safetensors', '.bin', '.pt'} & written


@pytest.mark.slow
def test_judged_tasks_wait_for_a_key_which_is_written_nowhere(
    lmms_eval, tmp_path, monkeypatch, capsys
):
    rows = write_tasks(tmp_path / 'tasks')
    folder, secret = tmp_path / 'tasks', 'a-key-of-nobody-42'
    with open(folder / 'pictures.py', 'a') as f:
        f.write(JUDGED)
    for name, function, metric in (('free', 'asks_nobody', 'exact'), ('judged', 'grade', 'grade')):
        text = TASK.format(
            name=name, folder=folder, pictures='one', until='["\\n"]', longest=4
        ).partition('metric_list')[0]
        text += f'process_results: !function pictures.{function}\n'
        text += f'metric_list: [{{metric: {metric}, aggregation: !function pictures.mean}}]\n'
        (folder / f'{name}.yaml').write_text(text)
    asked = settings(asset_path('vlm'), ['judged', 'free'], folder)
    where = dict(settings=asked, model=str(asset_path('vlm')))
    monkeypatch.delenv('OPENAI_API_KEY', raising=False)
    without = harness_job(**where, folder=started(tmp_path / 'without', asked))
    assert list(without['skipped']) == ['judged'] and list(without['quoted']) == ['free']
    assert 'skipped judged: judged is scored by a judge' in capsys.readouterr().out
    with scripted(lambda n, request, headers: '0.25') as (url, seen):
        monkeypatch.setenv('OPENAI_API_KEY', secret)
        monkeypatch.setenv('OPENAI_API_URL', url)
        monkeypatch.setenv('MODEL_VERSION', 'made-up-judge')
        with_key = harness_job(**where, folder=started(tmp_path / 'with', asked))
    assert with_key['skipped'] == {} and with_key['quoted']['judged'] == pytest.approx(0.25)
    assert with_key['judge'] == dict(model='made-up-judge', url=url) and len(seen) == len(rows)
    sent = {name.lower(): value for name, value in seen[0]['headers'].items()}
    assert sent['authorization'] == f'Bearer {secret}'
    written = [path.read_text() for path in (tmp_path / 'with').rglob('*.*')]
    assert written and not any(secret in text for text in written)


def test_wrong_requests_are_refused_before_a_model_is_loaded(lmms_eval, tmp_path):
    write_tasks(tmp_path / 'tasks')
    asked = settings(tmp_path, ['thing'], tmp_path / 'tasks')
    with pytest.raises(ValueError, match="task 'thing' is unknown; there is things"):
        harness_job(asked, str(tmp_path), str(tmp_path / 'run'))


@pytest.mark.slow
def test_the_run_notebook(lmms_eval, tmp_path):
    write_tasks(tmp_path / 'tasks')
    given = dict(model=str(asset_path('vlm')), tasks=['things'], limit=2, device='cpu')
    given |= dict(task_folder=str(tmp_path / 'tasks'))
    assert run_notebook('harness', given, tmp_path / 'run', progress=False) == 0
    manifest = Manifest(tmp_path / 'run').read()
    assert manifest['status'] == 'completed' and set(manifest['results']) == {'things'}
    assert manifest['skipped'] == {} and len(said(tmp_path / 'run', 'things')) == 2


@pytest.mark.slow
def test_a_task_of_ours_written_for_lmms_eval_scores_as_evaluate(lmms_eval, model, tmp_path):
    "Questions of the embedded world, by the task's own scorer."
    from lmms_eval.tasks import TaskManager

    none = dict.fromkeys(asdict(WorldSize()), 0)
    write_world(tmp_path / 'world', WorldConfig(), WorldSize(**none | dict(vqa_test=6)))
    task = load_tasks(tmp_path / 'world', ['vqa_test'], 12)['vqa_test']
    ours = evaluate(model.model, model.processor, task, batch_size=4)
    write_task(task, tmp_path / 'tasks')
    found = lmms_eval.simple_evaluate(
        model=lmms_class()((model.model, model.processor), batch_size=4, device='cpu'),
        tasks=[task.name],
        task_manager=TaskManager(include_path=str(tmp_path / 'tasks'), include_defaults=False),
        log_samples=True,
    )
    assert answers(found, task.name) == ours.frame['prediction'].tolist() and len(ours.frame) > 6
    assert found['results'][task.name]['score,none'] == pytest.approx(ours.frame['score'].mean())
