"""`vlmbench data convert`: equal samples in every layout, bytes of pictures, stops, training."""

import io
import json
import os
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner

import vlmbench
from vlmbench.data import convert
from vlmbench.data.convert import convert_data, written_name
from vlmbench.data.quarantine import Quarantine, TooManyBadRecords
from vlmbench.data.record import ImageRef
from vlmbench.data.sources import DataError, open_samples
from vlmbench.models.vlm import build_vlm
from vlmbench.run.cli_data import data_app
from vlmbench.train.loop import train
from vlmbench.train.recipe import Stage, full

ASSETS = Path(vlmbench.__file__).parent / 'assets'
TALK = [{'from': 'human', 'value': 'what is red ?'}, {'from': 'gpt', 'value': 'the circle'}]


def picture(number, kind='JPEG', **more):
    pixels = np.random.default_rng(number).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, kind, **more)
    return data.getvalue()


def turned():
    exif = Image.Exif()
    exif[0x0112] = 6
    return picture(9, exif=exif)


def write_source(folder, more=()):
    "VoRA's shards as they may come: bytes, clips, JSON text, text alone, a broken picture."
    folder.mkdir(parents=True)
    rows = [
        dict(id='sa/1', frames=[picture(1)]),
        dict(id='2', frames=[picture(2, 'PNG')]),
        dict(id='clip', frames=[picture(3), picture(4), picture(5, 'PNG')]),
        dict(id='text', frames=None),
        dict(id='broken', frames=[picture(6)[:200]]),
        dict(id='phone', frames=[turned()]),
        dict(id='web', frames=[picture(7, 'WEBP', lossless=True)]),
        *more,
    ]
    ready = [dict(row, conversations=json.dumps(TALK)) for row in rows]
    half = len(ready) // 2
    pq.write_table(pa.Table.from_pylist(ready[:half]), folder / 'part-0.parquet')
    pq.write_table(pa.Table.from_pylist(ready[half:]), folder / 'part-1.parquet')
    return folder


def seen(folder, name):
    "Id, turns, pixels and regions of the samples that can be read."
    found = []
    for sample in open_samples(folder, name, Quarantine(1.0)):
        try:
            shown = [p.load() if isinstance(p, ImageRef) else p for p in sample.images]
        except ValueError:
            continue
        pixels = [np.asarray(p.convert('RGB')).tolist() for p in shown]
        found.append((sample.id, sample.turns, pixels, sample.regions))
    return found


def files(folder):
    found = {p: p.read_bytes() for p in sorted(folder.rglob('*')) if p.is_file()}
    return {str(path.relative_to(folder)): data for path, data in found.items()}


def test_the_layout_of_vora(tmp_path):
    source = write_source(tmp_path / 'shards')
    counts = convert_data(source, tmp_path / 'out', 'vora', name='recap')
    assert (counts['read'], counts['written'], counts['bad']) == (7, 6, 1)
    assert counts['note: picture written as PNG'] == 1
    made = files(tmp_path / 'out')
    told = json.loads(made.pop('conversion.json'))
    assert [(row['id'], row['row']) for row in told['bad_rows']] == [('broken', 1)]
    names = 'sa_1 2 clip clip_1 clip_2 phone web'.split()
    frames = {f'frames/{n}.{"png" if n in ("2", "clip_2", "web") else "jpg"}' for n in names}
    assert set(made) == {'annotations/recap.json', *frames}
    assert made['frames/sa_1.jpg'] == picture(1) and made['frames/clip_1.jpg'] == picture(4)
    assert made['frames/2.png'] == picture(2, 'PNG') and made['frames/phone.jpg'] == turned()
    for name, data in made.items():  # a name says what is in the file
        assert data.startswith({'jpg': b'\xff\xd8', 'png': b'\x89PNG'}.get(name[-3:], b''))
    rows = [json.loads(line) for line in made['annotations/recap.json'].splitlines()]
    assert rows[0] == dict(id='sa/1', frames=['frames/sa_1.jpg'], conversations=TALK)
    assert rows[2]['frames'] == [f'frames/clip{end}' for end in ('.jpg', '_1.jpg', '_2.png')]
    assert rows[3] == dict(id='text', conversations=TALK)


def test_every_layout_gives_equal_samples(tmp_path):
    source = write_source(tmp_path / 'shards')
    first = seen(tmp_path, 'shards')
    assert len(first) == 6
    for to in ('llava', 'chat', 'parquet', 'vora', 'parquet', 'chat', 'llava', 'vora', 'llava'):
        out = tmp_path / f'{to}-{len(list(tmp_path.iterdir()))}'
        convert_data(source, out, to, name='rows', images=None if source.suffix else source.parent)
        assert seen(out, written_name(to, 'rows')) == first, to
        (source,) = out.glob('rows*') if to != 'vora' else out.glob('annotations/rows.json')
        if to == 'vora':  # the frames lie beside the annotations
            (out / 'rows.json').write_bytes(source.read_bytes())
            source = out / 'rows.json'


def test_columns_regions_and_names_that_repeat(tmp_path):
    (tmp_path / 'coco').mkdir()
    for name in 'ab':
        (tmp_path / 'coco' / f'{name}.jpg').write_bytes(picture(ord(name)))
    shown = [dict(TALK[0], value='<image>\nwhat ?'), TALK[1]]
    boxes = [dict(box=[1, 2, 3, 4], polygons=[], label='cat')]
    rows = [
        dict(id='x', image='coco/a.jpg', conversations=shown, topic='t', answers=['a', 'b']),
        dict(id='x', image='coco/b.jpg', conversations=shown, regions=boxes, n=3),
        dict(id='y', image='coco/a.jpg', conversations=shown, image_path='other/a.jpg'),
        dict(id='x', conversations=TALK, system='Be brief.'),
    ]
    (tmp_path / 'mix.json').write_text(json.dumps(rows))
    before = seen(tmp_path, 'mix.json')
    for to in ('llava', 'chat', 'parquet'):
        counts = convert_data(tmp_path / 'mix.json', tmp_path / to, to)
        assert counts['bad'] == 0 and seen(tmp_path / to, 'mix') == before
        samples = open_samples(tmp_path / to, 'mix')
        assert samples[0].meta['answers'] == ['a', 'b'] and samples[1].meta['n'] == 3
    assert (tmp_path / 'llava' / 'images' / 'coco' / 'a.jpg').read_bytes() == picture(ord('a'))
    counts = convert_data(tmp_path / 'mix.json', tmp_path / 'vora', 'vora')
    assert counts['bad: regions'] == 1 and counts["note: column 'topic' left out"] == 1
    two = [dict(id='x', image=f'coco/{n}.jpg', conversations=shown) for n in 'ab']
    (tmp_path / 'two.json').write_text(json.dumps(two))
    convert_data(tmp_path / 'two.json', tmp_path / 'both', 'vora')
    assert [row[2] for row in seen(tmp_path / 'both', 'annotations/two.json')] == [
        row[2] for row in seen(tmp_path, 'two.json')
    ]


@pytest.mark.parametrize('to', ['llava', 'vora', 'parquet', 'chat'])
def test_a_stopped_conversion_goes_on_to_the_same_bytes(tmp_path, to, monkeypatch):
    more = [dict(id=f'more/{i}', frames=[picture(20 + i)] * (i % 3)) for i in range(9)]
    source = write_source(tmp_path / 'shards', more)
    settings = dict(shard_rows=2, name='rows')
    monkeypatch.setattr(convert.JsonWriter, 'add', often(convert.JsonWriter.add))
    convert_data(source, tmp_path / 'whole', to, **settings)
    make = convert.LAYOUTS[to]
    for stop in (1, 6, 11):

        def stopping(sample, pictures, out, row):
            if row == stop:
                raise KeyboardInterrupt
            return make(sample, pictures, out, row)

        monkeypatch.setitem(convert.LAYOUTS, to, stopping)
        with pytest.raises(KeyboardInterrupt):
            convert_data(source, tmp_path / 'stopped', to, **settings)
    with pytest.raises(DataError, match='another shard_rows'):
        convert_data(source, tmp_path / 'stopped', to, name='rows', shard_rows=3)
    monkeypatch.setitem(convert.LAYOUTS, to, make)
    write = convert.write_json

    def stopping_at_the_end(path, value):
        if path.name == 'conversion.json':
            raise KeyboardInterrupt
        write(path, value)

    monkeypatch.setattr(convert, 'write_json', stopping_at_the_end)
    with pytest.raises(KeyboardInterrupt):
        convert_data(source, tmp_path / 'stopped', to, **settings)
    monkeypatch.setattr(convert, 'write_json', write)
    convert_data(source, tmp_path / 'stopped', to, **settings)
    assert files(tmp_path / 'stopped') == files(tmp_path / 'whole')
    with pytest.raises(DataError, match='exists already'):
        convert_data(source, tmp_path / 'stopped', to, **settings)


def often(add):
    "`add` of a writer that is saved every other row."

    def adding(self, row):
        add(self, row)
        return self.rows % 2 == 0

    return adding


def test_memory_does_not_grow_with_the_data(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (120, 160, 3), dtype=np.uint8)
    data = io.BytesIO()
    Image.fromarray(noise).save(data, 'PNG')
    rows = [dict(id=str(i), frames=[data.getvalue()]) for i in range(400)]
    write_source(tmp_path / 'shards', rows)
    total = 400 * len(data.getvalue())
    tracemalloc.start()
    convert_data(tmp_path / 'shards', tmp_path / 'out', 'vora')
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total > 20e6 and peak < total / 2, (total, peak)


def test_the_command_and_too_many_bad_rows(tmp_path, monkeypatch):
    write_source(tmp_path / 'shards')
    (tmp_path / 'elsewhere').mkdir()
    monkeypatch.chdir(tmp_path / 'elsewhere')
    done = CliRunner().invoke(data_app, ['convert', '../shards', '../llava', '--to', 'llava'])
    assert done.exit_code == 0, done.output
    assert 'bad: damaged' in done.stdout and 'stages.STAGE.data=shards' in done.stdout
    done = CliRunner().invoke(
        data_app, ['convert', '../shards', '../strict', '--to', 'chat', '--bad-rows', '0.1']
    )
    assert done.exit_code != 0 and '1 of 7 rows are bad' in str(done.exception)
    done = CliRunner().invoke(data_app, ['convert', '../shards', '../x', '--to', 'coco'])
    assert done.exit_code != 0 and 'use one of llava, vora' in str(done.exception)
    with pytest.raises(TooManyBadRecords, match='conversion.json'):
        convert_data('../shards', '../none', 'chat', bad_rows=0.0)


@pytest.mark.parametrize('text', ['', '[]'])
def test_a_file_without_rows_is_no_conversion(text, tmp_path):
    source = tmp_path / ('rows.json' if text else 'rows.jsonl')
    source.write_text(text)
    with pytest.raises(DataError, match='holds no rows: there is nothing to convert'):
        convert_data(source, tmp_path / 'out', 'vora')
    assert not (tmp_path / 'out' / 'conversion.json').exists()


@pytest.mark.parametrize('to', ['vora', 'chat'])
def test_it_trains(tmp_path, to):
    write_source(tmp_path / 'shards')
    convert_data(tmp_path / 'shards', tmp_path / 'out', to)
    samples = open_samples(tmp_path / 'out', written_name(to, 'shards'))
    model, processor = build_vlm(ASSETS / 'llm', ASSETS / 'vit', template='world')
    stage = Stage('s', dict(projector=full()), 'x', lr=1e-3, steps=2, batch_rows=3, max_tokens=256)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        result = train(model, processor, stage, samples, tmp_path / 'run', progress_seconds=None)
    assert result.done and os.path.exists(tmp_path / 'run')
