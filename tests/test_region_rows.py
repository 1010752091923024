"""Region rows: text and markers against the published row builder, its faults fixed by default, rows never changed, bad input."""
import copy, json, os, random, re
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from vlmbench.data.overlay import MARKERS, PALETTE
from vlmbench.data.record import BadRecord, Region, Sample, Turn
from vlmbench.data.region_rows import _FLICKR_ASK, DrawRegions, build_row

ROOT = Path(os.environ.get('VLMBENCH_GOLDEN', Path(__file__).parent/'golden'))/'vip_llava'
CASES = sorted(ROOT.glob('case_*'))
ROWS = [(c, i) for c in CASES for i in range(len(json.loads((c/'rows.json').read_text())['rows']))]
name = lambda x: x.name if isinstance(x, Path) else str(x)

def built(case, i, **kw):
    d = json.loads((case/'rows.json').read_text())
    r = d['rows'][i]
    args = dict(style=r['args'].get('visual_prompt_style', ''), alpha=r['args'].get('alpha'))
    return r, build_row(r['row'], random.Random(r['seed']), d['vcr_meta'], **args, **kw)

def mentions(turns):
    words = '|'.join(sorted((noun for _, noun in MARKERS.values()), key=len, reverse=True))
    return [re.findall(rf'\w+ (?:within|with|at|pointed to by) (?:the )?(?:\w+ )?(?:{words})', t) for t in turns]

def test_there_are_cases(): assert ROWS

@pytest.mark.parametrize('case,i', ROWS, ids=name)
def test_reference_rows(case, i):
    r, (marks, turns) = built(case, i, reference=True)
    assert r['error'] is None
    assert [(m.kind, list(m.rgb), list(m.region.box), m.style, m.alpha) for m in marks] == [
        (x['shape'], x['rgb'], x['bbox'], x['style'], x['alpha']) for x in r['draws']]
    assert [[list(p) for p in m.region.polygons] for m in marks] == [x['segmentation'] or [] for x in r['draws']]
    want, said = [t['value'] for t in r['conversation']], [t.text for t in turns]
    assert [dict(human='user', gpt='assistant')[t['from']] for t in r['conversation']] == [t.role for t in turns]
    if case.name == 'case_a' or r['kind'] not in ('vcr', 'flickr30k', 'refcocog'): assert said == want
    assert mentions(said) == mentions(want)

class Tape(random.Random):
    "A generator that writes down every draw as the vectors do; drawn wordings become a gap where `gaps` is set."
    def __init__(self, seed, gaps=False):
        self.tape, self.inside, self.gaps = [], False, gaps
        super().__init__(seed)

    def note(self, draw, entry):
        if self.inside: return draw()
        self.inside = True
        try: value = draw()
        finally: self.inside = False
        self.tape.append(entry(value))
        return value

    def getrandbits(self, k): return super().getrandbits(k)                # keeps random.Random's own way to draw integers
    def random(self): return self.note(super().random, lambda v: ['random', v])
    def randint(self, a, b): return self.note(lambda: random.Random.randint(self, a, b), lambda v: ['randint', a, b, v])

    def choices(self, seq, k):
        draw = lambda: random.Random.choices(self, range(len(seq)), k=k)
        return [seq[i] for i in self.note(draw, lambda v: ['choices', len(seq), k, list(v)])]

    def choice(self, seq):
        found = seq[self.note(lambda: random.Random.choice(self, range(len(seq))), lambda i: ['choice', len(seq), i])]
        known = {*MARKERS, *PALETTE, 'object', 'instance'}
        wording = all(isinstance(x, str) and '(' not in x for x in seq) and not set(seq) <= known
        return GAP if self.gaps and wording else found

GAP = '\0'

@pytest.mark.parametrize('case,i', ROWS, ids=name)
def test_every_draw_is_the_published_one(case, i):
    "Same draws in the same order from lists of the same sizes: the wordings of our own stand in lists as long as theirs."
    d = json.loads((case/'rows.json').read_text())
    r, rng = d['rows'][i], Tape(d['rows'][i]['seed'])
    build_row(r['row'], rng, d['vcr_meta'], r['args'].get('visual_prompt_style', ''), r['args'].get('alpha'), True)
    assert rng.tape == r['tape']

@pytest.mark.parametrize('case,i', ROWS, ids=name)
def test_text_outside_the_wordings_is_the_published_one(case, i):
    "Everything but the drawn wordings, character by character; no wording of theirs names a marker."
    d = json.loads((case/'rows.json').read_text())
    r = d['rows'][i]
    _, turns = build_row(r['row'], Tape(r['seed'], gaps=True), d['vcr_meta'], r['args'].get('visual_prompt_style', ''),
                         r['args'].get('alpha'), True)
    for turn, want in zip(turns, r['conversation'], strict=True):
        text = turn.text
        for asked in (w for pair in _FLICKR_ASK for w in pair): text = text.replace(asked, GAP)
        found = re.fullmatch(re.escape(text).replace(re.escape(GAP), '(.+?)'), want['value'], re.S)
        assert found, f'{text!r} does not fit {want["value"]!r}'
        assert not any(mentions(found.groups())[k] for k in range(len(found.groups())))

@pytest.mark.parametrize('case,i', ROWS, ids=name)
def test_faults_are_fixed(case, i):
    r, (marks, turns) = built(case, i)
    assert sum(t.text.count('<image>') for t in turns) == 1 and turns[0].text.startswith('<image>\n')
    assert not any('<bbox' in t.text for t in turns)
    if r['kind'] == 'vg_rel' and marks[0].kind == marks[1].kind: assert marks[0].rgb != marks[1].rgb
    if r['kind'] == 'refcocog': assert 'pointed region' in turns[0].text or 'marked region' in turns[0].text or marks[0].text() in turns[0].text
    if r['kind'] == 'flickr30k' and 'make sure to mention both' in turns[0].text:
        assert all(m.text() in turns[1].text for m in marks)

@pytest.mark.parametrize('case,i', ROWS, ids=name)
def test_rows_are_not_changed(case, i):
    d = json.loads((case/'rows.json').read_text())
    row, meta = d['rows'][i]['row'], d['vcr_meta']
    old = copy.deepcopy((row, meta))
    seen = {build_row(row, random.Random(s), meta)[1][0].text for s in range(12)}
    assert (row, meta) == old
    if row['id'].startswith(('vg_rel', 'v7w', 'vcr', 'refcocog-gpt4v')): assert len(seen) > 1        # drawn anew at each reading

def test_two_colors_in_relation_rows():
    row = dict(id='vg_rel-1', answer='x', bboxes=[[1, 1, 20, 20], [30, 30, 60, 60]])
    other = [build_row(row, random.Random(s))[0] for s in range(60)]
    assert any(a.rgb != b.rgb for a, b in other if a.kind != b.kind)
    ours = [build_row(row, random.Random(s), reference=True)[0] for s in range(60)]
    assert all(a.rgb == b.rgb for a, b in ours if a.kind != b.kind)

def sample(**kw):
    base = dict(id='s', turns=[Turn('user', '<image>\nis <region0> left of <region1> ?'), Turn('assistant', 'yes')], images=[Image.new('RGB', (64, 64))],
                regions=[Region((4., 4., 20., 20.)), Region((30., 30., 60., 60.), ((30., 30., 60., 30., 45., 60.),))], where='f.json:7')
    return Sample(**{**base, **kw})

def test_regions_schema():
    s = sample()
    out = DrawRegions()(s)
    assert '<region' not in out.turns[0].text and out.images[0].getbbox() and s.images[0].getbbox() is None
    assert len({DrawRegions(epoch=e)(s).images[0].tobytes() for e in range(8)}) > 4
    assert DrawRegions()(replace(s, turns=s.turns, regions=[], images=[])).turns == s.turns

@pytest.mark.parametrize('bad,match', [
    (dict(turns=[Turn('user', '<image>\nwhat is <region> ?')]), 'f.json:7: region 1 is never referred to'),
    (dict(regions=[Region((4., 4., 20., 20.))]), 'f.json:7: the text refers to <region1>'),
    (dict(regions=[Region((4., 4., 20., 20.)), Region((80., 4., 90., 20.))]), 'f.json:7: region .* outside the picture'),
    (dict(images=[]), 'f.json:7: 0 images')])
def test_bad_rows_name_the_row(bad, match):
    with pytest.raises(BadRecord, match=match): DrawRegions()(sample(**bad))

def test_bad_settings_and_dataset_rows():
    with pytest.raises(BadRecord, match='needs a segmentation'): DrawRegions(kinds=('point',))(sample())
    with pytest.raises(ValueError, match='kinds are rectangle'): DrawRegions(kinds=('star',))(sample())
    with pytest.raises(BadRecord, match='four options'): build_row(dict(id='v7w-1', bboxes=[[1, 1, 2, 2]]), random.Random(0))
    with pytest.raises(BadRecord, match="need the field 'bboxes'"): build_row(dict(id='refcocog-1'), random.Random(0))
    with pytest.raises(BadRecord, match='side file'): build_row(dict(id='vcr-1'), random.Random(0))
