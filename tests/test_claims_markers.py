"""The claims notebook of the markers end to end: three arms, a few steps, a few questions."""

import pandas as pd

import pytest

from vlmbench.data.world import WorldConfig, WorldSize, write_world
from vlmbench.data.marker_style import MARKER_STYLES
from vlmbench.methods.recipes import get_method
from vlmbench.run.claims import Arm, Claim
from vlmbench.run.engine import find_notebook, run_notebook
from vlmbench.run.manifest import Manifest
from vlmbench.run.parameters import load_notebook


@pytest.mark.slow
def test_three_arms_at_a_micro_budget(tmp_path):
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
    arms = ['vip_llava', 'none', 'thin']
    values = dict(seeds=1, budget=0.002, arms=arms, limit=4, data=str(world))
    out = tmp_path / 'claims'
    assert run_notebook('claims_markers', values, out, progress=False) == 0, (
        out / 'output.log'
    ).read_text()
    table = pd.read_csv(out / 'claims.csv')
    shown = ['markers are understood', 'thin markers are understood', 'thin beats today']
    assert table['claim'].tolist() == shown and table['n'].tolist() == [4] * 3
    markers = {arm: Manifest(out / f'{arm}-s0').read().get('markers') for arm in arms}
    assert markers['none'] is None and markers['vip_llava']['look'] == 'published'
    assert (markers['thin']['look'], markers['thin']['stroke']) == ('thin', 1)
    assert set(table['verdict']) <= {'holds', 'reversed', 'not shown'}
    scores = pd.read_csv(out / 'accuracy.csv')
    kinds = scores[scores['task'] == 'region_kinds']
    assert kinds.groupby('method').size().to_dict() == dict(vip_llava=9, none=9)
    assert set(scores[scores['task'] == 'region_alpha']['method']) == {'vip_llava'}
    assert all((out / 'figures' / f'{n}.png').exists() for n in ('claims', 'kinds', 'alpha'))
    assert 'markers are understood' in (out / 'reading.md').read_text()
    assert len(Manifest(out).read()['compared']) == 3
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


def declared() -> tuple[dict[str, Arm], list[Claim]]:
    "The arms and claims that the notebook declares, without a run."
    names: dict = dict(arms=[])
    exec('from vlmbench.run.claims import Arm, Claim', names)
    exec('from vlmbench.data.overlay import MARKERS', names)
    exec('import pandas as pd; from vlmbench.run.parameters import ParameterError', names)
    for cell in load_notebook(find_notebook('claims_markers'))['cells']:
        source = ''.join(cell['source'])
        if cell['cell_type'] == 'code' and ('ARMS = [' in source or 'CLAIMS = [' in source):
            exec(source, names)
    return {arm.name: arm for arm in names['ARMS']}, names['CLAIMS']


def test_each_look_differs_from_thin_in_the_one_setting_it_is_named_for():
    arms, claims = declared()
    thin = vars(MARKER_STYLES['thin'])
    put_back = dict(thin_wide='stroke', thin_close='gap', thin_colors='palette', thin_faint='alpha')
    for name, setting in put_back.items():
        look = vars(get_method('vip_llava', arms[name].variant).look())
        assert [key for key in look if look[key] != thin[key]] == [setting]
        assert [c.worse for c in claims if name in (c.better, c.worse)] == [name]
    assert get_method('vip_llava', arms['thin_met'].variant).encoder == 'full'
    two = get_method('vip_llava', arms['two_kinds'].variant).look()
    assert two.kinds == ('rectangle', 'ellipse') and two.stroke is None


def test_todays_arms_are_drawn_as_before_and_every_claim_names_arms():
    arms, claims = declared()
    for name in ('vip_llava', 'last', 'half'):
        method = get_method(arms[name].recipe, arms[name].variant)
        before = [text for text in arms[name].variant if text != 'marker_style=published']
        plain = get_method(arms[name].recipe, before)
        assert method.transform(None).steps[0] == plain.transform(None).steps[0]
    assert {arm for c in claims for arm in (c.better, c.worse)} <= set(arms)
    assert len({c.name for c in claims}) == len(claims) == 15
