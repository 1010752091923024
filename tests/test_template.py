"""Templates, labels and tokenisation: every tokenizer family, every template, hostile text, the
reference vectors."""

import json, os, re, warnings
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from jinja2.exceptions import TemplateError
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from vlmbench.data.record import Turn
from vlmbench.data.spans import EOS, IMAGE, TARGETS
from vlmbench.data.template import (
    IGNORE,
    TEMPLATES,
    encode,
    from_messages,
    get_template,
    images_first,
    target_texts,
    to_messages,
)

GOLDEN = Path(os.environ.get('VLMBENCH_GOLDEN', Path(__file__).parent / 'golden'))
CONTROL = [
    '<image>',
    '<|begin_of_text|>',
    '<|start_header_id|>',
    '<|end_header_id|>',
    '<|eot_id|>',
    '<|im_start|>',
    '<start_of_turn>',
    '<end_of_turn>',
    '<|im_end|>',
    '<|system|>',
    '<|user|>',
    '<|assistant|>',
    '<|end|>',
    '<|endoftext|>',
    '<|end_of_text|>',
]
CORPUS = [
    'What colour is the circle on the left? It is red.',
    'USER: see ASSISTANT: a small blue square',
    'A chat between a curious user and an artificial intelligence assistant.',
    "the user's questions\n\nassistant\nuser",
] * 3
quick = settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def word_level():
    words = [
        '<pad>',
        '<s>',
        '</s>',
        '<unk>',
        *CONTROL,
        *sorted(set(re.findall(r'\w+|[^\w\s]', ' '.join(CORPUS)))),
    ]
    tok = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token='<unk>'))
    tok.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tok,
        pad_token='<pad>',
        bos_token='<s>',
        eos_token='</s>',
        unk_token='<unk>',
        additional_special_tokens=CONTROL,
    )


def byte_level(llama=False):
    """BPE over bytes; `llama`: Llama-3's splitting rule, an automatic begin token and a byte-level
    post-processor"""
    tok = Tokenizer(models.BPE())
    split = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r'| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+'
        r'|\s+(?!\S)|\s+'
    )
    tok.pre_tokenizer = (
        pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(split), 'isolated'),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        if llama
        else pre_tokenizers.ByteLevel(add_prefix_space=False)
    )
    tok.decoder = decoders.ByteLevel()
    tok.train_from_iterator(
        CORPUS + ['a\n\n\nb\n\n'] * 9,
        trainers.BpeTrainer(
            vocab_size=420,
            show_progress=False,
            special_tokens=['<pad>', '<s>', '</s>'],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    tok.add_special_tokens(CONTROL)
    if llama:
        bos = tok.token_to_id('<|begin_of_text|>')
        begin = processors.TemplateProcessing(
            single='<|begin_of_text|> $A', special_tokens=[('<|begin_of_text|>', bos)]
        )
        tok.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), begin])
    else:
        tok.post_processor = processors.ByteLevel(trim_offsets=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=tok, pad_token='<pad>', bos_token='<s>', eos_token='</s>'
    )


def sentencepiece_like(scheme, rstrip=False, pieces=None):
    """BPE over characters with '▁' for spaces and byte fallback; `scheme`: 'first', 'always',
    'legacy' (a normaliser)"""
    strips = lambda c: rstrip and c.startswith('<|') and c != '<|end_header_id|>'
    control = [AddedToken(c, rstrip=strips(c), special=True) for c in CONTROL]
    if pieces is None:
        alphabet = sorted(set(' '.join(CORPUS).replace(' ', '▁')) | {'▁', '\n'})
        vocab = ['<unk>', '<s>', '</s>', *[f'<0x{b:02X}>' for b in range(256)], *alphabet]
        merges, words = (
            [],
            ['▁the', '▁is', '▁red', '▁user', '▁It', 'lo', 'ur', '▁a', '▁▁', '\n\n', ':▁'],
        )
        for w in words:
            for i in range(2, len(w) + 1):
                if w[:i] not in vocab:
                    vocab.append(w[:i])
                    merges.append((w[: i - 1], w[i - 1]))
        vocab = {v: i for i, v in enumerate(vocab)}
    else:
        vocab, merges = pieces
    tok = Tokenizer(
        models.BPE(vocab, merges, unk_token='<unk>', byte_fallback='<0x00>' in vocab, fuse_unk=True)
    )
    if scheme == 'legacy':
        tok.normalizer = normalizers.Sequence(
            [normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')]
        )
    else:
        tok.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    tok.decoder = decoders.Sequence(
        [decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse()]
    )
    tok.add_special_tokens(
        [AddedToken(c, special=True, normalized=False) for c in ('<unk>', '<s>', '</s>')] + control
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tok,
        bos_token='<s>',
        eos_token='</s>',
        unk_token='<unk>',
        pad_token='<unk>',
    )


TOKENIZERS = {
    'word level': word_level,
    'bytes': byte_level,
    'llama 3 bytes': lambda: byte_level(llama=True),
    'metaspace first': lambda: sentencepiece_like('first'),
    'metaspace always': lambda: sentencepiece_like('always'),
    'legacy': lambda: sentencepiece_like('legacy'),
    'legacy rstrip': lambda: sentencepiece_like('legacy', rstrip=True),
}
LOSSLESS = ('bytes', 'llama 3 bytes')


@pytest.fixture(scope='module', params=list(TOKENIZERS))
def tok(request):
    made = TOKENIZERS[request.param]()
    made.family = request.param
    return made


TEMPLATE = st.sampled_from(list(TEMPLATES)).map(get_template)


@pytest.fixture(params=list(TEMPLATES))
def template(request):
    return get_template(request.param)


PLAIN = st.text(st.characters(codec='utf-8', exclude_categories=('Cs', 'Cn', 'Co')), max_size=12)
# words of a template are drawn too, and in a rendered string they would be control tokens
PLAIN = PLAIN.filter(lambda text: not re.search(r'<[^\s<>]+>', text))
PHRASE = st.one_of(
    PLAIN,
    st.sampled_from(
        ['What colour?', ' the red ', '\n\n', '', 'USER:', "it's {{ x }} {% if %}", '\\n', 'é日本']
    ),
)
USER = st.lists(st.one_of(PHRASE, st.just(IMAGE)), max_size=4).map(''.join)
ANSWER = PHRASE.filter(lambda t: IMAGE not in t)


@st.composite
def talks(draw, max_rounds=3, user=USER, answer=ANSWER, closed=None):
    "A conversation that every chat template accepts"
    turns = [Turn('system', draw(PHRASE))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, max_rounds))):
        turns += [Turn('user', draw(user)), Turn('assistant', draw(answer))]
    return turns if (draw(st.booleans()) if closed is None else closed) else turns[:-1]


def fit(turns, template):
    "The part of a conversation that the template can hold"
    if not template.captions:
        return turns
    turns = [t for t in turns if t.role != 'system']
    return turns[:2]


def slots(turns):
    return sum(t.text.count(IMAGE) for t in turns)


# --- the string
# --------------------------------------------------------------------------------------------------


@quick
@given(data=st.data())
def test_jinja_renders_the_same_string(data):
    template = data.draw(TEMPLATE)
    turns = fit(data.draw(talks()), template)
    tok = render_tok()
    open_ = turns[-1].role == 'user' and data.draw(st.booleans())
    want = template.render(turns, add_generation_prompt=open_, bos='<s>', eos='</s>')
    got = tok.apply_chat_template(
        to_messages(turns),
        chat_template=template.jinja(),
        tokenize=False,
        add_generation_prompt=open_,
    )
    assert got == want
    for t in turns:
        assert t.text in got or (template.captions and t.role == 'user')


_render_tok = []


def render_tok():
    if not _render_tok:
        _render_tok.append(byte_level())
    return _render_tok[0]


def test_jinja_content_lists_equal_strings(template):
    image, text = dict(type='image'), lambda t: dict(type='text', text=t)
    parts = [image, image, text('Which one?\n'), text('Say.')]
    messages = [
        dict(role='user', content=parts),
        dict(role='assistant', content=[dict(type='text', text='both')]),
    ]
    turns = from_messages(messages, template.image_sep)
    assert turns[0].text == f'{IMAGE}{IMAGE}{template.image_sep}Which one?\nSay.'
    got = render_tok().apply_chat_template(messages, chat_template=template.jinja(), tokenize=False)
    assert got == template.render(turns)


@pytest.mark.parametrize(
    'turns, reason',
    [
        ([], 'no turns'),
        ([Turn('system', 's')], 'system turn only'),
        ([Turn('assistant', 'a')], "where 'user' belongs"),
        ([Turn('user', 'q'), Turn('user', 'q')], "turn 1 has role 'user'"),
        ([Turn('user', 'q'), Turn('system', 's')], "turn 1 has role 'system'"),
        (
            [Turn('user', 'q'), Turn('assistant', f'see {IMAGE}')],
            'turn 1: <image> stands in an assistant turn',
        ),
        ([Turn('user', None)], 'has no text'),
    ],
)
def test_bad_conversations_are_named(template, turns, reason):
    with pytest.raises(ValueError, match=re.escape(reason)):
        template.spans(turns)
    if turns and turns[0].text is not None and len(turns) > 1:
        with pytest.raises(TemplateError):
            render_tok().apply_chat_template(
                to_messages(turns), chat_template=template.jinja(), tokenize=False
            )


def test_a_caption_template_refuses_conversations():
    plain, pair = get_template('llava_plain'), [Turn('user', IMAGE), Turn('assistant', 'a')]
    talk = pair + pair
    with pytest.raises(ValueError, match='one user turn'):
        plain.spans(talk)
    with pytest.raises(TemplateError):
        render_tok().apply_chat_template(
            to_messages(talk), chat_template=plain.jinja(), tokenize=False
        )
    with pytest.raises(ValueError, match='one user turn'):
        plain.spans([Turn('system', 's'), Turn('user', IMAGE)])


def test_names_are_exact():
    for (
        name
    ) in 'vicuna_v1 llava_v1 llava_plain llama_3 phi_3 chatml world zero_llama3 zero_qwen'.split():
        assert get_template(name).name == name
    for near in ('vicuna', 'llama', 'LLAMA_3', ''):
        with pytest.raises(KeyError, match='there are'):
            get_template(near)


def test_an_empty_system_turn_switches_the_default_off():
    turns = [Turn('user', 'q'), Turn('assistant', 'a')]
    for t in TEMPLATES.values():
        if not t.default_system:
            continue
        assert t.default_system in t.render(turns)
        assert t.default_system not in t.render([Turn('system', ''), *turns])
        other = t.render([Turn('system', 'Be brief.'), *turns])
        assert 'Be brief.' in other and t.default_system not in other


@pytest.mark.parametrize('name', ['llava_v1', 'llava_llama_2', 'phi_3', 'smollm2'])
def test_a_developer_message_is_the_system_prompt(name):
    "As servers and newer chat rows call it; a template with a default leaves that out."
    said = [dict(role='system', content='Be brief.'), dict(role='user', content='Hi')]
    shown = [
        render_tok().apply_chat_template(
            [dict(said[0], role=role), said[1]],
            chat_template=TEMPLATES[name].jinja(),
            tokenize=False,
            add_generation_prompt=True,
        )
        for role in ('system', 'developer')
    ]
    assert shown[0] == shown[1] and shown[0].count('Be brief.') == 1


def test_images_first_keeps_every_slot():
    moved = images_first(
        [Turn('user', f'a {IMAGE} b {IMAGE}'), Turn('assistant', ' x '), Turn('user', ' y ')]
    )
    assert [t.text for t in moved] == [f'{IMAGE}\n{IMAGE}\na  b', ' x ', ' y ']


# --- tokens and labels
# ------------------------------------------------------------------------------------------------


def ids_of_string(tok, text):
    return tok(text, add_special_tokens=False)['input_ids']


@quick
@given(data=st.data())
def test_ids_equal_those_of_the_rendered_string(tok, data):
    template = data.draw(TEMPLATE)
    turns = fit(data.draw(talks()), template)
    e = encode(turns, tok, template, [1] * slots(turns))
    text = template.render(turns, bos='<s>', eos='</s>')
    assert e.input_ids.tolist() == ids_of_string(tok, text)
    assert len(e.labels) == len(e.image_ids) == e.n_tokens
    where = e.labels != IGNORE
    assert torch.equal(e.labels[where], e.input_ids[where])
    image = tok.convert_tokens_to_ids(IMAGE)
    assert (e.image_ids >= 0).tolist() == (e.input_ids == image).tolist() and not (
        where & (e.image_ids >= 0)
    ).any()
    assert e.image_ids[e.image_ids >= 0].tolist() == list(range(slots(turns)))


def expected_targets(turns, template):
    after = ''.join(
        {EOS: '</s>'}.get(s.text, s.text) for s in template.answer if s.target and s.special
    )
    lead = template.answer[0].text if template.answer[0].text == ' ' else ''
    return [(lead + t.text, after) for t in turns if t.role == 'assistant']


@quick
@given(data=st.data())
def test_targets_are_exactly_the_answers(tok, data):
    template = data.draw(TEMPLATE)
    turns = fit(data.draw(talks(closed=True)), template)
    e = encode(turns, tok, template, [2] * slots(turns))
    if tok.family not in LOSSLESS:
        return
    runs = target_texts(e, tok)
    want = ''.join(s.text for s in template.spans(turns) if s.target)
    if (
        ''.join(runs) != want
    ):  # a token that straddles the start of an answer brings template newlines along
        assert ''.join(runs).replace('\n', '') == want.replace('\n', '') and len(
            ''.join(runs)
        ) >= len(want)
    for text, after in expected_targets(turns, template):
        assert any(text in r and after in r for r in runs) or not text


def skip_unwritable(tok, template):
    "A word-level tokenizer has no word for an end that is written, not a control token."
    if (
        tok.unk_token_id is not None
        and tok.unk_token_id in tok(f'a{template.stop}')['input_ids']
        and template.stop == '###'
    ):
        pytest.skip(f'no words for {template.stop!r}')


@pytest.mark.parametrize('name', [n for n in TEMPLATES if n != 'llava_plain'])
def test_multi_turn_labels_by_hand(tok, name):
    "Each answer and its stop token is one run of targets, in every tokenizer family"
    skip_unwritable(tok, get_template(name))
    turns = [
        Turn('user', f'{IMAGE}\nWhat colour?'),
        Turn('assistant', 'It is red.'),
        Turn('user', 'Is it small?'),
        Turn('assistant', 'the circle'),
        Turn('user', 'the'),
        Turn('assistant', 'a'),
    ]
    e, template = encode(turns, tok, name, [5]), get_template(name)
    runs = target_texts(e, tok)
    assert len(runs) == 3
    squeeze = lambda t: re.sub(r'\s+', '', t)
    stop = '</s>' if template.stop == EOS else template.stop
    assert [squeeze(r) for r in runs] == [
        squeeze(t.text) + stop for t in turns if t.role == 'assistant'
    ]
    assert e.n_targets == int((e.labels != IGNORE).sum())
    assert (e.image_ids == 0).sum() == 5


def prompt_is_prefix(tok, template, answers=('It is', 'a', '1')):
    """Do the ids of a generation prompt start the ids of the same conversation with each of
    `answers`?"""
    question = Turn('user', 'What?')
    prompt = encode([question], tok, template, add_generation_prompt=True).input_ids
    full = [encode([question, Turn('assistant', a)], tok, template).input_ids for a in answers]
    return all(torch.equal(ids[: len(prompt)], prompt) for ids in full)


@pytest.mark.parametrize('name', TEMPLATES)
def test_the_generation_prompt_is_a_prefix_of_training(tok, name):
    if (tok.family, name) == (
        'bytes',
        'llama_3',
    ):  # GPT-2's rule cuts the header's two newlines by what follows
        assert not prompt_is_prefix(tok, name)
        return
    assert prompt_is_prefix(tok, name, ['It is'])
    turns = [Turn('user', f'{IMAGE}\nWhat colour?'), Turn('assistant', 'It is red.')]
    prompt = encode(turns[:1], tok, name, [3], add_generation_prompt=True)
    full = encode(turns, tok, name, [3])
    first = int((full.labels != IGNORE).nonzero()[0])
    assert prompt.n_targets == 0
    shared = full.input_ids[: prompt.n_tokens].tolist()
    assert prompt.input_ids.tolist() == shared
    assert (
        0 <= prompt.n_tokens - first <= 2 * (name == 'zero_llama3')
    )  # which also learns its header's newline


@pytest.mark.parametrize('mode', TARGETS)
def test_target_modes(tok, mode):
    turns = [Turn('user', 'What colour?'), Turn('assistant', 'red')]
    e = encode(turns, tok, 'chatml', targets=mode)
    learnt = tok.convert_ids_to_tokens(e.labels[e.labels != IGNORE].tolist())
    marks = ['<|im_end|>'] if mode == 'answers' else ['<|im_start|>', '<|im_end|>'] * 3
    assert [t for t in learnt if t in CONTROL] == marks
    assert (mode == 'all') == (len(learnt) == e.n_tokens)
    with pytest.raises(ValueError, match='one of answers, special, all'):
        encode(turns, tok, 'chatml', targets='answer')


@pytest.mark.parametrize('name', ['vicuna_v1', 'llama_3', 'phi_3', 'chatml', 'world'])
def test_labels_agree_with_transformers_assistant_mask(name):
    """An independent way to the labels: `{% generation %}` blocks and character offsets in
    transformers itself"""
    tok, template = byte_level(), get_template(name)
    tok.backend_tokenizer.post_processor = processors.ByteLevel(
        trim_offsets=False
    )  # else first spaces are lost
    turns = [
        Turn('user', 'What colour?'),
        Turn('assistant', 'It is red.'),
        Turn('user', 'é?'),
        Turn('assistant', 'a'),
    ]
    out = tok.apply_chat_template(
        to_messages(turns),
        chat_template=template.jinja(mark_targets=True),
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    e = encode(turns, tok, template)
    assert out['input_ids'] == e.input_ids.tolist()
    assert out['assistant_masks'] == (e.labels != IGNORE).long().tolist()


def test_empty_answers_and_missing_answers(tok, template):
    skip_unwritable(tok, template)
    e = encode([Turn('user', f'{IMAGE} What?'), Turn('assistant', '')], tok, template, [2])
    stop = {EOS: '</s>'}.get(template.stop, template.stop)
    if stop.strip():
        assert ''.join(target_texts(e, tok)).strip().endswith(stop) and e.n_targets >= 1
    assert encode([Turn('user', f'{IMAGE} What?')], tok, template, [2]).n_targets == 0


def test_one_token_answers_are_never_lost(tok):
    "The straddle rule: an answer that merges with the newline before it is still learnt"
    for name in ('llama_3', 'phi_3', 'zero_qwen', 'chatml'):
        for answer in ('\n', '\n\n', ' ', 'a'):
            e = encode([Turn('user', 'q'), Turn('assistant', answer)], tok, name)
            if not answer.strip() and tok.family in ('word level', 'legacy rstrip'):
                continue  # has no such tokens
            assert e.n_targets >= 2, (name, answer)


def test_a_token_across_the_start_of_an_answer_is_a_target():
    """The straddle rule by hand: ':▁' ends the prompt and begins the answer; the pairing is
    reported as well"""
    tok = TOKENIZERS['legacy']()
    e = encode([Turn('user', 'the'), Turn('assistant', '1')], tok, 'vicuna_v1')
    assert tok.convert_ids_to_tokens(e.labels[e.labels != IGNORE].tolist()) == [
        ':▁',
        '<0x31>',
        '</s>',
    ]
    assert not prompt_is_prefix(tok, 'vicuna_v1')
    e = encode([Turn('user', 'the'), Turn('assistant', 'It')], tok, 'vicuna_v1')
    assert tok.convert_ids_to_tokens(e.labels[e.labels != IGNORE].tolist()) == ['▁It', '</s>']


@pytest.mark.parametrize('answer,joined', [('\n\nRed', '\n\n'), ('\nRed', ''), ('Red', '')])
@pytest.mark.parametrize('name', ['chatml', 'zero_qwen', 'mpt'])
@pytest.mark.fault('joined-line-breaks')
def test_an_answer_that_joins_the_end_of_its_prompt_is_announced(name, answer, joined):
    """haotian-liu/LLaVA#1153: a token across the border is learnt but cannot follow the prompt"""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    joins = trainers.BpeTrainer(
        vocab_size=300,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=['<|im_start|>', '<|im_end|>'],
    )
    trained.train_from_iterator(['a\n\n\nb assistant user', 'a\n\nb'] * 50, joins)
    tok = PreTrainedTokenizerFast(tokenizer_object=trained, eos_token='<|im_end|>')
    talk = [Turn('user', 'q'), Turn('assistant', answer), Turn('user', 'q')]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        prompt = encode(talk[:1], tok, name, add_generation_prompt=True).input_ids
        full = encode(talk, tok, name).input_ids
    assert [repr(joined) in str(w.message) for w in said] == [True] * bool(joined)
    assert torch.equal(full[: len(prompt)], prompt) == (not joined)


LLAMA_3_RULE = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r'| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
)


@pytest.mark.parametrize('rule,answer', [('gpt2', 'Red'), ('gpt2', '12'), ('llama', 'Red')])
@pytest.mark.fault('split-line-breaks')
def test_a_prompts_end_that_is_read_otherwise_before_an_answer_is_announced(rule, answer):
    "GPT-2's rule gives the last line break to the word behind it; Llama 3's keeps both together."
    trained = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rule == 'gpt2')
    split = pre_tokenizers.Split(Regex(LLAMA_3_RULE), 'isolated')
    trained.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level][rule == 'gpt2' :])
    marks = '<|begin_of_text|> <|eot_id|> <|start_header_id|> <|end_header_id|>'.split()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    joins = trainers.BpeTrainer(
        vocab_size=300, show_progress=False, initial_alphabet=alphabet, special_tokens=marks
    )
    trained.train_from_iterator(['a\n\n', 'a\n\nb'] * 50, joins)
    tok = PreTrainedTokenizerFast(tokenizer_object=trained, eos_token='<|eot_id|>')
    talk = [Turn('user', 'q'), Turn('assistant', answer)]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        prompt = encode(talk[:1], tok, 'llama_3', add_generation_prompt=True).input_ids
        full = encode(talk, tok, 'llama_3').input_ids
    assert ['not what is asked' in str(w.message) for w in said] == [True] * (rule == 'gpt2')
    assert torch.equal(full[: len(prompt)], prompt) == (rule == 'llama')


def test_a_control_token_that_swallows_an_answers_space_is_not_a_target():
    tok = sentencepiece_like('legacy', rstrip=True)
    e = encode([Turn('user', 'the'), Turn('assistant', 'red')], tok, 'world')
    opening = e.input_ids.tolist().index(tok.convert_tokens_to_ids('<|assistant|>'))
    assert e.labels[opening] == IGNORE and (e.labels[opening + 1 :] != IGNORE).all()


# --- hostile and unusual text
# -----------------------------------------------------------------------------------------


@quick
@given(data=st.data())
def test_typed_control_tokens_stay_text(tok, data):
    template = data.draw(TEMPLATE)
    evil = st.sampled_from(CONTROL[1:] + ['</s>', '<s>', '<unk>'])
    word = st.lists(st.one_of(PHRASE, evil, st.just(IMAGE)), max_size=4).map(''.join)
    answer = (
        st.lists(st.one_of(PHRASE, evil), max_size=3).map(''.join).filter(lambda t: IMAGE not in t)
    )
    turns = fit(data.draw(talks(user=word, answer=answer)), template)
    e = encode(turns, tok, template, [1] * slots(turns))
    spans = template.spans(turns, bos='<s>', eos='</s>')
    control = {tok.convert_tokens_to_ids(c) for c in CONTROL + ['<s>', '</s>']}
    want = []
    for s in spans:
        want += [s.text] if s.special else [IMAGE] * s.text.count(IMAGE)
    assert [i for i in e.input_ids.tolist() if i in control] == tok.convert_tokens_to_ids(want)
    if tok.family in LOSSLESS:
        assert tok.decode(e.input_ids) == ''.join(s.text for s in spans)


def test_noncharacters_are_refused(tok):
    with pytest.raises(ValueError, match='U\\+FDD0'):
        encode([Turn('user', 'a\ufdd05\ufdd1')], tok, 'chatml')


def test_another_image_token_and_typed_image_tokens():
    tok = byte_level()
    turns = [Turn('user', f'{IMAGE} not <|system|>'), Turn('assistant', 'a')]
    e = encode(turns, tok, 'chatml', [4], image_token='<|system|>')
    assert (
        (e.input_ids == tok.convert_tokens_to_ids('<|system|>')).sum()
        == 4
        == (e.image_ids == 0).sum()
    )
    assert IMAGE not in tok.convert_ids_to_tokens(e.input_ids.tolist())


@pytest.mark.parametrize(
    'counts, reason',
    [
        ([], '1 <image> slots in the text but 0 images'),
        ([1, 1], 'but 2 images'),
        ([0], 'at least one token'),
        ([-3], 'at least one token'),
        ([[]], 'at least one token'),
    ],
)
def test_slots_and_counts_have_to_match(counts, reason):
    with pytest.raises(ValueError, match=re.escape(reason)):
        encode([Turn('user', IMAGE), Turn('assistant', 'a')], render_tok(), 'chatml', counts)


def test_tiles_count_as_images():
    e = encode(
        [Turn('user', f'{IMAGE}{IMAGE} q'), Turn('assistant', 'a')],
        render_tok(),
        'chatml',
        [[2, 3], 4],
    )
    assert [(e.image_ids == k).sum().item() for k in range(4)] == [2, 3, 4, 0]


def test_a_template_foreign_to_the_tokenizer_is_refused():
    tok = Tokenizer(models.WordLevel({'<unk>': 0, 'a': 1}, unk_token='<unk>'))
    tok.pre_tokenizer = pre_tokenizers.Whitespace()
    tok = PreTrainedTokenizerFast(tokenizer_object=tok, unk_token='<unk>')
    with pytest.raises(
        ValueError, match=r"needs the control tokens \['<\|im_end\|>', '<\|im_start\|>'\]"
    ):
        encode([Turn('user', 'a')], tok, 'chatml')
    talk = [Turn('user', 'a'), Turn('assistant', 'a')]
    with pytest.raises(ValueError, match='control tokens'):
        encode(talk, tok, 'vicuna_v1')
    assert encode(talk, tok, 'llava_plain').input_ids.tolist() == [
        1
    ]  # no begin token, and none is made up


def test_tokens_added_later_are_seen():
    tok = word_level()
    encode([Turn('user', 'the')], tok, 'chatml')
    tok.add_special_tokens({'additional_special_tokens': [*CONTROL, '<|new|>']})
    e = encode([Turn('user', 'the <|new|>')], tok, 'chatml')
    assert tok.convert_tokens_to_ids('<|new|>') not in e.input_ids.tolist()


def test_the_tokenizer_is_left_as_it_was():
    tok = byte_level()
    before = tok.backend_tokenizer.to_str()
    encode([Turn('user', 'a <|im_end|>'), Turn('assistant', 'b')], tok, 'chatml')
    assert tok.backend_tokenizer.to_str() == before


def test_slow_tokenizers_are_announced_and_labelled():
    tok = ByT5Tokenizer(extra_ids=0, additional_special_tokens=CONTROL)
    turns = [
        Turn('user', f'é{IMAGE} <|end|>?'),
        Turn('assistant', 'ja'),
        Turn('user', 'x'),
        Turn('assistant', ''),
    ]
    with pytest.warns(UserWarning, match='ByT5Tokenizer gives no character offsets'):
        e = encode(turns, tok, 'world', [3])
    assert target_texts(e, tok) == [' ja <|end|>', '  <|end|>']
    assert (e.input_ids == tok.convert_tokens_to_ids('<|end|>')).sum() == 2
    assert tok.decode(e.input_ids[e.image_ids < 0]) == get_template('world').render(turns).replace(
        IMAGE, ''
    )


def test_encoding_is_quiet_for_fast_tokenizers(tok):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        # llama_3's header does not belong to GPT-2's rule, which is announced
        name = 'chatml' if tok.family == 'bytes' else 'llama_3'
        encode([Turn('user', 'q'), Turn('assistant', 'a')], tok, name)


# --- the reference's own vectors
# --------------------------------------------------------------------------------------


def cases(method):
    return sorted((GOLDEN / method).glob('case_*'))


def load_sp(path):
    """A fast tokenizer from a SentencePiece BPE file: pieces, and merges in the order of the
    pieces' scores"""
    sp = pytest.importorskip('sentencepiece').SentencePieceProcessor(model_file=str(path))
    pieces = [sp.id_to_piece(i) for i in range(sp.get_piece_size())]
    normal = [
        i
        for i, p in enumerate(pieces)
        if not (sp.is_control(i) or sp.is_unknown(i) or sp.is_byte(i))
    ]
    known = {pieces[i] for i in normal}
    merges = [
        (-sp.get_score(i), p[:k], p[k:])
        for i in normal
        if len(p := pieces[i]) > 1
        for k in range(1, len(p))
        if p[:k] in known and p[k:] in known
    ]
    rank = {p: i for i, p in enumerate(pieces)}
    merges.sort(key=lambda m: (m[0], rank[m[1]], rank[m[2]]))
    return {p: i for i, p in enumerate(pieces)}, [m[1:] for m in merges]


def golden_tokenizer(case, name):
    if name in ('vicuna', 'plain') or name.startswith('phi3'):
        return sentencepiece_like(
            'legacy', pieces=load_sp(case / 'tokenizers' / 'tokenizer_sp.model')
        )
    tok = PreTrainedTokenizerFast(tokenizer_file=str(case / 'tokenizers' / f'{name}.json'))
    tok.add_special_tokens({'additional_special_tokens': [IMAGE]})
    return tok


def golden_turns(rows):
    roles = dict(
        human='user', gpt='assistant', user='user', assistant='assistant', model='assistant'
    )
    turns = [
        Turn(roles[r.get('from') or r['role']], r['value'] if 'value' in r else r['content'])
        for r in rows
    ]
    return images_first(turns[turns[0].role == 'assistant' :])


NAMES = dict(
    vicuna_v1='vicuna_v1',
    llava_v1='llava_v1',
    llava_llama_3='llama_3',
    llava_phi_3='phi_3',
    plain='llava_plain',
)


@pytest.mark.parametrize('case', cases('vip_llava'), ids=lambda p: p.name)
def test_golden_vip_llava_strings(case):
    text = json.loads((case / 'text.json').read_text())
    one = [Turn('user', f'{IMAGE}\nQ-one'), Turn('assistant', 'A-one')]
    for theirs, ours in NAMES.items():
        if theirs not in text['prompts']:
            continue
        want = text['prompts'][theirs]
        assert get_template(ours).render(one, bos='') == want['one_turn']
        assert (
            get_template(ours).render([*one, Turn('user', 'Q-two')], True, bos='')
            == want['generation']
        )


@pytest.mark.parametrize('case', cases('vip_llava'), ids=lambda p: p.name)
def test_golden_vip_llava_labels(case):
    """Rows that the reference labels as intended; rows it masked by mistake (a warning) must keep
    their answers here"""
    text, checked = json.loads((case / 'text.json').read_text()), 0
    for row in text['labels']:
        if row['template'] not in NAMES:
            continue
        tok, turns = (
            golden_tokenizer(case, row['tokenizer']),
            golden_turns(text['conversations'][row['conv']]),
        )
        if row['template'] == 'plain':
            turns = turns[:2]
        e = encode(turns, tok, NAMES[row['template']], [1] * slots(turns))
        got = target_texts(e, tok)
        squeeze = lambda t: ''.join(t.split())
        if row['warning']:
            assert len(got) == sum(t.role == 'assistant' for t in turns)
        else:
            assert [squeeze(t) for t in got] == [squeeze(t) for t in row['supervised_text']]
        exact = row['tokenizer'] == 'llama3_nobos' and not row['has_image']
        if exact or (row['conv'] == 'text_1turn' and row['tokenizer'] == 'vicuna'):
            assert e.input_ids.tolist() == row['input_ids'] and e.labels.tolist() == row['labels']
            checked += 1
    assert checked >= 3


@pytest.mark.parametrize('case', cases('eve'), ids=lambda p: p.name)
def test_golden_eve_labels(case):
    meta = json.loads((case / 'meta.json').read_text())
    tok = sentencepiece_like(
        'legacy', pieces=load_sp(GOLDEN / 'eve' / 'common' / 'tiny_tokenizer.model')
    )
    for row in meta['text']:
        turns = golden_turns([{'from': a, 'value': b} for a, b in row['conversations']])
        e = encode(turns, tok, 'vicuna_v1', [1] * slots(turns))
        want, run = [], []
        for t in row['labels'] + [IGNORE]:
            if t != IGNORE:
                run.append(t)
            elif run:
                want.append(tok.decode(run))
                run = []
        assert [t.strip() for t in target_texts(e, tok)] == [t.strip() for t in want]
        if len(turns) == 2 and not slots(turns):
            assert e.input_ids.tolist() == row['input_ids']


@pytest.mark.parametrize('case', cases('zero'), ids=lambda p: p.name)
def test_golden_zero_text_ids_and_targets(case):
    "Language-only rows: ids and both label modes, shifted by one as the reference stores them"
    from safetensors.torch import load_file

    meta, data = (
        json.loads((case / 'meta.json').read_text()),
        load_file(case / 'lang_forward.safetensors'),
    )
    tok = PreTrainedTokenizerFast(
        tokenizer_file=str(GOLDEN / 'zero' / 'common' / 'tokenizer_llama.json')
    )
    ids, targets = data['default.input_ids'], data['default.targets']
    for k, row in enumerate(meta['lang_messages']):
        e = encode(golden_turns(row['messages']), tok, 'zero_llama3')
        n = e.n_tokens
        assert e.input_ids.tolist() == ids[k][:n].tolist() and (ids[k][n:] < 2).all()
        assert e.labels[1:].tolist() == targets[k][: n - 1].tolist()


@pytest.mark.parametrize('case', cases('zero'), ids=lambda p: p.name)
def test_golden_zero_label_modes(case):
    """Text rows of the image engine: control tokens learnt (stages 1 and 2) or answers only (stage
    3)"""
    from safetensors.torch import load_file

    meta, data = (
        json.loads((case / 'meta.json').read_text()),
        load_file(case / 'vlm_forward.safetensors'),
    )
    tok = PreTrainedTokenizerFast(
        tokenizer_file=str(GOLDEN / 'zero' / 'common' / 'tokenizer_llama.json')
    )
    text_only = [
        k for k, c in enumerate(meta['conversations']) if not any(IMAGE in t['content'] for t in c)
    ]
    assert text_only
    for setting, mode in (('default', 'special'), ('stage3', 'answers')):
        for k in text_only:
            e = encode(golden_turns(meta['conversations'][k]), tok, 'zero_llama3', targets=mode)
            n = e.n_tokens
            assert e.input_ids.tolist() == data[f'{setting}.input_ids'][k][:n].tolist()
            assert e.labels[1:].tolist() == data[f'{setting}.targets'][k][: n - 1].tolist(), (
                setting,
                k,
            )


@pytest.mark.parametrize('case', cases('zero'), ids=lambda p: p.name)
def test_golden_zero_qwen(case):
    from safetensors.torch import load_file

    meta, data = json.loads((case / 'qwen.json').read_text()), load_file(case / 'qwen.safetensors')
    tok = PreTrainedTokenizerFast(
        tokenizer_file=str(GOLDEN / 'zero' / 'common' / 'tokenizer_qwen.json')
    )
    for k, conversation in enumerate(meta['conversations']):
        turns = golden_turns(conversation)
        turns = [Turn(t.role, c['content']) for t, c in zip(turns, conversation)]
        for setting, mode in (('special', 'special'), ('response', 'answers'), ('all', 'all')):
            e = encode(
                turns,
                tok,
                'zero_qwen',
                [1] * slots(turns),
                image_token='<|image_pad|>',
                targets=mode,
            )
            n = e.n_tokens
            assert e.input_ids.tolist() == data['input_ids'][k][:n].tolist()
            if not slots(turns):
                assert e.labels[1:].tolist() == data[f'{setting}.targets'][k][: n - 1].tolist(), (
                    setting,
                    k,
                )


def test_a_prompt_of_nothing_is_refused():
    "The plain template leaves out the words of a question; without a picture nothing is left."
    trained = Tokenizer(models.BPE())
    trained.train_from_iterator(['What?'], trainers.BpeTrainer(show_progress=False))
    bare = PreTrainedTokenizerFast(tokenizer_object=trained, eos_token='</s>')  # it begins nothing
    with pytest.raises(ValueError, match="'llava_plain' writes nothing of these turns"):
        encode([Turn('user', 'What?')], bare, 'llava_plain', add_generation_prompt=True)
