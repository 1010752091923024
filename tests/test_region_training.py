"""Region rows in training: drawn anew at every draw, the same after a resume, read from published
files, grouped by length."""

import json

import pytest
import torch
from PIL import Image

from vlmbench.data.quarantine import Quarantine
from vlmbench.data.region_rows import DrawRegions, sample_from_region_row
from vlmbench.data.world import WorldSize, load_world, write_world
from vlmbench.train.scale import base_model
from vlmbench.methods.recipes import get_recipe
from vlmbench.models.vlm import build_vlm
from vlmbench.data.sources import StageData, grouped_order, open_samples
from vlmbench.train.loader import make_loader
from vlmbench.train.recipe import RecipeError, Stage, full, override
from vlmbench.train.scale import get_scale

ROWS = 24


@pytest.fixture(scope='module')
def world(tmp_path_factory):
    size = WorldSize(
        **dict.fromkeys(WorldSize.__dataclass_fields__, 0)
        | dict(region_train=ROWS, text_train=6, vqa_train=6)
    )
    return write_world(tmp_path_factory.mktemp('w') / 'world', sizes=size)


@pytest.fixture(scope='module')
def processor():
    return build_vlm(base_model('asset:llm'), base_model('asset:vit'), template='world')[1]


@pytest.fixture
def stage():
    return get_recipe('vip_llava', get_scale('tiny')).stage('region')


def loader(world, processor, stage, seed=0, transform=DrawRegions()):
    return make_loader(
        StageData(load_world(world, 'region_train'), transform), processor, stage, seed
    )


def take(loader, n):
    found = []
    for batch in loader:
        found.append(batch)
        if len(found) == n:
            return found


def same(a, b):
    return a['sample_ids'] == b['sample_ids'] and all(
        torch.equal(a[k], b[k]) for k in a if isinstance(a[k], torch.Tensor)
    )


def pictures(batches):
    "Sample id -> the pictures it was drawn as."
    out = {}
    for b in batches:
        for i, p in zip(b['sample_ids'], b['pixel_values']):
            out.setdefault(i, []).append(p)
    return out


def test_markers_change_from_draw_to_draw_and_follow_the_seed(world, processor, stage):
    small = override(stage, dict(batch_rows=4))
    first = take(loader(world, processor, small), 12)
    assert all(same(a, b) for a, b in zip(first, take(loader(world, processor, small), 12)))
    seen = pictures(first)
    assert max(map(len, seen.values())) >= 2  # at least two epochs
    again = [v for v in seen.values() if len(v) > 1]
    changed = sum(not torch.equal(v[0], v[1]) for v in again)
    assert changed >= 0.8 * len(again) > 0
    other = pictures(take(loader(world, processor, small, seed=1), 12))
    both = set(seen) & set(other)
    assert sum(not torch.equal(seen[i][0], other[i][0]) for i in both) >= 0.8 * len(both)


def test_a_resumed_loader_draws_what_it_would_have_drawn(world, processor, stage):
    small = override(stage, dict(batch_rows=2))
    whole = loader(world, processor, small)
    first = take(whole, 5)
    state = json.loads(json.dumps(whole.state_dict()))
    rest, resumed = take(whole, 6), loader(world, processor, small)
    resumed.load_state_dict(state)
    assert all(same(a, b) for a, b in zip(rest, take(resumed, 6))) and not same(first[0], rest[0])
    other = loader(world, processor, small, seed=3)
    with pytest.raises(ValueError, match='rng_seed|seed'):
        other.load_state_dict(state)


def test_text_and_none_leave_the_picture(world, processor, stage):
    for how, said in (('text', 'at [ '), ('none', 'object ?')):
        sample = load_world(world, 'region_train')[0]
        out = DrawRegions(how=how)(sample)
        assert (
            out.images[0].tobytes() == sample.images[0].load().tobytes()
            and said in out.turns[0].text
        )
        ids = processor.encode(out).input_ids.tolist()
        assert processor.tokenizer.unk_token_id not in ids
    assert (
        processor.tokenizer.unk_token_id
        not in processor.encode(DrawRegions()(sample)).input_ids.tolist()
    )


@pytest.mark.parametrize('grouping', ['length', 'modality'])
def test_grouping(world, processor, stage, grouping):
    samples = open_samples(
        world, 'region_train*2+text_train*1+vqa_train*1', parse=sample_from_region_row
    )
    one = override(stage, dict(packing=False, grouping=grouping, batch_rows=4, accumulation=1))
    order = grouped_order(samples, grouping, one.step_rows, DrawRegions().turns)
    words, n = dict(enumerate(order.lengths)), len(order)
    assert (
        min(words.values()) > 10
        and sorted(order(0, 0)) == sorted(samples.order(0, 0))
        and len(order) == n
    )
    groups = [order(0, 0)[i : i + 4] for i in range(0, n - n % 4, 4)]
    spread = lambda g: sum(max(words[i] for i in x) - min(words[i] for i in x) for x in g)
    plain = samples.order(0, 0)
    assert (
        spread(groups) < spread([plain[i : i + 4] for i in range(0, n - n % 4, 4)])
        or grouping == 'modality'
    )
    if grouping == 'modality':
        kinds = [
            {order.has_image[i] for i in g} for g in groups[:-2]
        ]  # what is left over is mixed at the end
        assert all(len(k) == 1 for k in kinds) and len({next(iter(k)) for k in kinds}) == 2
    batch = take(make_loader(StageData(samples, DrawRegions(), order), processor, one), 1)[0]
    assert len(batch['sample_ids']) == 4 and batch['sample_ids'] == [
        samples[int(i)].id for i in order(0, 0)[:4]
    ]


def test_grouping_needs_padding():
    with pytest.raises(RecipeError, match='needs packing=False'):
        Stage('s', dict(layers=full(1e-3)), 'x', steps=1, grouping='length')
    with pytest.raises(
        RecipeError, match="grouping must be one of .*'length', 'modality'.*, got 'size'"
    ):
        Stage('s', dict(layers=full(1e-3)), 'x', steps=1, grouping='size', packing=False)


PUBLISHED = [
    dict(
        id='refcocog-1',
        image='a.png',
        bboxes=[[5, 5, 40, 40]],
        segmentations=[[[5, 5, 40, 5, 20, 40]]],
        answer='a red cup',
    ),
    dict(
        id='refcocog-gpt4v-1',
        image='a.png',
        bboxes=[[5, 5, 40, 40]],
        conversations=[
            {'from': 'human', 'value': 'What is <bbox>?'},
            {'from': 'gpt', 'value': 'The thing <bbox> is a cup.'},
        ],
    ),
    dict(
        id='vg_rel-1',
        image='a.png',
        bboxes=[[5, 5, 20, 20], [30, 30, 60, 60]],
        answer='(cup, on, table)',
    ),
    dict(
        id='v7w-1',
        image='a.png',
        question='Which?',
        bboxes=[[1, 1, 9, 9], [9, 1, 20, 9], [1, 20, 9, 40], [30, 30, 60, 60]],
        answer=[30, 30, 60, 60],
    ),
    dict(
        id='pointQA_twice-1',
        image='a.png',
        general_question='How many?',
        bboxes=[[5, 5, 20, 20]],
        answer='2',
    ),
    dict(
        id='flickr30k-1',
        image='a.png',
        grounding='a man <bbox0> sees a dog <bbox1>',
        bbox=[[[1, 1, 20, 20]], [[30, 30, 60, 60]]],
    ),
    dict(
        id='vcr-1',
        image='a.png',
        meta_dir='./dataset/vcr1images/a.json',
        question=['What', 'is', [0], 'doing', '?'],
        answer_choices=[['a', [0]], ['b'], ['c'], ['d']],
        rationale_choices=[['e'], ['f'], ['g'], ['h']],
        answer_label=1,
        rationale_label=2,
        class_names=['person'],
    ),
    dict(
        id='own-1',
        image='a.png',
        regions=[dict(box=[5, 5, 20, 20])],
        conversations=[
            {'from': 'human', 'value': '<image>\nWhat is <region>?'},
            {'from': 'gpt', 'value': 'A cup.'},
        ],
    ),
    dict(
        id='0f3c-uuid',
        image='a.png',
        bboxes=[[5, 5, 20, 20], [30, 30, 60, 60]],
        conversations=[
            {'from': 'human', 'value': 'Is <bbox0> left of <bbox1>?'},
            {'from': 'gpt', 'value': 'Yes.'},
        ],
    ),
    dict(
        id='text-1',
        conversations=[{'from': 'human', 'value': 'Hello'}, {'from': 'gpt', 'value': 'Hi'}],
    ),
]


@pytest.fixture
def mixed(tmp_path):
    Image.new('RGB', (64, 64), (40, 60, 80)).save(tmp_path / 'a.png')
    (tmp_path / 'vcr1images').mkdir()
    (tmp_path / 'vcr1images' / 'a.json').write_text(
        json.dumps(
            dict(boxes=[[4, 4, 30, 30, 0.9]], segms=[[[[4, 4], [30, 4], [30, 30], [4, 30]]]])
        )
    )

    def write(rows):
        (tmp_path / 'mix.json').write_text(json.dumps(rows))
        return tmp_path

    return write


def test_a_published_file_is_read_and_drawn(mixed):
    samples = open_samples(mixed(PUBLISHED), 'mix', parse=DrawRegions.parse)
    old = json.dumps([samples[i].meta for i in range(len(samples))], sort_keys=True)
    for s in samples:
        out = DrawRegions()(s)
        assert (
            all('<bbox' not in t.text and '<region' not in t.text for t in out.turns)
            and out.turns[1].role == 'assistant'
        )
        if s.images:
            assert (
                out.images[0].tobytes() != s.images[0].load().tobytes()
                and out.turns[0].text.count('<image>') == 1
            )
        assert DrawRegions().turns(s)
    assert json.dumps([samples[i].meta for i in range(len(samples))], sort_keys=True) == old
    faulty = DrawRegions(reference=True)(samples[0])
    assert (
        not faulty.images and '<image>' not in faulty.turns[0].text
    )  # as published: trained on text alone


@pytest.mark.parametrize(
    'change,match',
    [
        (dict(id='refcocog-1', bboxes=[[70, 5, 90, 40]]), r'mix.json:\d.*outside the picture'),
        (dict(id='refcocog-1', bboxes=[[5, 5, 5, 40]]), 'row 0.*no area'),
        (dict(id='refcocog-1', segmentations=[[[5, 5, 6, 6, 7, 7]]]), r'mix.json:\d.*empty'),
        (
            dict(id='vcr-1', meta_dir='../../etc/passwd'),
            r'row .vcr-1.: side file .*outside the root',
        ),
        (dict(id='vcr-1', meta_dir='./dataset/gone.json'), r'row .vcr-1.: side file'),
        (dict(id='v7w-1', answer=[1, 2, 3, 4]), r'none of the four boxes'),
        (
            dict(id='own-1', regions=[dict(box=[5, 5, 20, 20]), dict(box=[5, 5, 20, 20])]),
            r'mix.json:\d: region 1 is never referred to',
        ),
        (dict(id='own-1', regions=[]), r'bad region: mix.json:\d: the text refers to a region'),
    ],
)
def test_bad_published_rows_name_the_row(mixed, change, match):
    row = next(r for r in PUBLISHED if r['id'] == change['id']) | change
    samples = open_samples(mixed([row]), 'mix', parse=DrawRegions.parse)
    with pytest.raises(ValueError, match=match):
        DrawRegions(kinds=('mask',) if 'segmentations' in change else DrawRegions().kinds)(
            samples[0]
        )


@pytest.mark.fault('vip-5')
def test_a_point_on_a_box_is_refused_never_replaced(mixed):
    own = next(r for r in PUBLISHED if r['id'] == 'own-1')
    sample = open_samples(mixed([own]), 'mix', parse=DrawRegions.parse)[0]
    with pytest.raises(ValueError, match=r'mix.json:\d: a point marker needs a segmentation'):
        DrawRegions(kinds=('point',))(sample)
    for seed in range(30):
        assert (
            'point'
            not in DrawRegions(kinds=('point', 'arrow'), seed=seed)(sample)
            .turns[0]
            .text.split('pointed to')[0]
        )


@pytest.mark.fault('vip-6')
def test_bad_rows_of_a_run_are_listed_and_replaced(mixed, processor, stage, tmp_path):
    good = [dict(PUBLISHED[-3], id=f'own-{i}') for i in range(4)]
    bad = dict(PUBLISHED[-3], id='own-bad', regions=[dict(box=[900, 5, 990, 20])])
    quarantine = Quarantine(path=tmp_path / 'quarantine.json', cap=1.0)
    samples = open_samples(mixed([*good, bad]), 'mix', quarantine, DrawRegions.parse)
    batches = take(
        make_loader(
            StageData(samples, DrawRegions()),
            processor,
            override(stage, dict(batch_rows=1)),
            quarantine=quarantine,
        ),
        4,
    )
    assert quarantine.n_bad and all('own-bad' not in b['sample_ids'] for b in batches)
    quarantine.close()
    assert 'outside the picture' in (tmp_path / 'quarantine.json').read_text() and set(
        quarantine.summary()
    ) == {'bad region'}
