"""ViP-Bench from files to tables, and region tasks through the ordinary evaluator with a real
(tiny, random) model."""

import json
import warnings

import numpy as np
import pytest
import torch
from judge_server import Step, scripted
from PIL import Image
from typer.testing import CliRunner

from vlmbench.data.record import BadRecord
from vlmbench.evaluate.captions import Caption, caption_scores, check_caption_metrics
from vlmbench.evaluate.generate import evaluate
from vlmbench.evaluate.judge import ChatJudge, Endpoint, ExactJudge, JudgeError, grade_answers
from vlmbench.evaluate.region_tasks import region_task, vote
from vlmbench.evaluate.results import Results, compare, score_predictions
from vlmbench.evaluate.vip_bench import (
    CAPABILITIES,
    PUBLISHED_COUNTS,
    SPLITS,
    group_scores,
    judged,
    published_scores,
    read_vip_bench,
    read_vip_meta,
    to_grade,
    vip_bench_task,
    vip_problems,
)
from vlmbench.run.cli import app

CAPS = (['rec'], ['know', 'rec'], ['ocr', 'math'], ['lang', 'ocr', 'rec'], ['rel', 'rec'])
TRUTH = ('a dog', 'red<AND>blue', '4<OR>four', 'open', 'left of')


def write(folder, n=10, **faults):
    meta = {
        f'v1_{i}': dict(
            question='what color is <obj> ?', answer=TRUTH[i % 5], capability=CAPS[i % 5]
        )
        for i in range(n)
    }
    meta |= faults.get('meta', {})
    (folder / 'vip-bench-meta-data.json').write_text(faults.get('meta_text') or json.dumps(meta))
    for split in SPLITS:
        (folder / split / 'images').mkdir(parents=True, exist_ok=True)
        rows = [
            dict(question_id=i, image=f'v1_{i}.png', text=f'what color is at the arrow {i} ?')
            for i in range(n)
        ]
        for r in rows:
            Image.new('RGB', (32, 32), (9 * r['question_id'], 90, 30)).save(
                folder / split / 'images' / r['image']
            )
        lines = [json.dumps(r) for r in rows]
        for k, v in faults.get('rows', {}).items():
            lines[k] = v if isinstance(v, str) else json.dumps(rows[k] | v)
        (folder / split / 'questions.jsonl').write_text('\n'.join(lines))
    return folder


@pytest.fixture
def bench(tmp_path):
    return write(tmp_path)


@pytest.fixture(scope='module')
def vlm():
    from transformers import CLIPVisionConfig, CLIPVisionModel, Qwen3Config, Qwen3ForCausalLM

    from vlmbench.data.image import ImageTransform
    from vlmbench.data.scene import world_tokenizer
    from vlmbench.models.vlm import build_vlm

    torch.manual_seed(0)
    tok = world_tokenizer()
    llm = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tok),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            eos_token_id=tok.convert_tokens_to_ids('<|end|>'),
        )
    )
    vit = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=32,
            patch_size=8,
        )
    )
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        model, processor = build_vlm(
            llm,
            vit,
            dict(select_layers=[-1]),
            tok,
            template='world',
            transform=ImageTransform('squash', 32, patch=8),
        )
    for p in model.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.3)
    return model, processor


@pytest.mark.fault('vip-20')
def test_from_files_to_tables(bench, vlm, tmp_path):
    """Loader, greedy answers, a judge over HTTP with faults on the way, tables, saved results: the
    whole path."""
    task, items = vip_bench_task(bench, max_new_tokens=4), read_vip_bench(bench)
    assert [i.id for i in task.items] == [f'v1_{k}' for k in range(10)] and task.max_new_tokens == 4
    assert (
        vip_bench_task(bench, 'human').max_new_tokens == 1024
        and vip_bench_task(bench, 'human').name == 'vip_bench_human'
    )
    results = evaluate(*vlm, task, batch_size=4, out_dir=tmp_path / 'out')
    assert set(results.header['metrics']) == set(CAPABILITIES)
    faults = {
        3: Step(b'busy', 500),
        7: 'no idea',
        8: Step(b'{"oops": 1}'),
        12: Step(b'', 429, {'Retry-After': '0'}),
    }
    with scripted(lambda n, r, h: faults.get(n, f'0.{n % 10}')) as (url, seen):
        judge = ChatJudge(Endpoint(url, 'j', sleep=lambda s: None))
        grades = grade_answers(
            to_grade(items, results), judge, 3, tmp_path / 'grades.jsonl', workers=1
        )
        assert len(seen) == 30 + len(faults)
    table = group_scores(items, grades)
    assert table['name'].tolist() == [*CAPABILITIES, 'total'] and table['n'].tolist() == [
        8,
        4,
        2,
        2,
        2,
        2,
        10,
    ]
    scores = 100 * grades.matrix([i.id for i in items])
    rec = [k for k, i in enumerate(items) if 'rec' in i.capabilities]
    assert table['score'][0] == pytest.approx(scores[rec].mean()) and table['std'][
        6
    ] == pytest.approx(scores.mean(0).std())
    by = group_scores(items, grades, 'combination').set_index('name')
    assert by['n'].to_dict() == {
        'rec': 2,
        'know|rec': 2,
        'math|ocr': 2,
        'lang|ocr|rec': 2,
        'rec|rel': 2,
        'total': 10,
    }
    final = judged(results, items, grades)
    final.save(tmp_path / 'out')
    again = Results.load(tmp_path / 'out', 'vip_bench_bbox', 'judged')
    assert again.accuracy == pytest.approx(scores.mean() / 100) and again.header['judge_runs'] == 3
    assert (
        again.header['capability']['total'] == published_scores(table)['total']
        and again.header['unparsed'] == 0
    )
    assert again.header['published_prompt'] is False and again.header['judge'].startswith(
        'j at 127.0.0.1'
    )
    assert compare(again, final)['difference'].mean == 0


def test_the_offline_judge_agrees_with_the_tasks_own_scores(bench):
    task, items = vip_bench_task(bench), read_vip_bench(bench)
    said = {
        i.id: ('dog', 'blue or red', 'four', 'It is open', 'left')[k % 5]
        for k, i in enumerate(task.items)
    }
    results = score_predictions(task, said)
    grades = grade_answers(to_grade(items, said), ExactJudge())
    assert (
        grades.matrix([i.id for i in items])[:, 0].tolist()
        == results.frame['score'].tolist()
        == [1, 1, 1, 0, 0] * 2
    )
    with pytest.raises(ValueError, match="2 of 10 items have no prediction, first 'v1_3'"):
        to_grade(items, {k: v for k, v in said.items() if k not in ('v1_3', 'v1_9')})


@pytest.mark.parametrize(
    'faults,match',
    [
        (dict(meta_text='{"v1_0": '), 'not JSON'),
        (dict(meta_text='[]'), 'expected an object'),
        (
            dict(meta={'v1_2': dict(question='q', answer='', capability=['rec'])}),
            "entry 'v1_2': no answer",
        ),
        (
            dict(meta={'v1_2': dict(question='q', answer='a', capability=['see'])}),
            "'see' is unknown",
        ),
        (dict(meta={'v1_2': dict(question='q', answer='a', capability=[])}), 'capability must be'),
        (dict(meta={'v1_2': 'text'}), 'not an object'),
        (
            dict(meta={'v1_99': dict(question='q', answer='a', capability=['rec'])}),
            "1 of 11 items of the metadata are absent, first 'v1_99'",
        ),
        (dict(rows={4: '{broken'}), 'row 4: syntax error'),
        (dict(rows={4: '7'}), 'row 4: the row is int'),
        (dict(rows={4: dict(text='  ')}), 'row 4: no text'),
        (dict(rows={4: dict(image=None)}), 'row 4: no image'),
        (dict(rows={4: dict(question_id=77)}), "row 4: question_id '77' has no entry 'v1_77'"),
        (dict(rows={4: dict(question_id=3)}), "row 4: question_id '3' appears twice"),
        (
            dict(rows={4: dict(image='gone.png')}),
            r'row 4 \(v1_4\): the picture .*gone.png is missing',
        ),
    ],
)
def test_bad_copies_name_file_and_row(tmp_path, faults, match):
    with pytest.raises(BadRecord, match=match):
        read_vip_bench(write(tmp_path, **faults))


def test_a_byte_order_mark_is_no_part_of_the_metadata(bench):
    meta = bench / 'vip-bench-meta-data.json'
    plain = read_vip_meta(meta)
    meta.write_bytes(b'\xef\xbb\xbf' + meta.read_bytes())
    assert read_vip_meta(meta) == plain


def test_missing_files_and_settings(bench):
    with pytest.raises(ValueError, match='bbox or human'):
        read_vip_bench(bench, 'boxes')
    with pytest.raises(ValueError, match="use 'capability' or"):
        group_scores(
            read_vip_bench(bench),
            grade_answers(
                to_grade(read_vip_bench(bench), {f'v1_{i}': 'x' for i in range(10)}), ExactJudge()
            ),
            'type',
        )
    (bench / 'human' / 'questions.jsonl').unlink()
    with pytest.raises(FileNotFoundError, match='questions of split'):
        read_vip_bench(bench, 'human')
    (bench / 'vip-bench-meta-data.json').unlink()
    with pytest.raises(FileNotFoundError, match='answers and capabilities'):
        read_vip_bench(bench)


def test_a_dead_judge_loses_nothing(bench, tmp_path):
    items = read_vip_bench(bench)
    said = to_grade(items, {i.id: 'x' for i in items})
    with scripted(lambda n, r, h: '0.5' if n < 4 else Step(b'down', 503)) as (url, _):
        judge = ChatJudge(Endpoint(url, 'j', retries=1, sleep=lambda s: None))
        with pytest.raises(JudgeError, match='4 of 10 grades kept in'):
            grade_answers(said, judge, log=tmp_path / 'g.jsonl')
    with scripted(lambda n, r, h: '0.5') as (url, seen):
        grades = grade_answers(said, ChatJudge(Endpoint(url, 'j')), log=tmp_path / 'g.jsonl')
    assert len(seen) == 6 and (grades.matrix() == 0.5).all()


# ------------------------------------------------------------------------------------- the
# evaluator on marked pictures
@pytest.fixture
def v7w(tmp_path):
    rng = np.random.default_rng(0)
    boxes = [[2, 2, 14, 14], [18, 2, 30, 14], [2, 18, 14, 30], [18, 18, 30, 30]]
    for n in range(6):
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(
            tmp_path / f'{n}.png'
        )
    rows = [
        dict(
            id=f'v7w-{n}',
            image=f'{n}.png',
            question='which one ?',
            bboxes=boxes,
            answer=boxes[n % 4],
        )
        for n in range(6)
    ]
    (tmp_path / 'v7w.json').write_text(json.dumps(rows))
    return lambda **kw: region_task('v7w', tmp_path / 'v7w.json', tmp_path, **kw)


def test_marked_questions_through_the_evaluator(v7w, vlm, tmp_path):
    greedy = [evaluate(*vlm, v7w(), batch_size=b, max_new_tokens=5) for b in (1, 4)]
    assert greedy[0].frame['prediction'].tolist() == greedy[1].frame['prediction'].tolist()
    marked, other = (
        evaluate(*vlm, v7w(seed=s), batch_size=4, max_new_tokens=5, out_dir=tmp_path / f's{s}')
        for s in (0, 1)
    )
    assert marked.frame['prompt'].tolist() != other.frame['prompt'].tolist()
    with pytest.raises(ValueError, match='prompt_hash was'):
        evaluate(*vlm, v7w(seed=2), max_new_tokens=5, out_dir=tmp_path / 's0')
    result = vote([marked, other, evaluate(*vlm, v7w(seed=2), max_new_tokens=5)], v7w())
    assert len(result.frame) == 6 and 1 / 3 <= result.header['agreement'] <= 1


@pytest.mark.fault('vip-8')
def test_sampled_answers_depend_on_seed_and_id_only(v7w, vlm, tmp_path):
    def answers(**kw):
        return evaluate(*vlm, v7w(), max_new_tokens=5, temperature=2.0, **kw)

    a, b = answers(batch_size=1), answers(batch_size=4, out_dir=tmp_path / 'o')
    assert (
        a.frame['prediction'].tolist() == b.frame['prediction'].tolist() and a.condition == 't2s0'
    )
    assert answers(sample_seed=1).frame['prediction'].tolist() != a.frame['prediction'].tolist()
    assert (
        a.frame['prediction'].tolist()
        != evaluate(*vlm, v7w(), max_new_tokens=5).frame['prediction'].tolist()
    )
    log = tmp_path / 'o' / 'v7w@t2s0.generations.jsonl'
    lines = log.read_bytes().split(b'\n')
    log.write_bytes(b'\n'.join(lines[:3]) + b'\n')  # stopped after two answers
    again = answers(batch_size=3, out_dir=tmp_path / 'o')
    assert (
        again.header['resumed'] == 2
        and again.frame['prediction'].tolist() == a.frame['prediction'].tolist()
    )
    assert (again.header['temperature'], again.header['sample_seed']) == (2.0, 0)
    with pytest.raises(ValueError, match='must not be negative'):
        evaluate(*vlm, v7w(), temperature=-1)


# --------------------------------------------------------------------------------------------------
# caption metrics
SAID, REFERENCES = (
    ['a brown dog', 'two red cups'],
    [['the brown dog', 'a dog'], ['red cups on a table']],
)


def test_caption_metrics_say_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.setattr('vlmbench.evaluate.captions.shutil.which', lambda name: None)
    with (
        pytest.raises(RuntimeError, match='need Java')
        if _installed()
        else pytest.raises(RuntimeError, match="extra 'eval'")
    ):
        check_caption_metrics()
    monkeypatch.setitem(__import__('sys').modules, 'pycocoevalcap.cider.cider', None)
    with pytest.raises(RuntimeError, match=r"extra 'eval' \(pip install 'vlmbench\[eval\]'\)"):
        check_caption_metrics()
    (tmp_path / 'r.json').write_text('[]')
    with pytest.raises(RuntimeError, match="extra 'eval'"):
        region_task('refcocog', tmp_path / 'r.json', tmp_path)  # before any work
    assert len(Caption(()).parse(' a  b ')) == 3 and check_caption_metrics(()) is None


def _installed():
    from importlib.util import find_spec

    return find_spec('pycocoevalcap') is not None


def _runs():
    import shutil

    return _installed() and shutil.which('java') is not None


@pytest.mark.skipif(not _runs(), reason='needs pycocoevalcap (extra eval) and Java')
def test_cider():
    a, b = (
        caption_scores(s, REFERENCES, ['cider'])['cider'] for s in (SAID, ['red cups', 'a dog'])
    )
    assert (
        a > 1
        and b == 0
        and caption_scores([r[0] for r in REFERENCES], REFERENCES, ['cider'])['cider'] > a
    )
    odd = caption_scores(
        ['a ||| dog\n', ''], REFERENCES, ['cider']
    )  # separators, line ends, nothing said
    assert 0 < odd['cider'] < a


@pytest.mark.skipif(not _runs(), reason='needs pycocoevalcap (extra eval) and Java')
def test_meteor_and_a_java_that_fails(monkeypatch):
    assert caption_scores([r[0] for r in REFERENCES], REFERENCES, ['meteor'])['meteor'] == 1
    from pycocoevalcap.meteor import meteor

    monkeypatch.setattr(meteor, 'METEOR_JAR', 'gone.jar')
    with pytest.raises(RuntimeError, match=r'METEOR \(Java\) gave no score: .*gone.jar'):
        caption_scores(SAID, REFERENCES, ['meteor'])


def test_a_copy_is_counted_against_what_was_published(bench):
    "Ten entries: five capability sets, each twice."
    found = vip_problems(bench)
    assert found[0] == 'vip-bench-meta-data.json: 10 questions, the card says 303'
    counted = {c: 2 * sum(c in names for names in CAPS) for c in PUBLISHED_COUNTS}
    assert [line.split(': ')[1].split(', ')[0] for line in found[1:]] == [
        f'{counted[c]} {CAPABILITIES[c]}' for c in PUBLISHED_COUNTS
    ]
    checked = CliRunner().invoke(app, ['data', 'check', 'vip_bench', str(bench)])
    assert checked.exit_code == 1 and '10 questions, the card says 303' in checked.output
    (bench / 'vip-bench-meta-data.json').unlink()
    checked = CliRunner().invoke(app, ['data', 'check', 'vip_bench', str(bench)])
    assert checked.exit_code == 1 and 'vip-bench-meta-data.json is missing' in checked.output


def test_the_published_counts_are_a_clean_copy(tmp_path):
    "303 questions of which 240 are recognition, and so on, one capability after the other."
    names = [[] for _ in range(303)]
    at = 0
    for capability, n in PUBLISHED_COUNTS.items():
        for k in range(n):
            names[(at + k) % 303].append(capability)
        at += n
    entry = dict(question='what ?', answer='a dog')
    meta = {f'v1_{i}': dict(entry, capability=found) for i, found in enumerate(names)}
    (tmp_path / 'vip-bench-meta-data.json').write_text(json.dumps(meta))
    assert sum(PUBLISHED_COUNTS.values()) == 463 and vip_problems(tmp_path) == []
