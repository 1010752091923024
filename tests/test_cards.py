"""Data cards: every card is valid and complete, and the check of a local copy finds exactly what is
wrong with it."""

import json
import re
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from vlmbench.data.card_rows import field_problem
from vlmbench.data.cards import (
    METHODS,
    SIZES,
    CardError,
    cards_dir,
    check,
    check_command,
    front_problems,
    list_cards,
    load_card,
)

CARDS = sorted((Path(__file__).parents[1] / 'data_cards').glob('*.md'))
NAMED = """
llava_mix665k llava_pretrain_558k genqa llava_genqa_mix vip_llava_stage2 vip_llava_stage3 refcocog
vg_relations
visual7w pointqa_looktwice vcr flickr30k_entities vip_bench eve_cap33m eve_instruct_mix1.8m
vora_recap_29m
vora_recap_8m vora_recap_gldv2_1.4m vora_textqa_mixed bunny_695k bunny_laion_2m vqav2 gqa vizwiz
textvqa scienceqa
pope mme mmbench mmbench_cn seed_bench mm_vet llava_bench_wild q_bench mmmu cmmmu ai2d chartqa
docvqa
infographic_vqa ocr_vqa tdiuc cv_bench hallusion_bench realworldqa mmlu bbh c_eval cmmlu hellaswag
arc_easy
arc_challenge winogrande piqa boolq openbookqa ocrbench st_vqa world things
""".split()


# --- the cards


def test_every_named_data_set_has_a_card():
    assert set(NAMED) <= {p.stem for p in CARDS}
    assert cards_dir() == CARDS[0].parent


@pytest.mark.parametrize('path', CARDS, ids=lambda p: p.stem)
def test_card_is_valid_and_says_what_it_must(path):
    card = load_card(path)
    assert load_card(path.stem).front == card.front
    body = path.read_text(encoding='utf-8').split('---\n', 2)[2]
    for heading in ('# ' + card.front['pretty_name'], '## Files', '## Known faults', '## Licence'):
        assert heading in body, heading
    assert card.front['known_faults'], 'say unknown where no fault is known'
    for entry in card.files:
        assert entry['fields'], f'{entry["path"]} has no row schema'
        assert f'`{entry["path"]}`' in body
    if not card.files:
        assert card.front['role'] != 'embedded'
    assert not re.search(r'\b(TODO|FIXME|TBD)\b', body)


def test_every_method_finds_its_data():
    table = list_cards()
    assert len(table) == len(CARDS) and table['name'].is_unique
    for method in METHODS:
        rows = table[table.used_by.str.contains(method)]
        assert {'instruction tuning', 'evaluation'} <= set(rows.role), method


def test_no_machine_path_in_a_card():
    for path in CARDS:
        assert not re.search(r'/(work|home|root|tmp|mnt)/', path.read_text()), path.name


# --- the validation of a front matter

GOOD = yaml.safe_load("""
license: mit
pretty_name: Example
task_categories: [visual-question-answering]
language: [en]
size_categories: [n<1K]
role: evaluation
source: {homepage: https://example.org}
size: {rows: 3, images: unknown}
files:
- path: rows.json
  format: json
  rows: 3
  images: images
  reader: llava
  unique: id
  fields: {id: "str|int", image: "image?", conversations: turns, answers: strings}
known_faults: [unknown]
used_by: [llava]
""")


def changed(**new):
    front = json.loads(json.dumps(GOOD))
    for key, value in new.items():
        if value is None:
            front.pop(key)
        else:
            front[key] = value
    return front


def test_good_front_matter_has_no_problem():
    assert front_problems(GOOD) == []


@pytest.mark.parametrize(
    'new, word',
    [
        (dict(license=None), 'license'),
        (dict(license='free'), 'license'),
        (dict(license='other'), 'license_name'),
        (dict(pretty_name=None), 'pretty_name'),
        (dict(task_categories=['seeing']), 'task_categories'),
        (dict(language='en'), 'language'),
        (dict(size_categories=['10K<n<100K']), 'size_categories'),
        (dict(role='fun'), 'role'),
        (dict(source={}), 'source'),
        (dict(source={'url': 'x'}), 'source'),
        (dict(size={'rows': -1, 'images': 3}), 'size.rows'),
        (dict(size={'rows': 3}), 'size.images'),
        (dict(size={'rows': True, 'images': 1}), 'size.rows'),
        (dict(used_by=[]), 'used_by'),
        (dict(used_by=['clip']), 'used_by'),
        (dict(known_faults='none'), 'known_faults'),
        (dict(files={}), 'files'),
        (dict(files=[3]), 'files'),
    ],
)
def test_front_matter_problems_name_the_key(new, word):
    assert any(word in p for p in front_problems(changed(**new))), front_problems(changed(**new))


@pytest.mark.parametrize(
    'new, word',
    [
        (dict(path='/etc/passwd'), 'relative'),
        (dict(path='../x.json'), 'relative'),
        (dict(format='csv'), 'format'),
        (dict(rows='many'), 'rows'),
        (dict(sha256='abc'), 'sha256'),
        (dict(reader='magic'), 'reader'),
        (dict(fields=[1]), 'fields'),
        (dict(fields={'id': 'text'}), 'text'),
        (dict(unique='key'), 'unique'),
        (dict(colour='red'), 'unknown keys'),
    ],
)
def test_file_entry_problems_name_the_key(new, word):
    front = changed()
    front['files'][0].update(new)
    assert any(word in p for p in front_problems(front)), front_problems(front)


def test_load_errors(tmp_path):
    for text, reason in (
        ('no front matter', 'front matter'),
        ('---\n[1, 2\n---\n', 'no YAML'),
        ('---\n- 1\n---\n', 'front matter'),
    ):
        (tmp_path / 'a.md').write_text(text)
        with pytest.raises(CardError, match=reason):
            load_card(tmp_path / 'a.md')
    with pytest.raises(CardError, match='no such file'):
        load_card(tmp_path / 'none.md')
    with pytest.raises(CardError, match='no card named .*known:.*vqav2'):
        load_card('vqav3')


def test_field_types():
    for spec, good, bad in (
        ('str', 'x', 1),
        ('int', 1, True),
        ('int', 1, 1.5),
        ('number', 1.5, '1'),
        ('bool', True, 1),
        ('dict', {}, []),
        ('strings', ['a'], [1]),
        ('images', ['a', b'x'], 'a'),
        ('turns', [{'from': 'human', 'value': 'x'}], []),
        ('regions', [{'box': [0, 0, 1, 1]}], [{'box': [1]}]),
        ('boxes', [[0, 0, 1, 1]], [[1, 1, 0, 0]]),
        ('any', None, ...),
    ):
        assert field_problem({'f': good}, 'f', spec) is None
        if bad is not ...:
            assert field_problem({'f': bad}, 'f', spec)[0] == 'field type', spec
    assert (
        field_problem({'f': None}, 'f', 'str?') is None
        and field_problem({'f': None}, 'f', 'str')[0] == 'field type'
    )


# --- checking a copy


def row(id, image=None, answers=('x',), mark=None):
    mark = ('<image>' if image else '') if mark is None else mark
    chat = [{'from': 'human', 'value': mark + 'What?'}, {'from': 'gpt', 'value': 'x'}]
    return {
        k: v
        for k, v in dict(id=id, image=image, conversations=chat, answers=list(answers)).items()
        if v is not None
    }


@pytest.fixture
def copy(tmp_path):
    (tmp_path / 'images').mkdir()
    for name in 'ab':
        Image.new('RGB', (5, 4)).save(tmp_path / 'images' / f'{name}.png')
    (tmp_path / 'card.md').write_text('---\n' + yaml.safe_dump(GOOD) + '---\n# Example\n')
    (tmp_path / 'rows.json').write_text(json.dumps([row(1, 'a.png'), row(2, 'b.png'), row(3)]))
    return tmp_path


def problems(copy, **kw):
    report = check(copy / 'card.md', copy, **kw)
    assert isinstance(report.table, pd.DataFrame) and list(report.table.columns) == [
        'file',
        'row',
        'id',
        'check',
        'detail',
    ]
    assert report.status == int(len(report.table) > 0) and report.summary['problems'].sum() >= len(
        report.table
    )
    return [
        (p['check'], None if pd.isna(p['row']) else int(p['row']))
        for p in report.table.to_dict('records')
    ]


def test_clean_copy(copy):
    assert problems(copy) == [] and problems(copy, full=True) == []
    report = check(copy / 'card.md', copy)
    assert report.summary.iloc[0].to_dict() == dict(
        file='rows.json', rows=3, expected=3, pictures_opened=2, problems=0
    )
    assert 'matches its card' in str(report)


def test_each_fault_is_found_where_it_is(copy):
    rows = [row(1, 'a.png'), row(2, 'gone.png'), row(3), row(1, 'b.png')]
    rows[2].pop('answers')
    (copy / 'rows.json').write_text(
        json.dumps(
            rows + [row(5, answers='x'), row('6', 'a.png', mark=''), 7, row(8, '../card.md')]
        )
    )
    Image.new('RGB', (5, 4)).save(copy / 'images' / 'b.png')
    (copy / 'images' / 'b.png').write_bytes((copy / 'images' / 'b.png').read_bytes()[:40])
    found = problems(copy, full=True)
    assert sorted(found, key=str) == sorted(
        [
            ('image', 1),
            ('field missing', 2),
            ('duplicate id', 3),
            ('image', 3),
            ('record', 5),
            ('field type', 6),
            ('record', 7),
            ('image', 7),
            ('row count', None),
        ],
        key=str,
    )
    text = str(check(copy / 'card.md', copy, full=True))
    for words in (
        "rows.json row 2 (id 3): field missing: the row has no 'answers'",
        'row 1 (id 2): image: missing',
        '8 rows, the card says 3',
        "id '1' appears again",
        'b.png (40 bytes)',
    ):
        assert words in text, words


def test_missing_file_and_folder(copy, capsys):
    (copy / 'rows.json').unlink()
    assert problems(copy) == [('missing file', None)]
    report = check(copy / 'card.md', copy / 'nowhere')
    assert report.status == 2 and 'could not be checked' in str(report)
    assert (
        check_command(copy / 'card.md', copy) == 1
        and 'nothing matches rows.json' in capsys.readouterr().out
    )
    assert check_command('no-such-card', copy) == 2 and 'known:' in capsys.readouterr().out
    assert check_command('eve_cap33m', copy) == 2 and 'names no files' in capsys.readouterr().out


def test_truncated_file(copy):
    text = (copy / 'rows.json').read_text()
    (copy / 'rows.json').write_text(text[:-30])
    assert problems(copy) == [('unreadable', 2), ('row count', None)]


def test_hash(copy):
    import hashlib

    front = changed()
    front['files'][0]['sha256'] = hashlib.sha256((copy / 'rows.json').read_bytes()).hexdigest()
    (copy / 'card.md').write_text('---\n' + yaml.safe_dump(front) + '---\n')
    assert problems(copy) == []
    (copy / 'rows.json').write_text((copy / 'rows.json').read_text() + ' ')
    assert problems(copy) == [('hash', None)]


def test_sample_full_and_limit(copy):
    rows = [row(i, 'a.png') for i in range(300)]
    (copy / 'rows.json').write_text(json.dumps(rows))
    front = changed(size={'rows': 300, 'images': 1})
    front['files'][0]['rows'] = 300
    (copy / 'card.md').write_text('---\n' + yaml.safe_dump(front) + '---\n')
    opened = lambda **kw: int(check(copy / 'card.md', copy, **kw).summary.pictures_opened[0])
    assert (opened(sample=20), opened(sample=0), opened(full=True)) == (20, 0, 300)
    report = check(copy / 'card.md', copy, limit=10)
    assert (
        report.status == 0
        and report.summary.rows[0] == 10
        and 'not judged' in report.summary.expected[0]
    )
    rows[250]['image'] = 'gone.png'
    (copy / 'rows.json').write_text(json.dumps(rows))
    assert problems(copy, full=True) == [('image', 250)]
    seeds = [len(problems(copy, sample=150, seed=s)) for s in range(12)]
    assert 0 < sum(seeds) < 12  # a sample sees the bad picture about half of the time


def test_many_problems_are_counted_and_listed_up_to_a_limit(copy):
    (copy / 'rows.json').write_text(json.dumps([{'id': i} for i in range(100)]))
    report = check(copy / 'card.md', copy, max_listed=5)
    assert (
        report.summary.problems[0] == 201
        and len(report.table) == 6
        and 'and 195 more problems' in str(report)
    )


def test_patterns_parquet_and_tsv(copy):
    front = changed()
    front['files'] = [
        dict(
            path='data/*.parquet',
            format='parquet',
            rows=4,
            fields={'frames': 'images?', 'id': 'int', 'conversations': 'any'},
            reader='vora',
        ),
        dict(path='t.tsv', format='tsv', rows=2, fields={'index': 'str', 'image': 'str'}),
    ]
    (copy / 'card.md').write_text('---\n' + yaml.safe_dump(front) + '---\n')
    (copy / 'data').mkdir()
    png = (copy / 'images' / 'a.png').read_bytes()
    chat = [{'from': 'human', 'value': 'Describe'}, {'from': 'gpt', 'value': 'x'}]
    for k in range(2):
        table = pa.table(
            {
                'id': [2 * k, 2 * k + 1],
                'frames': [[png], [b'broken'] if k else None],
                'conversations': [chat, chat],
            }
        )
        pq.write_table(table, copy / 'data' / f'{k}.parquet')
    (copy / 't.tsv').write_text('index\timage\n1\t' + 'A' * 200_000 + '\n2\tBB\n')
    assert problems(copy, full=True) == [('image', 1)]
    (copy / 't.tsv').write_text('index\tpicture\n1\tA\n2\tB\n')
    assert problems(copy) == [('image', 1), ('field missing', 0), ('field missing', 1)]


@pytest.mark.parametrize('key', ['images', 'image_path', 'img', 'photo'])
@pytest.mark.parametrize('value', ['gone.png', ['gone.png'], [{'path': 'gone.png'}]])
def test_pictures_under_any_key_are_opened(copy, key, value):
    "A card's fields name one column, and rows may keep their pictures in another."
    (copy / 'rows.json').write_text(json.dumps([row(1) | {key: value}, row(2), row(3)]))
    assert problems(copy) == [('image', 0)]


def test_columns_that_no_model_sees_are_said(copy):
    rows = [row(1, 'a.png') | dict(hint='round'), row(2) | dict(hint='red'), row(3)]
    (copy / 'rows.json').write_text(json.dumps(rows))
    report = check(copy / 'card.md', copy)
    assert report.status == 0 and list(report.notes.values()) == [2]
    assert "rows.json: note: column 'hint' is not shown (2 rows)" in str(report)


@pytest.mark.parametrize('encoding', ['utf-8-sig', 'utf-16'])
def test_tables_with_a_byte_order_mark(copy, encoding):
    front = changed()
    front['files'] = [dict(path='t.tsv', format='tsv', rows=1, fields={'index': 'str'})]
    (copy / 'card.md').write_text('---\n' + yaml.safe_dump(front) + '---\n')
    (copy / 't.tsv').write_text('index\tquestion\n1\tWhat?\n', encoding=encoding)
    assert problems(copy) == []


def test_another_encoding_of_json_is_named(copy):
    (copy / 'rows.json').write_text(json.dumps([row(1), row(2), row(3)]), encoding='utf-16')
    assert 'the file is UTF-16; save it as UTF-8' in str(check(copy / 'card.md', copy))


def test_ordered_sizes():
    assert list(SIZES.values()) == sorted(SIZES.values())


def test_the_embedded_world_matches_its_card(tmp_path):
    from vlmbench.data.world import WorldSize, write_world

    names = [Path(f['path']).stem for f in load_card('world').files]
    write_world(tmp_path / 'world', sizes=WorldSize(**dict.fromkeys(names, 4)))
    report = check('world', tmp_path / 'world', full=True)
    assert report.status == 0, str(report)
    assert sorted(report.summary.file) == sorted(
        p.name for p in (tmp_path / 'world').glob('*_*.json')
    )
    assert (report.summary.pictures_opened > 0).sum() == len(names) - 2  # all but the text files


def test_the_worlds_card_states_its_default_sizes():
    from vlmbench.data.world import WorldSize

    asked = dict(vqa_val=3, vqa_test=3, text_test=4)  # questions a scene, one row each
    rows = sum(n * asked.get(name, 1) for name, n in vars(WorldSize()).items())
    assert load_card('world').front['size']['rows'] == rows
