"""Scorers against their benchmarks' rules, against lmms-eval's own functions where it is installed,
and under hypothesis."""

import ast
import importlib.util
import re
import string
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmbench.evaluate.captions import Caption
from vlmbench.evaluate.judge import ExactJudge, parse_grade
from vlmbench.evaluate.region_tasks import PlainMatch
from vlmbench.evaluate.scorers import (
    ANLS,
    MME,
    POPE,
    SCORERS,
    ExactMatch,
    MultipleChoice,
    Relaxed,
    VQASoft,
    edit_distance,
    get_scorer,
    normalise,
    parse_choice,
    parse_yes_no,
    vqa_normalise,
)
from vlmbench.evaluate.vip_bench import VipExact

WORDS = st.text(alphabet=string.ascii_letters + string.digits + " .,;!?'/-()", max_size=25)


def lmms_folder() -> Path:
    spec = importlib.util.find_spec('lmms_eval')
    if spec is None:
        pytest.skip('lmms-eval is not installed: pip install --no-deps lmms-eval==0.7.3')
    return Path(spec.submodule_search_locations[0])


def lmms_module(path: str, **stubs) -> ModuleType:
    """One file of lmms-eval as a module, without importing the package around it (its imports are
    what `stubs` names)."""
    file = lmms_folder() / path
    if not file.exists():
        pytest.skip(f'this lmms-eval has no {path}')
    spec = importlib.util.spec_from_file_location('lmms_' + re.sub(r'\W', '_', path), file)
    module, old = importlib.util.module_from_spec(spec), {n: sys.modules.get(n) for n in stubs}
    sys.modules.update(stubs)
    try:
        spec.loader.exec_module(module)
    except ModuleNotFoundError as e:
        pytest.skip(f'lmms-eval {path} needs {e.name}')
    finally:
        for n, m in old.items():
            if m is None:
                sys.modules.pop(n)
            else:
                sys.modules[n] = m
    return module


def lmms_functions(path: str, names: set[str], **world) -> SimpleNamespace:
    "Single functions of an lmms-eval file, without its decorators and imports."
    file = lmms_folder() / path
    if not file.exists():
        pytest.skip(f'this lmms-eval has no {path}')
    body = [
        n
        for n in ast.parse(file.read_text()).body
        if isinstance(n, ast.FunctionDef) and n.name in names
    ]
    assert {n.name for n in body} == names
    for n in body:
        n.decorator_list, n.returns = [], None
    for n in body:
        for a in n.args.args:
            a.annotation = None
    exec(compile(ast.Module(body, []), str(file), 'exec'), world)
    return SimpleNamespace(**{n: world[n] for n in names})


@pytest.fixture(scope='module')
def vqa_reference():
    metric = lmms_module('tasks/_task_utils/vqa_eval_metric.py')
    files = ModuleType('lmms_eval.tasks._task_utils.file_utils')
    files.generate_submission_file = None
    stubs = {
        n: ModuleType(n) for n in ('lmms_eval', 'lmms_eval.tasks', 'lmms_eval.tasks._task_utils')
    }
    for parent, name in (('lmms_eval', 'tasks'), ('lmms_eval.tasks', '_task_utils')):
        setattr(stubs[parent], name, stubs[f'{parent}.{name}'])
    stubs['lmms_eval.tasks._task_utils'].file_utils = files
    stubs |= {
        'lmms_eval.tasks._task_utils.file_utils': files,
        'lmms_eval.tasks._task_utils.vqa_eval_metric': metric,
    }
    return SimpleNamespace(
        processor=metric.EvalAIAnswerProcessor,
        v2=lmms_module('tasks/vqav2/utils.py', **stubs),
        text=lmms_module('tasks/textvqa/utils.py', **stubs),
    )


# ---------------------------------------------------------------- exact match


@given(WORDS)
def test_normalise_is_idempotent_and_never_empties(text):
    once = normalise(text)
    assert normalise(once) == once
    assert bool(once) == bool(text.strip())


@given(WORDS, WORDS)
def test_exact_match_is_symmetric(a, b):
    s = ExactMatch()
    assert s.score(a, dict(answers=[b])) == s.score(b, dict(answers=[a]))
    assert s.score(a, dict(answers=[b, a])) == 1


def test_exact_match_agrees_with_lmms_eval():
    import numpy as np

    ref = lmms_functions(
        'api/metrics.py', {'exact_match_hf_evaluate'}, np=np, re=re, string=string
    ).exact_match_hf_evaluate
    gqa = get_scorer('gqa')
    pairs = [
        ('Yes.', 'yes'),
        ('red', 'Red'),
        ('the table', 'table'),
        ('left', 'right'),
        ("it's", 'its'),
        ('t-shirt', 'tshirt'),
    ]
    for said, truth in pairs:
        theirs = ref([said], [truth], ignore_case=True, ignore_punctuation=True)['exact_match']
        assert gqa.score(said, dict(answers=[truth])) == theirs, (said, truth)


# what another sign makes of an answer, and what only decorates it
OTHER_NUMBERS = [
    ('-5', '5'),
    ('− 5', '5'),
    ('-2.5', '2.5'),
    ('1.5', '15'),
    ('3.14', '314'),
    ('0.75', '75'),
    ('10', '1.0'),
    ('1,5', '15'),
    ('1/2', '12'),
    ('10:30', '1030'),
    ('5-7', '57'),
    ('1e-5', '1e5'),
    ('-5 °C', '5 °C'),
    ('50%', '50'),
    ('$1.50', '$150'),
    ('>5', '<5'),
    ('x = -7', 'x = 7'),
    ('C++', 'C'),
    ('C#', 'C'),
    ('B+', 'B-'),
    ('60 km/h', '60 kmh'),
    ('5²', '52'),
    ('192.168.1.1', '19216811'),
]
SAME_ANSWERS = [
    ('5.', '5'),
    ('+5', '5'),
    ('1,234,567', '1234567'),
    ('"1,000".', '1000'),
    ('.5', '0.5'),
    ('(-5)', '−5'),
    ('50 %', '50%'),
    ('**red**', 'Red!'),
    ('a t-shirt', 'TShirt'),
    ("the dog's", 'dogs'),
    ('５', '5'),
]


@pytest.mark.parametrize('said, truth', OTHER_NUMBERS)
@pytest.mark.fault('sign-and-point')
def test_another_number_is_another_answer(said, truth):
    assert ExactMatch().score(said, dict(answers=[truth])) == 0
    assert ExactMatch().score(truth, dict(answers=[said])) == 0
    assert ExactJudge()('q', truth, said).score == 0
    assert get_scorer('gqa').score(said, dict(answers=[truth])) == 0


@pytest.mark.parametrize('said, truth', SAME_ANSWERS)
def test_decoration_makes_no_other_answer(said, truth):
    assert ExactMatch().score(said, dict(answers=[truth])) == 1
    assert ExactJudge()('q', truth, said).score == 1


@given(st.text(alphabet='ab12the ' + string.punctuation + '−½²。', max_size=9))
def test_normalise_is_idempotent_with_every_sign(text):
    for reference in (False, True):
        once = normalise(text, reference=reference)
        assert normalise(once, reference=reference) == once and bool(once) == bool(text.strip())


def test_the_published_exact_match_drops_every_sign():
    published = ExactMatch(reference=True)
    assert published.spec == 'exact_match/7[reference=True]'
    for said, truth in (('-5', '5'), ('1.5', '15'), ('C++', 'C'), ('10:30', '1030')):
        assert published.score(said, dict(answers=[truth])) == 1


# ---------------------------------------------------------------- thoughts

THOUGHTS = [
    '<think>{}</think>{}',
    '<think>\n{}\n</think>\n\n{}',
    '{}</think>{}',
    '<thinking>{}</thinking>{}',
    '<THINK>{}</THINK>{}',
    '<thought>{}</thought> {}',
    '<reasoning>{}</reasoning>{}',
    '<|begin_of_thought|>{}<|end_of_thought|>{}',
    '<|begin_of_thought|>{}<|end_of_thought|><|begin_of_solution|>{}<|end_of_solution|>',
    '◁think▷{}◁/think▷{}',
    '[THINK]{}[/THINK]{}',
    '<seed:think>{}</seed:think>{}',
    '<think>{}</think><answer>{}</answer>',
    '<think>first</think><think>{}</think>{}',
]


@pytest.mark.parametrize('form', THOUGHTS)
@pytest.mark.fault('thinking-block')
def test_only_what_follows_the_thoughts_is_graded(form):
    four = ['cat', 'dog', 'bird', 'fish']
    assert parse_choice(form.format('Is it A? No, B.', 'C'), four) == 'C'
    assert parse_yes_no(form.format('There is no dog? wait', 'Yes')) == 'yes'
    assert MME().score(form.format('no', 'Yes'), dict(answers=['Yes'])) == 1
    assert ExactMatch().score(form.format('it looks red', 'red'), dict(answers=['red'])) == 1
    assert VQASoft().score(form.format('blue', 'red'), dict(answers=['red'] * 10)) == 1
    assert ANLS().score(form.format('blue', 'red'), dict(answers=['red'])) == 1
    assert Relaxed().score(form.format('12', '20'), dict(answers=['20'])) == 1
    assert Caption().score(form.format('a blue dog', 'a red dog'), dict(answers=['red dog'])) == 1
    assert ExactJudge(contains=True)('q', 'red', form.format('red', 'blue')).score == 0
    assert VipExact().score(form.format('blue', 'red'), dict(answers=['red'])) == 1
    assert parse_grade(form.format('0.1 perhaps', '0.7')) == 0.7


@pytest.mark.parametrize('begun', ['<think>', '<thinking>', '<|begin_of_thought|>', '◁think▷'])
def test_thoughts_that_never_end_hold_no_answer(begun):
    assert parse_choice(f'{begun}The answer is B. But', ['cat', 'dog']) == ''
    assert parse_yes_no(f'{begun}yes, I think') == ''
    assert ExactMatch().score(f'{begun}red', dict(answers=['red'])) == 0


def test_published_rules_read_the_thoughts_too():
    assert POPE(reference=True).parse('<think>no</think> no') == 'no'
    assert PlainMatch().score('<think>x</think>red', dict(answers=['red'])) == 0


# ---------------------------------------------------------------- VQA


def test_vqa_tables_equal_lmms_eval(vqa_reference):
    ours, theirs = vqa_normalise, vqa_reference.processor()
    for word in [*theirs.CONTRACTIONS, *theirs.NUMBER_MAP, *theirs.ARTICLES]:
        assert ours(word) == theirs.process_digit_article(theirs.process_punctuation(word)), word


@settings(max_examples=400, deadline=None)
@given(text=WORDS)
def test_vqa_normalise_equals_lmms_eval(vqa_reference, text):
    theirs = vqa_reference.processor()
    clean = text.replace('\n', ' ').replace('\t', ' ').strip()
    assert vqa_normalise(text) == theirs.process_digit_article(theirs.process_punctuation(clean))


@settings(max_examples=150, deadline=None)
@given(
    said=st.sampled_from(
        ['red', 'Red.', 'two', '2', 'dont', 'a dog', 'dog', '1,000', 'black/white', '']
    ),
    answers=st.lists(
        st.sampled_from(['red', '2', 'two', "don't", 'the dog', '1000', 'black white', 'no']),
        min_size=10,
        max_size=10,
    ),
)
def test_vqa_soft_equals_lmms_eval(vqa_reference, said, answers):
    doc = dict(question_id=1, answers=[dict(answer=a, answer_id=i) for i, a in enumerate(answers)])
    ours = VQASoft().score(said, dict(answers=answers))
    assert ours == pytest.approx(vqa_reference.v2.vqav2_process_results(doc, [said])['exact_match'])
    text = get_scorer('textvqa').score(said, dict(answers=answers))
    assert text == pytest.approx(
        vqa_reference.text.textvqa_process_results(
            dict(question_id=1, answers=list(answers)), [said]
        )['exact_match']
    )


def test_vqa_soft_needs_people():
    with pytest.raises(ValueError, match='exact_match'):
        VQASoft().score('red', dict(id='r', answers=['red'] * 3))


# ---------------------------------------------------------------- yes and no


def scored(scorer, rows, said):
    return pd.DataFrame(
        [
            dict(
                answers=r['answers'],
                group=r.get('group'),
                question_type=r.get('question_type'),
                parsed=scorer.parse(p, r),
                score=scorer.score(p, r),
            )
            for r, p in zip(rows, said)
        ]
    )


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_pope_equals_lmms_eval(pairs):
    ref = lmms_module('tasks/pope/utils.py')
    word = {True: 'yes', False: 'no'}
    rows, said = [dict(answers=[word[t]]) for t, _ in pairs], [word[p] for _, p in pairs]
    theirs = [
        ref.pope_process_results(dict(question_id=i, answer=r['answers'][0]), [p])
        for i, (r, p) in enumerate(zip(rows, said))
    ]
    ours = POPE().summary(scored(POPE(), rows, said))
    for name, key in (
        ('accuracy', 'accuracy'),
        ('precision', 'precision'),
        ('recall', 'recall'),
        ('f1_score', 'f1'),
    ):
        assert ours[key] == pytest.approx(
            getattr(ref, f'pope_aggregate_{name}')([t[f'pope_{name}'] for t in theirs])
        ), name
    assert ours['yes_rate'] == pytest.approx(sum(p for _, p in pairs) / len(pairs))


@given(WORDS)
def test_yes_no_parse_is_total(text):
    assert parse_yes_no(text) in ('yes', 'no', '')
    assert parse_yes_no('Yes, ' + text) == 'yes' and parse_yes_no('No. ' + text) == 'no'


@given(
    st.lists(
        st.tuples(
            st.sampled_from(['count', 'OCR', 'code_reasoning']),
            st.sampled_from(['Yes', 'no.', 'y', 'maybe', 'not sure']),
            st.sampled_from(['yes', 'No', 'nope', '']),
        ),
        min_size=1,
        max_size=20,
    )
)
def test_mme_equals_lmms_eval(pictures):
    ref = lmms_module('tasks/mme/utils.py')
    rows, said, theirs = [], [], {'mme_perception_score': [], 'mme_cognition_score': []}
    for i, (kind, first, second) in enumerate(pictures):
        for truth, p in (('Yes', first), ('No', second)):
            rows.append(dict(answers=[truth], group=str(i), question_type=kind))
            said.append(p)
            for k, v in ref.mme_process_results(
                dict(question_id=str(i), category=kind, answer=truth), [p]
            ).items():
                theirs[k].append(v)
    ours = MME().summary(scored(MME(), rows, said))
    for part in ('perception', 'cognition'):
        want = (
            ref.mme_aggregate_results(theirs[f'mme_{part}_score'])
            if theirs[f'mme_{part}_score']
            else 0
        )
        assert ours[part] == pytest.approx(want), part


# ---------------------------------------------------------------- multiple choice

FORMS = [
    'B',
    'b',
    'B.',
    '(B)',
    'B)',
    'B: green',
    'B. green',
    'The answer is B',
    'The answer is B.',
    'Answer: B',
    'I choose B',
    'The correct option is (B).',
    'Option B',
    'It must be B because of the leaf',
    '**B**',
    'A or C? The answer is B',
]


OPTION_TEXTS = [
    ('Sample A', ['Sample B', 'Sample A'], 'B'),
    ('sample a.', ['Sample B', 'Sample A'], 'B'),
    ('The answer is Sample A.', ['Sample B', 'Sample A'], 'B'),
    ('Vitamin C', ['Vitamin A', 'Vitamin B', 'Vitamin D', 'Vitamin C'], 'D'),
    ('It is hepatitis B, not hepatitis A', ['Hepatitis A', 'Hepatitis C', 'Hepatitis B'], 'C'),
    ('D. rerio', ['C. elegans', 'D. rerio'], 'B'),
    ('Both A and C', ['rain', 'both A and C', 'snow'], 'B'),
    ('A. Sample B', ['Sample B', 'Sample A'], 'A'),
    ('E', ['Vitamin E', 'w', 'x', 'y', 'z'], 'E'),
    ('-5', ['5', '-5'], 'B'),
    ('The answer is 1.5', ['15', '1.5', '1', '5'], 'B'),
    ('A cat.', ['a dog', 'a cat'], 'B'),
]
STATEMENTS = [
    'The correct answer is B. Option A is wrong.',
    'Answer: B\nExplanation: option C is a distractor, option D is wrong.',
    'The answer is B. Choosing A would be a mistake.',
    'Answer: B. One might choose option D instead.',
    'B\n\nI did not select A since it is a cat.',
    'I choose B. Option A shows a cat.',
    'A is incorrect. B is correct. C is incorrect.',
    'Options C and D are distractors; select B.',
    'Answer: A dog.',
    "It isn't A, it's B.",
    '**Answer: (B)**',
    r'Hence $\boxed{\text{B}}$.',
]
OTHER_SCRIPTS = [
    '故选B。',
    '答案是B',
    '答案：Ｂ',
    '答案（Ｂ）。选项A是错误的',
    '正确选项是B',
    '不选A，应选B',
    '本题选b。',
    '答えはBです。Aではありません。',
    '正解：B',
    '정답은 B입니다. A는 틀렸습니다.',
    '「B」',
    'คำตอบคือB',
    'ОтветB',
    'الجوابB',
    'La réponse est B.',
]


@pytest.mark.parametrize('reply, options, letter', OPTION_TEXTS)
@pytest.mark.fault('option-letter')
def test_an_options_own_letter_is_no_choice(reply, options, letter):
    assert parse_choice(reply, options) == letter


@pytest.mark.parametrize('reply', STATEMENTS + OTHER_SCRIPTS)
@pytest.mark.fault('stated-answer')
def test_what_is_stated_counts(reply):
    assert parse_choice(reply, ['cat', 'dog', 'bird', 'fish']) == 'B'


FORMS_OF_A_LETTER = [
    'The answer is {}.',
    'Answer: {}',
    'the correct answer is ({})',
    'my choice is {}!',
    '({})',
    '{}.',
    '{})',
    '答案是{}',
    '故选{}。',
]


@pytest.mark.parametrize('form', FORMS_OF_A_LETTER)
@pytest.mark.fault('lower-case-a')
def test_every_letter_in_either_case(form):
    options = [f'thing {k}' for k in range(10)]
    for letter in string.ascii_uppercase[:10]:
        wide = chr(ord(letter) - ord('A') + 0xFF21)
        for written in (letter, letter.lower(), wide):
            assert parse_choice(form.format(written), options) == letter


def test_an_article_or_a_pronoun_is_no_choice():
    ten = [f'thing {k}' for k in range(10)]
    for reply in ('The answer is a dog.', 'A dog', 'It is a thing', 'I do not know'):
        assert parse_choice(reply, ten) == ''


@pytest.mark.parametrize('reply', FORMS)
def test_choice_forms(reply):
    assert parse_choice(reply, ['red', 'green', 'blue', 'white']) == 'B'


def test_choice_agrees_with_lmms_eval_on_common_forms():
    ref = lmms_module('tasks/_task_utils/mcq_extract.py').extract_mcq_answer
    known = {
        'b': '',
        'A or C? The answer is B': 'A',
    }  # theirs wants a capital, and takes a leading letter over a stated answer
    for reply in FORMS:
        assert ref(reply, ['A', 'B', 'C', 'D']) == known.get(reply, 'B'), reply


def test_choice_agrees_with_scienceqa():
    ref = lmms_module('tasks/scienceqa/utils.py').sqa_process_results
    row = dict(choices=['red', 'green', 'blue'], answer=1)
    for said in ('B', 'b', 'B. green', 'A', 'A. red', 'C'):
        assert (
            MultipleChoice().score(said, dict(choices=row['choices'], answers=[1]))
            == ref(row, [said])['exact_match']
        ), said


def test_an_integer_answer_is_an_index_whatever_the_options_say():
    numbers = ['1', '2', '3']
    truths = {1: 'B', 0: 'A', '1': 'A', '3': 'C', 'C': 'C', '(a)': 'A', '[B]': 'B', 'c.': 'C'}
    assert {a: MultipleChoice().truth(dict(answers=a, choices=numbers)) for a in truths} == truths
    assert MultipleChoice().truth(dict(answers=[2], choices=dict(B='3', C='1', D='2'))) == 'D'
    for wrong in (3, -1):
        with pytest.raises(ValueError, match=f"row 'q': answer {wrong} is no index into 3 choices"):
            MultipleChoice().truth(dict(id='q', answers=wrong, choices=numbers))


@given(st.text(max_size=60), st.integers(2, 8))
def test_choice_parse_is_total(text, n):
    assert parse_choice(text, [f'option {i}' for i in range(n)]) in set(
        string.ascii_uppercase[:n]
    ) | {''}


@given(
    st.integers(2, 8),
    st.integers(0, 7),
    st.sampled_from(['{}', '({})', '{}.', 'The answer is {}', 'answer: ({})']),
)
def test_choice_round_trip(n, k, form):
    k %= n
    letter = string.ascii_uppercase[k]
    row = dict(choices=[f'thing {i}' for i in range(n)], answers=[letter])
    assert MultipleChoice().score(form.format(letter), row) == 1
    assert MultipleChoice().score(f'thing {k}', row) == 1


# ---------------------------------------------------------------- ANLS and charts


@given(st.text('abc', max_size=8), st.text('abc', max_size=8), st.text('abc', max_size=8))
def test_edit_distance_is_a_metric(a, b, c):
    assert edit_distance(a, b) == edit_distance(b, a) and (edit_distance(a, b) == 0) == (a == b)
    assert abs(len(a) - len(b)) <= edit_distance(a, b) <= max(len(a), len(b))
    assert edit_distance(a, c) <= edit_distance(a, b) + edit_distance(b, c)


@settings(max_examples=300)
@given(
    st.text('ab c', max_size=12).map(lambda s: ' '.join(s.split())),
    st.lists(st.text('abC', min_size=1, max_size=9), min_size=1, max_size=3),
)
def test_anls_equals_lmms_eval(said, answers):
    ref = lmms_functions('api/metrics.py', {'anls', 'levenshtein_distance'})
    assert ANLS().score(said, dict(answers=answers)) == pytest.approx(
        ref.anls(answers, [said])['anls']
    )


@given(
    st.sampled_from(
        [
            '20',
            '21',
            '21.1',
            '19',
            '0',
            '0.0',
            '5%',
            '0.05',
            '-3',
            '-3.1',
            'Peru',
            'peru',
            '1e2',
            '100',
        ]
    ),
    st.sampled_from(['20', '0', '5%', '-3', 'Peru', '100']),
)
def test_relaxed_equals_lmms_eval(said, truth):
    ref = lmms_functions('tasks/chartqa/utils.py', {'relaxed_correctness'}).relaxed_correctness
    assert Relaxed().score(said, dict(answers=[truth])) == float(ref(said, truth))


# ---------------------------------------------------------------- all of them


def test_every_scorer_names_a_version_and_scores_in_range():
    row = dict(
        id='r', answers=['yes'] * 10, choices=['yes', 'no'], group='g', question_type='count'
    )
    assert len({s.spec for s in SCORERS.values()}) == len(SCORERS)
    for name, s in SCORERS.items():
        assert re.fullmatch(r'\w+/\d+(\[.*\])?', s.spec), name
        assert all(0 <= s.score(p, row) <= 1 for p in ('yes', 'no', '', 'A', 'maybe, maybe not')), (
            name
        )
        assert s.score('yes', row) == 1, name
        with pytest.raises(ValueError, match='answers'):
            s.score('yes', dict(row, answers=[]))
