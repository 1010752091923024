"""Tasks: from LLaVA rows, from the embedded world, from the files of public benchmarks; prompts,
hashes, clusters."""

import base64
import io
import json
import warnings

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vlmbench.data.picture import load_image
from vlmbench.data.record import BadRecord, ImageRef, Quarantine, Sample, Turn
from vlmbench.data.sources import DataError
from vlmbench.data.world import WorldSize, write_world
from vlmbench.evaluate.assess import load_tasks
from vlmbench.evaluate.results import majority_baseline, score_predictions
from vlmbench.evaluate.tasks import (
    KINDS,
    Task,
    apply_prompt,
    load_task,
    read_rows,
    rows_task,
    sample_items,
)


WORLD_TASKS = ('vqa_test', 'text_test', 'region_test')


@pytest.fixture(scope='module')
def world(tmp_path_factory):
    return write_world(
        tmp_path_factory.mktemp('world') / 'w', sizes=WorldSize(8, 40, 0, 30, 40, 30, 8, 10, 0, 0)
    )


def test_the_world_s_tasks_answer_themselves(world):
    tasks = load_tasks(world, WORLD_TASKS)
    assert tuple(tasks) == WORLD_TASKS
    for name, t in tasks.items():
        gold = score_predictions(t, {i.id: i.answers[0] for i in t.items})
        assert gold.accuracy == 1 and t.has_images == (name != 'text_test'), name
        assert len(set(gold.frame['cluster'])) <= len(t.samples)
    vqa = tasks['vqa_test']
    assert (
        len({i.cluster for i in vqa.items}) == 30 and len(vqa) > 60
    )  # several questions share a scene
    assert {'color', 'count', 'exist'} <= {i.question_type for i in vqa.items}
    assert all(i.regions for i in tasks['region_test'].items)
    assert load_tasks(world, WORLD_TASKS)['vqa_test'].content_hash == vqa.content_hash


def test_world_majority_is_a_real_baseline(world):
    t = load_tasks(world, ['vqa_test'])['vqa_test']
    m = majority_baseline(t, load_task(world / 'vqa_train.json'))
    assert m.header['unseen_types'] == {} and 0.1 < m.accuracy < 0.7
    said = m.frame.groupby('question_type')['prediction'].nunique()
    assert (said == 1).all() and set(
        m.frame.loc[m.frame['question_type'] == 'exist', 'prediction']
    ) <= {'yes', 'no'}


def test_limit_renames(world):
    assert load_tasks(world, ['vqa_test'], limit=3)['vqa_test'].name == 'vqa_test.head3'
    with pytest.raises(DataError, match='pope_test.json'):
        load_tasks(world, ['pope_test'])


def test_bad_rows_stop_or_are_listed(tmp_path):
    rows = [
        dict(id=1, conversations=[{'from': 'human', 'value': 'a?'}, {'from': 'gpt', 'value': 'b'}]),
        dict(id=2),
    ]
    (tmp_path / 't.json').write_text(json.dumps(rows))
    with pytest.raises(BadRecord, match='t.json'):
        load_task(tmp_path / 't.json')
    q = Quarantine(cap=1.0)
    assert len(load_task(tmp_path / 't.json', quarantine=q)) == 1 and q.n_bad == 1


TEXT = st.text(alphabet='ab {}<>?\n', min_size=1, max_size=20).filter(lambda s: s.strip())


@given(TEXT, st.integers(0, 2))
def test_prompt_keeps_question_and_markers(text, n):
    asked = apply_prompt('Q: {question} A:', '<image>\n' * n + text)
    assert (
        asked.count('<image>') == n
        and asked.removeprefix('<image>\n' * n) == f'Q: {text.strip()} A:'
    )


@given(st.lists(st.sampled_from(['red', 'blue']), min_size=1, max_size=4), st.booleans())
def test_turns_become_items_without_earlier_answers(answers, history):
    turns = [
        t
        for i, a in enumerate(answers)
        for t in (Turn('user', ('<image>\n' if i == 0 else '') + f'q{i}?'), Turn('assistant', a))
    ]
    items = sample_items(Sample('s', turns, [ImageRef('a.png')]), history=history)
    assert [i.answers[0] for i in items] == answers and len({i.id for i in items}) == len(answers)
    for n, i in enumerate(items):
        assert sum(t.text.count('<image>') for t in i.turns) == 1 and i.question == f'q{n}?'
        assert len(i.turns) == (2 * n + 1 if history else 1)


def test_hashes_cover_what_they_say():
    def task(q='a?', a='b', image='x.png', **kw):
        return Task(
            't',
            [Sample('1', [Turn('user', f'<image>\n{q}'), Turn('assistant', a)], [ImageRef(image)])],
            **kw,
        )

    base = task()
    for changed in (task(q='c?'), task(image='y.png'), task(prompt='{question} Briefly.')):
        assert changed.prompt_hash != base.prompt_hash and changed.content_hash != base.content_hash
    for changed in (task(a='c'), task(scorer='anls'), task(version='2')):
        assert changed.prompt_hash == base.prompt_hash and changed.content_hash != base.content_hash
    assert task().content_hash == base.content_hash


PNG = io.BytesIO()
Image.new('RGB', (30, 20), 'red').save(PNG, 'PNG')
NOISE = io.BytesIO()
Image.effect_noise((64, 64), 90).save(NOISE, 'PNG')

FILES = {  # kind: (file name, text, expected answers, question type, right reply, wrong reply)
    'pope': (
        'coco_pope_random.json',
        '{"question_id": 1, "image": "a.png", "text": "Is there a dog?", "label": "no"}\n',
        ('no',),
        'all',
        'No.',
        'Yes',
    ),
    'mme': (
        'count.jsonl',
        '{"question_id": "c/1.png", "image": "a.png", "question": "Two? Please answer yes or no.", '
        '"answer": "Yes", "category": "count"}\n'
        '{"question_id": "c/1.png", "image": "a.png", "question": "Six? Please answer yes or no.", '
        '"answer": "No", "category": "count"}\n',
        ('Yes',),
        'count',
        'yes',
        'no',
    ),
    'choice': (
        'mmbench.tsv',
        'index\tquestion\tA\tB\tC\tD\tanswer\tcategory\timage\n7\tWhich?\tred\tgreen\t\t\tB\tcolor\t'
        + base64.b64encode(NOISE.getvalue()).decode()
        + '\n',
        ('B',),
        'color',
        'B',
        'A',
    ),
    'anls': (
        'docvqa.json',
        json.dumps(
            dict(
                data=[
                    dict(
                        questionId=3,
                        question='Who?',
                        image='a.png',
                        answers=['Ada L.', 'Ada'],
                        question_types=['form'],
                    )
                ]
            )
        ),
        ('Ada L.', 'Ada'),
        'all',
        'ada',
        'bob',
    ),
    'gqa': (
        'testdev.json',
        json.dumps({'20': dict(question='Where?', imageId='a', answer='left')}),
        ('left',),
        'all',
        'Left',
        'right',
    ),
    'textvqa': (
        'textvqa.json',
        json.dumps(
            dict(data=[dict(question_id=4, question='brand?', image_id='a', answers=['acme'] * 10)])
        ),
        ('acme',) * 10,
        'all',
        'Acme',
        'nike',
    ),
    'relaxed': (
        'chartqa.json',
        json.dumps([dict(imgname='a.png', query='How many?', label='20')]),
        ('20',),
        'all',
        '20.5',
        '25',
    ),
}


@pytest.mark.parametrize('kind', FILES)
def test_public_files(kind, tmp_path):
    name, text, answers, question_type, right, wrong = FILES[kind]
    (tmp_path / name).write_text(text)
    (tmp_path / 'a.png').write_bytes(PNG.getvalue())
    t = rows_task(
        kind,
        read_rows(tmp_path / name),
        kind,
        tmp_path,
        image_name=lambda i: i if str(i).endswith('.png') else f'{i}.png',
    )
    first = t.items[0]
    assert (first.answers, first.question_type) == (answers, question_type)
    assert first.images[0].load().mode == 'RGB' and first.turns[-1].text.startswith('<image>\n')
    said = {i.id: wrong for i in t.items} | {first.id: right}
    scores = score_predictions(t, said).frame['score'].tolist()
    assert scores[0] == 1 and (
        kind == 'mme' or score_predictions(t, {i.id: wrong for i in t.items}).accuracy == 0
    )
    assert t.scorer is Task('x', t.samples, KINDS[kind][0]).scorer


def test_vqa_v2_joins_annotations_and_parquet_bytes(tmp_path):
    (tmp_path / 'q.json').write_text(
        json.dumps(dict(questions=[dict(question_id=5, image_id=1, question='What?')]))
    )
    annotation = dict(
        question_id=5,
        answer_type='other',
        answers=[dict(answer=a, answer_id=i) for i, a in enumerate(['cat'] * 9 + ['dog'])],
    )
    (tmp_path / 'a.json').write_text(json.dumps(dict(annotations=[annotation])))
    t = rows_task(
        'v2',
        read_rows(tmp_path / 'q.json', tmp_path / 'a.json'),
        'vqa',
        tmp_path,
        image_name=lambda i: f'{i:012d}.jpg',
    )
    assert (
        score_predictions(t, {'5': 'Cat'}).accuracy == 1
        and t.items[0].images[0].path == '000000000001.jpg'
    )
    (tmp_path / 'a.json').write_text(json.dumps(dict(annotations=[])))
    with pytest.raises(ValueError, match='no annotation for 1 question'):
        read_rows(tmp_path / 'q.json', tmp_path / 'a.json')
    pd.DataFrame(
        [dict(id='p', question='What?', answer='red', image=dict(bytes=PNG.getvalue(), path=None))]
    ).to_parquet(tmp_path / 'p.parquet')
    t = rows_task('parquet', read_rows(tmp_path / 'p.parquet'), 'exact', tmp_path)
    assert t.items[0].images[0].load().size == (30, 20) and t.items[0].cluster.startswith('pixels-')


def test_bad_public_rows_name_row_and_columns(tmp_path):
    with pytest.raises(ValueError, match=r"t row 1: no answers; it has \['question'\]"):
        rows_task('t', [dict(question='a?', answer='b'), dict(question='c?')], 'exact', tmp_path)
    with pytest.raises(ValueError, match='not JSON'):
        (tmp_path / 'x.json').write_text('{"data": [')
        read_rows(tmp_path / 'x.json')


def test_index_answers_reach_the_scorer_as_letters(tmp_path):
    "ScienceQA's rows: the answer is an integer, and the options are numbers."
    rows = [dict(id=k, question='how many?', choices=['1', '2', '3'], answer=k) for k in range(3)]
    task = rows_task('sqa', rows, 'choice', tmp_path)
    assert [i.answers for i in task.items] == [('A',), ('B',), ('C',)]
    assert [task.scorer.score('B', i.row) for i in task.items] == [0, 1, 0]
    sample = Sample('s', [Turn('user', 'how many?')], meta=dict(answers=1, choices=['1', '2', '3']))
    assert Task('own', [sample], 'multiple_choice').items[0].answers == ('B',)
    assert Task('own', [sample], 'exact_match').items[0].answers == (
        '1',
    )  # no options are shown: the number is meant
    with pytest.raises(ValueError, match='sqa/0.*answer 7 is no index into 3 choices'):
        rows_task('sqa', [rows[0] | dict(answer=7)], 'choice', tmp_path)


# --- cells of public rows as other programs leave them

OPTIONS = [
    "['a cat', 'a dog']",
    '["a cat", "a dog"]',
    "['a cat' 'a dog']",
    "('a cat', 'a dog')",
    "array(['a cat', 'a dog'], dtype=object)",
    "[np.str_('a cat'), np.str_('a dog')]",
    "{'A': 'a cat', 'B': 'a dog'}",
    'A. a cat\nB. a dog',
    '(A) a cat\n(B) a dog',
    ['a cat', 'a dog'],
    ('a cat', 'a dog'),
    np.array(['a cat', 'a dog']),
    np.array(['a cat', 'a dog'], dtype=object),
    dict(A='a cat', B='a dog'),
    dict(label=['A', 'B'], text=['a cat', 'a dog']),
    [dict(label='A', text='a cat'), dict(label='B', text='a dog')],
]


@pytest.mark.parametrize('options', OPTIONS, ids=repr)
@pytest.mark.parametrize('column', ['options', 'choices'])
def test_options_in_every_spelling(options, column, tmp_path):
    row = {'id': 1, 'question': 'Which?', 'answer': 'B', column: options}
    item = rows_task('t', [row], 'choice', tmp_path).items[0]
    assert item.turns[-1].text.splitlines()[1:3] == ['A. a cat', 'B. a dog']
    scorer = rows_task('t', [row], 'choice', tmp_path).scorer
    assert [scorer.score(said, item.row) for said in ('B', 'a dog', 'A')] == [1, 1, 0]


@pytest.mark.parametrize('options', ['red, blue', '[]', "['one']", None, 'A. red', 3])
def test_options_that_are_no_list_are_refused(options, tmp_path):
    row = dict(id=1, question='Which?', answer='B', options=options)
    with pytest.raises(ValueError, match=r"t row 0: .*'options', 'question'"):
        rows_task('t', [row], 'choice', tmp_path)
    assert rows_task('t', [row], 'exact', tmp_path).items[0].question == 'Which?'


def test_ten_lettered_columns(tmp_path):
    letters = 'ABCDEFGHIJ'
    row = dict(id=1, question='Which?', answer='J') | {c: f'thing {c}' for c in letters}
    item = rows_task('t', [row], 'choice', tmp_path).items[0]
    assert list(item.choices) == list(letters) and 'J. thing J' in item.turns[-1].text


@pytest.mark.fault('mmmu-options')
def test_parquet_and_pandas_rows_of_mmmu(tmp_path):
    picture = dict(bytes=PNG.getvalue(), path='a.png')
    row = dict(
        id='v1', question='Is <image 1> or <image 3>?', options="['<image 2>', 'x']", answer='A'
    )
    row |= {f'image_{k}': picture if k < 4 else None for k in range(1, 8)}
    pd.DataFrame([row]).to_parquet(tmp_path / 'm.parquet')
    frame = pd.read_parquet(tmp_path / 'm.parquet')
    for rows in (read_rows(tmp_path / 'm.parquet'), frame.to_dict('records')):
        item = rows_task('mmmu', rows, 'choice', tmp_path).items[0]
        text = item.turns[-1].text
        assert len(item.images) == 3 and text.count('<image>') == 3 and '<image 1>' not in text
        assert text.startswith('<image>\n<image>\n<image>\nIs image 1 or image 3?')
        assert 'A. image 2' in text and item.images[0].load().size == (30, 20)


def test_open_questions_have_several_answers(tmp_path):
    row = dict(id=1, question='How many?', answer="['24/7', '3.429']", options='[]')
    item = rows_task('t', [row], 'exact', tmp_path).items[0]
    assert item.answers == ('24/7', '3.429')
    for answer, want in (
        (np.array(['a', 'b']), ('a', 'b')),
        (np.int64(3), ('3',)),
        ('[1, 2]', ('[1, 2]',)),
    ):
        made = rows_task('t', [row | dict(answer=answer)], 'exact', tmp_path)
        assert made.items[0].answers == want


PICTURES = {
    'path': ('a.png', 1),
    'list': (['a.png', 'b.png'], 2),
    'tuple': (('a.png',), 1),
    'array': (np.array(['a.png', 'b.png']), 2),
    'text': ("['a.png', 'b.png']", 2),
    'bytes': (PNG.getvalue(), 1),
    'dictionary': (dict(bytes=PNG.getvalue(), path=None), 1),
    'dictionaries': ([dict(bytes=PNG.getvalue(), path=None)] * 2, 2),
    'base64': (base64.b64encode(PNG.getvalue()).decode(), 1),
    'address': ('data:image/png;base64,' + base64.b64encode(PNG.getvalue()).decode(), 1),
    'picture': (Image.new('RGB', (30, 20)), 1),
    'pictures': ([Image.new('RGB', (30, 20))] * 3, 3),
    'pixels': (np.zeros((20, 30, 3), np.uint8), 1),
    'reference': (ImageRef('a.png', None), 1),
}


@pytest.mark.parametrize('column', ['image', 'images', 'image_1'])
@pytest.mark.parametrize('form', PICTURES)
@pytest.mark.fault('images-column')
def test_pictures_in_every_form(column, form, tmp_path, monkeypatch):
    for name in ('a.png', 'b.png'):
        (tmp_path / name).write_bytes(PNG.getvalue())
    monkeypatch.chdir(tmp_path)
    value, n = PICTURES[form]
    item = rows_task(
        't', [{'id': 1, 'question': 'What?', 'answer': 'red', column: value}], 'exact', tmp_path
    ).items[0]
    assert len(item.images) == n and item.turns[-1].text == '<image>\n' * n + 'What?'
    assert all(i.size == (30, 20) for i in (load_image(i) for i in item.images))


@pytest.mark.parametrize(
    'question, shown',
    [
        ('<image>\nWhat?', '<image>\nWhat?'),
        ('What is <image> here?', 'What is <image> here?'),
        ('<IMAGE> What?', '<image> What?'),
        ('What is in <image 1>?', '<image>\nWhat is in the image?'),
        ('What is in <image_1>?', '<image>\nWhat is in the image?'),
        ('What?', '<image>\nWhat?'),
    ],
)
def test_one_mark_for_a_picture(question, shown, tmp_path):
    row = dict(id=1, question=question, answer='red', image='a.png')
    assert rows_task('t', [row], 'exact', tmp_path).items[0].turns[-1].text == shown


@pytest.mark.parametrize(
    'row, why',
    [
        (dict(image='a.png', question='<image> <image>'), 'has 2 <image> but the row has 1'),
        (dict(question='<image> What?'), 'has 1 <image> but the row has 0'),
        (dict(question='<image 1> What?'), 'names <image 1>'),
        (dict(image_1='a.png', question='<image 2>?'), 'names <image 2>'),
        (dict(image=dict(bytes=None, path=None)), 'without bytes or path'),
        (dict(image='a.png', images=['b.png']), 'hold different pictures'),
        (dict(image=1.5), 'float is no picture'),
    ],
)
def test_pictures_that_do_not_fit_are_refused(row, why, tmp_path):
    with pytest.raises(ValueError, match=f't row 0: .*{why}.*it has .*answer'):
        rows_task('t', [dict(id=1, question='What?', answer='red') | row], 'exact', tmp_path)


def test_keys_choose_the_picture_columns(tmp_path):
    row = dict(id=1, question='What?', answer='red', image='a.png', images=['b.png'], extra='c.png')

    def paths(image):
        task = rows_task('t', [row], 'exact', tmp_path, keys=dict(image=image))
        return [i.path for i in task.items[0].images]

    assert (paths('extra'), paths('images')) == (['c.png'], ['b.png'])
    assert paths(('image', 'extra')) == ['a.png', 'c.png']


@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig', 'utf-16'])
@pytest.mark.fault('byte-order-mark')
def test_byte_order_marks(encoding, tmp_path):
    row, line = (
        dict(id='7', question='wör?', answer='a'),
        '{"id":"7","question":"wör?","answer":"a"}',
    )
    texts = {
        'r.json': f'[{line}]',
        'lines.json': f'{line}\n{line}',
        'r.jsonl': f'{line}\n\n',
        'r.tsv': 'id\tquestion\tanswer\n7\twör?\ta\n',
        'r.csv': 'id,question,answer\n7,wör?,a\n',
    }
    for name, text in texts.items():
        (tmp_path / name).write_bytes(text.encode(encoding))
        assert read_rows(tmp_path / name)[0] == row, name
    (tmp_path / 'q.json').write_bytes('{"questions": [{"question_id": 1}]}'.encode(encoding))
    notes = '{"annotations": [{"question_id": 1, "answers": ["a"]}]}'
    (tmp_path / 'n.json').write_bytes(notes.encode(encoding))
    assert read_rows(tmp_path / 'q.json', tmp_path / 'n.json')[0]['answers'] == ['a']


def test_a_line_separator_inside_a_json_string(tmp_path):
    (tmp_path / 'r.jsonl').write_text('{"question": "a\u2028b"}\n', encoding='utf8')
    assert read_rows(tmp_path / 'r.jsonl') == [dict(question='a\u2028b')]


@pytest.mark.parametrize(
    'more',
    [dict(img='a.png'), dict(photo='a.png'), dict(image_url='a.png'), dict(video='a.mp4')]
    + [dict(decoded_image=dict(bytes=b'\x89PNG')), dict(file_name='a.png'), dict(clip=['a.mp4'])],
)
def test_no_question_is_asked_blind_by_accident(more, tmp_path):
    row = dict(id=1, question='What?', answer='red', **more)
    with pytest.raises(ValueError, match=f'{next(iter(more))}.* names a picture, film or sound'):
        rows_task('own', [row], 'exact', tmp_path)


def test_marks_and_prompts_of_other_tools_are_not_lost(tmp_path):
    row = dict(id=1, question='<ImageHere>What?', answer='red')
    with pytest.raises(ValueError, match='picture mark: the question has'):
        rows_task('own', [row], 'exact', tmp_path)
    for key in ('hint', 'system', 'context'):
        row = dict(id=1, question='What?', answer='red') | {key: 'Look left.'}
        with pytest.warns(UserWarning, match=f"column '{key}' of 1 rows is not shown"):
            rows_task('own', [row], 'exact', tmp_path)


@pytest.mark.parametrize('name', ['a.csv', 'a.jsonl', 'a.json'])
def test_a_file_in_another_encoding_is_named(name, tmp_path):
    (tmp_path / name).write_bytes('{"id": 1, "question": "caf\u00e9?"}'.encode('latin-1'))
    with pytest.raises(ValueError, match=f'{name}.*UTF-8'):
        read_rows(tmp_path / name)
    (tmp_path / 'b.jsonl').write_text('{"id": 1}\n{"id": 2}{"id": 3}')
    with pytest.raises(ValueError, match='b.jsonl line 2: not JSON'):
        read_rows(tmp_path / 'b.jsonl')


def test_a_hint_beside_a_conversation_is_said(tmp_path):
    asked = [{'from': 'human', 'value': 'What?'}, {'from': 'gpt', 'value': 'red'}]
    rows = [dict(id=n, conversations=asked, hint='It is warm.') for n in range(2)]
    (tmp_path / 'mine.json').write_text(json.dumps(rows))
    with pytest.warns(UserWarning, match="mine: column 'hint' of 2 rows is not shown"):
        load_task(tmp_path / 'mine.json')
    rows[0]['conversations'][0]['value'] = rows[1]['conversations'][0]['value'] = (
        'It is warm. What?'
    )
    (tmp_path / 'mine.json').write_text(json.dumps(rows))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        load_task(tmp_path / 'mine.json')
