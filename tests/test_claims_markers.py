"""The claims notebook of the markers end to end: two arms, a few steps, a few questions."""

import pandas as pd

import pytest

from vlmbench.data.world import WorldConfig, WorldSize, write_world
from vlmbench.run.engine import run_notebook
from vlmbench.run.manifest import Manifest


@pytest.mark.slow
def test_two_arms_at_a_micro_budget(tmp_path):
    world = write_world(
        tmp_path / 'world',
        WorldConfig(),
        WorldSize(
            caption_train=12,
            vqa_train=12,
            vqa_val=0,
            vqa_test=4,
            text_train=8,
            text_test=4,
            region_train=12,
            region_test=4,
            probe_train=0,
            probe_test=0,
        ),
    )
    values = dict(seeds=1, budget=0.002, arms=['vip_llava', 'none'], limit=4, data=str(world))
    out = tmp_path / 'claims'
    assert run_notebook('claims_markers', values, out, progress=False) == 0, (
        out / 'output.log'
    ).read_text()
    table = pd.read_csv(out / 'claims.csv')
    assert table['claim'].tolist() == ['markers are understood'] and table['n'].tolist() == [4]
    assert set(table['verdict']) <= {'holds', 'reversed', 'not shown'}
    scores = pd.read_csv(out / 'accuracy.csv')
    kinds = scores[scores['task'] == 'region_kinds']
    assert kinds.groupby('method').size().to_dict() == dict(vip_llava=9, none=9)
    assert set(scores[scores['task'] == 'region_alpha']['method']) == {'vip_llava'}
    assert all((out / 'figures' / f'{n}.png').exists() for n in ('claims', 'kinds', 'alpha'))
    assert 'markers are understood' in (out / 'reading.md').read_text()
    assert len(Manifest(out).read()['compared']) == 2
    assert Manifest(out).read()['results'] == dict(zip(table['claim'], table['verdict']))


def test_unknown_arms_are_named(tmp_path, capfd):
    assert run_notebook(
        'claims_markers', dict(arms=['vip_llava', 'vip']), tmp_path / 'c', progress=False
    )
    assert "arms ['vip'] are unknown" in (tmp_path / 'c' / 'output.log').read_text() + str(
        Manifest(tmp_path / 'c').read()
    )
