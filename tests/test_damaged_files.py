"""A file of a model that is cut, empty, a pointer of Git LFS, or not there is refused by its name,
whatever reads it."""

import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from vlmbench.checkpoints.release import CheckpointFormatError, read_weights
from vlmbench.checkpoints.text import load_text
from vlmbench.data.world import asset_path
from vlmbench.lab.calibration import load_any
from vlmbench.models.vlm import build_vlm
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
