"""The shape of a packed batch: nothing is lost, nothing grows, and what can be full is full."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmbench.data.mixture import StatefulSampler
from vlmbench.data.packing import BatchLoader
from vlmbench.data.shape import FULL, LONGEST, full_rows, rows_of
from vlmbench.data.template import Encoded


def document(n, number):
    ids = torch.arange(1, n + 1)
    return Encoded(ids, ids.clone(), torch.full((n,), -1), [], str(number))


lengths = st.lists(st.integers(1, 64), min_size=1, max_size=80)


@given(lengths, st.integers(64, 200))
def test_best_fit_decreasing_loses_nothing(documents, length):
    rows = rows_of(documents, length)
    assert sorted(number for row in rows for number in row) == list(range(len(documents)))
    held = [sum(documents[number] for number in row) for row in rows]
    assert max(held) <= length
    # two rows that fit into one would not have been opened
    assert len(held) < 2 or min(a + b for a, b in zip(sorted(held), sorted(held)[1:])) > length


@settings(deadline=None)
@given(lengths, st.integers(1, 16))
def test_a_shape_holds_the_same_documents_in_no_more_positions(documents, multiple):
    packed = [[documents[number] for number in row] for row in rows_of(documents, 96)]
    flat = [n for row in packed for n in row]
    rows, length = full_rows(packed, 96, multiple)
    assert sorted(number for row in rows for number in row) == list(range(len(flat)))
    assert max(sum(flat[number] for number in row) for row in rows) <= length
    assert length <= LONGEST * 96
    longest = max(map(sum, packed))
    before = len(packed) * min(-(-longest // multiple) * multiple, 96)
    assert len(rows) * length <= before
    # rows already in order of their first document, and documents in order of arrival
    assert rows == sorted(sorted(row) for row in rows)


@pytest.mark.parametrize(
    'median, spread, max_tokens, rows',
    # the embedded world; a published scale; short documents; long tails
    [(127, 20, 192, 24), (700, 150, 2048, 8), (40, 10, 192, 12), (90, 60, 256, 16)],
)
def test_batches_are_full_where_their_documents_allow_it(median, spread, max_tokens, rows):
    random = torch.Generator().manual_seed(0)
    drawn = torch.randn(4000, generator=random) * spread + median
    documents = drawn.round().clamp(4, max_tokens).int().tolist()
    loader = BatchLoader(
        [document(n, k) for k, n in enumerate(documents)],
        lambda one: one,
        StatefulSampler(len(documents), seed=0),
        max_tokens,
        rows,
        min_fill=FULL,
    )
    fills = []
    for _, batch in zip(range(20), loader):
        fills.append(float((batch['document_ids'] >= 0).float().mean()))
    assert min(fills) >= FULL


def test_a_step_keeps_its_samples_and_its_state():
    def loader(**kw):
        samples = [document(20 + 7 * k % 41, k) for k in range(90)]
        return BatchLoader(
            samples, lambda one: one, StatefulSampler(90, seed=3), 64, 6, buffer=16, **kw
        )

    plain, filled = loader(), loader(min_fill=FULL)
    for _, before, after in zip(range(12), plain, filled):
        assert sorted(before['sample_ids']) == sorted(after['sample_ids'])
        assert before['n_targets'] == after['n_targets']
        assert after['input_ids'].numel() <= before['input_ids'].numel()
    state = plain.state_dict()
    assert {**state, 'counts': None} == {**filled.state_dict(), 'counts': None}
    assert filled.fill > plain.fill
    # the state of one leads the other to the same batches
    resumed = loader(min_fill=FULL)
    resumed.load_state_dict(state)
    assert next(iter(resumed))['sample_ids'] == next(iter(filled))['sample_ids']


def test_a_share_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match='min_fill=95'):
        BatchLoader([], None, StatefulSampler(1), 64, min_fill=95)
