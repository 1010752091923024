"""Recipes are data (round trips, overrides, clear refusals); prepare freezes, adapts and groups
parameters of a VLM by full name."""

import dataclasses
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from train_stubs import run, tiny_vlm
from vlmbench.models.vlm import GROUPS as MODEL_GROUPS
from vlmbench.models.vlm import module_groups
from vlmbench.train.prepare import layer_index, lora_modules, merge_lora, prepare
from vlmbench.train.recipe import (
    GROUPS,
    Recipe,
    RecipeError,
    Stage,
    Tune,
    frozen,
    full,
    layers,
    lora,
    override,
)
from vlmbench.train.scale import SCALES, Scale

rates = st.none() | st.floats(1e-6, 1.0)
blocks = st.integers(1, 40) | st.sets(st.integers(0, 40), min_size=1, max_size=5).map(tuple)
tunes = (
    st.just(frozen())
    | st.builds(full, rates)
    | st.builds(layers, blocks, rates)
    | st.builds(
        lora,
        st.integers(1, 64),
        st.floats(0.5, 64),
        st.none() | blocks,
        st.floats(0, 0.9),
        rates,
        st.none() | st.just(('q_proj', 'v_proj')),
    )
)
stages = st.builds(
    Stage,
    st.text('abc_-1', min_size=1, max_size=5),
    st.dictionaries(st.sampled_from(GROUPS), tunes),
    st.text(min_size=1),
    st.floats(1e-6, 1.0),
    st.integers(1, 10**9),
    schedule=st.sampled_from(['cosine', 'linear', 'constant']),
    warmup_ratio=st.floats(0, 1),
    losses=st.lists(
        st.tuples(st.text(min_size=1), st.floats(0, 9)), max_size=3, unique_by=lambda x: x[0]
    ),
    packing=st.booleans(),
)


@settings(max_examples=100, deadline=None)
@given(st.lists(stages, min_size=1, max_size=3, unique_by=lambda s: s.name), st.booleans())
def test_recipes_survive_json(parts, both_ways):
    r = Recipe('r', tuple(parts), dict(type='encoder', select_layers=[-2]), 'section 3', both_ways)
    assert Recipe.from_dict(json.loads(json.dumps(r.to_dict()))) == r
    assert (
        override(r, {}) == r
        and override(r, {f'stages.{parts[0].name}.clip': 0.5}).stages[0].clip == 0.5
    )


def test_the_groups_are_the_models_groups():
    assert GROUPS == MODEL_GROUPS == tuple(module_groups(tiny_vlm()))


@pytest.mark.parametrize(
    'make, message',
    [
        (lambda: lora(0, 8), 'lora r must be at least 1'),
        (lambda: lora(True, 8), 'lora r must be an integer'),
        (lambda: lora(4, 0), 'lora alpha must be above 0'),
        (lambda: lora(4, 8, dropout=1.5), 'at most 1'),
        (lambda: layers(0), 'at least 1'),
        (lambda: layers((1, 1)), 'repeats a block'),
        (lambda: layers((-1,)), 'at least 0'),
        (lambda: full(float('nan')), 'finite number'),
        (lambda: Tune('frozen', lr=1e-3), 'a frozen group takes no lr'),
        (lambda: Tune('full', r=4), 'go with lora'),
        (lambda: Tune('half'), 'must be one of'),
        (lambda: Tune('lora', r=4), 'needs r and alpha'),
        (lambda: Stage('s', dict(layers=4), data='x', steps=1), 'must be frozen'),
        (lambda: Stage('s', dict(layers='ful'), data='x', steps=1), 'must be one of'),
        (
            lambda: Stage('s', dict(layers=full(1e-3)), data='x', steps=1, budget_targets=1),
            'exactly one',
        ),
        (
            lambda: Stage('s', dict(layers=full(1e-3)), data='x', steps=1, packing=1),
            'true or false',
        ),
        (lambda: Stage('s', dict(layers=full(1e-3)), data='x', steps=1.5), 'an integer'),
        (
            lambda: Stage('s', dict(layers=full(1e-3)), data='x', steps=1, schedule='cos'),
            'schedule must be one of',
        ),
        (lambda: Stage('s', {}, data='x', steps=1, losses=['a', 'a']), 'repeat a name'),
        (lambda: Recipe('r', ()), 'no stages'),
        (lambda: Recipe('r', (Stage('s', {}, data='x', steps=1),) * 2), 'repeats a stage name'),
        (lambda: Stage.from_dict(dict(name='s', trains={})), "needs ['data']"),
    ],
)
def test_wrong_settings_name_themselves(make, message):
    with pytest.raises(RecipeError) as e:
        make()
    assert message in str(e.value)


def test_dataclasses_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        full(1e-3).lr = 1.0
    with pytest.raises(dataclasses.FrozenInstanceError):
        SCALES['tiny'].llm = 'x'


def plan_of(model=None, **trains):
    return prepare(
        model or tiny_vlm(), Stage('s', trains, data='x', lr=1e-3, weight_decay=0.1, steps=1)
    )


def test_lora_on_a_block_number_stays_out_of_the_vision_tower():
    "The tower has blocks 0 and 1 with a q_proj too: only the language model's block 1 is adapted."
    model = tiny_vlm()
    plan_of(model, layers=lora(2, 4, layers=(1,), modules=('q_proj',)))
    assert list(lora_modules(model)) == ['model.language_model.layers.1.self_attn.q_proj']


def test_groups_take_their_own_rank_dropout_and_rate():
    model = tiny_vlm()
    plan = plan_of(
        model,
        vision=lora(2, 2, lr=1e-5),
        layers=lora(4, 8, dropout=0.1, layers=2),
        projector=full(5e-3),
    )
    found = lora_modules(model)
    assert {m.r[a] for n, m in found.items() for a in m.lora_A if 'vision' in n} == {2}
    assert {layer_index(n) for n in found if 'language_model' in n} == {0, 1} and all(
        m.active_adapters == list(m.lora_A) for m in found.values()
    )
    assert {g['name']: g['lr'] for g in plan.optimizer_groups()} == {
        'vision.decay': 1e-5,
        'layers.decay': 1e-3,
        'projector.decay': 5e-3,
        'projector.no_decay': 5e-3,
    }
    t = plan.table().set_index('group')
    assert t.trainable['embed'] == 0 and t.share['projector'] == 1 and t.blocks['layers'] == '0-1'
    assert t.tune['vision'] == 'lora(r=2, alpha=2)'
    assert t.trainable.sum() == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_lora_factors_depend_on_the_seed_alone():
    a, b = (
        prepare(
            tiny_vlm(), Stage('s', dict(layers=lora(2, 4)), data='x', lr=1.0, steps=1), seed=3
        ).trainable
        for _ in range(2)
    )
    torch.rand(3)
    c = prepare(
        tiny_vlm(), Stage('s', dict(layers=lora(2, 4)), data='x', lr=1.0, steps=1), seed=4
    ).trainable
    name = next(n for n in a if 'lora_A' in n)
    assert all(torch.equal(a[n], b[n]) for n in a) and not torch.equal(a[name], c[name])
    model = tiny_vlm()
    state = torch.get_rng_state()
    plan_of(model, layers=lora(2, 4))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize('variant', ['lora', 'frozen', 'blocks'])
def test_what_is_frozen_does_not_move(tmp_path, variant):
    before = dict(tiny_vlm(0.1).named_parameters())
    model, result = run(tmp_path, variant, steps=3, stage=None)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    expected = {
        'frozen': lambda n: 'projector' in n,
        'blocks': lambda n: 'projector' in n or 'language_model.layers.1.' in n,
        'lora': lambda n: (
            'projector' in n
            or any(f'language_model.layers.{i}.' in n for i in (0, 2))
            and 'norm' not in n
        ),
    }[variant]
    assert moved == {n for n in before if expected(n)}


def test_tied_head_and_unmerged_lora_are_refused():
    with pytest.raises(RecipeError, match='tied to the embedding: train embed instead'):
        plan_of(tiny_vlm(tie=True), lm_head=full())
    model = tiny_vlm()
    plan_of(model, layers=lora(2, 4))
    with pytest.raises(RecipeError, match='still carries LoRA of an earlier stage'):
        plan_of(model, projector=full())
    assert merge_lora(model) == 21 and plan_of(model, projector=full()).trainable


def test_a_refused_stage_changes_nothing():
    model = tiny_vlm()
    names, grads = (
        [n for n, _ in model.named_parameters()],
        [p.requires_grad for p in model.parameters()],
    )
    with pytest.raises(RecipeError, match='blocks \\[9\\] do not exist'):
        plan_of(model, vision=lora(2, 2), layers=layers((0, 9)))
    assert names == [n for n, _ in model.named_parameters()] and grads == [
        p.requires_grad for p in model.parameters()
    ]


def test_norms_biases_and_embeddings_are_not_decayed():
    plan = plan_of(projector=full(), embed=full(), layers=full(), norm=full())
    decayed = {n for g in plan.optimizer_groups() if g['weight_decay'] for n in g['param_names']}
    assert decayed and not any('norm' in n or n.endswith('bias') or 'embed' in n for n in decayed)
    wanted = prepare(
        tiny_vlm(),
        Stage(
            's',
            dict(embed=full()),
            data='x',
            lr=1.0,
            weight_decay=0.1,
            steps=1,
            decay_embeddings=True,
        ),
    ).optimizer_groups()
    assert wanted[0]['weight_decay'] == 0.1


@pytest.mark.parametrize('name', ['small', 'paper'])
def test_published_shapes_build_from_their_configs(name):
    from transformers import AutoConfig

    scale: Scale = SCALES[name]
    for config in (scale.llm_config, scale.vision_config):
        c = dict(config)
        kind = c.pop('model_type')
        built = AutoConfig.for_model(kind, **c)
        assert all(getattr(built, k) == v for k, v in c.items() if k not in ('rope_theta',)), kind


def test_the_global_batch_is_the_same_on_any_number_of_ranks():
    stage = Stage('s', dict(layers=full()), 'x', lr=1.0, steps=1, batch_rows=16, global_rows=512)
    for ranks in (1, 2, 8, 32):
        on = stage.over(ranks)
        assert (
            on.batch_rows * on.accumulation * ranks == 512 == on.step_rows and on.over(ranks) == on
        )
    plain = dataclasses.replace(stage, global_rows=None, accumulation=3)
    assert plain.over(1) == plain and plain.step_rows == 48
    on = [plain.over(ranks) for ranks in (3, 6, 24)]  # smaller micro-batches where they must be
    assert [(s.batch_rows, s.accumulation) for s in on] == [(16, 1), (8, 1), (2, 1)]
    for one, ranks, fitting in ((stage, 3, '1, 2, 4, 8, 16'), (plain, 5, '1, 2, 3, 4, 6, 8')):
        with pytest.raises(
            RecipeError,
            match=f'a step has {one.step_rows} rows, .* share them evenly: use {fitting}',
        ):
            one.over(ranks)
    micro = dataclasses.replace(plain, reduction='micro')
    with pytest.raises(RecipeError, match='a mean of micro-batches of 16 rows .*: use 1, 3 ranks'):
        micro.over(2)
    assert dataclasses.replace(stage, batch_rows=8).over(64).accumulation == 1
    recipe = Recipe('r', (stage,))
    assert recipe.table()['rows'].tolist() == [512] and Recipe.from_dict(recipe.to_dict()) == recipe
    changed = override(recipe, {'stages.s.accumulation': 2}).stage(
        's'
    )  # a choice of its own takes its place
    assert (changed.global_rows, changed.accumulation) == (None, 2)
    assert override(recipe, {'stages.s.batch_rows': 8}).stage('s').global_rows == 512


def test_every_published_recipe_states_its_global_batch():
    from vlmbench.methods.recipes import find_scale, get_recipe

    published = dict(
        llava=('paper', [256, 128]),
        vip_llava=('paper', [256, 128, 128]),
        vora=('vora_paper', [256, 128]),
        eve=('paper', [512, 512, 128]),
        visual_region=('paper', [256, 128]),
        zero=('llama-3.1-8b', [256, 128]),
    )
    for name, (scale, rows) in published.items():
        recipe = get_recipe(name, find_scale(scale))
        assert [s.global_rows for s in recipe.stages] == rows, name
        assert {(s.packing, s.too_long == 'error') for s in recipe.stages} == {(False, False)}, (
            name
        )  # a row is a sample
        for s in recipe.stages:
            assert s.over(8).accumulation * s.batch_rows * 8 == s.global_rows, name
        for s in get_recipe(name, find_scale('tiny')).stages:
            assert s.global_rows == s.batch_rows, name  # the same on any number of ranks


def test_groups_of_like_length_are_one_global_batch():
    from vlmbench.data.record import Sample, Turn
    from vlmbench.data.sources import grouped_order

    samples = [
        Sample(str(i), [Turn('user', 'a ' * (i + 1)), Turn('assistant', 'b')]) for i in range(24)
    ]
    stage = Stage(
        's',
        dict(layers=full()),
        'x',
        lr=1.0,
        steps=1,
        batch_rows=2,
        packing=False,
        grouping='modality',
    )

    def group(stage):
        return grouped_order(samples, stage.grouping, stage.step_rows).group

    assert group(stage) == 2 and group(dataclasses.replace(stage, accumulation=3)) == 6
    assert group(dataclasses.replace(stage, global_rows=12)) == 12
