"""Folders whose tokenizer is `tokenizer.model` alone, as Llama 2, Vicuna and their kin ship it."""

import json
import sys
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from sentencepiece import SentencePieceProcessor
from tokenizer_model import write_tokenizer_model
from transformers import LlamaConfig, LlamaForCausalLM

from vlmbench.data.image import ImageTransform
from vlmbench.models import vlm
from vlmbench.models.vlm import build_vlm, read_tokenizer

SAID = 'what is the color of the small circle'


def test_it_reads_as_sentencepiece_does(tmp_path):
    write_tokenizer_model(tmp_path)
    tokenizer = read_tokenizer(tmp_path)
    pieces = SentencePieceProcessor(model_file=str(tmp_path / 'tokenizer.model'))
    assert tokenizer(SAID, add_special_tokens=False).input_ids == pieces.encode(SAID)
    assert tokenizer.eos_token_id == pieces.eos_id()


def test_a_base_model_builds_saves_and_returns(tmp_path):
    write_tokenizer_model(tmp_path / 'base')
    words = len(read_tokenizer(tmp_path / 'base'))
    small = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
    LlamaForCausalLM(LlamaConfig(vocab_size=words, **small)).save_pretrained(tmp_path / 'base')
    front = dict(type='eve', channels=16, patch_stride=4)
    with pytest.warns(UserWarning, match='<image>'):
        model, processor = build_vlm(
            tmp_path / 'base', None, front, None, 'llava_v1', ImageTransform('pad', 16)
        )
    assert model.get_input_embeddings().weight.shape == torch.Size([words + 1, 32])
    processor.save_pretrained(tmp_path / 'saved')
    again = type(processor).from_pretrained(tmp_path / 'saved').tokenizer
    assert again(SAID).input_ids == processor.tokenizer(SAID).input_ids


def test_what_cannot_read_it_is_named(tmp_path, monkeypatch):
    write_tokenizer_model(tmp_path)

    def unfit():
        raise RuntimeError('gencode 7.36.1 runtime 6.33.6\nand more')

    monkeypatch.setattr(vlm, 'import_protobuf', unfit)
    # transformers asks the same of its own module, and falls back to another library
    monkeypatch.delattr('sentencepiece.sentencepiece_model_pb2', raising=False)
    monkeypatch.setitem(sys.modules, 'sentencepiece.sentencepiece_model_pb2', None)
    with pytest.raises(ValueError, match='tokenizer.model only.*gencode 7.36.1.*pip install') as e:
        read_tokenizer(tmp_path)
    assert '\n' not in str(e.value)


def test_another_fault_keeps_its_own_message(tmp_path):
    (tmp_path / 'config.json').write_text(json.dumps(dict(model_type='llama')))
    with pytest.raises((ValueError, OSError)) as e:
        read_tokenizer(tmp_path)
    assert 'tokenizer.model only' not in str(e.value)


def test_the_core_brings_what_reads_it():
    settings = (Path(__file__).parents[1] / 'settings.ini').read_text().splitlines()
    (core,) = [line for line in settings if line.startswith('requirements = ')]
    names = {Requirement(word).name for word in core.removeprefix('requirements = ').split()}
    assert {'sentencepiece', 'protobuf'} <= names
