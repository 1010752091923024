"""A copy of ViP-LLaVA's stage 2 is held against its card: each damage is named."""

import json

import pytest
from PIL import Image
from typer.testing import CliRunner

from vlmbench.data.cards import check, load_card
from vlmbench.run.cli import app

CARD, FILE = 'vip_llava_stage2', 'vip-llava_stage2_mix.json'
BOXES = [[1, 1, 9, 9], [2, 2, 12, 12], [3, 3, 15, 15], [4, 4, 20, 20]]
MASK = [[1, 1, 9, 1, 9, 9, 1, 9]]
SAID = ['What', 'is', [0], 'doing', '?']
SIDE = dict(boxes=[[1, 1, 9, 9, 1.0]], segms=[[[[1, 1], [9, 1], [9, 9], [1, 9]]]])
FOLDERS = [one['path'] for one in load_card(CARD).front['folders']]


def image_row(id, path):
    talk = [{'from': 'human', 'value': '<image>\nWhat?'}, {'from': 'gpt', 'value': 'x'}]
    return dict(id=id, image=path, conversations=talk)


def ten_rows():
    vcr = dict(question=SAID, answer_choices=[SAID] * 4, rationale_choices=[SAID] * 4)
    vcr |= dict(answer_label=1, rationale_label=2, class_names=['person'])
    text = image_row('text', '')
    text['conversations'][0]['value'] = text.pop('image') + 'Hi'
    return [
        dict(id='refcocog-1', image='coco/train2017/1.jpg', answer='a', bboxes=BOXES[:1])
        | dict(segmentations=[MASK]),
        dict(id='pointQA_twice-1', image='vg/VG_100K/1.jpg', answer='2', bboxes=BOXES[:1])
        | dict(general_question='How many?'),
        dict(id='vg_rel-1', image='vg/VG_100K_2/1.jpg', answer='a on b', bboxes=BOXES[:2]),
        dict(id='flickr30k-1', image='flickr30k-images/1.jpg', grounding='A dog <bbox0> runs')
        | dict(bbox=[[BOXES[0]]]),
        dict(id='vcr-1', image='vcr1images/a/1.jpg', meta_dir='./dataset/vcr1images/a/1.json')
        | vcr,
        dict(id='v7w-1', image='v7w/1.jpg', question='Which?', bboxes=BOXES, answer=BOXES[2]),
        image_row('gqa', 'gqa/images/1.jpg'),
        image_row('ocr', 'ocr_vqa/images/1.jpg'),
        image_row('textvqa', 'textvqa/train_images/1.jpg'),
        text,
    ]


@pytest.fixture
def copy(tmp_path):
    for row in ten_rows():
        if 'image' in row:
            (tmp_path / row['image']).parent.mkdir(parents=True, exist_ok=True)
            Image.new('RGB', (40, 40)).save(tmp_path / row['image'])
    (tmp_path / 'vcr1images' / 'a' / '1.json').write_text(json.dumps(SIDE))
    (tmp_path / FILE).write_text(json.dumps(ten_rows()))
    return tmp_path


def test_a_whole_copy_is_clean(copy):
    report = check(CARD, copy)
    assert report.status == 0, str(report)
    assert list(report.folders.folder) == FOLDERS and set(report.folders.rows) == {1}
    assert report.summary.pictures_opened.tolist() == [9]


@pytest.mark.parametrize('folder', FOLDERS)
def test_a_missing_folder_is_named(copy, folder):
    (copy / folder).rename(copy / 'away')
    table = check(CARD, copy).table
    assert (folder, 'missing folder') in set(zip(table.file, table.check))
    assert 'https://' in table.detail[table.file == folder].iloc[0]


def test_side_files_of_vcr(copy, monkeypatch):
    place = copy / 'vcr1images' / 'a' / '1.json'
    place.rename(place.with_name('2.json'))
    (problem,) = check(CARD, copy).table.to_dict('records')
    assert (
        problem['id'] == 'vcr-1' and 'side file ./dataset/vcr1images/a/1.json' in problem['detail']
    )
    rows = [
        row | (dict(meta_dir='vcr1images/a/2.json') if 'meta_dir' in row else {})
        for row in ten_rows()
    ]
    (copy / FILE).write_text(json.dumps(rows))
    assert check(CARD, copy).status == 0
    for lost in SIDE:
        name = f'without_{lost}.json'
        kept = {key: value for key, value in SIDE.items() if key != lost}
        place.with_name(name).write_text(json.dumps(kept))
        rows[4]['meta_dir'] = f'vcr1images/a/{name}'
        (copy / FILE).write_text(json.dumps(rows))
        assert f'it has no {lost}' in check(CARD, copy).table.detail[0]


FIELDS = [
    (row['id'], key) for row in ten_rows()[:6] for key in row if key not in ('id', 'segmentations')
]


@pytest.mark.parametrize('id, key', FIELDS)
def test_a_field_that_a_kind_needs_is_named(copy, id, key):
    rows = ten_rows()
    (row,) = (row for row in rows if row['id'] == id)
    del row[key]
    (copy / FILE).write_text(json.dumps(rows))
    (problem,) = check(CARD, copy).table.to_dict('records')
    assert problem['id'] == id and f'rows need {key!r}' in problem['detail']


def test_pictures_of_ocr_vqa_under_another_ending(copy, tmp_path, monkeypatch):
    (copy / 'ocr_vqa/images/1.jpg').rename(copy / 'ocr_vqa/images/1.gif')
    (problem,) = check(CARD, copy).table.to_dict('records')
    assert problem['file'] == 'ocr_vqa/images'
    assert 'such as 1.gif: save them as .jpg' in problem['detail']
    monkeypatch.chdir(tmp_path.parent)
    done = CliRunner().invoke(app, ['data', 'check', CARD, tmp_path.name])
    assert done.exit_code == 1 and 'save them as .jpg' in done.stdout
