"""Intervals and tests: against scipy and lmms-eval, and by simulation of their coverage."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from test_scorers import lmms_functions

from vlmbench.evaluate.stats import (
    bootstrap_ci,
    clustered_se,
    design_effect,
    holm,
    items_needed,
    mcnemar,
    minimum_detectable,
    paired_bootstrap,
    seeds_interval,
)


@pytest.mark.parametrize('method', ['percentile', 'bca'])
def test_bootstrap_equals_scipy_draw_for_draw(method):
    x = np.random.default_rng(1).gamma(
        2.0, size=80
    )  # all values differ: drawn by index, as scipy draws
    ours = bootstrap_ci(x, method=method, n_boot=3000, seed=5)
    theirs = stats.bootstrap(
        (x,),
        np.mean,
        n_resamples=3000,
        method=method,
        rng=np.random.default_rng(5),
        vectorized=True,
    )
    assert (ours.low, ours.high) == pytest.approx(tuple(theirs.confidence_interval), rel=2e-3)
    assert ours.se == pytest.approx(theirs.standard_error, rel=1e-9)


def test_counting_resamples_has_the_right_distribution():
    x = (np.random.default_rng(2).random(300) < 0.37).astype(
        float
    )  # two values: drawn as binomial counts
    ours = bootstrap_ci(x, n_boot=40_000)
    q = stats.binom(300, x.mean()).ppf([0.025, 0.975]) / 300
    assert (ours.low, ours.high) == pytest.approx(tuple(q), abs=1 / 300)
    assert ours.se == pytest.approx(x.std() / np.sqrt(300), rel=0.02)


def test_clustered_error_equals_lmms_eval_and_the_cluster_bootstrap():
    import collections
    import math

    rng = np.random.default_rng(3)
    groups = rng.integers(0, 60, 240)
    x = (rng.random(240) < rng.random(60)[groups]).astype(float)
    ref = lmms_functions(
        'api/metrics.py', {'clustered_stderr'}, collections=collections, math=math
    ).clustered_stderr
    assert clustered_se(x, groups) == pytest.approx(ref(x.tolist(), groups.tolist()))
    assert bootstrap_ci(x, groups).se == pytest.approx(clustered_se(x, groups), rel=0.06)
    assert design_effect(x, groups) > 1.3


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from([0.0, 0.3, 0.5, 1.0]), min_size=2, max_size=60), st.integers(1, 9))
def test_interval_contains_the_mean_and_ignores_order(scores, k):
    groups = [i // k for i in range(len(scores))]
    a, b = bootstrap_ci(scores, groups, n_boot=400), bootstrap_ci(scores, n_boot=400)
    for i in (a, b):
        assert i.low - 1e-9 <= i.mean <= i.high + 1e-9 and 0 <= i.low and i.high <= 1
    assert bootstrap_ci(scores[::-1], groups[::-1], n_boot=400).mean == pytest.approx(a.mean)


@pytest.mark.parametrize(
    'method,clustered', [('percentile', False), ('bca', False), ('percentile', True)]
)
def test_coverage(method, clustered):
    rng, hit, trials = np.random.default_rng(4), 0, 400
    for _ in range(trials):
        p = np.repeat(rng.beta(2, 2, 50), 3) if clustered else np.full(150, 0.3)
        x = (rng.random(150) < p).astype(float)
        i = bootstrap_ci(
            x,
            np.repeat(np.arange(50), 3) if clustered else None,
            method=method,
            n_boot=600,
            seed=int(rng.integers(1 << 30)),
        )
        hit += i.low <= (0.5 if clustered else 0.3) <= i.high
    assert 0.91 <= hit / trials <= 0.985, hit / trials


def test_ignoring_clusters_would_be_wrong():
    rng, hit = np.random.default_rng(5), 0
    for _ in range(200):
        x = np.repeat((rng.random(30) < 0.5).astype(float), 6)  # six copies of each answer
        i = bootstrap_ci(x, n_boot=400)
        hit += i.low <= 0.5 <= i.high
    assert hit / 200 < 0.75  # the naive interval misses far too often


def test_paired_p_value_under_no_difference_is_uniform_and_has_power():
    rng, null, real = np.random.default_rng(6), [], []
    for _ in range(200):
        p = rng.uniform(0.2, 0.9, 120)
        a, b, c = ((rng.random(120) < q).astype(float) for q in (p, p, np.clip(p + 0.2, 0, 1)))
        null.append(paired_bootstrap(a, b, n_boot=500, seed=int(rng.integers(1 << 30))).p)
        real.append(paired_bootstrap(c, a, n_boot=500).p)
    assert 0.01 <= np.mean(np.array(null) < 0.05) <= 0.10
    assert np.mean(np.array(real) < 0.05) > 0.75


def test_sign_flip_equals_enumeration():
    d = np.array([0.5, -0.25, 1.0, 0.75, -0.1, 0.3])
    signs = np.array(np.meshgrid(*[[-1, 1]] * 6)).reshape(6, -1)
    exact = np.mean(np.abs(signs.T @ d) >= abs(d.sum()) - 1e-12)
    assert paired_bootstrap(d, np.zeros(6), n_boot=40_000).p == pytest.approx(exact, abs=0.01)


@given(st.integers(0, 30), st.integers(0, 30), st.integers(0, 20))
def test_mcnemar_equals_the_binomial_formula(b, c, same):
    a_scores, b_scores = [1] * b + [0] * c + [1] * same, [0] * b + [1] * c + [1] * same
    if not a_scores:
        return
    m = mcnemar(a_scores, b_scores)
    n, k = b + c, min(b, c)
    want = 1.0 if not n else min(1.0, 2 * stats.binom(n, 0.5).cdf(k)) if b != c else 1.0
    assert (m.only_a, m.only_b) == (b, c) and m.p == pytest.approx(want)


@pytest.mark.parametrize('seeds,spread', [(3, 0.0), (3, 0.04), (5, 0.04), (1, 0.0)])
def test_seed_interval_coverage(seeds, spread):
    rng, hit, trials = np.random.default_rng(7), 0, 300
    for _ in range(trials):
        p = np.repeat(rng.uniform(0.25, 0.85, 80), 2) + rng.normal(0, spread, (seeds, 1))
        x = (rng.random((seeds, 160)) < p).astype(float)
        i = seeds_interval(x, np.repeat(np.arange(80), 2))
        hit += i.low <= 0.55 <= i.high
    assert 0.90 <= hit / trials <= 0.995, hit / trials


def test_one_seed_says_so_and_misses_seed_variance():
    rng, hit = np.random.default_rng(8), 0
    for _ in range(200):
        x = (rng.random((1, 400)) < 0.5 + rng.normal(0, 0.08)).astype(float)
        i = seeds_interval(x)
        hit += i.low <= 0.5 <= i.high
    assert i.method == 'items only (one seed)' and hit / 200 < 0.7


def test_holm_and_power():
    assert holm([0.01, 0.2, 0.03, 0.5]).tolist() == pytest.approx([0.04, 0.4, 0.09, 0.5])
    import math
    from typing import Any  # noqa: F401  (the reference's annotations are dropped)

    ref = lmms_functions('api/metrics.py', {'power_analysis'}, math=math).power_analysis(
        0.03, std_a=0.5, std_b=0.4, correlation=0.6, current_n=900
    )
    sd = math.sqrt(0.5**2 + 0.4**2 - 2 * 0.6 * 0.5 * 0.4)
    assert items_needed(0.03, sd) == ref['min_n']
    assert minimum_detectable(sd / math.sqrt(900)) == pytest.approx(
        ref['min_detectable_effect'], abs=1e-4
    )
    x = (
        np.random.default_rng(9).random((2000, items_needed(0.1, 0.7))) * 0
    )  # the sizes promised by power are kept by simulation
    d = np.random.default_rng(9).choice([-1.0, 0, 1], x.shape, p=[0.195, 0.51, 0.295])
    z = d.mean(1) / (d.std(1, ddof=1) / np.sqrt(d.shape[1]))
    assert np.mean(np.abs(z) > 1.96) == pytest.approx(0.8, abs=0.04)


@pytest.mark.parametrize(
    'bad,match', [([], 'non-empty'), ([[1.0, 2.0]], 'shape'), ([1.0, float('nan')], 'non-finite')]
)
def test_bad_scores_are_named(bad, match):
    with pytest.raises(ValueError, match=match):
        bootstrap_ci(bad)


def test_length_mismatch_is_named():
    with pytest.raises(ValueError, match='3 scores but 2 cluster names'):
        bootstrap_ci([1, 0, 1], ['a', 'b'])
    with pytest.raises(ValueError, match='same items'):
        paired_bootstrap([1, 0], [1])
    with pytest.raises(ValueError, match='one cluster'):
        seeds_interval([[1, 0], [0, 1]], ['a', 'a'])
