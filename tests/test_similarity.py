"""CKA against explicit formulas and dense HSIC; attention rows against eager attention on every
family."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from depth_models import FAMILIES, batch, decoder, llava, mistral, rows
from vlmbench.analysis.similarity import (
    CKA,
    SEGMENTS,
    ImageAttention,
    attention_rows,
    cka_from_hsic,
    collecting_rows,
    full_attentions,
    hsic_matrices,
    plot_cka,
)
from vlmbench.analysis.streams import scores, stream
from vlmbench.models.depth import find_decoder


def hsic1(k, l):
    "Unbiased HSIC of two Gram matrices, term by term (Song et al. 2012)."
    n = len(k)
    k, l = k - np.diag(np.diag(k)), l - np.diag(np.diag(l))
    one = np.ones(n)
    return (
        np.trace(k @ l)
        + one @ k @ one * (one @ l @ one) / ((n - 1) * (n - 2))
        - 2 / (n - 2) * one @ k @ l @ one
    ) / (n * (n - 3))


@settings(max_examples=30, deadline=None)
@given(st.integers(4, 15), st.integers(1, 8), st.integers(0, 2**31 - 1))
def test_hsic_by_the_formulas(n, d, seed):
    x = np.random.default_rng(seed).normal(size=(2, n, d)) + 3
    biased, debiased = hsic_matrices(torch.from_numpy(x))
    a, b = x - x.mean(1, keepdims=True)
    np.testing.assert_allclose(biased[0, 1], np.linalg.norm(a.T @ b) ** 2, rtol=1e-8)
    np.testing.assert_allclose(
        debiased[0, 1], hsic1(x[0] @ x[0].T, x[1] @ x[1].T), rtol=1e-5, atol=1e-8
    )
    assert torch.equal(debiased, debiased.T) or torch.allclose(debiased, debiased.T)


def test_too_few_tokens_and_degenerate_states():
    with pytest.raises(ValueError, match='at least 4 tokens'):
        hsic_matrices(torch.ones(2, 3, 4))
    assert cka_from_hsic(hsic_matrices(torch.ones(2, 5, 4))[1]).isnan().all()


def test_minibatch_cka_averages_hsic():
    model, data = decoder(), [batch(seed=i) for i in range(4)]
    whole, parts = CKA(['all'], max_tokens=None), [CKA(['all'], max_tokens=None) for _ in data]
    stream(model, data, [whole])
    for x, c in zip(data, parts):
        stream(model, [x], [c])
    total = sum(c.sums['all'][0] for c in parts)
    np.testing.assert_allclose(whole.matrix(), cka_from_hsic(total[1]).numpy(), atol=1e-9)
    frame = stream(model, data, [CKA(['all'])]).frame
    assert (
        frame.standard_error.notna().all()
        and stream(model, data[:1], [CKA(['all'])]).frame.standard_error.isna().all()
    )


def test_debiased_minibatches_estimate_the_whole_better_than_biased():
    model = decoder()
    big = {k: torch.cat([batch(seed=i)[k] for i in range(16)]) for k in batch()}
    exact, small = CKA(['all'], max_tokens=None), CKA(['all'], max_tokens=None)
    stream(model, [big], [exact])
    stream(model, [batch(seed=i) for i in range(16)], [small])
    off = {
        d: np.abs(small.matrix(debiased=d) - exact.matrix(debiased=d)).max() for d in (True, False)
    }
    assert off[True] < off[False]


def test_subsampling_is_seeded_and_counted():
    model, x = decoder(), batch()
    runs = []
    for seed in (0, 0, 1):
        c = CKA(['all'], max_tokens=12, seed=seed)
        stream(model, [x], [c])
        assert c.sums['all'][2] == 12
        runs.append(c.matrix())
    assert np.array_equal(runs[0], runs[1]) and not np.array_equal(runs[0], runs[2])


def test_drop_first_leaves_out_one_token_a_sample():
    c = CKA(['all', 'text'], drop_first=True, max_tokens=None)
    stream(decoder(), [batch(side='left')], [c])
    assert c.sums['all'][2] == 28 - 3 and c.sums['text'][2] == 20 - 3


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('side', ['left', 'right'])
def test_attention_against_eager(family, side):
    model, x = FAMILIES[family](), batch(side=side)
    # a second image in sample 0
    x['image_mask'][0, x['image_mask'][0].nonzero()[-1, 0] + 2] = True
    # Gemma's soft cap exists in eager only
    model.set_attn_implementation('eager')
    frame = stream(
        model, [x], [ImageAttention(['last', 'answer_predicting', 'text_after_images'])]
    ).frame
    a, im = full_attentions(model, x), x['image_mask']
    at = x['labels'].roll(-1, 1) != -100
    at[:, -1] = False
    at &= im.any(1, keepdim=True)
    b, t = at.nonzero(as_tuple=True)
    mass = torch.stack(
        [(a[:, i, :, j] * im[i]).sum(-1) for i, j in zip(b, t)]
    )  # [queries, layers, heads]
    seen = torch.stack(
        [a[:, i, :, j].amax(1) > 0 for i, j in zip(b, t)]
    )  # a layer's window hides earlier keys
    share = (seen & im[b][:, None]).sum(2) / seen.sum(2)  # [queries, layers]
    np.testing.assert_allclose(
        scores(frame, 'attention_image', 'answer_predicting'), mass.mean((0, 2)), atol=1e-5
    )
    np.testing.assert_allclose(
        scores(frame, 'attention_max_head', 'answer_predicting'), mass.mean(0).amax(1), atol=1e-5
    )
    np.testing.assert_allclose(
        scores(frame, 'attention_lift', 'answer_predicting'),
        torch.where(share > 0, mass.mean(2) / share, 0).mean(0),
        atol=1e-5,
    )
    total = sum(scores(frame, f'attention_mass_{s}', 'last').values for s in SEGMENTS)
    np.testing.assert_allclose(total, 1, atol=1e-5)


@pytest.mark.parametrize('window', [None, 10])
def test_uniform_attention_has_lift_one(window):
    "Under a sliding window a layer sees fewer keys: the share of the image is taken among those."
    model, ids = (
        mistral(window),
        torch.randint(5, 40, (2, 20), generator=torch.Generator().manual_seed(0)),
    )
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.q_proj.weight)
    image = torch.zeros(2, 20, dtype=torch.bool)
    image[:, 8:14] = True
    x = dict(input_ids=ids, attention_mask=torch.ones_like(ids), image_mask=image)
    frame = stream(model, [x], [ImageAttention(['last'])]).frame
    mass = 6 / 20 if window is None else 4 / 10
    np.testing.assert_allclose(scores(frame, 'attention_image', 'last'), mass, atol=1e-6)
    for metric in (
        'attention_lift',
        'attention_efficiency_image',
        'attention_efficiency_instruction',
    ):
        np.testing.assert_allclose(scores(frame, metric, 'last'), 1, atol=1e-5)


def test_attention_rows_are_the_only_rows():
    "The largest tensor recomputed has queries x keys entries for the chosen queries only."
    seen = []

    class Watch(ImageAttention):
        def _collect(self, layer, query, key, *rest):
            seen.append(attention_rows(query, key, self.queries, rest[0], rest[1]).shape)
            super()._collect(layer, query, key, *rest)

    stream(decoder(), [batch((40, 40), image=(0,))], [Watch(['last'])])
    assert set(seen) == {(2, 4, 1, 40)} and len(seen) == 6


def test_packed_documents_do_not_look_across():
    x = batch((12, 9), image=(0,))
    apart = stream(decoder(), rows(x), [ImageAttention(['last'])]).frame
    # the text-only sample has no query
    assert set(apart.n) == {1}


def test_sinks_take_their_share():
    q, k = torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 4)
    plain = attention_rows(q, k, torch.tensor([[4]]), None)
    assert (
        attention_rows(q, k, torch.tensor([[4]]), None, sinks=torch.zeros(2)).sum(-1)
        < plain.sum(-1)
    ).all()
    boolean = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()
    additive = torch.where(boolean, 0.0, torch.finfo(torch.float32).min)
    for m in (boolean, additive):
        torch.testing.assert_close(
            attention_rows(q, k, torch.tensor([[4, 1]]), m),
            attention_rows(q, k, torch.tensor([[4, 1]]), None),
        )


def test_attention_settings_are_restored_even_after_an_error():
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model, before = decoder(), ALL_ATTENTION_FUNCTIONS['sdpa']
    model.set_attn_implementation('eager')
    with pytest.raises(RuntimeError), collecting_rows(find_decoder(model), lambda *a: None):
        assert model.config._attn_implementation == 'sdpa'
        raise RuntimeError
    assert (
        model.config._attn_implementation == 'eager' and ALL_ATTENTION_FUNCTIONS['sdpa'] is before
    )


def test_other_models_are_not_watched():
    seen, one, two = [], decoder(), decoder(seed=1)
    with collecting_rows(find_decoder(one), lambda layer, *a: seen.append(layer)), torch.no_grad():
        two(batch()['input_ids'])
        assert not seen
        one(batch()['input_ids'])
    assert seen == list(range(6))


def test_the_tower_is_not_watched():
    model, seen = llava(), []
    with (
        collecting_rows(find_decoder(model), lambda layer, *a: seen.append(layer)),
        torch.no_grad(),
    ):
        model.get_image_features(pixel_values=torch.zeros(1, 3, 8, 8))
    assert not seen


def test_attentions_that_do_not_exist():
    with pytest.raises(ValueError, match="'sdpa' returned 0 attention maps"):
        full_attentions(decoder(), batch())
    text = {k: v for k, v in batch().items() if k != 'image_mask'}
    assert stream(decoder(), [text], [ImageAttention()]).frame.empty
    with pytest.raises(ValueError, match='no token of set'):
        stream(decoder(), [text], [ImageAttention(['last'])])


def test_map_plot():
    ax = plot_cka(np.eye(3))
    assert ax.images[0].get_clim() == (0, 1)
