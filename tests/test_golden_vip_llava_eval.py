"""Golden parity of ViP-LLaVA's evaluation: judge calls, grades, scores, benchmark scorers, samplers
(every case_*)."""

import json, os, re
from pathlib import Path

import numpy as np
import pytest
import torch

from judge_server import scripted
from vlmbench.data.mixture import _even_chunks, length_groups
from vlmbench.data.record import ImageRef
from vlmbench.evaluate.judge import (
    EXAMPLES,
    HEADER,
    PROMPT,
    PUBLISHED_PROMPT_SHA256,
    ChatJudge,
    Endpoint,
    Reply,
    grade_answers,
)
from vlmbench.evaluate.scorers import POPE, MultipleChoice, get_scorer
from vlmbench.evaluate.vip_bench import VipItem, group_scores, published_scores, to_grade

ROOT = Path(os.environ.get('VLMBENCH_GOLDEN', Path(__file__).parent / 'golden')) / 'vip_llava'
CASES = sorted(ROOT.glob('case_*'))


@pytest.fixture(params=CASES, ids=lambda p: p.name)
def case(request):
    return request.param


def read(case, name):
    return json.loads((case / name).read_text())


def test_there_are_cases():
    assert CASES


def vip_items(d):
    questions = {f'v1_{q["question_id"]}': q for q in d['questions']}
    return [
        VipItem(
            i,
            questions[i]['text'],
            m['question'],
            m['answer'],
            tuple(sorted(m['capability'])),
            ImageRef(questions[i]['image']),
        )
        for i, m in d['meta'].items()
    ]


def test_judge_calls_grades_and_scores(case, tmp_path):
    """The published judging run, replayed over HTTP: every request in order, every grade, both
    tables."""
    d = read(case, 'vipbench.json')
    items, turn = vip_items(d), {}
    order = [(c['id'], c['run']) for c in d['calls']]

    def play(n, request, headers):
        i, run = order[n]
        attempt = turn[i, run] = turn.get((i, run), -1) + 1
        replies = d['scripted_judge_replies'][i][run]
        return replies[min(attempt, len(replies) - 1)]

    with scripted(play) as (url, seen):
        judge = ChatJudge(Endpoint(url, d['calls'][0]['model'], retries=0), reference=True)
        grades = grade_answers(
            to_grade(items, d['predictions']), judge, d['num_run'], tmp_path / 'g.jsonl'
        )
    assert len(seen) == len(d['calls'])
    calls = [
        dict(c, id=r['item'], run=r['run'])
        for r in grades.frame.to_dict('records')
        for c in r['calls']
    ]
    for want, got, sent in zip(d['calls'], calls, seen, strict=True):
        assert all(
            got[k] == want[k]
            for k in ('id', 'run', 'attempt', 'retry', 'temperature', 'max_tokens', 'row', 'reply')
        )
        assert (sent['model'], sent['temperature'], sent['max_tokens']) == (
            want['model'],
            want['temperature'],
            want['max_tokens'],
        )
        text = sent['messages'][0]['content']
        assert (
            text.startswith(PROMPT + '\n' + want['row'])
            and text.endswith(want['row']) != want['retry']
        )
    assert grades.published() == d['grades']
    counts = group_scores(items, grades).set_index('name')['n'].to_dict()
    assert counts == d['capability_counts']
    for by, name in (('capability', 'scores'), ('combination', 'integration_scores')):
        got, want = published_scores(group_scores(items, grades, by)), dict(d[name])
        runs = [
            float(x)
            for x in re.findall(r'[\d.]+(?=[),\]])', want.pop('runs').replace('np.float64', ''))
        ]
        assert got.pop('runs') == runs and got == want


def test_sane_judging_differs_where_it_says(case):
    "Default: the split's question at every attempt, and the last reply is read."
    d = read(case, 'vipbench.json')
    items = vip_items(d)[:1]
    replies = iter(['x'] * 5 + ['0.4'])

    def endpoint(messages, temperature, max_tokens):
        return Reply(next(replies), 'm')

    grade = ChatJudge(endpoint)(items[0].question, items[0].answer, 'p', items[0].plain)
    assert (
        grade.score == 0.4
        and grade.parsed
        and all(c['row'].startswith(items[0].question) for c in grade.calls)
    )


def test_prompt_has_the_published_form(case):
    want = read(case, 'vipbench.json')['prompt_prefix']
    assert HEADER == want['header'] and len(EXAMPLES) == want['fewshot_rows'] and HEADER in PROMPT
    assert want['sha256'] == PUBLISHED_PROMPT_SHA256  # its text is the benchmark's, ours says so
    assert ChatJudge(len).prompt_sha256 != PUBLISHED_PROMPT_SHA256
    assert [float(e[3]) for e in EXAMPLES] == [0, 0.5, 0.5, 0.5, 1, 0.4, 1]


def test_pope(case):
    p = read(case, 'evals.json')['pope']
    said = [POPE(reference=True).parse(t) for t in p['texts']]
    assert said == p['decided']
    true, yes = np.array(p['labels']) == 'yes', np.array(said) == 'yes'
    import pandas as pd

    frame = pd.DataFrame(
        dict(parsed=said, answers=[[a] for a in p['labels']], score=(true == yes).astype(float))
    )
    got, out = POPE(reference=True).summary(frame), p['output']
    for key, name in (
        ('accuracy', 'Accuracy'),
        ('precision', 'Precision'),
        ('recall', 'Recall'),
        ('f1', 'F1 score'),
        ('yes_rate', 'Yes ratio'),
    ):
        assert got[key] == pytest.approx(
            float(re.search(rf'{name}: ([\d.]+)', out)[1]), abs=1e-12
        ), key
    counts = [int(x) for x in out.split('\n')[1].split('\t')]
    assert counts == [
        (true & yes).sum(),
        (~true & yes).sum(),
        (~true & ~yes).sum(),
        (true & ~yes).sum(),
    ]


def test_textvqa(case):
    t = read(case, 'evals.json')['textvqa']
    scorer = get_scorer('textvqa')
    got = [scorer.score(p['pred_answer'], dict(answers=p['gt_answers'])) for p in t['preds']]
    assert got == pytest.approx(t['per_item'], abs=1e-9) and np.mean(got) == pytest.approx(
        t['accuracy'], abs=1e-9
    )


def test_scienceqa(case):
    s = read(case, 'evals.json')['scienceqa']
    said, scorer = {p['question_id']: p for p in s['predictions']}, MultipleChoice(reference=True)
    right, picture = {}, {}
    for i, problem in s['problems'].items():
        row = dict(id=i, choices=problem['choices'], answers=['ABCDE'[problem['answer']]])
        text = said[i]['text'] if i in said else 'FAILED'
        letter = scorer.parse(text, row)
        assert ('ABCDE'.index(letter) if letter else -1) == s['results']['results'][i]
        assert text == s['results']['outputs'][i]
        right[i] = scorer.score(text, row)
        if i in said and '<image>' in said[i]['prompt']:
            picture[i] = right[i]
    assert s['results']['count'] == len(right) and s['results']['correct'] == sum(right.values())
    assert s['results']['acc'] == pytest.approx(100 * np.mean(list(right.values())))
    assert f'IMG-Accuracy: {100 * np.mean(list(picture.values())):.2f}%' in s['output']


def test_samplers(case):
    for s in read(case, 'misc.json')['sampler']:
        lengths, batch, ranks = s['lengths'], s['batch_size'], s['world_size']

        def order(lengths, has_image=None):
            g = torch.Generator().manual_seed(s['torch_seed'])
            return length_groups(lengths, batch * ranks, g, has_image, ranks)

        size = [abs(n) for n in lengths]
        by = (
            order(lengths) if max(lengths) < 0 else order(size, [n > 0 for n in lengths])
        )  # all text: sorted by -length
        assert by == s['by_modality']
        assert order(size) == s['by_length']


def test_even_chunks(case):
    for s in read(case, 'misc.json')['split_to_even_chunks']:
        got = _even_chunks(s['indices'], s['lengths'], s['num_chunks'])
        assert got == [i for chunk in s['out'] for i in chunk]
