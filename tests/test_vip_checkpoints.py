"""Checkpoints of LLaVA and ViP-LLaVA: original folders in, transformers' layouts in and out, the
same logits and tokens."""

import json
import shutil
from functools import partial

import huggingface_hub
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from typer.testing import CliRunner

from vlmbench.data.image import ImageTransform
from vlmbench.data.record import Sample, Turn
from vlmbench.data.scene import world_tokenizer
from vlmbench.demo.chat import ChatModel
from vlmbench.checkpoints.load import LoadError, find_model, load_vlm
from vlmbench.checkpoints.llava import (
    TRANSFORMERS,
    from_transformers,
    load_published,
    load_release,
    save_transformers,
    template_of,
    to_reference,
    to_transformers,
)
from vlmbench.checkpoints.names import CheckpointFormatError
from vlmbench.checkpoints.release import read_weights
from vlmbench.models.vlm import build_vlm
from vlmbench.run.cli import app
from vlmbench.run.parameters import ParameterError

VISION = 'model.mm_projector.', 'model.vision_tower.'  # published names
SMALL = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=12, num_attention_heads=2)
FRONTS = dict(
    vip=dict(select_layers=[-2, -5, -8, -11, 6], projector_norm=True),
    llava=dict(select_layers=[-2]),
    siglip=dict(select_layers=[-2]),
    several=dict(select_layers=[-2, 3]),
)


def made(kind, mode='pad', text='llama'):
    torch.manual_seed(0)
    tokens = world_tokenizer()
    lm = dict(llama=(LlamaConfig, LlamaForCausalLM), phi3=(Phi3Config, Phi3ForCausalLM))[text]
    llm = lm[1](
        lm[0](
            vocab_size=len(tokens),
            num_key_value_heads=1,
            pad_token_id=0,
            **{**SMALL, 'num_hidden_layers': 2},
        )
    )
    tower = (
        SiglipVisionModel(SiglipVisionConfig(image_size=28, patch_size=14, **SMALL))
        if kind == 'siglip'
        else CLIPVisionModel(CLIPVisionConfig(image_size=28, patch_size=14, **SMALL))
    )
    return build_vlm(llm, tower, FRONTS[kind], tokens, 'world', ImageTransform(mode, 28))


def asked(processor):
    "A prompt and its picture as the evaluator would give them."
    torch.manual_seed(1)
    picture = Image.fromarray(torch.randint(0, 255, (40, 28, 3), dtype=torch.uint8).numpy())
    sample = Sample('q', [Turn('user', '<image>\nwhat color is the circle ?')], [picture])
    e = processor.encode(sample, add_generation_prompt=True)
    return picture, dict(
        input_ids=e.input_ids[None], pixel_values=e.images[0]['pixel_values'][None]
    )


def answers(model, batch):
    with torch.no_grad():
        new = model.generate(
            **batch,
            max_new_tokens=6,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            suppress_tokens=[4],
        )
        return model(**batch).logits, new[:, batch['input_ids'].shape[1] :]


@pytest.mark.parametrize('kind', FRONTS)
@pytest.mark.parametrize('mode', ['pad', 'crop', 'squash'])
def test_out_to_transformers_and_back(kind, mode, tmp_path):
    ours, processor = made(kind, mode)
    picture, batch = asked(processor)
    save_transformers(ours, processor, tmp_path)
    theirs, both = (
        AutoModelForImageTextToText.from_pretrained(tmp_path),
        AutoProcessor.from_pretrained(tmp_path),
    )
    assert (
        type(theirs).__name__
        == ('VipLlava' if kind == 'vip' else 'Llava') + 'ForConditionalGeneration'
    )
    again, processor2 = load_published(tmp_path, template='world')
    (want, tokens) = answers(ours, batch)
    for m in (theirs, again):
        logits, new = answers(m, batch)
        torch.testing.assert_close(logits, want, atol=1e-5, rtol=0)
        assert torch.equal(new, tokens)
    mine = {
        k: v for k, v in TRANSFORMERS.write(ours.state_dict()).items() if 'position_ids' not in k
    }
    assert all(torch.equal(v, theirs.state_dict()[k]) for k, v in mine.items())
    prompt = both.apply_chat_template(
        [
            dict(
                role='user',
                content=[dict(type='image'), dict(type='text', text='what color is the circle ?')],
            )
        ],
        add_generation_prompt=True,
    )
    theirs_in = both(images=picture, text=prompt, return_tensors='pt', add_special_tokens=False)
    assert torch.equal(theirs_in['input_ids'], batch['input_ids'])
    torch.testing.assert_close(
        theirs_in['pixel_values'], batch['pixel_values'], atol=2e-2, rtol=0
    )  # one grey level
    torch.testing.assert_close(
        processor2.load(picture)[0]['pixel_values'], batch['pixel_values'][0]
    )


def original(folder, model, processor, text='llama', tower=True, binary=False):
    "The model as the original repository would have written it, and its CLIP beside it."
    state = to_reference(model)
    if not tower:
        state = {k: v for k, v in state.items() if 'vision_tower' not in k}
    names = dict(llama='llava_llama', phi3='llava_phi3')
    vip = model.config.vision_config['projector_norm']
    config = {
        k: v
        for k, v in model.config.text_config.to_dict().items()
        if k not in ('architectures', 'model_type')
    }
    config |= dict(
        model_type=names[text],
        mm_vision_tower='clip_4layers_336' if vip else 'clip',
        mm_projector_type='mlp2x_gelu',
        mm_vision_select_layer=-2,
        mm_vision_select_feature='patch',
        mm_hidden_size=1,
        image_aspect_ratio='pad',
        tokenizer_padding_side='right',
        use_mm_proj=True,
    )
    (folder / 'm').mkdir()
    (folder / 'm' / 'config.json').write_text(json.dumps(config, default=str))
    half = len(state) // 2
    for i, part in enumerate((dict(list(state.items())[:half]), dict(list(state.items())[half:]))):
        if binary:
            torch.save(part, folder / 'm' / f'pytorch_model-{i}.bin')
        else:
            save_file(
                {k: v.contiguous() for k, v in part.items()},
                folder / 'm' / f'model-{i}.safetensors',
            )
    processor.tokenizer.save_pretrained(folder / 'm')
    clip = model.model.vision.tower
    if tower:
        clip = type(clip)(clip.config)  # other weights: those of the folder count
    clip.save_pretrained(folder / 'clip')
    (folder / 'clip' / 'preprocessor_config.json').write_text(
        json.dumps(
            dict(
                image_processor_type='CLIPImageProcessor',
                size={'shortest_edge': 28},
                crop_size={'height': 28, 'width': 28},
                do_center_crop=True,
            )
        )
    )
    return folder / 'm', folder / 'clip'


@pytest.mark.parametrize('kind', ['vip', 'llava'])
@pytest.mark.parametrize(
    'text,tower,binary', [('llama', True, False), ('llama', False, True), ('phi3', True, True)]
)
def test_in_from_the_original_layout(kind, text, tower, binary, tmp_path):
    ours, processor = made(kind, text=text)
    _, batch = asked(processor)
    folder, clip = original(tmp_path, ours, processor, text, tower, binary)
    model, read = load_published(folder, clip, 'world')
    assert read.transform.mode == 'pad' and read.template == 'world'
    if kind == 'vip':
        assert model.config.vision_config['select_layers'] == [-2, -5, -8, -11, 6]
    want, got = answers(ours, batch), answers(model, batch)
    torch.testing.assert_close(got[0], want[0], atol=1e-5, rtol=0)
    assert torch.equal(got[1], want[1])
    if text == 'phi3':
        assert load_published(folder, clip)[1].template == 'phi_3'
    else:
        with pytest.raises(CheckpointFormatError, match='no template is known for llama'):
            load_published(folder, clip)


@pytest.mark.parametrize('text,want', [('llama', 'bunny_llama'), ('phi3', 'bunny_phi3')])
def test_a_folder_of_bunnys_names_its_template(text, want, tmp_path):
    "By its type; the last block of the frozen tower, which Bunny drops, is the published one."
    ours, processor = made('siglip', text=text)
    folder, clip = original(tmp_path, ours, processor, text)
    ours.model.vision.tower.save_pretrained(clip)
    config = json.loads((folder / 'config.json').read_text())
    kind = dict(llama='bunny-llama', phi3='bunny-phi3')[text]
    (folder / 'config.json').write_text(json.dumps(config | dict(model_type=kind)))
    last = f'.layers.{SMALL["num_hidden_layers"] - 1}.'
    for file in folder.glob('*.safetensors'):
        state = {n: t for n, t in load_file(file).items() if 'tower' not in n or last not in n}
        save_file(state, file)
    model, read = load_published(folder, clip)
    assert read.template == want
    assert load_published(folder, clip, 'bunny_llama_spaced')[1].template == 'bunny_llama_spaced'
    _, batch = asked(processor)
    torch.testing.assert_close(model(**batch).logits, ours(**batch).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    'text,control,eos,want',
    [
        ('llama', [], '</s>', 'llava_v1'),
        ('mistral', [], '</s>', 'llava_v1'),
        ('phi3', ['<|user|>', '<|end|>'], '</s>', 'phi_3'),
        (
            'llama',
            ['<|start_header_id|>', '<|end_header_id|>', '<|eot_id|>'],
            '<|end_of_text|>',
            'llama_3',
        ),
        ('llama', ['<|im_start|>'], '<|im_end|>', None),
        ('phi3', [], '</s>', None),
        ('mistral', [], '<eos>', None),
    ],
)
@pytest.mark.fault('vip-9')
def test_the_tokenizer_decides_about_the_template(text, control, eos, want):
    "Llama-3 and Vicuna folders are both llava_llama."
    vocab = {t: i for i, t in enumerate(['<unk>', '<s>', eos, 'a', *control])}
    tok = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(vocab, unk_token='<unk>')), eos_token=eos
    )
    if want:
        assert template_of(text, tok) == want
    else:
        with pytest.raises(
            CheckpointFormatError, match=f'no template is known for {text}.*--template.*llava_v1'
        ):
            template_of(text, tok)


def test_a_lora_release(tmp_path):
    "Adapter, projector beside it, the base by name: as if trained in place."
    ours, processor = made('vip')
    folder, clip = original(tmp_path, ours, processor)
    llm = LlamaForCausalLM.from_pretrained(
        None,
        config=ours.config.text_config,
        state_dict={k: v for k, v in to_reference(ours).items() if not k.startswith(VISION)},
    )
    llm.save_pretrained(tmp_path / 'base')
    adapted = get_peft_model(
        llm,
        LoraConfig(
            r=2, lora_alpha=4, target_modules=['q_proj', 'down_proj'], init_lora_weights=False
        ),
    )
    for f in folder.glob('*.safetensors'):
        f.unlink()
    adapted.peft_config['default'].base_model_name_or_path = str(tmp_path / 'base')
    adapted.save_pretrained(folder)
    projector = {k: v for k, v in to_reference(ours).items() if k.startswith(VISION[0])}
    torch.save(
        {f'base_model.model.{k}': v for k, v in projector.items()},
        folder / 'non_lora_trainables.bin',
    )
    ours.model.vision.tower.save_pretrained(clip)
    for f in folder.glob('tokenizer*'):
        f.rename(tmp_path / 'base' / f.name)  # releases have none
    model, _ = load_published(folder, clip, 'world')
    _, batch = asked(processor)
    ours.model.language_model.load_state_dict(adapted.merge_and_unload().model.state_dict())
    torch.testing.assert_close(answers(model, batch)[0], answers(ours, batch)[0], atol=1e-5, rtol=0)
    shutil.rmtree(tmp_path / 'base')
    with pytest.raises(CheckpointFormatError, match='its adapter belongs to .*base.*--base'):
        load_published(folder, clip, 'world')


def published(tmp_path):
    "An original folder that names the CLIP tower beside it, and the model it was made of."
    ours, processor = made('vip')
    folder, clip = original(tmp_path, ours, processor)
    clip = clip.rename(tmp_path / 'clip_4layers_336')
    config = json.loads((folder / 'config.json').read_text())
    (folder / 'config.json').write_text(json.dumps(config | dict(mm_vision_tower=str(clip))))
    return folder, ours, processor


def test_original_folders_load_everywhere_and_say_so(tmp_path):
    folder, ours, processor = published(tmp_path)
    with pytest.warns(UserWarning, match='original layout.*vlmbench convert'):
        model, read = load_vlm(folder, template='world')
    _, batch = asked(processor)
    torch.testing.assert_close(answers(model, batch)[0], answers(ours, batch)[0], atol=1e-5, rtol=0)
    with pytest.warns(UserWarning), pytest.raises(LoadError, match='no template is known'):
        load_vlm(folder)
    with pytest.warns(UserWarning):
        chat = ChatModel.load(folder, 'cpu', template='world')
    assert (
        ''.join(chat.stream([Turn('user', '<image>\nwhat ?')], [Image.new('RGB', (40, 28))], 3))
        is not None
        and chat.name == 'm'
    )


def test_convert_writes_what_transformers_loads(tmp_path):
    folder, ours, processor = published(tmp_path)
    done = CliRunner().invoke(
        app, ['convert', str(folder), str(tmp_path / 'out'), '--template', 'world']
    )
    assert done.exit_code == 0 and done.stdout.strip() == str(tmp_path / 'out')
    _, batch = asked(processor)
    theirs = AutoModelForImageTextToText.from_pretrained(tmp_path / 'out')
    torch.testing.assert_close(
        answers(theirs, batch)[0], answers(ours, batch)[0], atol=1e-5, rtol=0
    )
    words = AutoProcessor.from_pretrained(tmp_path / 'out', backend='pil').tokenizer
    short, long = words(['what ?', 'what is the color ?'], padding=True)['attention_mask']
    assert short[0] == 0 and short[-1] == 1 == long[0]  # else a shorter question ends in padding
    model, read = load_vlm(tmp_path / 'out', template='llava_v1')
    assert read.template == 'llava_v1' and torch.equal(
        model(**batch).logits, theirs(**batch).logits
    )
    again = CliRunner().invoke(app, ['convert', str(folder), str(tmp_path / 'out')])
    assert isinstance(again.exception, ParameterError) and 'exists already' in str(again.exception)
    wrong = CliRunner().invoke(
        app,
        [
            'convert',
            str(folder),
            str(tmp_path / 'new'),
            '--vision',
            'none/at-all',
            '--template',
            'world',
        ],
    )
    assert (
        isinstance(wrong.exception, ParameterError)
        and '--vision' in str(wrong.exception)
        and not (tmp_path / 'new').exists()
    )


@pytest.mark.parametrize('kind, cls', [('vip', 'VipLlava'), ('llava', 'Llava')])
def test_convert_writes_a_runs_model_too(kind, cls, tmp_path):
    ours, processor = made(kind)
    ours.save_pretrained(tmp_path / 'run' / 'model')
    processor.save_pretrained(tmp_path / 'run' / 'model')
    done = CliRunner().invoke(app, ['convert', str(tmp_path / 'run'), str(tmp_path / 'out')])
    assert done.exit_code == 0, done.exception
    theirs = AutoModelForImageTextToText.from_pretrained(tmp_path / 'out')
    assert type(theirs).__name__ == f'{cls}ForConditionalGeneration'
    _, batch = asked(processor)
    torch.testing.assert_close(
        answers(theirs, batch)[0], answers(ours, batch)[0], atol=1e-5, rtol=0
    )


def test_a_language_model_alone_is_refused_in_one_line(tmp_path):
    model, processor = made('llava')
    model.model.language_model.save_pretrained(tmp_path)
    processor.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(
        LoadError, match="of type 'llama' takes no pictures: give a vision-language model$"
    ):
        load_vlm(tmp_path)


def test_several_gpus_share_an_original_folder(tmp_path, monkeypatch):
    folder, *_ = published(tmp_path)
    monkeypatch.setattr('vlmbench.demo.chat.pick_device', lambda device: 'cpu')
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    asked = {}

    def load(where, device, template, **settings):
        asked.update(settings)
        return load_vlm(where, device, template)

    monkeypatch.setattr('vlmbench.demo.chat.load_vlm', load)
    with pytest.warns(UserWarning, match='original layout'):
        ChatModel.load(folder, template='world')
    assert asked['device_map'] == 'auto'


@pytest.mark.parametrize(
    'where,why',
    [
        ('llava-hf/vip-llava-7b-hf', 'the Hugging Face Hub did not give it'),
        ('a/b/c', 'no config.json'),
        ('.', 'no config.json'),
    ],
)
def test_what_is_no_model_says_where_it_was_looked_for(where, why, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    monkeypatch.setattr(
        'huggingface_hub.snapshot_download',
        partial(huggingface_hub.snapshot_download, cache_dir=tmp_path / 'hub'),
    )
    with pytest.raises(LoadError, match=why):
        find_model(where)


def test_a_broken_configuration_is_refused_in_one_line(tmp_path):
    (tmp_path / 'config.json').write_text('{')
    with pytest.raises(LoadError, match='config.json is cut or damaged.*: fetch it again'):
        load_vlm(tmp_path)
    done = CliRunner().invoke(app, ['chat', str(tmp_path), '--question', 'x'])
    assert isinstance(done.exception, ParameterError) and 'config.json cannot be read' in str(
        done.exception
    )


def test_what_cannot_be_read_is_named(tmp_path):
    ours, processor = made('vip')
    folder, clip = original(tmp_path, ours, processor)
    config = json.loads((folder / 'config.json').read_text())

    def broken(**changes):
        (folder / 'config.json').write_text(json.dumps({**config, **changes}))
        return lambda: load_release(folder, clip)

    with pytest.raises(CheckpointFormatError, match="model_type='mpt'"):
        broken(model_type='mpt')()
    with pytest.raises(CheckpointFormatError, match='mlpNx_gelu'):
        broken(mm_projector_type='resampler')()
    with pytest.raises(CheckpointFormatError, match='shapes differ|missing'):
        broken(intermediate_size=64)()
    broken()
    next(folder.glob('model-0.safetensors')).unlink()
    with pytest.raises((CheckpointFormatError, ValueError), match='not the tower|missing|differ'):
        load_release(folder, clip)
    (tmp_path / 'x.bin').write_bytes(b'nothing')
    with pytest.raises(CheckpointFormatError, match='not a file of tensors'):
        read_weights(tmp_path / 'x.bin')


def test_pickles_run_no_code(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / 'ran'), 'w'))

    torch.save({'model.mm_projector.0.bias': Trap()}, tmp_path / 'mm_projector.bin')
    with pytest.raises(CheckpointFormatError, match='not a file of tensors'):
        read_weights(tmp_path / 'mm_projector.bin')
    assert not (tmp_path / 'ran').exists()


@pytest.mark.parametrize(
    'change,match',
    [
        (dict(pixel_shuffle=2), 'pixel_shuffle'),
        (dict(projector='linear'), "projector 'linear'"),
        (dict(keep_cls=True), 'drops exactly one'),
    ],
)
def test_what_transformers_cannot_hold_is_refused(change, match):
    ours, _ = made('vip')
    ours.config.vision_config |= change
    with pytest.raises(CheckpointFormatError, match=match):
        to_transformers(ours)


def test_other_models_and_image_modes_are_refused(tmp_path):
    ours, processor = made('vip')
    with pytest.raises(CheckpointFormatError, match='neither llava nor vipllava'):
        from_transformers(ours)
    processor.transform = ImageTransform('native', 28)
    with pytest.raises(CheckpointFormatError, match="image mode 'native'"):
        save_transformers(ours, processor, tmp_path / 'm')
    assert not (tmp_path / 'm').exists()
