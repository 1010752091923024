"""Packing and the loader: nothing split, lost or doubled, nothing leaks, and a resumed run goes on
bit for bit."""

import itertools, json, threading, time
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from vlmbench.data.mixture import EvenlyMixed, Grouped, Shuffled, StatefulSampler
from vlmbench.data.collate import text_limit
from vlmbench.data.packing import (
    BatchLoader,
    Packer,
    best_fit,
    collate_packed,
    collate_padded,
    pack,
    truncate,
)
from vlmbench.data.quarantine import Quarantine, TooManyBadRecords
from vlmbench.data.template import IGNORE, Encoded

quick = settings(max_examples=60, deadline=None)
LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=60)


@dataclass
class Row:
    "A made-up sample: its length, where its image stands (or None) and whether it is broken"

    id: str
    n: int
    image: tuple | None = None
    broken: bool = False


def encode(row, rng=None):
    if row.broken:
        raise ValueError(f'undecodable: {row.id}')
    number = int(row.id)
    ids = torch.arange(row.n) + 1000 * number
    labels, image_ids, images = ids.clone(), torch.full((row.n,), -1), []
    if row.image:
        image_ids[slice(*row.image)], labels[slice(*row.image)] = 0, IGNORE
        h, w = 2 + number % 3, 2 + number % 5
        noise = float(rng.random()) if rng is not None else 0.0
        images = [dict(pixel_values=torch.full((3, h, w), number + 1 + noise), size=(h, w))]
    return Encoded(ids, labels, image_ids, images)


def realistic(n, max_tokens, seed=0):
    """Lengths like LLaVA's mix: most rows 576 image tokens plus a log-normal text, the others text
    with a long tail"""
    rng = np.random.default_rng(seed)
    text = np.clip(rng.lognormal(4.8, 0.9, n), 12, max_tokens)
    return (
        np.minimum(text + np.where(rng.random(n) < 0.85, 576, 0), max_tokens).astype(int).tolist()
    )


# --- the packer
# --------------------------------------------------------------------------------------------------


@quick
@given(st.lists(st.integers(1, 30), max_size=9), st.integers(0, 80))
def test_best_fit_is_the_best_subset(lengths, room):
    lengths = sorted(lengths, reverse=True)
    chosen = best_fit(lengths, room)
    sums = {sum(s) for k in range(len(lengths) + 1) for s in itertools.combinations(lengths, k)}
    assert sum(lengths[i] for i in chosen) == max(s for s in sums if s <= room)
    assert len(set(chosen)) == len(chosen)


@quick
@given(LENGTHS, st.integers(1, 3), st.integers(1, 20), st.integers(40, 90))
def test_no_document_is_split_lost_or_doubled(lengths, rows_per_batch, buffer, max_tokens):
    packer, batches = Packer(max_tokens, rows_per_batch, buffer), []
    for key, n in enumerate(lengths):
        packer.push(key, n)
        while batch := packer.pop():
            batches.append(batch)
    assert all(len(b) == rows_per_batch for b in batches)
    while batch := packer.pop(flush=True):
        batches.append(batch)
    rows = [row for b in batches for row in b]
    assert Counter(k for row in rows for k in row) == Counter(range(len(lengths)))
    assert all(
        0 < sum(lengths[k] for k in row) <= max_tokens and row == sorted(row) for row in rows
    )


@quick
@given(LENGTHS, st.integers(1, 3), st.integers(1, 20), st.data())
def test_a_packer_state_continues_exactly(lengths, rows_per_batch, buffer, data):
    stop = data.draw(st.integers(0, len(lengths)))

    def run(packer, start):
        out = []
        for key in range(start, len(lengths)):
            packer.push(key, lengths[key])
            while batch := packer.pop():
                out.append(batch)
        while batch := packer.pop(flush=True):
            out.append(batch)
        return out

    a, b = Packer(64, rows_per_batch, buffer), Packer(64, rows_per_batch, buffer)
    for key in range(stop):
        a.push(key, lengths[key])
        while a.pop():
            pass
    b.load_state_dict(json.loads(json.dumps(a.state_dict())))
    assert run(b, stop) == run(a, stop)


def test_packer_errors():
    packer = Packer(8)
    for n in (0, 9, -1):
        with pytest.raises(ValueError, match='max_tokens=8'):
            packer.push('x', n)
    for kw in (
        dict(max_tokens=0),
        dict(max_tokens=1, buffer=0),
        dict(max_tokens=1, rows_per_batch=0),
    ):
        with pytest.raises(ValueError, match='expected a positive number'):
            Packer(**kw)
    with pytest.raises(ValueError, match='the state has max_tokens=9'):
        packer.load_state_dict(Packer(9).state_dict())
    with pytest.raises(ValueError, match='version'):
        packer.load_state_dict(dict(packer.state_dict(), version=7))


@pytest.mark.parametrize('max_tokens, seed', [(2048, 0), (2048, 1), (4096, 2)])
def test_a_realistic_mix_fills_95_percent(max_tokens, seed):
    lengths = realistic(3000, max_tokens, seed)
    packer, full = Packer(max_tokens, buffer=64), []
    waited = []
    for key, n in enumerate(lengths):
        packer.push(key, n)
        while batch := packer.pop():
            full += [sum(lengths[k] for k in batch[0])]
            waited.append(key - batch[0][0])
    fill = sum(full) / (max_tokens * len(full))
    assert fill >= 0.95, fill
    assert max(waited) <= 64 * max_tokens / min(lengths)  # the oldest is always taken: none starves
    padded = sum(lengths) / sum(max(lengths[i : i + 8]) * 8 for i in range(0, 3000, 8))
    assert fill > 1.2 * padded


@quick
@given(LENGTHS, st.integers(1, 16))
def test_pack_keeps_documents_whole(lengths, buffer):
    docs = [encode(Row(str(i), n)) for i, n in enumerate(lengths)]
    rows = list(pack(docs, 40, buffer))
    assert sorted(id(d) for row in rows for d in row) == sorted(map(id, docs))
    assert all(sum(d.n_tokens for d in row) <= 40 for row in rows)


def test_packing_is_deterministic():
    docs = [encode(Row(str(i), n)) for i, n in enumerate(realistic(300, 2048))]
    a, b = ([[id(d) for d in row] for row in pack(docs, 2048)] for _ in range(2))
    assert a == b


# --- truncation
# --------------------------------------------------------------------------------------------------


@quick
@given(
    st.integers(1, 30),
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 5)), max_size=4),
    st.integers(0, 60),
)
def test_truncation_never_cuts_inside_an_image(tail, images, limit):
    ids, k = [-1], 0
    for gap, n in images:
        ids += [-1] * gap + [k] * n
        k += 1
    ids = torch.tensor(ids + [-1] * tail)
    doc = Encoded(
        torch.arange(len(ids)), torch.arange(len(ids)), ids, [dict(k=i) for i in range(k)], 'x'
    )
    cut = truncate(doc, limit)
    assert cut.n_tokens <= max(limit, 0) or cut is doc
    assert torch.equal(cut.input_ids, doc.input_ids[: cut.n_tokens])
    for i in range(k):
        assert (cut.image_ids == i).sum() in (0, (ids == i).sum())
    assert len(cut.images) == len(set(cut.image_ids[cut.image_ids >= 0].tolist()))
    if limit < len(ids) and ids[limit] < 0:
        assert cut.n_tokens == limit


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 5)), max_size=4),
    st.integers(0, 20),
    st.integers(1, 20),
)
def test_a_picture_is_one_token_of_the_text_bound(images, tail, bound):
    ids = (
        [-1] + [i for k, (gap, n) in enumerate(images) for i in [-1] * gap + [k] * n] + [-1] * tail
    )
    doc = Encoded(torch.arange(len(ids)), torch.arange(len(ids)), torch.tensor(ids), [])
    words = ids.count(-1) + len(images)
    fit = text_limit(doc, bound, 1000)
    held = ids[:fit]
    assert held.count(-1) + len(set(held) - {-1}) == min(words, bound)
    assert all(held.count(k) in (0, n) for k, (_, n) in enumerate(images))
    assert (fit == len(ids)) == (words <= bound) and text_limit(doc, None, 7) == 7


def test_a_loader_cuts_text_beside_pictures_and_text_alone():
    rows = [Row('0', 40, (1, 31)), Row('1', 40)]  # 11 tokens of text where a picture is one, and 40
    once = StatefulSampler(2, 0, epochs=1)
    data = loader(rows, sampler=once, too_long='truncate', max_text=20, packing=False, batch_rows=1)
    held = {int(b['sample_ids'][0]): int((b['attention_mask'] > 0).sum()) for b in data}
    assert held == {0: 40, 1: 20} and data.counts['truncated'] == 1


# --- the collators
# --------------------------------------------------------------------------------------------------


def documents(batch):
    "The documents of a batch, read back from its tensors: ids, labels, positions, image numbers"
    out = []
    for r in range(len(batch['input_ids'])):
        for k in range(int(batch['document_ids'][r].max()) + 1):
            at = batch['document_ids'][r] == k
            out.append(
                tuple(
                    batch[n][r][at].tolist()
                    for n in ('input_ids', 'labels', 'position_ids', 'image_ids')
                )
            )
    return out


@st.composite
def rows_of_documents(draw):
    rows, number = [], 0
    for _ in range(draw(st.integers(1, 3))):
        row = []
        for _ in range(draw(st.integers(1, 4))):
            n = draw(st.integers(1, 12))
            start = draw(st.integers(0, n - 1))
            image = (start, draw(st.integers(start + 1, n))) if draw(st.booleans()) else None
            row.append(encode(Row(str(number), n, image)))
            row[-1].id, number = str(number), number + 1
        rows.append(row)
    return rows


@quick
@given(rows_of_documents(), st.sampled_from([1, 8]))
def test_packed_batches_hold_each_document_unchanged(rows, multiple):
    batch, n_images, targets = collate_packed(rows, pad_id=7, multiple=multiple), 0, 0
    docs = [d for row in rows for d in row]
    assert batch['input_ids'].shape[1] % multiple == 0 and 'attention_mask' not in batch
    for d, (ids, labels, positions, images) in zip(docs, documents(batch), strict=True):
        assert ids == d.input_ids.tolist() and positions == list(range(d.n_tokens))
        assert labels == [IGNORE, *d.labels.tolist()[1:]]
        assert images == [-1 if i < 0 else i + n_images for i in d.image_ids.tolist()]
        n_images, targets = n_images + len(d.images), targets + d.n_targets
    pad = batch['document_ids'] < 0
    for name, value in dict(input_ids=7, labels=IGNORE, image_ids=-1).items():
        assert (batch[name][pad] == value).all()
    assert batch['n_targets'] == targets == int((batch['labels'] != IGNORE).sum())
    assert batch['sample_ids'] == [d.id for d in docs]
    images = [i for d in docs for i in d.images]
    assert ('pixel_values' in batch) == ('image_sizes' in batch) == bool(images)
    for got, (h, w), i in zip(
        batch.get('pixel_values', ()), batch.get('image_sizes', ()), images, strict=True
    ):
        assert torch.equal(got[:, :h, :w], i['pixel_values'])
        assert got.count_nonzero() == i['pixel_values'].count_nonzero()


@quick
@given(rows_of_documents(), st.sampled_from(['left', 'right']))
def test_padded_batches_hold_each_document_unchanged(rows, side):
    docs = [d for row in rows for d in row]
    batch = collate_padded(docs, pad_id=7, side=side)
    assert torch.equal(batch['attention_mask'], (batch['document_ids'] >= 0).long())
    for r, (d, (ids, labels, positions, _)) in enumerate(zip(docs, documents(batch), strict=True)):
        assert ids == d.input_ids.tolist() and labels == [IGNORE, *d.labels.tolist()[1:]]
        assert positions == list(range(d.n_tokens))
        assert batch['attention_mask'][r][-1 if side == 'left' else 0] == 1
    packed = collate_packed([[d] for d in docs], pad_id=7)
    if side == 'right':
        assert all(torch.equal(packed[k], batch[k]) for k in packed if torch.is_tensor(packed[k]))


def test_a_batch_of_only_text_has_no_pixels():
    batch = collate_packed([[encode(Row('1', 3))]], pad_id=0)
    assert set(batch) == {
        'input_ids',
        'labels',
        'position_ids',
        'document_ids',
        'image_ids',
        'sample_ids',
        'n_targets',
    }
    assert all(batch[k].dtype == torch.long for k in batch if torch.is_tensor(batch[k]))


def test_collator_errors():
    for f in (collate_packed, collate_padded):
        with pytest.raises(ValueError, match='no documents'):
            f([], pad_id=0)
    doc = encode(Row('1', 5))
    with pytest.raises(ValueError, match='more than length=4'):
        collate_packed([[doc]], 0, length=4)
    with pytest.raises(ValueError, match='more than length=4'):
        collate_padded([doc], 0, length=4)
    with pytest.raises(ValueError, match="side='middle'"):
        collate_padded([doc], 0, side='middle')
    for batch in (collate_padded([doc], 0, length=9), collate_packed([[doc]], 0, 9)):
        assert batch['labels'].shape == (1, 9)
    seen, unseen = encode(Row('1', 5, (1, 3))), encode(Row('2', 5, (1, 3)))
    unseen.images, unseen.id = [], 'blind'
    with pytest.raises(ValueError, match="document 'blind' has tokens of 1 images but 0 pictures"):
        collate_packed([[seen, unseen]], 0)
    assert (
        collate_packed([[unseen, unseen]], 0)['image_ids'].max() == 1
    )  # without any pixels, for masks alone


# --- the loader
# --------------------------------------------------------------------------------------------------


def table(n=60, seed=0, broken=0.0, images=0.5, longest=30):
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        size = int(rng.integers(4, longest + 1))
        image = (1, int(rng.integers(2, size - 1))) if rng.random() < images else None
        rows.append(Row(str(i), size, image, rng.random() < broken))
    return rows


def loader(rows=None, seed=3, **kw):
    rows = table() if rows is None else rows
    sampler = kw.pop('sampler', None) or StatefulSampler(len(rows), seed)
    kw = dict(max_tokens=64, batch_rows=2, buffer=10) | kw
    return BatchLoader(rows, kw.pop('encode_fn', encode), sampler, **kw)


def take(loader, n):
    return [b for _, b in zip(range(n), loader)]


def same(a, b):
    return a.keys() == b.keys() and all(
        torch.equal(a[k], b[k]) if torch.is_tensor(a[k]) else a[k] == b[k] for k in a
    )


KINDS = {
    'packed': {},
    'fixed': dict(fixed_length=True),
    'padded': dict(packing=False, batch_rows=4),
    'budget': dict(packing=False, batch_rows=16, batch_tokens=96),
    'left': dict(packing=False, side='left'),
}


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('ahead', [dict(), dict(prefetch=3), dict(prefetch=2, workers=3)], ids=str)
def test_resume_is_bit_exact_after_every_batch(kind, ahead):
    rows, kw = table(broken=0.1), KINDS[kind] | dict(rng_seed=5)
    whole = take(loader(rows, **kw), 12)
    assert len(whole) == 12
    first = loader(rows, **kw, **ahead, quarantine=Quarantine(cap=0.9))
    counts = []
    for k, batch in zip(range(8), first):
        assert same(batch, whole[k])
        state = json.loads(json.dumps(first.state_dict()))
        assert len(json.dumps(state['waiting'])) < 800
        second = loader(rows, **kw, quarantine=Quarantine(cap=0.9))
        second.load_state_dict(state)
        for other, want in zip(second, whole[k + 1 : k + 3]):
            assert same(other, want)
        counts.append(state['counts'])
    assert all(a['documents'] < b['documents'] for a, b in zip(counts, counts[1:]))
    assert (
        kind in ('padded', 'left', 'budget') or state['waiting']
    )  # packed: the buffer is half full


@pytest.mark.parametrize('kw', [dict(), dict(prefetch=4), dict(prefetch=2, workers=2)])
def test_counts_and_quarantine_follow_what_was_taken(kw):
    rows = table(broken=0.15)
    plain, ahead = (loader(rows, quarantine=Quarantine(cap=0.9), **k) for k in ({}, kw))
    for _, a, b in zip(range(6), plain, ahead):
        time.sleep(0.01)  # lets the thread run ahead
        assert (
            plain.counts == ahead.counts
            and plain.quarantine.to_dict() == ahead.quarantine.to_dict()
        )
    kept = plain.quarantine
    assert plain.counts['bad'] == kept.n_bad_drawn >= kept.n_bad > 0 and kept.n_seen == len(rows)
    assert (
        kept.n_drawn == plain.counts['documents'] + plain.counts['bad']
        or plain.state_dict()['waiting']
    )
    assert kept.summary() == {'undecodable': kept.n_bad}


def test_resumed_quarantine_counts_nothing_twice():
    rows = table(broken=0.15)
    whole, half = (
        loader(rows, quarantine=Quarantine(cap=0.9)),
        loader(rows, quarantine=Quarantine(cap=0.9), prefetch=3),
    )
    take(whole, 10), take(half, 4)
    rest = loader(rows, quarantine=Quarantine(cap=0.9))
    rest.load_state_dict(half.state_dict())
    take(rest, 6)
    assert rest.counts == whole.counts and rest.quarantine.to_dict() == whole.quarantine.to_dict()


def test_every_sample_is_drawn_once_an_epoch():
    for kw in KINDS.values():
        rows = table(50)
        batches = list(loader(rows, sampler=StatefulSampler(50, 1, epochs=2), **kw))
        assert Counter(i for b in batches for i in b['sample_ids']) == Counter(
            {str(i): 2 for i in range(50)}
        )


def test_bad_samples_are_replaced_or_skipped():
    rows = table(200, broken=0.1)
    good = sum(not r.broken for r in rows)
    for on_bad, want in (('replace', 200), ('skip', good)):
        data = loader(
            rows,
            sampler=StatefulSampler(200, 1, epochs=1),
            on_bad=on_bad,
            quarantine=Quarantine(cap=0.5),
        )
        drawn = [i for b in data for i in b['sample_ids']]
        assert len(drawn) == want == data.counts['documents'] and not {
            i for i in drawn if rows[int(i)].broken
        }
        assert (
            data.counts['bad'] == data.quarantine.n_bad_drawn >= data.quarantine.n_bad == 200 - good
        )
        listed = {r['id'] for r in data.quarantine.records}
        assert listed == {r.id for r in rows if r.broken}
    with pytest.raises(ValueError, match=r'sample \d+ \(id .*undecodable'):
        list(loader(rows, on_bad='error'))


def test_trailing_bad_samples_are_counted():
    rows = [Row('0', 5), Row('1', 5), Row('2', 5, broken=True), Row('3', 5, broken=True)]
    once = StatefulSampler(4, shuffle=False, epochs=1)
    data = loader(rows, sampler=once, on_bad='skip', quarantine=Quarantine(cap=1.0))
    assert len(list(data)) == 1 and data.counts['bad'] == 2 == data.quarantine.n_bad


def test_the_cap_stops_a_run():
    with pytest.raises(TooManyBadRecords, match='undecodable'):
        for _ in zip(
            range(500), loader(table(300, broken=0.3), quarantine=Quarantine(cap=0.05), prefetch=2)
        ):
            pass
    with pytest.raises(ValueError, match='100 samples in a row are bad'):
        take(loader(table(5, broken=1.1)), 1)


def test_samples_without_targets_are_bad():
    def mute(row, rng=None):
        e = encode(row)
        if int(row.id) % 4 == 0:
            e.labels[1:] = IGNORE  # nothing predicts the first token
        return e

    data = loader(sampler=StatefulSampler(60, 0, epochs=1), encode_fn=mute)
    drawn = {int(i) for b in data for i in b['sample_ids']}
    assert all(i % 4 for i in drawn) and data.counts['bad'] >= 15
    data = loader(sampler=StatefulSampler(60, 0, epochs=1), encode_fn=mute, require_targets=False)
    assert sum(len(b['sample_ids']) for b in data) == 60 and not data.counts['bad']


def test_too_long_documents_follow_the_policy():
    rows = table(80, longest=50)
    long = {r.id for r in rows if r.n > 32}
    kw = dict(max_tokens=32, buffer=6)
    with pytest.raises(ValueError, match=r'too long: \d+ tokens, max_tokens=32. Raise max_tokens'):
        take(loader(rows, **kw), 50)
    for policy in ('truncate', 'skip'):
        once = StatefulSampler(80, 1, epochs=1)
        data = loader(rows, sampler=once, too_long=policy, quarantine=Quarantine(cap=0.9), **kw)
        drawn = [i for b in data for i in b['sample_ids']]
        assert len(drawn) == 80
        if policy == 'skip':
            assert not long & set(drawn) and data.counts['bad'] >= len(long)
        else:
            assert data.counts['truncated'] >= len(long & set(drawn)) > 0


def test_random_encoding_is_fixed_by_the_draw():
    rows = table(40, images=1.0)
    a, b, c = (loader(rows, rng_seed=s) for s in (1, 1, 2))
    a, b, c = (take(l, 6) for l in (a, b, c))
    assert all(map(same, a, b))
    assert all(torch.equal(x['input_ids'], y['input_ids']) for x, y in zip(a, c))
    assert not torch.equal(a[0]['pixel_values'], c[0]['pixel_values'])
    stream = take(loader(rows, rng_seed=1), 40)  # another epoch, another draw: other noise
    seen = Counter(float(v) for batch in stream for v in batch['pixel_values'][:, 0, 0, 0])
    assert max(seen.values()) == 1


def test_a_changed_encoder_is_noticed_on_resume():
    data = loader()
    take(data, 3)

    def longer(row):
        e = encode(row)
        return Encoded(
            torch.cat([e.input_ids, e.input_ids[:1]]),
            torch.cat([e.labels, e.labels[:1]]),
            torch.cat([e.image_ids, e.image_ids[:1] * 0 - 1]),
            e.images,
        )

    other = loader(encode_fn=longer)
    other.load_state_dict(data.state_dict())
    with pytest.raises(ValueError, match='samples or encode_fn changed'):
        take(other, 1)


@pytest.mark.parametrize(
    'kw',
    [
        dict(max_tokens=65),
        dict(batch_rows=3),
        dict(buffer=11),
        dict(packing=False),
        dict(seed=4),
        dict(too_long='skip'),
        dict(on_bad='skip'),
        dict(rng_seed=1),
        dict(rows=table(61)),
    ],
    ids=lambda kw: next(iter(kw)),
)
def test_a_state_of_other_settings_is_refused(kw):
    with pytest.raises(ValueError, match='the state has'):
        loader(**kw).load_state_dict(loader().state_dict())


def test_settings_are_checked():
    for kw, reason in (
        (dict(too_long='cut'), "too_long='cut'"),
        (dict(on_bad='ignore'), "on_bad='ignore'"),
        (dict(side='up'), "side='up'"),
        (dict(batch_tokens=64), 'packing=False'),
        (dict(batch_tokens=8, packing=False), 'at least max_tokens'),
        (dict(batch_rows=0), 'batch_rows=0'),
        (dict(prefetch=-1), 'prefetch=-1'),
    ):
        with pytest.raises(ValueError, match=reason):
            loader(**kw)


@quick
@given(st.integers(1, 9), st.integers(32, 200), st.integers(0, 3))
def test_padded_batches_keep_the_token_budget(batch_rows, batch_tokens, seed):
    data = loader(
        seed=seed,
        packing=False,
        max_tokens=32,
        batch_rows=batch_rows,
        batch_tokens=batch_tokens,
        sampler=StatefulSampler(60, seed, epochs=1),
    )
    shapes = [tuple(b['input_ids'].shape) for b in data]
    assert (
        all(r <= batch_rows and r * t <= batch_tokens for r, t in shapes)
        and sum(r for r, _ in shapes) == 60
    )


def test_length_grouped_padding_is_fuller():
    rows = table(512, longest=30)
    orders = dict(grouped=Grouped(Shuffled(512), tuple(r.n for r in rows), 64), shuffled=512)
    fill = {}
    for name, order in orders.items():
        data = loader(
            rows,
            sampler=StatefulSampler(order, 0, epochs=1),
            packing=False,
            batch_rows=8,
            multiple=1,
        )
        for _ in data:
            pass
        fill[name] = data.fill
    assert fill['grouped'] > 0.9 > 0.7 > fill['shuffled']


def test_ranks_share_an_epoch():
    rows = table(64)
    drawn = []
    for rank in range(2):
        sampler = StatefulSampler(EvenlyMixed((40, 24), (40, 24)), 2, epochs=1, rank=rank, ranks=2)
        drawn += [i for b in loader(rows, sampler=sampler) for i in b['sample_ids']]
    assert sorted(map(int, drawn)) == list(range(64))


def test_a_finite_stream_can_be_walked_again():
    data = loader(sampler=StatefulSampler(60, 1, epochs=1), prefetch=2)
    a, b = list(data), list(data)
    assert len(a) == len(b) and all(map(same, a, b))


def test_one_iteration_at_a_time():
    data = loader()
    first, second = iter(data), iter(data)
    next(first), next(second)
    with pytest.raises(RuntimeError, match='another iteration'):
        next(first)


def test_a_programming_error_is_not_taken_for_a_bad_sample():
    def buggy(row):
        raise TypeError('wrong argument')

    for prefetch in (0, 2):
        with pytest.raises(TypeError, match='wrong argument'):
            take(loader(encode_fn=buggy, prefetch=prefetch), 1)


def test_threads_end_with_the_iteration():
    names = lambda: [t for t in threading.enumerate() if t.name.startswith('vlmbench')]
    data = loader(prefetch=2, workers=2)
    stream = iter(data)
    next(stream)
    assert names()
    stream.close()
    assert not names()


def test_waiting_time_is_measured():
    def slow(row):
        time.sleep(0.004)
        return encode(row)

    data = loader(encode_fn=slow, buffer=4)
    take(data, 6)
    assert data.wait_seconds > 0.004 * data.counts['documents']


def test_batches_are_made_ahead():
    calls = []

    def noted(row):
        calls.append(row.id)
        return encode(row)

    take(loader(encode_fn=noted), 1)
    inline = len(calls)
    stream = iter(loader(encode_fn=noted, prefetch=3))
    next(stream)
    patience = time.monotonic() + 30
    while len(calls) < 2 * inline + 5 and time.monotonic() < patience:
        time.sleep(0.01)
    assert len(calls) >= 2 * inline + 5
    stream.close()


def test_truncated_rows_are_noted():
    from vlmbench.data.quarantine import Quarantine

    noted, rows = Quarantine(), table()
    cut = loader(rows, quarantine=noted, too_long='truncate', max_tokens=8)
    next(iter(cut))
    assert cut.counts['truncated'] > 0 and noted.notes == {
        'truncated to max_tokens': cut.counts['truncated']
    }


@pytest.mark.parametrize(
    'turns, want',
    [
        ([(3, 2)], 5),
        ([(3, 4), (2, 3)], 7),
        ([(2, 3), (1, 2), (6, 9)], 8),
        ([(4, 20)], 10),
        ([(30, 2)], 10),
    ],
)
def test_whole_later_turns_are_dropped(turns, want):
    """`too_long='turns'`: an answer never ends in the middle; only a first turn is cut, and closed
    by the document's end token."""
    labels = [t for p, a in turns for t in (*[IGNORE] * p, *range(1, a), 99)]
    doc = Encoded(
        torch.tensor(labels).clamp(min=0), torch.tensor(labels), torch.full((len(labels),), -1)
    )
    data = BatchLoader(
        [0], lambda _: doc, StatefulSampler(1, epochs=1), 10, packing=False, too_long='turns'
    )
    batch = next(iter(data))
    got = batch['labels'][batch['document_ids'] >= 0].tolist()
    assert len(got) == want and got[-1] == 99 and got[:-1] == labels[: want - 1]
    assert data.counts['truncated'] == (len(labels) > 10)
    plain = truncate(doc, 10).labels.tolist()
    assert (plain == got) == (len(labels) <= 10)
    with pytest.raises(ValueError, match="how='half': expected"):
        truncate(doc, 10, 'half')
