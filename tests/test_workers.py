"""Worker processes: the batches of one process in the same order, an exact resume, counts in the
parent, and an error that names a worker which died."""

import json, os, signal, threading, time

import pytest
import torch

from vlmbench.data.mixture import StatefulSampler
from vlmbench.data.packing import BatchLoader
from vlmbench.data.quarantine import Quarantine
from vlmbench.data.record import Records
from vlmbench.data.template import Encoded
from vlmbench.data.workers import Workers

TALK = [{'from': 'human', 'value': 'What?'}, {'from': 'gpt', 'value': 'That.'}]


def encode(number, rng=None):
    if number % 11 == 5:
        raise ValueError(f'undecodable: {number}')
    ids = torch.arange(3 + number % 17) + 1000 * number
    noise = 0.0 if rng is None else float(rng.random())
    image = torch.full((3, 4, 4), number + noise, dtype=torch.float32)
    image_ids = torch.full_like(ids, -1)
    image_ids[0] = 0
    labels = ids.clone()
    labels[0] = -100
    return Encoded(ids, labels, image_ids, [dict(pixel_values=image, size=(4, 4))], str(number))


def loader(encode_fn=encode, samples=range(60), **kw):
    kw = dict(max_tokens=64, batch_rows=2, buffer=8, rng_seed=3) | kw
    kw.setdefault('quarantine', Quarantine(cap=0.9))
    return BatchLoader(samples, encode_fn, StatefulSampler(len(samples), seed=1), **kw)


def take(data, n):
    batches = iter(data)
    got = [next(batches) for _ in range(n)]
    batches.close()
    return got


def same(a, b):
    return a.keys() == b.keys() and all(
        torch.equal(a[k], b[k]) if torch.is_tensor(a[k]) else repr(a[k]) == repr(b[k]) for k in a
    )


AHEAD = [dict(processes=1), dict(processes=2), dict(processes=3, prefetch=2)]


@pytest.mark.parametrize('kw', [*AHEAD, dict(processes=2, packing=False)], ids=str)
def test_batches_and_counts_are_those_of_one_process(kw):
    plain = loader(**{k: v for k, v in kw.items() if k == 'packing'})
    ahead = loader(**kw)
    for a, b in zip(take(plain, 12), take(ahead, 12), strict=True):
        assert same(a, b)
    assert plain.counts == ahead.counts and plain.counts['bad']
    assert plain.quarantine.to_dict() == ahead.quarantine.to_dict()
    assert plain.state_dict() == ahead.state_dict()


@pytest.mark.parametrize('kw', AHEAD, ids=str)
def test_a_resume_is_exact_whatever_the_number_of_workers(kw):
    whole, first = take(loader(), 12), loader(**kw)
    take(first, 5)
    state = json.loads(json.dumps(first.state_dict()))
    for other in ({}, dict(processes=2, prefetch=3)):
        second = loader(**other)
        second.load_state_dict(state)
        assert all(map(same, take(second, 7), whole[5:]))


def test_a_finite_stream_ends_and_begins_again():
    sampler = StatefulSampler(20, seed=1, epochs=1)
    data = BatchLoader(range(20), encode, sampler, 64, processes=2, prefetch=1)
    lengths = [len(list(data)), len(list(data))]
    assert lengths[0] == lengths[1] > 0


@pytest.mark.parametrize('prefetch', [0, 2])
def test_a_worker_that_dies_is_named(prefetch):
    def fatal(number, rng=None):
        if number == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        return encode(number, rng)

    with pytest.raises(RuntimeError, match=r'worker \d \(process \d+\) died with exit code -9'):
        take(loader(fatal, processes=2, prefetch=prefetch), 40)


class Odd(ValueError):
    "An exception that cannot be sent: it takes two arguments and keeps one."

    def __init__(self, number, reason):
        super().__init__(f'{number} {reason}')


def test_errors_reach_the_one_who_takes_the_batches():
    def odd(number, rng=None):
        raise Odd(number, 'is odd')

    with pytest.raises(RuntimeError, match=r'Odd: \d+ is odd'):
        take(loader(odd, errors=(KeyError,), processes=2), 1)
    with pytest.raises(ValueError, match=r'sample \d+ \(id .*undecodable'):
        take(loader(on_bad='error', processes=2, prefetch=2), 20)
    for wrong in (dict(processes=-1), dict(processes=2, workers=2)):
        with pytest.raises(ValueError, match='processes='):
            loader(**wrong)


def test_notes_of_readers_are_counted_in_the_parent(tmp_path):
    opened = [{'from': 'gpt', 'value': 'Hello.'}, *TALK]  # its first turn is dropped, and noted
    rows = [dict(id=str(i), conversations=opened if i % 3 else TALK) for i in range(12)]
    (tmp_path / 'a.json').write_text(json.dumps(rows))

    def drawn(sample, rng=None):
        return encode(int(sample.id) + 100)

    notes = []
    for kw in ({}, dict(processes=2)):
        q = Quarantine(cap=0.9)
        samples = Records(tmp_path / 'a.json', quarantine=q)
        once = StatefulSampler(12, seed=1, epochs=2)
        assert list(BatchLoader(samples, drawn, once, 64, quarantine=q, **kw))
        notes.append(q.notes)
    assert notes[0] == notes[1] == {'dropped leading assistant turn': 8}


def test_workers_end_with_the_iteration_and_ignore_the_signals_of_a_job():
    workers = Workers(abs, 2)
    for process in workers.processes:
        time.sleep(0.3)
        os.kill(process.pid, signal.SIGTERM)
    assert list(workers.map([-1, -2, -3])) == [1, 2, 3]
    workers.close()
    assert not any(process.is_alive() for process in workers.processes)
    before = threading.active_count()
    take(loader(processes=2, prefetch=4), 2)  # left while both are at work
    assert threading.active_count() == before
