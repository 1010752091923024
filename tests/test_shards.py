"""Shards: every layout gives the samples of the plain JSON, in the same order, for every rank."""

import gzip, io, json, os, pickle, subprocess, sys, tarfile, warnings
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from vlmbench.data import row_cache
from vlmbench.data.layouts import GzipRows, TarRows
from vlmbench.data.mixture import StatefulSampler
from vlmbench.data.quarantine import BadRecord, Quarantine
from vlmbench.data.record import ImageRef
from vlmbench.data.row_cache import CachedIndex, cache_place, open_row_index
from vlmbench.data.rows import RowIndex
from vlmbench.data.sources import DataError, data_files, open_samples, picture_share

N = 10
UPSIDE_DOWN = 3  # EXIF orientation: the stored picture is turned by 180 degrees


def picture(number):
    "A picture whose camera was held upside down."
    pixels = np.full((6, 8, 3), 20 * number, np.uint8)
    pixels[:3] = 255 - number
    exif, data = Image.Exif(), io.BytesIO()
    exif[0x0112] = UPSIDE_DOWN
    Image.fromarray(pixels).save(data, 'PNG', exif=exif)
    return data.getvalue()


def row(number):
    human = {'from': 'human', 'value': f'<image>\nWhat is {number}?'}
    return dict(
        id=f'r{number}',
        image=f'pictures/{number}.png',
        conversations=[human, {'from': 'gpt', 'value': f'It is {number}.'}],
    )


ROWS = [row(i) for i in range(N)]
PARTS = {0: ROWS[:4], 1: ROWS[4:7], 2: ROWS[7:]}


def lines(rows):
    return ''.join(json.dumps(row) + '\n' for row in rows)


def inside(rows):
    "Rows as parquet has them, the pictures inside."
    return [dict(r, image=dict(bytes=picture(int(r['id'][1:])), path=r['image'])) for r in rows]


def write_tar(path, rows):
    with tarfile.open(path, 'w') as archive:
        for r in rows:
            number = int(r['id'][1:])
            parts = ('json', json.dumps(r).encode()), ('png', picture(number))
            for end, data in parts:
                member = tarfile.TarInfo(f'set/{number:04}.{end}')
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))


def write_saved(path, rows):
    text = datasets.Value('string')
    features = datasets.Features(
        dict(id=text, image=datasets.Image(), conversations=[{'from': text, 'value': text}])
    )
    saved = datasets.Dataset.from_list(inside(rows), features=features)
    saved.save_to_disk(str(path), num_shards=3)


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    "The same ten rows in every layout."
    root = tmp_path_factory.mktemp('data')
    (root / 'pictures').mkdir()
    for i in range(N):
        (root / 'pictures' / f'{i}.png').write_bytes(picture(i))
    (root / 'plain.json').write_text(json.dumps(ROWS))
    for name in ('json', 'jsonl', 'packed', 'parquet', 'tar'):
        (root / name).mkdir()
    for i, rows in PARTS.items():
        (root / 'json' / f'part-{i}.json').write_text(json.dumps(rows))
        (root / 'jsonl' / f'part-{i}.jsonl').write_text(lines(rows))
        (root / 'packed' / f'part-{i}.json.gz').write_bytes(
            gzip.compress(json.dumps(rows).encode())
        )
        table = pa.Table.from_pylist(inside(rows))
        pq.write_table(table, root / 'parquet' / f'part-{i}.parquet', row_group_size=2)
        write_tar(root / 'tar' / f'part-{i}.tar', rows)
    (root / 'one.jsonl.gz').write_bytes(gzip.compress(lines(ROWS).encode()))
    write_tar(root / 'alone.tar', ROWS)
    datasets.disable_progress_bars()
    write_saved(root / 'saved', ROWS)
    (root / 'splits').mkdir()
    write_saved(root / 'splits' / 'train', ROWS)
    (root / 'splits' / 'dataset_dict.json').write_text('{"splits": ["train"]}')
    listed = ''.join(f'jsonl/part-{i}.jsonl\n' for i in range(3))
    (root / 'list.shards').write_text('# in this order\n' + listed)
    return root


LAYOUTS = (
    'json jsonl packed parquet tar one alone saved list json/part-*.json jsonl/part-?.jsonl '
    'parquet/*.parquet tar/part-[012].tar splits/train packed/part-*.json.gz'
).split()


def content(sample):
    "What a model sees of a sample."
    pixels = [np.asarray(ref.load()).tobytes() for ref in sample.images]
    return sample.id, [(t.role, t.text) for t in sample.turns], pixels


@pytest.mark.parametrize('name', LAYOUTS)
def test_every_layout_gives_the_samples_of_the_plain_json(root, name):
    q = Quarantine()
    plain, samples = open_samples(root, 'plain'), open_samples(root, name, q)
    assert len(samples) == N and q.n_seen == N and not q.n_bad
    assert [content(s) for s in samples] == [content(s) for s in plain]
    assert content(samples[-1]) == content(plain[N - 1])
    with pytest.raises(IndexError):
        samples[N]
    # upright, which the stored pixels are not
    assert samples[2].images[0].load().getpixel((0, 0)) == (40, 40, 40)
    assert picture_share(name, root) == 1
    assert content(pickle.loads(pickle.dumps(samples))[5]) == content(plain[5])


@pytest.mark.parametrize('name', LAYOUTS)
def test_two_ranks_share_the_rows_and_go_on_by_draw_number(root, name):
    samples = open_samples(root, name)

    def stream(rank, start=0):
        sampler = StatefulSampler(len(samples), seed=3, epochs=2, rank=rank, ranks=2)
        sampler.position = start
        return [samples[i].id for i in sampler]

    first, second = stream(0), stream(1)
    ids = sorted(r['id'] for r in ROWS)
    assert sorted(first[: N // 2] + second[: N // 2]) == ids
    assert stream(1, start=4) == second[4:]
    plain = open_samples(root, 'plain')
    order = StatefulSampler(len(plain), seed=3, epochs=2, rank=0, ranks=2)
    assert first == [plain[i].id for i in order]


def test_shards_are_opened_in_another_working_directory(root, tmp_path, monkeypatch):
    for place in (root.parent, tmp_path):
        monkeypatch.chdir(place)
        relative = os.path.relpath(root)
        for name in ('tar', 'saved', 'list', 'parquet/part-*.parquet', 'packed'):
            samples = open_samples(relative, name)
            assert content(samples[9]) == content(open_samples(root, 'plain')[9])


def test_a_mixture_of_patterns_has_weights(root):
    mix = open_samples(root, 'parquet/part-*.parquet*3 + tar')
    assert list(mix.sources) == ['parquet/part-*.parquet', 'tar'] and len(mix) == 2 * N
    assert mix.draws() == {'parquet/part-*.parquet': 15, 'tar': 5}


def test_a_sample_says_its_data_set_and_its_shard(root):
    sample = open_samples(root, 'tar')[8]
    assert (sample.source, sample.where) == ('tar', 'part-2.tar:1')


def copy_of_tar(root, tmp_path):
    (tmp_path / 'tar').mkdir()
    for path in (root / 'tar').iterdir():
        (tmp_path / 'tar' / path.name).write_bytes(path.read_bytes())
    return tmp_path / 'tar' / 'part-1.tar'


def test_a_cut_tar_is_named_and_keeps_its_whole_samples(root, tmp_path):
    hurt = copy_of_tar(root, tmp_path)
    hurt.write_bytes(hurt.read_bytes()[: TarRows(hurt).samples[2][1][1] + 5])
    with pytest.raises(BadRecord, match=r'part-1.tar row 2: unreadable tar: unexpected end'):
        open_samples(tmp_path, 'tar', Quarantine())
    q = Quarantine(allow_truncated=True)
    assert len(open_samples(tmp_path, 'tar', q)) == N - 1
    assert q.records[0]['source'] == str(hurt) and q.records[0]['row'] == 2


def test_a_header_in_the_middle_of_a_tar_is_not_its_end(root, tmp_path):
    hurt = copy_of_tar(root, tmp_path)
    data, start = bytearray(hurt.read_bytes()), TarRows(hurt).samples[1][0][1]
    data[start - 512 : start] = b'?' * 512
    hurt.write_bytes(data)
    with pytest.raises(BadRecord, match='part-1.tar row 0: unreadable tar: no header at byte'):
        open_samples(tmp_path, 'tar', Quarantine())


def test_a_bad_row_names_shard_and_row(root, tmp_path):
    rows = [dict(ROWS[0]), dict(ROWS[1], image='pictures/x.png', conversations=[])]
    (tmp_path / 'set').mkdir()
    write_tar(tmp_path / 'set' / 'a.tar', ROWS[:2])
    write_tar(tmp_path / 'set' / 'b.tar', rows)
    samples = open_samples(tmp_path, 'set', Quarantine())
    with pytest.raises(BadRecord, match=r'set/b.tar row 1: no turns'):
        samples[3]


def test_a_tar_sample_without_json_is_a_bad_row(tmp_path):
    with tarfile.open(tmp_path / 'a.tar', 'w') as archive:
        for name, data in [('0.png', picture(0)), ('1.json', b'{"id": ')]:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    samples = open_samples(tmp_path, 'a', Quarantine())
    for number, reason in enumerate(('no JSON', 'syntax error')):
        with pytest.raises(BadRecord, match=rf'a.tar row {number}: {reason}'):
            samples[number]


def test_a_cut_gzip_and_a_broken_saved_folder_are_named(root, tmp_path):
    data = (root / 'one.jsonl.gz').read_bytes()
    (tmp_path / 'cut.jsonl.gz').write_bytes(data[:-20])
    with pytest.raises(BadRecord, match='cut.jsonl.gz row .*: unreadable gzip'):
        open_samples(tmp_path, 'cut', Quarantine())
    write_saved(tmp_path / 'saved', ROWS)
    next((tmp_path / 'saved').glob('*-00001-of-*.arrow')).unlink()
    with pytest.raises(BadRecord, match='saved row 0: unreadable saved data set'):
        open_samples(tmp_path, 'saved', Quarantine())


def test_an_unpacked_archive_follows_its_archive(tmp_path):
    path = tmp_path / 'a.jsonl.gz'
    for text in ('first', 'second one'):
        path.write_bytes(gzip.compress(lines([dict(id=text)]).encode()))
        assert list(GzipRows(path)) == [dict(id=text)]
    assert len([p for p in tmp_path.iterdir() if p.name.startswith('.')]) == 1


def test_names_that_stand_for_nothing_usable(root, tmp_path):
    for name in ('../data*/*.json', 'json/../../x.json'):
        with pytest.raises(DataError, match='leads out of'):
            data_files(root, name)
    with pytest.raises(DataError, match=r"holds the splits \['train'\]: name one"):
        data_files(root, 'splits')
    with pytest.raises(DataError, match="it has .*'alone.tar'"):
        data_files(root, 'nothing-*.json')
    (tmp_path / 'two').mkdir()
    for end in ('json', 'tar'):
        (tmp_path / 'two' / f'a.{end}').write_text('[]')
    with pytest.raises(DataError, match=r'name one kind, as in two/\*.json'):
        data_files(tmp_path, 'two')
    (tmp_path / 'b.shards').write_text('two/a.json\ntwo/z.json\n')
    with pytest.raises(DataError, match='z.json'):
        data_files(tmp_path, 'b')


def test_a_tar_writes_nothing(root, tmp_path):
    (tmp_path / 'in').mkdir()
    data = json.dumps(ROWS[0]).encode()
    with tarfile.open(tmp_path / 'in' / 'a.tar', 'w') as archive:
        for name in ('../../out/0.json', '/etc/1.json'):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        link = tarfile.TarInfo('2.json')
        link.type, link.linkname = tarfile.SYMTYPE, '/etc/passwd'
        archive.addfile(link)
    samples = open_samples(tmp_path / 'in', 'a')
    assert [s.id for s in samples] == ['r0', 'r0']
    assert samples[0].images == [ImageRef('pictures/0.png', str(tmp_path / 'in'))]
    assert sorted(p.name for p in tmp_path.rglob('*')) == ['a.tar', 'in']


# --- where rows start
# --------------------------------------------------------------------------------------------------


@pytest.fixture
def large(tmp_path, monkeypatch):
    monkeypatch.setattr(row_cache, 'CACHE_FROM', 100)
    path = tmp_path / 'large.json'
    path.write_text(json.dumps(ROWS))
    return path


def test_the_kept_index_is_the_scanned_one(large):
    scanned = RowIndex(large)
    assert type(open_row_index(large)) is RowIndex
    kept = open_row_index(large)
    assert type(kept) is CachedIndex and list(kept) == list(scanned) == ROWS
    for name in ('starts', 'ends', 'numbers'):
        assert list(getattr(kept, name)) == list(getattr(scanned, name))
    assert type(kept.numbers[3]) is int  # goes into JSON files
    assert [p.name for p in large.parent.iterdir() if p != large] == ['.large.json.rows']


def test_a_changed_file_and_a_damaged_cache_are_scanned_anew(large):
    open_row_index(large)
    status = os.stat(large)
    large.write_text(json.dumps(ROWS[::-1]))  # the same number of bytes
    os.utime(large, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert open_row_index(large)[0] == ROWS[-1]
    place = cache_place(large)
    whole = place.read_bytes()
    for content in (
        b'',
        b'{}\n',
        b'\xff\x00',
        whole[:-8],
        whole.replace(b'"version": 1', b'"version": 0'),
    ):
        place.write_bytes(content)
        index = open_row_index(large)
        assert type(index) is RowIndex and list(index) == ROWS[::-1]
        assert place.read_bytes() == whole


def test_a_folder_that_cannot_be_written_to_is_announced(large, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, 'Permission denied')

    monkeypatch.setattr(row_cache.os, 'replace', refuse)
    for _ in range(2):
        with pytest.warns(UserWarning, match='cannot be kept beside it .Permission denied'):
            assert list(open_row_index(large)) == ROWS
    assert [p for p in large.parent.iterdir()] == [large]


def test_ranks_scan_once(large):
    code = f"""
import sys
from vlmbench.data import row_cache
from vlmbench.data.rows import RowIndex
row_cache.CACHE_FROM = 100
print(type(row_cache.open_row_index({str(large)!r})).__name__)
"""
    ranks = [
        subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [rank.communicate()[0].strip() for rank in ranks]
    assert sorted(said) == ['CachedIndex', 'RowIndex']


def test_small_files_leave_no_trace(tmp_path):
    (tmp_path / 'small.json').write_text(json.dumps(ROWS))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert list(open_row_index(tmp_path / 'small.json')) == ROWS
    assert [p.name for p in Path(tmp_path).iterdir()] == ['small.json']
