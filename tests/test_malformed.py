"""Malformed records and pictures: none crashes unexplained, none is dropped uncounted (in = out +
quarantined)."""

import io
import itertools
import json
import math
import random
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image

from vlmbench.data.image import ImageTransform
from vlmbench.data.picture import ImageError, load_image
from vlmbench.data.quarantine import BadRecord, Quarantine
from vlmbench.data.record import read_llava, read_regions, read_vora

CHAT = [{'from': 'human', 'value': '<image>\nWhat?'}, {'from': 'gpt', 'value': 'x'}]
LLAVA = {'id': 'a', 'image': 'a.png', 'conversations': CHAT}
VORA = {'id': 'a', 'frames': ['a.png'], 'conversations': CHAT}
REGION = {'id': 'a', 'image': 'a.png', 'regions': [{'box': [0, 0, 2, 2]}]}
JUNK = [
    3,
    -1.5,
    True,
    math.nan,
    10**30,
    {},
    {'a': 1},
    [[]],
    [None],
    [3],
    ['\ud800'],
    '\ud800',
    {'bytes': 3},
]


def without(row, key):
    return {k: v for k, v in row.items() if k != key}


def changed_turn(i, **new):
    return [{**t, **new} if j == i else t for j, t in enumerate(CHAT)]


def bad_llava_rows():
    "Rows of which every single one must be refused."
    yield from (None, 3, True, 'row', '', [], [LLAVA], 1.5)
    yield from (
        {**LLAVA, 'id': v} for v in JUNK if not isinstance(v, (int, float)) or isinstance(v, bool)
    )
    yield from ({**LLAVA, 'image': v} for v in JUNK)
    bad_paths = [
        '',
        ' ',
        '\0',
        'a\0.png',
        '..',
        '../a.png',
        'x/../../a.png',
        './../a.png',
        '/etc/passwd',
        '//etc/passwd',
        'http://x/a.png',
        'https://x/a.png',
        'data:image/png;base64,AAAA',
    ]
    yield from ({**LLAVA, 'image': v} for v in bad_paths)
    yield from ({**LLAVA, 'image': [v]} for v in bad_paths + JUNK if v != 'a.png')
    yield from (
        {**LLAVA, 'full_path': v}
        for v in ('/etc/passwd', '/', '/root-evil/a.png', '/root/../etc/passwd', [3], '\ud800')
    )
    yield from ({**LLAVA, 'image': ['a.png'] * n} for n in (2, 3, 9))
    yield without(LLAVA, 'image')  # <image> without a picture
    yield {**LLAVA, 'image': None}
    yield {**LLAVA, 'image': []}
    yield without(LLAVA, 'conversations')
    yield from (
        {**LLAVA, 'conversations': v}
        for v in JUNK + [None, [], '', 'hello', CHAT[1:], [CHAT], [CHAT[0]] * 2, CHAT + CHAT[1:]]
    )
    for i, v in itertools.product((0, 1), JUNK + [None]):
        yield {**LLAVA, 'conversations': changed_turn(i, value=v)}
    for i, v in itertools.product((0, 1), JUNK + [None, '', 'bot', 'Human', 'GPT', 'tool']):
        yield {**LLAVA, 'conversations': changed_turn(i, **{'from': v})}
    yield from (
        {**LLAVA, 'conversations': changed_turn(i, value=v)}
        for i, v in ((0, 'What?'), (0, '<image><image>'), (1, '<image>'))
    )
    yield {**LLAVA, 'conversations': CHAT + [{'from': 'system', 'value': 'late'}]}
    yield from ({**LLAVA, 'source': v} for v in JUNK)
    yield from ({**LLAVA, 'note': v} for v in ('\ud800', ['\udfff'], {'a': {'b': ['\ud83d']}}))
    yield from ({**LLAVA, 'regions': v} for v in bad_regions())


def bad_regions():
    yield from (3, 'x', True, {'a': 1}, [3], ['x'], [[0, 0, 1, 1]], [{}], [None], [{'box': None}])
    numbers = [
        [],
        [1],
        [1, 2, 3],
        [1, 2, 3, 4, 5],
        [2, 0, 1, 1],
        [0, 2, 1, 1],
        [1, 1, 1, 1],
        [0, 0, math.nan, 1],
        [0, 0, math.inf, 1],
        [0, 0, 1e9, 1],
        ['0', 0, 1, 1],
        [None] * 4,
        [True, 0, 3, 3],
        [[0, 0], [1, 1]],
        'xxxx',
        3,
        {'l': 0},
    ]
    yield from ([{'box': v}] for v in numbers)
    yield from (
        [{'box': [0, 0, 1, 1], 'polygons': v}]
        for v in (
            3,
            'x',
            [3],
            [[]],
            [[1, 2]],
            [[1, 2, 3, 4]],
            [[1, 2, 3, 4, 5]],
            [['1'] * 6],
            [[[0, 0], [1, 1], [2]]],
            [[math.nan] * 6],
            [[None] * 6],
        )
    )
    yield from ([{'box': [0, 0, 1, 1], 'label': v}] for v in (3, [], {}, '\ud800', True))
    yield [{'box': [0, 0, 1, 1], 'colour': 'red'}]


def bad_vora_rows():
    yield from (None, 3, 'row', [], {})
    yield from (
        {**VORA, 'frames': v}
        for v in [
            3,
            'a.png',
            True,
            {},
            {'a': 1},
            [3],
            [[]],
            [None],
            [''],
            ['../a.png'],
            ['/etc/passwd'],
            ['\ud800'],
            [{'path': '../x'}],
            [{}],
            ['a.png'] * 2,
        ]
    )
    yield from (
        {**VORA, 'conversations': v}
        for v in JUNK + [None, 'no json', '[', '[]', '3', '"x"', CHAT[1:], [CHAT[0]] * 2]
    )
    yield without(VORA, 'conversations')
    yield without(VORA, 'frames')
    yield {**VORA, 'conversations': [{'from': 'human', 'value': '<video> <image>'}]}


def bad_region_rows():
    yield without(REGION, 'regions')
    yield from ({**REGION, 'regions': v} for v in bad_regions())
    yield from (
        {**without(REGION, 'regions'), 'bboxes': v}
        for v in (3, 'x', [3], [None], [[1, 2, 3]], [[3, 3, 1, 1]], [[0, 0, 1, math.nan]])
    )
    yield from (
        {**without(REGION, 'regions'), 'bboxes': [[0, 0, 1, 1]], 'segmentations': v}
        for v in (3, [None, None], [[3]], [[[1, 2]]], ['x'])
    )
    yield from (
        {**without(REGION, 'regions'), 'bbox': v}
        for v in (3, 'x', [3], [1, 2, 3], [[1, 2, 3]], [[[1, 2, 3]]], [['x']], [[[0, 0, 0, 0]]])
    )


CASES = [
    (read_llava, LLAVA, list(bad_llava_rows())),
    (read_vora, VORA, list(bad_vora_rows())),
    (read_regions, REGION, list(bad_region_rows())),
]


def read(reader, path, root='/root'):
    q = Quarantine(cap=1, allow_truncated=True)
    out = list(reader(path, root, quarantine=q))
    assert q.n_seen == len(out) + q.n_bad, 'a row was dropped uncounted'
    assert sum(q.summary().values()) == q.n_bad == len(q.records)
    for r in q.records:
        assert ': ' in r['reason'] and r['source'] == str(path) and isinstance(r['row'], int), r
    json.dumps(q.to_dict()).encode()  # the list itself can be written
    return out, q


def test_the_corpus_is_large():
    assert (
        sum(len(rows) for *_, rows in CASES) + len(IMAGES) >= 600
    )  # and 300 more drawn by hypothesis


@pytest.mark.parametrize('lines', [False, True], ids=['list', 'lines'])
@pytest.mark.parametrize('reader, good, bad', CASES, ids=lambda v: getattr(v, '__name__', ''))
def test_every_bad_row_is_listed_and_every_good_one_delivered(tmp_path, reader, good, bad, lines):
    rows = [r for i, b in enumerate(bad) for r in ({**good, 'id': f'good{i}'}, b)]
    path = tmp_path / ('rows.jsonl' if lines else 'rows.json')
    path.write_text('\n'.join(map(json.dumps, rows)) if lines else json.dumps(rows))
    out, q = read(reader, path)
    wrongly_taken = [
        rows[int(s.where.rpartition(':')[2])] for s in out if not s.id.startswith('good')
    ]
    assert not wrongly_taken
    assert [s.id for s in out] == [f'good{i}' for i in range(len(bad))]
    assert [r['row'] for r in q.records] == list(range(1, 2 * len(bad), 2))


def test_strict_reading_names_file_and_row(tmp_path):
    for k, (reader, good, bad) in enumerate(CASES):
        for i, b in enumerate(bad[::7]):
            path = tmp_path / f'{k}_{i}.json'
            path.write_text(json.dumps([good, b]))
            with pytest.raises(BadRecord, match=rf'{path.name} row 1 \(id '):
                list(reader(path, '/root'))


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(['a.png', '<image>', 'human']),
    lambda v: (
        st.lists(v, max_size=4)
        | st.dictionaries(
            st.sampled_from(['from', 'value', 'role', 'content', 'box', 'polygons', 'x']),
            v,
            max_size=4,
        )
    ),
    max_leaves=10,
)
keys = st.sampled_from(
    [
        'id',
        'image',
        'frames',
        'conversations',
        'messages',
        'regions',
        'bboxes',
        'segmentations',
        'bbox',
        'source',
        'full_path',
        'x',
    ]
)


@given(
    st.sampled_from(CASES),
    st.lists(st.dictionaries(keys, json_values, max_size=6) | json_values, max_size=12),
    st.booleans(),
)
@settings(max_examples=50, deadline=None)
def test_any_json_rows(tmp_path_factory, case, rows, overlay):
    reader, good, _ = case
    if overlay:
        rows = [{**good, **r} if isinstance(r, dict) else r for r in rows]
    path = tmp_path_factory.mktemp('any') / 'rows.json'
    path.write_text(json.dumps(rows))
    out, q = read(reader, path)
    assert q.n_seen == len(rows)
    for s in out:
        assert not s.turns or s.n_slots == len(s.images)
        for i in s.images:
            assert i.data is not None or not i.path.startswith('/')


@given(st.sampled_from(CASES), st.data(), st.booleans())
@settings(max_examples=80, deadline=None)
def test_any_damage_to_the_file(tmp_path_factory, case, data, lines):
    reader, good, _ = case
    rows = [{**good, 'id': f'good{i}'} for i in range(8)]
    raw = bytearray(('\n'.join(map(json.dumps, rows)) if lines else json.dumps(rows)).encode())
    at = data.draw(st.integers(0, len(raw) - 1))
    how = data.draw(st.sampled_from(['cut', 'flip', 'insert', 'drop']))
    if how == 'cut':
        raw = raw[:at]
    elif how == 'flip':
        raw[at] = data.draw(st.integers(0, 255))
    elif how == 'insert':
        raw[at:at] = data.draw(st.binary(min_size=1, max_size=6))
    else:
        del raw[at : at + data.draw(st.integers(1, 40))]
    path = tmp_path_factory.mktemp('damage') / ('rows.jsonl' if lines else 'rows.json')
    path.write_bytes(bytes(raw))
    out, q = read(reader, path)
    if not lines:  # everything before the damage is delivered
        ends = list(itertools.accumulate(len(json.dumps(r)) + 2 for r in rows))
        intact = sum(e <= at for e in ends)
        assert [s.id for s in out][:intact] == [f'good{i}' for i in range(intact)]


# --- pictures


def encoded(img, format, **kw):
    out = io.BytesIO()
    img.save(out, format, **kw)
    return out.getvalue()


def chunk(name, data):
    return struct.pack('>I', len(data)) + name + data + struct.pack('>I', zlib.crc32(name + data))


def png(w, h, body=b'', depth=8, color=2):
    head = chunk(b'IHDR', struct.pack('>IIBBBBB', w, h, depth, color, 0, 0, 0))
    return b'\x89PNG\r\n\x1a\n' + head + chunk(b'IDAT', zlib.compress(body)) + chunk(b'IEND', b'')


def images():
    """(name, bytes, must be refused): every format cut, flipped and filled; bombs, wrong headers,
    other file types."""
    rng = random.Random(0)
    base = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))
    for format in ('PNG', 'JPEG', 'GIF', 'WEBP', 'TIFF', 'BMP', 'PPM', 'ICO', 'TGA', 'PCX'):
        data = encoded(base, format)
        for k in range(8):
            yield (
                f'{format} cut {k}',
                data[: len(data) * k // 16],
                True if k < 2 and format != 'TGA' else None,
            )
        for k in range(14):
            raw = bytearray(data)
            for _ in range(1 + k % 5):
                raw[rng.randrange(len(raw))] = rng.randrange(256)
            yield f'{format} flipped {k}', bytes(raw), None
        yield f'{format} head only, zeros after', data[:64] + bytes(len(data)), None
        yield f'{format} doubled', data + data, False
    for mode in ('1', 'L', 'LA', 'P', 'RGBA', 'CMYK', 'I;16'):
        yield (
            f'mode {mode}',
            encoded(Image.new(mode, (4, 3)), 'TIFF' if mode in ('CMYK', 'I;16') else 'PNG'),
            False,
        )
    for w, h in (
        (60_000, 60_000),
        (2**31 - 1, 2**31 - 1),
        (1, 2**31 - 1),
        (0, 0),
        (10, 0),
        (9000, 12_000),
    ):
        yield f'png {w}x{h}', png(w, h), True
    yield 'png without rows', png(9, 9), True
    yield 'png bad depth', png(9, 9, depth=3), True
    yield 'png bad colour', png(9, 9, color=77), True
    yield 'png zip bomb in rows', png(9, 9, bytes(10**7)), None
    for name, data in (
        ('empty', b''),
        ('space', b' ' * 99),
        ('zeros', bytes(4096)),
        ('text', b'not a picture'),
        ('svg', b'<svg/>'),
        ('html', b'<html>'),
        ('pdf', b'%PDF-1.7'),
        ('ps', b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n'),
        ('zip', b'PK\3\4'),
        ('lfs', b'version https://git-lfs'),
        ('jpeg start', b'\xff\xd8\xff\xe0'),
        ('png start', b'\x89PNG\r\n\x1a\n'),
        ('gif start', b'GIF89a'),
        ('riff', b'RIFF\0\0\0\0WEBP'),
        ('tiff loop', b'II*\0\x08\0\0\0\x01\0' + bytes(12) + b'\x08\0\0\0'),
        ('bmp start', b'BM' + bytes(60)),
    ):
        yield name, data, True


IMAGES = list(images())


def test_every_malformed_picture_is_explained(tmp_path, recwarn):
    "From file to tensor, counted as a loader counts: in = out + quarantined."
    rows = []
    for i, (name, data, _) in enumerate(IMAGES):
        (tmp_path / f'{i}.img').write_bytes(data)
        rows.append({**LLAVA, 'id': name, 'image': f'{i}.img'})
    (tmp_path / 'rows.json').write_text(json.dumps(rows))
    q, done, transform = Quarantine(cap=1), [], ImageTransform('pad', 14)
    for sample in read_llava(tmp_path / 'rows.json', tmp_path, quarantine=q):
        try:
            pixels = transform(sample.images[0].load(note=q.note))[0]['pixel_values']
        except ImageError as e:
            q.add(sample.source, int(sample.where.rpartition(':')[2]), sample.id, str(e))
        else:
            assert tuple(pixels.shape) == (3, 14, 14) and bool(pixels.isfinite().all())
            done.append(sample.id)
    assert q.n_seen == len(IMAGES) == len(done) + q.n_bad
    assert not {n for n, _, refuse in IMAGES if refuse} & set(done)
    assert not {n for n, _, refuse in IMAGES if refuse is False} - set(done)
    assert set(q.summary()) <= {
        'empty',
        'truncated',
        'damaged',
        'not an image',
        'too large',
        'too elongated',
        'pixel range',
    }, q.summary()


@given(
    st.binary(max_size=300),
    st.sampled_from(
        [
            b'',
            b'\xff\xd8\xff',
            b'\x89PNG\r\n\x1a\n',
            b'GIF89a',
            b'II*\0',
            b'MM\0*',
            b'BM',
            b'P6\n',
            b'RIFF',
        ]
    ),
)
@settings(max_examples=200, deadline=None)
def test_any_bytes(tail, head):
    try:
        img = load_image(head + tail, max_pixels=10**6, note=lambda what: None)
    except ImageError as e:
        assert ': ' in str(e)
    else:
        assert img.mode == 'RGB' and 0 < img.width * img.height <= 10**6
