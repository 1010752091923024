"""The style of markers as an option of recipes: what is drawn, recorded and asked with."""

import random

import numpy as np
import pytest

from vlmbench.data.marker_style import DrawStyled, MarkerStyle, draws_look, look_of, marker_look
from vlmbench.data.overlay import PALETTE
from vlmbench.data.placement import ImagesFirst, in_order
from vlmbench.data.region_rows import DrawRegions
from vlmbench.data.scene import WorldConfig
from vlmbench.data.sources import DataError, prepare_data
from vlmbench.data.thing_world import ThingSize, write_things
from vlmbench.data.things import ThingConfig
from vlmbench.data.world import WorldSize, render, scene_samples, write_world
from vlmbench.evaluate.assess import load_tasks, shown_as
from vlmbench.methods.recipes import get_method, marked_as_data
from vlmbench.run.early import check_train
from vlmbench.run.engine import find_notebook
from vlmbench.run.parameters import ParameterError, load_notebook, notebook_parameters
from vlmbench.train.recipe import RecipeError


@pytest.fixture(scope='module')
def worlds(tmp_path_factory):
    "A folder of each world, of a few scenes."
    place = tmp_path_factory.mktemp('worlds')
    few = dict(region_test=2, caption_train=3, vqa_train=3, region_train=3, text_train=3)
    sizes = dict.fromkeys(vars(ThingSize()), 0) | few
    things = write_things(place / 'things', ThingConfig.at('easy', seed=5), ThingSize(**sizes))
    first = {name: sizes[name] for name in vars(WorldSize())}
    shapes = write_world(place / 'world1', WorldConfig.at('hard', seed=2), WorldSize(**first))
    return dict(things=things, world1=shapes)


def region_row(index=1):
    scene, rows = scene_samples('region', 'train', index, WorldConfig())
    rows[0].images[:] = [render(scene)]
    return rows[0]


@pytest.mark.parametrize('name', ['vip_llava', 'llava', 'eve', 'vora'])
def test_without_a_style_every_method_draws_what_it_drew_before(name):
    method = get_method(name, ['regions=overlay'])
    before = in_order(DrawRegions(), ImagesFirst() if method.images_first else None)
    draws = (method.transform(type('State', (), dict(stage=None))()), before)
    now, then = (t(region_row(), np.random.default_rng(7)) for t in draws)
    assert now.turns == then.turns and now.images[0].tobytes() == then.images[0].tobytes()


def test_single_settings_change_what_is_drawn():
    row = region_row(3)
    options = ['marker_style=thin', 'kinds=rectangle', 'marker_palette=aqua', 'marker_alpha=255']
    pictures = []
    for more in [], ['marker_stroke=3'], ['marker_gap=6']:
        transform = get_method('vip_llava', options + more).transform(None)
        sample = transform(row, np.random.default_rng(0))
        assert 'within the aqua rectangle' in sample.turns[0].text
        pictures.append((np.asarray(sample.images[0]) == PALETTE['aqua']).all(2).sum())
    assert pictures[1] > 2 * pictures[0] and pictures[2] > pictures[0]


def test_a_published_stroke_in_ones_own_colours_is_as_thick_as_a_published_one():
    row = region_row(2)
    kinds = ('rectangle',)
    own = draws_look(marker_look(kinds='rectangle', palette='lime', alpha=255))
    assert isinstance(own, DrawStyled)
    changed = []
    for draw in own, DrawRegions(kinds, color='lime', alpha=255):
        counts = [
            (np.asarray(draw(row, np.random.default_rng(s)).images[0]) == PALETTE['lime']).all(2)
            for s in range(12)
        ]
        changed.append(np.mean([c.sum() for c in counts]))
    assert 0.7 < changed[0] / changed[1] < 1.4


def test_what_cannot_be_drawn_is_refused_before_a_run(worlds):
    for variant, why in {
        'marker_gap=2': 'a gap needs a stroke',
        'marker_palette=mint': "colour 'mint' is unknown",
        'regions=text': 'marker_style says how markers look',
    }.items():
        given = [variant, 'marker_style=thin'] if variant == 'regions=text' else [variant]
        with pytest.raises(RecipeError, match=why):
            get_method('vip_llava', given)
    declared = notebook_parameters(load_notebook(find_notebook('train')), 'train')
    values = {name: p.default for name, p in declared.items()}
    values |= dict(recipe='vip_llava', variant=['kinds=mask'], data=str(worlds['things']))
    with pytest.raises(ParameterError, match='add marker_style=published'):
        check_train(values)


def test_the_card_of_a_world_chooses_the_style_and_a_choice_beats_it(worlds, capsys):
    thin = draws_look(marker_look('thin'))
    assert marked_as_data('vip_llava', [], worlds['things']) == ['marker_style=thin']
    assert marked_as_data('vip_llava', [], worlds['world1']) == []
    (task,) = load_tasks(worlds['things'], ['region_test']).values()
    assert shown_as(task, None, worlds['things']) == thin
    assert shown_as(task, None, worlds['things'], 'published') == DrawRegions()
    capsys.readouterr()
    assert shown_as(task, thin, worlds['things']) == thin and capsys.readouterr().out == ''
    assert shown_as(task, DrawRegions(), worlds['things']) == DrawRegions()
    assert 'the card of the data asks for thin' in capsys.readouterr().out
    both = in_order(DrawRegions(('arrow',)), ImagesFirst())
    assert look_of(shown_as(task, both, worlds['things'], 'thin')) == marker_look('thin')
    assert 'but were published (kinds arrow) in training' in capsys.readouterr().out


def test_levels_of_both_worlds_are_known(worlds):
    "Of any seed; another level is refused in words."
    assert prepare_data(worlds['things'], 'easy') == worlds['things']
    assert prepare_data(worlds['world1'], 'hard') == worlds['world1']
    for name, level in dict(things='hard', world1='easy').items():
        with pytest.raises(DataError, match='a world of other settings'):
            prepare_data(worlds[name], level)


def test_regions_of_published_rows_say_which_style_they_need():
    row = dict(id='refcocog-1')
    sample = region_row()
    sample.meta['region_row'] = row
    with pytest.raises(ValueError, match='marker_style=published'):
        DrawStyled().build(sample, random.Random(0))
    assert look_of(DrawRegions()) == MarkerStyle()
