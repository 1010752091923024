"""The claims notebook of zero and the visual region, end to end, with two arms on random models of
four layers."""

import json

import pandas as pd
import pytest

from test_runs import bases  # noqa: F401
from vlmbench.methods.recipes import find_scale, get_method, get_recipe
from vlmbench.run.engine import find_notebook, run_notebook
from vlmbench.run.manifest import Manifest
from vlmbench.run.parameters import load_notebook


@pytest.fixture(scope='module')
def deep(bases, tmp_path_factory):  # noqa: F811
    "A scale whose random language model has four layers."
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp('deep')
    model = AutoModelForCausalLM.from_pretrained(bases / 'llm')
    config = model.config
    config.num_hidden_layers, config.layer_types = 4, ['full_attention'] * 4
    type(model)(config).save_pretrained(folder / 'llm')
    AutoTokenizer.from_pretrained(bases / 'llm').save_pretrained(folder / 'llm')
    scale = json.loads((bases / 'mini.json').read_text()) | dict(llm=str(folder / 'llm'))
    (folder / 'deep.json').write_text(json.dumps(scale))
    return folder / 'deep.json'


def declared(scale, **given):
    "The notebook's names up to its claims, as its cells define them."
    cells = [
        ''.join(c['source'])
        for c in load_notebook(find_notebook('claims_depth'))['cells']
        if c['cell_type'] == 'code'
    ]
    names = dict(arms=[], seeds=3, prune=3, scale=scale) | given
    for source in cells:
        if source.startswith(
            ('import ', 'base_models = ', 'strategies = ', 'STAND_IN = ', 'ZERO_CLAIMS = ')
        ):
            exec(source, names)
    return names


def test_every_arm_is_a_recipe_at_the_controls_budget(deep):
    names = declared('tiny')
    arms = [*names['ZERO'], *names['REGION']]
    full = sum(s.budget_targets for s in get_recipe('llava', find_scale('tiny')).stages)
    plans = {
        a.name: get_recipe(a.recipe, find_scale('tiny'), a.budget, a.overrides, a.variant)
        for a in arms
    }
    assert len(plans) == len(arms) and len(names['wanted']) == len(arms) + 2 <= 25
    for name, plan in plans.items():
        assert sum(s.budget_targets for s in plan.stages) == pytest.approx(
            full, abs=len(plan.stages)
        ), name
    layers = {a.name: plans[a.name].stages[-1].trains['layers'].layers for a in names['REGION']}
    assert (
        all(len(layers[a]) == 2 for a in layers if not a.startswith('region_'))
        and len(layers['region_all']) == 8
    )
    assert {k: len(layers[a]) for k, a in names['sizes'].items()} == {1: 1, 2: 2, 4: 4, 8: 8}
    same = [a for a in layers if layers[a] == layers['uniform']]
    assert same == ['uniform']  # no other strategy is the same region
    kept = {
        a.name: plans[a.name].stage('adapt').trains['layers'].layers
        for a in names['ZERO']
        if a.recipe == 'zero'
    }
    assert (
        kept['graft'] == (4,)
        and kept['early'] == (0,)
        and kept['split_2'] == (2,)
        and kept['full_model'] is None
    )
    assert declared(str(deep))['first'] == 1  # a depth of its own


def test_every_claim_compares_arms_that_exist():
    names = declared('tiny')
    claims = [*names['ZERO_CLAIMS'], *names['REGION_CLAIMS'], *names['KEPT']]
    pruned = {
        f'{arm}_{how}_{k}'
        for arm, ways in (('uniform', ('outside', 'inside')), ('region_all', ('any',)))
        for how in ways
        for k in range(1, names['prune'] + 1)
    }
    assert {c.better for c in claims} | {c.worse for c in claims} <= set(names['known']) | pruned
    assert len({c.name for c in claims}) == len(claims)


@pytest.mark.slow
def test_two_arms_from_end_to_end(bases, deep, tmp_path):  # noqa: F811
    given = dict(
        arms=['uniform', 'region_all'],
        seeds=1,
        budget=0.004,
        scale=str(deep),
        data=str(bases / 'world'),
        device='cpu',
        prune=1,
        calibration=8,
    )
    assert run_notebook('claims_depth', given, tmp_path / 'c', progress=False) == 0
    table = pd.read_csv(tmp_path / 'c' / 'claims.csv')
    results = Manifest(tmp_path / 'c').read()['results']
    assert table['claim'].tolist() == [
        'region tuning makes 1 removable',
        'outside hurts less than inside, 1',
        'a quarter keeps the score of LoRA in all layers',
    ]
    assert (
        results['verdicts'] == dict(zip(table['claim'], table['verdict']))
        and 0 <= results['transition'] < 4
    )
    accuracy = pd.read_csv(tmp_path / 'c' / 'accuracy.csv')
    assert {
        'uniform',
        'region_all',
        'uniform_outside_1',
        'uniform_inside_1',
        'region_all_any_1',
    } == set(accuracy['method'])
    kept = table[table['paper'] == 'kept'].iloc[0]
    share = kept['better_score'] / kept['worse_score'] if kept['worse_score'] else None
    assert pd.isna(kept['share']) if share is None else kept['share'] == pytest.approx(share)
    costs = pd.read_csv(tmp_path / 'c' / 'retention.csv', index_col=0)
    assert (
        costs.loc['trained_millions', 'region'] < costs.loc['trained_millions', 'all_layers']
        and (costs.loc['rss_mb', ['region', 'all_layers']] > 0).all()
    )
    reading = (tmp_path / 'c' / 'reading.md').read_text()
    assert (
        'Of 3 claims' in reading
        and ('nothing right' if share is None else f'{100 * share:.1f}% kept') in reading
    )
    assert all(
        (tmp_path / 'c' / 'figures' / f'{n}.png').stat().st_size > 1000
        for n in ('claims_visual_region', 'split_sweep', 'region_size_and_pruning')
    )


def test_an_arm_that_does_not_exist_is_refused(bases, tmp_path):  # noqa: F811
    given = dict(arms=['everything'], data=str(bases / 'world'))
    assert run_notebook('claims_depth', given, tmp_path / 'c', progress=False, quiet=True) == 1
    assert "arms ['everything'] do not exist" in (tmp_path / 'c' / 'claims_depth.ipynb').read_text()


def test_variants_that_the_arms_name_reach_the_hooks():
    for a in declared('tiny')['ZERO']:
        if a.name == 'pair':
            assert get_method(a.recipe, a.variant).grafts is False


@pytest.mark.slow
def test_regions_chosen_by_measured_scores(bases, deep, tmp_path):  # noqa: F811
    given = dict(
        seeds=1,
        budget=0.004,
        scale=str(deep),
        data=str(bases / 'world'),
        device='cpu',
        calibration=8,
    )
    assert run_notebook('claims_importance', given, tmp_path / 'c', progress=False) == 0
    values, regions = (
        pd.read_csv(tmp_path / 'c' / f'{n}.csv', index_col=0) for n in ('importance', 'regions')
    )
    assert (
        values.notna().all(axis=None) and list(values) == list(regions.index) and len(values) == 4
    )
    for name, layers in regions['layers'].items():
        assert json.loads(layers) == [values[name].idxmax()]
    trained = {p.name for p in (tmp_path / 'c').glob('*-s0')}
    assert trained == {f'{arm}-s0' for arm in {'region_all', 'uniform', *regions['arm']}}
    table = pd.read_csv(tmp_path / 'c' / 'claims.csv')
    assert len(table) == regions['arm'].replace('uniform', None).dropna().nunique() + 1
    assert 'what the scores choose' in (tmp_path / 'c' / 'reading.md').read_text()
