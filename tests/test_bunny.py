"""Bunny's conversations: ids and labels of three turns by hand, eos targets although pads are eos,
and tiny Phi-3 and Llama-3 models that train a region, lose a layer and stop where they should."""

import pandas as pd
import pytest
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedTokenizerFast,
)

from mini_bases import write_bases
from sharding_stubs import ROWS, short
from vlmbench.analysis.prune import prune_outside
from vlmbench.checkpoints.load import load_vlm
from vlmbench.data.collate import collate_padded
from vlmbench.data.record import Turn
from vlmbench.data.scene import world_tokenizer
from vlmbench.data.template import IGNORE, TEMPLATES, encode
from vlmbench.demo.chat import Chat, ChatModel
from vlmbench.methods.recipes import find_scale, get_method
from vlmbench.train.checkpoint import export
from vlmbench.train.prepare import lora_modules, prepare
from vlmbench.train.recipe import RecipeError, override
from vlmbench.train.scale import Scale
from vlmbench.train.stages import run_stages

STOPS = dict(
    bunny_phi3='<|endoftext|>', bunny_llama='<|end_of_text|>', bunny_llama_spaced='<|end_of_text|>'
)

SYSTEM = (
    'A chat between a curious user and an artificial intelligence assistant. The assistant gives '
    "helpful, detailed, and polite answers to the user's"
).split()
TURNS = [
    Turn('user', '<image>\nWhat colour?'),
    Turn('assistant', 'Dark red'),
    Turn('user', 'Is it small?'),
    Turn('assistant', 'No'),
    Turn('user', 'Why?'),
    Turn('assistant', 'Look'),
]
# the words between spaces, two tokens for the picture
PHI3 = (
    '<s>', *SYSTEM, 'questions.', 'USER:', '<image>', '<image>', 'What', 'colour?', 'ASSISTANT:',
    'Dark', 'red', '<|endoftext|>', 'USER:', 'Is', 'it', 'small?', 'ASSISTANT:', 'No',
    '<|endoftext|>', 'USER:', 'Why?', 'ASSISTANT:', 'Look', '<|endoftext|>',
)  # fmt: skip
LLAMA = (
    '<|begin_of_text|>', *SYSTEM, 'questions.USER:', '<image>', '<image>', 'What',
    'colour?ASSISTANT:', 'Dark', 'red', '<|end_of_text|>', 'USER:', 'Is', 'it', 'small?ASSISTANT:',
    'No', '<|end_of_text|>', 'USER:', 'Why?ASSISTANT:', 'Look', '<|end_of_text|>',
)  # fmt: skip
SPACED = (
    '<|begin_of_text|>', *PHI3[1:-1], '<|end_of_text|>'
)  # fmt: skip
SPACED = tuple('<|end_of_text|>' if word == '<|endoftext|>' else word for word in SPACED)
GOLDEN = dict(bunny_phi3=PHI3, bunny_llama=LLAMA, bunny_llama_spaced=SPACED)
LEARNT = 'Dark red STOP No STOP Look STOP'


def words(name):
    "A tokenizer whose tokens are the words between spaces; pads are the end of the text."
    special = ['<image>', '<s>', '<|begin_of_text|>', '<|endoftext|>', '<|end_of_text|>']
    vocab = dict.fromkeys(['<unk>', *special, *GOLDEN[name]])
    ids = {word: i for i, word in enumerate(vocab)}
    tok = Tokenizer(models.WordLevel(ids, unk_token='<unk>'))
    tok.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tok.add_special_tokens([AddedToken(word, special=True) for word in special])
    stop = STOPS[name]
    return PreTrainedTokenizerFast(
        tokenizer_object=tok, bos_token='<s>', eos_token=stop, pad_token=stop, unk_token='<unk>'
    )


@pytest.mark.parametrize('name', GOLDEN)
def test_ids_and_labels_of_three_turns(name):
    tok = words(name)
    e = encode(TURNS, tok, name, [2])
    assert e.input_ids.tolist() == tok.convert_tokens_to_ids(list(GOLDEN[name]))
    learnt = e.labels[e.labels != IGNORE].tolist()
    assert tok.convert_ids_to_tokens(learnt) == LEARNT.replace('STOP', STOPS[name]).split()
    first = GOLDEN[name].index('Dark')
    assert (e.labels[:first] == IGNORE).all() and (e.labels[first : first + 3] != IGNORE).all()


@pytest.mark.parametrize('name', GOLDEN)
@pytest.mark.fault('vip-19')
def test_ends_are_targets_although_pads_are_ends(name):
    tok = words(name)
    long, brief = (encode(turns, tok, name, [2]) for turns in (TURNS, TURNS[:2]))
    batch = collate_padded([long, brief], tok.pad_token_id)
    end = tok.eos_token_id
    assert (batch['labels'] == end).sum(1).tolist() == [3, 1]
    assert batch['attention_mask'].sum(1).tolist() == [long.n_tokens, brief.n_tokens]
    assert (batch['input_ids'][1, brief.n_tokens :] == end).all()  # pads


@pytest.mark.parametrize(
    'name, template, end',
    [('phi-3-mini', 'bunny_phi3', 32000), ('llama-3-8b', 'bunny_llama', 128001)],
)
def test_the_published_scales(name, template, end):
    scale = find_scale(f'bunny-{name}')
    assert (scale.template, scale.caption_template) == (template, 'llava_plain')
    assert scale.decoder_config.eos_token_id == scale.decoder_config.pad_token_id == end
    recipe = get_method('visual_region').recipe(scale)
    assert [stage.template for stage in recipe.stages] == ['llava_plain', template]


KINDS = dict(
    phi3=(Phi3Config, Phi3ForCausalLM, 'bunny_phi3', 4),
    llama=(LlamaConfig, LlamaForCausalLM, 'bunny_llama', 7),
)


@pytest.fixture(scope='module', params=KINDS)
def bases(request, tmp_path_factory):
    "A tiny model of the family in bf16, whose tokenizer ends turns by another token."
    root, kind = tmp_path_factory.mktemp(request.param), request.param
    write_bases(root, 4, **ROWS)
    tokenizer = world_tokenizer()
    tokenizer.add_special_tokens(
        dict(
            additional_special_tokens=[
                '<|begin_of_text|>',
                '<|endoftext|>',
                '<|end_of_text|>',
                '<|eot_id|>',
            ]
        )
    )
    tokenizer.eos_token = '<|eot_id|>'
    config, model = KINDS[kind][:2]
    torch.manual_seed(0)
    settings = config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=0,
    )
    model(settings).to(torch.bfloat16).save_pretrained(root / 'llm')
    tokenizer.save_pretrained(root / 'llm')
    return root, kind


def scale_of(root, template):
    return Scale(
        'mini', str(root / 'llm'), str(root / 'vit'), 64, template, like='tiny', dtype='bfloat16'
    )


@pytest.mark.slow
def test_a_region_trains_loses_a_layer_and_stops(bases, tmp_path):
    root, kind = bases
    template, adapters = KINDS[kind][2:]
    method, scale, stop = get_method('visual_region'), scale_of(root, template), STOPS[template]
    recipe = short(method.recipe(scale), 1)
    brief = {f'stages.{stage.name}.accumulation': 1 for stage in recipe.stages}
    recipe = override(recipe, brief)
    state = method.start(recipe, scale, device='cpu')
    done = run_stages(
        method, state, root / 'world', tmp_path / 'run', progress_seconds=None, precision='bf16'
    )
    (region,) = method.region(scale)
    again = method.start(recipe, scale, device='cpu').model
    prepare(again, recipe.stages[-1])
    adapted = [name.split('layers.')[1] for name in lora_modules(again)]
    assert len(adapted) == adapters and {int(name.split('.')[0]) for name in adapted} == {region}
    model, processor = load_vlm(export(done.model, done.processor, tmp_path / 'whole'))
    outside = pd.Series({i: float(i) for i in range(4)})
    small, gone = prune_outside(model, [region], 1, [], importance=outside)
    assert region not in gone
    export(small, processor, tmp_path / 'small')
    chat = ChatModel.load(tmp_path / 'small', 'cpu')
    tokenizer, end = chat.processor.tokenizer, chat.model.generation_config.eos_token_id
    assert chat.processor.template == template and len(chat.model.model.language_model.layers) == 3
    assert tokenizer.eos_token == tokenizer.pad_token == stop
    assert end == tokenizer.eos_token_id == chat.model.config.text_config.eos_token_id
    assert chat.model.dtype == torch.bfloat16
    _says(chat.model, tokenizer.convert_tokens_to_ids(['red', 'circle', stop, 'red']))
    session = Chat(chat, Image.new('RGB', (64, 64), 'red'))
    assert ''.join(session.ask('what is this ?', max_new_tokens=9)).strip() == 'red circle'
    assert session.history[-1].finish == 'stop'


def _says(model, ids):
    "Lets `model` write `ids`, one a step."
    left = iter(ids)

    def hook(head, args, logits):
        logits[:, -1] = 0
        logits[:, -1, next(left)] = 9
        return logits

    model.lm_head.register_forward_hook(hook)


def test_a_template_of_another_family_is_refused(bases):
    root, kind = bases
    llm = root / 'llm'
    (root / 'other').mkdir(exist_ok=True)
    for file in llm.iterdir():
        (root / 'other' / file.name).write_bytes(file.read_bytes())
    world_tokenizer().save_pretrained(root / 'other')
    scale = Scale('mini', str(root / 'other'), str(root / 'vit'), 64, KINDS[kind][2], like='tiny')
    method = get_method('llava')
    with pytest.raises(RecipeError, match='closes answers with.*choose the template of that model'):
        method.start(method.recipe(scale), scale)


def test_all_of_them_end_texts():
    assert {t.name: t.stop for t in TEMPLATES.values() if t.ends_text} == STOPS
