"""Checkpoints of LLaVA and ViP-LLaVA: original folders in, transformers' layouts in and out, the same logits and tokens."""
import json

import pytest
import torch
from PIL import Image
from transformers import (AutoModelForImageTextToText, AutoProcessor, CLIPVisionConfig, CLIPVisionModel, LlamaConfig,
                          LlamaForCausalLM, Phi3Config, Phi3ForCausalLM, SiglipVisionConfig, SiglipVisionModel)

from vlmbench.data.image import ImageTransform
from vlmbench.data.record import Sample, Turn
from vlmbench.data.scene import world_tokenizer
from vlmbench.methods.vip_checkpoints import (CheckpointFormatError, from_transformers, load_original, load_published, read_weights,
                                              save_transformers, to_transformers)
from vlmbench.methods.vip_llava import convert_keys, stage1_state
from vlmbench.models.vlm import build_vlm

SMALL = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=12, num_attention_heads=2)
FRONTS = dict(vip=dict(select_layers=[-2, -5, -8, -11, 6], projector_norm=True), llava=dict(select_layers=[-2]),
              siglip=dict(select_layers=[-2]), several=dict(select_layers=[-2, 3]))


def made(kind, mode='pad', text='llama'):
    torch.manual_seed(0)
    tokens = world_tokenizer()
    lm = dict(llama=(LlamaConfig, LlamaForCausalLM), phi3=(Phi3Config, Phi3ForCausalLM))[text]
    llm = lm[1](lm[0](vocab_size=len(tokens), num_key_value_heads=1, pad_token_id=0, **{**SMALL, 'num_hidden_layers': 2}))
    tower = (SiglipVisionModel(SiglipVisionConfig(image_size=28, patch_size=14, **SMALL)) if kind == 'siglip'
             else CLIPVisionModel(CLIPVisionConfig(image_size=28, patch_size=14, **SMALL)))
    return build_vlm(llm, tower, FRONTS[kind], tokens, 'world', ImageTransform(mode, 28))


def asked(processor):
    "A prompt and its picture as the evaluator would give them."
    torch.manual_seed(1)
    picture = Image.fromarray(torch.randint(0, 255, (40, 28, 3), dtype=torch.uint8).numpy())
    sample = Sample('q', [Turn('user', '<image>\nwhat color is the circle ?')], [picture])
    e = processor.encode(sample, add_generation_prompt=True)
    return picture, dict(input_ids=e.input_ids[None], pixel_values=e.images[0]['pixel_values'][None])


def answers(model, batch):
    with torch.no_grad():
        new = model.generate(**batch, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0, suppress_tokens=[4])
        return model(**batch).logits, new[:, batch['input_ids'].shape[1]:]


@pytest.mark.parametrize('kind', FRONTS)
@pytest.mark.parametrize('mode', ['pad', 'crop', 'squash'])
def test_out_to_transformers_and_back(kind, mode, tmp_path):
    ours, processor = made(kind, mode)
    picture, batch = asked(processor)
    save_transformers(ours, processor, tmp_path)
    theirs, both = AutoModelForImageTextToText.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    assert type(theirs).__name__ == ('VipLlava' if kind == 'vip' else 'Llava') + 'ForConditionalGeneration'
    again, processor2 = load_published(tmp_path, template='world')
    (want, tokens) = answers(ours, batch)
    for m in (theirs, again):
        logits, new = answers(m, batch)
        torch.testing.assert_close(logits, want, atol=1e-5, rtol=0)
        assert torch.equal(new, tokens)
    mine = {k: v for k, v in convert_keys(ours.state_dict(), 'ours', 'transformers').items() if 'position_ids' not in k}
    assert all(torch.equal(v, theirs.state_dict()[k]) for k, v in mine.items())
    prompt = both.apply_chat_template([dict(role='user', content=[dict(type='image'), dict(type='text', text='what color is the circle ?')])],
                                      add_generation_prompt=True)
    theirs_in = both(images=picture, text=prompt, return_tensors='pt', add_special_tokens=False)
    assert torch.equal(theirs_in['input_ids'], batch['input_ids'])
    torch.testing.assert_close(theirs_in['pixel_values'], batch['pixel_values'], atol=2e-2, rtol=0)     # one grey level
    torch.testing.assert_close(processor2.load(picture)[0]['pixel_values'], batch['pixel_values'][0])


def original(folder, model, processor, text='llama', tower=True, binary=False):
    "The model as the original repository would have written it, and its CLIP beside it."
    state = convert_keys(model.state_dict(), 'ours', 'reference')
    if not model.config.vision_config['projector_norm']: state |= stage1_state(model)
    state = {k: v for k, v in state.items() if '.final_linear.' not in k or model.config.vision_config['projector_norm']}
    if not tower: state = {k: v for k, v in state.items() if 'vision_tower' not in k}
    names = dict(llama='llava_llama', phi3='llava_phi3')
    vip = model.config.vision_config['projector_norm']
    config = {k: v for k, v in model.config.text_config.to_dict().items() if k not in ('architectures', 'model_type')}
    config |= dict(model_type=names[text], mm_vision_tower='clip_4layers_336' if vip else 'clip', mm_projector_type='mlp2x_gelu',
                   mm_vision_select_layer=-2, mm_vision_select_feature='patch', mm_hidden_size=1, image_aspect_ratio='pad',
                   tokenizer_padding_side='right', use_mm_proj=True)
    (folder/'m').mkdir(); (folder/'m'/'config.json').write_text(json.dumps(config, default=str))
    half = len(state)//2
    for i, part in enumerate((dict(list(state.items())[:half]), dict(list(state.items())[half:]))):
        if binary: torch.save(part, folder/'m'/f'pytorch_model-{i}.bin')
        else:
            from safetensors.torch import save_file
            save_file({k: v.contiguous() for k, v in part.items()}, folder/'m'/f'model-{i}.safetensors')
    processor.tokenizer.save_pretrained(folder/'m')
    clip = model.model.vision.tower
    if tower: clip = type(clip)(clip.config)              # other weights: those of the folder count
    clip.save_pretrained(folder/'clip')
    (folder/'clip'/'preprocessor_config.json').write_text(json.dumps(dict(
        image_processor_type='CLIPImageProcessor', size={'shortest_edge': 28}, crop_size={'height': 28, 'width': 28}, do_center_crop=True)))
    return folder/'m', folder/'clip'


@pytest.mark.parametrize('kind', ['vip', 'llava'])
@pytest.mark.parametrize('text,tower,binary', [('llama', True, False), ('llama', False, True), ('phi3', True, True)])
def test_in_from_the_original_layout(kind, text, tower, binary, tmp_path):
    ours, processor = made(kind, text=text)
    _, batch = asked(processor)
    folder, clip = original(tmp_path, ours, processor, text, tower, binary)
    model, read = load_published(folder, clip, 'world')
    assert read.transform.mode == 'pad' and read.template == 'world'
    if kind == 'vip': assert model.config.vision_config['select_layers'] == [-2, -5, -8, -11, 6]
    want, got = answers(ours, batch), answers(model, batch)
    torch.testing.assert_close(got[0], want[0], atol=1e-5, rtol=0)
    assert torch.equal(got[1], want[1])
    assert load_published(folder, clip)[1].template == dict(llama='llava_v1', phi3='phi_3')[text]


def test_what_cannot_be_read_is_named(tmp_path):
    ours, processor = made('vip')
    folder, clip = original(tmp_path, ours, processor)
    config = json.loads((folder/'config.json').read_text())
    def broken(**changes):
        (folder/'config.json').write_text(json.dumps({**config, **changes}))
        return lambda: load_original(folder, clip)
    with pytest.raises(CheckpointFormatError, match="model_type='mpt'"): broken(model_type='mpt')()
    with pytest.raises(CheckpointFormatError, match='mlpNx_gelu'): broken(mm_projector_type='resampler')()
    with pytest.raises((CheckpointFormatError, RuntimeError), match='size mismatch|missing'): broken(intermediate_size=64)()
    broken()
    next(folder.glob('model-0.safetensors')).unlink()
    with pytest.raises((CheckpointFormatError, ValueError), match='not the tower|missing|differ'): load_original(folder, clip)
    (tmp_path/'x.bin').write_bytes(b'nothing')
    with pytest.raises(CheckpointFormatError, match='not a file of tensors'): read_weights(tmp_path/'x.bin')


def test_pickles_run_no_code(tmp_path):
    class Trap:
        def __reduce__(self): return (open, (str(tmp_path/'ran'), 'w'))
    torch.save({'model.mm_projector.0.bias': Trap()}, tmp_path/'mm_projector.bin')
    with pytest.raises(CheckpointFormatError, match='not a file of tensors'): read_weights(tmp_path/'mm_projector.bin')
    assert not (tmp_path/'ran').exists()


@pytest.mark.parametrize('change,match', [(dict(pixel_shuffle=2), 'pixel_shuffle'), (dict(projector='linear'), "projector 'linear'"),
                                          (dict(keep_cls=True), 'drops exactly one')])
def test_what_transformers_cannot_hold_is_refused(change, match):
    ours, _ = made('vip')
    ours.config.vision_config |= change
    with pytest.raises(CheckpointFormatError, match=match): to_transformers(ours)


def test_other_models_and_image_modes_are_refused(tmp_path):
    ours, processor = made('vip')
    with pytest.raises(CheckpointFormatError, match='neither llava nor vipllava'): from_transformers(ours)
    processor.transform = ImageTransform('native', 28)
    with pytest.raises(CheckpointFormatError, match="image mode 'native'"): save_transformers(ours, processor, tmp_path/'m')
    assert not (tmp_path/'m').exists()
