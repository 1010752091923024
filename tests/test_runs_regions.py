"""The run notebooks of the region benchmarks, end to end: a random model's answers, a judge over
HTTP, stored tables."""

import json

import pandas as pd
import pytest
from PIL import Image

from judge_server import scripted
from test_vip_bench import vlm, write  # noqa: F401
from mini_bases import write_objects
from vlmbench.evaluate.results import Results
from vlmbench.run.engine import run_notebook
from vlmbench.run.manifest import Manifest

SECRET = 'sk-the-key-0123456789'


@pytest.fixture(scope='module')
def saved(vlm, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp('m') / 'model'
    for part in vlm:
        part.save_pretrained(folder)
    return folder


def test_vip_bench_with_a_model_and_a_judge(saved, tmp_path, monkeypatch):
    write(tmp_path, 5)
    monkeypatch.setenv('THE_JUDGES', SECRET)
    with scripted(lambda n, r, h: f'0.{n % 10}') as (url, seen):
        params = dict(
            data=str(tmp_path),
            model=str(saved),
            splits=['bbox'],
            judge=url,
            judge_model='made-up',
            judge_runs=2,
            judge_key_env='THE_JUDGES',
            workers=2,
            max_new_tokens=3,
            device='cpu',
            recipe='tiny',
            template='llava_v1',
        )
        assert run_notebook('vip_bench', params, tmp_path / 'out', progress=False) == 0
        assert len(seen) == 10 and seen[0]['headers']['Authorization'] == f'Bearer {SECRET}'
    found = Manifest(tmp_path / 'out').read()['results']
    assert (
        set(found['bbox']['capability']) >= {'rec', 'ocr', 'total', 'std', 'runs'}
        and found['judge_runs'] == 2
    )
    assert found['score'] == pytest.approx(found['bbox']['score'] / 100)
    assert Manifest(tmp_path / 'out').read()['parameters']['template'] == 'llava_v1'
    table = pd.read_csv(tmp_path / 'out' / 'vip_bench.csv')
    assert {'capability', 'combination'} == set(table['by']) and table['n'].max() == 5
    grades = json.loads((tmp_path / 'out' / 'results' / 'vip_bench_bbox.grades.json').read_text())
    assert all(len(g['score']) == 2 for g in grades.values())
    answers = json.loads((tmp_path / 'out' / 'results' / 'vip_bench_bbox.answers.json').read_text())
    said = Results.load(tmp_path / 'out' / 'results', 'vip_bench_bbox', 'judged').frame
    lines = (tmp_path / 'out' / 'results' / 'vip_bench_bbox.answers.jsonl').read_text()
    kept = [json.loads(line) for line in lines.splitlines()]
    assert {row['question_id']: row['text'] for row in kept} == answers
    assert {row['model_id'] for row in kept} == {'tiny'}
    assert set(answers) == {f'v1_{i}' for i in range(5)} and answers == dict(
        zip(said['id'], said['prediction'])
    )
    assert (
        Results.load(tmp_path / 'out' / 'results', 'vip_bench_bbox', 'judged')
        .header['judge']
        .startswith('made-up at')
    )
    text = [
        p
        for p in (tmp_path / 'out').rglob('*')
        if p.is_file() and SECRET.encode() in p.read_bytes()
    ]
    assert not text, f'the key stands in {text}'


def test_vip_bench_grades_other_models_answers_offline(tmp_path):
    write(tmp_path, 5)
    (tmp_path / 'said.json').write_text(json.dumps({f'v1_{i}': 'a dog' for i in range(5)}))
    assert (
        run_notebook(
            'vip_bench',
            dict(data=str(tmp_path), predictions=str(tmp_path / 'said.json')),
            tmp_path / 'out',
            progress=False,
        )
        == 0
    )
    found = Manifest(tmp_path / 'out').read()['results']
    assert (found['bbox']['score'], found['human']['score'], found['judge']) == (
        20.0,
        20.0,
        'exact/3',
    )


def test_region_tasks(saved, tmp_path):
    Image.radial_gradient('L').convert('RGB').resize((64, 64)).save(tmp_path / 'a.png')
    boxes = [[2, 2, 24, 24], [36, 2, 60, 24], [2, 36, 24, 60], [36, 36, 60, 60]]
    mask = [[5.0, 5.0], [20.0, 5.0], [20.0, 20.0], [5.0, 20.0]]
    rows = {
        'v7w-test': [
            dict(
                id=f'v7w-{i}', image='a.png', question='which one ?', bboxes=boxes, answer=boxes[i]
            )
            for i in range(4)
        ],
        'vcr-val': [
            dict(
                id='vcr-1',
                image='a.png',
                meta_dir='./dataset/a.json',
                class_names=['cup'],
                question=['is', [0], 'red', '?'],
                answer_choices=[['no', '.']] * 4,
                answer_label=1,
                rationale_choices=[['so', '.']] * 4,
                rationale_label=2,
            )
        ],
        'refcocog-test': [dict(id='refcocog-1', image='a.png', bboxes=boxes[:1], answer='a cup')],
    }
    for name, r in rows.items():
        (tmp_path / f'{name}.json').write_text(json.dumps(r))
    (tmp_path / 'a.json').write_text(json.dumps(dict(boxes=[[2, 2, 24, 24, 1.0]], segms=[[mask]])))
    write_objects(tmp_path)
    params = dict(
        model=str(saved),
        data=str(tmp_path),
        sets=['v7w', 'vcr_qa', 'vcr_qar', 'refcocog', 'arrow'],
        votes=2,
        metrics=[],
        device='cpu',
    )
    assert run_notebook('region_tasks', params, tmp_path / 'out', progress=False) == 0
    found = Manifest(tmp_path / 'out').read()['results']
    counts = {k: v['n'] for k, v in found.items() if isinstance(v, dict)}
    assert counts == {
        'v7w': 4,
        'v7w vote': 4,
        'vcr_qa': 1,
        'vcr_qa vote': 1,
        'vcr_qar': 1,
        'vcr_qar vote': 1,
        'refcocog': 1,
        'arrow': 2,
        'vcr_qtoar': 1,
    }
    lines = (tmp_path / 'out' / 'results' / 'v7w.answers.jsonl').read_text().splitlines()
    kept = [json.loads(line) for line in lines]
    assert [row['question_id'] for row in kept] == [f'v7w-{i}' for i in range(4)]
    assert set(kept[0]) == {'question_id', 'text', 'answer_id', 'model_id', 'metadata'}
    said = Results.load(tmp_path / 'out' / 'results', 'v7w').frame['prediction']
    assert [row['text'] for row in kept] == said.tolist()
    assert (tmp_path / 'out' / 'results' / 'v7w@ensemble.answers.jsonl').exists()
    assert 'circular' in found['arrow'] and 0.5 <= found['v7w vote']['agreement'] <= 1
    assert (tmp_path / 'out' / 'results' / 'v7w@ensemble.parquet').exists() and (
        tmp_path / 'out' / 'region_tasks.csv'
    ).exists()


def test_a_refusal_says_what_to_do(tmp_path):
    for name in ('vip-bench-meta-data.json', 'v7w-test.json', 'pointQA_twice_test.json'):
        (tmp_path / name).touch()
    assert (
        run_notebook('vip_bench', dict(data=str(tmp_path)), tmp_path / 'out', progress=False) != 0
    )
    assert (
        run_notebook('region_tasks', dict(data=str(tmp_path)), tmp_path / 'none', progress=False)
        != 0
    )
    assert 'model is empty' in json.dumps(Manifest(tmp_path / 'none').read())
    assert 'give either model=' in json.dumps(Manifest(tmp_path / 'out').read())


def test_a_caption_metric_that_cannot_run_is_refused_before_a_run_begins(saved, tmp_path):
    (tmp_path / 'refcocog-test.json').touch()
    params = dict(model=str(saved), data=str(tmp_path), sets=['refcocog'], metrics=['rouge'])
    assert run_notebook('region_tasks', params, tmp_path / 'out', progress=False) != 0
    said = Manifest(tmp_path / 'out').read()['reason']
    assert "caption metric 'rouge' is unknown" in said and 'missing' not in said


@pytest.mark.parametrize(
    'variant, asked',
    [
        (['kinds=arrow'], ' pointed to by the '),
        pytest.param(['regions=text'], ' at [ ', marks=pytest.mark.slow),
        pytest.param(None, ' the ', marks=pytest.mark.slow),
    ],
)
def test_evaluate_draws_the_regions_of_questions_as_training_did(variant, asked, tmp_path):
    "`variant`: of the run that trained the model; None: a folder that no run left."
    from vlmbench.data.world import WorldSize, write_world
    from vlmbench.methods.recipes import get_method
    from vlmbench.train.scale import get_scale

    sizes = dict.fromkeys(WorldSize.__dataclass_fields__, 0) | dict(region_train=4, region_test=4)
    world = write_world(tmp_path / 'world', sizes=WorldSize(**sizes))
    method, scale = get_method('vip_llava'), get_scale('tiny')
    state = method.start(method.recipe(scale), scale)
    for part in (state.model, state.processor):
        part.save_pretrained(tmp_path / 'run' / 'model')
    if variant is not None:
        said = dict(notebook='train', parameters=dict(recipe='vip_llava', variant=variant))
        (tmp_path / 'run' / 'manifest.json').write_text(json.dumps(said | dict(status='completed')))
    params = dict(
        model=str(tmp_path / 'run'),
        data=str(world),
        tasks=['region_test'],
        blind=False,
        device='cpu',
    )
    assert run_notebook('evaluate', params, tmp_path / 'out', progress=False) == 0
    rows = (
        (tmp_path / 'out' / 'results' / 'region_test.generations.jsonl')
        .read_text()
        .splitlines()[1:]
    )
    assert len(rows) == 4 and all(
        asked in json.loads(r)['prompt'] and '<region>' not in r for r in rows
    )


def test_rows_that_become_questions_when_drawn_have_a_majority_answer(tmp_path):
    from vlmbench.data.region_rows import DrawRegions
    from vlmbench.data.world import WorldSize, write_world
    from vlmbench.methods.recipes import get_method
    from vlmbench.evaluate.assess import assess, load_tasks
    from vlmbench.train.scale import get_scale

    sizes = dict.fromkeys(WorldSize.__dataclass_fields__, 0) | dict(region_train=4, region_test=4)
    world = write_world(tmp_path / 'world', sizes=WorldSize(**sizes))
    rows = json.loads((world / 'region_train.json').read_text())
    published = [
        dict(id=f'refcocog-{i}', image=r['image'], bboxes=[r['regions'][0]['box']], answer='a cup')
        for i, r in enumerate(rows)
    ]
    (world / 'region_train.json').write_text(json.dumps(published))
    method, scale = get_method('vip_llava'), get_scale('tiny')
    state = method.start(method.recipe(scale), scale)
    assess(
        state.model,
        state.processor,
        load_tasks(world, ['region_test']),
        world,
        tmp_path / 'out',
        blind=False,
        transform=DrawRegions(),
    )
    majority = Results.load(tmp_path / 'out' / 'results', 'region_test', 'majority')
    assert set(majority.frame['prediction']) == {'a cup'}


def test_any_method_learns_from_marked_rows_when_told_how(tmp_path):
    from vlmbench.data.region_rows import DrawRegions
    from vlmbench.data.world import WorldSize, write_world
    from vlmbench.methods.recipes import get_method, get_recipe
    from vlmbench.data.sources import DataError
    from vlmbench.train.recipe import RecipeError
    from vlmbench.train.scale import get_scale
    from vlmbench.train.stages import RunState, run_stages

    sizes = dict.fromkeys(WorldSize.__dataclass_fields__, 0) | dict(caption_train=4, region_train=8)
    world, scale = write_world(tmp_path / 'world', sizes=WorldSize(**sizes)), get_scale('tiny')
    settings = [
        'stages.instruct.data=region_train*1',
        'stages.instruct.steps=1',
        'stages.align.steps=1',
    ]

    def run(name, variant=()):
        method, plan = (
            get_method(name, variant),
            get_recipe(name, scale, overrides=settings, variant=variant),
        )
        return run_stages(
            method,
            method.start(plan, scale, device='cpu'),
            world,
            tmp_path / '-'.join([name, *variant]),
            progress_seconds=None,
        )

    with pytest.raises(
        DataError, match=r'region_train refer to <region>.*variant=\["regions=overlay"\]'
    ):
        run('llava')
    assert not (tmp_path / 'llava' / 'stages').exists()  # said before anything trains
    assert [r.step for r in run('llava', ['regions=overlay']).stages] == [1, 1]
    steps = get_method('eve', ['regions=none']).transform(RunState()).steps
    assert isinstance(steps[0], DrawRegions)
    with pytest.raises(RecipeError, match='changes its samples already'):
        get_method('zero', ['wrap=True', 'regions=text'])
    with pytest.raises(RecipeError, match='options are llm, regions'):
        get_method('llava', ['region=text'])
