"""The visual-region method on a VLM with packed, mixed batches: what trains, what is analysed, what
is pruned."""

import copy
import json

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig

from vlmbench.analysis.ablation import answer_loss, drop_one, gradient_scores
from vlmbench.analysis.importance import BlockInfluence, region
from vlmbench.analysis.streams import scores, stream
from vlmbench.analysis.suite import streaming_metrics
from vlmbench.analysis.weights import lora_update
from vlmbench.data.sources import published_rows
from vlmbench.methods.recipes import BUILT_IN, find_scale, get_method, get_recipe
from vlmbench.methods.visual_region import (
    PUBLISHED_REGIONS,
    VisualRegion,
    backward_depth,
    heal_stage,
)
from vlmbench.analysis.prune import prune_outside
from vlmbench.evaluate.retention import retention, retention_report, run_costs
from vlmbench.models.depth import (
    build_surrogate,
    causal_lm,
    depth_of,
    find_decoder,
    weights_hash,
    graft,
    prune,
)
from vlmbench.models.vision import backbone_dict
from vlmbench.models.vlm import VLMConfig, VLMForConditionalGeneration, module_groups
from vlmbench.train.prepare import lora_modules, merge_lora, prepare
from vlmbench.train.recipe import RecipeError, Stage, full, layers, lora
from vlmbench.train.scale import get_scale

IMG = 4
CLIP = CLIPVisionConfig(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=6,
    num_attention_heads=2,
    image_size=16,
    patch_size=8,
)


def vlm(depth=6, bidirectional=False):
    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=48,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=depth,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.3,
    )
    return VLMForConditionalGeneration(
        VLMConfig(
            text_config=text,
            vision_config=dict(type='encoder', backbone=backbone_dict(CLIP)),
            image_token_id=IMG,
            bidirectional_images=bidirectional,
        )
    ).eval()


def documents(seed=0):
    """Three documents: two images' worth of tokens in the first two, text in the last; the last
    three tokens are answers."""
    g = torch.Generator().manual_seed(seed)
    out = []
    for words, image in ((8, 0), (6, 1), (9, -1)):
        ids = torch.cat(
            [
                torch.tensor([1, *[IMG] * 4 * (image >= 0)]),
                torch.randint(5, 48, (words,), generator=g),
            ]
        )
        labels = torch.where(torch.arange(len(ids)) >= len(ids) - 3, ids, -100)
        out.append(
            dict(
                input_ids=ids,
                labels=labels,
                image_ids=torch.where(ids == IMG, image, -1),
                position_ids=torch.arange(len(ids)),
            )
        )
    return out, torch.randn(2, 3, 16, 16, generator=g)


def packed(seed=0):
    docs, pixels = documents(seed)
    batch = {k: torch.cat([d[k] for d in docs])[None] for k in docs[0]}
    ids = torch.cat([torch.full((len(d['input_ids']),), i) for i, d in enumerate(docs)])[None]
    return batch | dict(document_ids=ids, pixel_values=pixels)


def padded(seed=0):
    docs, pixels = documents(seed)
    pad = torch.nn.utils.rnn.pad_sequence
    fill = dict(input_ids=0, labels=-100, image_ids=-1, position_ids=0)
    batch = {k: pad([d[k] for d in docs], True, v) for k, v in fill.items()}
    return batch | dict(
        attention_mask=pad(
            [torch.ones(len(d['input_ids']), dtype=torch.long) for d in docs], True, 0
        ),
        pixel_values=pixels,
    )


@pytest.mark.parametrize('bidirectional', [False, True])
def test_packed_and_padded_batches_give_the_same_scores(bidirectional):
    model = vlm(bidirectional=bidirectional)
    key = ['metric', 'token_set', 'layer', 'span']
    a, b = (
        stream(model, [x], streaming_metrics()).frame.set_index(key) for x in (packed(), padded())
    )
    assert set(a.index) == set(b.index) and {'attention_image', 'block_influence_balanced'} <= set(
        a.reset_index().metric
    )
    np.testing.assert_allclose(a.value, b.value[a.index], atol=5e-5)
    np.testing.assert_array_equal(a.n, b.n[a.index])
    x, y = drop_one(model, [packed()]), drop_one(model, [padded()])
    np.testing.assert_allclose(x.frame.value, y.frame.value, atol=5e-5)
    assert x.base.n == 9


def test_packed_attention_stays_in_its_document():
    "The mass of all key segments of a query is 1, although other documents share the row."
    frame = stream(vlm(), [packed()], streaming_metrics()).frame
    total = sum(
        scores(frame, f'attention_mass_{s}', 'answer_predicting').values
        for s in ('system', 'image', 'instruction', 'answer')
    )
    np.testing.assert_allclose(total, 1, atol=1e-5)


def test_gradient_scores_of_samples_with_images():
    model = vlm()
    by_sample, by_batch = (
        gradient_scores(model, [padded()]),
        gradient_scores(model, [padded()], unit='batch'),
    )
    np.testing.assert_allclose(
        scores(by_sample, 'taylor', 'answer'), scores(by_batch, 'taylor', 'answer'), rtol=1e-4
    )
    with pytest.raises(ValueError, match='packs several documents'):
        gradient_scores(model, [packed()])


def test_a_pruned_vlm_reloads_and_generates_the_same(tmp_path):
    model, x = (
        vlm(),
        {k: v[:1] for k, v in padded().items() if k in ('input_ids', 'attention_mask')},
    )
    small, gone = prune_outside(model, [0, 4], 2, [padded()])
    small.save_pretrained(tmp_path)
    again = VLMForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert again.config.text_config.num_hidden_layers == 4 and not {0, 4} & set(gone)
    x['pixel_values'] = padded()['pixel_values'][:1]
    outs = [
        m.generate(**x, max_new_tokens=5, do_sample=False, use_cache=c)
        for m in (small, again)
        for c in (True, False)
    ]
    assert all(torch.equal(outs[0], o) for o in outs)
    want = pytest.approx(answer_loss(model, [padded()], skip=gone).value, abs=1e-5)
    assert answer_loss(again, [padded()]).value == want


def test_any_importance_ranks_the_layers():
    model, batches = vlm(), [padded()]
    bi = scores(stream(model, batches, [BlockInfluence(['all'])]).frame, 'block_influence')
    want = [i for i in bi.sort_values().index if i not in (0, 4)][:2]
    assert (
        prune_outside(model, [0, 4], 2, batches, token_set='all', importance='block_influence')[1]
        == want
    )
    assert prune_outside(model, [0, 4], 2, batches, importance=bi)[1] == want
    dropped = lambda m, b: scores(drop_one(m, b).frame, 'drop_one_delta', 'answer')
    small, gone = prune_outside(model, [0, 4], 3, batches, iterative=True, importance=dropped)
    left, loss = [i for i in range(6) if i not in (0, 4)], {}
    for step in range(3):  # greedy by hand: the removal that hurts least
        loss = {i: answer_loss(prune(model, [*gone[:step], i]), batches).value for i in left}
        assert gone[step] == min(loss, key=loss.get)
        left.remove(gone[step])
    assert depth_of(small).kept == tuple(i for i in range(6) if i not in gone)
    again, order = prune_outside(
        small, [0], 1, batches, iterative=True, importance=dropped
    )  # numbers are the given model's
    assert order[0] in (1, 2) and len(find_decoder(again)) == 2
    for kw, says in (
        (dict(importance='taylor'), 'expected one of'),
        (dict(importance=bi, iterative=True), 'measured again'),
        (dict(importance=bi[:3]), 'the decoder has 0..5'),
        (dict(importance=lambda m, b: bi[:2]), 'decoder of 6 layers'),
    ):
        with pytest.raises(ValueError, match=says):
            prune_outside(model, [0], 1, batches, **kw)


def test_healing_trains_what_it_says():
    plan = heal_stage(VisualRegion().recipe(get_scale('tiny')), 0.25)
    assert (
        plan.budget_targets
        == VisualRegion().recipe(get_scale('tiny')).stage('instruct').budget_targets // 4
        and plan.name == 'heal'
    )
    model, _ = prune_outside(vlm(), [0, 4], 2, [padded()])
    assert {n for n in prepare(model, plan, module_groups(model)).trainable} == {
        n for n, _ in model.named_parameters() if 'projector' in n
    }
    every = prepare(
        model,
        heal_stage(VisualRegion().recipe(get_scale('tiny')), 0.25, 'full'),
        module_groups(model),
    ).trainable
    assert any('language_model.layers.3.' in n for n in every) and not any(
        'tower' in n or 'embed' in n for n in every
    )
    with pytest.raises(RecipeError, match="'projector' or 'full'"):
        heal_stage(VisualRegion().recipe(get_scale('tiny')), tune='lora')


def test_retention_report_reads_two_runs(tmp_path):
    for name, score, seconds, n in (('region', 0.6, 2.0, 10), ('every', 0.8, 4.0, 40)):
        stage = tmp_path / name / 'stages' / 'instruct'
        stage.mkdir(parents=True)
        (tmp_path / name / 'manifest.json').write_text(
            json.dumps(dict(results=dict(vqa=dict(image=score, n=5), score=score)))
        )
        rows = [
            dict(step=i, event='step', step_s=seconds, memory_mb=dict(rss=100.0 + i))
            for i in (1, 2)
        ]
        (stage / 'metrics.jsonl').write_text('\n'.join(map(json.dumps, rows)) + '\n')
        (stage / 'freeze.csv').write_text(f'group,trainable\nlayers,{n}\nvision,0\n')
    t = retention_report(tmp_path / 'region', tmp_path / 'every')
    assert t.ratio['vqa'] == t.ratio['mean'] == pytest.approx(0.75) and t.ratio['seconds'] == 0.5
    assert t.region['trained_millions'] == pytest.approx(1e-5) and t.all_layers['rss_mb'] == 102
    (tmp_path / 'every' / 'manifest.json').write_text(
        json.dumps(dict(results=dict(other=dict(image=1.0))))
    )
    with pytest.raises(ValueError, match='no common task'):
        retention_report(tmp_path / 'region', tmp_path / 'every')
    with pytest.raises(FileNotFoundError, match="stage 'align'"):
        run_costs(tmp_path / 'region', 'align')


def test_surrogate_and_graft_of_a_vlm():
    model = vlm(8)
    before, head = weights_hash(model.model.language_model), weights_hash(model.lm_head)
    surrogate = build_surrogate(model, [range(3, 7)])
    with torch.no_grad():
        for p in (
            *surrogate.model.vision.parameters(),
            *surrogate.model.language_model.layers[3].parameters(),
        ):
            p.add_(0.1)
    report = graft(model, surrogate)
    assert all(n.startswith('model.vision.') for n in report.loaded) and not report.unchanged
    assert weights_hash(model.model.vision) == weights_hash(surrogate.model.vision)
    assert (weights_hash(model.model.language_model), weights_hash(model.lm_head)) == (before, head)
    assert causal_lm(surrogate).config.num_hidden_layers == 5


def test_region_training_moves_only_the_region_and_the_projector():
    model = vlm()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    stage = Stage(
        'instruct', dict(projector=full(1e-2), layers=lora(4, 8, (1, 4), lr=1e-2)), 'x', steps=1
    )
    plan = prepare(model, stage, module_groups(model))
    assert len(lora_modules(model)) == 2 * 7 and all(
        'language_model.layers.' in n for n in lora_modules(model)
    )
    opt = torch.optim.AdamW(plan.optimizer_groups())
    for _ in range(2):
        model(**packed()).loss.backward()
        opt.step()
        opt.zero_grad()
    up = scores(lora_update(model), 'lora_update', 'weights')
    assert (up[[1, 4]] > 0).all() and up.drop([1, 4]).eq(0).all()
    with pytest.raises(ValueError, match='merge the adapters first'):
        prune(model, [0])
    merge_lora(model)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved and all('projector' in n or '.layers.1.' in n or '.layers.4.' in n for n in moved)
    assert not any('tower' in n for n in moved)
    assert len(find_decoder(prune(model, [0]))) == 5


def test_back_propagation_stops_below_the_region():
    model = vlm()
    high = Stage('a', dict(layers=layers((3, 5), 1e-3)), 'x', steps=1)
    prepare(model, high, module_groups(model))
    assert backward_depth(model) == 3
    reached = [None] * 6
    for i, l in enumerate(find_decoder(model).layers):
        l.register_forward_hook(lambda m, a, out, i=i: reached.__setitem__(i, out.requires_grad))
    model(**packed()).loss.backward()
    assert reached == [False, False, False, True, True, True]
    model = vlm()
    prepare(
        model,
        Stage('a', dict(projector=full(1e-3), layers=layers((3, 5), 1e-3)), 'x', steps=1),
        module_groups(model),
    )
    assert backward_depth(model) == 0
    prepare(model, Stage('a', dict(lm_head=full(1e-3)), 'x', steps=1), module_groups(model))
    assert backward_depth(model) is None


def test_registered_with_the_controls_budget():
    assert (
        BUILT_IN['visual_region'] == 'vlmbench.methods.visual_region:VisualRegion'
        and get_method('visual_region') == VisualRegion()
    )
    for scale in ('tiny', 'small', 'paper'):
        ours, control = (
            get_recipe('visual_region', get_scale(scale)),
            get_recipe('llava', get_scale(scale)),
        )
        bounds = [(s.name, s.data, s.max_tokens, s.batch_rows) for s in control.stages]
        assert [(s.name, s.data, s.max_tokens, s.batch_rows) for s in ours.stages] == bounds
        if scale == 'paper':  # one published epoch in the second stage
            tune = ours.stage('instruct')
            assert (tune.epochs, tune.steps_in(published_rows(tune.data))) == (1, 5_197)
            assert (tune.save_every, tune.gradient_checkpointing) == (500, True)
        else:
            budgets = [s.budget_targets for s in control.stages]
            assert [s.budget_targets for s in ours.stages] == budgets
        assert ours.front_end == control.front_end and ours.stage('align') == control.stage('align')
        tune = ours.stage('instruct').trains['layers']
        want = region('sparse_uniform', 0.25, get_scale(scale).decoder_config.num_hidden_layers)
        assert tune.how == 'lora' and tune.layers == tuple(want)
    assert (
        get_recipe('visual_region', get_scale('paper')).stage('instruct').trains['layers'].layers
        == PUBLISHED_REGIONS['paper']
    )


@pytest.mark.parametrize(
    'kw,message',
    [
        (dict(where=[32]), 'layer 32 does not exist'),
        (dict(where='best'), 'unknown strategy'),
        (dict(share=33), 'k=33 layers'),
        (dict(tune='qlora'), "option 'tune' must be .*: choose one of lora, full"),
        (dict(train_projector='half'), "'train_projector' must be .*: choose one of full, frozen"),
        (dict(where=[1, 1]), 'listed twice'),
    ],
)
def test_bad_regions(kw, message):
    with pytest.raises(RecipeError, match=message):
        VisualRegion(**kw).recipe(get_scale('paper'))


def test_a_region_chosen_by_importance_becomes_a_recipe():
    model = vlm()
    bi = scores(stream(model, [packed()], [BlockInfluence(['all'])]).frame, 'block_influence')
    chosen = region(bi, 2)
    plan = prepare(
        copy.deepcopy(model),
        Stage('i', dict(layers=layers(chosen, 1e-3)), 'x', steps=1),
        module_groups(model),
    )
    assert {int(n.split('.layers.')[1].split('.')[0]) for n in plan.trainable} == set(chosen)
    tune = VisualRegion(where=chosen).recipe(get_scale('small')).stage('instruct')
    assert tune.trains['layers'].layers == tuple(chosen)


@pytest.mark.parametrize('suffix', ['csv', 'parquet'])
def test_a_table_of_scores_becomes_a_recipe(tmp_path, suffix):
    frame = stream(vlm(depth=8), [packed()], [BlockInfluence(['all', 'image'])]).frame
    path = tmp_path / f'scores.{suffix}'
    getattr(frame, dict(csv='to_csv', parquet='to_parquet')[suffix])(path, index=False)
    variant = [f'where={path}', 'metric=block_influence:image', 'share=3']
    stage = get_method('visual_region', variant).recipe(get_scale('tiny')).stage('instruct')
    assert list(stage.trains['layers'].layers) == region(
        scores(frame, 'block_influence', 'image'), 3
    )
    for metric, message in (
        ('', 'choose from .*block_influence:all'),
        ('taylor', "metric='taylor' names none"),
        ('block_influence', 'names 2 of its scores'),
    ):
        with pytest.raises(RecipeError, match=message):
            VisualRegion(where=str(path), metric=metric).recipe(get_scale('tiny'))
    with pytest.raises(RecipeError, match='the decoder has 32'):
        VisualRegion(where=str(path), metric='block_influence:all').recipe(get_scale('paper'))
    with pytest.raises(RecipeError, match='goes with a table'):
        VisualRegion(where='top', metric='taylor').recipe(get_scale('tiny'))
    pd.DataFrame(dict(a=[1])).to_csv(tmp_path / 'other.csv')
    with pytest.raises(RecipeError, match='no columns'):
        VisualRegion(where=str(tmp_path / 'other.csv'), metric='a').recipe(get_scale('tiny'))


@pytest.mark.parametrize(
    'name,layers_,size,projector,lora_,tokens',
    [
        ('bunny-llama-3-8b', 32, 8, 21.5, 83.9, 729),
        ('bunny-phi-3-mini', 32, 8, 13.0, 50.3, 729),
        ('llava-1.5-7b', 32, 8, 21.0, 80.0, 576),
        ('llava-1.5-13b', 40, 9, 31.5, 112.7, 576),
    ],
)
def test_the_papers_four_models_are_scales(name, layers_, size, projector, lora_, tokens):
    scale = find_scale(f'visual_region:{name}')
    recipe = get_recipe('visual_region', scale)
    align, tune = recipe.stages
    assert (
        find_scale(name) is scale
        and len(tune.trains['layers'].layers) == size
        and scale.decoder_config.num_hidden_layers == layers_
    )
    assert (align.lr, align.global_rows, tune.global_rows, tune.max_tokens) == (
        1e-3,
        256,
        128,
        2048,
    )
    assert (
        tune.lr_of('layers'),
        tune.lr_of('projector'),
        tune.trains['layers'].r,
        tune.trains['layers'].alpha,
    ) == (2e-4, 2e-5, 128, 256)
    model = scale.weightless(recipe)
    plan = prepare(model, tune, module_groups(model)).table().set_index('group')
    assert [round(plan.trainable[g] / 1e6, 1) for g in ('projector', 'layers')] == [
        projector,
        lora_,
    ]
    assert model.model.vision.num_tokens(scale.image_size, scale.image_size) == tokens


def test_retention_of_the_paper():
    t = retention(dict(a=61.82), dict(a=62.18))
    assert t.retention['a'] == t.retention['mean'] == pytest.approx(0.9942, abs=1e-4)
