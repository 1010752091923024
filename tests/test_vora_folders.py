"""Folders of VoRA as they are published and exported: what trains on from them, in which files they
come, as which language model they leave, at which resolution they see."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM
from typer.testing import CliRunner

import vlmbench
from mini_bases import parameters_of
from test_vision_lora import awake, vlm
from vlmbench.checkpoints.export import export_language_model, export_merged
from vlmbench.checkpoints.load import LoadError, load_vlm
from vlmbench.checkpoints.vora import to_reference
from vlmbench.data.image import ImageTransform
from vlmbench.data.world import WorldConfig, WorldSize, write_world
from vlmbench.demo.chat import ChatError
from vlmbench.demo.serve import load_models
from vlmbench.models.vision import build_front_end
from vlmbench.models.vision_lora import LoRASettings, merge_vision_lora
from vlmbench.models.vlm import assemble, build_vlm
from vlmbench.run.cli import app
from vlmbench.run.jobs import evaluate_job, train_job
from vlmbench.run.manifest import Run
from vlmbench.run.parameters import ParameterError
from vlmbench.train.scale import base_model

BLOCKS = 2  # with LoRA, of 3


def write_release(folder, merged=True, preprocessor=224, **more):
    """A released folder of a tiny Qwen2 whose square is 448 px: random extra biases, LoRA merged or
    not, and the preprocessor file of another size, as it was shipped. Returns its model."""
    tokenizer = AutoTokenizer.from_pretrained(base_model('asset:llm'))
    llm = dict(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
        **more,
    )
    lora = LoRASettings(BLOCKS, 3, extra_bias='reference_random').to_dict()
    front = dict(type='vora', patch_size=56, image_size=448, width=12, norm_eps=1e-5, lora=lora)
    torch.manual_seed(0)
    plain = Qwen2ForCausalLM(Qwen2Config(**llm, initializer_range=0.2))
    image = len(tokenizer) - 1
    model = assemble(plain, build_front_end(front, 32), image, bidirectional_images=True)
    awake(model.eval())
    if merged:
        merge_vision_lora(model)
    folder.mkdir(parents=True)
    state = {name: tensor.contiguous().clone() for name, tensor in to_reference(model).items()}
    save_file(state, folder / 'model.safetensors')
    tokenizer.save_pretrained(folder)
    (folder / 'config.json').write_text(json.dumps(llm | dict(model_type='vora')))
    size = dict(size=dict(shortest_edge=preprocessor), crop_size=preprocessor)
    kind = dict(image_processor_type='CLIPImageProcessor', do_center_crop=True)
    (folder / 'preprocessor_config.json').write_text(json.dumps(kind | size))
    return model


@pytest.fixture(scope='module')
def release(tmp_path_factory):
    folder = tmp_path_factory.mktemp('release') / 'VoRA-tiny'
    write_release(folder)
    return folder


@pytest.fixture(scope='module')
def world(tmp_path_factory):
    none = dict.fromkeys(WorldSize.__dataclass_fields__, 0)
    few = dict(caption_train=12, vqa_train=12, text_train=8, vqa_test=6)
    return write_world(
        tmp_path_factory.mktemp('w') / 'world', WorldConfig(), WorldSize(**none | few)
    )


FEW = {'pretrain': 2, 'finetune': 3}


def train(world, out, **more):
    Run(out, 'train', {})
    few = [f'stages.{stage}.steps={n}' for stage, n in FEW.items()]
    few += [
        f'stages.{stage}.{k}={v}'
        for stage in FEW
        for k, v in (('batch_rows', 2), ('accumulation', 1))
    ]
    given = dict(recipe='vora', device='cpu', evaluate=False, overrides=few) | more
    given = parameters_of('train', **given)
    train_job(given, str(world), str(out))
    return load_file(out / 'model' / 'model.safetensors')


def same(a, b):
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.slow
def test_the_second_stage_on_the_exported_first_equals_the_run_of_both(world, tmp_path):
    variant = ['r=4', 'extra_bias=reference_random']
    whole = train(world, tmp_path / 'whole', variant=variant)
    train(world, tmp_path / 'first', variant=variant, stages=['pretrain'])
    merged = export_merged(tmp_path / 'first', tmp_path / 'merged')
    more = dict(variant=variant, stages=['finetune'], model=str(merged))
    same(train(world, tmp_path / 'second', **more), whole)
    for name in ('config.json', 'processor_config.json', 'generation_config.json'):
        files = [(tmp_path / run / 'model' / name).read_bytes() for run in ('second', 'whole')]
        assert files[0] == files[1], name


@pytest.mark.parametrize('merged', [True, False])
def test_a_release_is_finetuned_as_coded(world, tmp_path, merged):
    """The patch embedding and the biases of o, gate, up and down of the LoRA blocks, nothing else;
    a release before its merge is merged first."""
    write_release(tmp_path / 'release', merged)
    export_merged(tmp_path / 'release', tmp_path / 'merged')
    before = load_file(tmp_path / 'merged' / 'model.safetensors')
    more = dict(model=str(tmp_path / 'release'), stages=['finetune'], variant=['finetune=as_coded'])
    after = train(world, tmp_path / 'run', **more)
    assert after.keys() == before.keys()  # no teacher, no LoRA
    block = 'model.language_model.layers.{}.{}.bias'
    extra = 'self_attn.o_proj', 'mlp.gate_proj', 'mlp.up_proj', 'mlp.down_proj'
    expected = {block.format(i, name) for i in range(BLOCKS) for name in extra}
    expected |= {name for name in before if name.startswith('model.vision.')}
    assert {name for name in after if not torch.equal(after[name], before[name])} == expected


def test_everything_of_a_release_trains(world, release, tmp_path):
    export_merged(release, tmp_path / 'merged')
    before = load_file(tmp_path / 'merged' / 'model.safetensors')
    after = train(world, tmp_path / 'run', model=str(release), stages=['finetune'])
    assert not any(torch.equal(after[name], before[name]) for name in after if 'proj' in name)


def wrapped(state):
    yield 'model.pt', state
    yield 'model.ckpt', dict(state_dict=state)
    named = {f'module.{name}': tensor for name, tensor in state.items()}
    yield (
        'global_step9/mp_rank_00_model_states.pt',
        dict(module=named, optimizer=None, ds_version='0'),
    )


def test_export_of_torch_files(tmp_path):
    "Settings and tokenizer come from the folder around the file, or from the one that is named."
    model = write_release(tmp_path / 'step', merged=False)
    state = load_file(tmp_path / 'step' / 'model.safetensors')
    (tmp_path / 'step' / 'model.safetensors').unlink()
    merge_vision_lora(model)
    expected, ids = model.state_dict(), torch.randint(4, 60, (1, 9))
    for i, (name, content) in enumerate(wrapped(state)):
        file = tmp_path / 'step' / name
        file.parent.mkdir(exist_ok=True)
        torch.save(content, file)
        out = tmp_path / f'out-{i}'
        done = CliRunner().invoke(app, ['export', str(file), str(out)])
        assert done.exit_code == 0, done.exception
        again, _ = load_vlm(out)
        torch.testing.assert_close(again(input_ids=ids).logits, model(input_ids=ids).logits)
        assert again.state_dict().keys() == expected.keys()
    alone = tmp_path / 'alone' / 'model.pt'
    alone.parent.mkdir()
    torch.save(state, alone)
    with pytest.raises(LoadError, match='no config.json beside this file.*--config FOLDER'):
        export_merged(alone, tmp_path / 'out')
    assert export_merged(alone, tmp_path / 'named', config=tmp_path / 'step').is_dir()
    with pytest.raises(LoadError, match='goes with a torch file'):
        export_merged(tmp_path / 'step', tmp_path / 'out', config=tmp_path / 'step')
    torch.save(dict(model=LoRASettings(1, 1)), alone)  # an object, which unpickling would make
    with pytest.raises(LoadError, match='model.pt is not a file of tensors'):
        export_merged(alone, tmp_path / 'out', config=tmp_path / 'step')
    assert not (tmp_path / 'out').exists()


@torch.no_grad()
def test_a_language_model_with_its_biases_is_a_llama(release, tmp_path):
    "The same logits to the last bit; biases that a block does not have are zero."
    model, processor = load_vlm(release)
    done = CliRunner().invoke(
        app, ['export', str(release), str(tmp_path / 'out'), '--language-model']
    )
    assert done.exit_code == 0, done.exception
    config = json.loads((tmp_path / 'out' / 'config.json').read_text())
    assert config['architectures'] == ['LlamaForCausalLM'] and config['attention_bias']
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / 'out').eval()
    ids = torch.randint(4, 60, (2, 11))
    assert torch.equal(plain(input_ids=ids).logits, model(input_ids=ids).logits)
    assert plain.model.layers[0].mlp.up_proj.bias.abs().sum() > 0
    assert plain.model.layers[BLOCKS].mlp.up_proj.bias.abs().sum() == 0
    assert plain.model.layers[BLOCKS].self_attn.o_proj.bias.abs().sum() == 0
    own = dict(
        plain.generate(ids[:1], max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    )
    theirs = model.generate(input_ids=ids[:1], max_new_tokens=4, do_sample=False)
    assert own['sequences'].tolist() == theirs.tolist()


@torch.no_grad()
@pytest.mark.parametrize('family', ['llama', 'qwen2'])
def test_a_tied_head_stays_tied_in_the_llama(family, tmp_path):
    model = awake(vlm(family, lora=dict(layers=1, r=2, extra_bias='reference_random')))
    merge_vision_lora(model)
    export_language_model(model, None, tmp_path / 'out')
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / 'out').eval()
    ids = torch.randint(0, 38, (2, 7))
    assert torch.equal(plain(input_ids=ids).logits, model(input_ids=ids).logits)


def test_biases_that_no_class_holds_are_refused(tmp_path):
    biased = dict(layers=1, r=2, extra_bias='zero')
    model = vlm('qwen3', lora=biased)
    merge_vision_lora(model)
    with pytest.raises(ValueError, match='class of a qwen3 has no place.*not those of a Llama'):
        export_language_model(model, None, tmp_path / 'out')
    windows = dict(use_sliding_window=True, sliding_window=4, max_window_layers=1)
    write_release(tmp_path / 'windows', **windows)
    with pytest.raises(LoadError, match='no layers with a sliding window'):
        export_merged(tmp_path / 'windows', tmp_path / 'out', language_model=True)
    assert not (tmp_path / 'out').exists()


WORDS = 'what is this ?', 'what is the color of the large circle at the top left ?'
PICTURES = Image.linear_gradient('L').resize((90, 50)), Image.radial_gradient('L').resize((40, 160))


def answers(model, processor, pictures, words):
    text = [processor.tokenizer.bos_token + f'<image> {w}' for w in words]
    batch = processor(
        images=[[p.convert('RGB')] for p in pictures], text=text, padding=True, return_tensors='pt'
    )
    made = model.generate(
        **batch, max_new_tokens=6, min_new_tokens=6, do_sample=False,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    return batch, made.sequences[:, batch['input_ids'].shape[1] :], torch.stack(made.logits, 1)


@torch.no_grad()
@pytest.mark.parametrize('mode', ['', 'native'])
def test_two_pictures_and_questions_in_a_batch_are_each_alone(release, mode):
    "448 px whatever the preprocessor file says; at their own resolution two sizes, and two counts."
    model, processor = load_vlm(release, template='world', image_mode=mode)
    sizes = [processor.load(picture)[0]['size'] for picture in PICTURES]
    assert sizes == ([(448, 448)] * 2 if not mode else [(168, 336), (448, 112)])
    _, ids, logits = answers(model, processor, PICTURES, WORDS)
    for i in range(2):
        _, alone, one = answers(model, processor, PICTURES[i : i + 1], WORDS[i : i + 1])
        assert ids[i].tolist() == alone[0].tolist()
        torch.testing.assert_close(logits[i], one[0], atol=1e-5, rtol=1e-5)


@pytest.fixture(scope='module')
def world_release(release):
    "The release with the template of the embedded world, whose words its tokenizer has."
    model, processor = load_vlm(release, template='world')
    folder = release.parent / 'VoRA-world'
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope='module')
def others(tmp_path_factory):
    "Models that are no VoRA: one of an encoder, and EVE's, which sees at any size by itself."
    root = tmp_path_factory.mktemp('others')
    llm, tower = base_model('asset:llm'), base_model('asset:vit')
    eve = dict(type='eve', channels=16, patch_stride=8, conv_stride=2, heads=2)
    canvas = ImageTransform('any_aspect', 64, patch=16, multiple=16)
    made = dict(
        llava=build_vlm(llm, tower, template='world'),
        eve=build_vlm(llm, front_end=eve, template='world', transform=canvas),
    )
    for name, parts in made.items():
        for part in parts:
            part.save_pretrained(root / name)
    return root


def test_chat_and_the_served_page_see_at_native_resolution(world_release, others, tmp_path):
    PICTURES[0].convert('RGB').save(tmp_path / 'a.png')
    Image.new('RGB', (2000, 1)).save(tmp_path / 'line.png')

    def chat(model, picture, *words):
        words = [
            'chat',
            str(model),
            '--image',
            str(picture),
            '--question',
            'what is this ?',
            *words,
        ]
        return CliRunner().invoke(app, [*words, '--image-mode', 'native', '--max-new-tokens', '2'])

    assert chat(world_release, tmp_path / 'a.png').exit_code == 0
    refused = chat(others / 'llava', tmp_path / 'a.png').exception
    assert isinstance(refused, ParameterError) and "front end 'encoder' sees" in str(refused)
    (tmp_path / 'theirs').mkdir()  # a published one is told apart by its configuration alone
    (tmp_path / 'theirs' / 'config.json').write_text('{"model_type": "llava_llama"}')
    refused = chat(tmp_path / 'theirs', tmp_path / 'a.png').exception
    assert isinstance(refused, ParameterError) and "front end 'encoder' sees" in str(refused)
    refused = chat(world_release, tmp_path / 'line.png').exception
    assert '2000 x 1 has an aspect ratio over 200' in str(refused)
    model = vlmbench.load(world_release, image_mode='native', device='cpu')
    assert model.processor.load(PICTURES[1].convert('RGB'))[0]['size'] == (448, 112)
    own = load_vlm(others / 'eve')[1].transform
    assert load_vlm(others / 'eve', image_mode='native')[1].transform == own
    with pytest.raises(ChatError, match="front end 'encoder' sees pictures of one size only"):
        load_models([others / 'llava'], device='cpu', image_mode='native')
    served = load_models([world_release], device='cpu', image_mode='native')
    assert served[world_release.name].processor.transform.mode == 'native'


def test_evaluate_at_native_resolution(world_release, world, tmp_path, monkeypatch):
    "The job takes the mode; pictures of the world, 64 px, then take other patches than on 448."
    seen = []
    whole = ImageTransform.resize
    monkeypatch.setattr(ImageTransform, 'resize', lambda t, i: seen.append(t.mode) or whole(t, i))
    for mode in ('', 'native'):
        out = tmp_path / (mode or 'own')
        Run(out, 'evaluate', {})
        given = parameters_of('evaluate', tasks=['vqa_test'], device='cpu', blind=False, limit=2)
        given |= dict(image_mode=mode, max_new_tokens=2, model=str(world_release))
        done = evaluate_job(given, str(world_release), str(world), str(out))
        assert done['summary']['vqa_test']
    assert set(seen) == {'pad', 'native'}
