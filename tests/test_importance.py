"""Layer scores, their rankings, regions, ablations and weight changes."""

import copy

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from depth_models import FAMILIES, batch, decoder, llava, qwen3_vl, rows
from vlmbench.analysis.ablation import (
    GRADIENT,
    NotLayerwise,
    answer_loss,
    drop_one,
    gradient_scores,
    greedy_drop,
    revert_one,
    split_samples,
)
from vlmbench.analysis.importance import (
    STRATEGIES,
    AngularDistance,
    BlockInfluence,
    agreement,
    best_block,
    iterative_prune_order,
    plot_scores,
    prune_order,
    region,
    region_size,
    sparse_uniform,
    stability,
    top_k_overlap,
)
from vlmbench.analysis.streams import residual_states, scores, stream
from vlmbench.analysis.weights import (
    check_same_base,
    layer_weights,
    lora_norm,
    lora_update,
    parameter_change,
)
from vlmbench.data.world import asset_path
from vlmbench.models.depth import prune
from vlmbench.models.vlm import build_vlm

DATA = [batch(), batch((8, 10), seed=1)]


# -------------------------------------------------------------------------------- streaming scores
@pytest.mark.parametrize('family', FAMILIES)
def test_block_influence_and_angles_by_definition(family):
    model, x = FAMILIES[family](), batch()
    frame = stream(model, [x], [BlockInfluence(), AngularDistance()]).frame
    with torch.no_grad():
        h = torch.stack(residual_states(model, x)[0]).double()
    valid, image = x['attention_mask'].bool(), x['image_mask']
    cos = torch.cosine_similarity(h[:-1], h[1:], dim=-1)
    np.testing.assert_allclose(
        scores(frame, 'block_influence'), 1 - cos[:, valid].mean(1), atol=1e-9
    )
    np.testing.assert_allclose(
        scores(frame, 'block_influence', 'image'), 1 - cos[:, image].mean(1), atol=1e-9
    )
    rowwise = torch.stack([cos[:, b, valid[b]].mean(1) for b in range(3)], 1).mean(1)
    np.testing.assert_allclose(scores(frame, 'block_influence_per_sample'), 1 - rowwise, atol=1e-9)
    both = (cos[:, image].mean(1) + cos[:, valid & ~image].mean(1)) / 2
    np.testing.assert_allclose(
        scores(frame, 'block_influence_balanced', 'image+text'), 1 - both, atol=1e-9
    )
    last = valid.sum(1) - 1
    for n in (1, 3):
        c = torch.cosine_similarity(h[:-n, range(3), last], h[n:, range(3), last], dim=-1).clamp(
            -1, 1
        )
        np.testing.assert_allclose(
            scores(frame, 'angular_activation', 'last', n),
            (c.arccos() / torch.pi).mean(1),
            atol=1e-7,
        )
        assert best_block(frame, n) == int((c.arccos()).mean(1).argmin())


def test_identical_states_have_distance_zero():
    model = decoder()
    with torch.no_grad():
        for p in (
            *model.model.layers[2].self_attn.o_proj.parameters(),
            *model.model.layers[2].mlp.down_proj.parameters(),
        ):
            p.zero_()
    frame = stream(model, DATA, [BlockInfluence(), AngularDistance()]).frame
    assert (
        scores(frame, 'angular_activation', 'last')[2] < 1e-7
        and abs(scores(frame, 'block_influence')[2]) < 1e-12
    )


# -------------------------------------------------------------------------------- regions
@settings(max_examples=200, deadline=None)
@given(st.integers(2, 90), st.data())
def test_every_strategy_gives_k_distinct_layers(n, data):
    k = data.draw(st.integers(1, n))
    for name in STRATEGIES:
        r = region(name, k, n, seed=3)
        assert len(r) == len(set(r)) == k and 0 <= r[0] and r[-1] < n and r == sorted(r), name
    if k < n:
        assert [i + 1 for i in sparse_uniform(n, k)] == sparse_uniform(n, k, 1)
    a = sparse_uniform(n, k)
    # symmetric unless the middle falls between
    if 1 < k < n and (k % 2 == 0 or n % 2 == 0):
        assert [n - 2 - i for i in reversed(a)] == a


def test_random_regions_are_seeded():
    assert (
        region('random', 5, 30, seed=1)
        == region('random', 5, 30, seed=1)
        != region('random', 5, 30, seed=2)
    )


def test_top_k_of_scores():
    s = pd.Series([0.3, 0.1, 0.9, 0.3], index=[0, 1, 2, 3])
    assert region(s, 2) == [0, 2] == region(s, 0.5, 4)
    assert region(s, 2, largest=False) == [0, 1] and region(s, 1, exclude=[2]) == [0]
    assert region_size(0.25, 32) == 8 and region_size(0.01, 32) == 1 and region_size(1.0, 7) == 7


@pytest.mark.parametrize(
    'call,message',
    [
        (
            lambda: region('sparse_uniform', 33, 32),
            'k=33 layers cannot be chosen from a decoder of 32',
        ),
        (lambda: region('top', 0, 4), 'k=0'),
        (lambda: region('top', 1.5, 4), r'must lie in \(0, 1\]'),
        (lambda: region('top', 2), 'needs depth'),
        (lambda: region('median', 2, 8), 'unknown strategy'),
        (lambda: region([1, 2, 3], 4), 'k=4'),
        (lambda: region([1, 2], 1, depth=3), 'the decoder has 3'),
        (lambda: region([1.0, np.nan], 1), 'have no score'),
        (lambda: region('top', 2, 8, exclude=[1]), 'exclude works on scores'),
        (lambda: prune_order(pd.Series([1.0, 2.0]), [5]), 'layer 5 does not exist'),
    ],
)
def test_bad_regions(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_iterative_order_measures_again():
    model = decoder(8)
    order = iterative_prune_order(model, DATA, 4, [0, 7])
    for i in range(4):
        frame = stream(
            prune(model, order[:i]) if i else model, DATA, [AngularDistance(['last'])]
        ).frame
        left = [l for l in range(8) if l not in order[:i]]
        s = scores(frame, 'angular_activation', 'last').rename(dict(enumerate(left)))
        assert s.drop([0, 7]).idxmin() == order[i]
    with pytest.raises(ValueError, match='not an iterator'):
        iterative_prune_order(model, iter(DATA), 2)


# -------------------------------------------------------------------------------- agreement and
# stability
def test_agreement_and_overlap():
    a = pd.Series(range(10), dtype=float)
    t = agreement(dict(a=a, b=a * 2 + 1, c=-a), 3).set_index(['a', 'b'])
    assert t.tau['a', 'b'] == pytest.approx(1) and t.tau['a', 'c'] == pytest.approx(-1)
    assert t.overlap['a', 'c'] == 0 and t.chance.eq(0.3).all()
    assert top_k_overlap(a, a.sample(frac=1, random_state=0), 4) == 1
    with pytest.raises(ValueError, match='score different layers'):
        agreement(dict(a=a, b=a[:5]), 2)


def test_stability_along_one_stream():
    res = stream(
        decoder(),
        [batch(seed=i) for i in range(6)],
        [BlockInfluence(['all'])],
        snapshots=[3, 9, 18],
    )
    s = stability(res.snapshots, 'block_influence', k=2)
    assert (
        s.samples.tolist() == [3, 9, 18]
        and s.largest_change.iloc[-1] == 0
        and s.largest_change.iloc[0] > 0
    )
    first = stream(decoder(), [batch(seed=0)], [BlockInfluence(['all'])]).frame
    pd.testing.assert_frame_equal(res.snapshots[3], first)


# -------------------------------------------------------------------------------- ablation
@pytest.mark.parametrize('family', FAMILIES)
def test_drop_one_equals_pruned_models(family):
    model = FAMILIES[family]()
    r = drop_one(model, DATA)
    naive = [
        answer_loss(prune(model, [i]), DATA).value
        for i in range(len(scores(r.frame, 'drop_one_loss', 'answer')))
    ]
    np.testing.assert_allclose(scores(r.frame, 'drop_one_loss', 'answer'), naive, atol=1e-5)
    assert r.base.n == 15 and (scores(r.frame, 'drop_one_ppl_ratio', 'answer') > 0).all()


def test_loss_equals_the_models_own():
    model, x = decoder(), batch()
    with torch.no_grad():
        theirs = model(**{k: x[k] for k in ('input_ids', 'attention_mask', 'labels')})
    at = x['labels'][:, 1:] != -100
    accuracy = (theirs.logits[:, :-1].argmax(-1) == x['labels'][:, 1:])[at].float().mean().item()
    ours = answer_loss(model, [x])
    assert ours.value == pytest.approx(
        theirs.loss.item(), abs=1e-5
    ) and ours.accuracy == pytest.approx(accuracy)


def image_batch(lengths=(12, 9), images=(2, 1)):
    "Rows for `llava` with `images` pictures each, padded on the right, from pixels."
    x = batch(lengths, image=())
    x = {k: x[k] for k in ('input_ids', 'attention_mask', 'labels')}
    x['input_ids'] = x['input_ids'].where(x['input_ids'] != 3, 5)
    for row, n in enumerate(images):
        for j in range(n):
            x['input_ids'][row, 1 + 4 * j : 5 + 4 * j] = 3
    x['labels'][x['input_ids'] == 3] = -100
    return x | dict(
        pixel_values=torch.randn(sum(images), 3, 8, 8, generator=torch.Generator().manual_seed(0))
    )


def test_drop_one_of_a_vlm_from_pixels():
    """Classes such as LLaVA take use_cache only through **kwargs: a cache filled by the first pass
    would be read again."""
    model, x = llava(), image_batch()
    r = drop_one(model, [x])
    np.testing.assert_allclose(
        scores(r.frame, 'drop_one_loss', 'answer'),
        [answer_loss(prune(model, [i]), [x]).value for i in range(6)],
        atol=1e-5,
    )
    assert (
        scores(revert_one(model, copy.deepcopy(model), [x]).frame, 'revert_one_delta', 'answer')
        .abs()
        .max()
        < 1e-6
    )
    best = greedy_drop(model, [x], 1)
    assert best.loss[0] == pytest.approx(
        scores(r.frame, 'drop_one_loss', 'answer')[1:4].min(), abs=1e-5
    )


def test_layers_that_cannot_run_on_their_own_are_refused():
    """Qwen3-VL adds image features between layers; a layer with a memory answers a second call
    differently."""
    model, ids = (
        qwen3_vl(),
        torch.randint(5, 40, (1, 14), generator=torch.Generator().manual_seed(0)),
    )
    ids[0, 2:8] = torch.tensor([36, 3, 3, 3, 3, 37])
    x = dict(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        labels=ids.where(torch.arange(14) > 10, -100),
        pixel_values=torch.randn(16, 3 * 2 * 4 * 4),
        image_grid_thw=torch.tensor([[1, 4, 4]]),
        mm_token_type_ids=(ids == 3).long(),
    )
    calls = lambda d: (
        lambda: drop_one(model, d),
        lambda: greedy_drop(model, d, 1),
        lambda: revert_one(model, model, d),
    )
    for f in calls([x]):
        with pytest.raises(NotLayerwise, match='Qwen3VL.*between layers 0 and 1'):
            f()
    assert answer_loss(model, [x], skip=[2]).value > 0
    text = {k: x[k] for k in ('input_ids', 'attention_mask', 'labels')} | dict(
        input_ids=ids.clamp(min=5, max=35)
    )
    assert drop_one(model, [text]).base.n == 3
    model, seen = decoder(), []

    def remember(module, args, out):
        seen.append(1)
        return out * (1 + len(seen))

    model.model.layers[4].register_forward_hook(remember)
    with pytest.raises(NotLayerwise, match='second time'):
        drop_one(model, DATA)


def test_work_of_drop_one_is_half():
    """Layer calls: L for the shared pass, then only the layers above the dropped one; L more once,
    as a check."""
    model, calls = decoder(8), []
    for i, l in enumerate(model.model.layers):
        l.register_forward_hook(lambda m, a, o, i=i: calls.append(i))
    drop_one(model, DATA * 3)
    assert len(calls) == 8 + 6 * (8 + 8 * 7 // 2) <= 0.6 * 6 * 8 * 8


def test_greedy_drop_is_greedy():
    model = decoder(7)
    r = greedy_drop(model, DATA, 3)
    gone = []
    for layer, loss in zip(r.order, r.loss):
        table = {
            i: answer_loss(model, DATA, [*gone, i]).value for i in range(1, 6) if i not in gone
        }
        assert min(table, key=table.get) == layer and table[layer] == pytest.approx(loss, abs=1e-5)
        gone.append(layer)
    assert set(greedy_drop(model, DATA, 2, candidates=[0, 6]).order) == {0, 6}


def test_revert_one_against_hand_made_models():
    base, tuned = decoder(), decoder()
    with torch.no_grad():
        for i in (0, 4):
            for p in tuned.model.layers[i].parameters():
                p.add_(0.1 * torch.randn_like(p))
    before = {k: v.clone() for k, v in tuned.state_dict().items()}
    r = revert_one(tuned, base, DATA)
    for i in range(6):
        mixed = copy.deepcopy(tuned)
        mixed.model.layers[i].load_state_dict(base.model.layers[i].state_dict())
        want = pytest.approx(answer_loss(mixed, DATA).value, abs=1e-5)
        assert scores(r.frame, 'revert_one_loss', 'answer')[i] == want
    assert scores(r.frame, 'revert_one_delta', 'answer')[[1, 2, 3, 5]].abs().max() == 0
    assert all(torch.equal(v, before[k]) for k, v in tuned.state_dict().items())


@pytest.mark.parametrize(
    'f', [drop_one, answer_loss, gradient_scores, lambda m, b: greedy_drop(m, b, 1)]
)
def test_losses_need_labels(f):
    with pytest.raises(ValueError, match='needs labels'):
        f(decoder(), [{k: v for k, v in DATA[0].items() if k != 'labels'}])
    with pytest.raises(ValueError, match='every label is -100'):
        f(decoder(), [DATA[0] | dict(labels=torch.full_like(DATA[0]['labels'], -100))])


@pytest.mark.parametrize('k,kw', [(6, {}), (2, dict(candidates=[1])), (1, dict(candidates=[9]))])
def test_greedy_limits(k, kw):
    with pytest.raises(ValueError, match='cannot be removed|does not exist'):
        greedy_drop(decoder(), DATA, k, **kw)


# -------------------------------------------------------------------------------- gradients
def test_gradient_scores_by_autograd():
    model = decoder(3)
    frame = gradient_scores(model, DATA)
    per_sample, tokens = [], []
    for r in [r for x in DATA for r in rows(x)]:
        m = copy.deepcopy(model)
        m(
            **{k: r[k] for k in ('input_ids', 'attention_mask', 'position_ids', 'labels')}
        ).loss.backward()
        per_sample.append([{n: p.grad for n, p in l.named_parameters()} for l in m.model.layers])
        tokens.append(3)
    for l in range(3):
        w, g = dict(model.model.layers[l].named_parameters()), [s[l] for s in per_sample]
        mean = {n: sum(t * s[n] for t, s in zip(tokens, g)) / sum(tokens) for n in w}
        total = lambda f: sum(f(n).double().sum().item() for n in w)
        want = dict(
            taylor=total(lambda n: (w[n] * mean[n]).abs()),
            taylor_absolute=total(lambda n: sum((w[n] * s[n]).abs() for s in g)),
            taylor_summed=total(lambda n: (w[n] * sum(s[n] for s in g)).abs()),
            fisher=total(lambda n: sum(s[n] ** 2 for s in g) / 5),
            grad_norm=total(lambda n: mean[n] ** 2) ** 0.5,
            pruner_second=total(lambda n: w[n] ** 2 * sum(s[n] ** 2 for s in g) / 5),
        )
        for k, v in want.items():
            assert scores(frame, k, 'answer')[l] == pytest.approx(v, rel=1e-4), k
        sums = [{n: (w[n].detach() * s[n]).double() for n in w} for s in g]
        errors = dict(
            fisher=(torch.tensor([sum(s[n].double().square().sum() for n in w) for s in g]), 1),
            taylor_absolute=(
                torch.tensor([sum(x.abs().sum() for x in u.values()) for u in sums]),
                5,
            ),
            taylor_signed=(torch.tensor([sum(x.sum() for x in u.values()) for u in sums]), 1),
            pruner_second=(
                torch.tensor([sum(x.square().sum() for x in u.values()) for u in sums]),
                1,
            ),
        )
        got = frame[frame.layer == l].set_index('metric').standard_error
        for k, (x, factor) in errors.items():  # the samples here have three answer tokens each
            assert got[k] == pytest.approx((x.std() / 5**0.5 * factor).item(), rel=1e-4), k
        assert set(got.index[got.isna()]) == set(GRADIENT) - set(errors)


def test_frozen_layers_and_existing_gradients_survive():
    model = decoder(3)
    model.requires_grad_(False)
    model.model.layers[1].requires_grad_(True)
    model.model.layers[1].mlp.up_proj.weight.grad = torch.ones_like(
        model.model.layers[1].mlp.up_proj.weight
    )
    gradient_scores(model, DATA[:1], unit='batch')
    assert [p.requires_grad for p in model.parameters()] == [
        'layers.1.' in n for n, _ in model.named_parameters()
    ]
    assert (model.model.layers[1].mlp.up_proj.weight.grad == 1).all()
    assert not any(
        p._post_accumulate_grad_hooks
        for p in model.parameters()
        if getattr(p, '_post_accumulate_grad_hooks', None)
    )


def test_split_samples_refuses_what_it_cannot_cut():
    with pytest.raises(ValueError, match='packs several documents'):
        split_samples(dict(input_ids=torch.ones(1, 4), document_ids=torch.tensor([[0, 0, 1, 1]])))
    one = dict(
        input_ids=torch.ones(1, 4), pixel_values=torch.ones(3, 1)
    )  # one sample is itself, any pictures
    assert split_samples(one) == [one]
    two = {k: v[:1] for k, v in image_batch().items() if k != 'pixel_values'} | dict(
        pixel_values=torch.randn(2, 3, 8, 8)
    )
    pd.testing.assert_frame_equal(
        gradient_scores(llava(), [two]), gradient_scores(llava(), [two], unit='batch')
    )
    with pytest.raises(ValueError, match='3 images for 2 rows'):
        split_samples(dict(input_ids=torch.ones(2, 4), pixel_values=torch.ones(3, 1)))


# -------------------------------------------------------------------------------- weights
@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**31 - 1))
def test_lora_norm_without_the_product(r, n, m, seed):
    g = torch.Generator().manual_seed(seed)
    a, b = torch.randn(r, n, generator=g), torch.randn(m, r, generator=g)
    assert lora_norm(a, b, 0.5) == pytest.approx(
        (0.5 * b @ a).double().norm().item(), rel=1e-4, abs=1e-6
    )


def test_lora_update_of_a_peft_model_and_its_merge():
    base = decoder()
    peft = get_peft_model(
        copy.deepcopy(base),
        LoraConfig(r=3, lora_alpha=6, target_modules=r'model\.layers\.[14]\..*_proj'),
    )
    with torch.no_grad():
        for n, p in peft.named_parameters():
            if 'lora_B' in n:
                p.normal_()
    up = lora_update(peft, base=base)
    assert scores(up, 'lora_update', 'weights')[[0, 2, 3, 5]].eq(0).all() and set(up.n) == {0, 7}
    with pytest.raises(ValueError, match='merge the adapters first'):
        parameter_change(peft, base)
    change = parameter_change(peft.merge_and_unload(), base)
    np.testing.assert_allclose(
        scores(up, 'lora_update_relative', 'weights'),
        scores(change, 'parameter_change', 'weights'),
        rtol=1e-4,
    )
    np.testing.assert_allclose(
        scores(up, 'lora_update_sum', 'weights'),
        scores(change, 'parameter_l2_sum', 'weights'),
        rtol=1e-4,
    )


def test_parameter_change_from_folders(tmp_path):
    base, tuned = decoder(), decoder()
    with torch.no_grad():
        tuned.model.layers[3].self_attn.q_proj.weight.mul_(2)
    base.save_pretrained(tmp_path / 'base')
    tuned.save_pretrained(tmp_path / 'tuned', max_shard_size='5KB')
    assert len(list((tmp_path / 'tuned').glob('*.safetensors'))) > 1
    frame = parameter_change(tmp_path / 'tuned', str(tmp_path / 'base'))
    pd.testing.assert_frame_equal(frame, parameter_change(tuned, base))
    assert scores(frame, 'parameter_ratio_sum_base', 'weights')[3] == pytest.approx(1, abs=1e-6)


def test_towers_do_not_count_as_decoders():
    model = llava()
    with pytest.raises(ValueError, match='give prefix='):
        layer_weights(model.state_dict())
    names = layer_weights(model.state_dict(), 'model.language_model')
    assert len(names) == 6 and torch.equal(
        names[2]['mlp.up_proj.weight'], layer_weights(model)[2]['mlp.up_proj.weight']
    )
    with pytest.raises(ValueError, match="prefix 'x' has no layers"):
        layer_weights(model.state_dict(), 'x')


@pytest.mark.parametrize('where', ['folder', 'saved names', 'state dict', 'folder without config'])
def test_a_vlm_as_base(where, tmp_path):
    "Tower and decoder have as many layers here, and the saved names are not those in memory."
    base, x = llava(), image_batch()
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned.model.language_model.layers[2].mlp.up_proj.weight.mul_(2)
    base.save_pretrained(tmp_path)
    if where == 'folder without config':
        (tmp_path / 'config.json').unlink()
    source = {
        'state dict': base.state_dict(),
        'saved names': load_file(tmp_path / 'model.safetensors'),
    }.get(where, tmp_path)
    pd.testing.assert_frame_equal(parameter_change(tuned, source), parameter_change(tuned, base))
    pd.testing.assert_frame_equal(
        revert_one(tuned, source, [x]).frame, revert_one(tuned, base, [x]).frame
    )
    adapted = get_peft_model(
        copy.deepcopy(base), LoraConfig(r=2, target_modules=r'.*language_model\.layers\.1\..*_proj')
    )
    pd.testing.assert_frame_equal(
        lora_update(adapted, base=source), lora_update(adapted, base=base)
    )
    with pytest.raises(ValueError, match='merge the adapters first'):
        parameter_change(adapted, source)
    with pytest.raises(ValueError, match='none of them fit the 4 layers.*give prefix='):
        parameter_change(llava(4), source)


def test_two_vlm_folders_and_our_own(tmp_path):
    "The configuration beside the weights says which layers are the decoder's."
    tuned = llava()
    with torch.no_grad():
        tuned.model.language_model.layers[2].mlp.up_proj.weight.mul_(2)
    tuned.save_pretrained(tmp_path / 'a')
    llava().save_pretrained(tmp_path / 'b')
    change = scores(parameter_change(tmp_path / 'a', tmp_path / 'b'), 'parameter_change', 'weights')
    assert change.gt(0).tolist() == [i == 2 for i in range(6)]
    ours, _ = build_vlm(asset_path('llm'), asset_path('vit'), template='world')
    ours.save_pretrained(tmp_path / 'c')
    assert (
        parameter_change(tmp_path / 'c', ours).value.abs().max() < 1e-6
        and len(layer_weights(tmp_path / 'c')) == 8
    )


@pytest.mark.parametrize(
    'other,message',
    [
        (lambda: decoder(seed=9), 'median cosine'),
        (lambda: decoder(5), '6 layers against 5'),
        (lambda: decoder(intermediate_size=20), r'\(24, 16\) against \(20, 16\)'),
        (lambda: decoder(attention_bias=True), 'layer 0 differs in'),
    ],
)
def test_checkpoints_of_different_bases(other, message):
    for f in (
        lambda: parameter_change(decoder(), other()),
        lambda: revert_one(decoder(), other(), DATA),
    ):
        with pytest.raises(ValueError, match=message):
            f()


def test_related_can_be_waived():
    check_same_base(layer_weights(decoder()), layer_weights(decoder(seed=9)), related=False)
    assert parameter_change(decoder(), decoder(seed=9), related=False).value.gt(0).all()


def test_heat_map():
    frame = stream(decoder(), DATA, [BlockInfluence(['all', 'image']), AngularDistance()]).frame
    ax = plot_scores(frame)
    assert ax.images[0].get_array().shape[1] == 6 and np.nanmax(ax.images[0].get_array()) == 1
    with pytest.raises(ValueError, match='no rows with span 9'):
        plot_scores(frame, 9)
