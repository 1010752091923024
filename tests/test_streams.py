"""The hooked pass: what it may depend on (nothing but the valid tokens) and what it refuses."""

import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

from depth_models import FAMILIES, IMAGE, batch, decoder, gpt2, llava, rows
from vlmbench.analysis.importance import AngularDistance, BlockInfluence
from vlmbench.analysis.streams import (
    Moments,
    Record,
    StateNorm,
    StreamMetric,
    check_residual,
    make_states,
    model_inputs,
    residual_states,
    scores,
    skipping,
    stream,
    tidy,
    token_sets,
)
from vlmbench.analysis.suite import streaming_metrics
from vlmbench.analysis.trajectory import Trajectory
from vlmbench.models.depth import find_decoder, prune


def table(model, batches, metrics=None):
    return stream(
        model, batches, metrics or [BlockInfluence(), AngularDistance(), StateNorm()]
    ).frame.set_index(['metric', 'token_set', 'layer', 'span'])


@pytest.mark.parametrize('family', FAMILIES)
def test_states_equal_the_librarys_hidden_states(family):
    model, x = FAMILIES[family](), batch()
    inputs = {k: x[k] for k in ('input_ids', 'attention_mask', 'position_ids')}
    with torch.no_grad():
        hidden, _ = residual_states(model, x)
        theirs = model(**inputs, output_hidden_states=True).hidden_states
    assert len(hidden) == len(theirs) == len(find_decoder(model)) + 1
    for a, b in zip(hidden[:-1], theirs[:-1]):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(find_decoder(model).norm(hidden[-1]), theirs[-1])


@pytest.mark.parametrize('family', FAMILIES)
def test_every_metric_runs_on_every_family(family):
    frame = stream(FAMILIES[family](), [batch(), batch(seed=1)], streaming_metrics()).frame
    assert frame.value.notna().all() and {
        'cka',
        'trajectory_zero',
        'angular_activation',
        'kl_final_to_layer',
    } <= set(frame.metric)
    assert {'attention_image', 'attention_lift'} <= set(frame.metric)


def test_padding_side_width_and_batching_do_not_matter():
    model = decoder()
    want = table(model, [batch()]).value
    for other in ([batch(side='left')], [batch(width=20)], rows(batch()), rows(batch())[::-1]):
        torch.testing.assert_close(
            torch.tensor(table(model, other).value[want.index].values),
            torch.tensor(want.values),
            rtol=0,
            atol=2e-5,
        )


def test_backends_agree():
    model = decoder()
    want = table(model, [batch(side='left')]).value
    model.set_attn_implementation('eager')
    torch.testing.assert_close(
        torch.tensor(table(model, [batch(side='left')]).value.values),
        torch.tensor(want.values),
        rtol=0,
        atol=2e-5,
    )


def test_packed_documents_are_samples():
    x = batch(image=())
    flat, doc = [], []
    for i, r in enumerate(rows(x)):
        keep = r['attention_mask'][0].bool()
        flat.append({k: r[k][0][keep] for k in ('input_ids', 'labels', 'position_ids')})
        doc.append(torch.full((int(keep.sum()),), i))
    packed = {k: torch.cat([f[k] for f in flat])[None] for k in flat[0]} | dict(
        document_ids=torch.cat(doc)[None]
    )
    a = token_sets({k: v for k, v in x.items() if k != 'image_mask'})
    b = token_sets(packed)
    for k in a.masks:
        assert a.masks[k].sum() == b.masks[k].sum(), k
    valid = x['attention_mask'].bool()
    assert torch.equal(a.samples[valid], b.samples[0]) and torch.equal(
        a.targets[valid], b.targets[0]
    )


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(4, 12), min_size=1, max_size=4),
    st.sampled_from(['left', 'right']),
    st.integers(0, 3),
)
def test_token_sets_are_consistent(lengths, side, image):
    x = batch(tuple(lengths), image=range(image), side=side)
    t = token_sets(x)
    m = t.masks
    assert torch.equal(m['image'] | m['text'], m['all']) and not (m['image'] & m['text']).any()
    assert m['last'].sum(1).tolist() == [1] * len(lengths)
    assert int(m['all_predicting'].sum()) == sum(lengths) - len(lengths)
    assert not (m['answer_predicting'] & ~m['all_predicting']).any()
    assert torch.equal(
        t.targets[m['answer_predicting']], x['labels'][:, 1:][m['answer_predicting'][:, :-1]]
    )
    assert not (m['text_after_images'] & ~m['text_after_image']).any()
    assert ((t.targets >= 0) == m['all_predicting']).all()


def test_two_images_and_the_text_between_them():
    x = batch((12,), image=(0,))
    x['image_mask'][0, 7] = True
    m = token_sets(x).masks
    assert m['text_after_image'][0].nonzero()[:, 0].tolist() == [5, 6, 8, 9, 10, 11]
    assert m['text_after_images'][0].nonzero()[:, 0].tolist() == [8, 9, 10, 11]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=2, max_size=6), st.integers(0, 2**31 - 1))
def test_moments_against_the_formulas(sizes, seed):
    g = torch.Generator().manual_seed(seed)
    y = [torch.randn(n, 2, generator=g, dtype=torch.float64) for n in sizes]
    m = Moments()
    for v in y:
        m.add(v, torch.zeros(len(v), dtype=torch.long))
    value, se, n = m.pooled()
    r, N, S = torch.cat(y).mean(0), sum(sizes), len(sizes)
    torch.testing.assert_close(value, r)
    e = torch.stack([v.sum(0) - r * len(v) for v in y])
    torch.testing.assert_close(
        se, (e.square().sum(0) * S / (S - 1)).sqrt() / N, atol=1e-6, rtol=1e-5
    )
    means = torch.stack([v.mean(0) for v in y])
    torch.testing.assert_close(m.per_sample()[1], means.std(0) / S**0.5, atol=1e-6, rtol=1e-5)


def test_standard_error_of_one_sample_is_unknown():
    m = Moments()
    m.add(torch.ones(3, 1), torch.zeros(3, dtype=torch.long))
    assert math.isnan(m.pooled()[1].item())


def test_skip_equals_pruning():
    model, x = decoder(), batch()
    a, b = (
        stream(m, [x], [StateNorm(['all'])], skip=s).frame.value
        for m, s in ((model, [1, 4]), (prune(model, [1, 4]), []))
    )
    torch.testing.assert_close(torch.tensor(a.values), torch.tensor(b.values))
    layers = (
        stream(model, [x], [BlockInfluence(['all'])], skip=[1, 4]).frame.layer.unique().tolist()
    )
    assert layers == [0, 2, 3, 5]


def test_skipping_restores_the_layers():
    model = decoder()
    d = find_decoder(model)
    with pytest.raises(RuntimeError):
        with skipping(d, [0]):
            raise RuntimeError
    assert all('forward' not in l.__dict__ for l in d.layers)


def test_training_mode_hooks_and_gradients_are_left_alone():
    model = decoder().train()
    model.model.layers[2].eval()
    stream(model, [batch()], [BlockInfluence()])
    assert model.training and not model.model.layers[2].training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.model.layers)
    assert all(p.grad is None for p in model.parameters())


def test_results_do_not_grow_with_samples():
    """What a metric keeps after 40 batches is no larger than after 2 (the trajectory reservoir is
    capped)."""

    def size(n):
        metrics = streaming_metrics()
        metrics[4] = Trajectory(keep=4)
        stream(decoder(), [batch(seed=i) for i in range(n)], metrics)
        tensors = lambda o: (
            o.numel()
            if torch.is_tensor(o)
            else sum(map(tensors, o.values()))
            if isinstance(o, dict)
            else sum(map(tensors, o))
            if isinstance(o, (list, tuple))
            else tensors(vars(o))
            if isinstance(o, Moments)
            else 0
        )
        return sum(tensors({k: v for k, v in vars(m).items() if k != 'decoder'}) for m in metrics)

    assert size(12) == size(3)


def test_llava_from_pixels():
    model, ids = llava(), batch()['input_ids']
    ids[:2, 1:5] = IMAGE
    ids[2] = batch(seed=3)['input_ids'][0]
    x = dict(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)),
    )
    frame = stream(model, [x], [BlockInfluence()]).frame
    # samples for the per-sample mean, tokens for the pooled one
    assert set(frame[frame.token_set == 'image'].n) == {2, 8}
    assert frame.layer.max() == 5


# -------------------------------------------------------------------------------- what it refuses
def test_post_norm_states_are_refused():
    for model in (decoder(), gpt2()):
        d = find_decoder(model)
        x = torch.randn(20, 16) * 3
        check_residual(x, d.norm)
        with pytest.raises(ValueError, match='already passed the final norm'):
            check_residual(d.norm(x), d.norm)


def test_a_head_that_does_more_is_found_out():
    model = decoder()

    def shift(module, args, out):
        out.logits = out.logits + 5
        return out

    model.register_forward_hook(shift)
    with pytest.raises(ValueError, match='do not reproduce the logits'):
        stream(model, [batch()], [StateNorm()])


@pytest.mark.parametrize(
    'change,message',
    [
        (
            dict(attention_mask=torch.ones(3, 1, 12, 12)),
            r'attention_mask must be \[batch, tokens\]',
        ),
        (dict(pixel_values=torch.ones(1, 3, 4, 4)), "does not take \\['pixel_values'\\]"),
        (dict(output_attentions=True), 'sdpa returns no attentions'),
    ],
)
def test_bad_batches(change, message):
    with pytest.raises(ValueError, match=message):
        stream(decoder(), [batch() | change], [StateNorm()])


def test_padding_without_a_mask():
    x = {k: v for k, v in batch().items() if k in ('input_ids',)}
    with pytest.raises(ValueError, match='no attention_mask'):
        stream(decoder(), [x], [StateNorm()])


def test_non_finite_states():
    model = decoder()
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[0, 0] = float('nan')
    with pytest.raises(ValueError, match='not finite'):
        stream(model, [batch()], [StateNorm()])


def test_sets_that_do_not_exist():
    x = {k: v for k, v in batch().items() if k not in ('labels', 'image_mask')}
    with pytest.raises(ValueError, match='needs labels'):
        stream(decoder(), [x], [BlockInfluence(['answer'])])
    with pytest.raises(ValueError, match="no token of set 'image'"):
        stream(decoder(), [x], [BlockInfluence(['image'])])
    with pytest.raises(ValueError, match='unknown token set'):
        stream(decoder(), [x], [BlockInfluence(['prompt'])])
    with pytest.raises(ValueError, match='no batch'):
        stream(decoder(), [], [BlockInfluence()])


def test_an_in_place_layer_is_refused():
    model = decoder()
    layer = model.model.layers[1]
    plain = layer.forward
    layer.forward = lambda h, *a, **k: h.add_(plain(h, *a, **k))
    with pytest.raises(ValueError, match='in place'):
        stream(model, [batch()], [StateNorm()])


def test_stored_states_need_the_right_number():
    model = decoder()
    with torch.no_grad():
        hidden, _ = residual_states(model, batch())
    with pytest.raises(ValueError, match='6 layers need 7 states'):
        make_states(hidden[:-1], batch(), find_decoder(model), range(6))


def test_inputs_of_the_model_exclude_annotations():
    x = model_inputs(decoder(), batch() | dict(image_ids=torch.zeros(3, 12)))
    assert (
        set(x) == {'input_ids', 'attention_mask', 'position_ids', 'use_cache'}
        and x['use_cache'] is False
    )


def test_records_are_tidy():
    frame = tidy([Record('a', 'all', 0, 1.0, 0.1, 5)])
    assert frame.columns.tolist() == [
        'metric',
        'token_set',
        'layer',
        'span',
        'value',
        'standard_error',
        'n',
    ]
    with pytest.raises(ValueError, match='no rows for'):
        scores(frame, 'b')
    with pytest.raises(TypeError, match='must define measure'):
        StreamMetric().update(None)
