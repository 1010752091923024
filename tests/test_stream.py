"""Rows read while they are needed: the same on any number of ranks, and after a resume."""

import io, json, os

import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from warm_kernels import vlmbench

from vlmbench.data.mixture import StatefulSampler
from vlmbench.data.packing import BatchLoader
from vlmbench.data.quarantine import Quarantine, TooManyBadRecords
from vlmbench.data.sources import DataError, open_stage_data, open_streamed, picture_share
from vlmbench.data.stream import StreamError
from vlmbench.data.template import Encoded
from vlmbench.train.elastic import redeal
from vlmbench.train.metrics import read_metrics

NAME = 'stream:hub:Org/Captions'
SHARDS, ROWS = 5, 9
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def png(number):
    data = io.BytesIO()
    Image.new('RGB', (8, 6), (number % 256, 0, 0)).save(data, 'PNG')
    return data.getvalue()


def write_shards(folder, blind=(), shards=SHARDS, rows=ROWS):
    "Parquet shards as the Hub has them, the pictures inside; rows in `blind` have none."
    folder.mkdir(parents=True)
    for shard in range(shards):
        table = []
        for i in range(rows):
            number = shard * rows + i
            talk = [
                {'from': 'human', 'value': 'Describe.'},
                {'from': 'gpt', 'value': 'a red circle ' * (1 + number % 4)},
            ]
            picture = None if number in blind else dict(bytes=png(number), path=None)
            table.append(dict(id=f'{number}', image=picture, conversations=json.dumps(talk)))
        path = folder / f'train-{shard:05d}-of-{shards:05d}.parquet'
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), path, row_group_size=4)


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    "A folder in which the name `Org/Captions` is found without a network."
    monkeypatch.chdir(tmp_path)
    write_shards(tmp_path / 'Org' / 'Captions')
    return tmp_path


def stream(folder, seed=1, buffer=12, quarantine=None):
    return open_streamed(folder, NAME, quarantine, seed=seed, buffer=buffer)


def encode(sample):
    ids = torch.arange(3 + len(sample.turns[1].text.split()))
    labels = ids.clone()
    labels[0] = -100
    return Encoded(ids, labels, torch.full_like(ids, -1), [], sample.id)


def loader(samples, rank=0, ranks=1, **kw):
    kw = dict(max_tokens=32, batch_rows=1, buffer=8) | kw
    kw.setdefault('quarantine', Quarantine(cap=0.9))
    sampler = StatefulSampler(samples.order, seed=1, rank=rank, ranks=ranks)
    return BatchLoader(samples, encode, sampler, **kw)


def ids(batches, n):
    batches = iter(batches)
    got = [next(batches)['sample_ids'] for _ in range(n)]
    batches.close()
    return [list(map(str, one)) for one in got]


def test_two_ranks_draw_what_one_draws(place):
    alone = stream(place)
    drawn = [alone[draw].id for draw in range(100)]
    for ranks in (2, 4):
        dealt = [None] * 100
        for rank in range(ranks):
            own = stream(place)
            sampler = StatefulSampler(own.order, rank=rank, ranks=ranks)
            for k in range(100 // ranks):
                dealt[sampler.draw(k)] = own[sampler.at(k)].id
        assert dealt == drawn
    assert set(drawn) == set(map(str, range(SHARDS * ROWS)))
    assert drawn[:20] != sorted(drawn[:20], key=int)
    assert [stream(place, seed=2)[draw].id for draw in range(100)] != drawn


def test_a_rank_opens_shards_of_its_own(place):
    "4 streams over 5 shards: of two ranks the first reads streams 0 and 2, the second 1 and 3."
    shards = []
    for rank in (0, 1):
        own = stream(place)
        rows = [own.row(draw) for draw in range(rank, 80, 2)]
        shards.append({row.shard for row in rows})
    assert shards == [{0, 2, 4}, {1, 3}]


@pytest.mark.parametrize('kw', [{}, dict(prefetch=2), dict(processes=2, prefetch=2)], ids=str)
def test_a_resume_draws_what_an_uninterrupted_loader_draws(place, kw):
    whole = ids(loader(stream(place)), 30)
    first = loader(stream(place), **kw)
    assert ids(first, 11) == whole[:11]
    state = json.loads(json.dumps(first.state_dict()))
    assert state['stream'], 'nothing says where the streams stand'
    second = loader(stream(place), **kw)
    second.load_state_dict(state)
    assert ids(second, 19) == whole[11:]
    with pytest.raises(ValueError, match='belongs to'):
        loader(stream(place, buffer=20)).load_state_dict(state)


def test_a_resume_skips_into_a_shard_and_reads_none_before_it(place, monkeypatch):
    first = loader(stream(place))
    ids(first, 12)
    state = first.state_dict()
    later = stream(place)
    second = loader(later)
    second.load_state_dict(state)
    for one in later.streams:
        assert one.mark_before(10**6).block > 0
    opened = []
    shard = type(later.data).shard
    monkeypatch.setattr(
        type(later.data), 'shard', lambda *a, **kw: opened.append(kw) or shard(*a, **kw)
    )
    ids(second, 1)
    assert 0 < len(opened) <= 2 * len(later.streams)


def test_two_ranks_go_on_as_one(place):
    ranks = [loader(stream(place), rank, 2) for rank in (0, 1)]
    before = [one for each in ranks for ids_ in ids(each, 5) for one in ids_]
    states = [json.loads(json.dumps(each.state_dict())) for each in ranks]
    alone = loader(stream(place))
    redeal(alone, states, 0, 1)
    after = [one for ids_ in ids(alone, 10) for one in ids_]
    samples = stream(place)
    drawn = [samples[draw].id for draw in range(len(before) + len(after) + 8)]
    left = list(drawn)
    for one in before + after:
        left.remove(one)
    assert len(left) == 8


def test_rows_without_their_picture_are_listed_and_replaced(tmp_path, monkeypatch):
    blind = {0, 7, 20, 33}
    write_shards(tmp_path / 'Hon-Wong' / 'VoRA-Recap-8M', blind)
    name = 'stream:hub:Hon-Wong/VoRA-Recap-8M'
    bad = Quarantine(cap=0.5)
    data = open_stage_data(tmp_path, name, quarantine=bad, seed=3, stream_buffer=8)
    first = ids(loader(data.samples, quarantine=bad), 40)
    assert not blind & {int(one) for batch in first for one in batch}
    assert bad.n_bad >= 4 and set(bad.summary()) == {'no picture'}
    assert 'VoRA-Recap-8M shard' in bad.records[0]['reason']
    strict = Quarantine(cap=0.01)
    with pytest.raises(TooManyBadRecords):
        ids(loader(open_streamed(tmp_path, name, strict), quarantine=strict), 200)
    assert picture_share(NAME, tmp_path) == 1


def test_what_a_stream_cannot_do_is_said(place):
    (place / 'list.json').write_text('[]')
    with pytest.raises(DataError, match='neither parquet nor JSON lines'):
        open_streamed(place, 'stream:list')
    with pytest.raises(StreamError, match='hub:nobody/nothing cannot be streamed'):
        open_streamed(place, 'stream:hub:nobody/nothing')
    broken = place / 'Org' / 'Captions' / 'train-00001-of-00005.parquet'
    samples = stream(place)
    broken.write_bytes(b'PAR1 no parquet')
    with pytest.raises(StreamError, match='cannot be read on.*goes on from its last checkpoint'):
        [samples[draw] for draw in range(100)]


def run(place, out, *words):
    common = ['recipe=llava', 'stages=["align"]', 'evaluate=false', 'device=cpu', 'streaming=true']
    common += ['data=hub:Org/Captions', 'stream_buffer=16', f'out={out}', *words]
    return vlmbench('run', 'train', *common, cwd=place)


SIZES = ['batch_rows=2', 'accumulation=2', 'max_tokens=192', 'warmup_ratio=0']


def sizes(steps):
    one = [f'stages.align.{size}' for size in (*SIZES, f'steps={steps}', 'schedule=constant')]
    return f'overrides={json.dumps(one)}'


def course(place, out):
    rows = read_metrics(place / out / 'stages' / 'align')
    return list(rows.samples), list(rows.loss)


@pytest.mark.slow
def test_a_run_streams_by_name_and_says_what_it_cannot_count(place):
    refused = run(place, 'r', 'overrides=["stages.align.epochs=1"]')
    assert refused.returncode and 'stages.align.steps=N' in refused.stdout + refused.stderr
    done = run(place, 'whole', sizes(4))
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout[-2000:]
    assert len(course(place, 'whole')[0]) == 4
    manifest = json.loads((place / 'whole' / 'manifest.json').read_text())
    assert manifest['parameters']['data'] == 'hub:Org/Captions'
    recipe = json.loads((place / 'whole' / 'recipe.json').read_text())
    assert recipe['stages'][0]['data'] == NAME


@pytest.mark.ranks
def test_a_run_on_two_ranks_and_a_resumed_one_take_the_same_rows(place):
    done = run(place, 'whole', sizes(8))
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout[-2000:]
    two = run(place, 'two', sizes(8), 'gpus=2')
    assert two.returncode == 0, two.stderr[-2000:] + two.stdout[-2000:]
    samples, loss = course(place, 'whole')
    assert course(place, 'two')[0] == samples and len(set(samples)) == 8
    assert course(place, 'two')[1] == pytest.approx(loss, rel=1e-5)
    first = run(place, 'part', sizes(3), 'gpus=2', 'keep_checkpoints=true')
    assert first.returncode == 0, first.stderr[-2000:]
    manifest = place / 'part' / 'manifest.json'
    manifest.write_text(manifest.read_text().replace('"completed"', '"preempted"'))
    rest = run(place, 'part', sizes(8), 'allow_changed=["stage.steps"]')
    assert rest.returncode == 0, rest.stderr[-2000:] + rest.stdout[-2000:]
    assert course(place, 'part')[0] == samples
    assert course(place, 'part')[1] == pytest.approx(loss, rel=1e-5)
