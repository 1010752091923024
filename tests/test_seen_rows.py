"""What the sample viewer shows is what a training step gets: the very batch, and the very mask."""

import pytest
import torch

from vlmbench.data.world import WorldSize, write_world
from vlmbench.lab.seen_rows import dense_mask, see_stage
from vlmbench.methods.recipes import BUILT_IN, find_scale, get_method, get_recipe
from vlmbench.train.forward import Forward
from vlmbench.train.stages import run_stages

STAGES = dict(
    llava='instruct',
    vip_llava='region',
    eve='prealign',
    vora='pretrain',
    zero='adapt',
    visual_region='instruct',
)


@pytest.fixture(scope='module')
def world(tmp_path_factory):
    few = dict.fromkeys(WorldSize.__dataclass_fields__, 0)
    few |= dict(caption_train=16, vqa_train=16, text_train=8, region_train=16)
    return write_world(tmp_path_factory.mktemp('w') / 'world', sizes=WorldSize(**few))


def test_every_method_is_looked_at():
    assert set(STAGES) == set(BUILT_IN)


def given_to_a_step(name, stage, changed, world, out, monkeypatch):
    "The batches that the loop gave to its forward passes, and the masks of the language model."
    batches, masks = [], []
    losses = Forward.losses

    def kept(self, batch, counts):
        batches.append(batch)
        language = self.model.model.language_model
        hook = language.register_forward_pre_hook(
            lambda _, args, given: masks.append(given['attention_mask']), with_kwargs=True
        )
        try:
            return losses(self, batch, counts)
        finally:
            hook.remove()

    monkeypatch.setattr(Forward, 'losses', kept)
    method, scale = get_method(name), find_scale('tiny')
    recipe = get_recipe(name, scale, 1.0, changed, stages=[stage])
    state = method.start(recipe, scale, 3)
    run_stages(method, state, world, out, unknown_words=1.0, progress_seconds=None)
    return batches, masks


@pytest.mark.parametrize('name', STAGES)
def test_it_is_what_the_loop_gets(name, world, tmp_path, monkeypatch):
    stage = STAGES[name]
    own = dict(budget_targets=None, steps=1, max_tokens=300, batch_rows=2, accumulation=2)
    changed = [f'stages.{stage}.{key}={value}' for key, value in own.items()]
    batches, masks = given_to_a_step(name, stage, changed, world, tmp_path, monkeypatch)
    seen = see_stage(name, stage=stage, data=world, overrides=changed, seed=3)
    assert len(batches) == 2 and all('pixel_values' in batch for batch in batches)
    for number, (batch, mask) in enumerate(zip(batches, masks)):
        shown = seen.batch(number)
        assert set(shown) == set(batch) and shown['sample_ids'] == batch['sample_ids']
        for key, value in batch.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, shown[key]), key
        rows, tokens = batch['input_ids'].shape
        assert torch.equal(dense_mask(mask, rows, tokens), seen.sees(shown))
    # and the row that travels to the page says the same
    row, ids = seen.row(1, 0), batches[1]
    assert row['tokens']['id'] == ids['input_ids'][0].tolist()
    assert row['tokens']['position'] == ids['position_ids'][0].tolist()
    assert row['tokens']['learnt'] == (ids['labels'][0] != -100).tolist()
    sees = torch.zeros(tokens := len(row['sees']), tokens, dtype=torch.bool)
    for query, runs in enumerate(row['sees']):
        for first, behind in runs:
            sees[query, first:behind] = True
    assert torch.equal(sees, dense_mask(masks[1], *ids['input_ids'].shape)[0])
    later = [dense_mask(m, *b['input_ids'].shape).triu(1).any() for b, m in zip(batches, masks)]
    assert row['bidirectional'] == bool(any(later)) == (name == 'vora')


def test_a_padded_batch_is_what_the_loop_gets(world, tmp_path, monkeypatch):
    own = dict(budget_targets=None, steps=1, batch_rows=3, packing=False, accumulation=1)
    changed = [f'stages.align.{key}={value}' for key, value in own.items()]
    (batch,), (mask,) = given_to_a_step('llava', 'align', changed, world, tmp_path, monkeypatch)
    seen = see_stage('llava', stage='align', data=world, overrides=changed, seed=3)
    assert torch.equal(batch['input_ids'], seen.batch(0)['input_ids'])
    assert torch.equal(dense_mask(mask, *batch['input_ids'].shape), seen.sees(batch))
    assert len(seen.row(0, 2)['documents']) == 1
