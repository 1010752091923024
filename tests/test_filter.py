"""Captions: filtered by rules that are counted, the same bytes twice; written by a model."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from warm_kernels import vlmbench

from vlmbench.data.clusters import cluster, nearest_to_centres
from vlmbench.data.filter import Choice, filter_captions, is_cut, repeats_itself
from vlmbench.data.sources import open_samples

N = 40
COLOURS = ['red', 'green', 'blue', 'white']
FLAGS = '--above 448 --drop-repeats --drop-cut --cluster clip:clip --clusters 4 --nearest 5'


def command(*words, cwd):
    done = vlmbench('data', *words, cwd=cwd)
    return done.returncode, done.stdout, done.stderr


def caption(number):
    "Two repeat themselves, two are cut."
    said = f'A {COLOURS[number % 4]} square, number {number}.'
    return {5: 'It is red. It is big. It is red.', 6: 'a big big big one.'}.get(
        number, {7: 'A square that', 8: 'It is'}.get(number, said)
    )


def row(number):
    talk = [{'from': 'human', 'value': '<image>'}, {'from': 'gpt', 'value': caption(number)}]
    return dict(id=f'r{number}', image=f'pictures/{number}.png', conversations=talk)


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    "Forty drawn pictures of four colours, two small, one damaged, one missing; and a tiny CLIP."
    root = tmp_path_factory.mktemp('captions')
    (root / 'pictures').mkdir()
    rng = np.random.default_rng(0)
    for i in range(N):
        size = (500, 448) if i in (1, 2) else (460, 450 + i)
        picture = Image.new('RGB', size, COLOURS[i % 4])
        picture.paste('black', tuple(rng.integers(0, 200, 2).tolist()) + (230, 230))
        picture.save(root / 'pictures' / f'{i}.png')
    whole = (root / 'pictures' / '3.png').read_bytes()
    (root / 'pictures' / '3.png').write_bytes(whole[: len(whole) // 2])
    (root / 'pictures' / '4.png').unlink()
    (root / 'captions').mkdir()
    for k in range(2):
        rows = [row(i) for i in range(N)][20 * k : 20 * k + 20]
        (root / 'captions' / f'part-{k}.jsonl').write_text(
            ''.join(json.dumps(r) + '\n' for r in rows)
        )
    part = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    config = CLIPConfig(
        text_config=part | dict(vocab_size=9),
        vision_config=part | dict(image_size=32, patch_size=8),
        projection_dim=8,
    )
    import torch

    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(root / 'clip')
    shape = dict(size={'shortest_edge': 32}, crop_size={'height': 32, 'width': 32})
    CLIPImageProcessor(**shape).save_pretrained(root / 'clip')
    return root


def files(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob('*'))
        if path.is_file()
    }


@pytest.mark.slow
def test_the_command_filters_counts_and_writes_the_same_bytes_twice(data, tmp_path):
    for out in ('first', 'second'):
        code, said, error = command(
            'filter', 'captions', out, *FLAGS.split(), '--rows', '8', '--seed', '0', cwd=data
        )
        assert code == 0, error
    counts = {line.rsplit('  ', 1)[0].strip(): int(line.split()[-1]) for line in said.splitlines()}
    left = N - 2 - 1 - 1 - 2 - 2
    kept = counts['written: all']
    assert counts == {
        'read': N,
        'dropped: small picture': 2,
        'dropped: missing picture': 1,
        'dropped: unreadable picture': 1,
        'dropped: repetition': 2,
        'dropped: cut caption': 2,
        'dropped: far from its centre': left - kept,
        'written: all': kept,
        'written: drawn': 8,
    }
    assert 8 < kept <= 20  # four clusters of at most five
    assert files(data / 'first') == files(data / 'second')
    stored = json.loads((data / 'first' / 'counts.json').read_text())
    assert stored['counts'] == counts and str(data) not in json.dumps(stored)
    written, drawn = open_samples(data, 'first/all'), open_samples(data, 'first/drawn')
    ids = [sample.id for sample in written]
    assert len(ids) == kept and ids == sorted(ids, key=lambda id: int(id[1:]))
    assert {sample.id for sample in drawn} < set(ids) and len(drawn) == 8
    assert written[0].images[0].load().size[0] == 460
    code, _, error = command(
        'filter', 'captions', 'third', '--above', '448', '--rows', '8', '--seed', '1', cwd=data
    )
    assert code == 0, error
    other = {sample.id for sample in open_samples(data, 'third/drawn')}
    assert other != {sample.id for sample in drawn}


def test_rows_with_pictures_inside_stay_whole(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'source').mkdir()
    rows = [row(i) for i in range(9, 15)]
    cells = [dict(bytes=(data / r['image']).read_bytes(), path=r['image']) for r in rows]
    columns = dict(
        id=[r['id'] for r in rows],
        image=cells,
        conversations=[json.dumps(r['conversations']) for r in rows],
        note=[None] * 5 + ['last'],
    )
    pq.write_table(pa.table(columns), tmp_path / 'source' / 'x.parquet')
    counts = filter_captions('source', tmp_path / 'out', Choice(above=448), shard_rows=4)
    assert counts == {'read': 6, 'written: all': 6}
    assert [p.name for p in sorted((tmp_path / 'out' / 'all').iterdir())] == [
        'part-00000.parquet',
        'part-00001.parquet',
    ]
    samples = open_samples(tmp_path, 'out/all')
    assert [sample.id for sample in samples] == columns['id'] and samples[5].meta['note'] == 'last'
    assert samples[2].images[0].data == cells[2]['bytes']


@pytest.mark.parametrize(
    'words, why',
    [
        (['captions', '../elsewhere'], 'does not lie below'),
        (['captions', 'pictures'], 'exists: remove it'),
        (['captions', 'new', '--above', '9999'], 'no row of captions is left'),
        (['nothing', 'new'], 'has no nothing.json'),
        (['captions', 'new', '--cluster', 'vit:clip'], 'write clip:FOLDER'),
        (['captions', 'new', '--cluster', 'clip:pictures'], 'pictures holds no CLIP'),
        (['captions', 'new', '--cluster', 'clip:clip'], '50,000 clusters of'),
    ],
)
def test_what_cannot_be_filtered_is_one_line_and_leaves_nothing(data, words, why):
    before = sorted(path.name for path in data.iterdir())
    code, _, error = command('filter', *words, cwd=data)
    assert code == 2 and why in ' '.join(error.split()) and 'Traceback' not in error
    assert sorted(path.name for path in data.iterdir()) == before


@pytest.mark.parametrize(
    'text, repeats, cut',
    [
        ('A cat sits. A dog runs.', 0, 0),
        ('A red cat sits. A dog runs. a red cat sits!', 1, 0),
        ('on and on and on and on.', 1, 0),
        ('It is. It is.', 0, 0),
        ('two two.', 0, 0),
        ('He says "stop."', 0, 0),
        ('A cat (on a mat.)', 0, 0),
        ('A cat, ', 0, 1),
        ('\u4e00\u53ea\u732b\u3002', 0, 0),
    ],
)
def test_rules_of_a_caption(text, repeats, cut):
    assert (repeats_itself(text), is_cut(text)) == (bool(repeats), bool(cut))


def test_clusters_do_not_depend_on_how_often_they_are_made():
    rng = np.random.default_rng(1)
    vectors = rng.normal(size=(300, 8)).astype(np.float32)
    labels, distances = cluster(vectors, 7, seed=3)
    again = cluster(vectors, 7, seed=3)
    assert (labels == again[0]).all() and distances.tobytes() == again[1].tobytes()
    kept = nearest_to_centres(labels, distances, 10)
    for one in range(7):
        inside = np.flatnonzero(labels == one)
        chosen = [i for i in kept if labels[i] == one]
        assert len(chosen) == min(10, len(inside))
        farthest = max(distances[chosen])
        assert all(distances[i] >= farthest for i in inside if i not in chosen)


@pytest.fixture(scope='module')
def model(tmp_path_factory):
    "An untrained model in a folder."
    from vlmbench.methods.recipes import get_method, get_recipe
    from vlmbench.train.checkpoint import export
    from vlmbench.train.scale import get_scale

    folder = tmp_path_factory.mktemp('model') / 'model'
    scale = get_scale('tiny')
    state = get_method('llava').start(get_recipe('llava', scale), scale, device='cpu')
    export(state.model, state.processor, folder)
    return folder


@pytest.mark.slow
def test_a_folder_of_pictures_is_described_and_can_be_trained_on(data, model, tmp_path):
    (tmp_path / 'shots' / 'deep').mkdir(parents=True)
    for k, colour in enumerate(COLOURS):
        Image.new('RGB', (64, 64), colour).save(tmp_path / 'shots' / 'deep' / f'{k}.png')
    (tmp_path / 'shots' / 'bad.png').write_bytes(b'no picture')
    (tmp_path / 'prompts.txt').write_text('what is red ?\nwhat color is the circle ?\n')
    words = ['--model', str(model), '--prompts', 'prompts.txt', '--max-new-tokens', '4']
    words += ['--device', 'cpu']
    code, said, error = command('caption', 'shots', 'said.jsonl', *words, cwd=tmp_path)
    assert code == 0, error
    assert 'unreadable  1' in said and 'pictures    5' in said
    rows = [json.loads(line) for line in (tmp_path / 'said.jsonl').read_text().splitlines()]
    assert [r['image'] for r in rows] == [f'shots/deep/{k}.png' for k in range(4)]
    assert {r['conversations'][0]['value'] for r in rows} <= {
        '<image>\nwhat is red ?',
        '<image>\nwhat color is the circle ?',
    }
    assert all(r['conversations'][1]['value'].strip() for r in rows)
    samples = open_samples(tmp_path, 'said')
    assert samples[1].images[0].load().getpixel((3, 3)) == (0, 128, 0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['prompts.txt', 'said.jsonl', 'shots']
    first = (tmp_path / 'said.jsonl').read_bytes()
    assert command('caption', 'shots', 'said.jsonl', *words, cwd=tmp_path)[0] == 0
    assert (tmp_path / 'said.jsonl').read_bytes() == first
    (tmp_path / 'other').mkdir()
    code, _, error = command('caption', 'shots', 'other/said.jsonl', *words, cwd=tmp_path)
    assert code == 2 and 'does not lie there' in ' '.join(error.split())
