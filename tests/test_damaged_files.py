"""A file of a model that is cut, empty, a pointer of Git LFS, or not there is refused by its name,
whatever reads it."""

import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel
from typer.testing import CliRunner

from vlmbench.checkpoints.release import CheckpointFormatError, read_weights
from vlmbench.checkpoints.load import convert, load_vlm
from vlmbench.checkpoints.text import load_text
from vlmbench.data.world import asset_path
from vlmbench.lab.calibration import load_any
from vlmbench.models.vlm import build_vlm, load_tower
from vlmbench.run.cli import app

POINTER = 'version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n'


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def pointer(file):
    file.write_text(POINTER)


def empty(file):
    file.write_bytes(b'')


def gone(file):
    file.unlink()


def a_list(file):
    file.write_text('[1, 2]')


def no_settings(file):
    file.write_text('{}')


def set_text(**settings):
    "Damage that gives the language model of a config.json other settings."

    def damage(file):
        config = json.loads(file.read_text())
        config['text_config'] |= settings
        file.write_text(json.dumps(config))

    return damage


def copy(name, place, damage, file):
    "A copy of an embedded model in which `file` is damaged."
    folder = shutil.copytree(asset_path(name), place / 'm')
    damage(folder / file)
    return folder


WHOLE = [
    (cut, 'model.safetensors', 'model.safetensors is cut or damaged'),
    (empty, 'model.safetensors', 'model.safetensors is empty'),
    (pointer, 'model.safetensors', r'git lfs pull'),
    (cut, 'generation_config.json', 'generation_config.json is cut or damaged'),
    (cut, 'processor_config.json', 'processor_config.json is cut or damaged'),
    (gone, 'processor_config.json', 'no processor_config.json that says how pictures become'),
    (cut, 'tokenizer.json', 'tokenizer.json is cut or damaged'),
    (gone, 'tokenizer.json', r'has no tokenizer \(tokenizer.json or tokenizer.model\)'),
    (gone, 'tokenizer_config.json', 'no token for padding: is tokenizer_config.json there'),
    (a_list, 'config.json', 'config.json cannot be read: it holds a list, no settings by name'),
    (a_list, 'processor_config.json', 'processor_config.json holds a list'),
    (a_list, 'tokenizer_config.json', 'tokenizer_config.json holds a list'),
    (no_settings, 'tokenizer.json', "holds no tokenizer .it lacks 'model'"),
    (no_settings, 'config.json', 'model type None is known neither'),
    (set_text(hidden_size='wide'), 'config.json', "cannot be read .*'hidden_size' expected int"),
    (set_text(hidden_size=192), 'config.json', r'other shapes than its config.json says, .*, 96\)'),
]


@pytest.mark.parametrize('damage,file,said', WHOLE)
def test_chat_names_it_in_one_line(damage, file, said, tmp_path):
    folder = copy('vlm', tmp_path, damage, file)
    Image.new('RGB', (20, 20)).save(tmp_path / 'p.png')
    words = ['chat', str(folder), '--image', str(tmp_path / 'p.png'), '--question', 'what ?']
    done = CliRunner().invoke(app, [*words, '--device', 'cpu'])
    assert done.exit_code and '\n' not in str(done.exception)
    with pytest.raises(ValueError, match=said):
        raise done.exception


def test_shards_that_were_not_fetched_are_named(tmp_path):
    folder = copy('vlm', tmp_path, lambda file: None, 'config.json')
    index = dict(weight_map=dict(a='model.safetensors', b='model-2-of-2.safetensors'))
    (folder / 'model.safetensors.index.json').write_text(json.dumps(index))
    with pytest.raises(ValueError, match='lacks 1 of the files .*, e.g. model-2-of-2.safetensors'):
        load_vlm(folder)


def test_transformers_layout_without_its_processor(tmp_path):
    folder = convert(asset_path('vlm'), tmp_path / 'm')
    gone(folder / 'processor_config.json')
    with pytest.raises(
        ValueError, match='has no processor_config.json or preprocessor_config'
    ) as e:
        load_vlm(folder)
    assert '\n' not in str(e.value)


def test_half_of_a_clip_is_loaded_without_a_table_of_the_other_half(tmp_path, capfd):
    half = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    seen = half | dict(image_size=4, patch_size=2)
    whole = CLIPModel(CLIPConfig(text_config=half, vision_config=seen, projection_dim=4))
    whole.save_pretrained(tmp_path)
    capfd.readouterr()
    load_tower(tmp_path)
    said = capfd.readouterr().err
    assert 'UNEXPECTED' not in said and 'not sharded' not in said
    set_vision = json.loads((tmp_path / 'config.json').read_text())
    set_vision['vision_config']['hidden_size'] = 16
    (tmp_path / 'config.json').write_text(json.dumps(set_vision))
    with pytest.raises(ValueError, match='other shapes than its config.json says'):
        load_tower(tmp_path)


def as_pickle(folder):
    torch.save(load_file(folder / 'model.safetensors'), folder / 'pytorch_model.bin')
    (folder / 'model.safetensors').unlink()
    return folder / 'pytorch_model.bin'


@pytest.mark.parametrize('damage', [cut, pointer])
def test_base_models_in_either_format(damage, tmp_path):
    llm = copy('llm', tmp_path, lambda file: None, 'config.json')
    damage(as_pickle(llm))
    vit = shutil.copytree(asset_path('vit'), tmp_path / 'vit')
    with pytest.raises(ValueError, match='pytorch_model.bin is '):
        build_vlm(llm, vit, template='world')
    damage(vit / 'model.safetensors')
    with pytest.raises(ValueError, match='model.safetensors is '):
        build_vlm(asset_path('llm'), vit, template='world')


@pytest.mark.parametrize('read', [load_text, load_any])
def test_language_models(read, tmp_path):
    with pytest.raises(ValueError, match='model.safetensors is cut or damaged'):
        read(copy('llm', tmp_path, cut, 'model.safetensors'))


def test_files_of_original_repositories(tmp_path):
    file = tmp_path / 'mm_projector.bin'
    torch.save({'model.mm_projector.0.bias': torch.ones(900)}, file)
    for damage, said in ((cut, 'its end is missing'), (pointer, 'git lfs pull'), (empty, 'empty')):
        damage(file)
        with pytest.raises(CheckpointFormatError, match=f'mm_projector.bin is .*{said}'):
            read_weights(file)


def test_a_model_that_nobody_knows_runs_no_code(tmp_path):
    folder = copy('vlm', tmp_path, lambda file: None, 'config.json')
    config = json.loads((folder / 'config.json').read_text())
    (folder / 'config.json').write_text(json.dumps(config | dict(model_type='their_own')))
    with pytest.raises(ValueError, match="'their_own' is known neither.*is not run"):
        CliRunner().invoke(app, ['chat', str(folder), '--device', 'cpu'], catch_exceptions=False)


def not_a_number(name, place, part, value):
    "A copy of an embedded model; `value` stands in the first weight whose name has `part`."
    folder = shutil.copytree(asset_path(name), place / 'm')
    state = load_file(folder / 'model.safetensors')
    key = next(key for key in state if part in key)
    state[key].view(-1)[0] = value
    save_file(state, folder / 'model.safetensors', metadata={'format': 'pt'})
    return folder


@pytest.mark.parametrize(
    'name, part, value',
    [
        ('vlm', 'projector', float('nan')),
        ('vlm', 'embed', float('inf')),
        ('llm', 'mlp', float('nan')),
    ],
)
def test_weights_that_are_no_numbers_are_refused_by_name(tmp_path, name, part, value):
    folder = not_a_number(name, tmp_path, part, value)
    picture = ['--image', str(tmp_path / 'a.png')] if name == 'vlm' else []
    Image.new('RGB', (8, 8)).save(tmp_path / 'a.png')
    result = CliRunner().invoke(app, ['chat', str(folder), *picture], input='what ?\n')
    assert result.exit_code
    assert 'NaN or infinity in 1 weights' in str(result.exception) and part in str(result.exception)


def test_a_base_model_or_tower_with_nan_is_refused(tmp_path):
    vit = not_a_number('vit', tmp_path, 'layers', float('nan'))
    with pytest.raises(ValueError, match='NaN or infinity'):
        build_vlm(asset_path('llm'), vit)
    with pytest.raises(ValueError, match='NaN or infinity'):
        build_vlm(not_a_number('llm', tmp_path / 'llm', 'mlp', float('-inf')))


def test_weights_beyond_the_model_are_announced(tmp_path):
    folder = shutil.copytree(asset_path('vlm'), tmp_path / 'm')
    state = load_file(folder / 'model.safetensors')
    save_file(
        state | {'extra.weight': torch.ones(2)}, folder / 'model.safetensors', {'format': 'pt'}
    )
    with pytest.warns(
        UserWarning, match=r"holds 1 weights .*no place for, e\.g\. \['extra.weight'\]"
    ):
        load_vlm(folder)
