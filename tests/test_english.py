"""Held-out English, perplexity whole and cut, massive activations: through the commands, with
models that hold them."""

import json
import math
import shutil
import sysconfig
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from depth_models import llava
from vlmbench.analysis.massive import MassiveActivations, side_by_side, trimmed_metrics
from vlmbench.analysis.streams import scores, stream
from vlmbench.data.docstrings import CHANGED, MODULES, SHA256, all_docstrings, held_out
from vlmbench.data.scene import world_tokenizer
from vlmbench.evaluate.perplexity import cuts_table, perplexity, text_blocks
from vlmbench.lab.layers import choose, measure
from vlmbench.models.depth import prune
from vlmbench.run.engine import run_notebook
from vlmbench.run.manifest import Manifest

WORDS = 'red blue green small large square circle what is the where two three . ?'.split()
TEXT = ' '.join(np.random.default_rng(0).choice(WORDS, 400))


@pytest.fixture(scope='module')
def lm():
    "A random language model of six layers with the world's tokenizer."
    tokenizer = world_tokenizer()
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_hidden_layers=6)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).eval()
    return model, tokenizer


@pytest.fixture(scope='module')
def folder(lm, tmp_path_factory):
    place = tmp_path_factory.mktemp('english') / 'lm'
    lm[0].save_pretrained(place)
    lm[1].save_pretrained(place)
    return place


# --- the text


def test_the_text_is_the_declared_one_and_nothing_of_it_is_imported():
    held = held_out()
    assert held.declared and held.sha256 == SHA256 and len(held.docstrings) == 325
    assert len(held.text.encode()) == 199_876
    assert {d.name.partition('.')[0] for d in held.docstrings} <= set(MODULES)
    assert not {d.name for d in held.docstrings} & set(CHANGED)


def test_a_changed_library_is_announced_and_an_absent_one_refused(tmp_path):
    source = Path(sysconfig.get_path('stdlib'))
    for module in MODULES:
        file = source / f'{module}.py'
        if file.is_file():
            shutil.copy(file, tmp_path)
        else:
            (tmp_path / module).mkdir()
            shutil.copy(source / module / '__init__.py', tmp_path / module)
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)  # a copy is the same; ours alone: any other
        # may come from the garbage collector, and pytest's report of it parses while `ast` does
        assert held_out(tmp_path).declared
    place = tmp_path / 'textwrap.py'
    place.write_text(place.read_text().replace('paragraph', 'section'))
    with pytest.warns(UserWarning, match=f'not the declared {SHA256}'):
        assert not held_out(tmp_path).declared
    place.unlink()
    with pytest.raises(FileNotFoundError, match="no source of module 'textwrap'"):
        all_docstrings(tmp_path)


# --- perplexity


def test_the_loss_is_transformers_own_and_a_cut_is_the_pruned_model(lm):
    model, tokenizer = lm
    blocks = text_blocks(tokenizer, TEXT, 96, 16)
    found = perplexity(model, blocks)
    with torch.no_grad():
        whole = torch.cat([b['input_ids'] for b in blocks])
        theirs = model(input_ids=whole, labels=whole).loss.item()
    assert found.interval.mean == pytest.approx(theirs, abs=1e-5)
    assert found.interval.low <= theirs <= found.interval.high and found.block == 16
    table = cuts_table(model, blocks, ['1-2'])
    small = perplexity(prune(model, [1, 2], share=False), blocks)
    assert table.loss[1] == pytest.approx(small.interval.mean, abs=1e-5)
    assert table.rise[1] == pytest.approx(table.loss[1] - table.loss[0], abs=1e-6)


def test_a_model_that_sees_reads_the_text_as_its_language_model_does():
    model = llava()
    ids = torch.arange(5, 29).view(4, 1, 6)
    blocks = [dict(input_ids=row, attention_mask=torch.ones_like(row), labels=row) for row in ids]
    with torch.no_grad():
        theirs = [model(input_ids=row, labels=row).loss.item() for row in ids]
    np.testing.assert_allclose(perplexity(model, blocks).blocks, theirs, atol=1e-5)


def test_what_a_tokenizer_puts_before_a_text_is_given_and_not_predicted():
    class Starting:
        "Puts 1 before every text, as Llama's does."

        def __call__(self, text, add_special_tokens=True):
            ids = [ord(letter) for letter in text]
            return dict(input_ids=[1, *ids] if add_special_tokens else ids)

    blocks = text_blocks(Starting(), 'abcdefghi', 8, 4)
    assert blocks[1]['input_ids'].tolist() == [[1, *map(ord, 'efghi')]]
    assert blocks[1]['labels'].tolist() == [[-100, -100, *map(ord, 'fghi')]]


def test_perplexity_through_the_command(folder, tmp_path):
    words = tmp_path / 'words.txt'
    words.write_text(TEXT, encoding='utf8')
    asked = dict(model=str(folder), text=str(words), tokens=64, block=16, cuts=['2-3', 'even:2'])
    assert run_notebook('perplexity', asked, tmp_path / 'out', progress=False) == 0
    table = pd.read_csv(tmp_path / 'out' / 'perplexity.csv')
    assert table.cut.tolist() == ['whole', '2-3', 'even:2']
    seen = Manifest(tmp_path / 'out').read()
    assert seen['results']['loss'] == pytest.approx(table.loss[0])
    assert len(seen['data']['sha256']) == 64 and seen['data']['declared'] is None
    assert (tmp_path / 'out' / 'figures' / 'cuts.png').stat().st_size > 5000


# --- massive activations


def holding(model, layer=1, channel=5, amount=4000.0):
    "`model` with a hook that writes `amount` into a channel of every row's first token."

    def hook(module, args, out):
        out = out.clone()
        out[:, 0, channel] += amount
        return out

    return model.model.layers[layer].register_forward_hook(hook)


def test_one_is_named_and_the_second_column_is_the_model_without_it(lm):
    model, tokenizer = lm
    blocks = text_blocks(tokenizer, TEXT, 96, 16)
    plain = measure(model, blocks, share=2)
    assert not len(plain.massive) and not plain.cka_trimmed
    assert not plain.frame.metric.str.endswith('_trimmed').any()
    handle = holding(model)
    try:
        held = measure(model, blocks, share=2)
    finally:
        handle.remove()
    table = held.massive
    assert table.channel.eq(5).all() and table.state.tolist() == [2, 3, 4, 5, 6]
    assert table.place.eq(0).all() and table['first'].eq(6).all() and table.ratio.min() > 1000
    both = side_by_side(held.frame)
    near = both[(both.metric == 'cka_biased') & (both.token_set == 'all') & (both.span == 1)]
    clean = scores(plain.frame, 'cka_biased', 'all')
    off = lambda column: np.abs(near.set_index('layer')[column] - clean).max()
    assert off('trimmed') < 0.1 < off('value')


def test_two_batches_give_the_table_of_one(lm):
    model, _ = lm
    ids = torch.randint(4, 40, (4, 9), generator=torch.Generator().manual_seed(0))
    handle = holding(model)
    try:
        whole, parts = MassiveActivations(), MassiveActivations()
        stream(model, [dict(input_ids=ids)], [whole])
        stream(model, [dict(input_ids=ids[:2]), dict(input_ids=ids[2:])], [parts])
    finally:
        handle.remove()
    assert whole.channels == parts.channels == [5]
    same = ['state', 'channel', 'tokens', 'first', 'value']
    pd.testing.assert_frame_equal(whole.table()[same], parts.table()[same], rtol=1e-5)
    assert len(trimmed_metrics(whole)) == 4


# --- the layer report


def test_how_scores_agree_with_drop_one_has_an_interval_over_texts(lm):
    model, tokenizer = lm
    blocks = text_blocks(tokenizer, TEXT, 192, 16)
    found = measure(model, blocks, share=2)
    assert {'block influence, all', 'Taylor', 'CKA change, all'} <= set(found.against.score)
    assert found.against.texts.eq(12).all()
    inside = found.against.dropna()
    assert ((inside.low <= inside.high) & inside.rho.between(-1, 1)).all()
    pooled = found.rankings['block influence, all'].corr(found.rankings['drop one'], 'spearman')
    row = found.against.set_index('score').loc['block influence, all']
    assert row.rho == pytest.approx(pooled, abs=1e-6)
    few = measure(model, blocks[:3], share=2)
    assert not len(few.against) and any('3 batches' in reason for reason in few.left_out)


def test_a_region_says_what_it_comes_from(lm):
    model, tokenizer = lm
    found = measure(model, text_blocks(tokenizer, TEXT, 64, 16), share=2)
    assert choose(found, share=2)['source'] == 'the even spread: no score was used'
    assert choose(found, metric='drop one', share=2)['source'].startswith('the highest by drop one')


def test_layers_of_docstrings_through_the_command(folder, tmp_path):
    asked = dict(model=str(folder), samples='docstrings', limit=5, block=32, share=2)
    assert run_notebook('layers', asked, tmp_path / 'out', progress=False) == 0
    seen = Manifest(tmp_path / 'out').read()
    assert seen['data'] == dict(source='docstrings', sha256=SHA256, declared=True)
    assert seen['results']['source'] == 'the even spread: no score was used'
    assert math.isfinite(seen['results']['loss'])
    region = json.loads((tmp_path / 'out' / 'region.json').read_text())
    assert region['source'] in (tmp_path / 'out' / 'report.html').read_text()
    assert len(pd.read_csv(tmp_path / 'out' / 'against.csv')) > 5
