"""Released zero models by name and by file, at tiny sizes: a Hub's cache with a Llama, a CLIP and
the released `.pth` files, from which every command loads."""

import hashlib
import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import torch
import typer.testing
from mini_bases import write_bases
from PIL import Image
from transformers import (
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import vlmbench
from vlmbench.checkpoints import zero_names
from vlmbench.checkpoints.card import arm_of, licence_line, origin_of
from vlmbench.checkpoints.load import LoadError, convert, find_model, is_foreign, load_vlm
from vlmbench.checkpoints.names import CheckpointFormatError
from vlmbench.checkpoints.original import export_original
from vlmbench.checkpoints.zero import ZERO, load_trained
from vlmbench.checkpoints.zero_names import RELEASED_FILES, REPOSITORY, fetch_file, read_original
from vlmbench.checkpoints.zero_release import graft_placed, outline, stage_names
from vlmbench.data.image import ImageTransform
from vlmbench.data.record import Sample, Turn
from vlmbench.data.wrapper import WRAPPERS
from vlmbench.demo.chat import ChatError, ChatModel
from vlmbench.demo.terminal import chat_command
from vlmbench.evaluate.generate import fingerprint
from vlmbench.evaluate.prompts import prompt_inputs
from vlmbench.evaluate.published import NAMES_ARMS, read_published
from vlmbench.lab.calibration import load_any
from vlmbench.methods.names import BUILT_IN
from vlmbench.methods.recipes import get_method
from vlmbench.methods.zero import FRONT_END, PAPER_SCALES, Zero, graft_onto, ranges_at
from vlmbench.models.depth import build_surrogate, depth_of, find_decoder, graft, weights_hash
from vlmbench.models.processor import VLMProcessor
from vlmbench.run.cli import app
from vlmbench.run.engine import run_notebook
from vlmbench.run.revisions import revisions
from vlmbench.run.trained import trained_run
from vlmbench.train.scale import CLIP_L_336, Scale
from vlmbench.train.stages import RunState

GOLDEN = Path(__file__).parent / 'golden' / 'zero' / 'common'
SMALL = dict(hidden_size=32, intermediate_size=48, num_attention_heads=2)
SCALE = 'llama-3.2-3b'
GRAFT, PAIR = f'zero:{SCALE}', f'zero:{SCALE}@surrogate'
QUESTION = 'What is written on the cup?'


def put(cache, name, fill):
    "A repository of the Hub in `cache`, written by `fill(folder)`."
    place = cache / f'models--{name.replace("/", "--")}'
    folder = place / 'snapshots' / ('0' * 40)
    folder.mkdir(parents=True)
    (place / 'refs').mkdir()
    (place / 'refs' / 'main').write_text('0' * 40)
    fill(folder)
    return folder


def a_file(model, stage, seed):
    "What `stage` of another model of this outline would have trained, in the original names."
    draw, shapes = torch.Generator().manual_seed(seed), model.state_dict()
    tensors = {
        name: torch.randn(shapes[name].shape, generator=draw).mul(0.1).bfloat16()
        for name in stage_names(model, stage)
    }
    return ZERO.write(tensors)


def write_llm(folder, dtype=torch.bfloat16):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320,
        num_hidden_layers=6,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        **SMALL,
    )
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_file=str(GOLDEN / 'tokenizer_llama.json'),
        bos_token='<|begin_of_text|>',
        eos_token='<|eot_id|>',
    ).save_pretrained(folder)


def write_clip(folder):
    torch.manual_seed(1)
    config = CLIPVisionConfig(num_hidden_layers=3, image_size=28, patch_size=14, **SMALL)
    CLIPVisionModel(config).save_pretrained(folder)
    side = dict(height=28, width=28)
    CLIPImageProcessor(size=dict(shortest_edge=28), crop_size=side).save_pretrained(folder)


@pytest.fixture(scope='module')
def cache(tmp_path_factory):
    "A cache of the Hub with all that `zero:llama-3.2-3b` needs."
    root = tmp_path_factory.mktemp('hub')
    scale = PAPER_SCALES[SCALE]
    llm, clip = put(root, scale.llm, write_llm), put(root, scale.vision, write_clip)
    ranges = {'encoder': None, 'adapt': ranges_at(6, SCALE)}

    def fill(folder):
        for number, (stage, file) in enumerate(RELEASED_FILES[SCALE].items()):
            shell, *_ = outline(llm, clip, ranges[stage])
            state = a_file(shell, stage, number)
            (folder / file.path).parent.mkdir()
            whole = dict(epoch=1, global_step=int(file.path[-11:-4]), model=state)
            torch.save(whole | dict(optimizer=None, scheduler=None), folder / file.path)

    put(root, REPOSITORY, fill)
    return root


@pytest.fixture(autouse=True)
def offline(cache, monkeypatch):
    "Nothing is fetched; what is in the cache is found there."
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_CACHE', str(cache))
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', message='zero:.*CC BY-NC')
        yield


def released(stage):
    "Where the file of a stage lies, and what is in it."
    path = fetch_file(RELEASED_FILES[SCALE][stage])
    return path, read_original(path).state


def bases():
    scale = PAPER_SCALES[SCALE]
    return str(find_model(scale.llm)), str(find_model(scale.vision))


def ask(processor, question=QUESTION, picture='red'):
    images = [Image.new('RGB', (40, 20), picture)] if picture else []
    text = f'<image>\n{question}' if picture else question
    return prompt_inputs(processor, [Sample('a', [Turn('user', text)], images)])


@torch.no_grad()
def logits(model, processor):
    inputs = ask(processor)
    inputs['pixel_values'] = inputs['pixel_values'].to(model.dtype)
    return model(**inputs).logits


# -------------------------------------------------------------------------------------------------
# names and files
def test_the_published_sizes_have_17_and_136_tensors():
    for name, files in RELEASED_FILES.items():
        scale = PAPER_SCALES[name]
        whole = scale.weightless(Zero().recipe(scale))
        pair = build_surrogate(whole, ranges_at(len(find_decoder(whole)), name))
        adapt, encoder = (stage_names(pair, stage) for stage in ('adapt', 'encoder'))
        assert (len(adapt), len(encoder)) == (17, 136)
        assert stage_names(whole, 'encoder') == encoder and len(stage_names(whole, 'adapt')) == 8
        assert list(files) == ['adapt', 'encoder']


def test_the_graft_holds_the_file_and_leaves_the_language_model_alone():
    with pytest.warns(UserWarning, match='CC BY-NC 4.0, no commercial use.*not verified'):
        model, processor = load_vlm(GRAFT)
    state, llm = ZERO.write(model), LlamaForCausalLM.from_pretrained(bases()[0])
    _, file = released('encoder')
    assert all(torch.equal(state[name], tensor) for name, tensor in file.items())
    assert weights_hash(model.model.language_model) == weights_hash(llm.model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert processor.template == 'zero_llama3' and processor.transform.mode == 'pad'
    # the first blocks and the embeddings of CLIP are its publisher's
    clip = CLIPVisionModel.from_pretrained(bases()[1], dtype=torch.bfloat16).state_dict()
    tower = model.model.vision.tower.state_dict()
    same = {name for name in clip if torch.equal(clip[name], tower[name])}
    assert {n for n in clip if '.layers.0.' in n or '.layers.1.' in n or 'embedding' in n} <= same
    assert not any('.layers.2.' in name or 'post_layernorm' in name for name in same)


def test_the_pair_is_the_surrogate_with_both_files():
    model, _ = load_vlm(PAIR)
    assert depth_of(model).kept == (0, 1, 2, 3, 5) and depth_of(model).translators == (3,)
    state = ZERO.write(model)
    first, second = released('adapt')[1], released('encoder')[1]
    whole = first | second  # stage encoder went on with the adapter
    assert all(torch.equal(state[name], tensor) for name, tensor in whole.items())
    llm = LlamaForCausalLM.from_pretrained(bases()[0]).model.layers
    for new, old in ((0, 0), (2, 2), (4, 5)):
        assert weights_hash(find_decoder(model).layers[new]) == weights_hash(llm[old])


def test_another_dtype_and_names_that_were_not_released():
    assert load_vlm(GRAFT, dtype='float32')[0].dtype == torch.float32
    for name in ('zero:llama-3b', 'zero:qwen3-4b', f'{GRAFT}@pair'):
        with pytest.raises(LoadError, match='zero released zero:llama-3.2-3b'):
            find_model(name)
    with pytest.raises(LoadError, match='Llama-3.1-8B-Instruct.*Hub did not give it'):
        load_vlm('zero:llama-3.1-8b')


def test_a_hash_that_is_known_is_checked(monkeypatch):
    path, _ = released('encoder')
    right = hashlib.sha256(path.read_bytes()).hexdigest()
    table = {
        stage: replace(file, sha256=right if stage == 'encoder' else '0' * 64)
        for stage, file in RELEASED_FILES[SCALE].items()
    }
    monkeypatch.setitem(zero_names.RELEASED_FILES, SCALE, table)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        load_vlm(GRAFT)
    assert any('its files are verified' in str(w.message) for w in said)
    with pytest.raises(LoadError, match='sha256 is .*expected: it is damaged or another file'):
        load_vlm(PAIR)


def test_nothing_in_a_file_is_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / 'ran'), 'w')

    torch.save(dict(epoch=1, global_step=1, model=Evil()), tmp_path / 'x.pth')
    with pytest.raises(LoadError, match='is not a file of tensors'):
        convert(tmp_path / 'x.pth', tmp_path / 'out', bases()[1], bases()[0])
    assert not (tmp_path / 'ran').exists()


# -------------------------------------------------------------------------------------------------
# in and out
def same(path, state):
    "Whether a file has these tensors, bit by bit, and the counters of its name."
    found = torch.load(path, weights_only=True)
    assert found['optimizer'] is None and found['scheduler'] is None
    assert path.name == f'ckpt_{found["epoch"]:02d}_{found["global_step"]:07d}.pth'
    assert set(found['model']) == set(state)
    return all(
        torch.equal(found['model'][name].view(torch.uint8), tensor.view(torch.uint8))
        for name, tensor in state.items()
    )


def test_convert_and_back_by_name(tmp_path):
    out = convert(GRAFT, tmp_path / 'graft')
    card = (out / 'README.md').read_text()
    assert 'CC BY-NC 4.0' in card and 'Llama 3.2 Community' in card and 'not stated' in card
    assert json.loads((out / 'config.json').read_text())['model_type'] == 'vlmbench'
    assert torch.equal(logits(*load_vlm(out)), logits(*load_vlm(GRAFT)))
    (path,) = export_original(out, tmp_path / 'files')
    assert path == tmp_path / 'files' / 'ckpt_01_0004880.pth'
    assert same(path, released('encoder')[1])
    with pytest.raises(LoadError, match='exists already'):
        convert(GRAFT, out)
    with pytest.raises(LoadError, match='a name says its own language model'):
        convert(GRAFT, tmp_path / 'x', base=bases()[0], vision=bases()[1])


def test_convert_and_back_of_the_pair(tmp_path):
    run = typer.testing.CliRunner()
    pair, files, again = (str(tmp_path / name) for name in ('pair', 'files', 'again'))
    assert run.invoke(app, ['convert', PAIR, pair]).exit_code == 0
    done = run.invoke(app, ['export', pair, files, '--original'])
    assert done.exit_code == 0, done.output
    paths = list(map(Path, done.stdout.split()))
    first, second = released('adapt')[1], released('encoder')[1]
    assert [p.parent.name for p in paths] == ['adapter_translator', 'surrogate-trained-encoder']
    assert same(paths[0], first | {n: t for n, t in second.items() if n in first})
    assert same(paths[1], second)
    assert run.invoke(app, ['export', pair, again, '--original', '--language-model']).exit_code


def test_one_file_over_its_bases(tmp_path):
    llm, clip = bases()
    encoder, adapt = released('encoder')[0], released('adapt')[0]
    graft_folder = convert(encoder, tmp_path / 'graft', clip, llm)
    assert torch.equal(logits(*load_vlm(graft_folder)), logits(*load_vlm(GRAFT)))
    pair = convert(adapt, tmp_path / 'pair', clip, llm)
    assert depth_of(load_vlm(pair)[0]).kept == (0, 1, 2, 3, 5)
    (back,) = export_original(pair, tmp_path / 'files')
    assert same(back, released('adapt')[1]) and back.name == 'ckpt_01_0003568.pth'
    assert 'licence unknown' in licence_line(pair)
    with pytest.raises(LoadError, match='a .pth file needs both'):
        convert(encoder, tmp_path / 'x', base=llm)
    for lost, says in (('embd_eoi', 'missing'), ('adapter.0.bias', 'missing')):
        state = {name: t for name, t in released('encoder')[1].items() if name != lost}
        torch.save(dict(epoch=1, global_step=2, model=state), tmp_path / 'less.pth')
        with pytest.raises(LoadError, match=f'has 23 tensors.*has 24: {says}.*{lost}'):
            convert(tmp_path / 'less.pth', tmp_path / 'x', clip, llm)
    assert not (tmp_path / 'x').exists()


def test_a_translator_never_goes_into_the_full_model():
    model, _ = load_vlm(GRAFT)
    before = weights_hash(model)
    with pytest.raises(CheckpointFormatError, match='belongs to the surrogate'):
        load_trained(model, released('adapt')[1])
    assert weights_hash(model) == before
    load_trained(load_vlm(PAIR)[0], released('adapt')[1])


def test_the_language_model_of_a_surrogate_by_itself(tmp_path):
    run = typer.testing.CliRunner()
    done = run.invoke(app, ['export', PAIR, str(tmp_path / 'lm'), '--language-model'])
    assert done.exit_code == 0, done.output
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / 'lm')
    assert type(plain) is LlamaForCausalLM and plain.config.num_hidden_layers == 5
    model, processor = load_vlm(PAIR)
    ids = ask(processor, picture=None)['input_ids']
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, model(input_ids=ids).logits)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / 'lm')
    message = [dict(role='user', content=QUESTION)]
    shown = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
    assert shown == ids[0].tolist()


# -------------------------------------------------------------------------------------------------
# questions
def test_the_prompt_of_the_demonstration():
    "579 tokens of a picture at the published size; every piece by itself, put together by hand."
    tokenizer = AutoTokenizer.from_pretrained(bases()[0])
    front = dict(FRONT_END, backbone=CLIP_L_336)
    placeholder = '<|reserved_special_token_0|>'
    transform = ImageTransform('pad', 336, patch=14)
    processor = VLMProcessor(
        tokenizer, transform, front, placeholder, 'zero_llama3', wrapper=WRAPPERS[0]
    )
    tokenizer.pad_token = '<|end_of_text|>'

    def text(words):
        return tokenizer(words, add_special_tokens=False)['input_ids']

    def control(token):
        return [tokenizer.convert_tokens_to_ids(token)]

    head, end = control('<|start_header_id|>'), control('<|end_header_id|>')
    sentence = 'Based on the visual elements captured in this image of'
    golden = control('<|begin_of_text|>') + head + text('user') + end + text(f'\n{sentence}')
    golden += control(placeholder) * 579 + text(', what is written on the cup?')
    golden += control('<|eot_id|>') + head + text('assistant') + end + text('\n')
    assert ask(processor)['input_ids'][0].tolist() == golden
    content = [dict(type='image', image=Image.new('RGB', (40, 20), 'red'))]
    message = dict(role='user', content=[*content, dict(type='text', text=QUESTION)])
    shown = processor.apply_chat_template(
        [message], add_generation_prompt=True, tokenize=True, return_dict=True
    )
    assert shown['input_ids'][0].tolist() == golden


def test_every_door_wraps_alike(tmp_path, monkeypatch, capsys):
    folder = convert(GRAFT, tmp_path / 'graft')
    Image.new('RGB', (40, 20), 'red').save(tmp_path / 'p.png')
    seen, generate = [], type(load_vlm(folder)[0]).generate

    def watched(model, *args, **settings):
        seen.append((settings['input_ids'].tolist(), settings['max_new_tokens']))
        settings['max_new_tokens'] = 4
        return generate(model, *args, **settings)

    monkeypatch.setattr(type(load_vlm(folder)[0]), 'generate', watched)
    for where in (GRAFT, folder):
        chat_command(where, tmp_path / 'p.png', questions=[QUESTION], device='cpu')
        vlmbench.load(where, device='cpu').ask(tmp_path / 'p.png', QUESTION)
    wanted = ask(load_vlm(GRAFT)[1])['input_ids'].tolist()
    assert [ids for ids, _ in seen] == [wanted] * 4 and {most for _, most in seen} == {1024}
    assert WRAPPERS[0] in AutoProcessor.from_pretrained(folder).tokenizer.decode(wanted[0])
    printed = capsys.readouterr().out
    assert 'Llama 3.2 Community License and CC BY-NC 4.0, research use only' in printed


def test_layers_evaluate_and_manifests_know_the_name():
    model, processor = load_any(GRAFT)
    assert torch.equal(logits(model, processor), logits(*load_vlm(GRAFT)))
    assert is_foreign(GRAFT) and trained_run(GRAFT).method is None
    scale = PAPER_SCALES[SCALE]
    assert revisions([find_model(GRAFT)])['models'] == dict.fromkeys(
        (scale.llm, scale.vision, REPOSITORY), '0' * 40
    )
    assert [stage['steps'] for stage in origin_of(PAIR).stages] == [3568, 4880]


def test_the_arm_is_named_as_the_paper_names_it(tmp_path):
    published = set(read_published('zero')['arm'])
    named = {arm_of(name, sees) for name in (GRAFT, PAIR) for sees in (True, False)}
    assert named == published and 'arm: zero-shot graft' in licence_line(GRAFT)
    assert arm_of(convert(PAIR, tmp_path / 'pair')) == 'encoder on its surrogate'
    both = ['ranges=[]', 'stages=["adapt","encoder"]']
    assert get_method('zero', both).arm == 'encoder trained with the whole model'
    later = get_method('zero', ['stages=["adapt","encoder","decoder"]'])
    assert later.arm == 'language model trained behind the encoder'
    assert [get_method(name, []).arm for name in ('zero', 'eve')] == ['zero-shot graft', '']


def test_methods_with_arms_are_the_ones_that_are_compared_by_them():
    assert {name for name in BUILT_IN if get_method(name, []).arm} == set(NAMES_ARMS)


def test_text_alone(tmp_path):
    llm = bases()[0]
    with pytest.raises(ChatError, match='no chat template.*--template'):
        ChatModel.load(llm, 'cpu')
    with pytest.raises(ChatError, match='takes no pictures: leave image_mode out'):
        ChatModel.load(llm, 'cpu', template='zero_llama3', image_mode='native')
    chat = vlmbench.load(llm, device='cpu', template='zero_llama3')
    assert not chat.sees and chat.longest == 4096 == ChatModel.load(PAIR, 'cpu').longest
    ids = ask(chat.processor, picture=None)['input_ids'][0].tolist()
    assert ids.count(chat.processor.tokenizer.bos_token_id) == 1 and ids[0] == 0
    drawn = dict(max_new_tokens=60, temperature=1.0, seed=1)
    pieces = list(chat.ask(None, QUESTION, stream=True, **drawn))
    assert len(pieces) > 1  # as they come
    whole = chat.ask(None, QUESTION, **drawn)
    assert whole == ''.join(pieces).strip()
    run = typer.testing.CliRunner()
    short = ['--max-new-tokens', '3', '--device', 'cpu']
    asked = [llm, '--template', 'zero_llama3', '--question', QUESTION]
    assert run.invoke(app, ['chat', *asked, *short]).exit_code == 0
    assert run.invoke(app, ['chat', PAIR, '--question', QUESTION, *short]).exit_code == 0
    Image.new('RGB', (40, 20), 'red').save(tmp_path / 'p.png')
    refused = run.invoke(app, ['chat', *asked, '--image', str(tmp_path / 'p.png'), *short])
    assert refused.exit_code and 'takes no pictures' in str(refused.exception)


# -------------------------------------------------------------------------------------------------
# places
def homes(on_disk, depth=6):
    "A device map with the last `on_disk` layers on the disk."
    inside = {f'layers.{i}': 'disk' if i >= depth - on_disk else 'cpu' for i in range(depth)}
    inside |= dict.fromkeys(('embed_tokens', 'norm', 'rotary_emb'), 'cpu')
    places = {f'model.language_model.{name}': place for name, place in inside.items()}
    return places | {'model.vision': 'cpu', 'lm_head': 'cpu'}


def on_disk(model):
    layers = find_decoder(model).layers
    return [i for i, layer in enumerate(layers) if all(p.is_meta for p in layer.parameters())]


def test_three_layers_on_the_disk_stay_there(tmp_path):
    whole = load_vlm(GRAFT)
    place = dict(device_map=homes(3), offload_folder=str(tmp_path / 'offload'))
    chat = vlmbench.load(GRAFT, device='cpu', **place)
    assert on_disk(chat.model) == [3, 4, 5] and any((tmp_path / 'offload').iterdir())
    assert torch.equal(logits(chat.model, chat.processor), logits(*whole))
    assert fingerprint(chat.model) == fingerprint(whole[0])
    picture = Image.new('RGB', (40, 20), 'red')
    answers = [one.ask(picture, QUESTION, max_new_tokens=5) for one in (chat, ChatModel(*whole))]
    assert answers[0] == answers[1] and on_disk(chat.model) == [3, 4, 5]


def test_an_offloaded_model_takes_a_graft(tmp_path):
    "graft() copies the vision side only; graft_placed builds the decoder where it lies."
    pair, processor = load_vlm(PAIR)
    place = dict(device_map=homes(3), offload_folder=str(tmp_path / 'a'))
    target, _ = load_vlm(GRAFT, **place)
    with torch.no_grad():
        for p in pair.model.vision.parameters():
            p.add_(0.5)
    graft(target, pair)
    assert on_disk(target) == [3, 4, 5]
    llm, clip = bases()
    scale = Scale('mini', llm, clip, 28, 'zero_llama3', like='tiny', dtype='bfloat16')
    state = RunState(Zero().recipe(scale), scale, model=pair, processor=processor)
    plain = graft_onto(llm, state)
    spread = graft_placed(llm, state, device_map=homes(3), offload_folder=str(tmp_path / 'b'))
    assert on_disk(spread) == [3, 4, 5] and on_disk(plain) == []
    wanted = logits(plain, processor)
    assert torch.equal(logits(spread, processor), wanted)
    assert torch.equal(logits(target, processor), wanted)
    other = tmp_path / 'other'
    shutil.copytree(llm, other)
    swapped = LlamaForCausalLM.from_pretrained(llm)
    swapped.model.layers[1].mlp.up_proj.weight.data.mul_(2)
    swapped.save_pretrained(other)
    with pytest.raises(ValueError, match='layer 1 .*cut from another language model'):
        graft_placed(str(other), state, device_map=homes(3), offload_folder=str(tmp_path / 'c'))


# -------------------------------------------------------------------------------------------------
# runs
@pytest.mark.slow
@pytest.mark.parametrize(
    'notebook,more',
    [
        ('evaluate', dict(tasks=['vqa_test'], max_new_tokens=2, dtype='float32', blind=False)),
        ('layers', dict(drop=False)),
    ],
)
def test_notebooks_take_the_name(notebook, more, tmp_path, cache, monkeypatch):
    monkeypatch.setenv('HF_HUB_CACHE', str(cache))  # of the kernel
    write_bases(tmp_path, 2, caption_train=4, vqa_train=4, vqa_test=2, text_test=2, text_train=2)
    given = dict(model=GRAFT, limit=2, device='cpu', data=str(tmp_path / 'world')) | more
    assert run_notebook(notebook, given, tmp_path / 'run', progress=False, quiet=True) == 0
    manifest = json.loads((tmp_path / 'run' / 'manifest.json').read_text())
    assert manifest['status'] == 'completed'
