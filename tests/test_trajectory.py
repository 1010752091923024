"""Logit lens and trajectories against their definitions, the reservoir, and the transition rule."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.nn import functional as F

from depth_models import FAMILIES, batch, decoder, rows
from vlmbench.analysis.streams import residual_states, scores, stream
from vlmbench.analysis.trajectory import (
    LENS,
    LogitLens,
    Trajectory,
    plot_lens,
    plot_trajectory,
    thin,
    transition_point,
    zero_trajectory,
)
from vlmbench.models.depth import find_decoder


def plain_lens(model, x):
    "Log-probabilities `[states, batch, tokens, vocab]` of every state."
    with torch.no_grad():
        hidden, _ = residual_states(model, x)
        d = find_decoder(model)
        return torch.stack([d.logits(d.norm(h)).float().log_softmax(-1) for h in hidden])


@pytest.mark.parametrize('family', FAMILIES)
def test_lens_by_definition(family):
    model, x = FAMILIES[family](), batch()
    frame = stream(model, [x], [LogitLens(['answer_predicting'])]).frame
    logp, at = plain_lens(model, x), x['labels'].roll(-1, 1) != -100
    at[:, -1] = False
    logp, target = logp[:, at], x['labels'].roll(-1, 1)[at]
    final = logp[-1]
    want = dict(
        kl_final_to_layer=(final.exp() * (final - logp)).sum(-1).mean(1),
        kl_layer_to_final=(logp.exp() * (logp - final)).sum(-1).mean(1),
        cross_entropy=torch.stack([F.nll_loss(l, target) for l in logp]),
        top1_agreement=(logp.argmax(-1) == final.argmax(-1)).float().mean(1),
    )
    for k in LENS:
        np.testing.assert_allclose(
            scores(frame, k, 'answer_predicting', 0), want[k].numpy(), atol=1e-5
        )
    with torch.no_grad():
        loss = model(**{k: x[k] for k in ('input_ids', 'attention_mask', 'labels')}).loss
    assert scores(frame, 'cross_entropy', 'answer_predicting', 0).iloc[-1] == pytest.approx(
        loss.item(), abs=1e-5
    )


def test_chunks_and_shared_values_change_nothing():
    model, x = decoder(), batch()
    alone = stream(model, [x], [LogitLens()]).frame
    shared = stream(
        model, [x], [Trajectory('all_predicting'), LogitLens(), LogitLens(['text_predicting'])]
    ).frame
    for k in LENS:
        np.testing.assert_allclose(
            scores(shared, k, 'answer_predicting', 0),
            scores(alone, k, 'answer_predicting', 0),
            atol=1e-6,
        )
    from vlmbench.analysis.trajectory import lens_values
    from vlmbench.analysis.streams import make_states

    with torch.no_grad():
        states = make_states(residual_states(model, x)[0], x, find_decoder(model))
    one = lens_values(states, states.sets['all_predicting'], chunk=1)
    states.cache.clear()
    for k, v in lens_values(states, states.sets['all_predicting']).items():
        torch.testing.assert_close(one[k], v)


def test_positions_without_target_are_refused():
    from vlmbench.analysis.trajectory import lens_values
    from vlmbench.analysis.streams import make_states

    model, x = decoder(), batch()
    with torch.no_grad():
        states = make_states(residual_states(model, x)[0], x, find_decoder(model))
    with pytest.raises(ValueError, match='needs a target'):
        lens_values(states, states.sets['last'])


def test_zero_trajectory_by_definition_and_by_row():
    model, x = decoder(), batch(image=())
    traj = Trajectory()
    stream(model, [x], [traj])
    logp = plain_lens(model, x)[1:]
    for b in range(3):
        t = x['input_ids'][b][x['attention_mask'][b].bool()]
        p = logp[:, b, : len(t) - 1].exp().gather(2, t[1:].expand(len(logp), -1)[..., None])[..., 0]
        q = (p / p.sum(1, keepdim=True)).clamp(min=1e-6)
        np.testing.assert_allclose(
            traj.curves['zero'][b], (q * (q / q[-1]).log()).sum(1).numpy(), atol=1e-5
        )
        kl = (
            (
                logp[:, b, : len(t) - 1].exp()
                * (logp[:, b, : len(t) - 1] - logp[-1, b, : len(t) - 1])
            )
            .sum(-1)
            .mean(1)
        )
        np.testing.assert_allclose(traj.curves['vocabulary'][b], kl.numpy(), atol=1e-5)
    apart = Trajectory()
    stream(model, rows(x), [apart])
    np.testing.assert_allclose(apart.curves['zero'], traj.curves['zero'], atol=1e-5)


def test_low_precision_follows_the_reference():
    """In bfloat16 the probabilities and their normalisation stay in bfloat16, as in the reference;
    only then float32."""
    p = torch.rand(7, 3).bfloat16()
    got = zero_trajectory(p, torch.zeros(7, dtype=torch.long))
    q = (
        (p / p.new_zeros(1, 3).index_add_(0, torch.zeros(7, dtype=torch.long), p))
        .float()
        .clamp(min=1e-6)
    )
    torch.testing.assert_close(got[0], (q * (q / q[:, -1:]).log()).sum(0).double())
    assert (
        stream(decoder().to(torch.bfloat16), [batch()], [Trajectory(), LogitLens()])
        .frame.value.notna()
        .all()
    )


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 8), st.integers(2, 6), st.integers(0, 2**31 - 1))
def test_zero_trajectory_is_zero_at_the_end_and_for_equal_layers(n, layers, seed):
    g = torch.Generator().manual_seed(seed)
    p = torch.rand(n, 1, generator=g).expand(n, layers).clone() + 1e-3
    out = zero_trajectory(p, torch.zeros(n, dtype=torch.long))
    assert out.abs().max() < 1e-6 and out.shape == (1, layers)


def test_reservoir_is_seeded_capped_and_uniform():
    model, data = decoder(2), [batch((8,), (), seed=i) for i in range(30)]

    def kept(seed):
        t = Trajectory(keep=5, seed=seed)
        stream(model, data, [t])
        assert (len(t.curves['zero']), t.count) == (5, 30)
        return t.curves['zero'][:, 0]

    assert np.array_equal(kept(0), kept(0)) and not np.array_equal(kept(0), kept(1))


def test_transition_rule():
    rng = np.random.default_rng(0)
    spread = rng.normal(size=(101, 1))
    curves = (
        np.r_[3, 4, 3, 4, 3.5, 2.5, 1.5, 0.5, 0] + spread * np.r_[1, 1, 1, 1, 0.9, 0.6, 0.4, 0.1, 0]
    )
    t = transition_point(curves)
    assert t.layer == 3 and len(t.median) == 9
    bumped = curves.copy()
    bumped[:, 6] += 1.1
    assert transition_point(bumped).layer == 6
    assert transition_point(bumped, slack=0.5).layer < 6
    with pytest.raises(ValueError, match='at least 4 samples'):
        transition_point(curves[:3])
    with pytest.raises(ValueError, match='no curves yet'):
        Trajectory().curves


def test_thin_keeps_the_ends_evenly():
    mask = torch.tensor([0, 1, 1, 1, 1, 1, 1, 1, 1, 1]).bool()
    assert thin(mask, 3).nonzero()[:, 0].tolist() == [1, 5, 9]
    assert torch.equal(thin(mask, 20), mask) and torch.equal(thin(mask, None), mask)


def test_plots_return_axes():
    traj = Trajectory()
    frame = stream(decoder(), [batch(), batch(seed=1)], [traj, LogitLens()]).frame
    ax = plot_trajectory(traj.curves['zero'], picked=2)
    assert len(ax.lines) == 6 + 2 and ax.get_ylim() == (0, 12.5)
    assert len(plot_lens(frame).collections) == 4
    with pytest.raises(ValueError, match='run LogitLens'):
        plot_lens(frame, ['nothing'])
