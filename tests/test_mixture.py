"""Mixing, length groups and the sampler: even spacing, permutations, exact resume, one order for
any number of ranks."""

import json, os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from vlmbench.data.mixture import (
    EvenlyMixed,
    Grouped,
    Mixture,
    Shuffled,
    StatefulSampler,
    interleave_evenly,
    length_groups,
    mixture_draws,
    reshard_state,
)

GOLDEN = Path(os.environ.get('VLMBENCH_GOLDEN', Path(__file__).parent / 'golden'))
quick = settings(max_examples=80, deadline=None)
SIZES = st.lists(st.integers(0, 60), min_size=1, max_size=6).filter(any)


@quick
@given(SIZES)
def test_interleaving_is_even_everywhere(sizes):
    stream = interleave_evenly(sizes)
    assert Counter(stream.tolist()) == {j: n for j, n in enumerate(sizes) if n}
    share, stop = np.array(sizes) / sum(sizes), np.arange(1, len(stream) + 1)
    taken = np.cumsum(stream[:, None] == np.arange(len(sizes)), axis=0)
    ahead = (
        taken - share * stop[:, None]
    )  # one item ahead of its share at most, or its share of K items behind
    assert (ahead <= 1 + 1e-9).all() and (ahead >= -len(sizes) * share - 1e-9).all()


@quick
@given(SIZES)
def test_interleaving_equals_the_greedy_rule(sizes):
    "Independent: always the source with the smallest share of its own taken, the first of several"
    taken, want = [0] * len(sizes), []
    for _ in range(sum(sizes)):
        open_ = [j for j, n in enumerate(sizes) if taken[j] < n]
        j = min(open_, key=lambda j: (taken[j] / sizes[j], j))
        want.append(j)
        taken[j] += 1
    assert interleave_evenly(sizes).tolist() == want


@pytest.mark.parametrize('case', sorted((GOLDEN / 'zero').glob('case_*')), ids=lambda p: p.name)
def test_golden_zero_mix(case):
    mix = json.loads((case / 'mix.json').read_text())
    names = list(mix['fold_sizes'])
    assert [names[j] for j in interleave_evenly(list(mix['fold_sizes'].values()))] == mix[
        'sequence'
    ]


def test_golden_length_groups():
    "LLaVA's layout, ids for ids, from the seed of the reference's generator"
    for path in sorted((GOLDEN / 'eve').glob('common/sampler*.json')):
        ref = json.loads(path.read_text())
        ranks, group = ref['world_size'], ref['world_size'] * ref['batch_size']
        seeded = lambda: torch.Generator().manual_seed(ref['torch_seed'])
        assert length_groups(ref['lengths'], group, seeded(), chunks=ranks) == ref['length_grouped']
        signed = ref['modality_lengths']
        got = length_groups(
            [abs(n) for n in signed], group, seeded(), [n > 0 for n in signed], ranks
        )
        assert got == ref['modality_grouped']
        break
    else:
        pytest.fail('no reference sampler file found')


@quick
@given(
    st.lists(st.integers(1, 500), min_size=1, max_size=80),
    st.integers(1, 12),
    st.integers(0, 5),
    st.data(),
)
def test_length_groups_are_permutations_of_like_lengths(lengths, group, seed, data):
    flags = data.draw(
        st.one_of(st.none(), st.lists(st.booleans(), min_size=len(lengths), max_size=len(lengths)))
    )
    order = length_groups(lengths, group, torch.Generator().manual_seed(seed), flags)
    assert sorted(order) == list(range(len(lengths)))
    full = len(order) // group - (2 if flags and len(set(flags)) == 2 else 0)
    for k in range(full):
        members = order[k * group : (k + 1) * group]
        assert [lengths[i] for i in members] == sorted((lengths[i] for i in members), reverse=True)
        if flags:
            assert len({flags[i] for i in members}) == 1


def test_length_groups_save_padding():
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(5, 0.8, 4096).astype(int) + 1

    def padding(order):
        return 1 - lengths.sum() / sum(
            lengths[order[i : i + 16]].max() * 16 for i in range(0, 4096, 16)
        )

    grouped = np.array(length_groups(lengths.tolist(), 256, torch.Generator().manual_seed(0)))
    assert 2 * padding(grouped) < padding(rng.permutation(4096)) < 0.8


def test_bad_mixture_settings_are_named():
    for kw, reason in (
        (dict(temperature=0), 'temperature=0'),
        (dict(weights=[1]), '1 weights for 2'),
        (dict(caps=[1]), '1 caps for 2'),
        (dict(weights=[-1, 2]), 'expected numbers >= 0'),
        (dict(weights=[0, 0]), 'at least one'),
    ):
        with pytest.raises(ValueError, match=reason):
            mixture_draws([3, 4], **kw)
    with pytest.raises(ValueError, match='source 0 is empty'):
        mixture_draws([0, 4], weights=[1, 1])
    with pytest.raises(ValueError, match='weights names'):
        Mixture({'a': [1]}, weights={'b': 1.0})
    with pytest.raises(ValueError, match='weights lacks'):
        Mixture({'a': [1], 'b': [2]}, weights={'b': 1.0})
    with pytest.raises(ValueError, match='0 or more'):
        interleave_evenly([-1, 2])
    with pytest.raises(ValueError, match='group=0'):
        length_groups([1], 0, torch.Generator())


@quick
@given(st.lists(st.integers(1, 500), min_size=1, max_size=6), st.floats(0.5, 20), st.data())
def test_draws_add_up_and_respect_caps(sizes, temperature, data):
    caps = [data.draw(st.one_of(st.none(), st.integers(0, 600))) for _ in sizes]
    total = data.draw(st.integers(1, 2000))
    draws = mixture_draws(sizes, temperature=temperature, caps=caps, total=total)
    assert all(c is None or d <= c for d, c in zip(draws, caps)) and min(draws) >= 0
    room = sum(10**9 if c is None else c for c in caps)
    assert sum(draws) == min(total, room)
    if not any(c is not None for c in caps) and temperature >= 1:
        rate = [d / s for d, s in zip(draws, sizes)]
        smaller = [
            (i, j) for i in range(len(sizes)) for j in range(len(sizes)) if sizes[i] <= sizes[j]
        ]
        assert all(rate[i] >= rate[j] - 2 / min(sizes) for i, j in smaller)


@quick
@given(
    st.lists(st.tuples(st.integers(1, 12), st.integers(0, 30)), min_size=1, max_size=4),
    st.integers(0, 9),
)
def test_no_sample_comes_twice_before_its_source_is_through(pairs, seed):
    order = EvenlyMixed(tuple(s for s, _ in pairs), tuple(d for _, d in pairs))
    stream, start = np.concatenate([order(seed, e) for e in range(4)]), 0
    for size, draws in pairs:
        own = stream[(stream >= start) & (stream < start + size)]
        assert len(own) == 4 * draws
        for i in range(0, len(own), size):
            assert len(set(own[i : i + size].tolist())) == len(own[i : i + size])
        start += size


# --- the sampler
# --------------------------------------------------------------------------------------------------

ORDERS = st.one_of(
    st.integers(1, 30).map(Shuffled),
    st.integers(1, 30).map(lambda n: Shuffled(n, shuffle=False)),
    SIZES.map(lambda s: EvenlyMixed(tuple(s), tuple(s))),
    st.lists(st.integers(1, 90), min_size=1, max_size=30).map(
        lambda l: Grouped(Shuffled(len(l)), tuple(l), 4)
    ),
)


@quick
@given(ORDERS, st.integers(0, 3), st.integers(1, 5), st.integers(0, 70))
def test_the_global_order_is_the_same_for_any_number_of_ranks(order, seed, ranks, start):
    one = StatefulSampler(order, seed)
    streams = [StatefulSampler(order, seed, rank=r, ranks=ranks) for r in range(ranks)]
    for p in range(start, start + 40):
        assert streams[p % ranks].at(p // ranks) == one.at(p)
    epochs = [one.at(p) for p in range(2 * len(order))]
    assert sorted(epochs[: len(order)]) == sorted(epochs[len(order) :]) == list(range(len(order)))


@quick
@given(ORDERS, st.integers(0, 80), st.integers(1, 3), st.data())
def test_resume_is_exact(order, position, ranks, data):
    rank = data.draw(st.integers(0, ranks - 1))
    a = StatefulSampler(order, 7, rank=rank, ranks=ranks)
    stream = iter(a)
    for _ in range(position):
        next(stream)
    state = json.loads(json.dumps(a.state_dict()))
    rest = [next(stream) for _ in range(50)]
    b = StatefulSampler(order, 7, rank=rank, ranks=ranks)
    b.load_state_dict(state)
    resumed = iter(b)
    assert [next(resumed) for _ in range(50)] == rest
    assert len(json.dumps(state)) < 300


def test_epochs_and_seeds_differ():
    for order in (
        Shuffled(40),
        EvenlyMixed((30, 10), (30, 10)),
        Grouped(Shuffled(40), tuple(range(1, 41)), 4),
    ):
        assert (order(0, 0) == order(0, 0)).all()
        assert (order(0, 0) != order(0, 1)).any() and (order(0, 0) != order(1, 0)).any()
    assert (Shuffled(40, shuffle=False)(0, 0) == Shuffled(40, shuffle=False)(1, 5)).all()


@pytest.mark.parametrize(
    'other, named',
    [
        (dict(seed=2), 'seed'),
        (dict(order=11), 'length'),
        (dict(shuffle=False), 'order'),
        (dict(ranks=2), 'ranks'),
        (dict(rank=1, ranks=4), 'rank'),
        (dict(order=Grouped(Shuffled(10), (1,) * 10, 2)), 'order'),
    ],
)
def test_a_state_of_another_stream_is_refused(other, named):
    state = StatefulSampler(10, 1, rank=0, ranks=4).state_dict()
    settings = dict(order=10, seed=1, rank=0, ranks=4) | other
    with pytest.raises(ValueError, match=f'{named} is .*the state has'):
        StatefulSampler(**settings).load_state_dict(state)
    with pytest.raises(ValueError, match='version'):
        StatefulSampler(10, 1, rank=0, ranks=4).load_state_dict(dict(state, version=0))


@quick
@given(st.integers(1, 30), st.integers(1, 3), st.integers(1, 6))
def test_finite_streams_end_as_asked(n, epochs, ranks):
    def draws(tail):
        return [
            list(StatefulSampler(n, epochs=epochs, rank=r, ranks=ranks, tail=tail))
            for r in range(ranks)
        ]

    everything = Counter({i: epochs for i in range(n)})
    assert sum((Counter(r) for r in draws('uneven')), Counter()) == everything
    for tail in ('drop', 'repeat'):
        assert len({len(r) for r in draws(tail)}) == 1
    drawn = sum((Counter(r) for r in draws('repeat')), Counter())
    assert all(drawn[i] >= epochs for i in range(n)) and drawn.total() < n * epochs + ranks
    assert not sum((Counter(r) for r in draws('drop')), Counter()) - everything


def test_sampler_errors():
    for kw, reason in (
        (dict(order=0), 'no samples'),
        (dict(order=3, rank=2, ranks=2), 'rank=2 ranks=2'),
        (dict(order=3, tail='pad'), "tail='pad'"),
    ):
        with pytest.raises(ValueError, match=reason):
            StatefulSampler(**kw)
    with pytest.raises(TypeError, match='endless'):
        len(StatefulSampler(3))
    with pytest.raises(IndexError, match='outside'):
        StatefulSampler(3, epochs=1).at(3)


@quick
@given(st.integers(1, 4), st.integers(1, 6), st.integers(0, 12))
def test_resharding_keeps_the_global_position(old, new, rounds):
    ranks = [StatefulSampler(13, 3, rank=r, ranks=old) for r in range(old)]
    for s in ranks:
        s.position = rounds * new
    states = reshard_state([s.state_dict() for s in ranks], new)
    one, p = StatefulSampler(13, 3), rounds * new * old
    for r in range(new):
        s = StatefulSampler(13, 3, rank=r, ranks=new)
        s.load_state_dict(states[r])
        assert s.at(s.position) == one.at(p + r)
    if old > 1:
        ranks[0].position += 1
        with pytest.raises(ValueError, match='one position'):
            reshard_state([s.state_dict() for s in ranks], new)


def test_a_mixture_is_one_sequence():
    mix = Mixture({'a': list('xyz'), 'b': [], 'c': list('pq')}, caps={'a': 2})
    assert (
        len(mix) == 5 and [mix[i] for i in range(5)] == list('xyzpq') and mix.locate(3) == ('c', 0)
    )
    assert mix.draws() == {'a': 2, 'b': 0, 'c': 2}
    with pytest.raises(IndexError):
        mix[5]
    with pytest.raises(IndexError):
        mix[-1]
    drawn = [mix[i] for i in StatefulSampler(mix.order, epochs=3)]
    assert Counter(drawn) == Counter({'x': 2, 'y': 2, 'z': 2, 'p': 3, 'q': 3})


def test_substitutes_are_fixed_and_follow_the_mix():
    mix = EvenlyMixed((50, 50), (90, 10))
    a, b = StatefulSampler(mix, 5), StatefulSampler(mix, 5)
    for k in range(20):
        a.at(k)
    picked = [a.substitute(k, attempt) for k in range(400) for attempt in (1, 2)]
    assert picked == [b.substitute(k, attempt) for k in range(400) for attempt in (1, 2)]
    assert 0.85 < np.mean(np.array(picked) < 50) < 0.95
