"""`vlmbench data mix`: zero's pictures and text, EVE's eighteen sources, equal bytes by a seed."""

import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner

from vlmbench.data.mix_files import EVE_TABLE7, MIXED, mix_pictures_and_text, mix_sources
from vlmbench.data.mix_rows import mix_order
from vlmbench.data.quarantine import TooManyBadRecords
from vlmbench.data.sources import DataError, open_samples
from vlmbench.run.cli import app

FOLDS = dict(coco=40, gqa=20, ocr_vqa=10, vg=5)


def row(id, path=None):
    mark = '<image>\n' if path else ''
    talk = [{'from': 'human', 'value': f'{mark}What?'}, {'from': 'gpt', 'value': 'x'}]
    return dict(id=id, conversations=talk) | (dict(image=path) if path else {})


def messages(i):
    return [dict(role='user', content=f'Q {i}'), dict(role='assistant', content=f'A {i}')]


@pytest.fixture
def sources(tmp_path):
    "LLaVA's rows, some of them text, and GenQA in two shards, some of its messages empty."
    rows = [row(f'{d}-{i}', f'{d}/{i}.jpg') for d, n in FOLDS.items() for i in range(n)]
    order = np.random.default_rng(0).permutation(len(rows))
    rows = [rows[i] for i in order] + [row(f'sharegpt-{i}') for i in range(9)]
    (tmp_path / 'llava_v1_5_mix665k_shuffled.json').write_text(json.dumps(rows))
    (tmp_path / 'genqa').mkdir()
    for shard in range(2):
        said = [messages(100 * shard + i) for i in range(100)]
        said[7][1]['content'] = None
        said[9] = [dict(role='tool', content='no speaker')]
        table = pa.table(dict(text=said, idx=list(range(100)), category=['x'] * 100))
        pq.write_table(table, tmp_path / 'genqa' / f'train-{shard}.parquet')
    return tmp_path


def mix(sources, name, **more):
    given = dict(text_rows=60, seed=0, bad_rows=0.1) | more
    pictures = sources / 'llava_v1_5_mix665k_shuffled.json'
    return mix_pictures_and_text(pictures, sources / 'genqa', sources / name, **given)


def test_order_fields_and_what_is_dropped(sources):
    made = mix(sources, 'a')
    rows = json.loads(made.path.read_text())
    assert made.path.name == MIXED and set(made.counts) == {*FOLDS, 'genqa'}
    assert list(made.counts)[-1] == 'genqa' and made.counts['genqa'] == 60
    expected = [list(made.counts)[source] for source in mix_order(list(made.counts.values()))]
    found = [r['image'].split('/')[0] if 'image' in r else 'genqa' for r in rows]
    assert found == expected
    assert [r['index'] for r in rows] == list(range(135))
    assert {r['ds'] for r in rows if 'image' in r} == {'llava-mix-665k'}
    assert {r['ds'] for r in rows if 'image' not in r} == {'genqa-random-500k'}
    assert len({r['id'] for r in rows}) == 135 and not any('sharegpt' in r['id'] for r in rows)
    text = next(r for r in rows if 'image' not in r)
    assert set(text) == {'id', 'conversations', 'ds', 'index'}
    assert [turn['from'] for turn in text['conversations']] == ['human', 'gpt']


def test_the_same_seed_gives_the_same_bytes(sources):
    first, again = (mix(sources, name).path.read_bytes() for name in 'ab')
    assert first == again != mix(sources, 'c', seed=1).path.read_bytes()
    with pytest.raises(DataError, match='exists already'):
        mix(sources, 'a')


def test_each_row_of_text_is_kept_with_a_probability(sources):
    "More rows than are kept cannot be had: about 0.7 of 198 good ones."
    everything = dict(text_rows=10**6)
    kept = [mix(sources, str(s), seed=s, **everything).counts['genqa'] for s in range(6)]
    assert 125 < np.mean(kept) < 150 and len(set(kept)) > 1
    with pytest.raises(TooManyBadRecords):
        mix(sources, 'strict', text_rows=10**6, bad_rows=0.0)


def test_it_is_found_by_its_published_name(sources):
    name = 'llava-1.5-665k-genqa-500k-instructions'
    mix(sources, name)
    pictures = sources / 'llava-1.5-665k-instructions' / 'train_split'
    for fold, n in FOLDS.items():
        (pictures / fold).mkdir(parents=True)
        for i in range(n):
            Image.new('RGB', (2, 2)).save(pictures / fold / f'{i}.jpg')
    samples = open_samples(sources, name)
    assert len(samples) == 135 and sum(bool(sample.images) for sample in samples) == 75
    assert samples[0].images[0].load().size == (2, 2)
    done = CliRunner().invoke(app, ['data', 'check', 'llava_genqa_mix', str(sources)])
    assert 'row count' in done.stdout and 'missing' not in done.stdout


def write_eve(folder, leave_out=()):
    for k, name in enumerate(EVE_TABLE7):
        rows = [row(f'{name}-{i}', f'{name}/{i}.jpg' if k % 2 else None) for i in range(2)]
        if name == 'gqa':
            (folder / name).mkdir()
            (folder / name / 'part-0.jsonl').write_text('\n'.join(map(json.dumps, rows)))
        elif name not in leave_out:
            (folder / f'{name}.json').write_text(json.dumps(rows))


def test_table_seven(tmp_path, monkeypatch):
    write_eve(tmp_path)
    made = [mix_sources('eve_table7', tmp_path / name).path.read_bytes() for name in 'ab']
    assert made[0] == made[1]
    rows = json.loads(made[0])
    assert len(rows) == 36 and {r['source'] for r in rows} == set(EVE_TABLE7)
    samples = open_samples(tmp_path, 'a/eve_table7.json')
    shown = next(sample for sample in samples if sample.images)
    assert shown.images[0].root == str(tmp_path)
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ['data', 'mix', 'eve_table7', 'c', '--seed', '0'])
    assert done.exit_code == 0, done.output
    assert (tmp_path / 'c' / 'eve_table7.json').read_bytes() == made[0]
    assert 'note: dvqa has 2 rows that could be taken, not 200,000' in done.stdout


def test_counts_bad_rows_and_missing_sources(tmp_path, monkeypatch):
    write_eve(tmp_path, ('docvqa', 'vqav2'))
    with pytest.raises(DataError, match=r'lacks 2 of 18 sources: vqav2 \(83,000.*docvqa.*docvqa'):
        mix_sources('eve_table7', tmp_path / 'out')
    some = [row(str(i)) for i in range(30)] + [dict(id='bad')] * 3
    for name in ('docvqa', 'vqav2'):
        (tmp_path / f'{name}.json').write_text(json.dumps(some))
    monkeypatch.setitem(EVE_TABLE7, 'vqav2', 12)
    made = mix_sources('eve_table7', tmp_path / 'out', bad_rows=0.5)
    assert (made.counts['vqav2'], made.counts['docvqa']) == (12, 30)
    assert made.bad.keys() == {'no turns'} and 3 <= made.bad['no turns'] <= 6
    asked = ['data', 'mix', 'eve_table7', str(tmp_path / 'by'), '--bad-rows', '0.5']
    done = CliRunner().invoke(app, asked)
    assert f'bad: no turns  {made.bad["no turns"]}' in re.sub(' {3,}', '  ', done.stdout)
    with pytest.raises(DataError, match='does not lie below'):
        mix_sources('eve_table7', tmp_path / 'in' / 'out', data=tmp_path / 'gqa')
    inside = pa.table(
        dict(image=[dict(bytes=b'x', path=None)], conversations=[row('1', 'a')['conversations']])
    )
    (tmp_path / 'ai2d.json').unlink()
    pq.write_table(inside, tmp_path / 'ai2d.parquet')
    with pytest.raises(DataError, match='data convert ai2d OUT --to llava'):
        mix_sources('eve_table7', tmp_path / 'again', bad_rows=0.5)


def test_rows_that_are_none_and_files_without_pictures_say_so(sources):
    "Neither with words of Python's, nor as if a damaged file were a clean one without pictures."
    pictures = sources / 'damaged.json'
    pictures.write_text(json.dumps([5, None, 'x', []]))
    with pytest.raises(DataError, match=r'no row of 4 has a picture; bad: wrong type \(4\)'):
        mix_pictures_and_text(pictures, sources / 'genqa', sources / 'mixed', bad_rows=1.0)


def test_the_command_from_another_folder(sources, monkeypatch):
    monkeypatch.chdir(sources / 'genqa')
    asked = ['data', 'mix', '--pictures', '../llava_v1_5_mix665k_shuffled.json', '--text', '.']
    asked += ['--text-rows', '60', '--seed', '0', '--out', '../d', '--bad-rows', '0.1']
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 0, (done.output, done.exception)
    assert (sources / 'd' / MIXED).read_bytes() == mix(sources, 'a').path.read_bytes()
    done = CliRunner().invoke(app, ['data', 'mix', '--pictures', 'x', '--out', 'y'])
    assert done.exit_code != 0 and 'give all of --pictures' in str(done.exception)
