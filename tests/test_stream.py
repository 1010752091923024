"""Rows read while they are needed: the same on any number of ranks, and after a resume."""

import gzip, io, json, os, subprocess, sys, tarfile

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from warm_kernels import vlmbench

from vlmbench.data.mixture import StatefulSampler
from vlmbench.data.packing import BatchLoader
from vlmbench.data.quarantine import Quarantine, TooManyBadRecords
from vlmbench.data.sources import (
    DataError,
    open_samples,
    open_stage_data,
    open_streamed,
    picture_share,
)
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
    rows = type(later.data).rows
    monkeypatch.setattr(type(later.data), 'rows', lambda *a: opened.append(a) or rows(*a))
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
    datasets.Dataset.from_dict(dict(id=['a'])).save_to_disk(str(place / 'saved'))
    with pytest.raises(DataError, match='neither JSON, a tar nor parquet'):
        open_streamed(place, 'stream:saved')
    cut = place / 'cut.json'
    cut.write_text(json.dumps([written(i) for i in range(9)])[:-40])
    with pytest.raises(StreamError, match=r'row 8 of .*cut\.json: truncated'):
        [open_streamed(place, 'stream:cut')[draw] for draw in range(20)]
    with pytest.raises(StreamError, match='hub:nobody/nothing cannot be streamed'):
        open_streamed(place, 'stream:hub:nobody/nothing')
    broken = place / 'Org' / 'Captions' / 'train-00001-of-00005.parquet'
    samples = stream(place)
    broken.write_bytes(b'PAR1 no parquet')
    with pytest.raises(StreamError, match='cannot be read on.*goes on from its last checkpoint'):
        [samples[draw] for draw in range(100)]


LAYOUTS = ('list', 'lists', 'packed', 'lines', 'tars')
MIXTURE = 'stream:list*2+stream:tars+numbered*0.5'
GONE = {3, 11, 17}  # rows whose picture is not there


def written(number, prefix=''):
    talk = [
        {'from': 'human', 'value': '<image>\nDescribe.'},
        {'from': 'gpt', 'value': 'a red circle ' * (1 + number % 4)},
    ]
    return dict(id=f'{prefix}{number}', image=f'{prefix}{number}.png', conversations=talk)


def write_files(folder, gone=(), rows=45, prefix=''):
    "The same rows as a JSON list, as shards of lists, packed, as lines, and as tars; pictures too."
    every = [written(i, prefix) for i in range(rows)]
    for i, row in enumerate(every):
        row['id'] = row['id'] if i % 3 else i  # as LLaVA's file: text here, a number there
        if i not in gone:
            (folder / row['image']).write_bytes(png(i))
    (folder / 'list.json').write_text(json.dumps(every, indent=1))
    (folder / 'numbered.json').write_text(
        json.dumps([dict(row, id=f'n{i}') for i, row in enumerate(every)])
    )
    for name in ('lists', 'packed', 'lines', 'tars'):
        (folder / name).mkdir()
    for shard in range(5):
        own = range(shard * rows // 5, (shard + 1) * rows // 5)
        part, name = [every[i] for i in own], f'part-{shard}'
        (folder / 'lists' / f'{name}.json').write_text(json.dumps(part))
        (folder / 'packed' / f'{name}.json.gz').write_bytes(
            gzip.compress(json.dumps(part).encode())
        )
        (folder / 'lines' / f'{name}.jsonl').write_text('\n'.join(map(json.dumps, part)))
        with tarfile.open(folder / 'tars' / f'{name}.tar', 'w') as archive:
            for i, row in zip(own, part):
                files = dict(json=json.dumps(row).encode()) | (
                    {} if i in gone else dict(png=png(i))
                )
                for end, data in files.items():
                    member = tarfile.TarInfo(f'{prefix}{i:04}.{end}')
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))


def see(sample):
    "As `encode`, of a sample whose picture is read, too."
    doc = encode(sample)
    assert all(picture.load().size == (8, 6) for picture in sample.images)
    return doc


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp('files')
    write_files(folder, GONE)
    return folder


def drawn_data(folder, data, quarantine=None, seed=1):
    bad = Quarantine(cap=0.9) if quarantine is None else quarantine
    return open_stage_data(folder, data, quarantine=bad, seed=seed, stream_buffer=12)


def data_loader(data, rank=0, ranks=1, **kw):
    sampler = StatefulSampler(data.order, seed=1, rank=rank, ranks=ranks)
    kw = dict(max_tokens=32, batch_rows=1, buffer=8, quarantine=data.quarantine) | kw
    return BatchLoader(data.samples, see, sampler, **kw)


@pytest.mark.parametrize('data', [*(f'stream:{name}' for name in LAYOUTS), MIXTURE])
def test_every_layout_draws_the_same_on_any_ranks(files, data):
    whole = drawn_data(files, data)
    numbers = StatefulSampler(whole.order)
    drawn = [whole.samples[numbers.at(p)].where for p in range(160)]
    for ranks in (2, 4):
        dealt = [None] * 160
        for rank in range(ranks):
            own = drawn_data(files, data)
            sampler = StatefulSampler(own.order, rank=rank, ranks=ranks)
            for k in range(160 // ranks):
                dealt[sampler.draw(k)] = own.samples[sampler.at(k)].where
        assert dealt == drawn
    assert len(set(drawn)) == 45 if data != MIXTURE else len(set(drawn)) > 60
    other = drawn_data(files, data, seed=2)
    assert [other.samples[numbers.at(p)].where for p in range(160)] != drawn


@pytest.mark.parametrize('kw', [{}, dict(processes=2, prefetch=2)], ids=str)
@pytest.mark.parametrize('data', [*(f'stream:{name}' for name in LAYOUTS), MIXTURE])
def test_every_layout_goes_on_where_it_was(files, data, kw):
    "Rows whose picture is not there are listed and replaced, and the same ones after a resume."
    bad = Quarantine(cap=0.9)
    whole = ids(data_loader(drawn_data(files, data, bad)), 40)
    kept = {one for batch in whole for one in batch}
    assert not {str(i) for i in GONE} & kept and len(kept) > 30
    assert 0 < bad.n_bad <= 4 * len(GONE) and bad.n_drawn >= 40
    first = data_loader(drawn_data(files, data), **kw)
    assert ids(first, 13) == whole[:13]
    state = json.loads(json.dumps(first.state_dict()))
    second = data_loader(drawn_data(files, data), **kw)
    second.load_state_dict(state)
    assert ids(second, 27) == whole[13:]


def test_two_ranks_of_a_mixture_go_on_as_one(files):
    ranks = [data_loader(drawn_data(files, MIXTURE), rank, 2) for rank in (0, 1)]
    before = [one for each in ranks for ids_ in ids(each, 60) for one in ids_]
    states = [json.loads(json.dumps(each.state_dict())) for each in ranks]
    assert any(place.startswith('0:') for place in states[0]['stream'])
    alone = data_loader(drawn_data(files, MIXTURE))
    redeal(alone, states, 0, 1)
    after = [one for ids_ in ids(alone, 12) for one in ids_]
    whole = [one for ids_ in ids(data_loader(drawn_data(files, MIXTURE)), 180) for one in ids_]
    left = list(whole)
    for one in before + after:
        left.remove(one)


def test_a_mixture_keeps_its_shares_and_no_layout_loses_rows(files):
    data = drawn_data(files, MIXTURE)
    numbers = StatefulSampler(data.order)
    names = [data.samples[numbers.at(p)].source for p in range(700)]
    shares = [names.count(name) / 700 for name in ('list', 'tars', 'numbered')]
    assert shares == pytest.approx([4 / 7, 2 / 7, 1 / 7], abs=0.01)
    for start in range(0, 660, 20):  # of any 20 neighbours, too
        assert 8 <= names[start : start + 40].count('list') - 12 <= 14


def test_a_line_that_is_no_json_is_a_bad_row(tmp_path):
    talk = [{'from': 'human', 'value': 'q'}, {'from': 'gpt', 'value': 'a b'}]
    rows = [json.dumps(dict(id=str(i), conversations=talk)) for i in range(9)]
    rows[4] = rows[4][:-9]
    (tmp_path / 'lines.jsonl').write_text('\n'.join(rows))
    bad = Quarantine(cap=0.9)
    found = ids(data_loader(drawn_data(tmp_path, 'stream:lines', bad)), 12)
    assert '4' not in {one for batch in found for one in batch}
    assert set(bad.summary()) == {'syntax error'}
    assert 'lines shard 0 row 4' in bad.records[0]['reason']


def test_tars_of_the_hub_are_read_with_their_pictures(tmp_path, monkeypatch):
    "As `datasets` has them: each file of a sample is a column of its own."
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'Org' / 'Tars').mkdir(parents=True)
    for shard in range(2):
        with tarfile.open(tmp_path / 'Org' / 'Tars' / f'train-{shard}.tar', 'w') as archive:
            for i in range(shard, 10, 2):
                for end, data in dict(json=json.dumps(written(i)).encode(), png=png(i)).items():
                    member = tarfile.TarInfo(f'{i:04}.{end}')
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
    streamed = open_streamed(tmp_path, 'stream:hub:Org/Tars', seed=1, buffer=4)
    found = [streamed[draw] for draw in range(10)]
    assert sorted(sample.id for sample in found) == [str(i) for i in range(10)]
    for sample in [*found, *open_samples(tmp_path, 'hub:Org/Tars')]:
        assert sample.images[0].load().getpixel((0, 0)) == (int(sample.id), 0, 0)


MEASURE = """
import sys
from vlmbench.data.sources import open_stage_data
def held():
    lines = open('/proc/self/status').read().splitlines()
    return int(next(line for line in lines if line.startswith('RssAnon')).split()[1])
data = open_stage_data(sys.argv[1], sys.argv[2], seed=1, stream_buffer=64)
numbers, most = data.order(0, 0), 0
for p in range(int(sys.argv[3])):
    data.samples[int(numbers[p])]
    if p == 400:
        before = held()
    if p > 400 and p % 100 == 0:
        most = max(most, held() - before)
print(most)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists('/proc/self/status'), reason='no /proc on this system')
def test_memory_does_not_grow_with_what_was_read(tmp_path):
    "Beyond the first 400 draws a rank takes no more of its own, in kB, for 12,000 of them."
    rows = [dict(written(i), text='x' * 2000) for i in range(6000)]
    (tmp_path / 'list.json').write_text(json.dumps(rows))  # 15 MB
    with tarfile.open(tmp_path / 'pictures.tar', 'w') as archive:  # 60 MB of pictures
        for i in range(3000):
            for end, data in (('png', b'p' * 20_000), ('json', json.dumps(written(i)).encode())):
                member = tarfile.TarInfo(f'{i}.{end}')
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    (tmp_path / 'pictures.tar').rename(tmp_path / 'tarred.tar')
    for data in ('stream:list', 'stream:tarred', 'stream:list*2+stream:tarred'):
        command = [sys.executable, '-c', MEASURE, str(tmp_path), data, '12000']
        done = subprocess.run(
            command, capture_output=True, text=True, env=os.environ | dict(PYTHONPATH=ROOT)
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert int(done.stdout) < 4_000, data


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


@pytest.mark.ranks
def test_a_mixture_of_layouts_trains_the_same_on_two_ranks_and_resumed(tmp_path):
    "A streamed list and tars beside rows by number, through the command."
    write_files(tmp_path, GONE)
    one = [f'stages.align.{size}' for size in (*SIZES, 'schedule=constant', f'data={MIXTURE}')]

    def train(out, steps, *words):
        given = f'overrides={json.dumps([*one, f"stages.align.steps={steps}"])}'
        common = ['recipe=llava', 'stages=["align"]', 'evaluate=false', 'device=cpu', f'out={out}']
        common += [f'data={tmp_path}', 'stream_buffer=16', 'bad_rows=0.5', given]
        done = vlmbench('run', 'train', *common, *words, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-2000:] + done.stdout[-2000:]

    train('whole', 8)
    train('two', 8, 'gpus=2', 'parallel=fsdp')
    samples, loss = course(tmp_path, 'whole')
    assert course(tmp_path, 'two')[0] == samples and len(set(samples)) == 8
    assert course(tmp_path, 'two')[1] == pytest.approx(loss, rel=1e-5)
    train('part', 3, 'gpus=2', 'keep_checkpoints=true')
    manifest = tmp_path / 'part' / 'manifest.json'
    manifest.write_text(manifest.read_text().replace('"completed"', '"preempted"'))
    train('part', 8, 'allow_changed=["stage.steps"]')
    assert course(tmp_path, 'part')[0] == samples
    assert course(tmp_path, 'part')[1] == pytest.approx(loss, rel=1e-5)
