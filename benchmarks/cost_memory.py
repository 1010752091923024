"""Planned peak memory of a training step beside the resident memory of the process that makes it.

    MALLOC_MMAP_THRESHOLD_=65536 MALLOC_TRIM_THRESHOLD_=65536 python benchmarks/cost_memory.py

With the two variables glibc hands freed blocks back at once and the two agree within 2%; without
them it keeps them for later, and the process is about a third larger than what its tensors take.
Prints planned and resident MiB and their ratio.
"""

import os

import torch

from vlmbench.cost.counter import Workload, training_cost
from vlmbench.methods.recipes import get_method
from vlmbench.cost.shapes import model_from_shapes
from vlmbench.speed.measures import PeakMemory
from vlmbench.train.prepare import prepare
from vlmbench.train.scale import get_scale
from vlmbench.train.recipe import override

SCALE = override(
    get_scale('tiny'),
    dict(
        name='mid',
        llm_config=dict(
            model_type='llama',
            hidden_size=512,
            intermediate_size=1376,
            num_hidden_layers=10,
            num_attention_heads=8,
            num_key_value_heads=4,
            vocab_size=2000,
        ),
        vision_config=dict(
            model_type='clip_vision_model',
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=64,
            patch_size=8,
        ),
    ),
)
WORK = Workload(rows=8, tokens=512, images=16, height=64, width=64, targets=400)


def batch(model):
    """The planned micro-batch with values: images first, the last positions are targets, two
    documents a row."""
    place = torch.arange(WORK.rows * WORK.tokens).view(WORK.rows, WORK.tokens)
    ids, labels = torch.ones_like(place), torch.full_like(place, -100)
    ids.view(-1)[: WORK.images * model.model.vision.num_tokens(64, 64)] = (
        model.config.image_token_id
    )
    labels.view(-1)[place[:, 1:].flatten()[-WORK.targets :]] = 3
    return dict(
        input_ids=ids,
        labels=labels,
        document_ids=(place % WORK.tokens >= WORK.tokens - 3).long(),
        pixel_values=torch.randn(WORK.images, 3, 64, 64),
    )


if __name__ == '__main__':
    if 'MALLOC_MMAP_THRESHOLD_' not in os.environ:
        print('glibc keeps freed memory; see the head of this script')
    recipe = get_method('llava').recipe(SCALE)
    for stage in recipe.stages:
        meta, real = (model_from_shapes(recipe, SCALE, d) for d in ('meta', 'cpu'))
        for model in (meta, real):
            prepare(model, stage)
        planned, inputs = training_cost(meta, WORK), batch(real)
        mb = (planned.peak - planned.weights_bytes - planned.optimizer) / 2**20
        for turn in ('first step', 'second step'):
            with PeakMemory() as memory:
                real.train()(**inputs, use_cache=False).loss.backward()
            real.zero_grad(set_to_none=True)
            print(
                f'{stage.name}, {turn}: planned {mb:.0f} MiB, resident {memory.mb:.0f} MiB, '
                f'{mb / memory.mb:.3f}'
            )
