"""Released folders keep their dtype and go where they are sent: devices, the disk, 4 and 8 bits."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_missing_weights import built, original, write

from vlmbench.checkpoints import eve, vora
from vlmbench.checkpoints.load import LoadError, load_vlm
from vlmbench.demo.chat import ChatModel
from vlmbench.models.quantized import quantized_modules

NAMES = ['llava', 'eve', 'vora']


def released(tmp_path, name, dtype=torch.float32):
    "A folder in the layout of its original repository, stored in `dtype`."
    if name == 'llava':
        folder = original(tmp_path, name, True)
    else:
        model, _ = built(name)
        folder = tmp_path / 'm'
        config = model.config.text_config.to_dict() | dict(model_type=name)
        tensors = (eve if name == 'eve' else vora).to_reference(model)
        if name == 'eve':
            pre = dict(image_size=16, patch_stride=4, image_size_clip=8, patch_stride_clip=4)
            (tmp_path / 'pre').mkdir()
            (tmp_path / 'pre' / 'preprocessor_config.json').write_text(json.dumps(pre))
            config |= dict(
                mm_hidden_size=16,
                mm_projector_type=model.config.vision_config['projector'],
                mm_vision_tower=str(tmp_path / 'pre'),
            )
        write(folder, config, tensors)
    file = folder / 'model.safetensors'
    whole = {n: t.to(dtype) for n, t in load_file(file).items()}
    save_file(whole, file, metadata=dict(format='pt'))
    return folder


def load(folder, **settings):
    return load_vlm(folder, template='world', **settings)


@torch.no_grad()
def logits(model, processor):
    picture = processor.load(Image.new('RGB', (16, 16), 'red'))[0]
    ids = torch.tensor([[5, *[model.config.image_token_id] * picture['tokens'], 7, 8]])
    sizes = torch.tensor([picture['size']])
    pixels = picture['pixel_values'][None].to(model.dtype)
    return model(input_ids=ids, pixel_values=pixels, image_sizes=sizes).logits


@pytest.mark.parametrize('name', NAMES)
def test_the_stored_dtype_stays_unless_another_is_asked_for(name, tmp_path):
    folder = released(tmp_path, name, torch.bfloat16)
    model, processor = load(folder)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} == {model.config.dtype}
    assert logits(model, processor).isfinite().all()
    assert load(folder, dtype='float16')[0].dtype == torch.float16
    with pytest.raises(LoadError, match="dtype='int3' is unknown: use one of bf16"):
        load(folder, dtype='int3')


@pytest.mark.parametrize('name', NAMES)
def test_weights_are_the_models_own(name, tmp_path):
    "Mapped files may be written again while the model lives."
    folder = released(tmp_path, name)
    model, processor = load(folder)
    before = logits(model, processor)
    with open(folder / 'model.safetensors', 'r+b') as file:
        file.seek(-4096, 2)
        file.write(b'\x00' * 4096)
    assert torch.equal(logits(model, processor), before)


@pytest.mark.parametrize('name', NAMES)
def test_a_device_map_with_the_disk(name, tmp_path):
    folder = released(tmp_path, name)
    whole = logits(*load(folder))
    places = {
        'model.vision': 'cpu',
        'model.language_model.embed_tokens': 'cpu',
        'model.language_model.layers.0': 'cpu',
        'model.language_model.layers.1': 'disk',
        'model.language_model.norm': 'cpu',
        'model.language_model.rotary_emb': 'cpu',
        'lm_head': 'cpu',
    }
    kept = tmp_path / 'kept'
    for more in ({}, dict(offload_folder=str(kept))):
        model, processor = load(folder, device_map=places, **more)
        assert set(model.hf_device_map.values()) == {'cpu', 'disk'}
        assert model.model.language_model.layers[1].mlp.up_proj.weight.is_meta
        assert torch.equal(logits(model, processor), whole)
    assert any(kept.iterdir())


def test_max_memory_splits_by_itself(tmp_path):
    folder = released(tmp_path, 'llava')
    whole = logits(*load(folder))
    size = sum(t.nbytes for t in load_file(folder / 'model.safetensors').values())
    model, processor = load(folder, device_map='auto', max_memory=dict(cpu=int(0.8 * size)))
    assert len(set(model.hf_device_map.values())) == 2
    assert torch.equal(logits(model, processor), whole)


@pytest.mark.parametrize('bits', ['4bit', '8bit'])
@pytest.mark.parametrize('name', NAMES)
def test_few_bits(name, bits, tmp_path):
    pytest.importorskip('bitsandbytes')
    folder = released(tmp_path, name, torch.bfloat16)
    chat = ChatModel.load(folder, 'cpu', template='world', **{f'load_{bits}': True})
    layers = quantized_modules(chat.model)
    assert layers and all(name.startswith('model.language_model.layers') for name in layers)
    assert chat.model.lm_head.weight.dtype == torch.bfloat16
    whole = logits(*load(folder)).float()
    few = logits(chat.model, chat.processor).float()
    assert torch.cosine_similarity(few.flatten(), whole.flatten(), dim=0) > 0.9
