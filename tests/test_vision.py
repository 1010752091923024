"""The encoder front end over several towers: counts, layer selection, sizes, gradients."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    Aimv2VisionConfig,
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    SiglipVisionConfig,
    SwinConfig,
    ViTConfig,
)

from vlmbench.models.vision import (
    FRONT_ENDS,
    FrontEnd,
    Projector,
    backbone_dict,
    build_front_end,
    num_image_tokens,
    num_prefix_tokens,
    patch_grid,
    tower_config,
)

SMALL = dict(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=2,
    image_size=24,
    patch_size=8,
)
TOWERS = dict(
    clip=CLIPVisionConfig(**SMALL),
    siglip=SiglipVisionConfig(**SMALL),
    aimv2=Aimv2VisionConfig(**SMALL),
    aimv2_native=Aimv2VisionConfig(**SMALL, is_native=True),
    dinov2=Dinov2Config(**SMALL),
    registers=Dinov2WithRegistersConfig(**SMALL, num_register_tokens=2),
    vit=ViTConfig(**SMALL),
)
PREFIX = dict(clip=1, siglip=0, aimv2=0, aimv2_native=0, dinov2=1, registers=3, vit=1)

OPTIONS = [(c, b, s) for c, b, s in itertools.product((0, 1), (0, 1), (1, 3)) if not (c and s > 1)]


def front(tower, hidden=12, **settings):
    torch.manual_seed(0)
    return build_front_end(
        dict(type='encoder', backbone=backbone_dict(TOWERS[tower]), **settings), hidden
    ).eval()


@pytest.mark.parametrize('tower', TOWERS)
def test_prefix_tokens_are_found(tower):
    assert num_prefix_tokens(TOWERS[tower]) == PREFIX[tower]


@pytest.mark.parametrize('tower', TOWERS)
@pytest.mark.parametrize('keep_cls, boundary, shuffle', OPTIONS)
def test_count_is_what_forward_returns(tower, keep_cls, boundary, shuffle):
    fe = front(tower, keep_cls=bool(keep_cls), boundary=bool(boundary), pixel_shuffle=shuffle)
    features, counts = fe(torch.randn(2, 3, 24, 24))
    expected = 9 // shuffle**2 + keep_cls * PREFIX[tower] + 2 * boundary
    assert counts.tolist() == [expected] * 2 and features.shape == (2 * expected, 12)
    assert fe.num_tokens(24, 24) == num_image_tokens(fe.config, 24, 24) == expected


@pytest.mark.parametrize('tower', TOWERS)
def test_selected_states_are_the_residual_stream(tower):
    """Hidden state i is the output of block i; the last one is taken before the final norm, and
    post_layernorm applies exactly that norm."""
    pixels, seen = torch.randn(2, 3, 24, 24), []
    fe = front(tower, select_layers=[-1, 1, 0], keep_cls=True)
    depth = TOWERS[tower].num_hidden_layers
    blocks = next(
        m for m in fe.tower.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == depth
    )
    for b in blocks:
        b.register_forward_hook(
            lambda m, i, o: seen.append((i[0], o[0] if isinstance(o, tuple) else o))
        )
    with torch.no_grad():
        got = fe.select(pixels)
        assert torch.equal(got, torch.cat([seen[depth - 1][1], seen[0][1], seen[0][0]], -1))
        normed = front(tower, select_layers=[-1], keep_cls=True, post_layernorm=True)
        norm = getattr(normed.tower, normed.post_norm_name)
        assert torch.allclose(normed.select(pixels), norm(seen[depth - 1][1]), atol=1e-6)


def test_order_of_layers_is_kept():
    pixels = torch.randn(1, 3, 24, 24)
    ab, ba = (
        front('clip', select_layers=[1, 2]).select(pixels),
        front('clip', select_layers=[2, 1]).select(pixels),
    )
    assert torch.equal(ab, torch.cat(ba.chunk(2, -1)[::-1], -1)) and not torch.equal(ab, ba)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(8, 40), st.integers(8, 40)), min_size=1, max_size=4),
    st.sampled_from(['clip', 'siglip', 'aimv2_native', 'dinov2']),
)
def test_any_mix_of_sizes_equals_one_by_one(sizes, tower):
    fe = front(tower, boundary=True)
    g = torch.Generator().manual_seed(len(sizes))
    images = [torch.randn(3, h, w, generator=g) for h, w in sizes]
    H, W = max(h for h, _ in sizes), max(w for _, w in sizes)
    canvas = torch.stack(
        [torch.nn.functional.pad(i, (0, W - i.shape[2], 0, H - i.shape[1])) for i in images]
    )
    with torch.no_grad():
        together, counts = fe(canvas, torch.tensor(sizes))
        alone = [fe(i[None]) for i in images]
    assert counts.tolist() == [int(c) for _, c in alone] == [fe.num_tokens(h, w) for h, w in sizes]
    assert torch.allclose(together, torch.cat([f for f, _ in alone]), atol=1e-5)


def test_size_the_tower_cannot_take():
    with pytest.raises(
        ValueError, match='Aimv2VisionModel could not encode 32x24 pixels, its native size is 24x24'
    ):
        front('aimv2')(torch.randn(1, 3, 32, 24))
    with pytest.raises(ValueError, match='larger than the pixel tensor'):
        front('clip')(torch.randn(1, 3, 24, 24), torch.tensor([[32, 24]]))
    with pytest.raises(ValueError, match='2 images, but image_sizes has 1'):
        front('clip')(torch.randn(2, 3, 24, 24), torch.tensor([[24, 24]]))


def test_errors_inside_the_tower_at_its_own_size_are_not_rephrased():
    with pytest.raises(RuntimeError):
        front('clip')(torch.randn(1, 5, 24, 24))


@pytest.mark.parametrize('norm_trains', [False, True])
def test_frozen_tower_keeps_no_graph(norm_trains):
    fe = front('clip', select_layers=[-1], post_layernorm=True).train()
    fe.tower.requires_grad_(False)
    fe.tower.post_layernorm.requires_grad_(norm_trains)
    graph = []
    fe.tower.encoder.layers[0].register_forward_hook(
        lambda m, i, o: graph.append(torch.is_grad_enabled())
    )
    fe(torch.randn(1, 3, 24, 24))[0].sum().backward()
    assert graph == [False]
    assert (fe.tower.post_layernorm.weight.grad is not None) == norm_trains
    assert all(p.grad is not None for p in fe.projector.parameters())


def test_gradient_reaches_the_pixels_through_a_frozen_tower():
    fe = front('siglip').train()
    fe.tower.requires_grad_(False)
    pixels = torch.randn(1, 3, 24, 24, requires_grad=True)
    fe(pixels)[0].sum().backward()
    assert pixels.grad.abs().sum() > 0


def test_half_frozen_tower():
    fe = front('clip', select_layers=[-1]).train()
    fe.tower.requires_grad_(False)
    fe.tower.encoder.layers[2].requires_grad_(True)
    fe(torch.randn(1, 3, 24, 24))[0].sum().backward()
    assert {
        n.split('.')[3]
        for n, p in fe.named_parameters()
        if n.startswith('tower.encoder') and p.grad is not None
    } == {'2'}


def test_boundary_vectors_wrap_every_image():
    fe = front('clip', boundary=True)
    with torch.no_grad():
        features = fe(torch.randn(2, 3, 24, 24))[0].view(2, 11, 12)
    assert torch.equal(features[:, 0], fe.soi.expand(2, -1)) and torch.equal(
        features[:, -1], fe.eoi.expand(2, -1)
    )
    wide = front('clip', hidden=4096, boundary=True)
    assert abs(wide.soi.std() * 4096**0.5 - 1) < 0.1  # N(0, 1 / hidden)


@pytest.mark.parametrize(
    'kind, layers', [('linear', 1), ('mlp1x_gelu', 1), ('mlp2x_gelu', 2), ('mlp4x_gelu', 4)]
)
def test_projectors(kind, layers):
    p = Projector(kind, 6, 5)
    linears = [m for m in p.modules() if isinstance(m, torch.nn.Linear)]
    assert [m.in_features for m in linears] == [6] + [5] * (layers - 1) and p(
        torch.zeros(2, 6)
    ).shape == (2, 5)
    x = torch.randn(3, 6)
    y = linears[0](x)
    for m in linears[1:]:
        y = m(torch.nn.functional.gelu(y))
    assert torch.equal(p(x), y)


@pytest.mark.parametrize(
    'bad, message',
    [
        (dict(projector='mlp0x_gelu'), 'mlpNx_gelu'),
        (dict(projector='mlp2x_gelux'), 'mlpNx_gelu'),
        (dict(projector='identity'), '16 -> 12'),
        (dict(select_layers=[4]), r'hidden states -4..3'),
        (dict(select_layers=[]), 'select_layers'),
        (dict(pixel_shuffle=0), 'pixel_shuffle'),
        (dict(pixel_shuffle=3, keep_cls=True), 'keep_cls must be False'),
        (dict(selectlayers=[1]), "no setting 'selectlayers'"),
        (dict(type='Encoder'), "unknown vision front end 'Encoder'"),
    ],
)
def test_bad_settings_are_named(bad, message):
    with pytest.raises(ValueError, match=message):
        build_front_end({**dict(type='encoder', backbone=backbone_dict(TOWERS['clip'])), **bad}, 12)


def test_bad_backbones_are_named():
    with pytest.raises(ValueError, match="needs 'model_type'"):
        tower_config(dict(hidden_size=4))
    swin = SwinConfig(
        image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 1], window_size=4
    )
    with pytest.raises(ValueError, match='swin'):
        num_prefix_tokens(swin)
    with pytest.raises(ValueError, match='no patch_size'):
        tower_config(dict(model_type='llama'))
    with pytest.raises(ValueError, match='does not divide'):
        front('clip', pixel_shuffle=2).num_tokens(24, 24)
    with pytest.raises(ValueError, match='smaller than one 8x8 patch'):
        patch_grid(TOWERS['clip'], 7, 24)


def test_a_method_adds_its_front_end_by_exact_name():
    class Mean(FrontEnd):
        "One token per image: the mean of its valid pixels, four channels."

        defaults = dict(scale=1.0)
        projector_parts = ('out',)

        def __init__(self, config, hidden_size):
            super().__init__(config, hidden_size)
            self.out = torch.nn.Linear(4, hidden_size)

        @classmethod
        def count(cls, config, height, width):
            return 1

        def forward(self, pixel_values, image_sizes=None):
            sizes = (
                [pixel_values.shape[-2:]] * len(pixel_values)
                if image_sizes is None
                else image_sizes.tolist()
            )
            x = torch.stack([p[:, :h, :w].mean((1, 2)) for p, (h, w) in zip(pixel_values, sizes)])
            return self.out(x * self.config['scale']), torch.ones(len(x), dtype=torch.long)

    FRONT_ENDS.register('mean', Mean)
    try:
        fe = build_front_end(dict(type='mean', scale=2.0), 8)
        features, counts = fe(torch.randn(2, 4, 9, 9), torch.tensor([[9, 9], [3, 5]]))
        assert (
            features.shape == (2, 8)
            and fe.num_tokens(9, 9) == 1
            and fe.config == dict(type='mean', scale=2.0)
        )
        with pytest.raises(ValueError, match="no setting 'size'"):
            build_front_end(dict(type='mean', size=2), 8)
    finally:
        FRONT_ENDS.made_here.pop('mean')
