"""Released folders keep their dtype and go where they are sent: devices, the disk, 4 and 8 bits."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_missing_weights import built, original, write
from torch.utils._python_dispatch import TorchDispatchMode

import vlmbench.demo.chat as chat_module
from vlmbench.checkpoints import eve, vora
from vlmbench.checkpoints.load import LoadError, load_vlm
from vlmbench.data.record import Sample, Turn
from vlmbench.demo.chat import ChatError, ChatModel
from vlmbench.demo.words import GumbelSample
from vlmbench.evaluate.prompts import prompt_inputs
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


class NoDoubles(TorchDispatchMode):
    "Refuses every product of 64-bit floats, which Apple's GPU does not have."

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        parts = made if isinstance(made, (tuple, list)) else [made]
        if any(isinstance(t, torch.Tensor) and t.dtype == torch.float64 for t in parts):
            raise TypeError(f'{func} makes float64')
        return made


def test_an_apple_gpu_is_found_and_nothing_asks_for_doubles(tmp_path, monkeypatch):
    folder, asked = released(tmp_path, 'llava', torch.float16), {}
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: True)

    def load_here(where, device, *args, **settings):
        asked.update(device=device, dtype=settings.get('dtype'))
        return load_vlm(where, 'cpu', *args, **settings)

    monkeypatch.setattr(chat_module, 'load_vlm', load_here)
    chat = ChatModel.load(folder, template='world')
    assert asked == dict(device='mps', dtype=None)
    assert {p.dtype for p in chat.model.parameters()} == {torch.float16}
    with pytest.raises(ChatError, match='needs a CUDA device'):
        ChatModel.load(folder, 'mps', template='world', load_4bit=True)
    chat.model.float()  # a CPU answers in fp16 by another way
    turns = [Turn('user', '<image>\nwhat ?')]
    inputs = prompt_inputs(
        chat.processor, [Sample('a', turns, [Image.new('RGB', (40, 24), 'red')])]
    )
    for drawn in ([], [GumbelSample(1.0, 0)]):
        with NoDoubles():
            ids = chat.model.generate(
                **inputs, max_new_tokens=3, do_sample=False, logits_processor=drawn
            )
        assert ids.shape[1] > inputs['input_ids'].shape[1]
    with NoDoubles(), pytest.raises(TypeError, match='makes float64'):
        torch.ones(1).double()
