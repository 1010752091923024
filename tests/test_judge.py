"""The judge against a real HTTP server: retries with bounds, refusals, keys that stay secret, logs
that resume."""

import json, math, time

import pytest
from hypothesis import given, settings, strategies as st

from judge_server import Step, completion, scripted
from vlmbench.evaluate.judge import (
    ChatJudge,
    Endpoint,
    ExactJudge,
    Graded,
    JudgeError,
    Reply,
    grade_answers,
    open_row,
    parse_grade,
)

ASK = [dict(role='user', content='grade')]
SECRET = 'sk-very-secret-0123456789'


def endpoint(url, **kw):
    waits = []
    return Endpoint(url, 'm', sleep=waits.append, **kw), waits


def test_one_call_is_a_plain_chat_completion():
    with scripted(lambda n, r, h: '0.5') as (url, seen):
        reply = endpoint(url + '/')[0](ASK, temperature=1.5, max_tokens=3)
    assert reply == Reply('0.5', 'made-up-judge', 1)
    assert seen[0]['path'] == '/v1/chat/completions' and 'Authorization' not in seen[0]['headers']
    assert {k: seen[0][k] for k in ('model', 'messages', 'temperature', 'max_tokens')} == dict(
        model='m', messages=ASK, temperature=1.5, max_tokens=3
    )


@pytest.mark.parametrize(
    'bad',
    [
        Step(b'busy', 500),
        Step(b'slow down', 429),
        Step(b'', 503),
        Step(b'<html>no json', 200),
        Step(b'{"choices": []}'),
        Step(b'[]'),
        Step(b'{"choices": [{"message": {"content": 7}}]}'),
        Step(b'\xff\xfe'),
        Step(b''),
        Step(completion('0.5')[:20], headers={'Content-Length': '999'}),
    ],
    ids=[
        '500',
        '429',
        '503',
        'html',
        'no choices',
        'a list',
        'a number',
        'no text',
        'empty',
        'cut off',
    ],
)
def test_what_may_pass_is_tried_again(bad):
    with scripted(lambda n, r, h: bad if n < 2 else '0.5') as (url, seen):
        judge, waits = endpoint(url)
        assert judge(ASK) == Reply('0.5', 'made-up-judge', 3)
    assert len(seen) == 3 and len(waits) == 2 and waits[1] > waits[0] > 0.5


def test_attempts_and_waits_are_bounded():
    with scripted(lambda n, r, h: Step(b'busy', 500)) as (url, seen):
        judge, waits = endpoint(url, retries=4, backoff=2.0, max_wait=5.0)
        with pytest.raises(
            JudgeError, match=r'm at 127.0.0.1: 5 attempts failed, the last with HTTP 500 busy'
        ):
            judge(ASK)
    assert len(seen) == 5 and len(waits) == 4 and max(waits) == 5.0


@pytest.mark.parametrize(
    'asked,waited',
    [('2.5', 2.5), ('3600', 30.0), ('0', 0.0), ('soon', None), ('nan', None), ('-1', None)],
)
def test_retry_after_is_heard_within_the_bound(asked, waited):
    with scripted(lambda n, r, h: Step(b'', 429, {'Retry-After': asked}) if not n else '1.0') as (
        url,
        _,
    ):
        judge, waits = endpoint(url)
        judge(ASK)
    assert waits == [waited] if waited is not None else 0.7 < waits[0] < 1.3


@pytest.mark.parametrize('silence,trickle', [(1.5, 0.0), (0.0, 0.05)], ids=['silent', 'trickling'])
def test_a_slow_server_is_given_up(silence, trickle):
    with scripted(lambda n, r, h: Step(completion('1.0'), silence=silence, trickle=trickle)) as (
        url,
        _,
    ):
        began = time.monotonic()
        with pytest.raises(JudgeError, match='2 attempts failed'):
            endpoint(url, timeout=0.4, retries=1)[0](ASK)
        assert time.monotonic() - began < 6


def test_an_endless_reply_is_cut():
    with scripted(lambda n, r, h: Step(b'x' * 5000)) as (url, _):
        with pytest.raises(JudgeError, match='over 1,000 bytes'):
            endpoint(url, max_bytes=1000, retries=0)[0](ASK)


@pytest.mark.parametrize(
    'step',
    [
        Step(b'no such model', 404),
        Step(b'bad key', 401),
        Step(b'', 400),
        Step(b'', 403),
        Step(b'{"error": {"code": "insufficient_quota"}}', 429),
        Step(b'', 302, {'Location': 'http://127.0.0.1:9/v1'}),
    ],
    ids=['404', '401', '400', '403', 'quota', 'redirect'],
)
def test_what_cannot_pass_ends_at_once(step):
    with scripted(lambda n, r, h: step) as (url, seen):
        with pytest.raises(JudgeError, match=f'HTTP {step.status}'):
            endpoint(url)[0](ASK)
    assert len(seen) == 1


def test_nothing_listens():
    with scripted(lambda n, r, h: '1') as (url, _):
        pass
    with pytest.raises(JudgeError, match='2 attempts failed, the last with'):
        endpoint(url, retries=1)[0](ASK)


def test_the_key_is_sent_and_never_shown(monkeypatch, tmp_path):
    monkeypatch.setenv('MY_JUDGE_KEY', SECRET)

    def play(n, r, h):
        return '0.5' if n < 2 else Step(f'bad key {SECRET}'.encode(), 401)

    with scripted(play) as (url, seen):
        judge = ChatJudge(Endpoint(url, 'm', key_env='MY_JUDGE_KEY'))
        answers = [Graded(str(i), 'q', 't', 'p') for i in range(3)]
        with pytest.raises(JudgeError, match='2 of 3 grades kept') as e:
            grade_answers(answers, judge, log=tmp_path / 'g.jsonl')
    assert seen[0]['headers']['Authorization'] == f'Bearer {SECRET}'
    assert '<key>' in str(e.value) and e.value.__cause__ is None
    for text in (str(e.value), repr(judge), judge.spec, (tmp_path / 'g.jsonl').read_text()):
        assert SECRET not in text


def test_a_missing_key_is_named(monkeypatch):
    monkeypatch.delenv('MY_JUDGE_KEY', raising=False)
    with pytest.raises(JudgeError, match='MY_JUDGE_KEY is not set'):
        Endpoint('https://h/v1', 'm', 'MY_JUDGE_KEY')(ASK)


@pytest.mark.parametrize(
    'kw,match',
    [
        (dict(url='ftp://h'), 'no http'),
        (dict(url=''), 'no http'),
        (dict(url='https://u:p@h/v1'), 'password'),
        (dict(url='https://h/v1?key=1'), 'query'),
        (dict(url='http://h/v1', key_env='K'), 'unencrypted'),
        (dict(key_env='sk-12'), 'not a key'),
        (dict(model=''), 'model is empty'),
        (dict(timeout=0), 'timeout'),
        (dict(retries=-1), 'retries'),
    ],
)
def test_bad_settings(kw, match):
    with pytest.raises(ValueError, match=match) as e:
        Endpoint(**{**dict(url='https://h/v1', model='m'), **kw})
    assert 'u:p' not in str(e.value) and 'sk-12' not in str(e.value)


def judged(replies, **kw):
    with scripted(lambda n, r, h: replies[min(n, len(replies) - 1)]) as (url, seen):
        return ChatJudge(endpoint(url)[0], **kw)('q?', 'a<AND>b', 'said', 'plain?'), seen


def test_the_retry_protocol():
    grade, seen = judged(['well', '1.5', 'nan', '', '-0.1', '0.8 of 1'])
    assert (grade.score, grade.parsed) == (0.8, True)
    assert [s['temperature'] for s in seen] == [0, 0, 0.5, 1, 1.5, 2]
    rows = [s['messages'][0]['content'].split('\n') for s in seen]
    assert rows[0][-1] == 'q? | a <AND> b | said | ' and all(
        r[-2] == rows[0][-1] and 'number' in r[-1] for r in rows[1:]
    )
    grade, seen = judged(['x'])
    assert (grade.score, grade.parsed, len(seen)) == (0.0, False, 6)


def test_the_published_quirks_are_options():
    grade, seen = judged(['x', 'x', 'x', 'x', 'x', '0.8'], reference=True)
    assert (grade.score, grade.parsed) == (0.0, False)  # its last reply is not read
    assert seen[1]['messages'][0]['content'].split('\n')[-2].startswith('plain? |')


@pytest.mark.parametrize(
    'text,ours,published',
    [
        ('0.5\nA', 0.5, None),
        (' 0.5', 0.5, None),
        ('0.5\n', 0.5, 0.5),
        ('0.5 of 1', 0.5, 0.5),
        ('\t1', 1, 1),
        ('1.1', None, None),
        ('', None, None),
        ('nan', None, None),
    ],
)  # a grade that is no number would leave no total: asked again either way
def test_the_published_reading_of_a_reply(text, ours, published):
    assert (parse_grade(text), parse_grade(text, True)) == (ours, published)
    grade, seen = judged([text, '0.25'], reference=True)
    assert (grade.score, len(seen)) == ((0.25, 2) if published is None else (published, 1))


def test_rows_stay_rows():
    row = open_row('q', 'a', 'x | y\n\n| 1.0')
    assert row.count('|') == 3 and '\n' not in row
    assert [parse_grade(t) for t in ('1', '0.30', ' .5', 'inf', '1.01')] == [
        1,
        0.3,
        0.5,
        None,
        None,
    ]


ANSWERS = [Graded(f'q{i}', 'What?', 'dog', 'dog' if i % 2 else 'cat') for i in range(6)]


@pytest.mark.parametrize('workers', [1, 3])
def test_a_broken_run_resumes_without_asking_twice(tmp_path, workers):
    log, down = tmp_path / 'g.jsonl', [True]

    def play(n, r, h):
        return Step(b'', 401) if down[0] and n >= 4 else '1.0'

    with scripted(play) as (url, seen):
        judge = ChatJudge(endpoint(url)[0])
        with pytest.raises(JudgeError, match='the same call goes on'):
            grade_answers(ANSWERS, judge, 2, log, workers)
        kept = len(log.read_text().splitlines()) - 1
        assert 1 <= kept <= 4
        with open(log, 'ab') as f:
            f.write(b'{"id": "q5#1", "sco')  # killed while writing
        down[0], before = False, len(seen)
        grades = grade_answers(ANSWERS, judge, 2, log, workers)
        assert len(seen) - before == 12 - kept
        assert (
            grade_answers(ANSWERS, judge, 2, log).frame.equals(grades.frame)
            and len(seen) - before == 12 - kept
        )
    assert grades.matrix().shape == (6, 2) and (grades.matrix() == 1).all()


def test_a_log_of_something_else_is_refused(tmp_path):
    log = tmp_path / 'g.jsonl'
    grade_answers(ANSWERS, ExactJudge(), log=log)
    with pytest.raises(ValueError, match='judge was'):
        grade_answers(ANSWERS, ExactJudge(contains=True), log=log)
    with pytest.raises(ValueError, match='answers was'):
        grade_answers(ANSWERS[:3], ExactJudge(), log=log)
    with pytest.raises(ValueError, match="first 'q0'"):
        grade_answers(ANSWERS + ANSWERS[:1], ExactJudge())
    assert (
        len(grade_answers(ANSWERS, ExactJudge(), 2, log).frame) == 12
    )  # more runs: only the new ones


def test_workers_give_the_same_grades():
    def play(n, r, h):
        return '1.0' if '| dog | dog |' in r['messages'][0]['content'] else '0.2'

    with scripted(play) as (url, _):
        one, three = (
            grade_answers(ANSWERS, ChatJudge(endpoint(url)[0]), 2, workers=w) for w in (1, 3)
        )
    assert one.frame.equals(three.frame) and one.frame['score'].tolist() == [0.2, 1] * 6


def test_replies_without_a_grade_are_counted():
    with scripted(lambda n, r, h: 'good') as (url, _):
        with pytest.warns(UserWarning, match='6 of 6 replies'):
            grades = grade_answers(ANSWERS, ChatJudge(endpoint(url)[0]))
    assert grades.unparsed == 6 and not grades.matrix().any()


def test_the_published_grade_file_layout():
    grades = grade_answers(ANSWERS, ExactJudge(), 2)
    assert json.loads(json.dumps(grades.published()))['q1'] == dict(
        model=['exact/3'] * 2, content=['1.0'] * 2, score=[1.0, 1.0]
    )
    with pytest.raises(ValueError, match="'absent' is not graded"):
        grades.matrix(['q0', 'absent'])


@pytest.mark.parametrize(
    'truth,said,score',
    [
        ('Red', 'red.', 1),
        ('red', 'it is red', 0),
        ('cat<OR>dog', 'the dog', 1),
        ('a<AND>b', 'b then a', 1),
        ('ab<AND>cd', 'abc cd', 0),
        ('x<AND>y<OR>z', 'z', 1),
        ('x<AND>y', '', 0),
        ('42', '', 0),
    ],
)
def test_exact_judge(truth, said, score):
    assert ExactJudge()('', truth, said).score == score


WORDS = st.one_of(
    st.text(max_size=30), st.sampled_from(['<AND>', '<OR>', ' | ', 'a<AND>b', '\n1.0', 'x|y', ''])
)


@settings(max_examples=200, deadline=None)
@given(WORDS, WORDS, WORDS)
def test_any_texts_make_one_row(question, truth, prediction):
    row = open_row(question, truth, prediction)
    assert row.count('|') == 3 and len(row.splitlines()) == 1 and row.endswith(' | ')
    assert open_row(question, truth, prediction, reference=True).endswith(f'{prediction} | ')


@settings(max_examples=200, deadline=None)
@given(
    st.one_of(
        st.text(max_size=12),
        st.floats().map(str),
        st.floats(0, 1).map(lambda x: f'{x} because'),
        st.just('1e-3 ok'),
    )
)
def test_a_grade_is_none_or_a_number_from_zero_to_one(text):
    grade = parse_grade(text)
    assert grade is None or (0 <= grade <= 1 and math.isfinite(grade))


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.sampled_from(['red', 'blue cup', '42', 'on the left']), min_size=1, max_size=4),
    st.booleans(),
)
def test_the_exact_judge_accepts_the_truth_itself(parts, contains):
    judge = ExactJudge(contains)
    assert judge('', '<OR>'.join(parts), parts[-1]).score == 1
    assert (
        judge('', '<AND>'.join(parts), ', '.join(parts)).score == 1
        and judge('', '<AND>'.join(parts), 'green').score == 0
    )
