"""The demo and the board in a real browser: draw, ask, read the streamed answer, look at what the
model saw."""

import io
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlmbench.data.overlay import MARKERS
from vlmbench.data.world import asset_path
from vlmbench.demo.chat import ChatModel
from vlmbench.models.vlm import build_vlm

ROOT = Path(__file__).resolve().parent.parent
SHOTS = os.environ.get('VLMBENCH_SHOTS')  # a folder that keeps the screenshots


@pytest.fixture
def page(browser):
    "A page that remembers requests to other hosts and errors."
    page = browser.new_page(viewport=dict(width=1400, height=950))
    page.foreign, page.problems = [], []
    local = ('http://127.0.0.1', 'ws://127.0.0.1', 'data:', 'blob:', 'about:')
    page.on('request', lambda r: None if r.url.startswith(local) else page.foreign.append(r.url))
    page.on('pageerror', lambda e: page.problems.append(str(e)))
    page.set_default_timeout(60_000)
    yield page
    page.close()


def shot(page, tmp_path, name):
    path = Path(SHOTS or tmp_path) / f'{name}.png'
    page.screenshot(path=path)
    assert np.asarray(Image.open(path)).std() > 10, 'an empty page'


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


class Recorder(ChatModel):
    "A model that keeps the pictures it was given."

    def stream(self, turns, images=(), *args, **kwargs):
        self.given, self.turns = list(images), list(turns)
        end = yield from ChatModel.stream(self, turns, images, *args, **kwargs)
        return end


class Counting(ChatModel):
    """A model whose answer takes its time, and does not end while `hold` is cleared: the stream can
    be watched."""

    hold = threading.Event()
    hold.set()

    def stream(self, turns, images=(), *args, **kwargs):
        for word in 'one two three four five six seven eight nine ten'.split():
            time.sleep(0.15)
            if word == 'ten':
                self.hold.wait(120)
            yield word + ' '
        return 'stop'


@pytest.fixture(scope='module')
def parts():
    return build_vlm(
        asset_path('llm'), asset_path('vit'), dict(projector='mlp2x_gelu'), template='world'
    )


@pytest.fixture(scope='module')
def served(parts, tmp_path_factory):
    pytest.importorskip('gradio', reason='gradio is not installed (extra: serve)')
    from vlmbench.demo.serve import Limits, build_page, launch

    os.environ['GRADIO_TEMP_DIR'] = str(tmp_path_factory.mktemp('uploads'))
    models = dict(plain=Recorder(*parts, 'plain'), counting=Counting(*parts, 'counting'))
    limits = Limits(max_upload_mb=1, max_pixels=500_000, max_new_tokens=8, queue=1)
    app = build_page(models, limits)
    yield launch(app, limits, port=free_port()), models
    app.close()
    del os.environ['GRADIO_TEMP_DIR']


def drag(page, area, *places):
    "Press at the first place (shares of the board), move along, let go at the last."
    at = lambda x, y: (area['x'] + x * area['width'], area['y'] + y * area['height'])
    page.mouse.move(*at(*places[0]))
    page.mouse.down()
    for p in places[1:]:
        page.mouse.move(*at(*p), steps=4)
    page.mouse.up()


PATHS = {
    'point': [(0.5, 0.5)],
    'scribble': [(0.2, 0.2), (0.5, 0.6), (0.8, 0.3)],
    'mask': [(0.3, 0.3), (0.7, 0.3), (0.5, 0.8)],
    'mask contour': [(0.2, 0.2), (0.8, 0.2), (0.5, 0.9)],
    'arrow': [(0.1, 0.1), (0.5, 0.5)],
}


@pytest.mark.fault('vip-12')
def test_draw_ask_and_see_what_the_model_saw(served, page, tmp_path):
    url, models = served
    page.goto(url)
    page.wait_for_selector('#board canvas')
    area = page.locator('#board canvas').bounding_box()
    names = []
    for kind, colour in zip(MARKERS, 'red lime blue yellow fuchsia aqua orange purple'.split()):
        page.click(f'#board button[data-kind="{kind}"]')
        page.click(f'#board button[data-color="{colour}"]')
        drag(page, area, *PATHS.get(kind, [(0.2, 0.25), (0.7, 0.8)]))
        names.append(f'{MARKERS[kind][0]} the {colour} {MARKERS[kind][1]}')
    assert page.locator('#board .vp-chip button:first-child').all_inner_texts() == names
    page.locator('#board .vp-chip button[title="remove this marker"]').nth(2).click()
    page.click('#board button[title="remove the last marker"]')
    del names[2], names[-1]
    assert page.locator('#board .vp-chip button:first-child').all_inner_texts() == names

    box = page.locator('#question textarea')
    box.fill('what is the object')
    page.locator('#board .vp-chip button:first-child').nth(1).click()
    page.wait_for_function(
        "document.querySelector('#question textarea').value.trim() == 'what is the object "
        "<region1>'"
    )
    page.click('#ask')
    asked = f'what is the object {names[1]}'
    for side in ('left', 'right'):
        page.wait_for_selector(f'#chat-{side} >> text="{asked}"')
    seen = set()  # the answer grows while it is watched
    while 'ten' not in (text := page.locator('#chat-right .bot').first.inner_text()):
        seen.add(text.strip(' ▍\n'))
        page.wait_for_timeout(60)
    assert len(seen) >= 3 and all(
        'one two three four five six seven eight nine ten'.startswith(t) for t in seen
    ), seen
    page.wait_for_selector('#seen-left img')
    page.wait_for_function(
        "!document.querySelector('#ask').disabled && document.querySelector('#stop').disabled"
    )
    first = page.evaluate(
        'async () => Array.from(new Uint8Array(await (await '
        "fetch(document.querySelector('#seen-left img').src)).arrayBuffer()))"
    )
    shown, given = Image.open(io.BytesIO(bytes(first))).convert('RGB'), models['plain'].given[0]
    assert shown.size == given.size and shown.tobytes() == given.tobytes(), (
        'the page shows another picture than the model got'
    )
    assert models['plain'].turns[-1].text == f'<image>\n{asked}'
    said = page.locator('#seen-left .caption-label').all_inner_texts()
    assert ['marked,', 'as it enters the model,'] == [
        line.rstrip('0123456789 ×px').strip() for line in said
    ]
    shot(page, tmp_path, 'serve')
    assert box.input_value() == '' and not page.foreign and not page.problems, (
        page.foreign,
        page.problems,
    )


def test_refusals_are_readable_and_lose_nothing(served, browser, page, tmp_path):
    """A bad upload, a question without its marker and a full queue: each says why; picture and
    question stay."""
    url, models = served
    page.goto(url)
    page.wait_for_selector('#board canvas')
    pick = page.locator('#board input[type=file]')
    pick.set_input_files(
        dict(
            name='drawing.png',
            mimeType='image/png',
            buffer=b'<svg xmlns="http://www.w3.org/2000/svg"/>',
        )
    )
    page.wait_for_selector('#board .vp-bad >> text=an SVG drawing: render it to PNG first')
    pick.set_input_files(dict(name='huge.png', mimeType='image/png', buffer=bytes(1_200_000)))
    page.wait_for_selector('#board .vp-bad >> text=huge.png is larger than 1 MB')
    out = io.BytesIO()
    Image.new('RGB', (120, 40), 'navy').save(out, 'PNG')
    pick.set_input_files(dict(name='flag.png', mimeType='image/png', buffer=out.getvalue()))
    page.wait_for_function(
        "(() => { const c = document.querySelector('#board canvas'); return c && Math.abs(c.width "
        '/ c.height - 3) < .05; })()'
    )
    box = page.locator('#question textarea')
    box.fill('what is <region> ?')
    page.click('#ask')
    page.wait_for_selector('#chat-left .bot >> text=nothing is marked yet')
    assert box.input_value() == 'what is <region> ?'

    models['counting'].hold.clear()
    others = [
        browser.new_page() for _ in range(2)
    ]  # one answers, one waits: the queue of one is full
    for p in others:
        p.goto(url)
        p.wait_for_selector('#board canvas')
        p.locator('#question textarea').fill('how many ?')
    others[0].click('#ask')
    others[0].wait_for_selector('#chat-right .bot >> text=one')
    others[1].click('#ask')
    page.wait_for_timeout(1000)
    box.fill('and now ?')
    page.click('#ask')
    page.wait_for_selector('text=/application is currently busy. Please try again/')
    shot(page, tmp_path, 'refused')
    assert box.input_value() == 'and now ?'
    models['counting'].hold.set()
    others[1].wait_for_selector('#chat-right .bot >> text=ten', timeout=60_000)
    for p in others:
        p.close()
    page.click('#ask')
    page.wait_for_selector('#chat-right .bot >> text=ten')
    assert not page.problems, page.problems


@contextmanager
def process(log, *words, **more):
    "`vlmbench serve` in a process of its own, its output in the file `log`."
    command = [sys.executable, '-m', 'vlmbench', 'serve', *map(str, words)]
    env = os.environ | dict(PYTHONPATH=str(ROOT)) | more
    with log.open('w') as out:
        it = subprocess.Popen(command, env=env, cwd=log.parent, stdout=out, stderr=out)
    try:
        yield it
    finally:
        it.terminate()
        try:
            it.wait(20)
        except subprocess.TimeoutExpired:
            it.kill()


def wait_for(log, text, running):
    "Until `text` stands in the file `log`, which the process `running` writes."
    end = time.monotonic() + 120
    while text not in log.read_text():
        assert running.poll() is None and time.monotonic() < end, log.read_text()
        time.sleep(0.2)


def names(page, side):
    "The models that can be chosen on a side."
    page.locator(f'#model-{side} input').click()
    page.wait_for_selector(f'#model-{side} [role=option]')
    found = page.locator(f'#model-{side} [role=option]').all_inner_texts()
    page.keyboard.press('Escape')
    return [name.strip(' ✓\n') for name in found]


@pytest.mark.slow
def test_workers_come_answer_and_go(parts, page, tmp_path):
    """A page with an empty list and two workers, each a process: both answer, again and are voted
    on; one is killed and leaves the list, the other is dropped and ends."""
    pytest.importorskip('gradio', reason='gradio is not installed (extra: serve)')
    model, processor = parts
    model.save_pretrained(tmp_path / 'secret' / 'untrained')
    processor.save_pretrained(tmp_path / 'secret' / 'untrained')
    token, logs = 'a-word-nobody-else-knows', [tmp_path / f'{n}.log' for n in range(3)]
    url, know = f'http://127.0.0.1:{free_port()}', dict(WORKERS=token)
    common = ('--token-env', 'WORKERS')
    ready = (
        "document.querySelector('#stop').disabled && !document.querySelector('#vote-A').disabled"
    )
    here = ('--port', url.rpartition(':')[2], '--heartbeat', 2, '--votes', tmp_path / 'votes')
    add = ('--to', url, '--device', 'cpu', '--max-new-tokens', 8, '--add')
    folders = asset_path('vlm'), tmp_path / 'secret' / 'untrained'
    with ExitStack() as running:
        start = lambda log, *words: running.enter_context(process(log, *common, *words, **know))
        main = start(logs[0], *here)
        wait_for(logs[0], f'no model yet at {url}; add one', main)
        page.goto(url)
        page.wait_for_selector(f'#add pre >> text=--to {url} --token-env VARIABLE')
        small = start(logs[1], *add, folders[0], '--name', 'small')
        untrained = start(logs[2], *add, folders[1])
        wait_for(logs[1], 'small answers at port', small)
        wait_for(logs[2], 'untrained answers at port', untrained)
        page.click('#reload')
        page.wait_for_selector('#add >> text=2 on the list')
        assert sorted(names(page, 'left')) == ['small', 'untrained']
        page.locator('#question textarea').fill('how many objects are there ?')
        page.click('#ask')
        page.wait_for_function(ready)
        page.wait_for_selector('#seen-right img')
        said = [page.locator(f'#chat-{side} .bot').first.inner_text() for side in ('left', 'right')]
        page.click('#again')
        page.wait_for_function(f'!({ready})')
        page.wait_for_function(ready)
        assert page.locator('#chat-left .user').count() == 1, (
            'it takes the place of the last answer'
        )
        page.click('#vote-both-bad')
        page.wait_for_selector('#voting >> text=Kept: Both are bad')
        (vote,) = map(json.loads, (tmp_path / 'votes' / 'votes.jsonl').read_text().splitlines())
        assert sorted(vote['models'].values()) == ['small', 'untrained'] and all(said)
        drawn = dict(max_new_tokens=512, temperature=0.2, top_p=0.7, seed=1)
        assert vote['settings'] == drawn and vote['vote'] == 'both bad'
        assert len(vote['picture_sha256']) == 64 and set(vote) == {
            *('time', 'vote', 'models', 'question', 'asked', 'markers', 'answers', 'settings'),
            'picture_sha256',
        }
        shot(page, tmp_path, 'workers')
        untrained.kill()
        side = next(s for s, m in zip(('left', 'right'), vote['models'].values()) if m != 'small')
        page.locator('#question textarea').fill('what is it ?')
        page.click('#ask')
        page.wait_for_selector(f'#chat-{side} >> text=/no worker answers for untrained any more/')
        page.wait_for_timeout(5000)  # two heartbeats and a little
        page.reload()
        page.wait_for_function("document.querySelector('#model-left input')?.value == 'small'")
        page.wait_for_selector('#model-right', state='hidden')
        dropped = subprocess.run(
            [sys.executable, '-m', 'vlmbench', 'serve', *common, '--drop', 'small', '--to', url],
            env=os.environ | dict(PYTHONPATH=str(ROOT)) | know,
            capture_output=True,
            text=True,
        )
        assert dropped.stdout == 'small: 1 worker dropped\n', dropped.stderr
        assert small.wait(30) == 0 and 'this worker ends' in logs[1].read_text()
        page.click('#reload')
        page.wait_for_selector('#add >> text=There is no model yet')
        shown = page.content()
    everything = shown + ''.join(log.read_text() for log in logs) + dropped.stderr
    assert token not in everything and 'secret' not in shown
    assert not page.problems and not page.foreign, (page.problems, page.foreign)


@pytest.mark.usefixtures('real_kernels')
def test_board_in_jupyterlab(browser, page, tmp_path):
    "The tutorial in JupyterLab: run it, draw, ask, read the answer, compare the picture."
    pytest.importorskip('jupyterlab', reason='jupyterlab is not installed (extra: dev)')
    pytest.importorskip('anywidget', reason='anywidget is not installed (extra: serve)')
    nb = json.loads((ROOT / 'nbs/tutorials/point_at_things.ipynb').read_text(encoding='utf8'))
    stop = next(
        i
        for i, c in enumerate(nb['cells'])
        if c['cell_type'] == 'code' and ''.join(c['source']).endswith('\napp')
    )
    nb['cells'] = nb['cells'][: stop + 1]
    (tmp_path / 'point.ipynb').write_text(json.dumps(nb))
    port = free_port()
    env = os.environ | dict(
        PYTHONPATH=str(ROOT),
        JUPYTER_CONFIG_DIR=str(tmp_path / 'config'),
        JUPYTER_DATA_DIR=str(tmp_path / 'data'),
        JUPYTERLAB_SETTINGS_DIR=str(tmp_path / 'settings'),
        JUPYTERLAB_WORKSPACES_DIR=str(tmp_path / 'spaces'),
    )
    lab = subprocess.Popen(
        [
            sys.executable,
            '-m',
            'jupyterlab',
            '--no-browser',
            '--ip=127.0.0.1',
            f'--port={port}',
            '--ServerApp.port_retries=0',
            '--IdentityProvider.token=',
            '--allow-root',
            '--LabApp.news_url=',
            '--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate',
            f'--ServerApp.root_dir={tmp_path}',
        ],
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.STDOUT,
    )
    try:
        url, end = f'http://127.0.0.1:{port}', time.monotonic() + 90
        while True:
            try:
                urllib.request.urlopen(f'{url}/api/status', timeout=5).close()
                break
            except OSError:
                assert lab.poll() is None and time.monotonic() < end, 'JupyterLab did not start'
                time.sleep(0.3)
        page.set_default_timeout(120_000)
        page.goto(f'{url}/lab/tree/point.ipynb')
        page.wait_for_selector('.jp-NotebookPanel-toolbar')
        page.wait_for_selector('.jp-CodeCell')
        page.wait_for_selector(
            '.jp-StatusBar-Widget >> text=/ipykernel.*Idle/'
        )  # else Lab asks which kernel to start
        page.click('.lm-MenuBar-itemLabel:text-is("Run")')
        page.click('.lm-Menu-itemLabel:text-is("Run All Cells")')
        end, ask = time.monotonic() + 150, page.locator('.jp-Dialog button:has-text("Select")')
        while not page.locator('.vp-stage canvas').count():  # Lab may ask which kernel to start
            assert time.monotonic() < end, page.locator('.jp-OutputArea').all_inner_texts()
            if ask.count():
                ask.click()
            page.wait_for_timeout(300)
        page.locator('.vp-stage canvas').scroll_into_view_if_needed()
        page.wait_for_timeout(300)
        page.click('.vp button[data-kind=ellipse]')
        page.click('.vp button[data-color=aqua]')
        drag(page, page.locator('.vp-stage canvas').bounding_box(), (0.3, 0.3), (0.75, 0.8))
        page.wait_for_selector('.vp-chip >> text=within the aqua ellipse')
        page.locator('.jp-OutputArea input[type=text]').first.fill(
            'what color is the object <region> ?'
        )
        page.click('button:text-is("Ask")')
        page.wait_for_selector(
            '.vpt .q >> text="what color is the object within the aqua ellipse ?"'
        )
        page.wait_for_selector('.vpt .a:not(:has-text("▍"))')
        assert page.locator('.vpt .a').last.inner_text().strip()
        seen = page.evaluate(
            'async () => Array.from(new Uint8Array(await (await '
            "fetch(document.querySelector('.jp-OutputArea img.widget-image').src)).arrayBuffer()))"
        )
        picture = np.asarray(Image.open(io.BytesIO(bytes(seen))).convert('RGB')).astype(int)
        aqua = (picture[..., 1] - picture[..., 0] > 60) & (picture[..., 2] - picture[..., 0] > 60)
        assert picture.shape == (64, 64, 3) and 20 < aqua.sum() < 600, (
            'no aqua ellipse in what the model saw'
        )
        shot(page, tmp_path, 'board')
        assert not page.problems and not page.foreign, (page.problems, page.foreign)
    finally:
        try:
            urllib.request.urlopen(
                urllib.request.Request(f'http://127.0.0.1:{port}/api/shutdown', method='POST'),
                timeout=10,
            ).close()
        except OSError:
            lab.terminate()
        try:
            lab.wait(20)
        except subprocess.TimeoutExpired:
            lab.kill()
