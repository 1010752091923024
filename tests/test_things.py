"""The world of things: the sheet and its terms, exact boxes, true answers, splits, guessing levels,
and thin markers."""

import json
import pickle
import random
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from vlmbench.data.cards import check, load_card
from vlmbench.data.marker_style import MARKER_STYLES, DrawStyled, MarkerStyle, mark_region
from vlmbench.data.overlay import PALETTE
from vlmbench.data.record import BadRecord
from vlmbench.data.scene import DIGITS, NUMBERS, PLACES, SPLITS
from vlmbench.data.thing_scene import (
    APART,
    HANDWRITING,
    KEEP,
    MARGIN,
    TILES,
    draw_scene,
    make_thing_scene,
    oklab,
    render_things,
    thing_signature,
)
from vlmbench.data.thing_world import (
    ThingSize,
    caption,
    guess_levels,
    placed_region,
    thing_questions,
    thing_samples,
    thing_tokenizer,
    thing_words,
    write_named_world,
    write_things,
)
from vlmbench.data.things import (
    GROUNDS,
    SIZES,
    ThingConfig,
    families_of,
    nouns_of,
    thing_cells,
    thing_table,
)
from vlmbench.data.world import asset_path, load_world

LEVELS = st.sampled_from(['easy', 'default', 'hard'])
INDEX = st.integers(0, 10**6)


def rows_of(kind, split, scenes, config):
    return [
        row
        for i in range(scenes)
        for row in thing_samples(kind, split, i, config, one_question=split != 'train')[1]
    ]


def test_the_sheet_carries_its_terms():
    folder = asset_path('things')
    names = json.loads((folder / 'names.json').read_text())
    notice = (folder / 'NOTICE').read_text()
    for family, facts in names['families'].items():
        assert f'@iconify-json/{family} {facts["version"]}' in notice
        assert facts['licence'] in ('Apache-2.0', 'MIT', 'CC-BY-4.0')
        for said in ('author', 'address', 'licence', 'licence_address'):
            assert facts[said] in notice
    assert notice.count('Changed: yes') == 6 and 'Copyright (c) Microsoft' in notice
    assert 'Apache License' in (folder / 'LICENSE-Apache-2.0.txt').read_text()
    assert sum(p.stat().st_size for p in folder.iterdir()) < 850_000


def test_a_changed_sheet_is_refused(tmp_path, monkeypatch):
    import vlmbench.data.things as things

    for path in asset_path('things').iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / 'sheet.webp').write_bytes(b'other')
    monkeypatch.setattr(things, 'asset_path', lambda name: tmp_path)
    with pytest.raises(ValueError, match='sheet.webp is not the file'):
        things._checked('sheet.webp')
    assert things._checked('names.json')


def test_families_draw_a_noun_each_in_its_own_way():
    cells = thing_cells().reshape(120, 6, -1)
    alike = [
        noun
        for noun, drawn in zip(thing_table().rows, cells)
        if len({one.tobytes() for one in drawn}) < 6
    ]
    assert not alike


@given(LEVELS, st.sampled_from(SPLITS), INDEX, st.sampled_from(['seen', 'unseen', 'all']))
@settings(max_examples=12, deadline=None)
def test_a_scene_is_a_function_of_its_address(level, split, index, families):
    config = ThingConfig.at(level, family_split=families)
    scene = make_thing_scene(config, split, index)
    assert scene == make_thing_scene(config, split, index) and scene.split == split
    assert config.min_things <= len(scene.things) <= config.max_things
    assert scene.ground in config.grounds and set(GROUNDS) >= set(config.grounds)
    for t in scene.things:
        assert t.name in DIGITS + nouns_of(config)
        assert t.family in (*families_of(config), HANDWRITING)
        assert (t.family == HANDWRITING) == (t.name in DIGITS)
        assert t.side == config.sides[SIZES.index(t.size)] and bool(t.tile) == (t.color in TILES)
    assert len({t.name for t in scene.things}) == len({t.place for t in scene.things})
    picture, drawn = draw_scene(config, 0, index, families, split)
    assert drawn == scene and picture.tobytes() == render_things(scene).tobytes()


@given(LEVELS, INDEX)
@settings(max_examples=20, deadline=None)
def test_things_keep_apart_and_keep_to_their_places(level, index):
    scene = make_thing_scene(ThingConfig.at(level, aspect=1.5), 'train', index)
    w, h = scene.size
    for i, t in enumerate(scene.things):
        x0, y0, x1, y1 = t.outer
        assert min(x0, y0) >= MARGIN and x1 <= w - MARGIN and y1 <= h - MARGIN
        assert x0 <= t.box[0] < t.box[2] <= x1 and y0 <= t.box[1] < t.box[3] <= y1
        row, column = divmod(t.place, 3)
        for at, cell, extent in ((t.center[0], column, w), (t.center[1], row, h)):
            assert extent * cell / 3 + KEEP <= at <= extent * (cell + 1) / 3 - KEEP
        for other in scene.things[:i]:
            a, b = t.outer, other.outer
            across = max(a[0] - b[2], b[0] - a[2])
            down = max(a[1] - b[3], b[1] - a[3])
            assert max(across, down) >= APART - 1, (t, other)


@given(INDEX)
@settings(max_examples=12, deadline=None)
def test_boxes_are_those_of_the_pixels(index):
    "The picture with and without a thing differs inside its outer box alone, up to each side."
    scene = make_thing_scene(ThingConfig(disc_share=0.0, digit_share=0.0), 'train', index)
    full = np.asarray(render_things(scene)).astype(int)
    for i, t in enumerate(scene.things):
        without = replace(scene, things=scene.things[:i] + scene.things[i + 1 :])
        changed = np.abs(full - np.asarray(render_things(without))).max(2) > 3
        ys, xs = np.nonzero(changed)
        seen = xs.min(), ys.min(), xs.max() + 1, ys.max() + 1
        assert np.abs(np.array(seen) - t.box).max() <= 2, (t, seen)


def test_things_stand_out_from_what_they_lie_on():
    "Ink is compared with the ground around it in the picture itself, not with what was planned."
    near = []
    for i in range(30):
        scene = make_thing_scene(ThingConfig(grounds=('plain',), digit_share=0.0), 'train', i)
        empty = oklab(np.asarray(render_things(replace(scene, things=()))))
        full = oklab(np.asarray(render_things(scene)))
        for t in scene.things:
            if not t.tile:
                x0, y0, x1, y1 = (int(v) for v in t.box)
                gap = np.linalg.norm((full - empty)[y0:y1, x0:x1], axis=-1)
                near.append((gap > 0.08).mean())
    assert np.quantile(near, 0.02) > 0.2 and np.median(near) > 0.45


def test_the_held_out_family_is_not_among_the_seen():
    for held_out in thing_table().families:
        config = ThingConfig(held_out=held_out)
        seen = {t.family for i in range(8) for t in make_thing_scene(config, 'train', i).things}
        assert held_out not in seen
    for kind in ('vqa', 'region', 'probe', 'caption'):
        for split in ('train', 'val', 'test', 'unseen'):
            scene, _ = thing_samples(kind, split, 3, ThingConfig(), one_question=True)
            drawn = {t.family for t in scene.things} - {HANDWRITING}
            assert (
                (drawn <= {'fluent-emoji-flat'})
                if split == 'unseen'
                else not (drawn & {'fluent-emoji-flat'})
            )


def test_splits_share_no_content_across_seeds_and_styles():
    def content(split, seed, families):
        config = ThingConfig.at('easy', seed=seed, family_split=families)
        return {thing_signature(make_thing_scene(config, split, i)) for i in range(60)}

    train = content('train', 0, 'seen') | content('train', 1, 'unseen')
    assert not train & (content('test', 0, 'unseen') | content('val', 2, 'seen'))


def lying(scene, a, relation):
    "Names that could be meant by 'what is <relation> the a': within 45 degrees, by place."
    dy, dx = {'left of': (0, -1), 'right of': (0, 1), 'above': (-1, 0), 'below': (1, 0)}[relation]
    row, column = divmod(a.place, 3)
    out = []
    for t in scene.things:
        down, right = t.place // 3 - row, t.place % 3 - column
        along, across = down * dy + right * dx, abs(down * dx) + abs(right * dy)
        if along > 0 and across <= along:
            out.append((t.name, across < along))
    return out


def answer_of(scene, config, kind, text):
    "The answer to a question, worked out from the scene alone; None for one that is doubtful."
    by_name, words = {t.name: t for t in scene.things}, text.split()
    if kind == 'where':
        return PLACES[by_name[words[-2]].place]
    if kind in ('name', 'digit'):
        (t,) = (t for t in scene.things if PLACES[t.place] == words[-2])
        return t.name
    if kind == 'exist':
        return 'yes' if words[-2] in by_name else 'no'
    if kind == 'count':
        return NUMBERS[len(scene.things)]
    if kind == 'group':
        (group,) = (g for g, plural in thing_table().plurals.items() if plural == words[2])
        return NUMBERS[sum(thing_table().groups.get(n) == group for n in by_name)]
    if kind == 'color':
        return by_name[words[-2]].color
    if kind == 'bigger':
        a, b = (by_name[n] for n in re.findall(r'the (\S+)', text))
        return None if a.side == b.side else max(a, b, key=lambda t: t.side).name
    relation = text.removeprefix('what is ').rsplit(' the ')[0]
    found = lying(scene, by_name[words[-2]], relation)
    return found[0][0] if len(found) == 1 and found[0][1] else None


@given(LEVELS, INDEX)
@settings(max_examples=25, deadline=None)
def test_every_answer_is_the_only_true_one(level, index):
    config = ThingConfig.at(level)
    scene = make_thing_scene(config, 'val', index)
    asked = thing_questions(scene, config, np.random.default_rng(index))
    assert len({q.text for q, _ in asked}) == len(asked)
    for q, about in asked:
        assert q.answer == answer_of(scene, config, q.type, q.text), q
        assert about in {'', *(t.name for t in scene.things)}
    said = caption(scene, np.random.default_rng(index))
    for t in scene.things:
        behind = f' on {t.color}' if t.color else ''
        assert f'{t.size} {t.name}{behind} at the {PLACES[t.place]}' in said


@given(INDEX)
@settings(max_examples=12, deadline=None)
def test_a_region_question_needs_its_region(index):
    config = ThingConfig.at('easy')
    scene, rows = thing_samples('region', 'test', index, config, one_question=True)
    assert len(scene.things) >= 3
    for row in rows:
        (region,) = row.regions
        (t,) = (t for t in scene.things if t.name == region.label)
        assert region.box == t.outer and placed_region(t, scene) == region
        kind, answer = row.meta['question_type'], row.turns[1].text
        others = [o.name for o in scene.things]
        if kind == 'region_color':
            others = [o.color for o in scene.things if o.color]
        assert answer == (t.name if kind == 'region' else t.color)
        share = Counter(others)[answer] / len(others)
        assert row.meta['random'] == share
        assert row.meta['best_guess'] == max(Counter(others).values()) / len(others) < 1
        assert row.meta['things'] == len(scene.things) and row.meta['size'] == t.size


def test_text_alone_answers_what_is_asked_of_it():
    "Relations and comparisons are stated, and nothing is asked that the telling does not say."
    kinds = Counter()
    for row in rows_of('text', 'test', 40, ThingConfig()):
        told, _, question = row.turns[0].text.rpartition(' . ')
        answer, kind = row.turns[1].text, row.meta['question_type']
        kinds[kind] += 1
        if kind == 'relation':
            relation, name = re.fullmatch(r'what is (.+) the (\S+) \?', question).groups()
            assert f'{relation} {name} {answer} .' in f'{told} .'
        if kind == 'bigger':
            assert f'{answer} bigger than' in told
        if kind in ('name', 'digit'):
            assert f'{question.split()[-2]} {answer} .' in f'{told} .'
    assert kinds['relation'] > 10 and kinds['bigger'] > 10 and not row.images


def test_guessing_is_held_down():
    config = ThingConfig()
    train = rows_of('vqa', 'train', 80, config)
    test = rows_of('vqa', 'test', 260, config) + rows_of('region', 'test', 150, config)
    levels = guess_levels(train, test)
    assert levels.n.sum() > 1000
    # shares that were stated for this world, and four standard errors of the rows counted here
    bounds = dict(name=3, relation=3, region=3, exist=50, count=41, group=39, color=21, where=14)
    for kind, bound in bounds.items():
        error = 400 * (bound / 100 * (1 - bound / 100) / levels.n[kind]) ** 0.5
        assert levels.frequent[kind] < bound + error, (kind, levels)
    assert levels.best_guess['region'] < 34 and levels.best_guess['bigger'] == 50
    assert levels.blind['exist'] < 62


def test_the_vocabulary_knows_every_word():
    tok, config = thing_tokenizer(), ThingConfig.at('hard')
    assert tok.convert_ids_to_tokens(list(range(len(tok)))) == thing_words()
    for kind in ('caption', 'text', 'vqa', 'region', 'probe'):
        for row in rows_of(kind, 'train', 12, config):
            text = ' '.join(t.text for t in row.turns).replace('<region>', 'within the lime arrow')
            assert tok.unk_token_id not in tok(text).input_ids, text


def test_files_are_written_as_those_of_the_first_world(tmp_path):
    sizes = ThingSize(**{k: 3 for k in ThingSize.__dataclass_fields__})
    folder = write_things(tmp_path / 'w', ThingConfig.at('hard'), sizes)
    mark = json.loads((folder / 'world.json').read_text())
    assert mark['world'] == 'things' and set(mark['rows']) == set(vars(sizes))
    assert write_things(folder, ThingConfig.at('hard'), sizes) == folder
    for name, n in mark['rows'].items():
        samples = load_world(folder, name)
        assert len(samples) == n and len({s.id for s in samples}) == n
        for s in samples:
            assert len(s.images) == ('text' not in name)
            if s.images:
                assert min(s.images[0].load().size) == 128
            if name.split('_')[1] != 'train' and 'probe' not in name:
                assert s.meta['answers'] == [s.turns[1].text] and s.meta['things'] >= 4
    with pytest.raises(FileExistsError, match='other settings'):
        write_things(folder, ThingConfig(), sizes)
    with pytest.raises(ValueError, match='world1'):
        write_named_world('world2', tmp_path / 'x')


@pytest.mark.parametrize('kind', ['rectangle', 'ellipse', 'arrow'])
def test_a_thin_marker_leaves_its_thing_as_it_is(kind):
    style = replace(MARKER_STYLES['thin'], kinds=('rectangle', 'ellipse', 'arrow'))
    for i in range(6):
        scene, (row, *_) = thing_samples('region', 'test', i, ThingConfig(), one_question=True)
        picture = render_things(scene)
        marked, words = mark_region(picture, row.regions[0], style, random.Random(i), kind)
        assert words.split()[-1] == kind and words.split()[-2] in style.palette
        changed = (np.asarray(marked) != np.asarray(picture)).any(2)
        assert 8 < changed.sum() < 0.06 * changed.size
        (t,) = (t for t in scene.things if t.name == row.regions[0].label)
        without = replace(scene, things=tuple(o for o in scene.things if o is not t))
        shown = np.abs(np.asarray(picture).astype(int) - np.asarray(render_things(without)))
        assert not (changed & (shown.max(2) > 40)).any()


def test_several_regions_of_a_row_are_told_apart():
    scene, (row, *_) = thing_samples('region', 'test', 4, ThingConfig(), one_question=True)
    regions = [placed_region(t, scene) for t in scene.things[:3]]
    text = '<image>\nwhat are the things <region0> , <region1> and <region2> ?'
    turns = [replace(row.turns[0], text=text), row.turns[1]]
    many = replace(row, regions=regions, turns=turns, images=[render_things(scene)])
    said = {DrawStyled()(many, np.random.default_rng(i)).turns[0].text for i in range(10)}
    for one in said:
        named = re.findall(r'within the (\S+ \S+)', one)
        assert len(named) == len(set(named)) == 3
    assert len(said) > 3 and many.regions == regions
    unsaid = replace(many, turns=[replace(row.turns[0], text='<image>\nwhat ?'), row.turns[1]])
    with pytest.raises(BadRecord, match='never referred to'):
        DrawStyled()(unsaid)
    assert pickle.loads(pickle.dumps(DrawStyled())) == DrawStyled()


def test_the_published_style_is_still_there():
    style = MARKER_STYLES['published']
    assert style == MarkerStyle() and len(style.kinds) == 8 and set(style.palette) == set(PALETTE)
    assert not set(MARKER_STYLES['thin'].palette) & set(TILES)


def test_the_world_matches_its_card(tmp_path):
    names = [Path(f['path']).stem for f in load_card('things').files]
    write_things(tmp_path / 'things', sizes=ThingSize(**dict.fromkeys(names, 3)))
    report = check('things', tmp_path / 'things', full=True)
    assert report.status == 0, str(report)
    assert sorted(report.summary.file) == sorted(f'{name}.json' for name in vars(ThingSize()))
    assert load_card('things').front['size']['images'] == sum(
        n for name, n in vars(ThingSize()).items() if 'text' not in name
    )


def test_the_card_states_the_guessing_levels():
    "The shares of the first rows are near those that the card states of all of them."
    card = (Path(__file__).parents[1] / 'data_cards' / 'things.md').read_text()
    config = ThingConfig()
    rows = rows_of('region', 'test', 60, config) + rows_of('vqa', 'test', 60, config)
    levels = guess_levels(rows_of('vqa', 'train', 5, config), rows)
    for kind in levels.index:
        found = re.search(rf'^\| {kind} \| (.*) \|$', card, re.M)[1].split(' | ')
        share = levels.loc[kind, 'frequent'] / 100
        error = 4 * (max(share, 0.1) / levels.n[kind]) ** 0.5
        assert abs(float(found[2]) / 100 - share) < error + 0.05, kind
        if kind in ('region', 'bigger'):
            assert abs(float(found[5]) - levels.best_guess[kind]) < 5
