"""A model stored in bf16 trains with fp32 master weights and comes back in bf16: it answers, and
its folder has one dtype."""

import warnings

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from mini_bases import write_bases
from sharding_stubs import METHODS, ROWS, run_method
from vlmbench.evaluate.generate import evaluate
from vlmbench.evaluate.tasks import load_task
from vlmbench.train.checkpoint import export


@pytest.fixture(scope='module')
def bases(tmp_path_factory):
    root = tmp_path_factory.mktemp('bases')
    write_bases(root, 4, **ROWS)
    return root


@pytest.mark.parametrize('method', METHODS)
def test_trains_answers_and_reloads(bases, tmp_path, method):
    ended, _ = run_method(
        bases, tmp_path, method, steps=1, dtype='bfloat16', precision='bf16', save_every=1
    )
    assert {p.dtype for p in ended.model.parameters()} == {torch.bfloat16}
    task = load_task(bases / 'world' / 'vqa_test.json')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        answers = evaluate(ended.model, ended.processor, task, batch_size=2)
    assert len(answers.frame) == len(task)
    folder = export(ended.model, ended.processor, tmp_path / 'model')
    stored = load_file(folder / 'model.safetensors')
    assert {t.dtype for t in stored.values()} == {torch.bfloat16}
    again = AutoModelForImageTextToText.from_pretrained(folder)
    assert again.dtype == torch.bfloat16
    before = dict(ended.model.named_parameters())
    assert all(torch.equal(p, before[name]) for name, p in again.named_parameters())
