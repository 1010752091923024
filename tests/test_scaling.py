"""`vlmbench run scaling`: the row's command at its smallest, what each point saw, what is refused
before anything trains."""

import json
import os
import subprocess
import sys

import pandas as pd
import pytest

from vlmbench.run.engine import run_notebook
from vlmbench.evaluate.exposure import seen_before
from vlmbench.run.manifest import Manifest


def vlmbench(folder, *words):
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    line = [sys.executable, '-m', 'vlmbench', 'run', 'scaling', *words]
    env = os.environ | dict(PYTHONPATH=root)
    return subprocess.run(line, cwd=folder, env=env, capture_output=True, text=True, timeout=100)


@pytest.mark.parametrize(
    'words, told',
    [
        (('factors=1',), 'two or more positive factors'),
        (('task=vqa_tset',), 'did you mean vqa_test?'),
    ],
)
def test_what_is_no_curve_is_refused_before_the_kernel(words, told, tmp_path):
    done = vlmbench(tmp_path, *words, 'out=made')
    assert done.returncode == 2 and told in done.stderr, done.stderr
    assert 'Traceback' not in done.stderr and not (tmp_path / 'made').exists()


@pytest.mark.slow
def test_two_recipes_two_budgets_two_seeds(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = dict(recipes='llava,eve', factors='.01,.04', seeds='2', draws='40', jobs='2')
    assert run_notebook('scaling', given, tmp_path / 'out', progress=False) == 0
    out = tmp_path / 'out'
    table = pd.read_csv(out / 'scaling.csv')
    assert {*table.columns} >= {
        *('recipe', 'seed', 'factor', 'steps', 'target_tokens', 'stage_pictures', 'base_pictures'),
        *('total_pictures', 'total_tokens', 'flops', 'score', 'low', 'high'),
    }
    assert len(table) == 8 and table.groupby(['recipe', 'factor']).size().eq(2).all()
    sees, free = (table[table['recipe'] == name] for name in ('llava', 'eve'))
    before = seen_before('asset:vit').pictures
    assert sees['base_pictures'].eq(before).all() and free['base_pictures'].eq(0).all()
    assert free['teacher_pictures'].eq(before).all()
    whole = table['stage_pictures'] + table['base_pictures']
    assert whole.eq(table['total_pictures']).all() and (table['flops'] > 1e9).all()
    assert table['score'].between(table['low'], table['high']).all()
    for row in table.itertuples():
        name = f'{row.recipe}_x{row.factor:g}-s{row.seed}'
        scores = json.loads((out / name / 'results' / 'vqa_test.json').read_text())
        assert scores['accuracy'] == pytest.approx(row.score)
    laws = pd.read_csv(out / 'laws.csv')
    assert laws.query("axis == 'total_pictures'").set_index('recipe')['law'].to_dict() == dict(
        llava='level', eve='fitted'
    )
    meets = pd.read_csv(out / 'meetings.csv')
    assert meets['axis'].tolist() == ['target_tokens', 'total_pictures']
    assert (out / 'figures' / 'scaling.png').stat().st_size > 10_000
    assert 'extrapolation' in (out / 'reading.md').read_text()
    manifest = Manifest(out).read()
    assert manifest['status'] == 'completed' and len(manifest['compared']) == 8
