"""What a run's `data` names: published rows in the eight shapes that they may have, a published
folder, a name of the Hub; and what a stage reads then."""

import io, json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from warm_kernels import vlmbench

from vlmbench.data.quarantine import BadRecord, Quarantine
from vlmbench.data.sources import DataError, check_data, open_samples, open_stage_data, prepare_data
from vlmbench.methods.recipes import find_scale, get_recipe
from vlmbench.train.recipe import RecipeError
from vlmbench.train.run_data import run_data

ROOT = str(Path(__file__).parents[1])
NAME = 'VoRA-Recap-8M'
TALK = [{'from': 'human', 'value': 'Describe.'}, {'from': 'gpt', 'value': 'a red circle .'}]

MARKED = [{'from': 'human', 'value': '<image>\nDescribe.'}, TALK[1]]  # as LLaVA's rows are


def png():
    data = io.BytesIO()
    Image.new('RGB', (40, 24), (250, 0, 0)).save(data, 'PNG')
    return data.getvalue()


CELL = dict(bytes=png(), path=None)
# the column of the picture, whether the talk is JSON text, and the folder of the shards
LAYOUTS = {
    'frames of structs': (dict(frames=[CELL]), True, ''),
    'frames of bytes': (dict(frames=[CELL['bytes']]), True, ''),
    'image struct': (dict(image=CELL), True, ''),
    'image bytes': (dict(image=CELL['bytes']), True, ''),
    'images': (dict(images=[CELL]), True, 'data'),
    'image and a list of turns': (dict(image=CELL), False, 'data'),
    'frames and a list of turns': (dict(frames=[CELL]), False, 'default/train'),
    'named in a folder': (dict(frames=[dict(CELL, path='a/b.png')]), True, 'default/train'),
}


def write(folder, layout, blind=False):
    picture, text, below = LAYOUTS[layout]
    column = next(iter(picture))
    place = folder / NAME / below
    place.mkdir(parents=True)
    for shard in range(2):
        rows = []
        for i in range(3):
            talk = json.dumps(TALK) if text else MARKED if column == 'image' else TALK
            rows.append(dict(id=f'{shard}-{i}', conversations=talk) | picture)
        if blind:
            rows[1][column] = None
        path = place / f'train-{shard:05d}-of-00002.parquet'
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return folder


@pytest.fixture
def recipe():
    return get_recipe('vora', find_scale('tiny'), stages=['pretrain'])


@pytest.mark.parametrize('layout', LAYOUTS)
def test_published_rows_are_read_in_every_shape(tmp_path, monkeypatch, recipe, layout):
    write(tmp_path / 'data', layout)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv('VLMBENCH_HOME', raising=False)
    found = run_data(recipe, NAME)
    assert found.folder == Path('data') and found.reads == dict(pretrain=NAME)
    samples = open_samples(found.folder, NAME)
    assert sorted(sample.id for sample in samples) == [f'{s}-{i}' for s in (0, 1) for i in range(3)]
    flow = run_data(recipe, NAME, streaming=True)
    assert flow.reads == dict(pretrain=f'stream:{NAME}')
    streamed = open_stage_data(flow.folder, flow.reads['pretrain'], seed=1)
    drawn = [streamed.samples[draw] for draw in range(6)]
    assert sorted(sample.id for sample in drawn) == sorted(sample.id for sample in samples)
    for sample in [*samples, *drawn]:
        assert sample.images[0].load().size == (40, 24)
        assert sample.turns[1].text == 'a red circle .'


@pytest.mark.parametrize('layout', LAYOUTS)
def test_a_caption_without_its_picture_is_refused_in_every_shape(tmp_path, layout):
    folder = write(tmp_path, layout, blind=True)
    bad = 0
    for name in (NAME, f'stream:{NAME}'):
        samples = open_stage_data(folder, name, quarantine=Quarantine(0.9)).samples
        for number in range(6):
            try:
                assert samples[number].images
            except BadRecord as e:
                bad += any(why in str(e) for why in ('no picture', 'image count'))
    assert bad == 4


def test_a_published_folder_is_found_by_its_name(tmp_path, monkeypatch):
    home = tmp_path / 'home'
    place = home / 'data' / 'EVE-Finetune'
    place.mkdir(parents=True)
    row = dict(id='1', image='a.png', conversations=MARKED)
    (place / 'llava_v1_5_mix665k.json').write_text(json.dumps([row]))
    (place / 'a.png').write_bytes(png())
    (tmp_path / 'here').mkdir()
    monkeypatch.chdir(tmp_path / 'here')
    monkeypatch.delenv('VLMBENCH_HOME', raising=False)
    with pytest.raises(DataError, match='EVE-Finetune is not in .*get it from'):
        prepare_data('EVE-Finetune')
    monkeypatch.setenv('VLMBENCH_HOME', str(home))
    recipe = get_recipe('eve', find_scale('paper'), stages=['finetune'])
    found = run_data(recipe, 'EVE-Finetune')
    assert found.folder == home / 'data' and not found.reads and not found.whole
    check_data({'finetune': recipe.stages[0].data}, found.folder)
    (sample,) = open_samples(found.folder, recipe.stages[0].data)
    assert sample.images[0].load().size == (40, 24)
    monkeypatch.chdir(home / 'data')  # here it is a folder like any other
    found = run_data(recipe, 'EVE-Finetune')
    check_data({'finetune': recipe.stages[0].data}, found.folder)
    assert found.whole


def test_rows_go_to_the_stage_that_reads_them(tmp_path, monkeypatch, recipe):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('VLMBENCH_HOME', str(write(tmp_path / 'home' / 'data', 'images').parent))
    both = get_recipe('vora', find_scale('vora_paper'), variant=['data=I8M'])
    assert run_data(both, NAME).reads == {}  # the recipe names them itself
    other = get_recipe('vora', find_scale('tiny'))
    with pytest.raises(RecipeError, match=r'run one of these \(stages=\["pretrain"\]\)'):
        run_data(other, NAME)
    gone = run_data(recipe, 'VoRA-TextQA-Mixed')  # nowhere here: by its name on the Hub
    assert gone.reads == dict(pretrain='hub:Hon-Wong/VoRA-TextQA-Mixed')
    given = run_data(recipe, str(tmp_path / 'home' / 'data' / NAME))
    assert given.folder == tmp_path / 'home' / 'data' and given.reads == dict(pretrain=NAME)
    mixed = get_recipe('vora', find_scale('vora_paper'), variant=['data=I8M'])
    monkeypatch.delenv('VLMBENCH_HOME')
    read = run_data(mixed, NAME)
    assert read.reads == dict(pretrain=f'hub:Hon-Wong/{NAME}')


@pytest.mark.slow
def test_a_run_trains_on_published_rows_by_their_name(tmp_path):
    write(tmp_path / 'data', 'frames of structs')
    words = ['recipe=vora', 'stages=["pretrain"]', f'data={NAME}', 'evaluate=false', 'out=run']
    words += ['overrides=["stages.pretrain.steps=2","stages.pretrain.global_rows=4"]']
    done = vlmbench('run', 'train', 'device=cpu', *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout[-2000:]
    manifest = json.loads((tmp_path / 'run' / 'manifest.json').read_text())
    assert list(manifest['data']['files']) == [
        f'data/{NAME}/train-0000{shard}-of-00002.parquet' for shard in (0, 1)
    ]
