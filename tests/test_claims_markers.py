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


@pytest.mark.slow
def test_an_arm_that_fails_is_named_and_the_others_make_a_table(tmp_path, capfd):
    """A folder in the way of one arm: the tables are written without it, the run fails and says
    which; run again with the same `out` it trains that arm alone."""
    sizes = dict.fromkeys(WorldSize.__dataclass_fields__, 0)
    sizes |= dict(caption_train=12, vqa_train=12, vqa_test=4, text_train=8, text_test=4)
    sizes |= dict(region_train=12, region_test=4)
    world = write_world(tmp_path / 'world', WorldConfig(), WorldSize(**sizes))
    arms = ['vip_llava', 'none', 'text']
    values = dict(seeds=1, budget=0.002, arms=arms, limit=4, data=str(world))
    out = tmp_path / 'claims'
    (out / 'text-s0').mkdir(parents=True)
    (out / 'text-s0' / 'stages').write_text('no folder')
    assert run_notebook('claims_markers', values, out, progress=False) == 1
    said = capfd.readouterr()
    assert '1 of 3 runs failed' in said.out + said.err and 'text-s0' in said.out + said.err
    table = pd.read_csv(out / 'claims.csv')
    assert table['claim'].tolist() == ['markers are understood']
    assert (out / 'reading.md').exists() and (out / 'accuracy.csv').exists()
    assert Manifest(out).read()['status'] == 'failed'
    assert len(Manifest(out).read()['compared']) == 2
    kept = Manifest(out / 'none-s0').read()['started']
    (out / 'text-s0' / 'stages').unlink()
    assert run_notebook('claims_markers', values, out, progress=False) == 0
    table = pd.read_csv(out / 'claims.csv')
    assert table['claim'].tolist() == ['markers are understood', 'markers beat coordinates']
    assert Manifest(out / 'none-s0').read()['started'] == kept
