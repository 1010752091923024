"""The ViP-LLaVA recipe: rates, freeze table, fused layers, published sizes, markers in the training
data."""

from types import SimpleNamespace

import pytest
import torch

from vlmbench.checkpoints.licences import weights_licences
from vlmbench.cost.planner import plan
from vlmbench.data.record import Region, Sample, Turn
from vlmbench.methods.recipes import METHODS, find_scale, get_method, get_recipe
from vlmbench.methods.vip_llava import (
    FEATURE_LAYERS,
    PAPER_SCALES,
    ViPLLaVA,
    feature_layers,
    front_end,
)
from vlmbench.train.recipe import RecipeError
from vlmbench.train.scale import get_scale
from vlmbench.train.stages import RunState, stage_processor


def test_registered():
    assert 'vip_llava' in METHODS.offered() and get_method('vip_llava') == ViPLLaVA()


@pytest.mark.parametrize(
    'name,size',
    [
        ('vicuna-7b', 37_767_168),
        ('llama-3-8b', 37_767_168),
        ('vicuna-13b', 52_449_280),
        ('phi-3-mini', 25_182_208),
    ],
)
def test_published_projector_sizes(name, size):
    "LayerNorm over five states of the tower, and two linear layers into the embedding space."
    scale = PAPER_SCALES[name]
    fused, width = 5 * scale.tower_config.hidden_size, scale.decoder_config.hidden_size
    assert 2 * fused + (fused + 1) * width + (width + 1) * width == size


def test_paper_recipe():
    r = ViPLLaVA().recipe(get_scale('paper'))
    assert [s.lr for s in r.stages] == [1e-3, 2e-5, 2e-7] and [s.template for s in r.stages] == [
        'llava_plain',
        'llava_v1',
        'llava_v1',
    ]
    assert (
        r.front_end['select_layers'] == list(FEATURE_LAYERS)
        and r.front_end['projector_norm'] is True
    )
    trained = [[g for g, t in s.trains.items() if t.trains] for s in r.stages]
    assert trained == [['projector']] + [['projector', 'embed', 'layers', 'norm', 'lm_head']] * 2
    l = ViPLLaVA(llm='lora').recipe(get_scale('paper')).stage('region')
    assert (l.trains['layers'].r, l.trains['layers'].alpha, l.trains['layers'].dropout) == (
        128,
        256,
        0.05,
    )
    assert (l.lr_of('layers'), l.lr_of('projector'), l.lr_of('embed')) == (2e-4, 2e-5, None)
    with pytest.raises(RecipeError, match="option 'llm' must be .*'full', 'lora'.*, got 'both'"):
        ViPLLaVA(llm='both').recipe(get_scale('tiny'))


@pytest.mark.parametrize('name', PAPER_SCALES)
@pytest.mark.parametrize('variant', [[], ['llm=lora'], ['load=4bit']])
def test_paper_stages_train_as_published(name, variant):
    "Single samples, cut at 2048 tokens, blocks recomputed; the published mixtures as they are."
    r = get_recipe('vip_llava', find_scale(f'vip_llava:{name}'), variant=variant)
    assert {
        (s.packing, s.too_long, s.max_tokens, s.gradient_checkpointing, s.grouping)
        for s in r.stages
    } == {(False, 'truncate', 2048, True, None)}
    assert [s.data for s in r.stages] == [
        'blip_laion_cc_sbu_558k',
        'vip-llava_stage2_mix',
        'vip-llava_stage3_mix',
    ]
    assert [(s.epochs, s.global_rows) for s in r.stages] == [(1, 256), (1, 128), (1, 128)]
    tiny = ViPLLaVA().recipe(get_scale('tiny'))
    assert {s.packing for s in tiny.stages} == {True}
    assert not tiny.stages[0].gradient_checkpointing


@pytest.mark.parametrize(
    'scale,variant,modes',
    [
        ('paper', [], ['crop', 'pad', 'pad']),
        ('vip_llava:llama-3-8b', [], ['crop', 'pad', 'pad']),
        ('paper', ['pictures=pad'], ['pad'] * 3),
        ('tiny', [], ['squash'] * 3),
        ('tiny', ['pictures=crop'], ['crop', 'squash', 'squash']),
    ],
)
def test_the_first_stage_fits_pictures_its_own_way(scale, variant, modes):
    "Published: cropped in stage one, padded later. The processor that was given is never changed."
    from vlmbench.data.image import ImageTransform

    scale, method = find_scale(scale), get_method('vip_llava', variant)
    given = SimpleNamespace(transform=ImageTransform(scale.image_mode, scale.image_size))
    state, seen = RunState(method.recipe(scale), scale, processor=given), []
    for state.stage in state.recipe.stages:
        method.before_stage(state)
        processor = stage_processor(state)
        seen.append(processor.transform.mode)
        assert state.processor is given
    assert (
        seen == modes
        and given.transform.mode == scale.image_mode
        and processor.transform == given.transform
    )
    assert processor is given or modes[0] != scale.image_mode


def test_quantization_is_an_option(monkeypatch):
    seen = {}
    monkeypatch.setattr(
        'vlmbench.methods.qlora.load_quantized',
        lambda *a, **kw: seen.update(kw) or (_ for _ in ()).throw(KeyboardInterrupt),
    )
    method = get_method('vip_llava', ['load=4bit', 'quant_type=fp4', 'double_quant=False'])
    with pytest.raises(KeyboardInterrupt):
        method.start(method.recipe(get_scale('tiny')), get_scale('tiny'))
    assert seen == dict(quant_type='fp4', double_quant=False)


def test_tiny_budget_is_the_controls():
    ours, control = (get_recipe(n, get_scale('tiny')) for n in ('vip_llava', 'llava'))
    assert sum(s.budget_targets for s in ours.stages) == sum(
        s.budget_targets for s in control.stages
    )
    assert {(s.batch_rows, s.max_tokens) for s in ours.stages} == {
        (s.batch_rows, s.max_tokens) for s in control.stages
    }


@pytest.mark.parametrize('depth', range(2, 30))
def test_feature_layers_exist(depth):
    found = feature_layers(depth)
    assert all(-depth - 1 <= i <= depth for i in found) and len(
        {i % (depth + 1) for i in found}
    ) == len(found) >= min(depth - 1, 3)


def test_too_shallow():
    with pytest.raises(RecipeError, match='too shallow'):
        front_end(1)


@pytest.mark.fault('vip-15')
def test_fusion_is_five_states_without_cls():
    from vlmbench.models.vision import build_front_end

    backbone = dict(
        model_type='clip_vision_model',
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=12,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    front, pixels = (
        build_front_end(front_end(12) | dict(backbone=backbone), 24),
        torch.randn(2, 3, 28, 28),
    )
    with torch.no_grad():
        states = front.tower(pixels, output_hidden_states=True).hidden_states
        fused = front.select(pixels)
    assert torch.equal(
        fused, torch.cat([states[i][:, 1:] for i in FEATURE_LAYERS], -1)
    ) and fused.shape == (2, 4, 80)
    other = torch.cat([states[i][:, 1:] for i in FEATURE_LAYERS[::-1]], -1)  # the order matters
    assert not torch.allclose(front.projector(fused), front.projector(other))


def test_transform_draws_markers():
    from PIL import Image

    s = Sample(
        'x',
        [Turn('user', '<image>\nwhat is <region> ?'), Turn('assistant', 'ring')],
        [Image.new('RGB', (64, 64))],
        [Region((9.0, 9.0, 40.0, 40.0))],
    )
    draw = ViPLLaVA().transform(RunState())
    out = draw(s)
    assert (
        out.images[0].getbbox()
        and '<region>' not in out.turns[0].text
        and out.turns[1] == s.turns[1]
        and '<region>' in s.turns[0].text
    )
    plain = Sample('y', s.turns[1:], [])
    assert draw(plain) is plain


@pytest.mark.parametrize(
    'name,template,rows,size',
    [
        ('vicuna-7b', 'llava_v1', (16, 1), 37_767_168),
        ('vicuna-13b', 'llava_v1', (16, 1), 52_449_280),
        ('llama-3-8b', 'llama_3', (8, 2), 37_767_168),
        ('phi-3-mini', 'phi_3', (8, 2), 25_182_208),
        ('vicuna-7b-224', 'llava_v1', (16, 1), 37_767_168),
    ],
)
def test_paper_base_models(name, template, rows, size):
    scale = find_scale(f'vip_llava:{name}')
    r = get_recipe('vip_llava', scale)
    assert scale is PAPER_SCALES[name] and [s.lr for s in r.stages] == [1e-3, 2e-5, 2e-7]
    assert [s.template for s in r.stages] == ['llava_plain', template, template] and r.stage(
        'align'
    ).batch_rows == 32
    assert {(s.batch_rows, s.over(8).accumulation) for s in r.stages[1:]} == {rows} and [
        s.global_rows for s in r.stages
    ] == [256, 128, 128]
    model = scale.weightless(r)
    assert (
        sum(p.numel() for p in model.model.vision.projector.parameters()) == size
        and model.device.type == 'meta'
    )
    last = scale.weightless(ViPLLaVA(layers='last').recipe(scale))
    assert sum(p.numel() for p in last.model.vision.projector.parameters()) < size


def test_a_tower_of_224_pixels_makes_256_tokens_behind_vicunas_prompt():
    scale = find_scale('vicuna-7b-224')
    assert (scale.llm, scale.vision) == ('lmsys/vicuna-7b-v1.1', 'openai/clip-vit-large-patch14')
    tower = scale.weightless(get_recipe('vip_llava', scale)).model.vision
    assert (tower.num_tokens(224, 224), scale.template) == (256, 'vicuna_v1')
    table = plan('vip_llava', scale, budget=0.01)
    assert list(table['stage']) == ['align', 'region', 'chat']
    assert [one.id for one in weights_licences(scale.llm)] == ['vicuna-non-commercial']


def test_unknown_scales_and_options():
    with pytest.raises(RecipeError, match='vicuna-7b, vicuna-13b, llama-3-8b, phi-3-mini'):
        find_scale('vip_llava:gpt')
    with pytest.raises(RecipeError, match='none of its own'):
        find_scale('llava:gpt')
    for bad, match in (
        ('regions=boxes', "'overlay', 'text', 'none'"),
        ('layers=all', "'fused', 'last'"),
        ('grouping=size', "'modality'"),
        ('encoder=half', "'frozen', 'full'"),
        ('pictures=tiles', "'pad', 'crop', 'squash'"),
        ('quant_type=int4', "'nf4', 'fp4'"),
        ('double_quant=1.5', 'must be bool, .* write true or false'),
        ('reference=lots', 'must be bool, .* write true or false'),
        ('kinds=rectangle+star', 'kinds are rectangle'),
    ):
        with pytest.raises(RecipeError, match=match):
            get_method('vip_llava', [bad])
    with pytest.raises(RecipeError, match="no option 'marker'"):
        get_method('vip_llava', ['marker=star'])


def test_options_reach_recipe_and_drawing():
    m = get_method('vip_llava', ['regions=text', 'layers=last', 'kinds=mask contour+arrow'])
    drawn, _ = m.transform(RunState()).steps
    assert drawn.how == 'text' and drawn.kinds == ('mask contour', 'arrow')
    assert not drawn.reference
    assert get_method('vip_llava', ['reference=True']).transform(RunState()).steps[0].reference
    assert (
        m.recipe(get_scale('tiny')).front_end['select_layers'] == [4]
        and m.recipe(get_scale('tiny')).front_end['projector_norm']
    )
    grouped = get_recipe('vip_llava', get_scale('paper'), variant=['grouping=modality'])
    assert [(s.grouping, s.packing) for s in grouped.stages] == [
        (None, False),
        ('modality', False),
        ('modality', False),
    ]
    seeing = get_recipe('vip_llava', get_scale('tiny'), variant=['encoder=full'])
    assert [s.trains['vision'].how == 'full' for s in seeing.stages] == [False, True, True]
    assert {s.trains['vision'].how for s in get_recipe('vip_llava', get_scale('tiny')).stages} == {
        'frozen'
    }
    l = get_recipe('vip_llava', get_scale('paper'), variant=['llm=lora'])
    assert (l.stage('chat').lr_of('layers'), l.stage('chat').lr_of('projector')) == (2e-6, 2e-7)
