"""Every command takes what `load_vlm` takes: a folder in an original layout, a name on the Hub."""

import json

import pytest
import torch
from test_missing_weights import language
from test_released_placement import load, logits, released
from transformers import GenerationConfig

from vlmbench.checkpoints.load import convert, find_model, load_vlm, published_name
from vlmbench.data.image import ImageTransform
from vlmbench.data.scene import world_tokenizer
from vlmbench.lab.calibration import load_any
from vlmbench.models.vlm import build_vlm, load_complete, mend_generation
from vlmbench.run.engine import run_notebook
from vlmbench.run.jobs import _trained_model
from vlmbench.methods.recipes import get_recipe
from vlmbench.train.scale import get_scale

HUB = dict(eve='BAAI/EVE-7B-v1.0', vora='Hon-Wong/VoRA-7B-Instruct')


def with_chatml(folder):
    "The tokenizer in `folder` with ChatML's control tokens in place of its last two words."
    file = folder / 'tokenizer.json'
    tokenizer = json.loads(file.read_text())
    vocab = tokenizer['model']['vocab']
    for word, control in zip(sorted(vocab, key=vocab.get)[-2:], ('<|im_start|>', '<|im_end|>')):
        index = vocab.pop(word)
        vocab[control] = index
        plain = dict(single_word=False, lstrip=False, rstrip=False, normalized=False)
        tokenizer['added_tokens'].append(dict(id=index, content=control, special=True, **plain))
    file.write_text(json.dumps(tokenizer))
    return folder


@pytest.mark.parametrize('name', HUB)
def test_a_name_on_the_hub_is_its_folder(name, tmp_path, hub):
    named = hub(released(tmp_path, name), HUB[name])
    assert find_model(named).name == '0' * 40 and published_name(named) == named.split('/')[1]
    assert torch.equal(logits(*load(named)), logits(*load(tmp_path / 'm')))


@pytest.mark.parametrize('name', HUB)
def test_layers_and_convert_read_it(name, tmp_path):
    folder = released(tmp_path, name, torch.bfloat16)
    model, processor = load_any(folder)
    assert model.dtype == torch.bfloat16 and processor.tokenizer
    own = convert(folder, tmp_path / 'own')
    assert json.loads((own / 'config.json').read_text())['model_type'] == 'vlmbench'
    assert 'written as a folder' in (own / 'README.md').read_text()
    again, beside = load_vlm(own)
    assert again.dtype == torch.bfloat16
    assert torch.equal(logits(again, beside), logits(model, processor))


@pytest.mark.parametrize('name', HUB)
def test_training_stores_it_as_the_scale_says(name, tmp_path):
    scale = get_scale('tiny')
    folder = released(tmp_path, name, torch.float16)
    model, processor = _trained_model(str(folder), get_recipe(name, scale), scale)
    assert model.dtype == torch.float32 and processor.template == scale.template


@pytest.mark.parametrize('name', ['llava', *HUB])
def test_a_release_that_brings_code_is_not_asked_about(name, tmp_path, monkeypatch, capfd):
    folder = released(tmp_path, name)
    code = f'open({str(tmp_path / "ran")!r}, "w")'
    for file, classes in (
        ('config.json', dict(AutoConfig='theirs.Config', AutoModelForCausalLM='theirs.Model')),
        ('tokenizer_config.json', dict(AutoTokenizer=['theirs.Words', None])),
    ):
        settings = json.loads((folder / file).read_text()) | dict(auto_map=classes)
        (folder / file).write_text(json.dumps(settings))
    (folder / 'theirs.py').write_text(code)
    monkeypatch.setattr('builtins.input', lambda *asked: pytest.fail(f'asked {asked}'))
    model, processor = load(folder)
    assert logits(model, processor).isfinite().all() and not (tmp_path / 'ran').exists()
    assert 'You are using a model of type' not in capfd.readouterr().err


def test_settings_of_a_base_that_could_not_be_saved(tmp_path):
    "As vicuna-7b-v1.5 ships them: found before the first step, not at the export."
    llm = language()
    llm.save_pretrained(tmp_path)
    world_tokenizer().save_pretrained(tmp_path)
    file = tmp_path / 'generation_config.json'
    file.write_text(json.dumps(dict(temperature=0.9, top_p=0.6, max_length=4096)))
    front = dict(type='eve', channels=16, patch_stride=4)
    with pytest.warns(UserWarning, match='could not be saved again: do_sample=True'):
        model, _ = build_vlm(tmp_path, None, front, None, 'world', ImageTransform('pad', 16))
    model.save_pretrained(tmp_path / 'saved')
    assert GenerationConfig.from_pretrained(tmp_path / 'saved').temperature == 0.9
    file.write_text(json.dumps(dict(num_beams=1, early_stopping=True)))
    with pytest.raises(ValueError, match='cannot be saved again.*correct or remove'):
        mend_generation(load_complete(type(llm), tmp_path), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    'name,notebook',
    [
        ('eve', 'evaluate'),
        ('eve', 'layers'),
        ('eve', 'prune'),
        ('vora', 'evaluate'),
        ('vora', 'layers'),
    ],
)
def test_notebooks_take_a_name_on_the_hub(name, notebook, tmp_path, hub):
    folder = released(tmp_path, name)
    named = hub(with_chatml(folder) if name == 'vora' else folder, HUB[name])
    given = dict(model=named, limit=2, device='cpu')
    given |= dict(prune=dict(k=1, calibration=2), layers=dict(drop=False)).get(notebook, {})
    assert run_notebook(notebook, given, tmp_path / 'run', progress=False, quiet=True) == 0
    manifest = json.loads((tmp_path / 'run' / 'manifest.json').read_text())
    assert manifest['status'] == 'completed'
