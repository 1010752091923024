"""The embedded world: determinism, disjoint splits, balance, geometry, files; and the shipped base
models, which must be good at their trade."""

import json
import os
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import filelock
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import save_file

from vlmbench.data.record import write_llava
from vlmbench.data.scene import (
    DIGITS,
    NUMBERS,
    PLACES,
    QUESTION_TYPES,
    SHAPES,
    SPLITS,
    WorldConfig,
    describe,
    facts,
    holds,
    make_scene,
    questions,
    signature,
    split_of,
    text_conversation,
    world_tokenizer,
    world_words,
)
from vlmbench.data.world import (
    WorldSize,
    asset_path,
    coverage,
    digit_pool,
    geometry,
    load_world,
    thing_region,
    render,
    scene_samples,
    write_world,
)
from vlmbench.run.manifest import write_json
from vlmbench.train.checkpoint import publish

LEVELS = st.sampled_from(['easy', 'default', 'hard'])
INDEX = st.integers(0, 10**7)


@given(LEVELS, st.sampled_from(SPLITS), INDEX, st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_a_scene_is_a_function_of_its_address(level, split, index, seed):
    config = WorldConfig.at(level, seed=seed)
    a = make_scene(config, split, index)
    assert a == make_scene(config, split, index) and split_of(a) == split == a.split
    assert config.min_objects <= len(a.things) <= config.max_objects
    assert len({t.name for t in a.things}) == len({t.place for t in a.things}) == len(a.things)


def test_splits_share_no_scene_content_across_seeds():
    seen = {
        s: {
            signature(make_scene(WorldConfig(seed=seed), s, i))
            for seed in (0, 1)
            for i in range(400)
        }
        for s in SPLITS
    }
    assert (
        not seen['train'] & seen['test']
        and not seen['train'] & seen['val']
        and not seen['val'] & seen['test']
    )


def test_digit_samples_are_divided_between_splits():
    pools = {s: {d: {x.tobytes() for x in v} for d, v in digit_pool(s).items()} for s in SPLITS}
    for d in DIGITS:
        assert not pools['train'][d] & pools['test'][d] and not pools['train'][d] & pools['val'][d]
    assert sum(len(v) for s in SPLITS for v in digit_pool(s).values()) == 1797


@given(LEVELS, INDEX)
@settings(max_examples=60, deadline=None)
def test_every_answer_is_true(level, index):
    scene = make_scene(WorldConfig.at(level), 'val', index)
    by_name, by_place = (
        {t.name: t for t in scene.things},
        {PLACES[t.place]: t for t in scene.things},
    )
    for q in questions(scene, np.random.default_rng(index)):
        words = q.text.split()
        if q.type == 'color':
            assert by_name[words[4]].color == q.answer
        elif q.type == 'size':
            assert by_name[words[4]].size == q.answer
        elif q.type == 'where':
            assert PLACES[by_name[words[3]].place] == q.answer
        elif q.type in ('shape', 'digit'):
            assert by_place[words[3]].name == q.answer and (q.type == 'digit') == (
                q.answer in DIGITS
            )
        elif q.type == 'count':
            assert NUMBERS.index(q.answer) == len(scene.things)
        elif q.type == 'exist':
            assert (words[3] in by_name) == (q.answer == 'yes')
        else:
            relation = next(r for r in ('left', 'right', 'above', 'below') if r in words)
            assert holds(relation, by_name[words[2]], by_name[words[-2]]) == (q.answer == 'yes')
        assert q.type in QUESTION_TYPES


def test_yes_no_answers_carry_no_prior():
    answers = {k: Counter() for k in ('exist', 'spatial')}
    for i in range(1500):
        for q in questions(make_scene(WorldConfig(), 'test', i), np.random.default_rng(i)):
            if q.type in answers:
                answers[q.type][q.answer] += 1
    for k, c in answers.items():
        assert 0.45 < c['yes'] / c.total() < 0.55, (k, c)


@given(LEVELS, INDEX)
@settings(max_examples=30, deadline=None)
def test_pictures_show_what_regions_say(level, index):
    config = WorldConfig.at(level)
    scene = make_scene(config, 'test', index)
    picture = np.asarray(render(scene, config))
    assert picture.shape == (scene.size[1], scene.size[0], 3)
    for t in scene.things:
        box = thing_region(t, scene).box
        assert 0 <= box[0] < box[2] <= scene.size[0] and 0 <= box[1] < box[3] <= scene.size[1]
        inside = coverage(t, scene.size, scene.split)[
            int(box[1]) : int(box[3]), int(box[0]) : int(box[2])
        ]
        assert inside.max() > 0.5
        cx, cy, r = geometry(t, scene.size)
        row, col = divmod(t.place, 3)
        assert (
            col * scene.size[0] / 3 <= cx <= (col + 1) * scene.size[0] / 3
            and row * scene.size[1] / 3 <= cy <= (row + 1) * scene.size[1] / 3
        )


def test_the_tokenizer_knows_every_word_of_the_world():
    tok = world_tokenizer()
    assert (
        len(tok) == len(world_words())
        and tok.convert_ids_to_tokens(list(range(len(tok)))) == world_words()
    )
    for i in range(200):
        pairs, _ = text_conversation(
            make_scene(WorldConfig.at('hard'), 'train', i), np.random.default_rng(i)
        )
        text = ' '.join(w for pair in pairs for w in pair)
        ids = tok(text, add_special_tokens=False).input_ids
        assert tok.unk_token_id not in ids and tok.decode(ids) == text


def test_descriptions_state_every_fact_once():
    scene = make_scene(WorldConfig.at('hard'), 'train', 5)
    said = [
        s.strip() + ' .' for s in describe(scene, np.random.default_rng(0)).split(' .') if s.strip()
    ]
    assert sorted(said[1:]) == sorted(f for t in scene.things for f in facts(t))


def test_files_are_read_back_through_the_ordinary_reader(tmp_path):
    sizes = WorldSize(**{k: 5 for k in WorldSize.__dataclass_fields__})
    folder = write_world(tmp_path / 'w', WorldConfig(), sizes)
    counts = json.loads((folder / 'world.json').read_text())['rows']
    assert set(counts) == set(WorldSize.__dataclass_fields__)
    for name, n in counts.items():
        samples = load_world(folder, name)
        kind, split = name.split('_')
        assert len(samples) == n and len({s.id for s in samples}) == n
        for s in samples:
            assert (
                len(s.images) == (kind != 'text') == sum(t.text.count('<image>') for t in s.turns)
            )
            if s.images:
                assert s.images[0].load().mode == 'RGB'
            if split != 'train' and kind not in ('caption', 'probe'):
                assert s.meta['answers'] == [s.turns[1].text]
            if kind == 'region':
                assert (
                    len(s.regions) == 1
                    and '<region>' in s.turns[0].text
                    and s.regions[0].label in SHAPES + DIGITS
                )
    with pytest.raises(FileExistsError, match='other settings'):
        write_world(folder, WorldConfig(seed=3), sizes)


@pytest.mark.skipif(os.name != 'posix', reason='file modes')
@pytest.mark.parametrize('umask', [0o022, 0o002, 0o077])
def test_what_is_published_is_as_readable_as_the_umask_says(tmp_path, umask):
    before = os.umask(umask)
    try:
        write_world(tmp_path / 'w', WorldConfig(), WorldSize(2, 0, 0, 0, 0, 0, 0, 0, 0, 0))
        write_json(tmp_path / 'manifest.json', {})
        write_llava([], tmp_path / 'rows.json')
        (tmp_path / 'tmp').mkdir()
        save_file(dict(w=torch.ones(2)), tmp_path / 'tmp' / 'model.safetensors')
        publish(tmp_path / 'tmp', tmp_path / 'model')
    finally:
        os.umask(before)
    modes = {
        p.relative_to(tmp_path).as_posix(): p.stat().st_mode & 0o777 for p in tmp_path.rglob('*')
    }
    assert {
        'w',
        'w/caption_train.json',
        'manifest.json',
        'rows.json',
        'model/model.safetensors',
    } <= modes.keys()
    assert modes == {n: (0o777 if (tmp_path / n).is_dir() else 0o666) & ~umask for n in modes}


def test_an_interrupted_write_leaves_nothing_behind(tmp_path, monkeypatch):
    import vlmbench.data.world as world

    def full(*a, **k):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(world, 'render', full)
    with pytest.raises(OSError, match='No space'):
        write_world(tmp_path / 'w', WorldConfig(), WorldSize())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('locks', [True, False])
def test_two_that_begin_together_leave_one_world(tmp_path, monkeypatch, locks):
    "On a file system with locks one of them writes; without locks both do, and both go on."
    import vlmbench.data.world as world

    writes, meeting = [], threading.Barrier(2)
    original = world._write_split

    def write_split(folder, *rest):
        writes.append(folder)
        if not locks:
            meeting.wait(60)
        return original(folder, *rest)

    class NoLocks(filelock.FileLock):
        def acquire(self, *a, **k):
            raise OSError(37, 'No locks available')

    monkeypatch.setattr(world, '_write_split', write_split)
    if not locks:
        monkeypatch.setattr(world.filelock, 'FileLock', NoLocks)
    sizes = WorldSize(2, 0, 0, 0, 0, 0, 0, 0, 0, 0)
    with ThreadPoolExecutor(2) as pool:
        begun = [pool.submit(write_world, tmp_path / 'w', WorldConfig(), sizes) for _ in range(2)]
        assert [b.result(60) for b in begun] == [tmp_path / 'w'] * 2
    assert len(set(writes)) == (1 if locks else 2)
    assert len(load_world(tmp_path / 'w', 'caption_train')) == 2
    assert [p.name for p in tmp_path.iterdir()] == ['w']


def test_the_shipped_language_model_reads():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tok, llm = (
        AutoTokenizer.from_pretrained(asset_path('llm')),
        AutoModelForCausalLM.from_pretrained(asset_path('llm')).eval(),
    )
    rows = [
        s
        for i in range(60)
        for s in scene_samples('text', 'test', 1000 + i, WorldConfig(), one_question=True)[1]
    ]
    right = 0
    with torch.no_grad():
        for s in rows:
            ids = tok(
                f'<|user|> {s.turns[0].text} <|assistant|>',
                add_special_tokens=False,
                return_tensors='pt',
            ).input_ids
            right += tok.decode(llm(input_ids=ids).logits[0, -1].argmax()) == s.turns[1].text
    assert right / len(rows) > 0.95, right / len(
        rows
    )  # 240 questions; the card states the score on 2,000


def test_the_shipped_encoder_sees():
    from transformers import AutoModel
    from vlmbench.train.pretrain import linear_probe

    scores = linear_probe(
        AutoModel.from_pretrained(asset_path('vit')).eval(), WorldConfig(), n_train=1500, n_test=400
    )
    assert scores['color'] > 0.95 and scores['shape'] > 0.95 and scores['digit'] > 0.85, (
        scores
    )  # a small probe set; the card states 8,000


def test_assets_state_their_scores():
    # how large they are all together: test_project.py
    says = dict(llm='held-out accuracy', vit='held-out accuracy', things_llm='held-out accuracy')
    for part, scores in (says | dict(things_vit='Linear probes on held-out scenes')).items():
        card = (asset_path(part) / 'README.md').read_text(encoding='utf8')
        assert scores in card and (asset_path(part) / 'model.safetensors').exists()
