"""No row trains without a picture, a film or a system prompt that it names, whatever the row calls
them: it is shown, or the row is a bad one."""

import io
import json
import os
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vlmbench.data.picture import ImageError
from vlmbench.data.quarantine import BadRecord
from vlmbench.data.record import ImageRef, sample_from_llava, sample_from_row, sample_from_vora
from vlmbench.data.region_rows import sample_from_region_row

READERS = sample_from_llava, sample_from_row, sample_from_vora, sample_from_region_row
ASKED, SAID = 'What is it?', 'a dog'


def pixels(number):
    return np.full((4, 6, 3), 40 * number + 10, np.uint8)


def encoded(number):
    data = io.BytesIO()
    Image.fromarray(pixels(number)).save(data, 'PNG')
    return data.getvalue()


# picture `number` as rows give it
FORMS = dict(
    path=lambda n: f'coco/{n}.png',
    object=lambda n: dict(bytes=encoded(n), path=f'{n}.png'),
    unnamed=lambda n: dict(bytes=encoded(n), path=None),
    bytes=encoded,
    opened=lambda n: Image.fromarray(pixels(n)),
    array=pixels,
    listed=lambda n: [f'{n}.png'],
)
# a path and nameless pixels cannot be compared, so a row has either; an object has both
NAMED, PIXELS = ('path', 'object', 'listed'), ('object', 'unnamed', 'bytes', 'opened', 'array')
PICTURES = (
    'image images image_path img photo picture frames image_2 foto img3 view screenshot'.split()
)
MEDIA = 'video videos video_path audio'.split()
PROMPTS = 'system system_prompt systemPrompt sys_prompt system_words developer_message'.split()


def number_of(shown):
    "Which picture a sample shows: by its name, else by its pixels."
    if isinstance(shown, ImageRef) and shown.data is None:
        return int(os.path.basename(shown.path).partition('.')[0])
    shown = shown.load() if isinstance(shown, ImageRef) else shown
    return (shown.convert('RGB').getpixel((1, 1))[0] - 10) // 40


def conversation(shape, marks):
    asked = '<image>' * marks + ASKED
    talk = [{'from': 'human', 'value': asked}, {'from': 'gpt', 'value': SAID}]
    chat = [dict(role='user', content=asked), dict(role='assistant', content=SAID)]
    if shape == 'parts':
        parts = [*[dict(type='image')] * marks, dict(type='text', text=ASKED)]
        chat = [dict(role='user', content=parts), dict(role='assistant', content=SAID)]
    return {
        'conversations': dict(conversations=talk),
        'messages': dict(messages=chat),
        'parts': dict(messages=chat),
        'JSON': dict(conversations=json.dumps(talk)),
        'texts': dict(texts=[dict(user=asked, assistant=SAID)]),
        'query': dict(query=asked, response=SAID),
    }[shape]


@st.composite
def rows(draw):
    "A row, the numbers of the pictures it names, its system prompts, and whether it names a film."
    shape = draw(st.sampled_from('conversations messages parts JSON texts query'.split()))
    row = conversation(shape, draw(st.integers(0, 2)))
    forms = draw(st.sampled_from([NAMED, PIXELS]))
    cells = st.tuples(st.sampled_from(PICTURES), st.sampled_from(forms), st.integers(1, 4))
    place, pictures, prompts = draw(st.sampled_from(['top', 'top', 'inside'])), set(), set()
    for key, form, number in draw(st.lists(cells, max_size=3, unique_by=lambda cell: cell[0])):
        value = FORMS[form](number)
        value = [value] if key == 'frames' and not isinstance(value, list) else value
        (row if place == 'top' else row.setdefault('meta', {}))[key] = value
        pictures.add(number)
    for key in draw(st.lists(st.sampled_from(PROMPTS), max_size=2, unique=True)):
        row[key] = draw(st.sampled_from(['Be brief.', 'Answer in French.']))
        prompts.add(row[key])
    film = draw(st.sampled_from([None, None, None, *MEDIA]))
    if film:
        row[film] = draw(st.sampled_from(['a.mp4', 'clip-7', ['a.mp4']]))
    blank = draw(st.sampled_from([None, 'image', 'images', 'video', 'system']))
    if blank and blank not in row:
        row[blank] = ''
    return row, pictures, prompts, film


@settings(max_examples=400, deadline=None)
@given(rows(), st.sampled_from(READERS))
def test_no_row_is_read_without_what_it_names(drawn, reader):
    row, pictures, prompts, film = drawn
    try:
        sample = reader(dict(row, id='1'), '/data')
    except BadRecord:
        return
    assert set(map(number_of, sample.images)) == pictures, sample
    assert sample.n_slots == len(sample.images)
    assert {turn.text for turn in sample.turns if turn.role == 'system'} == prompts
    assert not film or film.startswith('video') and row.get('frames')
    assert [turn.text for turn in sample.turns][-1] == SAID
    assert ASKED in sample.turns[-2].text


@pytest.mark.parametrize('key', 'visual media screenshot clip movie speech systems'.split())
@pytest.mark.parametrize('reader', READERS)
def test_looser_names_that_hold_a_place_are_refused(reader, key):
    "What has no ending of a picture or a film, under a name that says little, is still refused."
    row = dict(conversation('conversations', 0), id='1')
    with pytest.raises(BadRecord, match=key):
        reader(dict(row, **{key: 'parts/17'}), '/data')
    prose = dict(row, **{key: 'seen at noon'})
    if key != 'systems':
        assert reader(prose, '/data').turns[-1].text == SAID


@pytest.mark.parametrize('key', ['pre_prompt', 'task_instruction', 'few_shot', 'suffix'])
def test_columns_called_like_a_prompt_are_noted(key):
    noted = []
    row = dict(conversation('conversations', 0), id='1', **{key: 'Answer in French.'})
    sample_from_row(row, '/data', note=noted.append)
    assert noted == [f'column {key!r} is not shown']


@pytest.mark.parametrize('at', ['http://x.org/1.png', 's3://bucket/1.png', 'file:///data/1.png'])
def test_addresses_are_refused_by_name(at):
    row = dict(conversation('conversations', 1), id='1', image=at)
    with pytest.raises(BadRecord, match=re.escape(f'{at!r} is no file; download it first')):
        sample_from_row(row, '/data')
    with pytest.raises(ImageError, match=re.escape(f'{at!r} is an address; download it first')):
        ImageRef(at, '/data').load()


GOOD = [
    *(dict(images=[FORMS[form](1)]) for form in FORMS if form != 'listed'),
    *(dict(image=FORMS[form](2)) for form in FORMS),
    dict(image=''),
    dict(image='', images=[]),
    dict(images=['1.png', '2.png'], system='Be brief.'),
    dict(images=np.stack([pixels(1), pixels(2)])),
]


@pytest.mark.parametrize('cells', GOOD, ids=lambda cells: '-'.join(cells))
@pytest.mark.parametrize('shape', ['conversations', 'messages', 'parts', 'JSON', 'texts', 'query'])
def test_the_property_is_no_refusal_of_everything(shape, cells):
    n = (
        len(cells.get('images', []))
        if 'images' in cells
        else int(not isinstance(cells['image'], str) or bool(cells['image']))
    )
    for marks in {n, 0} if 'images' in cells else {n}:
        for reader in READERS:
            sample = reader(dict(conversation(shape, marks), id=1, **cells), '/data')
            assert sample.n_slots == len(sample.images) == n
            assert sample.turns[0].text == 'Be brief.' or 'system' not in cells
