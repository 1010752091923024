"""The cost planner against torch's FLOP counter and the memory that tensors really take."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from vlmbench.cost.counter import Meter, Workload, _batch, training_cost
from vlmbench.cost.planner import Data, inference, plan, stage_states
from vlmbench.cost.renting import (
    find_gpu,
    hours,
    micro_batches,
    padded_hours,
    rank_memory,
    renting,
    time_limit,
)
from vlmbench.methods.recipes import find_scale, get_method
from vlmbench.models.vlm import module_groups
from vlmbench.train.metrics import FlopModel
from vlmbench.train.prepare import prepare
from vlmbench.train.recipe import RecipeError, override
from vlmbench.train.scale import get_scale
from vlmbench.train.stages import RunState

TINY = get_scale('tiny')
MID = override(
    TINY,
    dict(
        name='mid',
        like='tiny',
        llm_config=dict(
            model_type='llama',
            hidden_size=256,
            intermediate_size=688,
            num_hidden_layers=6,
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


def really(model, work, precision='fp32', kernel='eager'):
    "(FLOPs, bytes at the peak) of one step of a model with weights, through its own forward pass."
    inputs = inputs_of(model, work, kernel)
    with FlopCounterMode(display=False) as counter:
        peak = measured(model, inputs, precision).peak
    return counter.get_total_flops(), peak


def measured(model, inputs, precision):
    "The memory of a step. Torch's counter of FLOPs, around it, keeps what is recomputed alive."
    with Meter([*model.parameters(), *model.buffers()], 'cpu') as meter:
        hooks = [p.register_post_accumulate_grad_hook(meter.keep_gradient) for p in trained(model)]
        with torch.autocast('cpu', torch.bfloat16, enabled=precision == 'bf16'):
            loss = model.train()(**inputs, use_cache=False).loss
        loss.backward()
    for hook in hooks:
        hook.remove()
    return meter


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def inputs_of(model, work, kernel):
    batch = _batch(model, work, 'cpu')
    flat = torch.arange(work.rows * work.tokens).view(work.rows, work.tokens)
    labels = torch.full((work.rows * work.tokens,), -100)
    labels[flat[:, 1:].flatten()[-work.targets :]] = 3
    documents = (flat % work.tokens >= work.tokens - 3).long()
    model.set_attn_implementation(kernel)
    return dict(
        input_ids=batch['input_ids'],
        pixel_values=batch['pixel_values'],
        labels=labels.view(flat.shape),
        document_ids=documents,
    )


def pair(name, variant, scale, stage):
    "The same prepared stage without and with weights."
    method = get_method(name, variant)
    recipe = method.recipe(scale)
    out = []
    for device in ('meta', 'cpu'):
        state = RunState(recipe, scale, model=scale.weightless(recipe, device=device))
        state.stage = recipe.stage(stage)
        method.before_stage(state)
        prepare(state.model, state.stage)
        out.append(state.model)
    return out


CASES = [
    ('llava', (), 'align'),
    ('llava', (), 'instruct'),
    ('llava', ('llm=lora',), 'instruct'),
    ('zero', (), 'adapt'),
    ('zero', (), 'encoder'),
    ('visual_region', ('where=[2]', 'train_projector=frozen'), 'instruct'),
    ('visual_region', ('tune=full',), 'instruct'),
]


@pytest.mark.parametrize(
    'name,variant,stage', CASES, ids=lambda v: '-'.join(v) if isinstance(v, tuple) else v
)
def test_a_step_costs_what_torch_counts(name, variant, stage):
    meta, real = pair(name, variant, MID, stage)
    work = Workload(4, 160, 6, 64, 64, 60)
    planned = training_cost(meta, work, kernel='eager')
    flops, peak = really(real, work)
    assert planned.flops == flops
    assert planned.peak - planned.weights_bytes - planned.optimizer == pytest.approx(peak, rel=0.05)


@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
@pytest.mark.parametrize('stage', ['align', 'instruct'])
def test_memory_of_the_fused_kernel_and_of_mixed_precision(precision, stage):
    meta, real = pair('llava', (), TINY, stage)
    work = Workload(4, 160, 4, 64, 64, 60)
    planned = training_cost(meta, work, precision=precision)
    assert planned.peak - planned.weights_bytes - planned.optimizer == pytest.approx(
        really(real, work, precision, 'sdpa')[1], rel=0.05
    )


def test_checkpointing_trades_memory_for_one_more_forward_pass_of_the_blocks():
    work, costs = Workload(4, 160, 6, 64, 64, 60), []
    for on in (False, True):
        model, _ = pair('llava', (), MID, 'instruct')
        if on:
            model.gradient_checkpointing_enable(dict(use_reentrant=False))
        costs.append(training_cost(model, work))
    plain, saved = costs
    assert plain.recomputed == 0 and saved.activations < 0.5 * plain.activations
    blocks = plain.parts['layers']['forward']
    assert (
        0.7 * blocks < saved.recomputed <= blocks
    )  # it stops early: the last product is not needed
    assert (saved.forward, saved.inputs, saved.weights) == (
        plain.forward,
        plain.inputs,
        plain.weights,
    )


@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
@pytest.mark.parametrize('variant', [(), ('llm=lora',)], ids=['full', 'lora'])
def test_memory_under_recomputation_is_that_of_a_step(precision, variant):
    "Few targets and many tokens: the states between blocks decide, as at published size."
    meta, real = pair('llava', variant, MID, 'instruct')
    for model in (meta, real):
        model.gradient_checkpointing_enable(dict(use_reentrant=False))
    work = Workload(8, 320, 16, 64, 64, 60)
    planned = training_cost(meta, work, precision=precision)
    assert planned.recomputed > 0
    step = measured(real, inputs_of(real, work, 'sdpa'), precision)
    assert planned.peak - planned.weights_bytes - planned.optimizer == pytest.approx(
        step.peak, rel=0.05
    )
    assert planned.working == pytest.approx(step.working, rel=0.05)


def test_gathered_weights_leave_states_in_bf16_between_blocks():
    "As a step of a model stored in bf16, which is what FSDP gathers; fp32 weights take more."
    meta, real = pair('llava', (), MID, 'instruct')
    for model in (meta, real):
        model.gradient_checkpointing_enable(dict(use_reentrant=False))
    work = Workload(8, 320, 16, 64, 64, 60)
    wide, narrow = (
        training_cost(meta, work, precision='bf16', gathered=gathered) for gathered in (False, True)
    )
    assert narrow.flops == wide.flops
    real.to(torch.bfloat16)
    step = measured(real, inputs_of(real, work, 'sdpa'), 'bf16')
    # the plan holds a gradient in fp32 for a moment before it counts as finished
    assert narrow.working == pytest.approx(step.working, rel=0.1)
    assert narrow.activations < 0.7 * wide.activations


def test_accumulated_gradients_wait_through_the_next_forward_pass():
    model, _ = pair('llava', (), MID, 'instruct')
    once, again = (
        training_cost(model, Workload(2, 160, 2, 64, 64, 30), accumulates=a) for a in (False, True)
    )
    assert once.flops == again.flops and once.peak < again.peak <= once.peak + again.gradients
    assert once.activations == again.activations


def test_back_propagation_stops_at_the_lowest_trained_layer():
    work, depth = Workload(2, 96, 2, 64, 64, 30), 6
    inputs = [
        training_cost(
            pair(
                'visual_region',
                (f'where=[{i}]', 'train_projector=frozen', 'tune=full'),
                MID,
                'instruct',
            )[0],
            work,
        ).inputs
        for i in range(depth)
    ]
    steps = {a - b for a, b in zip(inputs[1:], inputs[2:])}
    assert len(steps) == 1 and inputs == sorted(
        inputs, reverse=True
    )  # one layer less, the same FLOPs less


def test_frozen_base_weights_get_no_gradient_but_adapters_do():
    full, low = (
        training_cost(pair('llava', v, MID, 'instruct')[0], Workload(2, 96, 2, 64, 64, 30))
        for v in ((), ('llm=lora',))
    )
    assert (
        low.weights < 0.2 * full.weights
        and low.forward > full.forward
        and low.optimizer < 0.3 * full.optimizer
    )


@pytest.mark.parametrize('name', ['llava', 'vip_llava', 'eve', 'vora', 'zero', 'visual_region'])
def test_every_recipe_is_planned_at_the_embedded_scale(name):
    table, answer = plan(name, 'tiny'), inference(name, 'tiny')
    assert (table[['forward', 'activations', 'total', 'trained']] > 0).all().all()
    assert (table.peak >= table.weights_bytes + table.optimizer).all()
    assert answer.total > answer.prefill > answer.per_token > 0


def test_both_patch_embeddings_are_planned():
    v2 = plan('eve', 'tiny', ['patches=eve_v2', 'align=False'])
    assert v2.stage.tolist() == ['prealign', 'pretrain', 'finetune'] and (v2.forward > 0).all()
    assert inference('eve', 'paper', ['patches=eve_v2', 'align=False']).image_tokens == 1 + 25 * 26


def test_a_teacher_costs_in_training_only():
    with_teacher, without = (
        plan('vora', 'tiny', v).set_index('stage') for v in ((), ('distill=none',))
    )
    assert with_teacher.forward['pretrain'] > without.forward['pretrain']
    assert with_teacher.parameters['pretrain'] > without.parameters['pretrain']
    assert (
        inference('vora', 'tiny').parameters
        == inference('vora', 'tiny', ('distill=none',)).parameters
    )


def test_what_was_grafted_answers_with_every_layer():
    surrogate, whole = plan('zero', 'tiny').parameters[0], inference('zero', 'tiny').parameters
    assert whole == inference('zero', 'tiny', ('ranges=()',)).parameters > surrogate
    kept = inference('zero', 'tiny', ('grafts=False',)).parameters
    assert kept == surrogate


def test_published_sizes_without_weights():
    scale = 'llama-3.1-70b'
    method = get_method('zero', ('stages=("adapt","encoder","decoder")',))
    recipe = method.recipe(find_scale(scale))
    sizes = [
        sum(p.numel() for p in state.model.model.language_model.parameters())
        + sum(p.numel() for p in state.model.lm_head.parameters())
        for state, prepared in stage_states(method, recipe, find_scale(scale))
        if prepared is not None
    ]
    assert [round(s / 1e9, 2) for s in sizes] == [38.04, 38.04, 70.55]


def test_every_published_training_recomputes_its_blocks():
    for name in ('llava', 'vip_llava', 'eve', 'vora', 'zero', 'visual_region'):
        method = get_method(name)
        for scale in ({'paper': get_scale('paper')} | method.scales).values():
            off = [s.name for s in method.recipe(scale).stages if not s.gradient_checkpointing]
            assert not off, f'{name} at {scale.name}: {off}'


def test_bad_input_is_refused():
    for call, words in (
        (lambda: plan('llava', 'tiny', ranks=0), 'ranks'),
        (lambda: plan('llava', 'huge'), 'unknown scale'),
        (lambda: plan('llava', 'tiny', ['r=3']), 'no option'),
        (lambda: Data(targets=0.0), 'no target token'),
        (lambda: inference('eve', 'tiny', size=(60, 60)), 'multiple'),
        (
            lambda: plan('llava', 'tiny', overrides=['stages.align.losses=["x"]']),
            "declares loss 'x', which llava does not make; it makes none",
        ),
    ):
        with pytest.raises(RecipeError, match=words):
            call()
    with pytest.raises(ValueError, match='at least 1'):
        Workload(0, 4)


@pytest.mark.parametrize(
    'name,variant,lora_',
    [
        ('llava', (), False),
        ('llava', ('llm=lora',), True),
        ('visual_region', ('tune=full', 'train_projector=frozen', 'where=[2, 3]'), False),
        ('visual_region', ('train_projector=frozen', 'where=[4]'), True),
    ],
)
def test_the_meter_of_a_run_and_the_planner_count_the_same_text(name, variant, lora_):
    """Rows of text without a picture, every key allowed (the planner counts whole rows, a run's
    meter the pairs that a mask leaves): not an operation apart. Of the lowest block that LoRA
    adapts the meter takes the way back as a whole, though no gradient leaves it."""
    recipe, work = get_method(name, variant).recipe(MID), Workload(3, 40, targets=30)
    model, stage = MID.weightless(recipe), recipe.stage('instruct')
    groups = module_groups(model)
    meter = FlopModel(prepare(model, stage, groups), groups)
    cost = training_cost(model, work, kernel='eager')
    step = meter.step(dict(tokens=3 * 40, targets=work.targets, pairs=3 * 40 * 40))
    assert (step.forward, step.weights) == (cost.forward, cost.weights)
    block = cost.parts['layers']['forward'] // MID.llm_config['num_hidden_layers']
    assert 0 <= step.inputs - cost.inputs < (block if lora_ else 1)


def test_states_of_a_rank_fall_as_one_over_ranks():
    stages = plan('llava', 'tiny').assign(ranks=1)
    for row in stages.itertuples():
        states = [rank_memory(row, 'fsdp', ranks)['states'] for ranks in (1, 2, 4, 16)]
        assert states == pytest.approx([states[0] / n for n in (1, 2, 4, 16)])
        kept = {rank_memory(row, 'ddp', ranks)['states'] for ranks in (2, 16)}
        assert len(kept) == 1
        assert rank_memory(row, 'hsdp', 16)['states'] == pytest.approx(states[0] / 8)


def test_gradients_wait_in_shards_between_micro_batches():
    row = plan('llava', 'tiny').assign(ranks=1).iloc[1]
    several = row.copy()
    several['micro'] = 16
    assert rank_memory(several, 'fsdp', 4)['states'] == rank_memory(row, 'fsdp', 4)['states']
    whole = rank_memory(several, 'ddp', 4)['working']
    assert whole >= row.gradients + row.working


def test_a_step_of_published_size_is_cut_for_more_ranks():
    row = plan('llava', 'tiny').assign(ranks=2, bound=True, micro=4).iloc[1]
    assert [micro_batches(row, ranks) for ranks in (1, 2, 8, 16)] == [8, 4, 1, 0]


def test_a_price_and_a_share_of_the_peak_must_be_possible():
    stages = plan('llava', 'tiny')
    for given, words in ((dict(price=-1), 'price'), (dict(mfu=0), 'share of the peak')):
        with pytest.raises(RecipeError, match=words):
            renting(stages, 'h100', **given)
    with pytest.raises(RecipeError, match='unknown GPU'):
        renting(stages, 'h1000')


def test_the_time_to_ask_for_covers_the_padding():
    "Zero's rows leave so much padding that a limit for full rows would end the job early."
    stages = plan('zero', 'llama-3.1-8b', ranks=16)
    found = find_gpu('a100-40')
    padded = padded_hours(stages, found, 16).sum()
    assert padded > 1.5 * hours(stages, found, 16).sum()
    assert time_limit(padded) in renting(stages, 'a100-40', 16)
