"""Base models of random weights and a world of a few rows, made in a moment, for tests of whole
runs."""

import json
from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM, SiglipVisionConfig, SiglipVisionModel

from vlmbench.data.scene import world_tokenizer
from vlmbench.data.world import WorldConfig, WorldSize, write_world
from vlmbench.run.engine import find_notebook
from vlmbench.run.parameters import load_notebook, notebook_parameters


def first_always(values, count=1):
    "Parameters of a test, of which those behind the first `count` take long to try as well."
    values = list(values)
    return values[:count] + [pytest.param(v, marks=pytest.mark.slow) for v in values[count:]]


def parameters_of(notebook, **given):
    "All parameters of a run notebook: its defaults but for what is given."
    found = notebook_parameters(load_notebook(find_notebook(notebook)))
    return {name: one.default for name, one in found.items()} | given


def write_bases(root, layers, **rows):
    """`root/llm` (`layers` blocks, width 32), `root/vit` (two blocks) and `root/world`, which has
    only the files that `rows` names."""
    root, tokenizer = Path(root), world_tokenizer()
    size = dict(hidden_size=32, intermediate_size=48, num_attention_heads=2)
    torch.manual_seed(0)
    config = dict(num_hidden_layers=layers, num_key_value_heads=1, head_dim=16)
    llm = Qwen3Config(vocab_size=len(tokenizer), tie_word_embeddings=True, **config, **size)
    Qwen3ForCausalLM(llm).save_pretrained(root / 'llm')
    tokenizer.save_pretrained(root / 'llm')
    tower = SiglipVisionConfig(image_size=64, patch_size=16, num_hidden_layers=2, **size)
    SiglipVisionModel(tower).save_pretrained(root / 'vit')
    none = dict.fromkeys(WorldSize.__dataclass_fields__, 0)
    write_world(root / 'world', WorldConfig(), WorldSize(**none | rows))


def write_objects(folder):
    "COCO's file of objects for one picture, a.png: a cup and a hat."
    coco = dict(
        categories=[dict(id=1, name='cup'), dict(id=2, name='hat')],
        images=[dict(id=1, file_name='a.png', width=64, height=64)],
        annotations=[
            dict(image_id=1, category_id=1, bbox=[2, 2, 22, 22]),
            dict(image_id=1, category_id=2, bbox=[36, 36, 24, 24]),
        ],
    )
    (folder / 'instances_val2017.json').write_text(json.dumps(coco))
