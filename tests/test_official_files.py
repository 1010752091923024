"""Official files of the benchmarks: found, read, asked and scored by hand-computed values."""

import csv
import json
import math
import os
import shutil
import subprocess
import sys

import pandas as pd
import pytest
from judge_server import scripted
from official_files import (
    HUB,
    WRITERS,
    ai2d_folder,
    docvqa_test,
    mmbench_test,
    picture,
    pixels,
    pope,
    seed,
    vizwiz_test,
    vqav2_test,
    write_json,
    write_kind,
    write_lines,
    write_tsv,
)
from typer.testing import CliRunner


from vlmbench.data.cards import cards_dir
from vlmbench.data.picture import load_image
from vlmbench.data.world import asset_path
from vlmbench.evaluate.assess import load_tasks, summary_rows
from vlmbench.evaluate.endpoint import JudgeError
from vlmbench.evaluate.graded import grade_task, make_judge
from vlmbench.evaluate.judge import ChatJudge, Reply
from vlmbench.evaluate.kinds import COMPARER, OFFICIAL
from vlmbench.evaluate.official_files import OfficialError, check_official, official_task
from vlmbench.evaluate.published import read_published
from vlmbench.evaluate.results import Results, load_results, score_predictions
from vlmbench.evaluate.suites import (
    DEFAULT_TASKS,
    SUITES,
    chosen_rule,
    chosen_tasks,
    suite_average,
    suite_table,
)
from vlmbench.evaluate.uploads import check_upload
from vlmbench.run.cli import app
from vlmbench.run.early import check_judge
from vlmbench.run.parameters import ParameterError

# per kind: what a model says to each question, in order, and what comes of it by hand
SAID = dict(
    vqav2=(['red', 'dog'], dict(accuracy=0.45)),  # (3 * 2/3 + 7 * 1) / 10 of one question
    gqa=(['The table.', 'no'], dict(accuracy=0.5)),
    vizwiz=(['dark red', 'Unanswerable'], dict(accuracy=1.0)),
    textvqa=(['Stop', 'go'], dict(accuracy=0.5)),
    pope=(
        ['yes', 'no', 'yes', 'yes', 'no', 'no'],
        {'f1/adversarial': 1.0, 'f1/popular': 2 / 3, 'f1/random': 0.0, 'mean_f1': 5 / 9}
        | {'accuracy/popular': 0.5, 'yes_rate/random': 0.0, 'accuracy': 4 / 6},
    ),
    # code_reasoning comes first: both pairs right; of color one pair, and half of the other
    mme=(
        ['yes', 'no', 'Yes', 'No', 'yes', 'no', 'yes', 'yes'],
        dict(cognition=200.0, perception=125.0, accuracy_plus=0.75),
    ),
    # the figure with a picture has one wrong answer, question 0 too
    hallusionbench=(
        ['Yes', 'Yes.', 'yes'],
        dict(accuracy=2 / 3, figures_all_right=0.0, questions_all_right=0.5),
    ),
    sqa=(['A', 'A'], {'accuracy': 0.5, 'accuracy/image': 1.0, 'accuracy/text': 0.0}),
    mmbench=(['A', 'A', 'D'], dict(accuracy=2 / 3, circular=0.5)),
    mmbench_cn=(['A', 'B', '答案是C'], dict(accuracy=2 / 3, circular=0.5)),
    seed=(
        ['A', 'C', 'C. c thing'],
        {'accuracy': 2 / 3, 'accuracy/image': 0.5, 'accuracy/video': 1.0},
    ),
    ai2d=(['B', 'root'], dict(accuracy=0.5)),
    cvbench=(
        ['(B)', 'B', 'A'],
        {'accuracy/2D': 0.5, 'accuracy/3D': 1.0, 'mean_accuracy': 0.75, 'accuracy': 2 / 3},
    ),
    qbench=(['B', 'A'], dict(accuracy=0.5)),
    mmmu=(
        ['B', 'x = 15 / 2 = 7.5', 'low'],
        {'accuracy': 2 / 3, 'accuracy/open': 1.0, 'accuracy/multiple-choice': 0.5},
    ),
    cmmmu=(['B', '错', 'A、C'], {'accuracy': 2 / 3, 'accuracy/判断': 0.0, 'accuracy/选择': 1.0}),
    realworldqa=(['A. left', '13', 'Yes, it is.'], dict(accuracy=2 / 3)),
    docvqa=(['hello wold', '1990'], dict(accuracy=(1 - 1 / 11 + 1) / 2)),
    infovqa=(['21', '22 000'], dict(accuracy=0.5)),
    chartqa=(['21', 'Chile'], {'accuracy': 0.5, 'accuracy/human': 1.0, 'accuracy/augmented': 0.0}),
    ocrvqa=(['art of sailing', 'Bob'], dict(accuracy=0.5)),
    tdiuc=(['red', '3'], dict(accuracy=0.5, mean_accuracy=0.5)),
)


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp('official')
    return {kind: write_kind(kind, root) for kind in WRITERS}


def answered(task, said):
    assert len(task) == len(said)
    return score_predictions(task, dict(zip([item.id for item in task.items], said)))


def test_every_kind_has_a_fake():
    assert set(WRITERS) == set(OFFICIAL)
    assert set(SAID) | {'mmvet', 'questions', 'llava_wild'} == set(OFFICIAL)


def test_a_kind_s_card_names_its_task():
    for kind, entry in OFFICIAL.items():
        if entry.card:
            card = (cards_dir() / f'{entry.card}.md').read_text(encoding='utf8')
            assert f'tasks={kind}:PATH' in card, entry.card


def test_files_as_they_also_lie_about(folders, tmp_path):
    "POPE as JSON Lines by name, MME in its archive's folders, a fifth option, archives unpacked."
    for file in folders['pope'].glob('*.json'):
        shutil.copy(file, tmp_path / f'{file.stem}.jsonl')
    shutil.copytree(folders['pope'] / 'val2014', tmp_path / 'val2014')
    assert len(official_task(f'pope:{tmp_path}')) == 6
    shutil.copytree(folders['mme'], tmp_path / 'MME release (v1)' / 'MME_Benchmark')
    assert len(official_task(f'mme:{tmp_path / "MME release (v1)"}')) == 8
    table = next(folders['mmbench'].glob('*.tsv'))
    csv.field_size_limit(2**31 - 1)
    with open(table, encoding='utf8', newline='') as file:
        rows = list(csv.DictReader(file, delimiter='\t'))
    write_tsv(tmp_path / 'MMBench_DEV_EN.tsv', [row | dict(E='a fifth thing') for row in rows])
    assert 'E. a fifth thing' in official_task(f'mmbench:{tmp_path}').items[0].turns[-1].text
    (tmp_path / 'packed').mkdir()
    (tmp_path / 'packed' / 'v2_Questions_Val_mscoco.zip').write_bytes(b'PK')
    with pytest.raises(OfficialError, match='unpack v2_Questions_Val_mscoco.zip first'):
        official_task(f'vqav2:{tmp_path / "packed"}')
    with pytest.raises(OfficialError, match='no data file; unpack it first'):
        official_task(f'vqav2:{tmp_path / "packed" / "v2_Questions_Val_mscoco.zip"}')


@pytest.mark.parametrize('rule', ['ours', 'published'])
@pytest.mark.parametrize('kind', SAID)
def test_scores_by_hand(kind, rule, folders):
    said, wanted = SAID[kind]
    task = official_task(f'{kind}:{folders[kind]}', rule=rule)
    results = answered(task, said)
    metrics = results.header['metrics']
    assert OFFICIAL[kind].averages.main in metrics
    if rule == 'ours':
        assert {name: metrics[name] for name in wanted} == pytest.approx(wanted)
        assert results.header['kind'] == kind and results.header['files']
    for item in task.items:
        assert item.turns[-1].text.count('<image>') == len(item.images)
        assert all(load_image(image).size == (32, 32) for image in item.images)
    blind = [item.id for item in task.items if not item.images]
    assert bool(blind) == OFFICIAL[kind].blind


@pytest.mark.parametrize('kind', WRITERS)
def test_first_rows_are_enough_to_check(kind, folders):
    check_official([f'{kind}:{folders[kind]}', 'vqa_test'])


def text(folders, kind, n=0, rule='ours'):
    return official_task(f'{kind}:{folders[kind]}', rule=rule).items[n].turns[-1].text


# by lmms-eval's functions: they read no option text in AI2D, and a letter in front in SEED-Bench
LMMS = {kind: 0.5 for kind in ('gqa', 'textvqa', 'sqa', 'ai2d')} | dict(vqav2=0.45, vizwiz=1.0)
LMMS |= dict(pope=4 / 6, mme=7 / 8, seed=2 / 3, mmmu=2 / 3, mmbench=2 / 3)


@pytest.mark.parametrize('kind', [kind for kind, entry in OFFICIAL.items() if entry.card])
def test_the_official_files_are_checked_as_they_are(kind, folders):
    "A card names files of the published methods, which a copy of the benchmark need not have."
    asked = ['data', 'check', OFFICIAL[kind].card, str(folders[kind])]
    done = CliRunner().invoke(app, asked)
    questions = len(official_task(f'{kind}:{folders[kind]}'))
    assert f'official files, {kind}:{folders[kind]}' in done.output
    assert f': {questions} questions, and their pictures open' in done.output
    differs = {'qbench', 'mmmu', 'llava_wild'}  # whose cards name these very files, and their rows
    assert done.exit_code == int(kind in differs), done.output


def test_official_files_without_a_picture_are_no_copy(tmp_path):
    folder = write_kind('chartqa', tmp_path)
    next(folder.rglob('human.png')).write_bytes(b'no picture')
    done = CliRunner().invoke(app, ['data', 'check', 'chartqa', str(folder)])
    assert done.exit_code == 1 and 'is no image format' in done.output, done.output


@pytest.mark.parametrize('kind', LMMS)
def test_scores_by_lmms_eval_s_verdicts(kind, folders):
    "Every row of the file is asked and scored: MMMU's open questions, too."
    said = SAID[kind][0]
    task = official_task(f'{kind}:{folders[kind]}', rule='lmms')
    assert answered(task, said).accuracy == pytest.approx(LMMS[kind])


def test_every_kind_with_lmms_eval_s_verdicts_is_tried():
    assert set(LMMS) == {kind for kind, entry in OFFICIAL.items() if entry.lmms}


def test_prompts_show_what_the_file_has(folders):
    letter = "Answer with the option's letter from the given choices directly."
    brief = 'Answer the question using a single word or phrase.'
    assert text(folders, 'mmbench', 2) == (
        f'<image>\nLook closely.\nWhich one?\nA. 1\nB. 2\nC. 3\nD. 4\n{letter}'
    )
    assert text(folders, 'mmbench') == f'<image>\nWhich one?\nA. red\nB. blue\n{letter}'
    assert text(folders, 'sqa') == (
        f'<image>\nContext: Read the map.\nWhich?\nA. north\nB. south\n{letter}'
    )
    assert text(folders, 'sqa', 1) == f'Which?\nA. north\nB. south\n{letter}'
    assert text(folders, 'textvqa') == f'<image>\nWhat does it say?\n{brief}'
    ocr = text(folders, 'textvqa', rule='published')
    assert ocr == f'<image>\nWhat does it say?\nReference OCR token: STOP, HERE\n{brief}'
    assert 'OCR' not in text(folders, 'textvqa', 1, 'published')
    assert text(folders, 'mmmu').splitlines()[:3] == [
        '<image>',
        '<image>',
        'Is image 1 like image 2?',
    ]
    assert text(folders, 'mmmu', 1) == f'<image>\nWhy?\n{brief}'
    assert text(folders, 'cmmmu').startswith(
        '<image>\n<image>\n看图图片1，对吗？\nA. 图片2\nB. 蓝\n'
    )
    assert text(folders, 'cvbench').splitlines()[-2:] == ['(C) 0', letter]
    first = '<image>\nPlease answer the question in one words.\nWhat is'
    assert text(folders, 'ocrvqa', rule='published').startswith(first)
    assert text(folders, 'mme').endswith('Please answer yes or no.')
    assert 'Unanswerable' in text(folders, 'vizwiz')


# a model that always says the same letter, and one that knows, on a file without copies
@pytest.mark.parametrize('rule', ['ours', 'published'])
def test_mmbench_s_copies_are_made_where_a_file_has_none(rule, tmp_path):
    rows = [
        dict(index=7, question='Which?', A='red', B='blue', C='', D='', answer='B', image=pixels()),
        dict(index=9, question='How many?', A='1', B='2', C='3', D='4', answer='D', image=pixels()),
    ]
    write_tsv(tmp_path / 'MMBench_DEV_EN_V11.tsv', rows)
    task = official_task(f'mmbench:{tmp_path}', rule=rule)
    ids = ['7', '1000007', '9', '1000009', '2000009', '3000009']
    assert [item.id for item in task.items] == ids and task.facts['copies_made'] == 4
    assert [item.answers[0] for item in task.items] == ['B', 'A', 'D', 'C', 'B', 'A']
    assert [list(item.choices.values()) for item in task.items][3] == ['2', '3', '4', '1']
    assert 'A. 2\nB. 3\nC. 4\nD. 1' in task.items[3].turns[-1].text
    metrics = answered(task, ['B', 'B', 'D', 'C', 'B', 'A']).header['metrics']
    assert (metrics['circular'], metrics['accuracy']) == (0.5, 5 / 6)
    results = answered(task, ['4', 'red', '4', '4', '4', '4'])
    assert results.header['metrics']['circular'] == 0.5
    assert [row['index'] for row in task.upload.rows(task, results.frame)] == [7, 9]
    assert answered(task, ['D'] * 6).header['metrics']['circular'] == 0


def test_copies_are_not_made_twice_nor_for_lmms_eval_s_verdict(folders, tmp_path):
    task = official_task(f'mmbench:{folders["mmbench"]}')
    assert len(task) == 3 and task.facts['copies_made'] == 0
    row = dict(index=7, question='?', A='x', B='y', C='', D='', answer='B', image=pixels())
    write_tsv(tmp_path / 'MMBench_DEV_EN.tsv', [row])
    assert len(official_task(f'mmbench:{tmp_path}', rule='lmms')) == 1


def test_ai2d_is_read_as_it_is_unpacked(tmp_path):
    ai2d_folder(tmp_path)
    task = official_task(f'ai2d:{tmp_path}')
    assert [item.id for item in task.items] == ['12.png-0', '12.png-1']
    assert task.items[0].turns[-1].text.startswith('<image>\nWhat is A?\nA. ear\nB. leg\nAnswer')
    assert [item.answers[0] for item in task.items] == ['B', 'A']
    assert [item.question_type for item in task.items] == ['partsOfA'] * 2
    lettered, plain = (load_image(item.images[0]) for item in task.items)
    assert plain.getpixel((12, 12)) == (255, 0, 0) != lettered.getpixel((12, 12))
    assert lettered.getpixel((2, 2)) == (254, 0, 0) or lettered.getpixel((2, 2)) == (255, 0, 0)
    assert answered(task, ['leg', 'B']).header['metrics']['accuracy'] == 0.5
    assert len(official_task(f'ai2d:{tmp_path / "ai2d"}', rule='lmms')) == 2
    check_official([f'ai2d:{tmp_path}'])


def test_ai2d_without_the_list_of_its_test_says_so(tmp_path):
    ai2d_folder(tmp_path)
    (tmp_path / 'ai2d_test_ids.csv').unlink()
    with pytest.warns(UserWarning, match='no ai2d_test_ids.csv there or beside it'):
        task = official_task(f'ai2d:{tmp_path}')
    assert len(task) == 3 and task.facts['split'] == 'train and test'
    (tmp_path / 'ai2d' / 'annotations' / '12.png.json').unlink()
    with pytest.raises(OfficialError, match='ai2d.*12.png.json is not there'):
        with pytest.warns(UserWarning):
            official_task(f'ai2d:{tmp_path}')
    ai2d_folder(tmp_path)
    (tmp_path / 'ai2d' / 'images' / '12.png').unlink()
    with pytest.raises(OfficialError, match='12.png is not below'):
        official_task(f'ai2d:{tmp_path}')


def test_cvbench_is_read_by_its_brackets(folders):
    task = official_task(f'cvbench:{folders["cvbench"]}', rule='published')
    right = [item.answers[0].strip('()') for item in task.items]
    for form, score in (('({})', 1), ('{}', 1), ('{})', 1), ('It is ({})', 0), ('{}.', 0)):
        said = [form.format(letter) for letter in right]
        assert answered(task, said).header['metrics']['mean_accuracy'] == score, form


def test_tdiuc_as_the_study_asks_it(folders):
    task = official_task(f'tdiuc:{folders["tdiuc"]}', rule='published')
    assert task.items[0].turns[-1].text == '<image>\nWhat? Answer the question in one word.'
    assert answered(task, ['Red', 'two']).header['metrics']['accuracy'] == 1
    assert answered(task, ['red.', 'Two of them']).header['metrics']['accuracy'] == 0.5


def test_seed_takes_frames(folders, tmp_path):
    assert official_task(f'seed:{folders["seed"]}').items[2].images[0].path.endswith('10_9.png')
    seed(tmp_path)
    (tmp_path / 'SEED-Bench-video-image' / '10_9.png').unlink()
    for k in (10, 2, 1):
        picture(tmp_path / 'SEED-Bench-video-image' / f'10_9_{k}.png')
    item = official_task(f'seed:{tmp_path / "SEED-Bench.json"}').items[2]
    assert [image.path.split('_')[-1] for image in item.images] == ['1.png', '2.png', '10.png']


def test_one_file_of_pope_has_no_mean(folders):
    task = official_task(f'pope:{folders["pope"] / "coco_pope_popular.json"}')
    metrics = answered(task, ['yes', 'no']).header['metrics']
    assert metrics['f1/popular'] == 1 and 'mean_f1' not in metrics


@pytest.mark.parametrize('kind', HUB)
def test_parquet_of_the_hub_scores_the_same(kind, tmp_path):
    HUB[kind](tmp_path)
    check_official([f'{kind}:{tmp_path}'], rule='published')
    said, wanted = SAID[kind]
    if kind == 'hallusionbench':  # the questions without a picture are a file of their own
        said = said[1:] + said[:1]
    task = official_task(f'{kind}:{tmp_path}')
    metrics = answered(task, said).header['metrics']
    assert {name: metrics[name] for name in wanted} == pytest.approx(wanted)
    shown = [len(item.images) for item in task.items]
    assert shown == dict(sqa=[1, 0], seed=[1, 1, 3], hallusionbench=[1, 1, 0]).get(
        kind, [1] * len(shown)
    )


# --------------------------------------------------------------------------------------------------
# what is hidden, or judged
def test_hidden_answers_make_a_file_and_no_score(tmp_path):
    vqav2_test(tmp_path)
    task = official_task(f'vqav2:{tmp_path}')
    results = answered(task, ['Two dogs.', 'the cat'])
    assert results.frame['score'].isna().all() and not results.scored
    assert json.loads(task.upload(task, results.frame, tmp_path).read_text()) == [
        dict(question_id=10, answer='2 dogs'),
        dict(question_id=20, answer='cat'),
    ]
    card = json.loads(results.save(tmp_path / 'run' / 'results')[1].read_text())
    assert card['scored'] is False and 'accuracy' not in card and card['split'] == 'test-dev2015'
    assert not Results.load(tmp_path / 'run' / 'results', 'vqav2').scored
    frame = load_results([tmp_path / 'run'])
    assert not len(frame) and 'scores of vqav2' in ' '.join(frame.attrs['not_recorded'])


def test_other_servers(tmp_path):
    vizwiz_test(tmp_path)
    task = official_task(f'vizwiz:{tmp_path}')
    sent = task.upload.rows(task, answered(task, ['a can', 'unanswerable']).frame)
    assert sent[0] == dict(image='VizWiz_test_00000000.jpg', answer='can')
    docvqa_test(tmp_path / 'doc')
    task = official_task(f'docvqa:{tmp_path / "doc"}')
    sent = task.upload.rows(task, answered(task, ['Ann Bee']).frame)
    assert sent == [dict(questionId=7, answer='Ann Bee')]


def test_mmbench_is_sent_as_a_table(tmp_path):
    pytest.importorskip('openpyxl', reason='openpyxl is not installed (extra: eval)')
    mmbench_test(tmp_path)
    task = official_task(f'mmbench:{tmp_path}')
    results = answered(task, ['A', 'I choose B.', '4'])
    table = pd.read_excel(task.upload(task, results.frame, tmp_path))
    assert list(table) == ['index', 'question', 'A', 'B', 'C', 'D', 'prediction']
    assert table['prediction'].tolist() == ['A', 'B', 'D']
    assert table['index'].tolist() == [5, 1_000_005, 6]


def test_without_openpyxl_hidden_answers_are_refused_early(tmp_path, monkeypatch):
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    mmbench_test(tmp_path)
    with pytest.raises(ImportError, match='pip install openpyxl'):
        check_official([f'mmbench:{tmp_path}'])
    check_upload(OFFICIAL['vqav2'].upload)


def test_and_or_is_never_compared(folders):
    task = official_task(f'mmvet:{folders["mmvet"]}')
    results = answered(task, ['-1<AND>-5', 'red'])
    assert results.frame['score'].map(math.isnan).all()
    assert task.upload.rows(task, results.frame)[1] == dict(id='v1_1', answer='red')
    assert task.facts['unscored'] == 'a language model grades it' and task.max_new_tokens == 1024


def test_a_judge_grades_every_ability(folders, tmp_path):
    task = official_task(f'mmvet:{folders["mmvet"]}')
    answered(task, ['-1 and -5', 'a red one']).save(tmp_path)
    asked = []

    def endpoint(messages, temperature, max_tokens):
        asked.append(messages[0]['content'].splitlines()[-1])
        return Reply('1.0' if '-5' in asked[-1].split(' | ')[2] else '0.4', 'made-up')

    graded = grade_task(task, tmp_path, ChatJudge(endpoint), runs=2)
    assert len(asked) == 4 and asked[0] == 'What is x? | -1 <AND> -5 | -1 and -5 | '
    wanted = {'accuracy': 0.7, 'accuracy/math': 0.7, 'accuracy/ocr': 0.7}
    assert graded.header['metrics'] == pytest.approx(wanted)
    card = json.loads((tmp_path / 'mmvet@judged.json').read_text())
    assert card['accuracy'] == pytest.approx(0.7) and card['published_prompt'] is False
    grade_task(task, tmp_path, ChatJudge(endpoint), runs=2)
    assert len(asked) == 4  # kept in the log


def test_the_exact_judge_compares_nothing(folders, tmp_path):
    "Its accuracy would stand for LLaVA-Bench's relative score, which is another number."
    task = official_task(f'llava_wild:{folders["llava_wild"]}')
    answered(task, ['A red boat.', 'a cat']).save(tmp_path)
    with pytest.raises(ValueError, match='llava_wild: .* name an endpoint as judge'):
        grade_task(task, tmp_path, make_judge('exact'))
    given = dict(suite='', judge='exact', tasks=[f'llava_wild:{folders["llava_wild"]}'])
    given |= dict(judge_model='m', judge_key_env='', judge_prompt='')
    with pytest.raises(ParameterError, match='judge=exact .* name an endpoint'):
        check_judge(given)
    check_judge(given | dict(judge='http://127.0.0.1:9/v1'))
    with pytest.raises(ParameterError, match='grades mmvet:PATH and llava_wild:PATH, which no'):
        check_judge(given | dict(tasks=['pope:X']))


def test_a_key_that_is_not_there_is_missed_before_anything_is_asked(monkeypatch):
    monkeypatch.delenv('JUDGE_KEY', raising=False)
    with pytest.raises(JudgeError, match='variable JUDGE_KEY is not set; put the key there'):
        make_judge('http://127.0.0.1:9/v1', 'm', 'JUDGE_KEY')
    monkeypatch.setenv('JUDGE_KEY', 'k')
    assert make_judge('http://127.0.0.1:9/v1', 'm', 'JUDGE_KEY').endpoint.model == 'm'


def test_a_judge_compares_answers_with_references(folders, tmp_path, monkeypatch):
    """By the command's own steps: without a judge a file and no score, with one the sum of scores
    over that of the references, what it cannot read asked for again and left out."""
    task = official_task(f'llava_wild:{folders["llava_wild"]}')
    assert task.facts['unscored'] == f'{COMPARER} grades it' and task.max_new_tokens == 1024
    results = answered(task, ['A red boat.', 'a cat'])
    assert results.frame['score'].map(math.isnan).all()
    sent = dict(question_id=1, prompt='What is it?', text='a cat')
    assert task.upload.rows(task, results.frame)[1] == sent
    results.save(tmp_path)

    def play(n, request, headers):
        text = request['messages'][0]['content']
        assert headers['Authorization'] == 'Bearer secret'
        if '[Context]\npicture 0' in text:
            reference, own = text.index('A boat, 000.jpg.'), text.index('A red boat.')
            assert text.index('[Assistant 1]') < reference < text.index('[Assistant 2]') < own
            return '8 10\nThe second is better.'
        return 'I would rather not.' if n < 2 else '8/10 2/10'

    monkeypatch.setenv('JUDGE_KEY', 'secret')
    with scripted(play) as (url, seen):
        judge = make_judge(url, 'made-up-judge', 'JUDGE_KEY')
        graded = grade_task(task, tmp_path, judge, runs=1, workers=1)
    assert [r['temperature'] for r in seen] == [0.0, 0.0, 0.5]
    metrics = graded.header['metrics']
    wanted = {'relative': 12 / 16, 'relative/conv': 10 / 8, 'relative/detail': 2 / 8}
    assert metrics == pytest.approx(wanted | dict(own=6.0, reference=8.0))
    assert graded.header['unparsed'] == 0 and 'secret' not in json.dumps(graded.header)
    assert graded.frame['score'].tolist() == [1.0, 0.2]
    (folders['llava_wild'] / 'context.jsonl').rename(tmp_path / 'context.jsonl')
    with pytest.raises(OfficialError, match='context.jsonl is missing beside questions.jsonl'):
        official_task(f'llava_wild:{folders["llava_wild"]}')
    (tmp_path / 'context.jsonl').rename(folders['llava_wild'] / 'context.jsonl')


def test_questions_of_one_s_own(folders):
    task = official_task(f'questions:{folders["questions"] / "questions.jsonl"}')
    sent = task.upload.rows(task, answered(task, ['a dog', 'a cat']).frame)
    assert sent[1] == dict(question_id=1, prompt='What is it?', text='a cat')


# --------------------------------------------------------------------------------------------------
# what is refused
@pytest.mark.parametrize(
    'task, why',
    [
        ('popes:X', "kind 'popes' is unknown: use one of vqav2, gqa"),
        ('pope:', 'no path is given'),
        ('pope:nowhere', 'coco_pope_adversarial.json'),
    ],
)
def test_what_is_not_there_is_named(task, why, tmp_path):
    with pytest.raises(OfficialError, match=why):
        official_task(task, tmp_path)


def test_files_and_pictures_that_are_missing(tmp_path):
    with pytest.raises(OfficialError, match='none of its files in .*TextVQA_0.5.1_val.json'):
        official_task(f'textvqa:{tmp_path}')
    pope(tmp_path)
    (tmp_path / 'coco_pope_random.json').unlink()
    with pytest.raises(OfficialError, match='coco_pope_random.json missing'):
        official_task(f'pope:{tmp_path}')
    pope(tmp_path)
    moved = tmp_path / 'elsewhere'
    (tmp_path / 'val2014').rename(moved)
    with pytest.raises(OfficialError, match='6 of 6 rows without their picture, first row 0: COCO'):
        official_task(f'pope:{tmp_path}')
    assert len(official_task(f'pope:{tmp_path}', roots=[str(moved)])) == 6


def test_ocr_tokens_are_not_left_out_in_silence(folders, tmp_path):
    for path in folders['textvqa'].rglob('*.*'):
        if 'OCR' not in path.name:
            place = tmp_path / path.relative_to(folders['textvqa'])
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(path.read_bytes())
    official_task(f'textvqa:{tmp_path}')
    with pytest.raises(OfficialError, match='no ocr_tokens, which the published prompt shows'):
        official_task(f'textvqa:{tmp_path}', rule='published')


@pytest.mark.parametrize(
    'change, why',
    [
        (dict(choice_b='', choice_c='', choice_d=''), 'no options'),
        (dict(answer='E'), "answer 'E' is no option"),
        (dict(question=''), 'no question'),
        (dict(answer=None), '1 of 3 rows have no answer'),
    ],
)
def test_rows_of_another_kind_are_refused(change, why, tmp_path):
    seed(tmp_path)
    path = tmp_path / 'SEED-Bench.json'
    file = json.loads(path.read_text())
    file['questions'][0] |= change
    write_json(path, file)
    with pytest.raises(OfficialError, match=why):
        official_task(f'seed:{tmp_path}')


def test_blind_questions_are_not_asked_by_accident(tmp_path):
    write_tsv(
        tmp_path / 'dev.tsv', [dict(index=1, question='?', A='x', B='y', answer='A', image='')]
    )
    with pytest.raises(OfficialError, match='a picture in image is not below'):
        official_task(f'mmbench:{tmp_path / "dev.tsv"}')


def test_splits_that_are_not_asked_may_come_first(tmp_path):
    book = dict(questions=['Who?'], answers=['Ann'], split=1)
    rows = {f'{i:04d}': book for i in range(9)} | {'0009': book | dict(split=3)}
    write_json(tmp_path / 'dataset.json', rows)
    picture(tmp_path / 'images' / '0009.jpg')
    check_official([f'ocrvqa:{tmp_path}'])
    assert [item.id for item in official_task(f'ocrvqa:{tmp_path}').items] == ['0009/0']


def test_pictures_do_not_leave_their_folder(tmp_path):
    picture(tmp_path / 'secret.png')
    row = dict(question_id=1, text='What?')
    file = tmp_path / 'own' / 'questions.jsonl'
    for image in ('../secret.png', str(tmp_path / 'secret.png')):
        write_lines(file, [row | dict(image=image)])
        with pytest.raises(OfficialError, match='leads out of the folder'):
            official_task(f'questions:{file}')
    (tmp_path / 'else').mkdir()
    picture(tmp_path / 'else' / 'a.png')
    (tmp_path / 'own' / 'link').symlink_to(tmp_path / 'else')
    write_lines(file, [row | dict(image='link/a.png')])
    with pytest.raises(OfficialError, match='name its folder in image_roots'):
        official_task(f'questions:{file}')
    item = official_task(f'questions:{file}', roots=[str(tmp_path / 'else')]).items[0]
    assert load_image(item.images[0]).size == (32, 32)


def test_question_types_of_zero_are_no_total(folders):
    rows = [item.question_type for item in official_task(f'qbench:{folders["qbench"]}').items]
    assert rows == ['0', '1']


def test_pictures_behind_a_link_to_their_folder(tmp_path):
    seed(tmp_path / 'seed')
    (tmp_path / 'seed' / 'SEED-Bench-image').rename(tmp_path / 'elsewhere')
    (tmp_path / 'seed' / 'SEED-Bench-image').symlink_to(tmp_path / 'elsewhere')
    task = official_task(f'seed:{tmp_path / "seed"}')
    assert [load_image(item.images[0]).size for item in task.items] == [(32, 32)] * 3


def test_files_of_another_form(tmp_path):
    (tmp_path / 'SEED-Bench.json').write_text('["a", "b"]')
    with pytest.raises(OfficialError, match="'a' in .* is no row"):
        official_task(f'seed:{tmp_path}')
    write_json(tmp_path / 'dataset.json', {'1': dict(questions=['?'], split=3)})
    with pytest.raises(OfficialError, match="dataset.json lack 'answers'"):
        official_task(f'ocrvqa:{tmp_path / "dataset.json"}')
    (tmp_path / 'mm-vet.json').write_text('{"v1_0": ')
    with pytest.raises(ValueError, match='mm-vet.json: not JSON'):
        official_task(f'mmvet:{tmp_path}')


def test_files_with_a_prompt_of_their_own(tmp_path):
    brief = 'Answer the question using a single word or phrase.'
    row = dict(question_id=1, image='COCO_test2015_000000000001.jpg', category='default')
    write_lines(
        tmp_path / 'llava_vqav2_mscoco_test-dev2015.jsonl', [row | dict(text=f'Why?\n{brief}')]
    )
    picture(tmp_path / 'test2015' / row['image'])
    item = official_task(f'vqav2:{tmp_path}').items[0]
    assert item.turns[-1].text == f'<image>\nWhy?\n{brief}'


# --------------------------------------------------------------------------------------------------
# several tasks
def test_tasks_of_one_kind_have_names_of_their_own(tmp_path, folders):
    vqav2_test(tmp_path)
    names = [f'vqav2:{folders["vqav2"]}', f'vqav2:{tmp_path}', f'pope:{folders["pope"]}']
    assert list(load_tasks('', names)) == ['vqav2-val2014', 'vqav2-test-dev2015', 'pope']
    with pytest.raises(ValueError, match='twice'):
        load_tasks('', names[:1] * 2)


def test_a_limit_keeps_pairs(folders):
    task = load_tasks('', [f'mme:{folders["mme"]}'], limit=3)['mme']
    assert (task.name, len(task)) == ('mme.head3', 4)
    assert answered(task, ['yes', 'no'] * 2).header['metrics']['cognition'] == 200


def test_paths_below_the_data_folder(folders):
    data = folders['pope'].parent
    assert len(load_tasks(data, ['pope:pope', 'seed:seed/SEED-Bench.json'])) == 2


# --------------------------------------------------------------------------------------------------
# a paper's list
AUTHORS = dict(sqa='scienceqa', mmvet='mm-vet', seed='SEED-Bench', mme='MME', cvbench='CV-Bench')
AUTHORS |= dict(llava_wild='llava-bench-in-the-wild')


def write_suite(name, root):
    "A folder for each benchmark of a suite, called as its authors call it."
    tests = dict(vqav2=vqav2_test) | (dict(vizwiz=vizwiz_test) if name != 'zero' else {})
    for kind in {column.kind for column in SUITES[name].columns}:
        (tests.get(kind) or WRITERS[kind])(root / AUTHORS.get(kind, kind))
    return root


@pytest.mark.parametrize('name', SUITES)
def test_a_suite_finds_and_asks_its_benchmarks(name, tmp_path):
    names = chosen_tasks(DEFAULT_TASKS, name, write_suite(name, tmp_path))
    check_official(names, tmp_path, rule=chosen_rule('', name))
    tasks = load_tasks(tmp_path, names, rule='published')
    assert list(tasks) == list(dict.fromkeys(column.kind for column in SUITES[name].columns))
    right = {
        kind: score_predictions(task, {i.id: i.answers[0] for i in task.items})
        for kind, task in tasks.items()
    }
    summary = {
        kind: dict(metrics=results.header['metrics']) if results.scored else {}
        for kind, results in right.items()
    }
    table = suite_table(name, 'right', summary)
    hidden = {'MM-Vet', 'LLaVA-W'} | ({'VQAv2', 'VizWiz'} if name != 'zero' else set())
    missing = {column for column in table if pd.isna(table.loc['right', column])}
    averages = {n for n, mean in SUITES[name].averages.items() if hidden & set(mean)}
    assert missing == hidden & set(table) | averages
    shown = table.loc['right'].drop(sorted(missing)).to_dict()
    full = dict.fromkeys(shown, 100.0) | {'MME-P': 200.0, 'MME-C': 200.0, 'VizWiz': 95.0}
    assert shown == pytest.approx({column: full[column] for column in shown})


def test_vora_s_mean_of_eight_gives_its_published_means():
    "The paper's ablation: the mean of eight columns, MME's perception divided by 20."
    suite = SUITES['vora']
    names = {(column.kind, column.metric): column.name for column in suite.columns}
    found = []
    for (_, arm), rows in read_published('vora').groupby(['model', 'arm']):
        if arm.startswith('r'):
            cells = zip(zip(rows['benchmark'], rows['metric']), rows['value'])
            values = {names[cell]: value for cell, value in cells if cell in names}
            found.append(suite_average(values, suite.averages['mean of 8']))
    assert sorted(found) == pytest.approx([50.6, 50.7, 52.9, 53.2, 55.6, 55.6], abs=0.05)


def test_a_suite_names_all_that_is_missing(tmp_path):
    write_suite('eve', tmp_path)
    (tmp_path / 'vqav2' / 'v2_OpenEnded_mscoco_test-dev2015_questions.json').unlink()
    (tmp_path / 'gqa').rename(tmp_path / 'other')
    with pytest.raises(OfficialError, match='VQAv2 test-dev2015.*gqa .folder'):
        chosen_tasks(DEFAULT_TASKS, 'eve', tmp_path)


def test_a_task_without_types_has_one_line_a_number():
    line = dict(task='t', condition='image', question_type='all', n=2, score=0.5, low=0, high=1)
    summary = dict(t=dict(n=2, image=0.5, metrics=dict(accuracy=0.5)))
    rows = summary_rows(pd.DataFrame([line, line]), summary)
    assert rows['metric'].tolist() == ['accuracy']


# --------------------------------------------------------------------------------------------------
# the command
def test_a_kernel_does_not_start_for_files_that_are_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ['run', 'evaluate', f'model={asset_path("vlm")}', 'tasks=["pope:nowhere"]']
    said = CliRunner().invoke(app, words)
    assert said.exit_code == 1
    message = str(said.exception)
    assert 'tasks: task pope:nowhere: not there' in message and 'coco_pope_random' in message
    assert not list(tmp_path.iterdir())


SEVERAL = ['pope:pope', 'mme:mme', 'mmbench:mmbench', 'sqa:sqa', 'seed:seed/SEED-Bench.json']
SEVERAL += ['cvbench:cvbench', 'hallusionbench:hallusionbench', 'vqav2:test', 'mmvet:mmvet']
SEVERAL += ['llava_wild:llava_wild']


@pytest.mark.slow
def test_the_command_on_one_rank_and_on_two(tmp_path):
    "From another folder, with paths below the data folder and a path of this machine."
    for task in SEVERAL:
        kind, _, place = task.partition(':')
        if place != 'test':
            write_kind(kind, tmp_path / 'EVAL')
    vqav2_test(tmp_path / 'EVAL' / 'test')
    (tmp_path / 'work').mkdir()
    env = os.environ | dict(PYTHONPATH=os.pathsep.join(sys.path))
    shared = [f'model={asset_path("vlm")}', 'data=../EVAL', f'tasks={json.dumps(SEVERAL)}']
    shared += ['max_new_tokens=3', 'batch_size=2', 'device=cpu', 'rule=published', 'judge=exact']
    for out, ranks in (('one', 1), ('two', 2)):
        words = [*shared, f'out={out}', f'gpus={ranks}']
        done = subprocess.run(
            [sys.executable, '-m', 'vlmbench', 'run', 'evaluate', '--quiet', *words],
            cwd=tmp_path / 'work',
            env=env,
            text=True,
            capture_output=True,
            timeout=500,
        )
        assert done.returncode == 0, done.stderr[-2000:]
    one, two = tmp_path / 'work' / 'one', tmp_path / 'work' / 'two'
    assert (one / 'summary.tsv').read_text() == (two / 'summary.tsv').read_text()
    table = pd.read_csv(one / 'summary.tsv', sep='\t')
    first = table.drop_duplicates('task').set_index('task')['metric']
    assert first.to_dict() | dict(vqav2='', llava_wild='') == dict(
        pope='mean_f1',
        mme='perception',
        mmbench='circular',
        sqa='accuracy/image',
        seed='accuracy',
        cvbench='mean_accuracy',
        hallusionbench='accuracy',
        vqav2='',
        mmvet='accuracy',
        llava_wild='',
    )
    assert 'no score' in first['vqav2'] and 'no score' in first['llava_wild']
    assert not (one / 'results' / 'llava_wild@judged.json').exists()
    judged = json.loads((one / 'results' / 'mmvet@judged.json').read_text())
    assert judged['judge_runs'] == 1 and set(judged['metrics']) > {'accuracy/ocr'}
    for name in first.index:
        mine, theirs = (pd.read_parquet(f / 'results' / f'{name}.parquet') for f in (one, two))
        assert mine[['id', 'prediction']].equals(theirs[['id', 'prediction']])
        card = json.loads((one / 'results' / f'{name}.json').read_text())
        assert (card['kind'], card['rule']) == (name, 'published')
    for name in ('vqav2', 'mmvet'):
        sent = [(f / 'results' / f'{name}.upload.json').read_text() for f in (one, two)]
        assert sent[0] == sent[1] and len(json.loads(sent[0])) == 2
        assert not (one / 'results' / f'{name}@blind.json').exists()
