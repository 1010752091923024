"""The patch aligning layer: geometry, equality with a per-image reading of the paper, gradients,
bad input."""

from types import SimpleNamespace as NS

import pytest
import torch
from torch.nn.functional import avg_pool2d, cosine_similarity
from transformers import CLIPVisionConfig, CLIPVisionModel

from vlmbench.distill.align import PatchAligner, grid_ratio, tap_layers

VIT, IMAGE = (
    dict(
        hidden_size=16,
        intermediate_size=20,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=12,
        patch_size=3,
    ),
    9,
)


def make(ratio=1, **more):
    torch.manual_seed(0)
    return PatchAligner(24, 8, CLIPVisionModel(CLIPVisionConfig(**VIT)), IMAGE, 3, ratio, **more)


def inputs(grids, side):
    ids = torch.zeros(len(grids), 3 + max(1 + h * (w + 1) for h, w in grids), dtype=torch.long)
    for r, (h, w) in enumerate(grids):
        ids[r, r + 1 : r + 2 + h * (w + 1)] = IMAGE
    sizes = torch.tensor(grids) * 3
    return [torch.randn(*ids.shape, 24, requires_grad=True) for _ in range(9)], dict(
        input_ids=ids, image_sizes=sizes, pixel_values=torch.randn(len(grids), 3, side, side)
    )


def by_hand(a, states, ids, grid, row):
    """The student of one image, written as the paper does: reshape, drop the split column, pool,
    attend over layers."""
    h, w = grid
    at = (ids[row] == IMAGE).nonzero()[1:, 0]
    maps = [states[t][row, at].reshape(h, w + 1, -1)[:, :w].permute(2, 0, 1) for t in a.taps]
    maps = [avg_pool2d(m[None], a.ratio)[0].flatten(1).T for m in maps]
    u = [p(n(m)) for m, n, p in zip(maps, a.norms, a.projections)]
    q, k = (
        u[0].reshape(len(u[0]), a.heads, -1),
        torch.stack(u[1:]).reshape(len(u) - 1, len(u[0]), a.heads, -1),
    )
    weights = ((q * k).sum(-1) * VIT['hidden_size'] ** -0.5).softmax(0)
    return a.input_layer(maps[0]) + a.output_layer((weights[..., None] * k).sum(0).flatten(1))


@pytest.mark.parametrize(
    'ratio, grids', [(1, [(2, 4), (4, 4), (4, 1)]), (2, [(8, 8), (2, 8), (8, 4)])]
)
def test_equals_a_loop_over_images(ratio, grids):
    a = make(ratio)
    states, batch = inputs(grids, 12 * ratio)
    want = [by_hand(a, states, batch['input_ids'], g, r) for r, g in enumerate(grids)]
    torch.testing.assert_close(
        a.student_features(states, batch), torch.cat(want), atol=1e-5, rtol=0
    )
    teacher = (
        a.teacher(a.teacher_view(batch), output_hidden_states=True)
        .hidden_states[-2][:, 1:]
        .unflatten(1, (4, 4))
    )
    for r, (h, w) in enumerate(grids):
        h, w = h // ratio, w // ratio
        t = teacher[r, (4 - h) // 2 : (4 - h) // 2 + h, (4 - w) // 2 : (4 - w) // 2 + w].flatten(
            0, 1
        )
        torch.testing.assert_close(
            a.losses(states, batch)[r], 1 - cosine_similarity(want[r], t).mean(), atol=1e-5, rtol=0
        )


def test_the_teacher_sees_the_students_picture_in_the_middle():
    a = make()
    _, batch = inputs([(2, 4)], 12)
    view = a.teacher_view(batch)
    torch.testing.assert_close(view[0, :, 3:9], batch['pixel_values'][0, :, :6], atol=1e-5, rtol=0)
    assert (view[0, :, :3] == view[0, :, 9:]).all() and view[
        0, :, 0, 0
    ].abs().max() < 0.02  # the mean colour
    ready = torch.randn(1, 3, 12, 12)
    assert a.teacher_view(batch | dict(teacher_values=ready)) is ready


def test_teacher_is_frozen_and_stays_in_evaluation_mode():
    a = make().train()
    states, batch = inputs([(4, 4)], 12)
    a(NS(hidden_states=states), batch).backward()
    assert not a.teacher.training and all(p.grad is None for p in a.teacher.parameters())
    assert all(p.grad is not None for n, p in a.named_parameters() if not n.startswith('teacher.'))
    assert a.count(batch) == 1 and a.count(dict(input_ids=batch['input_ids'])) == 0


def test_bad_input():
    with pytest.raises(ValueError, match='positive interval'):
        tap_layers(8, 0)
    with pytest.raises(ValueError, match='choose at most 8'):
        tap_layers(8, 9)
    with pytest.raises(ValueError, match='teacher grid not matching'):
        grid_ratio(15, 3, CLIPVisionConfig(**VIT))
    with pytest.raises(ValueError, match='no multiple of the stride'):
        grid_ratio(13, 3, CLIPVisionConfig(**VIT))
    with pytest.raises(ValueError, match='heads=5'):
        make(heads=5)
    with pytest.raises(ValueError, match='hidden states 0..3'):
        make(select_layer=7)
    a = make(2)
    with pytest.raises(ValueError, match='teacher grid not matching'):
        a.layout(inputs([(3, 4)], 24)[1])
    with pytest.raises(ValueError, match='exceeds'):
        a.layout(inputs([(10, 4)], 48)[1])
