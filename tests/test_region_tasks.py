"""Region benchmarks from files in their published layouts: questions, pictures, scores, votes,
arrows, bad rows."""

import copy, json, pickle, random

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from vlmbench.data.overlay import MARKERS, PALETTE, Marker, draw_marker
from vlmbench.data.quarantine import BadRecord, Quarantine
from vlmbench.data.record import ImageRef
from vlmbench.data.refcocog import refcocog_problems
from vlmbench.evaluate.captions import Caption
from vlmbench.evaluate.generate import GenerationLog
from vlmbench.evaluate.region_tasks import (
    questions_of,
    SETS,
    MarkedImage,
    PlainMatch,
    Pointer,
    arrow_task,
    coco_objects,
    draw_kinds,
    q_to_ar,
    region_task,
    vote,
)
from vlmbench.evaluate.results import compare, score_predictions
from vlmbench.evaluate.tasks import image_key
from vlmbench.run.cli import app

BOXES = [[10, 10, 60, 50], [80, 20, 140, 70], [20, 80, 90, 140], [120, 90, 190, 145]]
MASK = [[20.0, 20.0], [70.0, 20.0], [70.0, 70.0], [20.0, 70.0]]
TOKENS = ['Why', 'is', [0], 'near', [1], '?']
VCR = dict(
    id='vcr-3',
    image='f/a.png',
    meta_dir='./dataset/f/a.json',
    class_names=['person', 'dog', 'cup'],
    question=TOKENS,
    answer_choices=[[[0], 'sleeps', '.'], ['No', '.'], ['Yes', '.'], [[0, 1], 'play', '.']],
    answer_label=3,
    rationale_choices=[['So', '.'], [[1], 'barks', '.'], ['Ah', '.'], ['Oh', '.']],
    rationale_label=1,
    answer_orig='x',
    objects=['person', 'dog', 'cup'],
)
ROWS = dict(
    v7w=[
        dict(
            id=f'v7w-{i}', image='f/a.png', question='Which one?', bboxes=BOXES, answer=BOXES[i % 4]
        )
        for i in range(5)
    ],
    pointqa=[
        dict(
            id=f'pointQA_twice-{i}',
            image='f/a.png',
            general_question='How many?',
            bboxes=[BOXES[i]],
            answer='2',
            question='How many cups?',
        )
        for i in range(3)
    ],
    vcr_qa=[VCR, VCR | dict(id='vcr-4', answer_label=0)],
    refcocog=[
        dict(
            id=f'refcocog-{i}',
            image='f/a.png',
            bboxes=[BOXES[i // 2]],
            segmentations=None,
            answer=a,
        )
        for i, a in enumerate(('the cup', 'a red cup', 'the dog'))
    ],
)


@pytest.fixture
def root(tmp_path):
    (tmp_path / 'f').mkdir()
    Image.new('RGB', (200, 150), (90, 120, 150)).save(tmp_path / 'f' / 'a.png')
    side = dict(
        boxes=[[15, 15, 75, 75, 0.9], [100, 40, 150, 90, 0.8], [0, 0, 9, 9, 1]],
        segms=[
            [MASK],
            [
                [[110.0, 50.0], [140.0, 50.0], [140.0, 80.0], [110.0, 80.0]],
                [[1.0, 1.0], [2.0, 2.0], [3.0, 1.0]],
            ],
            [],
        ],
    )
    (tmp_path / 'f' / 'a.json').write_text(json.dumps(side))
    for name, rows in ROWS.items():
        (tmp_path / f'{name}.json').write_text(json.dumps(rows))
    (tmp_path / 'vcr_qar.json').write_text(json.dumps(ROWS['vcr_qa']))
    return tmp_path


def load(root, name, **kw):
    if name == 'refcocog':
        kw.setdefault('scorer', Caption(()))
    return region_task(name, root / f'{name}.json', root, **kw)


@pytest.mark.parametrize('name', SETS)
def test_every_set_loads_scores_and_shows_its_markers(root, name):
    task = load(root, name)
    for i in task.items:
        assert i.turns[0].text.startswith('<image>\n') and i.turns[0].text.count('<image>') == 1
        picture = i.images[0].load()
        assert picture.size == (200, 150) and np.ptp(np.asarray(picture).reshape(-1, 3), 0).any()
        assert i.images[0].load().tobytes() == picture.tobytes() and i.cluster == 'f/a.png'
    right = score_predictions(task, {i.id: i.answers[0] for i in task.items})
    assert (
        right.accuracy == 1
        and score_predictions(task, {i.id: '?' for i in task.items}).accuracy == 0
    )


def test_visual7w(root):
    task = load(root, 'v7w')
    assert [i.answers[0] for i in task.items] == ['A', 'B', 'C', 'D', 'A']
    for i in task.items:
        marks = i.images[0].marks
        assert [list(m.region.box) for m in marks] == BOXES and {m.kind for m in marks} == {
            'rectangle'
        }
        assert len({m.name for m in marks}) == 4 and {m.alpha for m in marks} == {128}
        assert [m.name in i.choices[c] for m, c in zip(marks, 'ABCD')] == [True] * 4
        assert i.turns[0].text.endswith(
            "Answer with the option's letter from the given choices directly."
        )
    assert (
        score_predictions(task, {i.id: f'{i.answers[0]}. That one' for i in task.items}).accuracy
        == 1
    )


def test_pointqa_levels(root):
    general, own = load(root, 'pointqa'), load(root, 'pointqa', question='question')
    assert (
        'How many? The exemplary object is within the rectangle.' in general.items[0].turns[0].text
    )
    assert 'How many cups?' in own.items[0].turns[0].text
    assert general.items[0].images[0].marks[0].rgb == PALETTE['red']
    with pytest.raises(BadRecord, match="row 0 .*no field 'local_question'"):
        load(root, 'pointqa', question='local_question')


def test_vcr(root):
    qa, qar = load(root, 'vcr_qa'), load(root, 'vcr_qar')
    assert [i.answers[0] for i in qa.items] == ['D', 'A'] and [i.answers[0] for i in qar.items] == [
        'B',
        'B',
    ]
    kinds = {m.region.box: m.kind for m in qa.items[0].images[0].marks}
    assert kinds == {
        (15, 15, 75, 75): 'point',
        (100, 40, 150, 90): 'point',
    }  # the unmentioned cup is not marked
    assert (
        len(qa.items[0].images[0].marks[1].region.polygons) == 1
    )  # fewer than 4 vertices: dropped
    assert 'rationale' in qar.items[0].turns[0].text and SETS['vcr_qa'].aspect == 'squash'
    said = {'vcr-3': ('D', 'B'), 'vcr-4': ('A', 'C')}
    a, r = (
        score_predictions(t, {k: v[n] for k, v in said.items()}) for n, t in enumerate((qa, qar))
    )
    both = q_to_ar(a, r)
    assert (a.accuracy, r.accuracy, both.accuracy) == (1, 0.5, 0.5) and both.frame[
        'answers'
    ].tolist() == [['D B'], ['A B']]
    assert compare(both, both)['difference'].mean == 0
    both.save(root / 'out')
    with pytest.raises(ValueError, match='different questions'):
        q_to_ar(a, score_predictions(qar.head(1), {'vcr-3': 'B'}))


def test_vcr_instances_without_a_mask_get_a_rectangle_and_say_so(root):
    side = json.loads((root / 'f' / 'a.json').read_text())
    (root / 'f' / 'bare.json').write_text(json.dumps(side | dict(segms=[[], [MASK], []])))
    (root / 'vcr_qa.json').write_text(json.dumps([VCR | dict(meta_dir='./dataset/f/bare.json')]))
    with pytest.warns(UserWarning, match='without a mask get a rectangle'):
        item = load(root, 'vcr_qa').items[0]
    assert [m.kind for m in item.images[0].marks] == ['rectangle', 'point']
    assert 'rectangle' in item.turns[0].text and item.images[0].load().size == (200, 150)


def test_refcocog_expressions_of_one_region_are_references(root):
    task = load(root, 'refcocog')
    assert [i.answers for i in task.items] == [('the cup', 'a red cup'), ('the dog',)]
    assert score_predictions(task, {'refcocog-0': 'red cup', 'refcocog-2': 'cat'}).frame[
        'score'
    ].tolist() == [1, 0]
    kinds = {load(root, 'refcocog', seed=s).items[0].images[0].marks[0].kind for s in range(60)}
    assert kinds == set(MARKERS) - {'point'}  # no mask, no point
    assert load(root, 'refcocog', kind='arrow').items[0].images[0].marks[0].kind == 'arrow'


def test_seeds_kinds_and_opacity_change_the_prompt_hash_only(root, tmp_path):
    tasks = [
        load(root, 'v7w'),
        load(root, 'v7w', seed=1),
        load(root, 'v7w', alpha=255),
        load(root, 'v7w', kind='ellipse'),
    ]
    assert load(root, 'v7w').prompt_hash == tasks[0].prompt_hash
    assert (
        len({t.prompt_hash for t in tasks}) == 4
        and len({tuple(i.id for i in t.items) for t in tasks}) == 1
    )
    assert len({t.items[0].images[0].load().tobytes() for t in tasks}) == 4
    text = tasks[3].items[0].turns[0].text
    assert text.count('ellipse') == 4 and 'rectangle' not in text
    assert {m.kind for m in tasks[3].items[0].images[0].marks} == {'ellipse'}
    GenerationLog(tmp_path / 'l.jsonl', dict(prompt_hash=tasks[0].prompt_hash))
    with pytest.raises(ValueError, match='prompt_hash was'):
        GenerationLog(tmp_path / 'l.jsonl', dict(prompt_hash=tasks[1].prompt_hash))


@pytest.mark.parametrize('name', ['v7w', 'pointqa', 'vcr_qa', 'vcr_qar'])
def test_an_ensemble_asks_in_several_kinds(root, name):
    kinds = draw_kinds(name, 5)
    tasks = [load(root, name, seed=d, kind=k) for d, k in enumerate(kinds)]
    shown = [{m.kind for m in t.items[0].images[0].marks} for t in tasks]
    assert (
        kinds[0] is None
        and all(s == {k} for s, k in zip(shown[1:], kinds[1:]))
        and len({*map(frozenset, shown)}) == 5
    )
    first = [t.items[0] for t in tasks]
    assert (
        len({i.images[0].load().tobytes() for i in first})
        == len({i.turns[0].text for i in first})
        == 5
    )
    assert draw_kinds(name, 3, ['mask', 'arrow']) == ['mask', 'arrow', 'mask']
    with pytest.raises(ValueError, match='kinds are rectangle'):
        draw_kinds(name, 2, ['star'])


@pytest.mark.parametrize('name', ['v7w', 'pointqa'])
def test_a_point_where_only_boxes_are_known_is_refused(root, name):
    with pytest.raises(
        BadRecord, match=r"row 0 .*kind='point' needs a segmentation.* region 0 is a box"
    ):
        load(root, name, kind='point')
    own = load(root, name, kind='rectangle')
    assert own.prompt_hash == load(root, name).prompt_hash  # the set's own kind, in its own style


def test_numbers_for_ids_and_the_published_scorer(root):
    rows = [dict(r, id=i) for i, r in enumerate(ROWS['pointqa'])]
    (root / 'pointqa.json').write_text('\n'.join(map(json.dumps, rows)))  # JSON Lines
    task = load(root, 'pointqa', reference=True)
    assert [i.id for i in task.items] == ['0', '1', '2'] and isinstance(task.scorer, PlainMatch)
    assert score_predictions(task, {i: t for i, t in zip('012', (' 2', '2.', 'two'))}).frame[
        'score'
    ].tolist() == [1, 0, 0]


def broken(name, **change):
    row = copy.deepcopy(ROWS[name][0])
    for k, v in change.items():
        if v is None:
            del row[k]
        else:
            row[k] = v
    return row


@pytest.mark.parametrize(
    'name,row,match',
    [
        ('v7w', broken('v7w', question=None), "no field 'question'"),
        ('v7w', broken('v7w', question=''), 'question is empty'),
        ('v7w', broken('v7w', bboxes=BOXES[:3]), '3 bboxes, expected 4'),
        ('v7w', broken('v7w', answer=[1, 1, 2, 2]), 'none of the boxes'),
        ('v7w', broken('v7w', bboxes=[[9, 9, 5, 5], *BOXES[1:]]), 'has no area'),
        ('v7w', broken('v7w', image=7), 'image is int'),
        ('v7w', broken('v7w', bboxes=[[1, 2, 3], *BOXES[1:]]), 'has 3 numbers'),
        ('v7w', 'text', 'not an object'),
        ('v7w', broken('v7w', id='vcr-1'), 'belongs to vcr'),
        ('pointqa', broken('pointqa', answer=True), 'answer is bool'),
        ('pointqa', broken('pointqa', bboxes=BOXES), '4 bboxes, expected 1'),
        ('vcr_qa', broken('vcr_qa', answer_choices=[['a']] * 3), '3 answer_choices'),
        ('vcr_qa', broken('vcr_qa', answer_label=4), 'answer_label=4'),
        ('vcr_qa', broken('vcr_qa', rationale_label=-1), 'rationale_label'),
        ('vcr_qa', broken('vcr_qa', meta_dir='f/none.json'), 'none.json'),
        ('vcr_qa', broken('vcr_qa', meta_dir='../../x.json'), 'outside'),
        ('vcr_qa', broken('vcr_qa', question=['Why', [7], '?']), 'instance 7'),
        ('vcr_qa', broken('vcr_qa', class_names=['person']), 'points outside its list'),
        ('refcocog', broken('refcocog', answer=['x']), 'answer is list'),
        ('refcocog', broken('refcocog', segmentations=[[[1, 2, 3, 4]]]), 'polygon'),
    ],
)
def test_bad_rows_are_named(root, name, row, match):
    good = ROWS[name][0] if not isinstance(row, dict) else dict(ROWS[name][1 % len(ROWS[name])])
    (root / f'{name}.json').write_text(json.dumps([good, row]))
    with pytest.raises(BadRecord, match=match) as e:
        load(root, name)
    assert f'{name}.json row 1 (id ' in str(e.value)
    quarantine = Quarantine(cap=0.5)
    assert (
        len(load(root, name, quarantine=quarantine)) == 1
        and quarantine.n_bad == 1
        and quarantine.n_seen == 2
    )


def test_bad_rows_include_pictures_and_regions_outside_them(root):
    first, second, *rest = ROWS['v7w']
    far = [900, 900, 950, 950]
    rows = [
        first | dict(bboxes=[far, *BOXES[1:]], answer=far),
        second | dict(image='f/none.png'),
        *rest,
    ]
    (root / 'v7w.json').write_text(json.dumps(rows))
    assert len(load(root, 'v7w')) == 5  # not opened yet
    quarantine = Quarantine(cap=0.5)
    assert len(load(root, 'v7w', quarantine=quarantine)) == 3 and quarantine.n_bad == 2
    assert (
        'outside the picture of 200x150' in quarantine.records[0]['reason']
        and 'missing' in quarantine.records[1]['reason']
    )


def test_bad_files_and_settings(root):
    with pytest.raises(FileNotFoundError, match='none.json is missing'):
        region_task('v7w', root / 'none.json', root)
    with pytest.raises(ValueError, match='use one of v7w'):
        region_task('vqa', root / 'v7w.json', root)
    (root / 'e.json').write_text('[]')
    with pytest.raises(BadRecord, match='no usable rows'):
        region_task('v7w', root / 'e.json', root)
    (root / 't.json').write_text(json.dumps(ROWS['v7w'])[:-40])
    with pytest.raises(BadRecord, match='row 4 .*truncated'):
        region_task('v7w', root / 't.json', root)
    assert region_task('v7w', root / 'v7w.json', root, limit=2).name == 'v7w.head2'


def test_a_region_outside_the_picture_is_named_when_it_is_loaded(root):
    far = [[210, 10, 260, 50], *BOXES[1:]]
    (root / 'v7w.json').write_text(json.dumps([dict(ROWS['v7w'][0], bboxes=far, answer=far[0])]))
    with pytest.raises(ValueError, match='outside the picture of 200x150'):
        load(root, 'v7w').items[0].images[0].load()


def test_marked_images_have_keys_of_their_own(root):
    plain, a, b = (
        ImageRef('f/a.png', str(root)),
        *(
            MarkedImage('f/a.png', str(root), marks=m)
            for m in ((Pointer((10, 10), (60, 60)),), (Pointer((60, 60), (10, 10)),))
        ),
    )
    assert image_key(plain) == 'f/a.png' and len({image_key(x) for x in (plain, a, b)}) == 3
    assert len({x.load().tobytes() for x in (plain, a, b)}) == 3 and hash(a) != hash(b)


def test_votes(root):
    tasks = [load(root, 'v7w', seed=s) for s in range(3)]
    said = [
        dict(zip(['v7w-0', 'v7w-1', 'v7w-2', 'v7w-3', 'v7w-4'], t))
        for t in (
            ['A', 'C', 'none', 'none', 'B'],
            ['B', 'B.', 'C', 'none', 'A'],
            ['A', '(B)', 'none', 'none', 'C'],
        )
    ]
    members = [score_predictions(t, s) for t, s in zip(tasks, said)]
    result = vote(members, tasks[0])
    assert result.frame['parsed'].tolist() == [
        'A',
        'B',
        'C',
        '',
        'B',
    ]  # a tie goes to the first member
    assert result.accuracy == 0.6 and result.header['agreement'] == pytest.approx(
        (2 / 3 + 2 / 3 + 1 / 3 + 1 + 1 / 3) / 5
    )
    assert (
        result.header['member_scores'] == [m.accuracy for m in members]
        and result.condition == 'ensemble'
    )
    result.save(root / 'out')
    with pytest.raises(ValueError, match='two or more'):
        vote(members[:1], tasks[0])
    with pytest.raises(ValueError, match='exactly the questions'):
        vote(members, tasks[0].head(2))


COCO = dict(
    categories=[dict(id=1, name='dog'), dict(id=2, name='cup')],
    images=[
        dict(id=5, file_name='f/a.png', width=200, height=150),
        dict(id=6, file_name='f/b.png', width=200, height=150),
    ],
    annotations=[
        dict(image_id=5, category_id=1, bbox=[10, 10, 50, 50]),
        dict(image_id=5, category_id=2, bbox=[130, 90, 50, 50]),
        dict(image_id=6, category_id=1, bbox=[10, 10, 50, 50]),
        dict(image_id=6, category_id=1, bbox=[130, 90, 50, 50]),
        dict(image_id=6, category_id=2, bbox=[0, 0, 200, 150], iscrowd=1),
    ],
)


def test_arrow_probe_from_coco(root):
    (root / 'c.json').write_text(json.dumps(COCO))
    task = arrow_task(coco_objects(root / 'c.json'), root)
    assert [i.id for i in task.items] == ['f/a.png/0', 'f/a.png/1']  # b has two dogs and a crowd
    ends = [(i.images[0].marks[0].tail, i.images[0].marks[0].tip) for i in task.items]
    assert ends[0] == ends[1][::-1] and set(ends[0]) == {(35.0, 35.0), (155.0, 115.0)}
    for i in task.items:
        tip = i.images[0].marks[0].tip
        assert i.choices['AB'.index(i.answers[0])] == ('dog' if tip == (35.0, 35.0) else 'cup')
        base, drawn = (
            np.asarray(x, int) for x in (ImageRef('f/a.png', str(root)).load(), i.images[0].load())
        )
        changed = np.abs(base - drawn).sum(-1) > 0
        near = [changed[int(y) - 8 : int(y) + 9, int(x) - 8 : int(x) + 9].sum() for x, y in ends[0]]
        assert changed.any() and (near[0] > near[1]) == (
            tip == ends[0][0]
        )  # the head is the thicker end
    always = score_predictions(task, {i.id: 'A' for i in task.items})
    assert always.accuracy == 0.5 and always.header['metrics']['circular'] == 0
    right = score_predictions(task, {i.id: i.answers[0] for i in task.items})
    assert right.header['metrics']['circular'] == 1


def test_arrow_probe_is_seeded_and_bounded():
    rng = random.Random(0)
    pictures = [
        (
            f'{n}.png',
            (300, 200),
            [
                ('dog', (x := rng.randint(0, 50), 10, x + 50, 60)),
                ('cup', (200, 100, 260, 160)),
                ('hat', (20, 120, 80, 180)),
            ],
        )
        for n in range(40)
    ]
    tasks = [arrow_task(pictures, '.', pairs=10, seed=s) for s in (0, 0, 1)]
    hashes = [t.prompt_hash for t in tasks]
    assert hashes[0] == hashes[1] != hashes[2] and [len(t) for t in tasks] == [20, 20, 20]
    letters = [i.answers[0] for i in arrow_task(pictures, '.').items[::2]]
    assert {'A', 'B'} == set(letters) and 5 < letters.count('A') < 35
    with pytest.raises(ValueError, match='none of 40 pictures'):
        arrow_task(pictures, '.', min_length=2.0)
    overlap = [('x.png', (100, 100), [('dog', (0, 0, 90, 90)), ('cup', (10, 10, 99, 99))])]
    with pytest.raises(ValueError, match='none of 1 pictures'):
        arrow_task(overlap, '.')


@pytest.mark.parametrize(
    'change,match',
    [
        (dict(annotations=[dict(image_id=9, category_id=1, bbox=[0, 0, 1, 1])]), 'annotation 0: 9'),
        (dict(annotations=[dict(image_id=5, category_id=1)]), "annotation 0: 'bbox'"),
        (dict(annotations=[dict(image_id=5, category_id=1, bbox=[1, 2])]), 'annotation 0'),
        (dict(images=[dict(id=1)]), 'not a COCO instances file'),
    ],
)
def test_bad_coco_files(tmp_path, change, match):
    (tmp_path / 'bad.json').write_text(json.dumps(COCO | change))
    with pytest.raises(BadRecord, match=match):
        coco_objects(tmp_path / 'bad.json')


@pytest.mark.fault('vip-18')
def test_pointer_geometry_scales_with_the_picture():
    small, large = (
        Pointer((20, 20), (80, 80)).marker((100, 100)),
        Pointer((200, 200), (800, 800)).marker((1000, 1000)),
    )
    assert isinstance(small, Marker) and large.width > small.width >= 1
    tip = large.head[1]
    assert tip == (800, 800) and all(
        w[0] < 800 and w[1] < 800 for w in (large.head[0], large.head[2])
    )
    short = Pointer((50, 50), (52, 52)).marker((1000, 1000))
    assert all(abs(p[0] - 52) < 3 for p in short.head)  # never longer than half the arrow
    assert draw_marker(Image.new('RGB', (100, 100)), small, (255, 0, 0), 255).getbbox()


def official_refcocog(folder):
    """RefCOCOg as published: two references of the test part, of two and one sentences, and one of
    the training part."""
    place = folder / 'refcocog'
    place.mkdir()
    refs = [
        dict(ref_id=i, ann_id=10 + i, image_id=5, split=split, sentences=sentences)
        for i, (split, sentences) in enumerate(
            [
                ('test', [dict(sent_id=1, sent='the cup'), dict(sent_id=2, sent='a red cup')]),
                ('train', [dict(sent_id=3, sent='a bird')]),
                ('test', [dict(sent_id=4, sent='the dog')]),
            ]
        )
    ]
    (place / 'refs(umd).p').write_bytes(pickle.dumps(refs, protocol=0))
    outline = [[30.0, 30.0, 90.0, 30.0, 90.0, 90.0]]
    runs = dict(counts=[1, 2], size=[150, 200])
    shapes = (outline, outline, runs)
    objects = [
        dict(id=10 + i, image_id=5, bbox=[20 + 10 * i, 30, 60, 50], segmentation=shape)
        for i, shape in enumerate(shapes)
    ]
    coco = dict(images=[dict(id=5, file_name='a.png')], annotations=objects)
    (place / 'instances.json').write_text(json.dumps(coco))
    return place


def test_refcocog_is_read_from_its_official_files(root):
    place = official_refcocog(root)
    assert questions_of('refcocog', root) == place / 'refs(umd).p'
    assert questions_of('v7w', root) == root / 'v7w-test.json'
    task = region_task('refcocog', place / 'refs(umd).p', root / 'f', scorer=Caption(()))
    assert [i.answers for i in task.items] == [('the cup', 'a red cup'), ('the dog',)]
    boxes = [i.images[0].marks[0].region for i in task.items]
    # left, top, width, height becomes left, top, right, bottom; runs of pixels are no outline
    assert [b.box for b in boxes] == [(20, 30, 80, 80), (40, 30, 100, 80)]
    assert [len(b.polygons) for b in boxes] == [1, 0]
    said = score_predictions(task, {'refcocog-1': 'red cup', 'refcocog-4': 'cat'})
    assert said.frame['score'].tolist() == [1, 0] and said.accuracy == 0.5
    # a file of rows of one's own goes first
    (root / 'refcocog-test.json').write_text('[]')
    assert questions_of('refcocog', root) == root / 'refcocog-test.json'


def test_a_damaged_refcocog_is_named(root):
    place = official_refcocog(root)
    problems = refcocog_problems(place)
    assert problems[1:] == [
        'row count: 0 sentences of split val, the card says 4,896',
        'row count: 3 sentences of split test, the card says 9,602',
    ]
    found = CliRunner().invoke(app, ['data', 'check', 'refcocog', str(place)])
    assert found.exit_code == 1 and '3 sentences of split test' in found.output
    refs = place / 'refs(umd).p'
    with pytest.raises(BadRecord, match='a.png is in none of'):
        region_task('refcocog', refs, root / 'nowhere', scorer=Caption(()))
    (place / 'instances.json').write_text(json.dumps(dict(images=[], annotations=[])))
    with pytest.raises(BadRecord, match='reference 0: 10 is not in instances.json|reference 0'):
        region_task('refcocog', refs, root / 'f', scorer=Caption(()))
    refs.write_bytes(b"cos\nsystem\n(S'touch hacked'\ntR.")
    with pytest.raises(BadRecord, match='asks for os.system, and data needs no code'):
        region_task('refcocog', refs, root / 'f', scorer=Caption(()))
    refs.unlink()
    assert refcocog_problems(place) == [f'missing file: refs(umd).p is not in {place}']
