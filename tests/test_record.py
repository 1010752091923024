"""Records: row streams, readers, quarantine, writing; what is in equals what comes out plus what is
listed."""

import io, itertools, json, math, os, pickle, string, subprocess, sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa, pyarrow.parquet as pq
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image

from vlmbench.data import rows as rows_module
from vlmbench.data.quarantine import BadRecord, Quarantine, TooManyBadRecords
from vlmbench.data.record import (
    ImageRef,
    Records,
    Region,
    Sample,
    Turn,
    parse_turns,
    read_llava,
    read_records,
    read_regions,
    read_vora,
    sample_from_llava,
    sample_from_row,
    sample_from_vora,
    to_llava_row,
    write_llava,
)
from vlmbench.data.region import parse_regions
from vlmbench.data.region_rows import sample_from_region_row
from vlmbench.data.rows import RowIndex, file_format, iter_rows
from vlmbench.evaluate.tasks import load_task, rows_task

ROOT = Path(__file__).parents[1]


def row(i=0, image='a.jpg', **extra):
    mark = '<image>\n' if image else ''
    out = {
        'id': i,
        'conversations': [
            {'from': 'human', 'value': f'{mark}Q{i}?'},
            {'from': 'gpt', 'value': f'A{i}'},
        ],
        **extra,
    }
    return {**out, 'image': image} if image else out


# --- raw rows

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False)
    | st.text(max_size=8),
    lambda v: st.lists(v, max_size=4) | st.dictionaries(st.text(max_size=4), v, max_size=4),
    max_leaves=12,
)


@given(
    st.lists(json_values, max_size=8), st.integers(1, 40), st.booleans(), st.sampled_from([None, 1])
)
@settings(max_examples=60, deadline=None)
def test_list_stream_equals_json_load(values, window, ascii, indent):
    data = json.dumps(values, ensure_ascii=ascii, indent=indent).encode('utf-8', 'surrogatepass')
    expected = json.loads(data.decode('utf-8', 'surrogateescape'))
    old, rows_module.WINDOW = rows_module.WINDOW, window  # tiny windows cut rows everywhere
    try:
        got = [r for *_, r in rows_module._json_list(io.BytesIO(data))]
    finally:
        rows_module.WINDOW = old
    assert [r.error for r in got] == [None] * len(values)
    assert [r.value for r in got] == expected and [r.number for r in got] == list(
        range(len(values))
    )


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_truncated_list_delivers_every_complete_row(data):
    values = data.draw(
        st.lists(
            st.dictionaries(
                st.text('ab"\\é', max_size=3), st.text('xy"]}{é', max_size=9), max_size=3
            ),
            min_size=1,
            max_size=6,
        )
    )
    text = json.dumps(values).encode()
    cut = data.draw(st.integers(1, len(text) - 1))
    ends, at = [], 1
    for v in values:
        at += len(json.dumps(v))
        ends.append(at)
        at += 2
    old, rows_module.WINDOW = rows_module.WINDOW, data.draw(st.integers(1, 30))
    try:
        got = [r for *_, r in rows_module._json_list(io.BytesIO(text[:cut]))]
    finally:
        rows_module.WINDOW = old
    complete = sum(e <= cut for e in ends)
    assert [r.value for r in got[:-1]] == values[:complete]
    assert got[-1].fatal and got[-1].number == complete and 'truncated' in got[-1].error


@pytest.mark.parametrize(
    'data, n, error',
    [
        (b'', 0, 'empty'),
        (b'  ', 0, 'empty'),
        (b'{"a": 1}', 0, 'no list'),
        (b'[]', 0, None),
        (b'\xef\xbb\xbf[{"a": 1}]', 1, None),
        (b'[{"a": 1},]', 1, 'syntax error'),
        (b'[{"a": 1}] x', 1, "'x' after the end"),
        (b'[{"a": 1} {"a": 2}]', 1, "'{' where a comma"),
        (b'[{"a": NaN, "b": 123456789012345678901234567890, "c": 1e999}, {"d": 1}]', 2, None),
        (b'[{"a": "\xff\xfe"}, {"d": 1}]', 2, None),
        (b'[' * 100_000, 0, 'nested too deeply'),
        (b'[{"a": ' + b'9' * 10_000 + b'}, {"b": 1}]', 0, 'syntax error'),
        (b'[{"a": "x\ny"}, {"b": 1}]', 0, 'control character'),
        (b'[1, 23, 4]', 3, None),
        (b'[tru', 0, 'truncated'),
    ],
)
def test_odd_lists(data, n, error):
    got = [r for *_, r in rows_module._json_list(io.BytesIO(data))]
    assert sum(r.error is None for r in got) == n
    assert (error is None and len(got) == n) or error in got[-1].error


def test_lines_survive_bad_lines(tmp_path):
    p = tmp_path / 'a.jsonl'
    p.write_bytes(
        b'\xef\xbb\xbf{"id": 0}\r\n\n{"id": 1\n' + b'[' * 100_000 + b'\n{"id": "\xff"}\n'
        b'\xef\xbb\xbf{"id": 4}'  # as where files with a mark were joined
    )
    got = list(iter_rows(p))
    assert [r.error is None for r in got] == [True, False, False, True, True] and not any(
        r.fatal for r in got
    )
    index = RowIndex(p)
    assert [r.number for r in index.errors] == [1, 2] and list(index.numbers) == [0, 3, 4]
    assert [index[i] for i in range(3)] == [got[0].value, got[3].value, got[4].value]


@given(
    st.lists(st.dictionaries(st.text(max_size=3), st.text(max_size=9), max_size=3), max_size=9),
    st.booleans(),
    st.booleans(),
)
@settings(max_examples=30, deadline=None)
def test_index_equals_stream(tmp_path_factory, values, lines, ascii):
    p = tmp_path_factory.mktemp('i') / ('a.jsonl' if lines else 'a.json')
    dump = lambda v: json.dumps(v, ensure_ascii=ascii)
    p.write_bytes(
        ('\n'.join(map(dump, values)) if lines else dump(values)).encode('utf-8', 'surrogatepass')
    )
    stream = [r.value for r in iter_rows(p)]
    index = RowIndex(p)
    assert list(index) == stream
    copy = pickle.loads(pickle.dumps(index))  # loader workers get a copy
    assert list(copy) == stream


def test_index_is_thread_safe(tmp_path):
    p = tmp_path / 'a.json'
    p.write_text(json.dumps([{'id': i, 'pad': 'x' * (i % 50)} for i in range(500)]))
    index = RowIndex(p)
    with ThreadPoolExecutor(4) as pool:
        assert [r['id'] for r in pool.map(index.__getitem__, range(500))] == list(range(500))


def test_format_by_name_and_content(tmp_path):
    for name, text, expected in (
        ('a.json', ' \n[1]', 'json'),
        ('b.json', '{"id": 1}\n', 'jsonl'),
        ('c.jsonl', '', 'jsonl'),
        ('d.parquet', '', 'parquet'),
        ('e.json', '\n' * 100 + '[]', 'json'),
        ('f.json', '', 'json'),
    ):
        (tmp_path / name).write_text(text)
        assert file_format(tmp_path / name) == expected, name
    with pytest.raises(ValueError, match='unknown suffix'):
        file_format(tmp_path / 'rows.csv')
    with pytest.raises(ValueError, match="format='csv'"):
        list(iter_rows(tmp_path / 'a.json', 'csv'))


# --- memory

CHILD = """
import json, sys
from vlmbench.data.record import read_llava
rss = lambda: next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('VmHWM'))
before = rss()
if sys.argv[1] == 'load':
    n = len(json.load(open(sys.argv[2])))
else:
    n = sum(1 for _ in read_llava(sys.argv[2], '/data'))
print(n, rss() - before)
"""


def test_reader_memory_does_not_grow_with_the_file(tmp_path):
    """Peak at 1,000 and at 20,000 rows; json.load of the same file proves that the probe can see a
    growth."""

    def peak(how, n):
        out = subprocess.run(
            [sys.executable, '-c', CHILD, how, str(tmp_path / f'{n}.json')],
            capture_output=True,
            text=True,
            cwd=ROOT,
        )
        assert out.returncode == 0, out.stderr
        rows, kb = map(int, out.stdout.split())
        assert rows == n
        return kb

    for n in (1_000, 20_000):
        with open(tmp_path / f'{n}.json', 'w') as f:
            f.write('[' + ',\n'.join(json.dumps(row(i, pad='x' * 700)) for i in range(n)) + ']')
    small, large, whole = peak('stream', 1_000), peak('stream', 20_000), peak('load', 20_000)
    assert whole > 15_000  # the file has 17 MB
    assert large < small + 8_000 and large < whole / 3


# --- turns


def test_roles_and_order():
    chat = [
        {'role': 'system', 'content': 's'},
        {'role': 'user', 'content': 'a'},
        {'role': 'assistant', 'content': 'b'},
    ]
    assert [t.role for t in parse_turns(chat)[0]] == ['system', 'user', 'assistant']
    developer = [dict(chat[0], role='developer'), *chat[1:]]
    assert parse_turns(developer) == parse_turns(chat)
    assert parse_turns(chat[1:2])[0] == [Turn('user', 'a')]  # a question without answer
    for bad, reason in (
        ([], 'asks nothing'),
        (chat[2:], 'asks nothing'),
        (chat[1:] + chat[:1], 'after the start'),
        (chat[:1] + developer, 'after the start'),
        ([{'from': 'bot', 'value': 'x'}], 'unknown role'),
        (['x'], 'turn 0 is str'),
        ('x', 'not a list'),
        ([{'from': 'human'}], 'text of turn 0 is NoneType'),
        ([{'from': ['human'], 'value': ''}], 'unknown role'),
        ([{'from': 'human', 'value': '\ud800'}], 'not valid UTF-8'),
    ):
        with pytest.raises(BadRecord, match=reason):
            parse_turns(bad)


def test_leading_answer_is_dropped_and_noted(tmp_path):
    chat = [
        {'from': 'gpt', 'value': 'Hello'},
        {'from': 'human', 'value': 'Hi'},
        {'from': 'gpt', 'value': 'Yes'},
    ]
    (tmp_path / 'a.json').write_text(json.dumps([{'id': 1, 'conversations': chat}]))
    q = Quarantine()
    (s,) = read_llava(tmp_path / 'a.json', quarantine=q)
    assert (
        [t.text for t in s.turns] == ['Hi', 'Yes']
        and q.notes == {'dropped leading assistant turn': 1}
        and not q.n_bad
    )
    with pytest.raises(BadRecord, match='answers before any question'):
        list(read_llava(tmp_path / 'a.json', first_turn='error'))
    q = Quarantine()
    (tmp_path / 'b.json').write_text(
        json.dumps([{'id': i, 'conversations': chat} for i in range(3)] + [row(3)])
    )
    records = Records(tmp_path / 'b.json', quarantine=q)
    for _ in range(2):
        assert [len(records[i].turns) for i in range(4)] == [2, 2, 2, 2]
    assert q.notes == {'dropped leading assistant turn': 3}  # rows, however often they are read
    plain = Records(
        tmp_path / 'b.json', quarantine=q, parse=lambda row, root, source, where, note: row['id']
    )
    assert plain[2] == 2


@pytest.mark.parametrize('name', ['link/a.png', '{outside}/a.png'])
def test_pictures_in_a_further_root(tmp_path, name):
    "The usual layout of a shared image folder: absolute paths, or a link out of the data folder."
    data, outside = tmp_path / 'data', tmp_path / 'outside'
    for folder in (data, outside):
        folder.mkdir()
    Image.new('RGB', (4, 4), 'red').save(outside / 'a.png')
    (data / 'link').symlink_to(outside)
    image = name.format(outside=outside)
    (data / 'rows.json').write_text(
        json.dumps(
            [
                {
                    **row(0),
                    'conversations': [
                        {'from': 'human', 'value': '<image>\nwhat'},
                        {'from': 'gpt', 'value': 'red'},
                    ],
                    'image': image,
                }
            ]
        )
    )
    with pytest.raises(ValueError, match=r'outside the root: .*name its folder in roots='):
        Records(data / 'rows.json')[0].images[0].load()
    readers = [
        lambda **kw: next(read_llava(data / 'rows.json', **kw)),
        lambda **kw: Records(data / 'rows.json', **kw)[0],
        lambda **kw: next(read_records(data / 'rows.json', **kw)),
        lambda **kw: load_task(data / 'rows.json', **kw).items[0],
        lambda **kw: rows_task(
            't', [dict(question='q', answer='a', image=image)], 'exact', data, **kw
        ).items[0],
    ]
    for read in readers:
        for roots in ([outside], str(outside)):
            assert read(roots=roots).images[0].load().getpixel((1, 1)) == (255, 0, 0)
        with pytest.raises(FileNotFoundError, match='roots: .* are no folders'):
            read(roots=[tmp_path / 'typo'])
    with pytest.raises(ValueError, match='outside the root'):
        Records(data / 'rows.json', roots=[data / 'link' / '..' / 'data'])[0].images[0].load()


# --- images of a row


def test_image_key_variants():
    assert sample_from_llava(row(image=None)).images == []
    assert sample_from_llava({**row(image=None), 'image': None}).images == []
    two = row()
    two['image'] = ['a.jpg', 'b.jpg']
    two['conversations'][0]['value'] = '<image> or <image>?'
    assert [i.path for i in sample_from_llava(two, '/d').images] == ['a.jpg', 'b.jpg']
    for value in (
        '',
        3,
        {'x': 1},
        [None],
        'http://x/a.jpg',
        'a\0.jpg',
        '../a.jpg',
        'a/../../b.jpg',
        '/etc/passwd',
        'data:image/png;base64,xx',
    ):
        with pytest.raises(BadRecord):
            sample_from_llava(row(image=value) if value else {**row(), 'image': value}, '/d')
    with pytest.raises(BadRecord, match='1 <image> in the text but 0'):
        sample_from_llava({**row(), 'image': []}, '/d')


def test_full_path_wins_and_stays_inside():
    r = {**row(image='ignored.jpg'), 'full_path': '/d/coco/a.jpg'}
    assert sample_from_llava(r, '/d').images == [ImageRef('coco/a.jpg', '/d')]
    assert sample_from_llava(r, ('/other', '/d')).images == [
        ImageRef('/d/coco/a.jpg', ('/other', '/d'))
    ]
    with pytest.raises(BadRecord, match='allow_absolute'):
        sample_from_llava(r, '/elsewhere')
    assert sample_from_llava(r, '/elsewhere', allow_absolute=True).images == [
        ImageRef('/d/coco/a.jpg', None)
    ]


def test_missing_mark_is_an_error_or_prepended(tmp_path):
    r = row()
    r['conversations'][0]['value'] = 'Describe the object.'
    with pytest.raises(BadRecord, match="missing_mark='prepend'"):
        sample_from_llava(r)
    (tmp_path / 'a.json').write_text(json.dumps([r]))
    q = Quarantine()
    (s,) = read_llava(tmp_path / 'a.json', quarantine=q, missing_mark='prepend')
    assert s.turns[0].text == '<image>\nDescribe the object.' and q.notes == {
        'prepended missing <image>': 1
    }


def test_ids(tmp_path):
    (tmp_path / 'a.json').write_text(
        json.dumps(
            [row(7), row('7'), {k: v for k, v in row().items() if k != 'id'}, row(True), row([1])]
        )
    )
    q = Quarantine(cap=1)
    assert [s.id for s in read_llava(tmp_path / 'a.json', quarantine=q)] == ['7', '7', 'a.json:2']
    assert q.summary() == {'wrong type': 2}


# --- VoRA


def test_vora_prompt_rules():
    def text(question, n):
        return (
            sample_from_vora(
                {
                    'id': 1,
                    'frames': [f'{i}.jpg' for i in range(n)],
                    'conversations': [
                        {'from': 'human', 'value': question},
                        {'from': 'gpt', 'value': 'R'},
                    ],
                },
                '/d',
            )
            .turns[0]
            .text
        )

    assert text('Describe', 1) == '<image>Describe'
    assert text('Describe\n<image>', 1) == 'Describe\n<image>'
    assert text('<video>What', 3) == '1s: <image>; 2s: <image>; 3s: <image>; \nWhat'
    with pytest.raises(BadRecord, match='1 <image> in the text but 2'):
        text('<image>Both', 2)
    system = {
        'id': 1,
        'frames': ['a.jpg'],
        'conversations': [{'from': 'system', 'value': 'S'}, {'from': 'human', 'value': 'a'}],
    }
    assert [t.text for t in sample_from_vora(system).turns] == ['S', '<image>a']


def test_vora_parquet(tmp_path):
    chat = [{'from': 'human', 'value': 'Describe'}, {'from': 'gpt', 'value': 'A dog'}]
    table = pa.table(
        {
            'id': ['a', 'b', 'c'],
            'frames': [[b'\x89PNG'], None, []],
            'conversations': [chat] * 3,
            'note': ['x', None, 'y'],
        }
    )
    pq.write_table(table, tmp_path / 'v.parquet')
    a, b, c = read_vora(tmp_path / 'v.parquet')
    assert (
        a.images[0].data == b'\x89PNG'
        and a.meta == {'note': 'x'}
        and b.images == c.images == []
        and b.meta == {}
    )
    structs = pa.table(
        {
            'id': [1],
            'frames': [[{'bytes': b'\x89', 'path': 'p'}]],
            'conversations': [json.dumps(chat)],
        }
    )
    pq.write_table(structs, tmp_path / 's.parquet')
    assert next(read_records(tmp_path / 's.parquet')).images == [ImageRef('', None, b'\x89')]
    (tmp_path / 'cut.parquet').write_bytes((tmp_path / 'v.parquet').read_bytes()[:-9])
    with pytest.raises(BadRecord, match='unreadable parquet'):
        list(read_vora(tmp_path / 'cut.parquet'))


# --- regions


def test_published_region_rows(tmp_path):
    rows = [
        {
            'id': 'refcocog-1',
            'image': 'x.jpg',
            'answer': 'a dog',
            'bboxes': [[60, 17, 120, 44]],
            'segmentations': [[[1.0, 2, 3, 4, 5, 9.0]]],
        },
        {
            'id': 'flickr30k-1',
            'image': 'x.jpg',
            'bbox': [[[0, 0, 9, 9], [1, 1, 5, 5]], [[2, 2, 3, 3]]],
            'grounding': 'a dog <bbox0>',
        },
        {
            'id': 'custom',
            'image': 'x.jpg',
            'bbox': [1, 2, 3, 4],
            'conversations': row()['conversations'],
        },
        {'id': 'nothing', 'image': 'x.jpg', 'answer': 'a'},
    ]
    (tmp_path / 'r.json').write_text(json.dumps(rows))
    q = Quarantine(cap=1)
    a, b, c = read_regions(tmp_path / 'r.json', quarantine=q)
    assert (
        a.regions == [Region((60, 17, 120, 44), ((1, 2, 3, 4, 5, 9),))]
        and a.turns == []
        and a.meta['answer'] == 'a dog'
    )
    assert [r.label for r in b.regions] == ['<bbox0>', '<bbox0>', '<bbox1>'] and b.meta[
        'bbox'
    ] == rows[1]['bbox']
    assert c.turns and c.regions == [Region((1, 2, 3, 4))] and q.n_bad == 1
    with pytest.raises(BadRecord, match="format='region'"):
        list(read_llava(tmp_path / 'r.json'))


@pytest.mark.parametrize(
    'bad',
    [
        {'regions': [{'box': [1, 2, 3]}]},
        {'regions': [{'box': [3, 2, 1, 4]}]},
        {'regions': [{'box': [1, 2, math.nan, 4]}]},
        {'regions': 3},
        {'regions': [{'box': [1, 2, '3', 4]}]},
        {'regions': [{}]},
        {'regions': [{'polygons': [[1, 2, 3, 4]]}]},
        {'regions': [[1, 2, 3, 4]]},
        {'regions': [{'polygons': [[1, 2, 3, 4, 5, 6, 7]]}]},
        {'regions': [{'box': [0, 0, 1, 1], 'colour': 'red'}]},
        {'bboxes': [None]},
        {'bboxes': [[0, 0, 1, 1]], 'segmentations': [None, None]},
        {'regions': [{'box': [0, 0, 1, 1], 'label': 3}]},
        {'bbox': ['x']},
        {'regions': [{'box': [0, 0, 1e300, 1]}]},
        {'regions': [{'box': [True, 0, 3, 1]}]},
        {'regions': [{'polygons': 'x'}]},
    ],
)
def test_bad_regions_have_a_reason(bad):
    with pytest.raises(BadRecord, match='bad region|wrong type'):
        parse_regions(bad)


# --- columns of other tools


TALK = [{'from': 'human', 'value': 'What?'}, {'from': 'gpt', 'value': 'Red'}]


def one_row(folder, row, read=read_records, **kwargs):
    "What a reader makes of a file with this row: the sample (None: a bad row) and its quarantine."
    (folder / 'one.jsonl').write_text(json.dumps({'id': 1, **row}))
    q = Quarantine(cap=1.0)
    samples = list(read(folder / 'one.jsonl', folder, q, **kwargs))
    return (samples or [None])[0], q


def all_readers(folder, row):
    "The same row through every door of training; each must agree with the first."
    sample, q = one_row(folder, row)
    more = Quarantine(cap=1.0)
    records = [
        Records(folder / 'one.jsonl', folder, more, parse=parse)
        for parse in (sample_from_llava, sample_from_row, sample_from_region_row)
    ]
    for door in records:
        if sample is None:
            with pytest.raises(BadRecord):
                door[0]
        else:
            assert (door[0].turns, door[0].images) == (sample.turns, sample.images)
    if sample is not None:
        assert more.notes == q.notes  # once a row, however many read it
    return sample, q


@pytest.mark.parametrize('talk', ['conversations', 'messages'])
@pytest.mark.parametrize('many', [False, True])
@pytest.mark.parametrize(
    'key',
    'images image_path image_paths imagePath image-file img img_path pictures picture photo pic '
    'Image IMAGES image_filename image_name image_list'.split(),
)
def test_a_picture_without_a_mark_is_put_first_whatever_its_column(tmp_path, key, many, talk):
    row = {talk: TALK, key: ['a.png'] if many else 'a.png'}
    sample, q = all_readers(tmp_path, row)
    assert sample.images == [ImageRef('a.png', str(tmp_path))] and key not in sample.meta
    assert sample.turns[0].text == '<image>\nWhat?' and q.notes == {'prepended missing <image>': 1}
    marked = [{'from': 'human', 'value': 'What is <image>?'}, TALK[1]]
    sample, q = all_readers(tmp_path, {**row, talk: marked})
    assert sample.turns[0].text == 'What is <image>?' and len(sample.images) == 1 and not q.notes
    with pytest.raises(BadRecord, match=f"0 <image> in the text but 1 images under '{key}'"):
        sample_from_llava(row, missing_mark='error')


@pytest.mark.parametrize('marks', [0, 1, 3])
@pytest.mark.parametrize('key', ['image', 'images', 'image_paths', 'pictures'])
def test_several_pictures_have_their_marks_or_stand_first(tmp_path, key, marks):
    talk = [{'from': 'human', 'value': '<image>' * marks + 'What?'}, TALK[1]]
    sample, q = all_readers(tmp_path, {'conversations': talk, key: ['a.png', 'b.png']})
    if not marks and key != 'image':  # LLaVA's own column promises marks
        assert sample.turns[0].text == '<image><image>\nWhat?'
        assert q.notes == {'prepended missing <image>': 1}
    else:
        assert f"{marks} <image> in the text but 2 images under '{key}'" in q.records[0]['reason']


def test_encoded_pictures_of_a_column(tmp_path):
    data = io.BytesIO()
    Image.new('RGB', (4, 4), 'red').save(data, 'PNG')
    struct = {'bytes': data.getvalue(), 'path': 'a.png'}
    cells = dict(images=[[struct]], image_bytes=[data.getvalue()], picture=[struct])
    for (key, cell), text in itertools.product(cells.items(), (False, True)):
        talk = json.dumps(TALK) if text else TALK  # parquet files often hold JSON as text
        table = pa.table({'id': [1], key: cell, 'conversations': [talk]})
        pq.write_table(table, tmp_path / 'p.parquet')
        q = Quarantine()
        records = Records(tmp_path / 'p.parquet', tmp_path, q, parse=sample_from_row)
        assert records[0].images[0].load().getpixel((1, 1)) == (255, 0, 0), key
        assert records[0].n_slots == 1 and q.notes == {'prepended missing <image>': 1}


@pytest.mark.parametrize(
    'cell',
    [
        {'foto': 'a.png'},
        {'file_name': 'coco/a.JPG'},
        {'anything': ['a.webp']},
        {'x': {'path': 'a.png', 'bytes': None}},
        {'screenshot': 'data:image/png;base64,AAAA'},
        {'image_url': 'http://x/a'},
        {'image_urls': ['http://x/a.png']},
        {'image_base64': 'iVBORw0KGgo'},
        {'image_1': 'a.png'},
        {'image_1': 'a', 'image_2': 'b'},
        {'video': 'a.mp4'},
        {'clip': 'a.mp4'},
        {'videos': ['a']},
        {'audio': 'a.wav'},
        {'frames': 'a.mp4'},
        {'images': 'http://x/a.png'},
        {'images': ['../a.png']},
        {'image_path': '/etc/passwd'},
        {'images': [3]},
    ],
)
@pytest.mark.fault('images-in-training')
def test_a_picture_that_is_not_read_is_a_bad_row_that_names_its_column(tmp_path, cell):
    _, q = all_readers(tmp_path, {'conversations': TALK, **cell})
    reason = q.records[0]['reason']
    assert any(k in reason for k in cell) or 'image path' in reason or 'root' in reason
    bare = [TALK[0] | cell, TALK[1]]  # Ollama's messages carry their own
    _, q = one_row(tmp_path, {'conversations': bare})
    if 'frames' not in cell:
        assert f'{next(iter(cell))!r} of turn 0 names a picture' in q.records[0]['reason']


@pytest.mark.parametrize(
    'cell',
    [
        {'images': []},
        {'images': None},
        {'image': ''},
        {'image_path': ''},
        {'picture': {'bytes': None, 'path': None}},
        {'image_id': 17},
        {'image_id': 'coco-17'},
        {'image_width': 640},
        {'images': 0},
        {'has_image': False},
        {'image_source': 'none'},
        {'caption': 'The file is called\na.png'},
        {'id': 'train/a.jpg'},
        {'source': 'a.jpg'},
        {'frames': []},
        {'video': None},
    ],
)
def test_text_rows_stay_text_rows(tmp_path, cell):
    row = {'conversations': TALK, **cell}
    sample, q = one_row(tmp_path, row)
    assert sample is not None and sample.images == [] and not q.notes, q.records
    assert sample_from_row({'id': 1, **row}).turns == sample.turns


@pytest.mark.parametrize(
    'cell, ok',
    [
        ({'images': ['a.png']}, True),
        ({'image_name': 'a.png'}, True),
        ({'image_path': '/d/coco/a.png'}, True),
        ({'image_url': 'http://x/b.png'}, True),
        ({'images': 'http://x/b.png'}, True),
        ({'mask': 'a_mask.png'}, True),
        ({'images': ['a.png', 'b.png']}, False),
        ({'image_path': 'b.png'}, False),
        ({'picture': 'b.png'}, False),
        ({'image_2': 'b.png'}, False),
        ({'image_2': 'coco/a.png'}, True),
        ({'foto': 'b.png'}, False),
        ({'video': 'clip'}, False),
        ({'meta': {'foto': 'x/a.png', 'mask': 'm.png'}}, True),
        ({'image_url': ['http://x/a.png', 'http://x/b.png']}, False),
        ({'frames': ['b.png']}, False),
    ],
)
def test_a_second_column_may_not_contradict_the_first(tmp_path, cell, ok):
    sample, q = one_row(tmp_path, {**row(0, 'coco/a.png'), **cell}, read_llava)
    assert (sample is not None) == ok, q.records
    if ok:
        assert [i.path for i in sample.images] == ['coco/a.png'] and not q.notes
    else:
        assert f'{next(iter(cell))!r}' in q.records[0]['reason']


def test_pictures_inside_of_an_object_are_found(tmp_path):
    inside = {'meta': {'foto': 'b.png', 'mask': 'm.png'}}
    for row_ in ({**row(0, 'a.png'), **inside}, {'conversations': TALK, **inside}):
        _, q = all_readers(tmp_path, row_)
        assert "'meta.foto' names a picture" in q.records[0]['reason']
    _, q = one_row(tmp_path, {'conversations': [TALK[0] | inside, TALK[1]]})
    assert "'meta.foto' of turn 0 names a picture" in q.records[0]['reason']


def test_vora_rows_with_pictures_elsewhere(tmp_path):
    "`frames` that are null or missing say nothing about the other columns."
    for frames in ({'frames': None}, {'frames': []}):
        sample, q = one_row(
            tmp_path, {'conversations': TALK, **frames, 'images': ['a.png']}, read_vora
        )
        assert sample.n_slots == len(sample.images) == 1 and len(q.notes) == 1
        marked = row(0, 'a.png', **frames)
        assert len(one_row(tmp_path, marked, read_vora)[0].images) == 1
    both = {'conversations': TALK, 'frames': ['a.png'], 'image': 'b.png'}
    assert "'frames' and 'image'" in one_row(tmp_path, both, read_vora)[1].records[0]['reason']
    film = {'conversations': TALK, 'frames': ['a.png'], 'video': 'a.mp4'}
    assert one_row(tmp_path, film, read_vora)[0].meta == {'video': 'a.mp4'}


def test_what_a_reader_gives_can_be_written_and_read_again(tmp_path):
    rows = [
        {'id': '1', 'conversations': TALK, 'images': ['a.png'], 'system': 'Be brief.'},
        {'id': '2', **row(2), 'image_url': 'http://x/a.jpg', 'image_name': 'a.jpg'},
    ]
    (tmp_path / 'a.json').write_text(json.dumps(rows))
    samples = list(read_llava(tmp_path / 'a.json'))
    write_llava(samples, tmp_path / 'b.json')
    again = list(read_llava(tmp_path / 'b.json'))
    assert [(s.turns, s.images, s.meta) for s in again] == [
        (s.turns, s.images, s.meta) for s in samples
    ]
    for meta in ({'images': ['b.png']}, {'system': 'Be long.'}):
        with pytest.raises(ValueError, match='of another row|different pictures'):
            to_llava_row(replace(samples[0], meta=meta))
        with pytest.raises(ValueError, match='of another row'):
            to_llava_row(Sample('x', [Turn('user', 'Hi')], meta=meta))


@pytest.mark.parametrize(
    'key', ['system', 'system_prompt', 'systemPrompt', 'system_message', 'System']
)
@pytest.mark.fault('system-column')
def test_a_system_column_opens_the_conversation(tmp_path, key):
    prompt = 'Answer in French.'
    sample, q = all_readers(tmp_path, {'conversations': TALK, key: prompt})
    assert sample.turns == [Turn('system', prompt), Turn('user', 'What?'), Turn('assistant', 'Red')]
    assert key not in sample.meta and not q.notes
    said = [{'from': 'system', 'value': prompt + '\n'}, *TALK]
    assert len(all_readers(tmp_path, {'conversations': said, key: prompt})[0].turns) == 3
    said[0] = {'from': 'system', 'value': 'Be brief.'}
    _, q = all_readers(tmp_path, {'conversations': said, key: prompt})
    assert f'{key!r} differs from the system turn' in q.records[0]['reason']
    for empty in ('', '  ', None):
        assert len(all_readers(tmp_path, {'conversations': TALK, key: empty})[0].turns) == 2
    for wrong in (3, [prompt], {'text': prompt}):
        assert all_readers(tmp_path, {'conversations': TALK, key: wrong})[0] is None
    both = {'conversations': TALK, key: prompt, 'system_text': 'Be brief.'}
    assert 'differ; keep one' in all_readers(tmp_path, both)[1].records[0]['reason']
    vora = {'conversations': TALK, 'frames': ['a.png'], key: prompt}
    sample, _ = one_row(tmp_path, vora, read_vora)
    assert [t.text for t in sample.turns] == [prompt, '<image>What?', 'Red']
    region = {'conversations': TALK, key: prompt, 'image': 'a.png', 'bboxes': [[0, 0, 9, 9]]}
    sample, _ = one_row(tmp_path, region, read_regions, missing_mark='prepend')
    assert [t.text for t in sample.turns] == [prompt, '<image>\nWhat?', 'Red']
    del region['conversations']
    assert one_row(tmp_path, region, read_regions)[0] is None
    with pytest.raises(BadRecord, match=key):
        sample_from_region_row({**region, 'id': 'v7w-1'})


# --- quarantine


def test_without_quarantine_the_first_bad_row_names_file_and_row(tmp_path):
    (tmp_path / 'a.json').write_text(json.dumps([row(0), {'id': 1}]))
    with pytest.raises(BadRecord, match=r'a\.json row 1 \(id 1\): no turns'):
        list(read_llava(tmp_path / 'a.json'))


def test_cap_of_a_file_is_judged_at_its_end_and_at_close(tmp_path):
    rows = [row(i) if i % 10 else {'id': i} for i in range(300)]
    (tmp_path / 'a.json').write_text(json.dumps(rows))
    q = Quarantine(cap=0.05)
    with pytest.raises(TooManyBadRecords, match='no turns'):
        list(read_llava(tmp_path / 'a.json', quarantine=q))
    assert q.n_seen == 300
    q = Quarantine(cap=0.2, path=tmp_path / 'bad.json')
    assert len(list(read_llava(tmp_path / 'a.json', quarantine=q))) == 270
    q.close()
    stored = json.loads((tmp_path / 'bad.json').read_text())
    assert (
        stored['seen'] == 300
        and stored['quarantined'] == 30
        and [r['row'] for r in stored['records']] == list(range(0, 300, 10))
    )
    q = Quarantine(cap=0.5, max_count=3)
    with pytest.raises(TooManyBadRecords, match='max_count=3'):
        list(read_llava(tmp_path / 'a.json', quarantine=q))
    q = Quarantine(cap=1, max_listed=2)
    list(read_llava(tmp_path / 'a.json', quarantine=q))
    assert q.n_bad == 30 and len(q.records) == 2 and q.to_dict()['quarantined'] == 30


def test_bad_rows_in_front_do_not_stop_a_file_within_the_cap(tmp_path):
    (tmp_path / 'a.json').write_text(
        json.dumps([row(i) if i > 3 else {'id': i} for i in range(400)])
    )
    q = Quarantine(cap=0.01)
    assert len(list(read_llava(tmp_path / 'a.json', quarantine=q))) == 396 and q.n_bad == 4
    q.close()


@given(st.lists(st.booleans(), min_size=1, max_size=400), st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_close_judges_the_share_of_any_pattern(bad, cap):
    q = Quarantine(cap=cap)
    for i, b in enumerate(bad):
        q.seen()
        if b:
            q.add('f', i, None, 'x: y')
    if sum(bad) > cap * len(bad):
        with pytest.raises(TooManyBadRecords, match=r'larger cap: Quarantine\(cap=\.\.\.\)'):
            q.close()
    else:
        q.close()


def draw(q, rows, bad):
    "Draw `rows` one by one; the number of draws until the cap stops them, None if it does not."
    for n, i in enumerate(rows):
        try:
            q.drawn(1, [(int(i), str(i), 'missing: a.jpg')] if bad(i) else [])
        except TooManyBadRecords:
            return n
    return None


@pytest.mark.parametrize('share', [0.003, 0.008, 0.0095])
def test_draws_of_data_within_the_cap_are_not_stopped(share):
    rng, stopped = np.random.default_rng(0), 0
    for _ in range(60):
        q = Quarantine(cap=0.01)
        q.seen(10**6)
        stopped += draw(q, rng.integers(10**6, size=3000), lambda i: i < share * 10**6) is not None
    assert stopped == 0


def test_draws_over_the_cap_are_stopped_early_and_a_row_counts_once():
    rng = np.random.default_rng(1)
    q = Quarantine(cap=0.01)
    q.seen(10**6)
    assert draw(q, rng.integers(10**6, size=20000), lambda i: i < 50000) < 1000  # 5% are bad
    q = Quarantine(cap=0.01, max_count=4)
    q.seen(400)  # 4 of 400, over and over
    assert draw(q, [i for _ in range(20) for i in rng.permutation(400)], lambda i: i < 4) is None
    assert (q.n_bad, q.n_bad_drawn, len(q.records)) == (4, 80, 4)
    q.close()
    q = Quarantine(cap=0.01)
    q.seen(400)  # 6 of 400: certain in the first pass
    assert draw(q, rng.permutation(400), lambda i: i < 6) is not None


def test_quarantine_goes_on_from_its_state():
    whole, half, rest = Quarantine(cap=1), Quarantine(cap=1), Quarantine(cap=1)
    for q, part in ((whole, range(10)), (half, range(5)), (rest, range(5, 10))):
        if q is rest:
            rest.load_state_dict(json.loads(json.dumps(half.state_dict())))
        for i in part:
            q.drawn(2, [(i % 3, None, 'missing: a.jpg')])
            q.note('first frame used')
            q.note('dropped leading assistant turn', row=('a.json', i % 4))
    assert whole.to_dict() == rest.to_dict() and whole.n_bad == 3
    assert whole.notes == {'first frame used': 10, 'dropped leading assistant turn': 4}


def test_truncated_file_delivers_then_stops_or_goes_on(tmp_path):
    text = json.dumps([row(i) for i in range(300)])
    (tmp_path / 'a.json').write_text(text[: len(text) // 2])
    got, q = [], Quarantine()
    with pytest.raises(BadRecord, match='truncated.*allow_truncated'):
        for s in read_llava(tmp_path / 'a.json', quarantine=q):
            got.append(s.id)
    assert (
        got == [str(i) for i in range(len(got))]
        and len(got) > 100
        and q.records[0]['row'] == len(got)
    )
    q = Quarantine(allow_truncated=True)
    assert [s.id for s in read_llava(tmp_path / 'a.json', quarantine=q)] == got and q.summary() == {
        'truncated': 1
    }
    with pytest.raises(BadRecord, match='truncated'):
        list(read_llava(tmp_path / 'a.json'))
    with pytest.raises(FileNotFoundError):
        list(read_llava(tmp_path / 'none.json'))


# --- writing

texts = st.text(st.characters(exclude_categories=('Cs',)), max_size=12).filter(
    lambda t: '<image>' not in t
)
numbers = st.integers(-9999, 9999) | st.floats(-9999, 9999)
boxes = st.tuples(numbers, numbers, st.floats(1, 99), st.floats(1, 99)).map(
    lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3])
)
polygons = st.lists(numbers, min_size=6, max_size=10).filter(lambda p: len(p) % 2 == 0).map(tuple)
regions = st.builds(Region, boxes, st.lists(polygons, max_size=2).map(tuple), st.none() | texts)
metas = st.dictionaries(
    st.sampled_from(['answers', 'question_type', 'x é']),
    json_values.filter(lambda v: True),
    max_size=2,
)
paths = st.lists(
    st.text(string.ascii_letters + 'é _-', min_size=1, max_size=5).filter(str.strip),
    min_size=1,
    max_size=3,
).map('/'.join)


@st.composite
def samples(draw):
    n = draw(st.integers(0, 3))
    pairs = draw(st.lists(st.tuples(texts, texts), min_size=1, max_size=3))
    turns = [t for q, a in pairs for t in (Turn('user', q), Turn('assistant', a))]
    turns[0] = Turn('user', '<image>' * n + turns[0].text)
    if draw(st.booleans()):
        turns.insert(0, Turn('system', draw(texts)))
    if draw(st.booleans()):
        turns.pop()
    return Sample(
        draw(texts.filter(bool)),
        turns,
        [ImageRef(p, 'root') for p in draw(st.lists(paths, min_size=n, max_size=n))],
        draw(st.lists(regions, max_size=2)),
        draw(texts.filter(bool)),
        draw(metas),
    )


@given(st.lists(samples(), max_size=4), st.sampled_from(['a.json', 'a.jsonl']))
@settings(max_examples=40, deadline=None)
def test_write_then_read_is_the_identity(tmp_path_factory, items, name):
    path = tmp_path_factory.mktemp('w') / name
    utf8 = lambda v: json.dumps(v, ensure_ascii=False).encode('utf-8', 'replace')
    items = [
        s for s in items if b'?' not in utf8(s.meta)
    ]  # lone surrogates in meta are refused on reading
    assert write_llava(items, path) == len(items)
    assert list(read_llava(path, 'root')) == items
    assert list(Records(path, 'root')) == items


def test_write_is_atomic_and_refuses_what_it_cannot_say(tmp_path):
    path = tmp_path / 'a.json'
    write_llava([sample_from_llava(row(1))], path)
    before = path.read_bytes()

    def broken():
        yield sample_from_llava(row(2))
        raise RuntimeError('generator died')

    with pytest.raises(RuntimeError):
        write_llava(broken(), path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ['a.json']
    with pytest.raises(ValueError, match='in memory'):
        to_llava_row(Sample('1', [Turn('user', '<image>')], [ImageRef('', None, b'x')]))
    with pytest.raises(ValueError, match='row keys'):
        to_llava_row(Sample('1', [Turn('user', '')], meta={'id': 3}))
    with pytest.raises(ValueError, match='.jsonl'):
        write_llava([], tmp_path / 'a.csv')
    absolute = Sample('1', [Turn('user', '<image>')], [ImageRef('/x/a.jpg')], source='s')
    write_llava([absolute], path)
    assert list(read_llava(path, allow_absolute=True)) == [absolute]


def test_records_random_access(tmp_path):
    path = tmp_path / 'a.json'
    path.write_text(json.dumps([row(0), {'id': 1}, row(2)]))
    records = Records(path, '/d')
    assert (
        len(records) == 3
        and records[2].id == '2'
        and records[2].where == 'a.json:2'
        and records[-3].id == '0'
    )
    with pytest.raises(BadRecord, match='a.json row 1: no turns'):
        records[1]
    path.write_text(json.dumps([row(0), row(1)])[:-20])
    with pytest.raises(BadRecord, match='truncated'):
        Records(path)
    q = Quarantine(allow_truncated=True)
    assert len(Records(path, quarantine=q)) == 1 and q.n_bad == 1


def test_rows_of_parquet_by_number(tmp_path):
    """Any row of any row group, in any order, as the stream gives it; a damaged file is listed, not
    lost."""
    table = pa.table(
        {
            'id': [str(i) for i in range(500)],
            'frames': [[bytes([i % 256])] if i % 3 else None for i in range(500)],
        }
    )
    pq.write_table(table, tmp_path / 'v.parquet', row_group_size=150)
    want, index = (
        [r.value for r in iter_rows(tmp_path / 'v.parquet')],
        RowIndex(tmp_path / 'v.parquet'),
    )
    assert (
        len(index) == 500
        and not index.errors
        and [index[i] for i in (499, 0, 149, 150, 151, -1, 300)]
        == [want[i] for i in (499, 0, 149, 150, 151, -1, 300)]
    )
    with pytest.raises(IndexError):
        index[500]
    (tmp_path / 'cut.parquet').write_bytes((tmp_path / 'v.parquet').read_bytes()[:-9])
    with pytest.raises(BadRecord, match='unreadable parquet'):
        Records(tmp_path / 'cut.parquet')
    with pytest.raises(OSError):
        RowIndex(tmp_path / 'none.parquet')


def test_a_row_with_frames_is_never_read_as_text():
    row = dict(
        id='1',
        frames=['a.png', 'b.png'],
        conversations=[{'from': 'human', 'value': 'what ?'}, {'from': 'gpt', 'value': 'red'}],
    )
    with pytest.raises(BadRecord, match="'frames' in place of 'image'.*format='vora'"):
        sample_from_llava(row)
    assert sample_from_row(row) == sample_from_vora(row) and len(sample_from_row(row).images) == 2
    plain = dict(
        id='1',
        image='a.png',
        conversations=[
            {'from': 'human', 'value': '<image> what ?'},
            {'from': 'gpt', 'value': 'red'},
        ],
    )
    assert sample_from_row(plain) == sample_from_llava(plain)
