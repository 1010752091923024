"""`vlmbench data look`: what it counts, and the rows on its page."""

import json
import os
import re

import pytest
from PIL import Image
from typer.testing import CliRunner

import vlmbench
from vlmbench.checkpoints.load import convert
from vlmbench.data.sources import DataError
from vlmbench.lab.look import data_sets, look, make_reader, pieces_of
from vlmbench.data.record import Sample, Turn
from vlmbench.run.cli_data import data_app

TINY = os.path.join(os.path.dirname(vlmbench.__file__), 'assets', 'vlm')


def row(id, image='a.png', question='<image>\nwhat is red ?', answer='the circle'):
    talk = [{'from': 'human', 'value': question}, {'from': 'gpt', 'value': answer}]
    return dict(id=id, conversations=talk) | (dict(image=image) if image else {})


@pytest.fixture
def folder(tmp_path):
    data = tmp_path / 'data'
    (data / 'images').mkdir(parents=True)
    Image.new('RGB', (40, 20), 'red').save(data / 'images' / 'a.png')
    (data / 'images' / 'torn.png').write_bytes((data / 'images' / 'a.png').read_bytes()[:50])
    rows = [
        row('good'),
        row('gone', 'gone.png'),
        row('torn', 'torn.png'),
        row('text', '', 'what is zebra ?', 'a zebra striped circle'),
        row('blind', 'a.png', 'what is red ?'),
    ]
    (data / 'mine.jsonl').write_text('\n'.join(map(json.dumps, rows)) + '\n{"id": \n')
    return data


def test_the_table_counts_what_is_wrong(folder):
    found = look(folder, model=TINY, max_tokens=20)
    (line,) = found.table.to_dict('records')
    assert (line['data'], line['rows'], line['looked at']) == ('mine.jsonl', 6, 5)
    assert (line['missing'], line['unreadable'], line['text only']) == (1, 1, 1)
    assert line['bad'] == 4  # no JSON, gone, torn, and a picture without a mark
    assert line['over 20'] == 1 and line['longest'] == 73
    assert line['pictures in'] == str(folder / 'images')
    assert found.unknown == [('zebra', 2), ('striped', 1)]
    said = '\n'.join(' '.join(reason) for reason in found.reasons)
    for word in ('gone.png', 'torn.png', '0 <image> in the text', 'syntax error'):
        assert word in said


def test_supervised_tokens_are_marked_and_no_others(folder):
    page = look(folder, model=TINY).page
    marked = re.findall('<mark>(.*?)</mark>', page, re.S)
    words = [re.sub('<.*?>', '', one).strip() for one in marked]
    answer = ['the circle', '&lt;|end|&gt;']
    assert sorted(words) == sorted([*answer, 'a', '&lt;unk&gt; &lt;unk&gt;', 'circle', answer[1]])
    assert 'http' not in page and page.count('<img') == 1


def test_a_model_in_another_layout_reads_the_same(folder, tmp_path):
    "As transformers has LLaVA; which template it was trained by is asked where nobody knows."
    convert(TINY, tmp_path / 'llava')
    ours = look(folder, model=TINY).table
    assert look(folder, model=str(tmp_path / 'llava'), template='world').table.equals(ours)
    with pytest.raises(ValueError, match='no template is known for qwen3.*--template'):
        make_reader(str(tmp_path / 'llava'))
    with pytest.raises(DataError, match='leave one of them out'):
        look(folder, model=TINY, tokenizer=TINY)


@pytest.mark.parametrize('template', ['vicuna_v1', 'chatml', 'llama_3', 'world'])
def test_pieces_are_the_whole_text(template):
    "By a tokenizer that lacks the template's tokens, and without one."
    sample = Sample('1', [Turn('user', 'what is red ?'), Turn('assistant', 'the circle')])
    for reader in (make_reader(tokenizer=TINY, template=template), make_reader(template=template)):
        pieces = pieces_of(sample, reader.read(sample), reader)
        assert 'the circle' in ''.join(piece.text for piece in pieces if piece.learnt)
        assert 'what is red' not in ''.join(piece.text for piece in pieces if piece.learnt)


def test_published_places_shards_and_what_is_none(tmp_path):
    "As Bunny's data lies, beside shards; a card knows where the pictures are."
    (tmp_path / 'finetune' / 'images').mkdir(parents=True)
    Image.new('RGB', (9, 9)).save(tmp_path / 'finetune' / 'images' / 'a.png')
    rows = json.dumps([row('1'), row('2', '', 'Hi', 'Yes')])
    (tmp_path / 'finetune' / 'bunny_695k.json').write_text(rows)
    table = look(tmp_path).table
    assert table['data'].tolist() == ['bunny_695k'] and table['bad'].tolist() == [0]
    for i in range(3):
        (tmp_path / 'finetune' / 'images' / f'part-{i}.jsonl').write_text(json.dumps(row(i)))
    (found,) = data_sets(tmp_path / 'finetune' / 'images').values()
    assert len(found.files) == 3
    with pytest.raises(DataError, match='is no file, no folder'):
        look(tmp_path / 'none')


def test_rows_of_frames_and_of_regions(tmp_path):
    "VoRA's frames beside its annotations, and rows whose conversation is made from their regions."
    for place in ('frames', 'annotations'):
        (tmp_path / place).mkdir()
    Image.new('RGB', (40, 40)).save(tmp_path / 'frames' / 'a.png')
    talk = [{'from': 'human', 'value': 'what is red ?'}, {'from': 'gpt', 'value': 'the circle'}]
    boxes = [[1, 1, 9, 9], [2, 2, 12, 12], [3, 3, 15, 15], [4, 4, 20, 20]]
    rows = [
        dict(id='clip', frames=['frames/a.png'] * 2, conversations=talk),
        dict(id='v7w-1', image='frames/a.png', question='Which?', bboxes=boxes, answer=boxes[1]),
        dict(id='text', conversations=talk),
    ]
    (tmp_path / 'annotations' / 'rows.json').write_text('\n'.join(map(json.dumps, rows)))
    found = look(tmp_path / 'annotations' / 'rows.json', model=TINY)
    (line,) = found.table.to_dict('records')
    assert (line['bad'], line['pictures'], line['text only']) == (0, 3, 1), found.reasons
    assert line['pictures in'] == str(tmp_path.resolve()) and found.page.count('<img') == 3


def test_the_command_from_another_folder(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = ['look', 'data/mine.jsonl', '--images', 'data/images', '--out', 'new/look.html']
    done = CliRunner().invoke(data_app, asked)
    assert done.exit_code == 0, done.output
    assert 'median words' in done.stdout and 'page: new/look.html' in done.stdout
    assert '<mark>' in (tmp_path / 'new' / 'look.html').read_text()
    for given, page in (('new', 'new/look.html'), ('look', 'look.html')):  # a folder; no ending
        (tmp_path / page).unlink(missing_ok=True)
        done = CliRunner().invoke(data_app, [*asked[:-1], given])
        assert f'page: {page}' in done.stdout and (tmp_path / page).is_file()
    done = CliRunner().invoke(data_app, ['look', 'nothing'])
    assert done.exit_code != 0 and 'is no file' in str(done.exception)


def test_data_without_one_good_row_ends_as_an_error(folder, tmp_path):
    "All pictures missing, all rows of another kind; one good row among them is enough for 0."
    gone = tmp_path / 'gone.jsonl'
    gone.write_text('\n'.join(json.dumps(row(str(i), f'none{i}.png')) for i in range(3)))
    other = tmp_path / 'other.json'
    other.write_text(json.dumps([dict(id='1', image='a.png', caption='no conversation')] * 2))
    for file, count in ((gone, 3), (other, 2)):
        done = CliRunner().invoke(data_app, ['look', str(file)])
        assert done.exit_code == 1, done.output
        assert f'no row can be trained on, {count} are bad' in done.output
    gone.write_text(gone.read_text() + '\n' + json.dumps(row('t', '', 'Hi', 'Yes')))
    assert CliRunner().invoke(data_app, ['look', str(gone)]).exit_code == 0


def test_the_page_in_a_browser(folder, tmp_path, browser):
    (tmp_path / 'look.html').write_text(look(folder, model=TINY).page)
    colours = set()
    for scheme in ('light', 'dark'):
        page = browser.new_page(viewport=dict(width=420, height=900), color_scheme=scheme)
        asked = []
        page.on('request', lambda r: asked.append(r.url))
        page.goto((tmp_path / 'look.html').as_uri())
        assert page.evaluate('document.documentElement.scrollWidth') <= 420
        assert page.eval_on_selector_all('img', 'els => els.every(e => e.naturalWidth > 0)')
        assert not [url for url in asked if not url.startswith(('file:', 'data:'))]
        style = 'e => [e.ownerDocument.body, e].map(x => getComputedStyle(x).backgroundColor) + ""'
        colours.add(page.eval_on_selector('mark', style))
        page.close()
    assert len(colours) == 2


def test_what_lies_beside_the_rows_is_no_set(folder, tmp_path):
    "What `datasets` writes beside its splits, what a Mac leaves, and a folder of other files."
    for name in ('dataset_dict.json', 'dataset_infos.json', 'state.json', '._mine.jsonl'):
        (folder / name).write_text('{"splits": ["train"]}')
    assert list(data_sets(folder)) == ['mine.jsonl']
    (tmp_path / 'table').mkdir()
    (tmp_path / 'table' / 'rows.csv').write_text('image,text')
    with pytest.raises(DataError, match=r"table has no file of rows .* it has \['rows.csv'\]"):
        data_sets(tmp_path / 'table')


@pytest.mark.parametrize('text', ['iVBORw0KGgo' * 3, 'iVBORw0KGgo' * 30, 'iVBORw0KG/o' * 900])
def test_a_picture_written_as_text_is_a_bad_row(text, folder):
    rows = [row('good'), row('text', text)]
    (folder / 'mine.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    found = look(folder)
    assert found.table['bad'].tolist() == [1]
    ((_, _, why),) = found.reasons
    assert len(why) < 200 and ('missing' if len(text) < 255 else 'picture in base64') in why
