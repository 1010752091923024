"The claims notebook of EVE and VoRA, end to end, with two arms on random models of two layers."

import json
import re
from pathlib import Path

import pandas as pd
import pytest

from test_runs import bases  # noqa: F401
from vlmbench.methods.recipes import get_method, get_recipe
from vlmbench.run.engine import find_notebook, run_notebook
from vlmbench.run.manifest import Manifest
from vlmbench.run.parameters import load_notebook
from vlmbench.train.scale import get_scale


def declared():
    "ARMS, CURVES and CLAIMS of the notebook."
    from vlmbench.run.claims import Arm, Claim

    names, cells = (
        dict(Arm=Arm, Claim=Claim, arms=[], pd=pd),
        load_notebook(find_notebook('claims_encoder_free'))['cells'],
    )
    for c in cells:
        source = ''.join(c['source'])
        if source.startswith(('ARMS =', 'CLAIMS =')):
            exec(source, names)
    return names['ARMS'], names['CURVES'], names['CLAIMS']


def test_every_arm_is_a_recipe_at_the_controls_budget():
    arms, curves, claims = declared()
    by_name = {a.name: a for a in arms}
    assert (
        len(by_name) == len(arms)
        and {c.name for c in claims}
        and len({c.name for c in claims}) == len(claims)
    )
    assert {c.better for c in claims} | {c.worse for c in claims} <= set(by_name)
    assert {a for at in curves.values() for a in at.values()} <= set(by_name)
    full = sum(s.budget_targets for s in get_recipe('llava', get_scale('tiny')).stages)
    for a in arms:
        get_method(a.recipe, a.variant)
        plan = get_recipe(a.recipe, get_scale('tiny'), a.budget, a.overrides, a.variant)
        assert sum(s.budget_targets for s in plan.stages) == pytest.approx(
            a.budget * full, abs=len(plan.stages)
        ), a.name
    for at in curves.values():
        for share, arm in at.items():
            assert by_name[arm].budget == share


@pytest.fixture
def deeper(bases, tmp_path):  # noqa: F811
    "A scale whose language model has one block more than the teacher."
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(bases / 'llm')
    config = model.config
    config.num_hidden_layers, config.layer_types = 3, ['full_attention'] * 3
    type(model)(config).save_pretrained(tmp_path / 'llm')
    AutoTokenizer.from_pretrained(bases / 'llm').save_pretrained(tmp_path / 'llm')
    scale = json.loads((bases / 'mini.json').read_text()) | dict(llm=str(tmp_path / 'llm'))
    (tmp_path / 'deeper.json').write_text(json.dumps(scale))
    return tmp_path / 'deeper.json'


@pytest.mark.slow
def test_two_arms_from_end_to_end(bases, deeper, tmp_path):  # noqa: F811
    given = dict(
        arms=['vora', 'vora_no_distill'],
        seeds=1,
        budget=0.004,
        scale=str(deeper),
        data=str(bases / 'world'),
        device='cpu',
    )
    assert run_notebook('claims_encoder_free', given, tmp_path / 'c', progress=False) == 0
    results = Manifest(tmp_path / 'c').read()['results']
    table = pd.read_csv(tmp_path / 'c' / 'claims.csv')
    assert table['claim'].tolist() == ['vora_distillation'] and table['seeds'].tolist() == [1]
    assert results['verdicts'] == dict(zip(table['claim'], table['verdict']))
    assert table['difference'][0] == pytest.approx(
        table['better_score'][0] - table['worse_score'][0]
    )
    stage = lambda arm: json.loads((tmp_path / 'c' / f'{arm}-s0' / 'recipe.json').read_text())[
        'stages'
    ][0]
    assert stage('vora')['losses'] and not stage('vora_no_distill')['losses']
    reading = (tmp_path / 'c' / 'reading.md').read_text()
    assert table['verdict'][0] in ('holds', 'reversed', 'not shown') and 'Of 1 claims' in reading
    assert (
        f'{100 * table["better_score"][0]:.1f}%' in reading
        and '**beside chance**' in reading
        and 'until the final loss of no distillation' in reading
    )
    assert (tmp_path / 'c' / 'accuracy.csv').exists() and (
        tmp_path / 'c' / 'figures' / 'claims.png'
    ).stat().st_size > 1000


def test_no_mean_over_the_seeds_that_happen_to_reach_a_loss():
    from vlmbench.run.claims import read_reach

    assert (
        read_reach(pd.Series([0.62, float('nan'), float('nan')])) == 'not reached in 2 of 3 seeds'
    )
    assert read_reach([0.8, 0.84, 0.88]) == '84% of its tokens, the mean of 3 seeds'


def test_the_stored_reading_follows_from_its_tables():
    "The majority answer stands beside the scores, no mean of some seeds only."
    from vlmbench.run.claims import read_claims, read_floor

    store = Path(__file__).resolve().parents[1] / 'figures' / 'claims_encoder_free'
    reading, accuracy = (store / 'README.md').read_text(), pd.read_csv(store / 'accuracy.csv')
    said = read_floor(accuracy, 'vqa_test')
    assert (
        said in reading and 'vora_quarter 31.1%' in said and 'majority answer scores 30.4%' in said
    )
    assert (
        read_claims(pd.read_csv(store / 'claims.csv')) in reading
        and ' of 3 seeds, the mean' not in reading
    )
    assert not re.search(r'the mean of \d of \d seeds', reading)


def test_an_arm_that_does_not_exist_is_refused(bases, tmp_path):  # noqa: F811
    assert (
        run_notebook(
            'claims_encoder_free',
            dict(arms=['fuyu'], data=str(bases / 'world')),
            tmp_path / 'c',
            progress=False,
            quiet=True,
        )
        == 1
    )
    assert (
        "arms ['fuyu'] do not exist" in (tmp_path / 'c' / 'claims_encoder_free.ipynb').read_text()
    )
