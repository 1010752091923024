"""Markers: pixels against the published renders, from geometry and from the seed; ranges of sampled
geometry; bad input."""

import json, os, random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageOps

from vlmbench.data.overlay import (
    MARKERS,
    PALETTE,
    Marker,
    _widened,
    bezier,
    marker_layer,
    draw_marker,
    joint_markers,
    region_text,
    sample_alpha,
    sample_marker,
)
from vlmbench.data.region import Region

ROOT = Path(os.environ.get('VLMBENCH_GOLDEN', Path(__file__).parent / 'golden')) / 'vip_llava'
CASES = sorted(ROOT.glob('case_*'))
RENDERS = [
    (c, i)
    for c in CASES
    for i in range(len(json.loads((c / 'drawing/drawing.json').read_text())['renders']))
]


def region(r):
    return Region(tuple(r['bbox']), tuple(map(tuple, r['segmentation'] or ())))


def marker(r):
    "The `Marker` of a golden render's resolved geometry."
    g, kind = r['resolved'], r['kind']
    if kind in ('rectangle', 'ellipse', 'point'):
        return Marker(kind, (tuple(g['box'][:2]), tuple(g['box'][2:])), g.get('line_width', 1))
    if kind == 'triangle':
        return Marker(kind, g['points'], g['line_width'])
    if kind == 'scribble':
        return Marker(kind, g['control_points'], g['line_width'], samples=g['samples'])
    if kind == 'arrow':
        return Marker(kind, g['shaft'], g['shaft_width'], head=g['head'], filled=g['head_filled'])
    if kind == 'mask':
        return Marker(kind, polygons=g['polygons'])
    l, t, rr, b = r['bbox']
    polygons = [list(zip(p[::2], p[1::2])) for p in r['segmentation'] or ()] or [
        [(l, t), (l, b), (rr, b), (rr, t)]
    ]
    return Marker(kind, width=g['half_width'], polygons=polygons)


def render(case, i):
    d = json.loads((case / 'drawing/drawing.json').read_text())
    return d['renders'][i], Image.open(
        case / f'drawing/base_{d["renders"][i]["base"]}.png'
    ).convert('RGB')


def test_there_are_cases():
    assert RENDERS


@pytest.mark.parametrize('case,i', RENDERS, ids=lambda x: x.name if isinstance(x, Path) else str(x))
def test_pixels_from_geometry(case, i):
    r, base = render(case, i)
    if r.get('error'):
        with pytest.raises(ValueError, match='needs a segmentation'):
            sample_marker(random.Random(0), r['kind'], region(r), base.size)
        return
    m = marker(r)
    out = np.asarray(draw_marker(base, m, r['rgb'], r['alpha_used']))
    assert (out == np.asarray(Image.open(case / 'drawing' / r['file']).convert('RGB'))).all()
    mask = np.asarray(marker_layer(m, base.size, r['rgb'], r['alpha_used']))[..., 3] > 0
    assert (
        mask == np.asarray(Image.open(case / 'drawing' / r['mask_file']).convert('1'))
    ).all() and mask.sum() == r['mask_pixels']


def test_a_wide_contour_has_the_pixels_of_its_outlines():
    """Whatever leaves the picture, on whole pixels and between them: one widened outline for (2w +
    1)^2 shifted ones."""
    rng = random.Random(0)
    for i in range(300):
        size, w = (rng.randint(5, 90), rng.randint(5, 90)), rng.randint(1, 7)
        at = (lambda n: rng.uniform(-8, n + 8)) if i % 2 else (lambda n: rng.randint(-8, n + 8))
        p = [(at(size[0]), at(size[1])) for _ in range(rng.randint(3, 8))]
        want = Image.new('1', size)
        for dx in range(-w, w + 1):
            for dy in range(-w, w + 1):
                ImageDraw.Draw(want).polygon([(x + dx, y + dy) for x, y in p], outline=1)
        assert (np.asarray(_widened(p, w, size)) == np.asarray(want)).all(), (size, w, p)
        assert (
            marker_layer(Marker('mask contour', width=w, polygons=(p,)), size, 'gold', 9)
            .getchannel('A')
            .point(bool, '1')
            == want
        )


def test_an_enormous_contour_takes_a_few_outlines(monkeypatch):
    drawn, real = [], ImageDraw.ImageDraw.polygon
    monkeypatch.setattr(
        ImageDraw.ImageDraw, 'polygon', lambda *a, **kw: drawn.append(real(*a, **kw))
    )
    size, box = (25_000, 1000), [(2500, 100), (2500, 900), (22_500, 900), (22_500, 100)]
    marker = Marker('mask contour', width=74, polygons=(box,))
    assert (
        marker_layer(marker, size, 'red', 128).getbbox() == (2426, 26, 22_575, 975)
        and len(drawn) < 10
    )


@pytest.mark.parametrize(
    'case,i',
    [
        x
        for x in RENDERS
        if render(*x)[0]['kind'] in ('rectangle', 'ellipse', 'arrow', 'mask contour', 'mask')
    ],
    ids=lambda x: x.name if isinstance(x, Path) else str(x),
)
def test_geometry_from_seed(case, i):
    "Kinds whose draws are all Python's: the same generator gives the same marker."
    r, base = render(case, i)
    rng = random.Random(r['seed'])
    alpha = r['alpha'] if r['alpha'] is not None else sample_alpha(rng, r['kind'])
    m = sample_marker(
        rng, r['kind'], region(r), base.size, r['width'], r['style'], r['image_size_anchor']
    )
    want = marker(r)
    assert alpha == r['alpha_used']
    for a, b in ((m.points, want.points), (m.head, want.head), *zip(m.polygons, want.polygons)):
        np.testing.assert_allclose(np.array(a, float), np.array(b, float), atol=1e-9)
    assert m.filled == want.filled and (m.kind == 'mask' or m.width == want.width)


@pytest.mark.parametrize('case', CASES, ids=lambda c: c.name)
def test_several_in_order(case):
    multi = json.loads((case / 'drawing/drawing.json').read_text())['multi']
    img = Image.open(case / f'drawing/base_{multi["base"]}.png').convert('RGB')
    for s in multi['steps']:
        img = draw_marker(img, marker(s), s['rgb'], s['alpha_used'])
    assert (
        np.asarray(img) == np.asarray(Image.open(case / 'drawing' / multi['file']).convert('RGB'))
    ).all()


@pytest.mark.parametrize('case', CASES, ids=lambda c: c.name)
@pytest.mark.fault('vip-17')
def test_words_and_palette(case):
    d = json.loads((case / 'drawing/drawing.json').read_text())
    assert {k: list(v) for k, v in PALETTE.items()} == d['color_pool'] and {
        k: list(v) for k, v in MARKERS.items()
    } == d['words']


REGION = Region(
    (60.0, 50.0, 200.0, 180.0),
    (
        (60.0, 110.0, 130.0, 50.0, 200.0, 120.0, 120.0, 180.0),
        (150.0, 60.0, 190.0, 60.0, 190.0, 90.0),
    ),
)
SIZE = (672, 400)  # unit 2


@pytest.mark.parametrize('kind', MARKERS)
def test_ranges(kind):
    from shapely import Point, Polygon, unary_union

    shapes = [Polygon(list(zip(p[::2], p[1::2]))) for p in REGION.polygons]
    union, rng, inside = unary_union(shapes).buffer(1e-6), random.Random(1), 0
    low, high = dict(
        rectangle=(4, 16), ellipse=(4, 16), triangle=(4, 16), scribble=(4, 24), arrow=(2, 12)
    ).get(kind, (1, 4))
    for _ in range(100):
        m = sample_marker(rng, kind, REGION, SIZE)
        if kind not in ('mask', 'point'):
            assert low <= m.width <= high
        if kind == 'triangle':
            inside += all(union.contains(Point(p)) for p in m.points)
        if kind == 'scribble':
            assert m.samples == 2000
            inside += all(union.contains(Point(p)) for p in m.points)
        if kind == 'point':
            (l, t), (r, b) = m.points
            assert 10 / 2 <= (r - l) / 2 <= 40 * 2 and 0.25 - 1e-9 <= (r - l) / (b - t) <= 4 + 1e-9
        if kind == 'ellipse':
            (l, t), (r, b) = m.points
            assert 1 <= (r - l) / 140 <= 1.5 and abs((l + r) / 2 - 130) < 1e-6
        if kind == 'arrow':
            x, y = m.head[1]
            assert 95 <= x <= 165 and 82.5 <= y <= 147.5
    if kind in ('triangle', 'scribble'):
        assert inside > 95
    assert len({sample_alpha(rng, kind) for _ in range(500)}) > 50


def test_no_color_kind_pair_twice():
    for seed in range(200):
        j = joint_markers(random.Random(seed), ['rectangle', 'arrow'], 8)
        pairs = [(k, c) for k, c, _ in j if c]
        assert len(set(pairs)) == len(pairs)
    assert any(
        c is None for _, c, _ in joint_markers(random.Random(0), ['rectangle'], 12)
    )  # nine names, then none


@pytest.mark.parametrize('seed', range(8))
def test_a_scribble_is_its_segments_drawn_one_by_one(seed):
    rng = random.Random(seed)
    size = rng.randint(30, 700), rng.randint(30, 700)
    points = [(rng.uniform(-9, size[0]), rng.uniform(-9, size[1])) for _ in range(4)]
    marker = Marker('scribble', tuple(points), rng.randint(1, 9), samples=rng.randint(2, 900))
    want = Image.new('RGBA', size)
    curve = bezier(points, marker.samples)
    for a, b in zip(curve, curve[1:]):
        ImageDraw.Draw(want).line([a, b], fill=(255, 0, 0, 99), width=marker.width)
    assert marker_layer(marker, size, 'red', 99).tobytes() == want.tobytes()


def test_bad_input():
    rng = random.Random(0)
    for bad, match in (
        (lambda: sample_marker(rng, 'star', REGION, SIZE), 'kinds are rectangle'),
        (
            lambda: sample_marker(rng, 'rectangle', Region((700.0, 1.0, 720.0, 9.0)), SIZE),
            'outside the picture',
        ),
        (
            lambda: sample_marker(
                rng, 'mask', Region(None, ((1.0, 1.0, 2.0, 2.0, 3.0, 3.0),)), SIZE
            ),
            'no area',
        ),
        (lambda: draw_marker(Image.new('RGB', SIZE), Marker('mask'), 'pink'), 'colours are red'),
        (lambda: draw_marker(Image.new('RGB', SIZE), Marker('mask'), 'red', 300), '0 to 255'),
        (lambda: region_text('blob'), 'unknown'),
    ):
        with pytest.raises(ValueError, match=match):
            bad()


@pytest.mark.parametrize('number', range(1, 9))
def test_markers_lie_on_the_upright_picture(number):
    "An opened phone photo is marked where its viewer shows the object."
    pixels = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    photo = Image.fromarray(pixels)
    photo.getexif()[0x0112] = number
    box = Marker('rectangle', ((2, 3), (9, 12)), 2)
    got, want = (draw_marker(i, box, 'red') for i in (photo, ImageOps.exif_transpose(photo)))
    assert got.size == want.size and got.tobytes() == want.tobytes()
    assert photo.size == (24, 16)
