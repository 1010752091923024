"""What the layer tools refuse, and that the message says what to do: depth, analysis and the
recipes built on them."""

import pytest
import torch

from depth_models import batch, decoder
from vlmbench.analysis.ablation import (
    answer_loss,
    drop_one,
    gradient_scores,
    greedy_drop,
    revert_one,
)
from vlmbench.analysis.importance import BlockInfluence, agreement, iterative_prune_order, region
from vlmbench.analysis.similarity import full_attentions
from vlmbench.analysis.streams import scores, stream
from vlmbench.analysis.weights import lora_update, parameter_change
from vlmbench.methods.recipes import get_method
from vlmbench.analysis.prune import prune_outside
from vlmbench.models.depth import build_surrogate, prune, slice_layers, surrogate_map
from vlmbench.train.recipe import RecipeError
from vlmbench.train.scale import get_scale

MODEL, BATCH = decoder(), batch()
UNLABELLED = {k: v for k, v in BATCH.items() if k != 'labels'}
MASKED = BATCH | dict(labels=torch.full_like(BATCH['labels'], -100))


def recipe(name, *variant):
    return get_method(name, variant).recipe(get_scale('tiny'))


RANGES = [
    ([range(4, 7)], 'leaves the decoder, which has layers 0..5'),
    ([range(-1, 2)], 'leaves the decoder'),
    ([[1, 2, 3], [3, 4]], r'layers \[3\] are in two ranges'),
    ([[1, 2], [1, 2]], 'are in two ranges'),
    ([[1, 3]], 'not consecutive'),
    ([[2]], 'at least 2'),
    ([], 'at least one range'),
    ([1, 2], 'list of ranges'),
]


@pytest.mark.parametrize('ranges,says', RANGES)
def test_ranges_out_of_bounds_or_overlapping(ranges, says):
    with pytest.raises(ValueError, match=says):
        surrogate_map(6, ranges)
    with pytest.raises(ValueError, match=says):
        build_surrogate(MODEL, ranges)


@pytest.mark.parametrize(
    'call,says',
    [
        (lambda: region('top', 7, 6), 'k=7 layers cannot be chosen from a decoder of 6'),
        (lambda: region([0.1] * 6, 7), 'k=7'),
        (lambda: region('top', 1.5, 6), r'share of the layers must lie in \(0, 1\]'),
        (lambda: greedy_drop(MODEL, [BATCH], 5), 'k=5 layers cannot be removed: 4 of 6'),
        (
            lambda: iterative_prune_order(MODEL, [BATCH], 5, [0, 1]),
            'k=5: only 4 layers lie outside',
        ),
        (lambda: prune_outside(MODEL, [0, 1], 5, [BATCH]), 'k=5: only 4 layers lie outside'),
        (lambda: prune(MODEL, range(6)), 'at least one must stay'),
        (lambda: prune(MODEL, [6]), 'layer 6 does not exist'),
        (lambda: slice_layers(MODEL, [0, 0]), 'listed twice'),
        (lambda: drop_one(MODEL, [BATCH], [7]), 'layer 7 does not exist'),
        (lambda: gradient_scores(MODEL, [BATCH], layers=[-1]), 'layer -1 does not exist'),
    ],
)
def test_more_layers_than_there_are(call, says):
    with pytest.raises(ValueError, match=says):
        call()


@pytest.mark.parametrize(
    'call,says',
    [
        (
            lambda: recipe('visual_region', 'share=9'),
            'k=9 layers cannot be chosen from a decoder of 8',
        ),
        (lambda: recipe('visual_region', 'where=[1,8]'), 'layer 8 does not exist'),
        (lambda: recipe('visual_region', 'where=[1,1]'), 'listed twice'),
        (lambda: recipe('visual_region', 'where=middle'), 'unknown strategy'),
        (
            lambda: recipe('zero', 'ranges=[[4,5,6,7,8]]'),
            'leaves the decoder, which has layers 0..7',
        ),
        (lambda: recipe('zero', 'ranges=[[2,3],[3,4]]'), 'are in two ranges'),
    ],
)
def test_recipes_pass_the_reason_on(call, says):
    with pytest.raises(RecipeError, match=says):
        call()


@pytest.mark.parametrize('data', [UNLABELLED, MASKED], ids=['no labels', 'every label -100'])
@pytest.mark.parametrize(
    'measure',
    [
        lambda b: stream(MODEL, [b], [BlockInfluence(['answer'])]),
        lambda b: answer_loss(MODEL, [b]),
        lambda b: drop_one(MODEL, [b]),
        lambda b: greedy_drop(MODEL, [b], 1),
        lambda b: gradient_scores(MODEL, [b]),
        lambda b: revert_one(MODEL, decoder(), [b]),
    ],
    ids=['stream', 'loss', 'drop one', 'greedy', 'gradients', 'revert'],
)
def test_a_metric_that_needs_labels(measure, data):
    with pytest.raises(ValueError, match="label|no token of set 'answer'"):
        measure(data)


def test_attentions_that_sdpa_does_not_return():
    assert MODEL.config._attn_implementation == 'sdpa'
    with pytest.raises(ValueError, match="set_attn_implementation\\('eager'\\)"):
        full_attentions(MODEL, BATCH)
    with pytest.raises(ValueError, match='ImageAttention'):
        stream(MODEL, [BATCH | dict(output_attentions=True)], [BlockInfluence()])


@pytest.mark.parametrize(
    'other,says',
    [
        (lambda: decoder(5), '6 layers against 5'),
        (lambda: decoder(seed=3), 'median cosine'),
        (lambda: decoder(intermediate_size=32), r'is \(24, 16\) against \(32, 16\)'),
        (lambda: decoder(attention_bias=True), 'differs in'),
    ],
    ids=['depth', 'weights', 'shape', 'names'],
)
def test_checkpoints_of_different_bases(other, says):
    with pytest.raises(ValueError, match=f'different bases.*{says}'):
        parameter_change(MODEL, other())
    with pytest.raises(ValueError, match=f'different bases.*{says}'):
        revert_one(MODEL, other(), [BATCH])


def test_scores_that_were_not_measured_or_do_not_match():
    frame = stream(MODEL, [BATCH], [BlockInfluence()]).frame
    with pytest.raises(ValueError, match='the frame holds'):
        scores(frame, 'block_influence', 'nothing')
    a = scores(frame, 'block_influence')
    with pytest.raises(ValueError, match='score different layers'):
        agreement(dict(a=a, b=a.drop(2)), 2)
    with pytest.raises(ValueError, match='have no score'):
        region(a.where(a.index != 1), 2)
    with pytest.raises(ValueError, match='no LoRA factors'):
        lora_update(MODEL)
