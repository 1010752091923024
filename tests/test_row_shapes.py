"""Rows in the shapes of other tools: read with their pictures, or refused with the key named."""

import base64, io, json, os, pickle

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from warm_kernels import vlmbench

from vlmbench.data.cards import check
from vlmbench.data.quarantine import BadRecord, Quarantine
from vlmbench.data.record import ImageRef, sample_from_llava, sample_from_row, sample_from_vora
from vlmbench.data.region_rows import sample_from_region_row
from vlmbench.data.sources import has_picture, open_samples, picture_share

READERS = sample_from_llava, sample_from_row, sample_from_region_row, sample_from_vora


def png(colour='red'):
    data = io.BytesIO()
    Image.new('RGB', (6, 4), colour).save(data, 'PNG')
    return data.getvalue()


def chat(*parts, answer='a dog'):
    return [
        dict(role='user', content=list(parts)),
        dict(role='assistant', content=[dict(type='text', text=answer)]),
    ]


def said(text, **more):
    return dict(type='text', text=text, **more)


HERE = dict(type='image')
ASK = said('What is it?')
URI = 'data:image/png;base64,' + base64.b64encode(png()).decode()
DECODED = Image.new('RGB', (6, 4), 'red')
INSIDE = dict(bytes=png(), path='a.png')
LLAVA = [{'from': 'human', 'value': '<image>\nWhat is it?'}, {'from': 'gpt', 'value': 'a dog'}]
BARE = [{'from': 'human', 'value': 'What is it?'}, {'from': 'gpt', 'value': 'a dog'}]
PAIR = [dict(user='What is it?', assistant='a dog', source='s')]

ONE = {
    'parts and a list of paths': dict(messages=chat(HERE, ASK), images=['a.png']),
    'an object of lists': dict(
        image='a.png',
        conversations={'from': ['human', 'gpt'], 'value': [LLAVA[0]['value'], 'a dog']},
    ),
    'texts as an object of lists': dict(
        images=['a.png'], texts=dict(user=['What is it?'], assistant=['a dog'])
    ),
    'an address with the picture inside': dict(image=URI, conversations=LLAVA),
    'parts and bytes': dict(messages=chat(HERE, ASK), images=[INSIDE]),
    'parts and a decoded picture': dict(messages=chat(HERE, ASK), images=[DECODED]),
    'parts, empty cells filled in': dict(
        messages=chat(dict(type='image', text=None, index=0), dict(ASK, index=None)),
        images=[INSIDE],
    ),
    'a part with a path': dict(messages=chat(dict(type='image', image='a.png'), ASK)),
    'a part with bytes': dict(messages=chat(dict(type='image', bytes=png()), ASK)),
    'a part with a decoded picture': dict(messages=chat(dict(type='image', image=DECODED), ASK)),
    'a part with both': dict(messages=chat(dict(type='image', image=INSIDE), ASK)),
    'an address of a file': dict(
        messages=chat(dict(type='image_url', image_url=dict(url='a.png')), ASK)
    ),
    'an encoded address': dict(messages=chat(dict(type='image_url', image_url=dict(url=URI)), ASK)),
    'parts without types': dict(messages=chat(dict(image='a.png'), dict(text='What is it?'))),
    'both say the same': dict(
        messages=chat(dict(type='image', image='d/a.png'), ASK), images=['a.png']
    ),
    'parts under conversations': dict(conversations=chat(HERE, ASK), images=['a.png']),
    'messages as JSON text': dict(messages=json.dumps(chat(HERE, ASK)), image=INSIDE),
    'texts': dict(texts=PAIR, images=[DECODED]),
    'texts and bytes': dict(texts=PAIR, images=[INSIDE], relevance=[5]),
    'query and response': dict(query='What is it?', response='a dog', images=['a.png']),
    'query with a mark': dict(query='<image>\nWhat is it?', response='a dog', images=['a.png']),
    'JSON text beside a struct': dict(conversations=json.dumps(LLAVA), image=INSIDE),
    'JSON text beside a list': dict(conversations=json.dumps(LLAVA), image=[INSIDE]),
    'a decoded picture': dict(conversations=LLAVA, image=DECODED),
    'text with messages': dict(text=BARE, images=['a.png']),
}


@pytest.mark.parametrize('reader', READERS)
@pytest.mark.parametrize('name', ONE)
def test_one_picture_its_question_and_its_answer(name, reader, tmp_path):
    Image.new('RGB', (6, 4), 'red').save(tmp_path / 'a.png')
    (tmp_path / 'd').mkdir()
    Image.new('RGB', (6, 4), 'red').save(tmp_path / 'd' / 'a.png')
    sample = reader(dict(id=7, **ONE[name]), str(tmp_path))
    assert len(sample.images) == sample.n_slots == 1
    picture = sample.images[0]
    picture = picture.load() if isinstance(picture, ImageRef) else picture
    assert picture.getpixel((2, 2)) == (255, 0, 0)
    assert [turn.text.replace('\n', '') for turn in sample.turns] == ['<image>What is it?', 'a dog']
    assert has_picture(ONE[name])
    assert set(sample.meta) <= {'relevance'}


@pytest.mark.parametrize('cell', [INSIDE, [INSIDE], DECODED, ['a.png']])
def test_json_text_without_a_mark_is_read_with_its_picture(cell):
    "VoRA's shards: the published converter takes `image` for the frames."
    notes = []
    sample = sample_from_row(
        dict(id=1, conversations=json.dumps(BARE), image=cell), '/d', note=notes.append
    )
    assert len(sample.images) == 1 and sample.turns[0].text == '<image>What is it?'
    assert notes == ['prepended missing <image>']
    two = dict(
        id=1, conversations=json.dumps(BARE), image=[INSIDE, dict(INSIDE, bytes=png('blue'))]
    )
    assert sample_from_row(two).turns[0].text == '1s: <image>; 2s: <image>; \nWhat is it?'


SEVERAL = {
    'in order': (
        dict(messages=chat(said('Is '), HERE, said('like'), HERE)),
        'Is <image>\nlike<image>',
    ),
    'by index': (
        dict(messages=chat(dict(HERE, index=1), dict(HERE, index=0), ASK)),
        '<image><image>\nWhat is it?',
    ),
    'texts': (dict(texts=PAIR), '<image><image>\nWhat is it?'),
    'query': (dict(query='What is it?', response='a dog'), '<image><image>\nWhat is it?'),
}


@pytest.mark.parametrize('name', SEVERAL)
def test_two_pictures(name):
    row, prompt = SEVERAL[name]
    sample = sample_from_row(dict(row, images=['a.png', 'b.png']), '/d')
    paths = [ref.path for ref in sample.images]
    assert paths == (['b.png', 'a.png'] if name == 'by index' else ['a.png', 'b.png'])
    assert (sample.turns[0].text, sample.turns[1].text) == (prompt, 'a dog')


def test_several_turns_and_text_alone():
    history = dict(query='B', response='b', history=[['A', 'a']], system='Be brief.')
    assert [t.text for t in sample_from_row(history).turns] == ['Be brief.', 'A', 'a', 'B', 'b']
    pairs = dict(texts=[dict(user='A', assistant='a'), dict(user='B', assistant='b')], images=[])
    assert [t.text for t in sample_from_row(pairs).turns] == ['A', 'a', 'B', 'b']
    genqa = dict(
        text=[
            dict(role='user', content='A'),
            dict(role='assistant', content='a'),
            dict(role='user', content=None),
        ],
        idx=3,
        category='x',
    )
    notes = []
    sample = sample_from_row(genqa, note=notes.append)
    assert [t.text for t in sample.turns] == ['A', 'a'] and sample.images == []
    assert notes == ['dropped message without content'] and not has_picture(genqa)
    assert sample_from_row(dict(conversations=BARE, text='free words')).meta == {
        'text': 'free words'
    }


BAD = {
    "'video'": dict(messages=chat(dict(type='video', video='a.mp4'), ASK)),
    "'input_audio'": dict(messages=chat(dict(type='input_audio', input_audio={}), ASK)),
    "'picture_id'": dict(messages=chat(dict(type='image', picture_id='x'), ASK)),
    "'image' and 'path'": dict(messages=chat(dict(type='image', image='a.png', path='b.png'), ASK)),
    'http://x/1.png.*download it': dict(
        messages=chat(dict(type='image_url', image_url=dict(url='http://x/1.png')), ASK)
    ),
    'no base64': dict(messages=chat(dict(type='image_url', image_url='data:image/png,x'), ASK)),
    '1 <image> in the text but 0 images': dict(messages=chat(HERE, ASK)),
    "0 images|images \\(in 'images'\\)|expected text": dict(
        messages=chat(HERE, ASK), images=[dict(bytes=None, path=None)]
    ),
    "'images' and the content parts": dict(
        messages=chat(dict(type='image', image='a.png'), ASK), images=['b.png']
    ),
    'the others are not': dict(messages=chat(HERE, dict(type='image', image='a.png'), ASK)),
    'index \\[0\\] for 2 pictures': dict(
        messages=chat(dict(HERE, index=0), dict(HERE, index=0)), images=['a.png', 'b.png']
    ),
    "'image' and 'images' name different": dict(
        conversations=LLAVA, image='a.png', images=['b.png']
    ),
    "'image' and 'images' name  ?different": dict(
        conversations=LLAVA,
        image=dict(bytes=b'one'),
        images=[dict(bytes=b'one'), dict(bytes=b'two')],
    ),
    "'image' and 'images' name different pictures; keep": dict(
        conversations=LLAVA, image=DECODED, images=[Image.new('RGB', (6, 4), 'blue')]
    ),
    "'conversations' and 'messages' say": dict(conversations=LLAVA, messages=chat(ASK)),
    "'messages' and 'texts' say": dict(messages=chat(said('other')), texts=PAIR),
    "texts: entry 0 has no 'user'": dict(texts=[dict(question='Q')], images=['a.png']),
    'messages is text that is no JSON': dict(messages='hello', image='a.png'),
    'image path is int.*images': dict(texts=PAIR, images=[3]),
    'no file; download it first.*images': dict(texts=PAIR, images=['http://x/1.png']),
    "'image_url' names a picture": dict(texts=PAIR, image_url='http://x/1.png'),
}


@pytest.mark.parametrize('reason', BAD)
def test_a_row_whose_picture_cannot_be_had_is_refused_by_its_key(reason):
    for reader in READERS:
        with pytest.raises(BadRecord, match=reason.replace('  ?', ' ')):
            reader(dict(id=1, **BAD[reason]), '/d')


def write_layouts(root):
    "One caption with a picture and one without, as VoRA's shards may have them."
    talk, text = json.dumps(BARE), datasets.Value('string')
    layouts = {
        'struct': dict(id=['a', 'b'], image=[INSIDE, None], conversations=[talk] * 2),
        'list': dict(id=['a', 'b'], image=[[INSIDE], []], conversations=[talk] * 2),
        'frames': dict(id=['a', 'b'], frames=[[INSIDE], None], conversations=[talk] * 2),
        'frame bytes': dict(id=[1, 2], frames=[[png()], []], conversations=[talk] * 2),
        'objects': dict(id=[1, 2], frames=[[INSIDE], []], conversations=[BARE] * 2),
        'images': dict(id=[1, 2], images=[[INSIDE], []], conversations=[BARE] * 2),
        'messages': dict(messages=[chat(HERE, ASK), chat(ASK)], images=[[INSIDE], []]),
    }
    for name, columns in layouts.items():
        folder = root / name / 'vora_recap_8m'
        folder.mkdir(parents=True)
        pq.write_table(pa.table(columns), folder / 'part-0.parquet')
    features = datasets.Features(dict(id=text, image=datasets.Image(), conversations=text))
    rows = dict(id=['a', 'b'], image=[INSIDE, None], conversations=[talk] * 2)
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(
        str(root / 'saved' / 'vora_recap_8m')
    )
    return [*layouts, 'saved']


def test_captions_of_every_layout_have_their_picture_and_blind_rows_are_bad(tmp_path, monkeypatch):
    names = write_layouts(tmp_path)
    elsewhere = tmp_path / 'elsewhere'
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    for name in names:
        quarantine = Quarantine(cap=1.0)
        rows = open_samples(os.path.join('..', name), 'vora_recap_8m', quarantine)
        assert len(rows) == 2, name
        assert rows[0].images[0].load().getpixel((2, 2)) == (255, 0, 0), name
        assert rows[0].turns[0].text.replace('\n', '') == '<image>What is it?', name
        with pytest.raises(BadRecord, match='part-0.parquet row 1.*no picture|row 1.*no picture'):
            rows[1]
        assert picture_share('vora_recap_8m', tmp_path / name) == 0.5
        assert pickle.loads(pickle.dumps(rows.parse))  # worker processes get it
    (tmp_path / 'talk.json').write_text(json.dumps([dict(conversations=BARE)]))
    assert open_samples(tmp_path, 'talk')[0].images == []


def test_a_caption_without_a_picture_is_no_clean_copy(tmp_path):
    for name in ('struct', 'frames', 'list'):
        folder = tmp_path / name
        folder.mkdir()
        column = 'frames' if name == 'frames' else 'image'
        cell = INSIDE if name == 'struct' else [INSIDE]
        for end, cells in (('good', [cell, cell]), ('blind', [cell, None])):
            table = {'id': ['a', 'b'], column: cells, 'conversations': [json.dumps(BARE)] * 2}
            (folder / end).mkdir()
            pq.write_table(pa.table(table), folder / end / 'x.parquet')
        report = check('vora_recap_8m', folder / 'good')
        assert report.status == 0 and report.summary.pictures_opened.sum() == 2, str(report)
        report = check('vora_recap_8m', folder / 'blind')
        assert report.status == 1 and 'no picture' in report.table.detail[0]


def test_the_command_says_which_caption_is_blind(tmp_path):
    table = dict(id=['a'], image=[None], conversations=[json.dumps(BARE)])
    (tmp_path / 'copy').mkdir()
    pq.write_table(pa.table(table), tmp_path / 'copy' / 'x.parquet')
    done = vlmbench('data', 'check', 'vora_recap_8m', 'copy', cwd=tmp_path)
    assert done.returncode == 1 and 'row 0 (id a): ' not in done.stderr
    assert 'no picture' in done.stdout


# --------------------------------------------------------------------------------------------------
# what is shown nowhere
@pytest.mark.parametrize('read', READERS[:2])
@pytest.mark.parametrize(
    'row, why',
    [
        (dict(messages=chat(said('What is it?', image='a.png'))), "'image' in a text"),
        (dict(messages=chat(dict(type='image', image='a.png', text='What?'))), 'text in a picture'),
        (dict(conversations=BARE, jpg=b'\xff\xd8\xff'), "'jpg' names a picture"),
        (dict(conversations=BARE, jpg=base64.b64encode(png()).decode()), "'jpg' names a picture"),
        (
            dict(conversations=BARE, extra=base64.b64encode(png()).decode()),
            "'extra' names a picture",
        ),
        (dict(conversations=BARE, pixel_values=[[1, 2]]), "'pixel_values' names a picture"),
        (dict(conversations=BARE, image_embeds=[0.5]), "'image_embeds' names a picture"),
        (dict(conversations=BARE, vision_features='f.npy'), "'vision_features' names a picture"),
        (
            dict(conversations=[dict(BARE[0], value='<img>a.png</img>What?'), BARE[1]]),
            'picture mark',
        ),
        (dict(conversations=[dict(BARE[0], value='<ImageHere>What?'), BARE[1]]), 'picture mark'),
        (dict(conversations=[dict(BARE[0], value='<|image_pad|>What?'), BARE[1]]), 'picture mark'),
    ],
)
def test_no_picture_or_text_is_lost_on_the_way(row, why, read, tmp_path):
    with pytest.raises(BadRecord, match=why):
        read(dict(id=1, **row), tmp_path)


@pytest.mark.parametrize('key', ['instruction', 'context', 'tools', 'persona', 'documents'])
def test_a_prompt_that_is_not_shown_is_counted(key, tmp_path):
    notes = []
    row = dict(id=1, conversations=BARE) | {key: 'Answer in French.'}
    sample_from_row(row, tmp_path, note=notes.append)
    assert notes == [f'column {key!r} is not shown']
    sample_from_row(row | {key: 'What is it?'}, tmp_path, note=notes.append)
    assert len(notes) == 1  # the conversation says it


@pytest.mark.parametrize(
    'column, said',
    [
        (dict(media=[dict(type='image', path='a.png')]), "'media' names a picture"),
        (dict(parts=[dict(type='image_url', image_url=dict(url='x'))]), "'parts' names a picture"),
        (dict(preamble='be brief'), "'preamble' is called like one"),
    ],
)
def test_pictures_in_parts_and_prompts_of_other_names_are_not_dropped(column, said):
    turns = [{'from': 'human', 'value': 'what ?'}, {'from': 'gpt', 'value': 'red'}]
    with pytest.raises(BadRecord, match=said):
        sample_from_llava(dict(id='1', conversations=turns, **column))


@pytest.mark.parametrize('name', ['rows.json', 'rows.jsonl'])
def test_a_file_in_utf_16_is_refused_by_its_encoding(tmp_path, name):
    turns = [{'from': 'human', 'value': 'what ?'}, {'from': 'gpt', 'value': 'red'}]
    row = dict(id='1', conversations=turns)
    text = json.dumps([row] if name == 'rows.json' else row)
    (tmp_path / name).write_bytes(text.encode('utf-16'))
    ran = vlmbench('data', 'look', str(tmp_path / name))
    assert 'the file is UTF-16; save it as UTF-8' in ran.stdout + ran.stderr
