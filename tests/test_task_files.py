"""The region sets and ViP-Bench as task files of lmms-eval: the markers stand in the pictures that
a model is given, and the scores are those of this package."""

import json
import sys

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import vlmbench
from test_lmms import answers, command
from test_region_tasks import ROWS, root  # noqa: F401
from test_vip_bench import write
from vlmbench.data.record import Sample, Turn
from vlmbench.data.world import asset_path
from vlmbench.evaluate.captions import Caption, word_f1
from vlmbench.evaluate.generate import evaluate
from vlmbench.evaluate.region_tasks import region_task
from vlmbench.evaluate.scorers import MME
from vlmbench.evaluate.task_files import named_tasks, told_scorer, write_task, _told
from vlmbench.evaluate.tasks import Task
from vlmbench.run.cli import app

FILES = dict(
    v7w='v7w-test.json',
    pointqa='pointQA_twice_test.json',
    vcr_qa='vcr-val.json',
    refcocog='refcocog-test.json',
)
SETS = ['v7w', 'pointqa', 'vcr_qa', 'vcr_qar', 'refcocog']


@pytest.fixture(scope='module')
def model():
    return vlmbench.load(asset_path('vlm'), device='cpu')


@pytest.fixture
def sets(root):  # noqa: F811
    "Two rows of each set under its own file's name, and ViP-Bench's five."
    for name, file in FILES.items():
        (root / file).write_text(json.dumps(ROWS[name][:2]))
    write(root, 5)
    return root


def written(sets, tmp_path, *names):
    out = tmp_path / 'tasks'
    words = ['data', 'tasks', *names, '--data', str(sets), '--out', str(out), '--metrics', '']
    run = CliRunner().invoke(app, words)
    assert run.exit_code == 0, run.output
    return out


def shown(model, folder, names):
    "What lmms-eval gives to a model: task -> samples, in the order of the rows; and the results."
    pytest.importorskip('lmms_eval.evaluator', exc_type=ImportError)
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager
    from vlmbench.evaluate.lmms_chat import chat_class

    asked = chat_class()((model.model, model.processor), batch_size=2, device='cpu')
    seen, answer = {}, asked.answer

    def watched(samples, how):
        seen.update({sample.id: sample for sample in samples})
        return answer(samples, how)

    asked.answer = watched
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found = simple_evaluate(model=asked, tasks=names, task_manager=manager, log_samples=True)
    return seen, found


def changed(picture, plain):
    "Where the picture differs from the one without markers: a mask of its pixels."
    return (np.asarray(picture, int) != np.asarray(plain, int)).any(-1)


@pytest.mark.slow
def test_the_markers_are_in_the_pictures_that_the_model_gets(model, sets, tmp_path):
    folder = written(sets, tmp_path, *SETS)
    seen, found = shown(model, folder, [f'vlmbench_{name}' for name in SETS])
    seen = {id.removeprefix('vlmbench_'): sample for id, sample in seen.items()}
    plain = Image.open(sets / 'f' / 'a.png').convert('RGB')
    for name in SETS:
        rows = sorted(id for id in seen if id.partition('/')[0] == name)
        assert len(rows) == (1 if name == 'refcocog' else 2), name
        for id in rows:
            (picture,) = seen[id].images
            square = name in ('vcr_qa', 'vcr_qar')
            size = (200, 200) if square else (200, 150)
            assert picture.size == size
            mask = changed(picture, plain.resize(size) if square else plain)
            assert 0.001 < mask.mean() < 0.9, id
    # Visual7W: each of the four boxes has its own marker, and nothing is drawn far from all
    (picture,) = seen['v7w/0'].images
    mask = changed(picture, plain)
    for x0, y0, x1, y1 in ROWS['v7w'][0]['bboxes']:
        edge = 6
        inside = mask[max(0, y0 - edge) : y1 + edge, max(0, x0 - edge) : x1 + edge]
        assert inside.any(), (x0, y0, x1, y1)
    text = seen['v7w/0'].turns[-1].text
    assert text.startswith('<image>\n') and 'Which one?' in text and 'D. ' in text
    # two rows of one set differ in what is drawn, by their own seeds
    assert (np.asarray(seen['v7w/0'].images[0]) != np.asarray(seen['v7w/1'].images[0])).any()
    for name in ('v7w', 'pointqa'):
        task = region_task(name, sets / FILES[name], sets)
        ours = evaluate(model.model, model.processor, task, batch_size=1)
        assert answers(found, f'vlmbench_{name}') == ours.frame['prediction'].tolist()
        score = found['results'][f'vlmbench_{name}']['score,none']
        assert score == pytest.approx(ours.frame['score'].mean())


@pytest.mark.slow
def test_vip_bench_sums_up_by_capability(model, sets, tmp_path):
    folder = written(sets, tmp_path, 'vip_bench_bbox')
    seen, found = shown(model, folder, ['vlmbench_vip_bench_bbox'])
    assert [seen[f'vlmbench_vip_bench_bbox/{n}'].images[0].getpixel((0, 0)) for n in range(5)] == [
        (9 * n, 90, 30) for n in range(5)
    ]
    ((task, _),) = named_tasks(['vip_bench_bbox'], sets)
    ours = evaluate(model.model, model.processor, task, batch_size=1)
    scores = found['results']['vlmbench_vip_bench_bbox']
    for name, value in task.scorer.summary(ours.frame).items():
        assert scores[f'{name},none'] == pytest.approx(value)
    assert {f'{c},none' for c in ('rec', 'ocr', 'know', 'math', 'rel', 'lang')} <= set(scores)


@pytest.mark.slow
def test_the_command_of_lmms_eval_on_one_rank_and_on_two(model, sets, tmp_path):
    folder = written(sets, tmp_path / 'made', 'v7w', 'refcocog')
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    for part in (model.model, model.processor):
        part.save_pretrained(tmp_path / 'saved')
    where = dict(model=tmp_path / 'saved', tasks='vlmbench_v7w,vlmbench_refcocog')
    one = command(tmp_path, **where, logs=tmp_path / 'one')
    assert command(tmp_path, **where, ranks=2, logs=tmp_path / 'two') == one
    task = region_task('v7w', sets / FILES['v7w'], sets)
    ours = evaluate(model.model, model.processor, task, batch_size=2)
    assert [one['vlmbench_v7w'][n] for n in range(2)] == ours.frame['prediction'].tolist()


def test_the_numbers_drawn_from_all_answers(tmp_path):
    "MME's sums and a caption's mean, from the functions that the task file names."
    import importlib.util

    rows = [('a', 'yes', 'code_reasoning'), ('a', 'no', 'code_reasoning'), ('b', 'yes', 'count')]
    rows += [('b', 'no', 'count')]
    samples = [
        Sample(
            f'{n}',
            [Turn('user', f'is it {n} ? yes or no'), Turn('assistant', truth)],
            meta=dict(question_type=kind, group=group, cluster=group),
        )
        for n, (group, truth, kind) in enumerate(rows)
    ]
    path = write_task(Task('sums', samples, MME()), tmp_path)
    spec = importlib.util.spec_from_file_location('made', tmp_path / 'sums_functions.py')
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    import datasets

    held = datasets.Dataset.from_parquet(str(tmp_path / 'sums.parquet'), cache_dir=str(tmp_path))
    said = ['yes', 'no', 'yes', 'yes']
    items = [made.process(row, [answer]) for row, answer in zip(held, said)]
    assert [item['score'] for item in items] == [1, 1, 1, 0]
    text = path.read_text()
    totals = {}
    for k, name in enumerate(held[0]['summed']):
        assert f'made.number_{k}'.replace('made', 'sums_functions') in text
        totals[name] = vars(made)[f'number_{k}']([item[name] for item in items])
    # a pair right: 100 + 100; one of two: 50
    assert totals['cognition'] == 200 and totals['perception'] == 50
    assert told_scorer(_told(Caption(('cider',)))) == Caption(('cider',))
    assert word_f1('a cup', 'the cup') > 0


def test_two_tasks_in_one_folder_keep_their_own_numbers(sets, tmp_path):
    folder = written(sets, tmp_path, 'v7w', 'vip_bench_bbox')
    assert 'rec' not in (folder / 'vlmbench_v7w_functions.py').read_text()
    assert "summed('rec')" in (folder / 'vlmbench_vip_bench_bbox_functions.py').read_text()


def test_what_cannot_be_written_is_said_by_the_command(sets, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'pycocoevalcap.cider.cider', None)
    for names, why in (
        (['v7w', 'nothing_here'], 'nothing_here'),
        (['refcocog'], "caption metrics need the extra 'eval'"),
    ):
        words = ['data', 'tasks', *names, '--data', str(sets), '--out', str(tmp_path / 'o')]
        run = CliRunner().invoke(app, words)
        assert run.exit_code != 0 and why in run.output + str(run.exception)
