"""Golden parity of ViP-LLaVA's text: token ids, label masks, batches, image tokens, template
strings (every case_*)."""

import json, os
from pathlib import Path

import pytest
import torch

from test_template import NAMES, golden_tokenizer, golden_turns, slots
from vlmbench.data.collate import collate_padded, truncate
from vlmbench.data.record import Turn
from vlmbench.data.template import (
    BOS,
    CONTENT,
    IGNORE,
    IMAGE,
    TEMPLATES,
    ChatTemplate,
    encode,
    get_template,
    pieces,
    target_texts,
)

ROOT = Path(os.environ.get('VLMBENCH_GOLDEN', Path(__file__).parent / 'golden')) / 'vip_llava'
CASES = sorted(ROOT.glob('case_*'))
SLOT = -200  # an image in the published ids


@pytest.fixture(params=CASES, ids=lambda p: p.name)
def text(request):
    return json.loads((request.param / 'text.json').read_text()) | dict(case=request.param)


def tokens(turns, tok, template):
    "ids with -200 for an image, and labels: as the published code writes them."
    e = encode(turns, tok, template, [1] * slots(turns))
    return torch.where(e.image_ids >= 0, SLOT, e.input_ids).tolist(), e.labels.tolist(), e


def rows(text, *tokenizers):
    for row in text['labels']:
        if row['tokenizer'] not in tokenizers:
            continue
        turns = golden_turns(text['conversations'][row['conv']])
        if row['template'] == 'plain':
            turns = turns[:2]
        yield row, turns, golden_tokenizer(text['case'], row['tokenizer'])


def test_there_are_cases():
    assert CASES


def test_vicuna_and_plain_ids_and_labels_are_identical(text):
    n = 0
    for n, (row, turns, tok) in enumerate(rows(text, 'vicuna', 'plain'), 1):
        ids, labels, _ = tokens(turns, tok, NAMES[row['template']])
        assert row['warning'] is None and ids == row['input_ids'] and labels == row['labels'], row[
            'conv'
        ]
    assert n


def test_llama_3_ids_and_labels_but_for_two_quirks(text):
    """Published: the newline after an image is lost without automatic BOS; with it there are two
    BOS, and turn two is masked."""
    n = 0
    for n, (row, turns, tok) in enumerate(rows(text, 'llama3_nobos', 'llama3_autobos'), 1):
        ids, labels, e = tokens(turns, tok, NAMES[row['template']])
        if row['tokenizer'] == 'llama3_autobos':
            ids, labels = [ids[0], *ids], [IGNORE, *labels]
        else:
            drop = [k + 1 for k, i in enumerate(ids) if i == SLOT]
            assert all(tok.decode([ids[k]]) == '\n' and labels[k] == IGNORE for k in drop)
            ids, labels = ([x for k, x in enumerate(v) if k not in drop] for v in (ids, labels))
        assert ids == row['input_ids'], row['conv']
        if row['warning']:
            assert set(row['labels']) == {IGNORE} and e.n_targets > 0
        else:
            assert labels == row['labels']
    assert n


def test_phi_3_ids(text):
    """Token by token, controls by name; its slow tokenizer begins no text behind a control token
    with a space piece, and with `rstrip` swallows the newline there. Where its own mask survives,
    the same tokens are learnt."""
    n, named = 0, {}
    for row, turns, tok in rows(text, 'phi3_rstrip', 'phi3_norstrip'):
        ids, labels, _ = tokens(turns, tok, 'phi_3')
        space, newline = tok.convert_tokens_to_ids(['\u2581', '<0x0A>'])
        words = tok.get_added_vocab()
        control = {i for t, i in words.items() if t.startswith('<|')}
        theirs_control = {i for i in row['input_ids'] if i >= min(words[IMAGE], *control)}

        def squeezed(ids, labels, control):
            flags = [(i, t != IGNORE) for i, t in zip(ids, labels)]
            flags = [
                x for x, after in zip(flags, [*ids[1:], None]) if (x[0], after) != (space, newline)
            ]
            if row['tokenizer'] == 'phi3_norstrip':
                return flags
            return [
                x
                for x, before in zip(flags, [None, *(i for i, _ in flags)])
                if not (x[0] == newline and before in control)
            ]

        ours, theirs = (
            squeezed(ids, labels, control),
            squeezed(row['input_ids'], row['labels'], theirs_control),
        )
        assert len(ours) == len(theirs), (row['tokenizer'], row['conv'])
        for (a, learnt), (b, said) in zip(ours, theirs):
            if a in control:
                assert named.setdefault(b, a) == a and b in theirs_control
            else:
                assert a == b, (row['tokenizer'], row['conv'])
            if not row['warning'] and a != newline:
                assert learnt == said
        n += 1
    assert n and len(set(named.values())) == len(named) >= 4


def test_phi_3_answers(text):
    """Its slow tokenizer spaces control tokens its own way; what is learnt is the answer and its
    end, in every turn."""
    n = 0
    for n, (row, turns, tok) in enumerate(rows(text, 'phi3_rstrip', 'phi3_norstrip'), 1):
        _, _, e = tokens(turns, tok, 'phi_3')
        said = [''.join(t.split()) for t in target_texts(e, tok)]
        assert said == [''.join(f'{t.text}<|end|>'.split()) for t in turns if t.role == 'assistant']
        if not row['warning']:
            assert said == [''.join(t.split()) for t in row['supervised_text']]
        else:
            assert row['supervised_text'] == [] and set(row['labels']) == {IGNORE}
    assert n


def test_collated_batch(text):
    for want in text['collated']:
        tok = golden_tokenizer(text['case'], 'vicuna')
        docs = [
            tokens(golden_turns(text['conversations'][s]), tok, want['template'])[2]
            for s in want['samples']
        ]
        docs = [truncate(d, want['model_max_length']) for d in docs]
        batch = collate_padded(docs, tok.pad_token_id)
        ids = torch.where(batch['image_ids'] >= 0, SLOT, batch['input_ids'])
        assert ids.tolist() == want['input_ids'] and batch['labels'].tolist() == want['labels']
        assert batch['attention_mask'].int().tolist() == want['attention_mask']
        assert want['images_shape'][0] == len(docs)  # a dummy picture for text; ours needs none


def test_image_tokens(text):
    raw = ChatTemplate('raw', (), pieces(CONTENT), (), pieces(CONTENT, target=True), bos=BOS)
    for row in text['tokenizer_image_token']:
        turns = [Turn('user', row['text'])]
        ids, _, _ = tokens(turns, golden_tokenizer(text['case'], 'vicuna'), raw)
        assert ids == row['ids'], row['text']


def test_template_strings(text):
    """All of them; the begin token of a whole prompt is the tokenizer's to add, but for Llama-3's,
    which is written out."""
    one = [Turn('user', f'{IMAGE}\nQ-one'), Turn('assistant', 'A-one')]
    names = NAMES | {n: n for n in TEMPLATES}
    for theirs, want in text['prompts'].items():
        template = get_template(names[theirs])
        begins = '' if want['one_turn'].startswith(template.bos or '<|im_start|>') else '<s>'
        assert template.render(one) == begins + want['one_turn'], theirs
        assert (
            template.render([*one, Turn('user', 'Q-two')], True) == begins + want['generation']
        ), theirs
    assert len(text['prompts']) >= 8
