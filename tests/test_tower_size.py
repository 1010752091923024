"""A scale's picture size is honoured by every kind of tower, or refused: planner, processor and
model count the same tokens, whatever size the tower's own files name."""

import json

import pytest
import torch
from PIL import Image
from transformers import (
    Aimv2VisionConfig,
    AutoModel,
    AutoModelForImageTextToText,
    CLIPConfig,
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    SiglipVisionConfig,
)

from mini_bases import first_always, parameters_of, write_bases
from vlmbench.cost.planner import plan
from vlmbench.data.record import ImageRef, Sample, Turn
from vlmbench.methods.recipes import get_method, get_recipe
from vlmbench.run.jobs import train_job
from vlmbench.run.manifest import Run
from vlmbench.train.recipe import RecipeError
from vlmbench.train.scale import Scale

SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
SIZES |= dict(image_size=48, patch_size=8)  # native: 6 x 6 patches
TEXT = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
TOWERS = {
    'clip': CLIPVisionConfig(**SIZES),
    'clip, both halves': CLIPConfig(text_config=TEXT, vision_config=SIZES),
    'siglip': SiglipVisionConfig(**SIZES),
    'dinov2': Dinov2Config(**SIZES),
    'dinov2, registers': Dinov2WithRegistersConfig(**SIZES),
    'aimv2, computed positions': Aimv2VisionConfig(**SIZES, is_native=True),
}


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp('bases')
    write_bases(root, 4, caption_train=8, vqa_train=8, vqa_test=4, text_train=4, region_train=8)
    return root


def scale_of(root, config, side, own=40, **more):
    "A scale of `side` px on a tower of 48 px whose processor says `own` px."
    folder = root / f'{config.model_type}-{len(list(root.iterdir()))}'
    torch.manual_seed(0)
    AutoModel.from_config(config).save_pretrained(folder)
    says = dict(size=dict(height=own, width=own), image_mean=[0.5] * 3, image_std=[0.5] * 3)
    says |= dict(image_processor_type='SiglipImageProcessor')
    (folder / 'preprocessor_config.json').write_text(json.dumps(says))
    named = dict(llm=str(root / 'llm'), vision=str(folder), template='world', like='tiny')
    return Scale(name='own', image_size=side, **named | more)


@pytest.mark.parametrize('side', [24, 64], ids=['smaller', 'larger'])
@pytest.mark.parametrize('kind', TOWERS)
def test_planner_processor_and_model_agree(kind, side, root, tmp_path):
    scale = scale_of(root, TOWERS[kind], side)
    recipe = get_recipe('llava', scale)
    state = get_method('llava').start(recipe, scale)
    model, processor = state.model, state.processor
    patches = (side // 8) ** 2
    assert processor.transform.size == side
    Image.new('RGB', (90, 60), 'red').save(tmp_path / 'a.png')
    turns = [Turn('user', '<image>\nwhat is red ?'), Turn('assistant', 'the circle')]
    sample = Sample('a', turns, [ImageRef('a.png', str(tmp_path))])
    encoded = processor.encode(sample)
    assert model.model.vision.num_tokens(side, side) == patches
    assert int((encoded.image_ids >= 0).sum()) == patches
    pixels = encoded.images[0]['pixel_values'][None]
    assert pixels.shape[-2:] == (side, side)
    tokens, counts = model.model.vision(pixels)
    assert counts.tolist() == [patches] and tokens.shape[0] == patches
    planned = plan(recipe, scale, rows=1).set_index('stage')
    assert (planned.parameters == sum(p.numel() for p in model.parameters())).all()
    # and what was saved is of that size for whoever loads it
    model.save_pretrained(tmp_path / 'model')
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / 'model')
    assert torch.equal(again.model.vision(pixels)[0], tokens)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_a_stretched_tower_sees_what_transformers_lets_it_see(dtype, root):
    config = TOWERS['clip']
    scale = scale_of(root, config, 64, dtype=dtype)
    model = get_method('llava').start(get_recipe('llava', scale), scale).model
    theirs = AutoModel.from_pretrained(scale.vision, dtype=getattr(torch, dtype))
    pixels = torch.randn(1, 3, 64, 64, dtype=getattr(torch, dtype))
    with torch.no_grad():
        ours = model.model.vision.tower(pixels).last_hidden_state
        expected = theirs(pixels, interpolate_pos_encoding=True).last_hidden_state
    close = 1e-6 if dtype == 'float32' else 5e-2
    assert (ours - expected).abs().max() <= close * expected.abs().max()


def test_a_size_that_cannot_be_is_refused_with_those_that_can(root):
    with pytest.raises(RecipeError, match="scale 'own': image_size=50: .*choose 48 or 56 px"):
        plan('llava', scale_of(root, TOWERS['siglip'], 50))
    scale = scale_of(root, Aimv2VisionConfig(**SIZES), 64)
    with pytest.raises(RecipeError, match='no rule to stretch it to 64 px: set image_size=48'):
        get_method('llava').start(get_recipe('llava', scale), scale)


@pytest.mark.parametrize(
    'recipe', first_always(['eve', 'vora', 'llava', 'vip_llava', 'zero', 'visual_region'], 2)
)
def test_every_method_trains_at_the_size_of_the_scale(recipe, root, tmp_path):
    "On DINOv2, which is native at another size, as teacher or encoder."
    scale = scale_of(root, TOWERS['dinov2'], 64)
    path = tmp_path / 'own.json'
    path.write_text(json.dumps(scale.to_dict()))
    stages = [stage.name for stage in get_recipe(recipe, scale).stages]
    few = [f'stages.{name}.{one}' for name in stages for one in ('steps=1', 'batch_rows=2')]
    given = dict(recipe=recipe, scale=str(path), overrides=few, device='cpu', evaluate=False)
    given |= dict(unknown_words=1.0)
    Run(tmp_path / 'run', 'train', {})
    settings = parameters_of('train', **given)
    done = train_job(settings, str(root / 'world'), str(tmp_path / 'run'))
    assert [stage['steps'] for stage in done['stages']] == [1] * len(stages)
