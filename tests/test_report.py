"""The report: what it shows, what it admits, and how it looks in a real browser."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from official_files import write_kind
from PIL import Image

from vlmbench.data.record import ImageRef, Sample, Turn
from vlmbench.evaluate.generate import save_examples
from vlmbench.evaluate.official_files import official_task
from vlmbench.evaluate.results import (
    accuracy_table,
    load_results,
    majority_baseline,
    paired_table,
    score_predictions,
)
from vlmbench.evaluate.published import read_published
from vlmbench.evaluate.tasks import Task
from vlmbench.lab.report import collect_examples, read_run, retention_table, write_report

COLOURS = ['red', 'green', 'blue', 'white']


def make_tasks(folder: Path, n: int = 24) -> dict[str, Task]:
    for k, c in enumerate(COLOURS):
        Image.new('RGB', (40, 30), c).save(folder / f'{k}.png')

    def sample(i, kind, picture):
        k = i % 4
        q, a = (
            ('what color?', COLOURS[k])
            if kind == 'color'
            else ('is it red?', 'yes' if k == 0 else 'no')
        )
        return Sample(
            f'{i}-{kind}',
            [Turn('user', '<image>\n' * picture + q), Turn('assistant', a)],
            [ImageRef(f'{k}.png', str(folder))] * picture,
            meta=dict(question_type=kind, cluster=f'scene {i}'),
        )

    def task(name, picture):
        return Task(name, [sample(i, k, picture) for i in range(n) for k in ('color', 'exist')])

    return dict(vqa_test=task('vqa_test', 1), text_test=task('text_test', 0))


def make_run(folder: Path, tasks, method: str, seed: int, skill: float) -> Path:
    rng = np.random.default_rng([seed, len(method)])

    def answers(task, p):
        return {i.id: i.answers[0] if rng.random() < p else 'no <idea>' for i in task.items}

    run = folder / f'{method}-{seed}'
    for s, stage in enumerate(('align', 'instruct')):
        place = run / 'stages' / stage
        place.mkdir(parents=True)
        rows = [
            dict(
                event='step',
                step=i,
                seen_targets=50 * i,
                loss=(2 - s) / i + 0.3,
                tokens_per_s=9000.0,
                targets_per_s=1200.0,
                images_per_s=40.0,
                mfu=0.3,
                data_wait=0.01,
                step_s=0.2,
                memory_mb=dict(rss=500.0),
            )
            for i in range(1, 41)
        ]
        (place / 'metrics.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows))
        pd.DataFrame(
            dict(
                group=['vision', 'projector', 'layers'],
                tune=['frozen', 'full', 'lora(r=8)'],
                blocks=[None, None, '0-3'],
                parameters=[800, 50, 1300],
                trainable=[0, 50, 130 * s],
                lr=[None, 1e-3, 2e-4],
            )
        ).to_csv(place / 'freeze.csv', index=False)
    (run / 'recipe.json').write_text(
        json.dumps(dict(name=method, stages=[dict(name='align'), dict(name='instruct')]))
    )
    (run / 'manifest.json').write_text(
        json.dumps(dict(status='completed', seconds=61, parameters=dict(recipe=method, seed=seed)))
    )
    seen = score_predictions(tasks['vqa_test'], answers(tasks['vqa_test'], skill))
    save_examples(seen, tasks['vqa_test'], run / 'results', 6)
    for r in (
        seen,
        score_predictions(tasks['vqa_test'], answers(tasks['vqa_test'], 0.3), 'blind'),
        majority_baseline(*[tasks['vqa_test']] * 2),
        score_predictions(tasks['text_test'], answers(tasks['text_test'], 0.95), 'before'),
        score_predictions(tasks['text_test'], answers(tasks['text_test'], 0.8)),
    ):
        r.save(run / 'results')
    return run


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp('runs')
    tasks = make_tasks(folder)
    return [
        make_run(folder, tasks, m, s, skill)
        for m, skill in (('llava', 0.8), ('eve', 0.5))
        for s in (0, 1, 2)
    ]


@pytest.fixture(scope='module')
def page(runs, tmp_path_factory):
    return write_report(runs, tmp_path_factory.mktemp('out') / 'report.html')


def text_of(page: Path) -> str:
    return re.sub(r'<[^>]+>', ' ', page.read_text())


def test_everything_is_there_and_nothing_comes_from_elsewhere(page):
    html, text = page.read_text(), text_of(page)
    for words in (
        'Accuracy: vqa test',
        'majority answer',
        'eve blind',
        'Text retention',
        'Paired comparisons',
        'Training loss',
        'Examples',
        'What trains',
        'lora(r=8)',
        'Speed and memory',
        '9,000',
        '30.0 %',
        '1.0 %',
        '500 MB host',
        '3 × 48',
    ):
        assert words in re.sub(r'\s+', ' ', text), words
    assert not re.search(r'(src|href)="(?!data:|#)|url\((?!#)|@import|<script', html)
    assert 'no &lt;idea&gt;' in html and 'no <idea>' not in html and 'not recorded' not in text
    assert {p.stem for p in (page.parent / 'figures').glob('*.png')} == {
        'accuracy-vqa_test',
        'paired-vqa_test',
        'paired-text_test',
        'loss',
        'examples',
        'freeze',
    }


def test_numbers_are_those_of_the_results(runs, page):
    frame = load_results(runs)
    part = frame[
        (frame['method'] == 'llava')
        & (frame['task'] == 'vqa_test')
        & (frame['condition'] == 'image')
    ]
    assert f'{100 * part["score"].mean():.1f}' in text_of(page)
    paired = paired_table(frame).set_index('task').loc['vqa_test']
    a, b = (part_of(frame, m) for m in (paired['a'], paired['b']))
    assert paired['difference'] == pytest.approx(
        a - b
    ) and f'{100 * paired["difference"]:+.1f}'.replace('-', '−') in text_of(page)
    html = page.read_text()
    assert f'{100 * part["score"].mean():.1f}</b>' in html  # the better method is bold


def part_of(frame, method):
    return frame.query('method == @method and task == "vqa_test" and condition == "image"')[
        'score'
    ].mean()


def test_holes_are_shown_not_hidden(runs, tmp_path):
    run = tmp_path / 'eve-9'
    (run / 'stages' / 'align').mkdir(parents=True)
    (run / 'manifest.json').write_text('{"parameters": {"recipe": "eve"')
    (run / 'stages' / 'align' / 'metrics.jsonl').write_text('{"step": 1}\n')
    text = re.sub(r'\s+', ' ', text_of(write_report([run], tmp_path / 'out', figures=False)))
    for words in (
        'manifest.json is damaged',
        'eve-9: recipe.json',
        'stages/align/freeze.csv (FileNotFoundError)',
        'results/*.json',
        'not recorded',
    ):
        assert words in text, words
    failed = tmp_path / 'zero-0'
    failed.mkdir()
    (failed / 'manifest.json').write_text(
        json.dumps(
            dict(status='failed', reason='out of memory', parameters=dict(recipe='zero', seed=0))
        )
    )
    text = re.sub(
        r'\s+', ' ', text_of(write_report([*runs, failed], tmp_path / 'both', figures=False))
    )
    assert 'not completed: zero, seed 0' in text and 'reason out of memory' in text


def test_missing_baselines_have_a_row_that_says_so(tmp_path):
    tasks = make_tasks(tmp_path, 4)
    run = make_run(tmp_path, tasks, 'llava', 0, 0.7)
    for f in (run / 'results').glob('vqa_test@*'):
        f.unlink()
    html = write_report([run], tmp_path / 'o', figures=False).read_text()
    for cond in ('blind', 'majority'):
        assert re.search(rf'{cond} baseline</th><td><span class="none">not recorded', html), cond


def test_pictures_outside_the_results_are_not_read(tmp_path):
    tasks = make_tasks(tmp_path, 4)
    run = make_run(tmp_path, tasks, 'llava', 0, 0.7)
    Image.new('RGB', (9, 9)).save(tmp_path / 'secret.png')
    card = run / 'results' / 'vqa_test.json'
    body = json.loads(card.read_text())
    body['examples'] = [
        dict(id=body['examples'][0]['id'], file='../../secret.png'),
        body['examples'][1],
    ]
    card.write_text(json.dumps(body))
    found = collect_examples([read_run(run)], load_results([run]))
    assert [e['picture'].name for e in found] == ['01.png']


def test_retention_ratio():
    acc = pd.DataFrame(
        [
            dict(task='t', method=m, condition=c, question_type='all', score=s)
            for m, c, s in (('a', 'before', 0.8), ('a', 'image', 0.6), ('b', 'image', 0.5))
        ]
    )
    out = retention_table(acc, ['t']).set_index('method')['retention']
    assert out['a'] == pytest.approx(0.75) and np.isnan(out['b'])


def test_a_method_and_seed_may_come_once(runs, tmp_path):
    twin = tmp_path / 'llava-0'
    import shutil

    shutil.copytree(runs[0], twin)
    with pytest.raises(ValueError, match='llava seed 0 has two runs'):
        write_report([runs[0], twin], tmp_path / 'o')


# ---------------------------------------------------------------- in a browser


@pytest.fixture(scope='module')
def beside(tmp_path_factory):
    """A report beside VoRA's paper: two runs asked TextVQA's official file and were right in 36 and
    in 12 of its 48 answers."""
    folder = tmp_path_factory.mktemp('official')
    task, done = make_tasks(folder)['vqa_test'], []
    for name, right in (('vora-0', 36), ('eve-0', 12)):
        run = folder / name
        run.mkdir()
        facts = dict(parameters=dict(recipe=name[:-2], seed=0), status='completed')
        (run / 'manifest.json').write_text(json.dumps(facts))
        said = {i.id: i.answers[0] if n < right else '?' for n, i in enumerate(task.items)}
        shown = score_predictions(task, said, header=dict(kind='textvqa', split='val'))
        shown.task = 'textvqa'
        shown.frame = shown.frame.assign(task='textvqa')
        shown.save(run / 'results')
        done.append(run)
    return write_report(done, folder / 'report.html', figures=False, published='vora')


def test_a_papers_numbers_stand_beside_those_measured(beside, runs, tmp_path):
    html = beside.read_text()
    part = html[html.index('id="published"') :]
    text = re.sub(r'\s+', ' ', re.sub(r'<[^>]+>', ' ', part[: part.index('</section>')]))
    paper = read_published('vora')
    asked = paper[paper['benchmark'] == 'textvqa']
    # 36 of 48 are 75.0 percent, 12 are 25.0
    for value in asked['value']:
        assert f'{value:.1f} 25.0 {25 - value:+.1f} 75.0 {75 - value:+.1f}' in text
    left = len(paper) - len(asked)
    assert f'{len(asked)} of {len(paper)} published numbers were measured here, {left} were' in text
    pope = (paper['benchmark'] == 'pope').sum()
    assert f'pope {pope}' in text and 'textvqa' not in text[text.index('by benchmark') :]
    assert 'href="#published"' in html
    # a report that names no paper has no such section; runs that asked no official file say so
    none = write_report(runs[:1], tmp_path / 'none', figures=False, published='vora').read_text()
    assert f'none of the {len(paper)} published numbers was measured here' in none
    assert 'id="published"' not in write_report(runs[:1], tmp_path, figures=False).read_text()
    with pytest.raises(ValueError, match='published=vara: use one of'):
        write_report(runs[:1], tmp_path / 'x', figures=False, published='vara')


def test_answers_for_a_server_and_questions_without_a_type_are_no_obstacle(tmp_path):
    "Files of answers lie beside the results; TextVQA's questions have no type, some others do."
    folder = write_kind('textvqa', tmp_path)
    run = tmp_path / 'run'
    task = official_task(f'textvqa:{folder}')
    said = {item.id: 'stop' for item in task.items}
    header = dict(kind='textvqa', split='val')
    score_predictions(task, said, header=header).save(run / 'results')
    (run / 'results' / 'vqav2.upload.json').write_text('[{"question_id": 1, "answer": "no"}]')
    (run / 'results' / 'mmvet.upload.json').write_text('{"v1_0": "no"}')
    assert list(read_run(run).cards) == ['textvqa']
    html = write_report([run], tmp_path / 'r.html', figures=False, published='eve').read_text()
    assert 'published numbers were measured here' in html
    accuracy = accuracy_table(load_results([run]))
    assert accuracy[['question_type', 'n', 'score']].values.tolist() == [['all', 2, 1.0]]
    frame = load_results([run]).assign(question_type=['all', 'sign'])
    assert accuracy_table(frame)['n'].tolist() == [1, 2]


CHROMIUM = next(
    (
        p
        for p in (
            os.environ.get('CHROMIUM', ''),
            '/usr/bin/chromium',
            '/usr/bin/chromium-browser',
            '/usr/bin/google-chrome',
        )
        if p and Path(p).exists()
    ),
    None,
)
ARGS = (
    '--no-sandbox --headless --disable-gpu --disable-quic --no-first-run '
    '--disable-background-networking --disable-component-update '
    '--disable-sync'
).split()


@pytest.fixture(scope='module')
def browser():
    sync_api = pytest.importorskip('playwright.sync_api', reason='playwright is not installed')
    if CHROMIUM is None:
        pytest.skip('no chromium found: apt-get install chromium, or set CHROMIUM')
    with sync_api.sync_playwright() as p:
        b = p.chromium.launch(executable_path=CHROMIUM, args=ARGS)
        yield b
        b.close()


@pytest.mark.parametrize('width,scheme', [(1200, 'light'), (1200, 'dark'), (390, 'light')])
def test_looks_right(browser, page, width, scheme, tmp_path):
    tab, asked, said = (
        browser.new_page(viewport=dict(width=width, height=850), color_scheme=scheme),
        [],
        [],
    )
    tab.on('request', lambda r: asked.append(r.url))
    tab.on('console', lambda m: said.append(m.text))
    tab.on('pageerror', lambda e: said.append(str(e)))
    tab.goto(page.as_uri())
    assert [u for u in asked if not u.startswith('data:')] == [page.as_uri()] and said == []
    assert (
        tab.evaluate('document.documentElement.scrollWidth') <= width
    )  # nothing pushes the page sideways
    pictures = tab.evaluate('[...document.images].map(i => i.complete && i.naturalWidth)')
    assert len(pictures) >= 6 and all(pictures)
    box = tab.locator('section svg').first.bounding_box()
    assert box['width'] >= min(600, width) and box['height'] > 100

    def luminance(css):
        return sum(w * int(v) for w, v in zip((0.3, 0.59, 0.11), re.findall(r'\d+', css)[:3]))

    ground = luminance(tab.evaluate('getComputedStyle(document.body).backgroundColor'))
    ink = luminance(tab.locator('section svg text').first.evaluate('e => getComputedStyle(e).fill'))
    assert (ground < 60) == (scheme == 'dark') and abs(
        ground - ink
    ) > 120  # figures follow the scheme
    labels = tab.evaluate(
        "[...document.querySelectorAll('nav a')].every(a => "
        "document.querySelector(a.getAttribute('href')))"
    )
    assert labels
    marks = tab.evaluate(
        "[...document.querySelectorAll('.cards li')].map(l => getComputedStyle(l, "
        "'::after').content)"
    )
    assert any('✓' in m for m in marks) and any(
        '✗' in m for m in marks
    )  # right and wrong are marked
    details = tab.locator('#runs details').first
    assert (
        details.evaluate('e => getComputedStyle(e).borderTopWidth') == '1px'
    )  # the whole style sheet was understood
    details.locator('summary').click()
    assert details.locator('pre').is_visible() and '"recipe"' in details.locator('pre').inner_text()
    tab.screenshot(path=tmp_path / 'page.png', full_page=True)
    colours = Image.open(tmp_path / 'page.png').convert('RGB').resize((200, 400)).getcolors(80000)
    assert len(colours) > 40
    tab.close()


@pytest.mark.parametrize('width', [1200, 390])
def test_the_paper_is_shown_within_the_page(browser, beside, width, tmp_path):
    tab = browser.new_page(viewport=dict(width=width, height=850))
    tab.goto(beside.as_uri())
    assert tab.evaluate('document.documentElement.scrollWidth') <= width
    section = tab.locator('#published')
    assert section.locator('h2').inner_text() == 'Beside the paper'
    assert section.locator('table tr').count() > 1
    section.locator('summary').click()
    assert section.locator('li', has_text='pope').is_visible()
    section.screenshot(path=tmp_path / 'published.png')
