"""The run notebooks, end to end, on random models of two layers: train, stop, resume, evaluate,
compare, bench."""

import json, signal, subprocess, sys, time
from pathlib import Path

import pytest

from mini_bases import write_bases
from vlmbench.evaluate.results import load_results
from vlmbench.run.bench import BenchRun, bench, reusable
from vlmbench.run.engine import find_notebook, run_notebook
from vlmbench.run.manifest import Manifest
from vlmbench.run.parameters import ParameterError, load_notebook, notebook_parameters

RUNS = Path(__file__).parents[1] / 'nbs' / 'runs'
SMALL = ','.join(
    f'stages.{s}.{k}'
    for s in ('align', 'instruct')
    for k in ('batch_rows=1', 'accumulation=1', 'max_tokens=256')
)
FEW = dict(
    precision='fp32',
    device='cpu',
    tasks=['vqa_test', 'text_test'],
    limit=6,
    batch_size=8,
    budget=0.004,
    overrides=SMALL.split(','),
)


@pytest.fixture(scope='session')
def bases(tmp_path_factory) -> Path:
    "A folder with a small world and a scale file that points at random base models."
    root = tmp_path_factory.mktemp('bases')
    rows = dict(caption_train=12, vqa_train=12, vqa_test=6, text_train=8, text_test=6)
    write_bases(root, 2, **rows)
    scale = dict(
        name='mini',
        llm=str(root / 'llm'),
        vision=str(root / 'vit'),
        image_size=64,
        template='world',
        like='tiny',
    )
    (root / 'mini.json').write_text(json.dumps(scale))
    return root


def params(bases: Path, **more) -> dict:
    return (
        FEW | dict(recipe='llava', scale=str(bases / 'mini.json'), data=str(bases / 'world')) | more
    )


def words(flag: str, values: dict) -> list[str]:
    "Parameters as words of papermill's command line; lists as text."
    return [
        w
        for k, v in values.items()
        for w in (flag, k, ','.join(v) if isinstance(v, list) else str(v))
    ]


@pytest.fixture(scope='session')
def benched(bases, tmp_path_factory) -> Path:
    "A bench of one method and one seed at a micro budget."
    out = tmp_path_factory.mktemp('bench') / 'b'
    settings = {k: v for k, v in params(bases).items() if k != 'recipe'}
    assert bench(['llava'], 1, out, echo=False, **settings) == 0, (
        out / 'llava-s0' / 'output.log'
    ).read_text()
    return out


@pytest.fixture(scope='session')
def trained(benched) -> Path:
    return benched / 'llava-s0'


@pytest.mark.parametrize('name', sorted(p.stem for p in RUNS.glob('*.ipynb')))
def test_every_run_notebook_declares_typed_parameters_with_help(name):
    nb = load_notebook(find_notebook(name))
    declared = notebook_parameters(nb, name)
    assert 'out' in declared and all(p.help for p in declared.values())
    assert nb['metadata']['kernelspec']['name'] == 'python3' and not any(
        c.get('outputs') for c in nb['cells']
    )
    assert not any('#| export' in ''.join(c['source']) for c in nb['cells'])


def test_train_leaves_a_complete_run_folder(trained):
    m = Manifest(trained).read()
    assert m['status'] == 'completed' and m['exit_code'] == 0 and m['seeds'] == dict(seed=0)
    assert [p['name'] for p in m['phases']] == [
        'data',
        'memory',
        'build',
        'before',
        'train',
        'export',
        'evaluate',
    ]
    assert 0 <= m['results']['score'] <= 1 and {'image', 'blind', 'majority'} <= set(
        m['results']['vqa_test']
    )
    assert m['results']['targets']['align'] >= 40 and m['quarantined'] == dict(align=0, instruct=0)
    assert m['data']['files']['vqa_test.json']
    for path in (
        'train.ipynb',
        'recipe.json',
        'stages/align/metrics.jsonl',
        'stages/instruct/freeze.csv',
        'model/model.safetensors',
    ):
        assert (trained / path).exists(), path
    assert not list(trained.glob('stages/*/checkpoints'))
    assert (trained / 'results' / 'vqa_test.head6@blind.parquet').exists()
    text = (trained / 'train.ipynb').read_text()
    assert 'image/png' in text and len(text) < 3_000_000


def test_evaluate_answers_as_train_did(trained, bases, tmp_path):
    "Given the run's folder; in tables it has the run's name."
    settings = dict(
        model=str(trained), data=str(bases / 'world'), limit=6, batch_size=3, device='cpu'
    )
    assert run_notebook('evaluate', settings, tmp_path / 'e', progress=False) == 0
    before, after = Manifest(trained).read()['results'], Manifest(tmp_path / 'e').read()
    assert (
        after['results']['vqa_test'] == before['vqa_test']
        and after['results']['score'] == before['score']
    )
    assert after['parameters']['recipe'] == 'llava-s0' and after['parameters']['model'] == str(
        trained
    )
    frame = load_results([tmp_path / 'e'])
    assert set(frame['method']) == {'llava-s0'} and not frame.attrs['not_recorded']


def test_bench_leaves_a_self_contained_report_and_can_be_resumed(
    benched, bases, capsys, monkeypatch
):
    page = (benched / 'report.html').read_text()
    assert 'llava' in page and 'src="http' not in page and list((benched / 'figures').glob('*.png'))
    assert (benched / 'compare' / 'accuracy.csv').read_text().count('\n') > 3
    old = Manifest(benched / 'llava-s0').read()
    started, same = (
        old['started'],
        BenchRun('llava', 0, benched / 'llava-s0', dict(recipe='llava', seed=0)),
    )
    monkeypatch.setattr('vlmbench.run.bench.code_state', lambda: dict(source_sha256='other code'))
    assert not reusable(same)
    monkeypatch.setattr('vlmbench.run.bench.code_state', lambda: old['code'])
    assert reusable(same)
    settings = {k: v for k, v in params(bases).items() if k != 'recipe'}
    assert bench(['llava'], 1, benched, resume=True, echo=False, **settings) == 0
    said = capsys.readouterr().out
    assert Manifest(benched / 'llava-s0').read()['started'] == started and 'kept' in said
    assert f'report: {(benched / "report.html").resolve()}' in said


@pytest.mark.usefixtures('real_kernels')
def test_a_stopped_training_goes_on_where_it_left(bases, tmp_path):
    out, values = tmp_path / 'r', params(bases, budget=0.04, evaluate=False)
    metrics = out / 'stages' / 'instruct' / 'metrics.jsonl'

    def steps() -> list[int]:
        rows = map(json.loads, metrics.read_text().splitlines()) if metrics.exists() else ()
        return [r['step'] for r in rows if r['event'] == 'step']

    command = [
        sys.executable,
        '-m',
        'papermill',
        '--engine',
        'vlmbench',
        '--no-progress-bar',
        str(find_notebook('train').resolve()),
    ]
    p = subprocess.Popen(
        [*command, str(out / 'train.ipynb'), *words('-r', values)],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        end = time.monotonic() + 300
        while not steps():
            assert p.poll() is None and time.monotonic() < end, Manifest(out).read()
            time.sleep(0.1)
        p.send_signal(signal.SIGTERM)
        p.communicate(timeout=120)
    finally:
        p.kill()
    first, before = Manifest(out).read(), steps()
    assert (
        p.returncode == 75
        and first['status'] == 'preempted'
        and first['phases'][-1]['outcome'] == 'preempted'
    )
    assert first['signals'] == ['SIGTERM'] and list(
        (out / 'stages' / 'instruct' / 'checkpoints').iterdir()
    )

    assert run_notebook('train', values, out, progress=False) == 0
    m = Manifest(out).read()
    assert m['status'] == 'completed' and [a['status'] for a in m['attempts']] == ['preempted']
    assert steps() == list(range(1, len(steps()) + 1)) and len(steps()) > len(before)


def test_plain_papermill_works_and_writes_a_manifest(bases, tmp_path):
    values = params(bases, evaluate=False, out=tmp_path / 'r')
    given = words('-p', {k: v for k, v in values.items() if not isinstance(v, list)}) + [
        '-y',
        f'overrides: {json.dumps(values["overrides"])}',
    ]
    command = [
        sys.executable,
        '-m',
        'papermill',
        '--no-progress-bar',
        str(find_notebook('train').resolve()),
        str(tmp_path / 'out.ipynb'),
    ]
    done = subprocess.run(
        [*command, *given], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (
        Manifest(tmp_path / 'r').read()['status'] == 'completed'
        and (tmp_path / 'r' / 'model' / 'config.json').exists()
    )


def test_a_recipe_that_does_not_exist_is_refused_with_its_reason(bases, tmp_path):
    with pytest.raises(ParameterError, match='recipes are llava'):
        run_notebook('train', params(bases, recipe='lava'), tmp_path / 'r')
    assert not (tmp_path / 'r').exists()
    with pytest.raises(ParameterError, match='must be'):
        run_notebook('train', params(bases, precision='fp8'), tmp_path / 'r2')


@pytest.mark.slow
def test_processes_that_read_ahead_change_nothing(bases, tmp_path):
    for workers in (0, 2):
        out = tmp_path / str(workers)
        given = params(bases, workers=workers, evaluate=False)
        assert run_notebook('train', given, out, progress=False) == 0
    weights = [(tmp_path / name / 'model' / 'model.safetensors').read_bytes() for name in '02']
    assert weights[0] == weights[1]
