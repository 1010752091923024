"""rule=lmms: the verdicts of lmms-eval's own functions, over a thousand replies of every form."""

import importlib.util
import random
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pandas as pd
import pytest

from vlmbench.evaluate.kinds import OFFICIAL
from vlmbench.evaluate.lmms_rules import LMMS_SCORERS, LmmsMMMU

SIGNS = ['', '', '', '.', ',', ':', ')', '!', '?', '\n', ' ', "'", ' .', '。']
FORMS = [
    '{}', '{}', '{}', '({})', '({}).', '{}. {text}', '{}: {text}', '{}) {text}', '{text}',
    '{text}.', 'The answer is {}', 'the correct answer is ({})', 'The best option is {}: {text}',
    'I choose {}', 'answer: {}', 'Answer:{}', ':{}', 'My choice is {}, not {other}', '**{}**',
    '[{}]', '"{}"',
    '{other} or {}', '({other}) or ({})', 'A {text} is what I see here in it',
    'It is {text}, as said',
    'Not {other}. {}', '{}{text}', 'I cannot tell', "I don't know, sorry", 'None of these', '',
    '<think>{other}? no, {}</think>{}', '<think>so {other}</think>\n{text}', '答案是{}', '选{}。',
    '정답은 {}', '答えは{}です', '{wide}', '（{wide}）', '故选{wide}', '红色', '빨간색',
    'Because of {text}',
    'Yes', 'No', 'yes', 'no', ' YES ', 'Yes.', 'No, there is no {text}', 'not at all', 'nope',
    'y', 'My answer is unsure. {other}? So the answer is {}', 'banana', 'Nan', '{}\n{other}',
    '{other} ', 'Failed to obtain answer via API {}', 'It could be {}, so the final answer is {}',
    '$\\boxed{{{}}}$', 'B.', 'A', 'C.', '{}.', '({})', '{}',
]  # fmt: skip
NUMBERS = [
    '1',
    '0.5',
    '-3',
    '1,234',
    '12.345',
    '1e3',
    '2.50',
    '.5',
    '100',
    '3/4',
    '1,2',
    '-1,000.5',
]
OPEN = [
    '{}', '{}.', 'The result is {}', 'x = {}', 'a = {}\nb = {other}', '{} cm', 'so {} and {other}',
    'It is {other}.\nThus {}', 'the answer is ', 'final answer {}', 'I cannot tell', '{text}', '',
    'It is {text}.', '<think>{other}</think>{}', '约{}', 'is: ', '{}%', '${}$', '{other} is {} is ',
    'Therefore {}\n', 'a', 'is a', 'result {}\n=', '"{}"', '{other}{}', '= {}', 'y={}, x={other}',
]  # fmt: skip
TEXTS = ['cat', 'a dog', 'Big cat', 'banana', 'D flat', '5', '1.5', '红色', 'vitamin A', 'B cells',
         'yes', 'no', 'dark red', 'A', 'up', 'is']  # fmt: skip


def folder() -> Path:
    spec = importlib.util.find_spec('lmms_eval')
    if spec is None:
        pytest.skip('lmms-eval is not installed: pip install --no-deps lmms-eval==0.7.3')
    return Path(spec.submodule_search_locations[0])


def theirs(path: str, needs: dict[str, dict] | None = None) -> ModuleType:
    """One file of lmms-eval as a module, alone; `needs`: modules it imports -> names these must
    have, for parts that no rule uses (judges, files)."""
    file = folder() / path
    if not file.exists():
        pytest.skip(f'this lmms-eval has no {path}')
    stubs = {}
    for name, content in (needs or {}).items():
        stubs[name] = ModuleType(name)
        vars(stubs[name]).update(content, __path__=[])
    old = {name: sys.modules.get(name) for name in stubs}
    sys.modules.update(stubs)
    spec = importlib.util.spec_from_file_location('theirs_' + file.parent.name, file)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except ModuleNotFoundError as e:
        pytest.skip(f'lmms-eval {path} needs {e.name}')
    finally:
        for name, module_before in old.items():
            if module_before is None:
                sys.modules.pop(name)
            else:
                sys.modules[name] = module_before
    return module


def replies(seed: int, forms: list[str] = FORMS, rows: int = 1000):
    "So many rows and replies: options, right letter, what was said."
    rng = random.Random(seed)
    for n in range(rows):
        options = rng.sample(TEXTS, rng.choice([2, 3, 4, 4, 4]))
        letters = 'ABCD'[: len(options)]
        named, other, right = (rng.choice(letters + 'AE' * (rng.random() < 0.1)) for _ in range(3))
        right = named if rng.random() < 0.5 else right
        right = right if right in letters else 'A'
        wide = chr(ord(named) + 0xFEE0)
        named = named.lower() if rng.random() < 0.15 else named
        text = options[rng.randrange(len(options))]
        said = rng.choice(forms).replace('{{', '<<').replace('}}', '>>')
        said = said.replace('{text}', text).replace('{other}', other).replace('{wide}', wide)
        said = said.replace('{}', named).replace('<<', '{').replace('>>', '}')
        said = rng.choice(['', '', '', ' ', '\n']) + said + rng.choice(SIGNS)
        yield n, dict(id=str(n), choices=options, answers=[right]), said


def pope(module):
    def verdict(n, row, said):
        doc = dict(question_id=n, answer=row['answers'][0])
        return module.pope_process_results(doc, [said])['pope_accuracy']['score']

    return verdict


def seed(module):
    def verdict(n, row, said):
        doc = dict(question_id=n, answer=row['answers'][0], data_type='image')
        return module.seed_aggregation_result([module.seed_process_result(doc, [said])['seed_all']])

    return verdict


def scienceqa(module):
    def verdict(n, row, said):
        doc = dict(choices=row['choices'], answer='ABCD'.index(row['answers'][0]))
        return module.sqa_process_results(doc, [said])['exact_match']

    return verdict


def test_pope_equals_lmms_eval():
    ours, module = LMMS_SCORERS['pope'], theirs('tasks/pope/utils.py')
    rng, rows, results = random.Random(1), [], []
    for n, row, said in replies(1, FORMS + ['Yes', 'No', 'yes', 'no ', 'YES\n'] * 12):
        row = dict(answers=[rng.choice(['yes', 'no', 'Yes', 'No'])])
        assert ours.score(said, row) == pope(module)(n, row, said), (said, row)
        rows.append(row | dict(parsed=ours.parse(said, row), score=ours.score(said, row)))
        doc = dict(question_id=n, answer=row['answers'][0])
        results.append(module.pope_process_results(doc, [said])['pope_accuracy'])
    summary = ours.summary(pd.DataFrame(rows))
    assert 0.1 < summary['accuracy'] < 0.9
    for name in ('accuracy', 'precision', 'recall', 'f1'):
        function = vars(module)[f'pope_aggregate_{name}' + '_score' * (name == 'f1')]
        assert summary[name] == pytest.approx(function(results)), name


@pytest.mark.parametrize(
    'kind, path, asks', [('seed', 'seedbench', seed), ('sqa', 'scienceqa', scienceqa)]
)
def test_letters_equal_lmms_eval(kind, path, asks):
    ours, verdict = LMMS_SCORERS[kind], asks(theirs(f'tasks/{path}/utils.py'))
    right = 0
    for n, row, said in replies(2):
        assert ours.score(said, row) == verdict(n, row, said), (said, row)
        right += ours.score(said, row)
    assert 40 < right < 600


def test_ai2d_equals_lmms_eval():
    metrics = theirs_functions('api/metrics.py', 'exact_match_hf_evaluate')
    blank = SimpleNamespace(ExtendedRegexFilter=type('Base', (), {'__init__': lambda s: None}))
    names = ('lmms_eval', 'lmms_eval.filters', 'lmms_eval.filters.extraction')
    module = theirs('tasks/ai2d/utils.py', {name: vars(blank) for name in names})
    filtered = module.MultiChoiceRegexFilter().apply
    ours, right = LMMS_SCORERS['ai2d'], 0
    for n, row, said in replies(3):
        (read,) = filtered([[said]], [row])
        doc = dict(options=row['choices'], answer='ABCD'.index(row['answers'][0]))
        target = module.ai2d_doc_to_target(doc, 'mcq')
        score = metrics([read], [target], ignore_case=True, ignore_punctuation=True)['exact_match']
        assert ours.score(said, row) == score, (said, row)
        right += score
    assert 40 < right < 600


def test_gqa_equals_lmms_eval():
    metrics = theirs_functions('api/metrics.py', 'exact_match_hf_evaluate')
    ours, right = LMMS_SCORERS['gqa'], 0
    for _, row, said in replies(7, FORMS + ['{text}'] * 60):
        truth = row['choices'][0]
        score = metrics([said], [truth], ignore_case=True, ignore_punctuation=True)['exact_match']
        assert ours.score(said, dict(answers=[truth])) == score, (said, truth)
        right += score
    assert 10 < right < 500


@pytest.mark.parametrize('name', ['vqav2', 'textvqa', 'vizwiz', 'mme'])
def test_thoughts_are_read_as_there(name):
    row = dict(answers=['yes'] * 10)
    scorer = LMMS_SCORERS[name]
    assert scorer.score('yes', row) == 1 and scorer.score('<think>no</think>yes', row) == 0


def theirs_functions(path: str, name: str):
    "One function of an lmms-eval file, without what stands around it."
    import ast
    import re
    import string

    import numpy as np

    file = folder() / path
    found = [n for n in ast.parse(file.read_text()).body if getattr(n, 'name', '') == name]
    world = dict(np=np, re=re, string=string)
    exec(compile(ast.Module(found[:1], []), str(file), 'exec'), world)
    return world[name]


def test_mmbench_equals_lmms_eval():
    pytest.importorskip('loguru')
    pytest.importorskip('requests')
    extract = theirs('tasks/_task_utils/mcq_extract.py')
    evaluator = theirs('tasks/mmbench/mmbench_evals.py').MMBench_Evaluator()
    ours, right = LMMS_SCORERS['mmbench'], 0
    for n, row, said in replies(4):
        cells = {k: 'nan' for k in 'ABCDE'} | dict(zip('ABCD', row['choices']))
        item = pd.DataFrame([dict(cells, index=n, prediction=said.strip())])
        with pytest.MonkeyPatch.context() as patch:
            for name in ('lmms_eval', 'lmms_eval.tasks', 'lmms_eval.tasks._task_utils'):
                stub = ModuleType(name)
                stub.__path__ = []
                patch.setitem(sys.modules, name, stub)
            patch.setitem(sys.modules, 'lmms_eval.tasks._task_utils.mcq_extract', extract)
            verdict = evaluator.eval_sub_data(item, {n: row['answers'][0]}, static_only=True)
        assert ours.score(said, row) == verdict, (said, row)
        right += verdict
    assert 100 < right < 700


@pytest.fixture(scope='module')
def mmmu():
    pytest.importorskip('loguru')
    pytest.importorskip('numpy')
    shared = theirs('tasks/_task_utils/mmmu_mcq_utils.py')
    unused = dict.fromkeys(
        ('generate_submission_file', 'VerificationPipeline', 'OpenAIVerifier'), object
    )
    tasks = 'lmms_eval.tasks'
    names = ['lmms_eval', tasks, f'{tasks}._task_utils', f'{tasks}._task_utils.file_utils']
    names += ['lmms_eval.verifiers', 'lmms_eval.verifiers.openai']
    needs = {name: unused for name in names} | {f'{tasks}._task_utils.mmmu_mcq_utils': vars(shared)}
    return shared, theirs('tasks/mmmu/utils.py', needs)


def mmmu_verdict(module, kind, row, said):
    doc = dict(id='validation_Art_1', question_type=kind, answer=row['answers'][0])
    doc['options'] = str(row.get('choices', []))
    result = module.mmmu_process_results(doc, [said])['mmmu_acc']
    return module.evaluate_mmmu([result])[1]['acc']


def test_mmmu_choices_equal_lmms_eval(mmmu, monkeypatch):
    shared, module = mmmu
    ours, right, guesses = LmmsMMMU(), 0, 0
    for _, row, said in replies(5, rows=3000):
        drawn = []
        monkeypatch.setattr(shared.random, 'choice', lambda of: drawn.append(of) or of[0])
        verdict = mmmu_verdict(module, 'multiple-choice', row, said)
        if drawn:  # theirs guesses at random, ours reads nothing
            assert ours.parse(said, row) == '' and ours.score(said, row) == 0, (said, row)
            guesses += 1
            continue
        assert ours.score(said, row) == verdict, (said, row)
        right += verdict
    assert right > 300 and 3000 - guesses >= 1000


def test_mmmu_open_equals_lmms_eval(mmmu):
    ours, rng, right = LmmsMMMU(), random.Random(6), 0
    for _ in range(1000):
        truths = NUMBERS + TEXTS
        said = rng.choice(OPEN).replace('{}', rng.choice(NUMBERS + TEXTS[:3]))
        said = said.replace('{other}', rng.choice(NUMBERS)).replace('{text}', rng.choice(TEXTS))
        row = dict(answers=[rng.choice(truths[:4] if rng.random() < 0.5 else truths)])
        verdict = mmmu_verdict(mmmu[1], 'open', row, said)
        assert ours.score(said, row) == verdict, (said, row)
        right += verdict
    assert 50 < right < 700


def test_a_kind_takes_its_scorer_from_the_rule():
    for name, scorer in LMMS_SCORERS.items():
        assert OFFICIAL[name].asked('lmms').scorer == scorer
        assert OFFICIAL[name].asked('lmms').prompt == OFFICIAL[name].asked('published').prompt
    with pytest.raises(ValueError, match='rule=lmms .* OCR-VQA.*rule=ours or rule=published'):
        OFFICIAL['ocrvqa'].asked('lmms')
    with pytest.raises(ValueError, match="rule 'their'"):
        OFFICIAL['pope'].asked('their')
