"""Folders of pictures: what a copy of an instruction mix lacks is told by folder and source."""

import json

import pytest
from PIL import Image

from warm_kernels import vlmbench

from vlmbench.data.cards import CardError, check, load_card

CARD = 'eve_instruct_mix1.8m'
FOLDERS = [one['path'] for one in load_card(CARD).front['folders']]
GONE, PARTLY = 'gqa/images', 'ocr_vqa/images'


def row(path, number):
    mark = '<image>\n' if path else ''
    talk = [{'from': 'human', 'value': f'{mark}What?'}, {'from': 'gpt', 'value': 'x'}]
    return dict(id=str(number), conversations=talk) | (dict(image=path) if path else {})


@pytest.fixture
def copy(tmp_path):
    "Two rows a folder, one folder missing, one of two pictures of another."
    paths = [f'{folder}/{k}.jpg' for folder in FOLDERS for k in (1, 2)]
    for path in paths:
        if not path.startswith(GONE) and path != f'{PARTLY}/2.jpg':
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            Image.new('RGB', (4, 4)).save(tmp_path / path)
    rows = [row(path, i) for i, path in enumerate([*paths, None])]
    (tmp_path / f'{CARD}.json').write_text(json.dumps(rows))
    return tmp_path


def test_twelve_data_sets_have_an_address_and_terms():
    listed = load_card(CARD).front['folders']
    assert len(listed) == 14 and len({one['path'].split('/')[0] for one in listed}) == 12
    assert all(one['address'].startswith('https://') and one['terms'] for one in listed)
    assert len(load_card('llava_mix665k').front['folders']) == 6


def test_rows_and_missing_pictures_are_counted_by_folder(copy):
    report = check(CARD, copy)
    table = report.folders.set_index('folder')
    assert list(table.index) == FOLDERS and set(table.rows) == {2}
    assert dict(table.missing[table.missing > 0]) == {GONE: 2, PARTLY: 1}
    assert table.address[GONE].startswith('https://cs.stanford.edu')
    assert report.status == 1 and list(report.table.check) == ['missing folder', 'missing pictures']
    gone, partly = report.table.detail
    assert '2 rows need it' in gone and 'https://cs.stanford.edu' in gone and 'terms' in gone
    assert partly.startswith(f'1 of 2, the first is {PARTLY}/2.jpg')
    assert report.summary.pictures_opened[0] == 2 * len(FOLDERS) - 3


def test_a_whole_copy_is_clean_and_a_strange_folder_is_named(copy):
    (copy / GONE).mkdir(parents=True)
    for path in (f'{GONE}/1.jpg', f'{GONE}/2.jpg', f'{PARTLY}/2.jpg'):
        Image.new('RGB', (4, 4)).save(copy / path)
    assert check(CARD, copy).status == 0
    rows = json.loads((copy / f'{CARD}.json').read_text())
    (copy / f'{CARD}.json').write_text(json.dumps([*rows, row('sa_1b/a/1.jpg', 'new')]))
    report = check(CARD, copy)
    assert list(report.table.file) == ['sa_1b'] and 'lists no such folder' in report.table.detail[0]


def test_the_command_names_the_missing_folder_and_no_place_of_the_machine(copy, tmp_path):
    (tmp_path / 'here').mkdir()
    done = vlmbench('data', 'check', CARD, '..', cwd=tmp_path / 'here')
    assert done.returncode == 1, done.stderr
    assert f'{GONE}: missing folder: is not there, and 2 rows need it' in done.stdout
    assert str(tmp_path) not in done.stdout


def test_a_bad_list_of_folders_is_no_card(tmp_path):
    text = load_card(CARD).path.read_text()
    bad = text.replace('path: gqa/images', 'path: /data/gqa')
    bad = bad.replace('terms: gpl-3.0', 'term: x', 1)
    (tmp_path / 'bad.md').write_text(bad)
    with pytest.raises(CardError, match="'/data/gqa' must be relative") as e:
        load_card(tmp_path / 'bad.md')
    assert "missing ['terms'], unknown ['term']" in str(e.value)
