"""Region rows: text and markers against the published row builder, its faults fixed by default,
rows never changed, bad input."""

import copy, json, os, random, re
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from vlmbench.data.overlay import MARKERS, PALETTE
from vlmbench.data.record import BadRecord, ImageRef, Region, Sample, Turn
from vlmbench.data.region_rows import (
    _FLICKR_ASK,
    _LEAD,
    _MOST,
    _OFFER,
    _PUNCT,
    _SINCE,
    _WHY,
    DrawRegions,
    _vcr_answer,
    build_row,
    draw_marks,
)

ROOT = Path(os.environ.get('VLMBENCH_GOLDEN', Path(__file__).parent / 'golden')) / 'vip_llava'
CASES = sorted(ROOT.glob('case_*'))
ROWS = [
    (c, i) for c in CASES for i in range(len(json.loads((c / 'rows.json').read_text())['rows']))
]
name = lambda x: x.name if isinstance(x, Path) else str(x)


def built(case, i, **kw):
    d = json.loads((case / 'rows.json').read_text())
    r = d['rows'][i]
    args = dict(style=r['args'].get('visual_prompt_style', ''), alpha=r['args'].get('alpha'))
    return r, build_row(r['row'], random.Random(r['seed']), d['vcr_meta'], **args, **kw)


def mentions(turns):
    words = '|'.join(sorted((noun for _, noun in MARKERS.values()), key=len, reverse=True))
    return [
        re.findall(rf'\w+ (?:within|with|at|pointed to by) (?:the )?(?:\w+ )?(?:{words})', t)
        for t in turns
    ]


def test_there_are_cases():
    assert ROWS


@pytest.mark.parametrize('case,i', ROWS, ids=name)
def test_reference_rows(case, i):
    r, (marks, turns) = built(case, i, reference=True)
    if r['error'] is not None:  # published rows fail at drawing: a point without a mask
        with pytest.raises(ValueError):
            draw_marks(Image.new('RGB', (336, 336)), marks, random.Random(r['seed']))
        return
    assert [(m.kind, list(m.rgb), list(m.region.box), m.style, m.alpha) for m in marks] == [
        (x['shape'], x['rgb'], x['bbox'], x['style'], x['alpha']) for x in r['draws']
    ]
    assert [[list(p) for p in m.region.polygons] for m in marks] == [
        x['segmentation'] or [] for x in r['draws']
    ]
    want, said = [t['value'] for t in r['conversation']], [t.text for t in turns]
    assert [dict(human='user', gpt='assistant')[t['from']] for t in r['conversation']] == [
        t.role for t in turns
    ]
    if r['kind'] not in ('vcr', 'flickr30k', 'refcocog'):
        assert said == want  # no wording is drawn from a list
    assert mentions(said) == mentions(want)


OWN = Path(__file__).parent / 'golden' / 'vip_llava' / 'case_a'


@pytest.mark.parametrize('i', range(len(json.loads((OWN / 'rows.json').read_text())['rows'])))
def test_wordings_that_the_stored_vectors_show(i):
    r, (_, turns) = built(OWN, i, reference=True)
    assert [t.text for t in turns] == [t['value'] for t in r['conversation']]


class Tape(random.Random):
    """A generator that writes down every draw as the vectors do; drawn wordings become a gap where
    `gaps` is set."""

    def __init__(self, seed, gaps=False):
        self.tape, self.inside, self.gaps = [], False, gaps
        super().__init__(seed)

    def note(self, draw, entry):
        if self.inside:
            return draw()
        self.inside = True
        try:
            value = draw()
        finally:
            self.inside = False
        self.tape.append(entry(value))
        return value

    def getrandbits(self, k):
        return super().getrandbits(k)  # keeps random.Random's own way to draw integers

    def random(self):
        return self.note(super().random, lambda v: ['random', v])

    def randint(self, a, b):
        return self.note(lambda: random.Random.randint(self, a, b), lambda v: ['randint', a, b, v])

    def choices(self, seq, k):
        draw = lambda: random.Random.choices(self, range(len(seq)), k=k)
        return [seq[i] for i in self.note(draw, lambda v: ['choices', len(seq), k, list(v)])]

    def choice(self, seq):
        found = seq[
            self.note(
                lambda: random.Random.choice(self, range(len(seq))),
                lambda i: ['choice', len(seq), i],
            )
        ]
        known = {*MARKERS, *PALETTE, 'object', 'instance'}
        wording = all(isinstance(x, str) and '(' not in x for x in seq) and not set(seq) <= known
        return GAP if self.gaps and wording else found


GAP = '\0'


@pytest.mark.parametrize('case,i', ROWS, ids=name)
def test_every_draw_is_the_published_one(case, i):
    """Same draws in the same order from lists of the same sizes: the wordings of our own stand in
    lists as long as theirs."""
    d = json.loads((case / 'rows.json').read_text())
    r, rng = d['rows'][i], Tape(d['rows'][i]['seed'])
    build_row(
        r['row'],
        rng,
        d['vcr_meta'],
        r['args'].get('visual_prompt_style', ''),
        r['args'].get('alpha'),
        True,
    )
    assert rng.tape == r['tape']


@pytest.mark.parametrize('case,i', ROWS, ids=name)
def test_text_outside_the_wordings_is_the_published_one(case, i):
    """Everything but the drawn wordings, character by character; no wording of theirs names a
    marker."""
    d = json.loads((case / 'rows.json').read_text())
    r = d['rows'][i]
    _, turns = build_row(
        r['row'],
        Tape(r['seed'], gaps=True),
        d['vcr_meta'],
        r['args'].get('visual_prompt_style', ''),
        r['args'].get('alpha'),
        True,
    )
    for turn, want in zip(turns, r['conversation'], strict=True):
        text = turn.text
        for asked in (w for pair in _FLICKR_ASK for w in pair):
            text = text.replace(asked, GAP)
        found = re.fullmatch(re.escape(text).replace(re.escape(GAP), '(.+?)'), want['value'], re.S)
        assert found, f'{text!r} does not fit {want["value"]!r}'
        assert not any(mentions(found.groups())[k] for k in range(len(found.groups())))


@pytest.mark.parametrize('case,i', ROWS, ids=name)
@pytest.mark.fault('vip-1')
@pytest.mark.fault('vip-2')
@pytest.mark.fault('vip-4')
def test_faults_are_fixed(case, i):
    r, (marks, turns) = built(case, i)
    assert sum(t.text.count('<image>') for t in turns) == 1 and turns[0].text.startswith(
        '<image>\n'
    )
    assert not any('<bbox' in t.text for t in turns)
    if r['kind'] == 'vg_rel' and marks[0].kind == marks[1].kind:
        assert marks[0].rgb != marks[1].rgb
    if r['kind'] == 'refcocog':
        assert (
            'pointed region' in turns[0].text
            or 'marked region' in turns[0].text
            or marks[0].text() in turns[0].text
        )
    if r['kind'] == 'flickr30k' and 'make sure to mention both' in turns[0].text:
        assert all(m.text() in turns[1].text for m in marks)


@pytest.mark.parametrize('case,i', ROWS, ids=name)
@pytest.mark.fault('vip-7')
def test_rows_are_not_changed(case, i):
    d = json.loads((case / 'rows.json').read_text())
    row, meta = d['rows'][i]['row'], d['vcr_meta']
    old = copy.deepcopy((row, meta))
    seen = {build_row(row, random.Random(s), meta)[1][0].text for s in range(12)}
    assert (row, meta) == old
    if row['id'].startswith(('vg_rel', 'v7w', 'vcr', 'refcocog-gpt4v')):
        assert len(seen) > 1  # drawn anew at each reading


def vcr_row(**kw):
    """Eleven instances, of which question, right answer, other answers, right rationale and the
    others name different ones."""
    box = lambda i: [[i * 10, 5], [i * 10 + 9, 5], [i * 10 + 9, 20], [i * 10, 20]]
    meta = dict(
        boxes=[[*box(i)[0], *box(i)[2], 0.9] for i in range(12)],
        segms=[[box(i)] for i in range(12)],
    )
    row = dict(
        id='vcr-1',
        image='a.jpg',
        meta_dir='x',
        class_names=['person'] * 12,
        question=['Is', [8], 'near', [1], '?'],
        answer_choices=[[[2], 'sits', '.'], [[3], 'eats', '.'], ['no', '.'], ['maybe', '.']],
        answer_label=0,
        rationale_choices=[
            [[5], 'waves', '.'],
            [[6], 'smiles', '.'],
            [[7], 'runs', '.'],
            [[9], 'reads', '.'],
        ],
        rationale_label=1,
    )
    return row | kw, meta


@pytest.mark.parametrize('reference', [False, True])
@pytest.mark.parametrize(
    'style,shown', [('vcr_qa', {8, 1, 2, 3}), ('vcr_qar', {8, 1, 2, 5, 6, 7, 9}), ('', None)]
)
def test_vcr_marks_only_what_is_mentioned(style, shown, reference):
    row, meta = vcr_row()
    found = set()
    for seed in range(24):
        marks, turns = build_row(row, random.Random(seed), meta, style, reference=reference)
        drawn = {round(m.region.box[0] / 10) for m in marks}
        text = ' '.join(t.text for t in turns)
        assert len(drawn) == len(marks) and all(
            m.text() in text or m.text(False) in text for m in marks
        )
        found.add(frozenset(drawn))
    if shown:
        assert found == {frozenset(shown)}
    else:  # right answer and rationale, or all four, of each question
        assert found == {
            frozenset({8, 1, *a, *b}) for a in ({2}, {2, 3}) for b in ({6}, {5, 6, 7, 9})
        }


def test_published_order_of_vcr_instances():
    row, meta = vcr_row(answer_choices=[['no']] * 4)
    left = lambda **kw: [
        m.region.box[0] // 10 for m in build_row(row, random.Random(0), meta, 'vcr_qa', **kw)[0]
    ]
    assert left(reference=True) == [8, 1] and left() == [1, 8]


FORMS = (
    r'\(B\)',
    r'[\w ]+ answer is \(B\)',
    r'\(B\)\W{1,3} the dog runs\.',
    r'[\w ]+ answer is \(B\) - the dog runs\.',
    r'\(B\) - [\w ]+ because the dog runs\.',
    r'Answer \(B\): the dog runs\.',
    r'Opt for \(B\) if the dog runs\.',
)


def test_vcr_answers_have_the_seven_published_forms():
    "The slot drawn decides the form; the content always begins with a small letter."
    seen = set()
    for seed in range(400):
        rng = Tape(seed)
        said = _vcr_answer(rng, 'B', 'The dog runs.')
        slot = rng.tape[-1][2]
        assert re.fullmatch(FORMS[slot // 2], said), f'slot {slot}: {said}'
        assert [t[:2] for t in rng.tape] == [
            ['choice', n] for n in (10, 10, 8, 8, 10, 10, 10, 10, 14)
        ]
        seen.add(slot)
    assert seen == set(range(14))
    assert (
        len({*_WHY}) == 39
        and all(len({*w}) == 10 for w in (_LEAD, _OFFER, _MOST, _SINCE))
        and len({*_PUNCT}) == 8
    )


@pytest.mark.parametrize('n', [1, 2, 3])
def test_flickr_lists_markers_with_commas(n):
    row = dict(
        id='flickr30k-1',
        image='a',
        grounding=' '.join(f'dog <bbox{i}>' for i in range(n)),
        bbox=[[[1, 1, 9, 9]]] * n,
    )
    asked = [build_row(row, random.Random(s))[1][0].text for s in range(20)]
    hints = [a.rpartition(': ')[2] for a in asked if ' are: ' in a or ': ' in a]
    assert hints and all(h.count(',') == n - 1 and h.count(', and ') == (n > 1) for h in hints)


@pytest.mark.parametrize(
    'grounding,default,published',
    [
        ('what a dog <bbox0> !', 'What a dog!', 'What a dog !'),
        ('what a dog!', 'What a dog!', 'What a dog!'),
        ('is it a dog <bbox0>?', 'Is it a dog?', 'Is it a dog?'),
        ('a dog <bbox0> ,a cat', 'A dog, a cat.', 'A dog, a cat.'),
    ],
)
def test_captions_end_as_published(grounding, default, published):
    row = dict(id='flickr30k-1', image='a', grounding=grounding, bbox=[[[1, 1, 9, 9]]])
    for seed in range(12):
        (_, a), (_, b) = (build_row(row, random.Random(seed), reference=r) for r in (False, True))
        if 'do not mention' in a[0].text or 'not the actual' in a[0].text:
            assert (a[1].text, b[1].text) == (default, published)
        else:
            assert a[1].text[-1] in '.!?' and a[1].text[-2].isalpha()


def test_captions_of_phrases_without_boxes_are_refused():
    with pytest.raises(
        BadRecord, match="'flickr30k-1'.*<bbox1>, but there are boxes for 1 phrases"
    ):
        build_row(
            dict(id='flickr30k-1', grounding='a <bbox1>', bbox=[[[1, 1, 9, 9]]]), random.Random(0)
        )


def test_relations_of_three_boxes():
    """Published: the first two kinds decide about all colours, and every box is drawn. Ours: what
    the question names."""
    row = dict(
        id='vg_rel-1', answer='x', bboxes=[[1, 1, 20, 20], [30, 30, 60, 60], [5, 40, 20, 60]]
    )
    talk = dict(
        conversations=[
            {'from': 'human', 'value': '<image>\n<bbox0> <bbox1> <bbox2>?'},
            {'from': 'gpt', 'value': 'x'},
        ]
    )
    for seed in range(60):
        theirs, ours, chat = (
            build_row(row | more, random.Random(seed), reference=r)[0]
            for more, r in (({}, True), ({}, False), (talk | dict(id='vg_rel-gpt4v-1'), False))
        )
        alike = theirs[0].kind == theirs[1].kind
        assert (
            len(theirs) == 3
            and len({m.rgb for m in theirs}) == (3 if alike else 1)
            and len(ours) == 2
        )
        assert len({(m.kind, m.rgb) for m in chat}) == 3
    with pytest.raises(BadRecord, match='1 boxes, expected a subject and an object'):
        build_row(row | dict(bboxes=row['bboxes'][:1]), random.Random(0))


@pytest.mark.fault('vip-3')
def test_two_colors_in_relation_rows():
    row = dict(id='vg_rel-1', answer='x', bboxes=[[1, 1, 20, 20], [30, 30, 60, 60]])
    other = [build_row(row, random.Random(s))[0] for s in range(60)]
    assert any(a.rgb != b.rgb for a, b in other if a.kind != b.kind)
    ours = [build_row(row, random.Random(s), reference=True)[0] for s in range(60)]
    assert all(a.rgb == b.rgb for a, b in ours if a.kind != b.kind)


def sample(**kw):
    base = dict(
        id='s',
        turns=[Turn('user', '<image>\nis <region0> left of <region1> ?'), Turn('assistant', 'yes')],
        images=[Image.new('RGB', (64, 64))],
        regions=[
            Region((4.0, 4.0, 20.0, 20.0)),
            Region((30.0, 30.0, 60.0, 60.0), ((30.0, 30.0, 60.0, 30.0, 45.0, 60.0),)),
        ],
        where='f.json:7',
    )
    return Sample(**{**base, **kw})


def test_regions_schema():
    s = sample()
    out = DrawRegions()(s)
    assert (
        '<region' not in out.turns[0].text
        and out.images[0].getbbox()
        and s.images[0].getbbox() is None
    )
    assert len({DrawRegions(epoch=e)(s).images[0].tobytes() for e in range(8)}) > 4
    assert DrawRegions()(replace(s, turns=s.turns, regions=[], images=[])).turns == s.turns


@pytest.mark.parametrize(
    'bad,match',
    [
        (
            dict(turns=[Turn('user', '<image>\nwhat is <region> ?')]),
            'f.json:7: region 1 is never referred to',
        ),
        (dict(regions=[Region((4.0, 4.0, 20.0, 20.0))]), 'f.json:7: the text refers to <region1>'),
        (
            dict(regions=[Region((4.0, 4.0, 20.0, 20.0)), Region((80.0, 4.0, 90.0, 20.0))]),
            'f.json:7: region .* outside the picture',
        ),
        (dict(images=[]), 'f.json:7: 0 images'),
    ],
)
def test_bad_rows_name_the_row(bad, match):
    with pytest.raises(BadRecord, match=match):
        DrawRegions()(sample(**bad))


def test_bad_settings_and_dataset_rows():
    with pytest.raises(BadRecord, match='needs a segmentation'):
        DrawRegions(kinds=('point',))(sample())
    with pytest.raises(ValueError, match='kinds are rectangle'):
        DrawRegions(kinds=('star',))(sample())
    with pytest.raises(BadRecord, match='four options'):
        build_row(dict(id='v7w-1', bboxes=[[1, 1, 2, 2]]), random.Random(0))
    with pytest.raises(BadRecord, match="need the field 'bboxes'"):
        build_row(dict(id='refcocog-1'), random.Random(0))
    with pytest.raises(BadRecord, match='side file'):
        build_row(dict(id='vcr-1'), random.Random(0))


@pytest.mark.parametrize('how', ['overlay', 'text', 'none'])
@pytest.mark.parametrize('number', [3, 5, 6, 8])
def test_regions_lie_on_the_upright_picture(tmp_path, how, number):
    "A file and the same file opened: boxes are pixels of the picture as it is seen."
    photo = Image.new('RGB', (64, 40), (20, 30, 40))
    photo.paste('white', (0, 0, 9, 9))
    exif = Image.Exif()
    exif[0x0112] = number
    photo.save(tmp_path / 'p.png', exif=exif)
    draw = DrawRegions(how=how)
    ask = [Turn('user', '<image>\nwhat is <region> ?'), Turn('assistant', 'a cup')]
    ways = ImageRef('p.png', str(tmp_path)), Image.open(tmp_path / 'p.png')
    by_file, opened = (
        draw(Sample('a', ask, [way], [Region((2.0, 20.0, 30.0, 38.0))])) for way in ways
    )
    assert by_file.turns == opened.turns
    assert by_file.images[0].size == ((40, 64) if number > 4 else (64, 40))
    assert by_file.images[0].tobytes() == opened.images[0].tobytes()
