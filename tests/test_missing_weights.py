"""A model that lacks a weight is refused in every layout, by the name of the weight; nothing is
drawn at random in its place."""

import json
import re
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from mini_bases import first_always
from vlmbench.checkpoints import eve, llava, vora
from vlmbench.checkpoints.load import LoadError, convert, load_vlm
from vlmbench.data.image import ImageTransform
from vlmbench.data.scene import world_tokenizer
from vlmbench.lab.calibration import load_any
from vlmbench.models.vision_lora import LoRASettings
from vlmbench.models.vlm import build_vlm
from vlmbench.run.engine import run_notebook
from vlmbench.run.parameters import ParameterError

SMALL = dict(hidden_size=32, intermediate_size=48, num_attention_heads=2)
TEXT = SMALL | dict(vocab_size=len(world_tokenizer()), num_hidden_layers=2, num_key_value_heads=2)
LORA = LoRASettings(2, 3, extra_bias='zero').to_dict()
FRONTS = dict(
    llava=dict(type='encoder', projector='mlp2x_gelu'),
    linear=dict(type='encoder', projector='linear'),
    vip=dict(type='encoder', select_layers=[-2, 1], projector_norm=True),
    zero=dict(type='encoder', select_layers=[-1], post_layernorm=True, boundary=True),
    eve=dict(type='eve', channels=16, patch_stride=4),
    eve_v2=dict(type='eve_v2', channels=16, patch_stride=4),
    vora=dict(type='vora', patch_size=4, image_size=16, width=12, lora=LORA),
)


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        yield


def language(tied=False, cls=LlamaForCausalLM, config=LlamaConfig):
    torch.manual_seed(0)
    return cls(config(tie_word_embeddings=tied, **TEXT))


def built(name, **kw):
    front = FRONTS[name]
    tower = None
    if front['type'] == 'encoder':
        vit = CLIPVisionConfig(image_size=16, patch_size=4, num_hidden_layers=3, **SMALL)
        tower = CLIPVisionModel(vit)
    transform = ImageTransform('pad', 16, patch=4)
    if name == 'vora':
        kw = dict(cls=Qwen2ForCausalLM, config=Qwen2Config) | kw
    return build_vlm(language(**kw), tower, front, world_tokenizer(), 'world', transform)


def kinds(names):
    "One name of every kind: the last of those that differ in their numbers only."
    return sorted({re.sub(r'\d+', '0', n): n for n in sorted(names)}.values())


def write(folder, config, tensors):
    folder.mkdir(exist_ok=True)
    (folder / 'config.json').write_text(json.dumps(config, default=str))
    contiguous = {n: t.detach().clone().contiguous() for n, t in tensors.items()}
    save_file(contiguous, folder / 'model.safetensors', metadata=dict(format='pt'))
    world_tokenizer().save_pretrained(folder)


def refuses_each(
    folder, file='model.safetensors', load=load_vlm, kind=LoadError, said=lambda name: name
):
    "Every kind of weight in `file` is missed by its name, as `said`; the whole file loads."
    load(folder)
    whole = load_file(folder / file)
    for name in kinds(whole):
        rest = {n: t for n, t in whole.items() if n != name}
        save_file(rest, folder / file, metadata=dict(format='pt'))
        with pytest.raises(kind, match=re.escape(said(name))) as refusal:
            load(folder)
        assert str(folder) in str(refusal.value) and '\n' not in str(refusal.value)
    save_file(whole, folder / file, metadata=dict(format='pt'))


@pytest.mark.parametrize('name', first_always(FRONTS, 2))
@pytest.mark.fault('missing-weights')
def test_own_layout(name, tmp_path):
    for part in built(name):
        part.save_pretrained(tmp_path)
    refuses_each(tmp_path)


def test_a_file_that_was_cut_off_is_named(tmp_path):
    for part in built('llava'):
        part.save_pretrained(tmp_path)
    file = tmp_path / 'model.safetensors'
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(LoadError, match=re.escape(str(tmp_path))):
        load_vlm(tmp_path)


def test_a_tied_head_is_not_missing(tmp_path):
    for part in built('llava', tied=True):
        part.save_pretrained(tmp_path / 'own')
    assert 'lm_head.weight' not in load_file(tmp_path / 'own' / 'model.safetensors')
    model, _ = load_vlm(tmp_path / 'own')
    assert model.lm_head.weight is model.get_input_embeddings().weight
    convert(tmp_path / 'own', tmp_path / 'theirs')
    load_vlm(tmp_path / 'theirs')


@pytest.mark.parametrize('name', first_always(['vip', 'llava']))
def test_transformers_layout(name, tmp_path):
    llava.save_transformers(*built(name), tmp_path)
    # the file has names of older versions, of which the last parts are those of today
    refuses_each(tmp_path, said=lambda name: '.'.join(name.split('.')[-2:]))
    broken = load_file(tmp_path / 'model.safetensors')
    del broken['multi_modal_projector.linear_2.bias']
    save_file(broken, tmp_path / 'model.safetensors', metadata=dict(format='pt'))
    for call in (lambda: load_vlm(tmp_path, template='world'), lambda: convert(tmp_path, 'none')):
        with pytest.raises(LoadError, match='linear_2.bias'):
            call()


def original(tmp_path, name, tower, **more):
    "A folder of the original layout, with the tower in it or beside it."
    model, _ = built(name)
    tensors = llava.to_reference(model)
    clip = tmp_path / ('clip_4layers' if name == 'vip' else 'clip')
    model.model.vision.tower.save_pretrained(clip)
    if not tower:
        tensors = {n: t for n, t in tensors.items() if not n.startswith('model.vision_tower.')}
    config = model.config.text_config.to_dict() | dict(
        model_type='llava_llama',
        mm_vision_tower=str(clip),
        mm_projector_type=FRONTS[name].get('projector', 'mlp2x_gelu'),
        **more,
    )
    write(tmp_path / 'm', config, tensors)
    return tmp_path / 'm'


@pytest.mark.parametrize('tower', [True, False])
@pytest.mark.parametrize('name', first_always(['vip', 'llava', 'linear']))
def test_original_layout(name, tower, tmp_path, monkeypatch):
    monkeypatch.setattr(llava, 'FEATURE_LAYERS', (-2, 1))  # the small tower has no five of them
    folder = original(tmp_path, name, tower)
    refuses_each(folder, load=lambda where: load_vlm(where, template='world'))


def test_a_missing_weight_goes_before_an_unknown_template(tmp_path):
    folder = original(tmp_path, 'llava', True)
    with pytest.raises(LoadError, match='no template is known'):
        load_vlm(folder)
    config = json.loads((folder / 'config.json').read_text())
    (folder / 'config.json').write_text(json.dumps(config | dict(num_hidden_layers=3)))
    with pytest.raises(LoadError, match='language model: missing .*layers.2'):
        load_vlm(folder)


def test_a_tower_that_was_trained_must_be_there(tmp_path):
    folder = original(tmp_path, 'llava', False, unfreeze_mm_vision_tower=True)
    with pytest.raises(LoadError, match='vision_tower.*the tower was trained'):
        load_vlm(folder, template='world')


def test_a_named_tower_that_lacks_a_weight(tmp_path):
    folder = original(tmp_path, 'llava', False)
    file = tmp_path / 'clip' / 'model.safetensors'
    broken = load_file(file)
    lost = kinds(broken)[3]
    save_file({n: t for n, t in broken.items() if n != lost}, file, metadata=dict(format='pt'))
    with pytest.raises(LoadError, match=re.escape(lost)):
        load_vlm(folder, template='world')


@pytest.fixture
def lora_release(tmp_path):
    "An adapter, the projector beside it, and the language model that they belong to."
    folder = original(tmp_path, 'llava', False)
    projector = load_file(folder / 'model.safetensors')
    projector = {n: t for n, t in projector.items() if n.startswith('model.mm_projector.')}
    (folder / 'model.safetensors').unlink()
    torch.save(
        {f'base_model.model.{n}': t for n, t in projector.items()},
        folder / 'non_lora_trainables.bin',
    )
    llm = language()
    llm.save_pretrained(tmp_path / 'base')
    adapted = get_peft_model(llm, LoraConfig(r=2, target_modules=['q_proj', 'down_proj']))
    adapted.peft_config['default'].base_model_name_or_path = str(tmp_path / 'base')
    adapted.save_pretrained(folder)
    return folder


def test_lora_release(lora_release, tmp_path):
    def load(where):
        return load_vlm(where, template='world')

    refuses_each(lora_release, file='adapter_model.safetensors', load=load)
    base = tmp_path / 'base' / 'model.safetensors'
    whole = load_file(base)
    broken = {n: t for n, t in whole.items() if n != 'model.layers.1.mlp.down_proj.weight'}
    save_file(broken, base, metadata=dict(format='pt'))
    with pytest.raises(LoadError, match='layers.1.mlp.down_proj.weight'):
        load(lora_release)
    save_file(whole, base, metadata=dict(format='pt'))
    beside = lora_release / 'non_lora_trainables.bin'
    trained = torch.load(beside, weights_only=True)
    del trained['base_model.model.model.mm_projector.2.weight']
    torch.save(trained, beside)
    with pytest.raises(LoadError, match='missing .*mm_projector.2.weight'):
        load(lora_release)


@pytest.mark.parametrize('tied', [False, True])
def test_eve_release(tied, tmp_path):
    model, _ = built('eve', tied=tied)
    (tmp_path / 'pre').mkdir()
    (tmp_path / 'pre' / 'preprocessor_config.json').write_text(
        json.dumps(dict(image_size=16, patch_stride=4, image_size_clip=8, patch_stride_clip=4))
    )
    config = model.config.text_config.to_dict() | dict(
        model_type='eve',
        mm_hidden_size=16,
        mm_projector_type=model.config.vision_config['projector'],
        mm_vision_tower=str(tmp_path / 'pre'),
    )
    write(tmp_path / 'm', config, eve.to_reference(model))
    refuses_each(tmp_path / 'm')


@pytest.mark.parametrize('says', [False, True])
def test_vora_release(says, tmp_path):
    model, _ = built('vora')
    config = model.config.text_config.to_dict() | dict(model_type='vora')
    if says:  # real folders have it; without, a whole layer of factors cannot be missed
        targets = ['q_proj', 'k_proj', 'v_proj', 'o_proj', 'up_proj', 'gate_proj', 'down_proj']
        config |= dict(lora=dict(layers=2, r=3, target_modules=targets))
    tensors = vora.to_reference(model)
    write(tmp_path, config, tensors)
    refuses_each(tmp_path, said=lambda name: name.removeprefix('llm.'))
    if says:
        for part in ('lora_', 'layers.1.mlp.up_proj.lora_'):
            write(tmp_path, config, {n: t for n, t in tensors.items() if part not in n})
            with pytest.raises(LoadError, match='missing .*lora_A'):
                load_vlm(tmp_path)


# -------------------------------------------------------------------------------------------------
# base models
@pytest.mark.fault('base-lacks-weight')
def test_base_model(tmp_path):
    language().save_pretrained(tmp_path)
    world_tokenizer().save_pretrained(tmp_path)

    def build(where):
        return build_vlm(where, None, FRONTS['eve'], None, 'world', ImageTransform('pad', 16))

    refuses_each(tmp_path, load=build, kind=ValueError)


def test_a_tied_base_model_is_whole_without_a_head(tmp_path):
    language(tied=True).save_pretrained(tmp_path)
    world_tokenizer().save_pretrained(tmp_path)
    assert 'lm_head.weight' not in load_file(tmp_path / 'model.safetensors')
    model, _ = build_vlm(
        tmp_path, None, FRONTS['eve'], None, 'world', ImageTransform('pad', 16, patch=8)
    )
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_a_loaded_model_with_weights_that_have_no_values():
    llm = language()
    llm.model.layers[1].mlp.to('meta')
    with pytest.raises(ValueError, match=r'layers\.1\.mlp\..*load it whole'):
        build_vlm(llm, None, FRONTS['eve'], world_tokenizer(), 'world', ImageTransform('pad', 16))
    with torch.device('meta'):  # one that has none at all is there to be counted
        llm = AutoModelForCausalLM.from_config(llm.config)
    build_vlm(llm, None, FRONTS['eve'], world_tokenizer(), 'world', ImageTransform('pad', 16))


# -------------------------------------------------------------------------------------------------
# layer analysis
def test_a_model_to_be_analysed(tmp_path):
    language().save_pretrained(tmp_path / 'text')
    world_tokenizer().save_pretrained(tmp_path / 'text')
    for part in built('llava'):
        part.save_pretrained(tmp_path / 'pictures')
    for folder in ('text', 'pictures'):
        refuses_each(tmp_path / folder, load=load_any, kind=ValueError)


def test_adapters_to_be_analysed(tmp_path):
    llm = language()
    llm.save_pretrained(tmp_path / 'base')
    world_tokenizer().save_pretrained(tmp_path / 'base')
    adapted = get_peft_model(llm, LoraConfig(r=2, target_modules=['q_proj', 'up_proj']))
    adapted.save_pretrained(tmp_path / 'lora')

    def load(folder):
        return load_any(tmp_path / 'base', adapters=folder)

    refuses_each(
        tmp_path / 'lora',
        file='adapter_model.safetensors',
        load=load,
        kind=ValueError,
        said=lambda name: name.removesuffix('.weight'),
    )


# -------------------------------------------------------------------------------------------------
# runs


@pytest.mark.slow
def test_an_evaluation_of_such_a_folder_is_refused(tmp_path):
    for part in built('llava'):
        part.save_pretrained(tmp_path / 'm')
    whole = load_file(tmp_path / 'm' / 'model.safetensors')
    rest = {n: t for n, t in whole.items() if 'projector' not in n}
    save_file(rest, tmp_path / 'm' / 'model.safetensors', metadata=dict(format='pt'))
    given = dict(model=str(tmp_path / 'm'), limit=1)
    with pytest.raises(ParameterError, match='m has no weights of its projector'):
        run_notebook('evaluate', given, tmp_path / 'run', progress=False)
    assert not (tmp_path / 'run').exists()
