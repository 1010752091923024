"""A model that is not there, or not whole, is refused before a kernel starts, in one sentence, and
without PyTorch."""

import json
import shutil
import subprocess
import sys

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from vlmbench.checkpoints.load import convert
from vlmbench.data.world import asset_path
from vlmbench.run.cli import app
from vlmbench.run.parameters import ParameterError

RUNS = ('evaluate', 'layers', 'prune', 'perplexity', 'harness', 'vip_bench', 'region_tasks')


def without(part):
    "Leaves out the weights of `part`."

    def damage(folder):
        file = folder / 'model.safetensors'
        rest = {n: t for n, t in load_file(file).items() if part not in n.split('.')}
        save_file(rest, file, metadata=dict(format='pt'))

    return damage


def cut(name):
    def damage(folder):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: len(whole) // 2])

    return damage


def gone(name):
    return lambda folder: (folder / name).unlink()


def only_settings(**settings):
    "A published folder of which nothing but the configuration is there."

    def damage(folder):
        shutil.rmtree(folder)
        folder.mkdir()
        (folder / 'config.json').write_text(json.dumps(settings))

    return damage


DAMAGES = [
    (cut('model.safetensors'), 'model.safetensors is cut or damaged'),
    (without('projector'), 'has no weights of its projector'),
    (without('tower'), 'has no weights of its tower'),
    (gone('model.safetensors'), r'no weights \(\*.safetensors or \*.bin\)'),
    (gone('processor_config.json'), 'no processor_config.json that says how'),
    (gone('tokenizer.json'), 'has no tokenizer'),
    (gone('config.json'), 'holds no model'),
    (cut('tokenizer_config.json'), 'tokenizer_config.json is cut'),
    (only_settings(model_type='eve'), 'has no weights'),
]


def refused(*words):
    done = CliRunner().invoke(app, list(words))
    assert done.exit_code and isinstance(done.exception, ParameterError), done.exception
    assert '\n' not in str(done.exception)
    return str(done.exception)


@pytest.mark.parametrize('damage, said', DAMAGES)
def test_a_damaged_folder(damage, said, tmp_path, monkeypatch):
    folder = shutil.copytree(asset_path('vlm'), tmp_path / 'a model')  # with a blank in its path
    damage(folder)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ParameterError, match=said) as told:
        raise ParameterError(refused('run', 'evaluate', 'model=a model'))
    assert 'a model' in str(told.value)
    assert [place.name for place in tmp_path.iterdir()] == ['a model']  # no folder of a run


@pytest.mark.parametrize('notebook', RUNS)
@pytest.mark.parametrize(
    'where, said',
    [
        ('no/where', 'is no folder here .* HF_HUB_OFFLINE is set'),
        ('nowhere', 'nothing is there'),
        ('a.png', 'is a file: give the folder'),
        ('zero:llama-3b', "did you mean 'zero:llama-3.2-3b'"),
        ('https://huggingface.co/BAAI/EVE-7B-v1.0', 'give the name alone, BAAI/EVE-7B-v1.0'),
    ],
)
def test_a_place_without_a_model(notebook, where, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    (tmp_path / 'a.png').touch()
    with pytest.raises(ParameterError, match=said):
        raise ParameterError(refused('run', notebook, f'model={where}'))
    assert [place.name for place in tmp_path.iterdir()] == ['a.png']


@pytest.mark.parametrize('name', ['base', 'vision', 'revert_to'])
def test_the_models_beside_it(name):
    given = [f'model={asset_path("vlm")}', f'{name}=no/where', 'revert=1']
    given = given if name == 'revert_to' else given[:2]
    assert f'{name}=no/where is no folder here' in refused('run', 'evaluate', *given)


def test_what_is_asked_of_it():
    model = f'model={asset_path("vlm")}'
    assert 'sees pictures of one size' in refused('run', 'evaluate', model, 'image_mode=native')
    assert "dtype='int3' is unknown" in refused('run', 'evaluate', model, 'dtype=int3')
    assert 'template=vicuna is unknown' in refused('run', 'vip_bench', model, 'template=vicuna')


def test_layouts_of_others(tmp_path):
    folder = convert(asset_path('vlm'), tmp_path / 'm')
    without('multi_modal_projector')(folder)
    said = refused('run', 'layers', f'model={folder}')
    assert 'has no weights of its multi_modal_projector' in said
    (folder / 'model.safetensors').unlink()
    settings = dict(model_type='llava_llama', mm_projector_type='mlp2x_gelu')
    (folder / 'config.json').write_text(json.dumps(settings))
    (folder / 'pytorch_model-1-of-1.bin').write_bytes(b'anything')
    index = dict(weight_map={'lm_head.weight': 'pytorch_model-1-of-1.bin'})
    (folder / 'pytorch_model.bin.index.json').write_text(json.dumps(index))
    assert 'no weights of its mm_projector' in refused('run', 'layers', f'model={folder}')


def test_it_brings_no_torch():
    code = """
import sys
from vlmbench.run.early_models import check_models
check_models('evaluate', dict(model=sys.argv[1]))
print('torch' in sys.modules)
"""
    words = [sys.executable, '-c', code, str(asset_path('vlm'))]
    said = subprocess.run(words, capture_output=True, text=True)
    assert said.stdout == 'False\n', said.stderr


def test_a_name_in_the_cache_is_asked_how_it_sees(tmp_path, hub, monkeypatch):
    (tmp_path / 'theirs').mkdir()
    (tmp_path / 'theirs' / 'config.json').write_text('{"model_type": "llava_llama"}')
    named = hub(tmp_path / 'theirs', 'mucai/vip-llava-7b')
    (tmp_path / 'elsewhere').mkdir()
    monkeypatch.chdir(tmp_path / 'elsewhere')
    words = ['run', 'evaluate', f'model={named}', 'image_mode=native', 'device=cpu']
    refused = CliRunner().invoke(app, words).exception
    assert isinstance(refused, ParameterError) and "front end 'encoder' sees" in str(refused)
    assert not any((tmp_path / 'elsewhere').iterdir())
