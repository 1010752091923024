"""`trajectory=zero` of a plain language model without a chat template, against its definition."""

import json

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from vlmbench.data.template import encode
from vlmbench.data.record import Turn
from vlmbench.data.scene import world_tokenizer
from vlmbench.lab.calibration import calibration, load_any
from vlmbench.data.record import Sample
from vlmbench.run.engine import find_notebook
from vlmbench.run.layer_jobs import layers_job
from vlmbench.run.manifest import Manifest
from vlmbench.run.parameters import load_notebook, notebook_parameters

QUESTIONS = ('what is the square ?', 'is there a cross ?', 'how many objects are there ?')
ROLES = ('<start_of_turn>', '<end_of_turn>')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "A language model of four layers with Gemma's tokens and no chat template, and three texts."
    place, tokenizer = tmp_path_factory.mktemp('lm'), world_tokenizer()
    tokenizer.chat_template = None
    tokenizer.add_special_tokens(dict(bos_token='<bos>'))
    tokenizer.add_special_tokens(dict(additional_special_tokens=list(ROLES)))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(place)
    tokenizer.save_pretrained(place)
    turns = [
        [dict(**{'from': 'human'}, value=asked), dict(**{'from': 'gpt'}, value='one red square')]
        for asked in QUESTIONS
    ]
    rows = [dict(id=str(i), conversations=one) for i, one in enumerate(turns)]
    (place / 'texts.json').write_text(json.dumps(rows))
    return place


def by_definition(model, ids):
    "Zero's divergence of every layer for one text `[tokens]`, as its card states it."
    with torch.no_grad():
        states = model(ids[None], output_hidden_states=True).hidden_states[1:]
        normed = [*(model.model.norm(h) for h in states[:-1]), states[-1]]
        chances = [model.lm_head(h)[0].softmax(-1)[:-1] for h in normed]
    true = torch.stack([p.gather(1, ids[1:, None])[:, 0] for p in chances])
    q = (true / true.sum(1, keepdim=True)).float().clamp(min=1e-6)
    return (q * (q / q[-1]).log()).sum(1).numpy()


def test_the_array_holds_every_text_in_order_and_the_figure_is_there(folder, tmp_path):
    declared = notebook_parameters(load_notebook(find_notebook('layers')), 'layers')
    settings = {name: one.default for name, one in declared.items()} | dict(size=2)
    settings |= dict(samples='texts', limit=301, batch_size=2, drop=False, gradients=False)
    settings |= dict(template='zero_gemma', trajectory='zero', device_map='auto', device='cpu')
    Manifest(tmp_path).start('layers', settings)
    layers_job(settings, str(folder), '', str(folder), str(tmp_path))
    curves = np.load(tmp_path / 'trajectory.npy')
    model, tokenizer = load_any(folder)
    want = []
    for asked in QUESTIONS:
        turns = [Turn('user', asked), Turn('assistant', 'one red square')]
        ids = encode(turns, tokenizer, 'zero_gemma').input_ids
        assert ids.tolist().count(tokenizer.bos_token_id) == 1
        assert ids[0] == tokenizer.bos_token_id
        want.append(by_definition(model, ids))
    assert curves.shape == (3, 4)
    np.testing.assert_allclose(curves, np.stack(want), rtol=0, atol=1e-5)
    assert (tmp_path / 'trajectory.pdf').read_bytes()[:4] == b'%PDF'


def test_a_template_is_refused_where_it_cannot_be_written(folder):
    _, tokenizer = load_any(folder)
    sample = Sample('s', [Turn('user', 'what ?'), Turn('assistant', 'red')])
    with pytest.raises(ValueError, match='needs the control tokens'):
        calibration(tokenizer, [sample], template='zero_qwen')
    with pytest.raises(KeyError, match='zero_gemma'):
        calibration(tokenizer, [sample], template='zero_gema')
