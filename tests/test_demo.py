"""Chat, terminal and server without a browser: exact markers, streams that match evaluation,
refusals, crowds."""

import io
import json
import os
import platform
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from vlmbench.data.picture import ImageError
from vlmbench.data.overlay import MARKERS, PALETTE
from vlmbench.data.record import Sample, Turn
from vlmbench.data.world import asset_path
from vlmbench.demo.board import (
    PointAndAsk,
    _widget_class,
    board_js,
    board_settings,
    marker_board,
)
from vlmbench.demo.chat import Chat, ChatError, ChatModel, draw_prompts, parse_region, to_marker
from vlmbench.demo.terminal import converse, free_name, open_picture
from vlmbench.demo.serve import Limits, Visit, build_page, launch, launch_settings
from vlmbench.demo.worker import add_command
from vlmbench.evaluate.generate import evaluate
from vlmbench.evaluate.tasks import Task
from vlmbench.models.vlm import build_vlm
from vlmbench.run.cli import app
from vlmbench.run.parameters import ParameterError

QUESTION = 'what is the object <region> ?'


def tiny(name, seed=0):
    return ChatModel(
        *build_vlm(
            asset_path('llm'),
            asset_path('vit'),
            dict(projector='mlp2x_gelu'),
            template='world',
            seed=seed,
        ),
        name,
    )


@pytest.fixture(scope='module')
def model():
    return tiny('one')


@pytest.fixture(scope='module')
def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8))


def png(image):
    out = io.BytesIO()
    image.save(out, 'PNG')
    return out.getvalue()


# --------------------------------------------------------------------------------------------------
# markers
@pytest.mark.parametrize('kind', MARKERS)
@pytest.mark.parametrize('size', [(64, 48), (700, 900), (3000, 2000)])
def test_a_box_draws_every_kind_where_it_says(kind, size):
    w, h = size
    box = [0.3 * w, 0.3 * h, 0.6 * w, 0.6 * h]
    prompt = parse_region(f'{kind}:' + ','.join(map(str, box)), 'lime', 255)
    plain = Image.new('RGB', size)
    drawn = np.asarray(draw_prompts(plain, [prompt])) != 0
    rows, cols = np.where(drawn.any(-1))
    margin = 0.12 * max(size)
    assert len(rows) and cols.min() >= box[0] - margin and cols.max() <= box[2] + margin
    assert rows.min() >= box[1] - margin and rows.max() <= box[3] + margin
    assert np.asarray(plain).sum() == 0, 'the given picture was changed'
    assert (np.asarray(draw_prompts(plain, [prompt])) != 0).sum() == drawn.sum(), (
        'the same numbers, other pixels'
    )


@pytest.mark.fault('vip-11')
def test_strokes_outlines_and_corners_are_drawn_as_given():
    size = (100, 100)
    stroke = to_marker(parse_region('scribble:10,10,50,10,50,60'), size)
    assert stroke.points == ((10, 10), (50, 10), (50, 60)) and stroke.samples == 0
    assert to_marker(parse_region('mask-contour:10,10,50,10,50,60'), size).polygons == (
        ((10, 10), (50, 10), (50, 60)),
    )
    assert to_marker(parse_region('triangle:1,2,30,4,5,60'), size).points == (
        (1, 2),
        (30, 4),
        (5, 60),
    )
    arrow = to_marker(parse_region('arrow:10,10,70,70'), size)
    assert arrow.points[0] == (70, 70) and (70, 70) in arrow.head, 'the tip is the second place'


@pytest.mark.parametrize(
    'text, why',
    [
        ('square:1,2,3,4', 'kinds are'),
        ('rectangle', 'kind:numbers'),
        ('rectangle:1,2,3', '3 numbers'),
        ('point:1;x', 'not numbers'),
        ('triangle:1,1,1,1,1,1', 'on one line'),
        ('triangle:1,1,5,5,9,9', 'on one line'),
        ('rectangle:30,2,3,40', 'no area'),
        ('arrow:5,5,5,5', 'same place'),
        ('point:inf,2', 'not all numbers'),
        ('scribble:1,2,3,4,5', '5 numbers'),
        ('mask:' + ','.join('1' * 5000), 'at most 4000'),
    ],
)
def test_bad_regions_say_why(text, why):
    with pytest.raises(ValueError, match=why):
        parse_region(text)


@pytest.mark.parametrize(
    'text, why',
    [
        ('rectangle:70,2,90,40', 'outside the picture'),
        ('point:1,500', 'outside the picture'),
        ('mask:1,1,5,5,9,9', 'no area'),
    ],
)
def test_regions_that_do_not_fit_the_picture_say_which(text, why, picture):
    with pytest.raises(ValueError, match=f'marker 2.*{why}'):
        draw_prompts(picture, [parse_region('point:3,3'), parse_region(text)])


@pytest.mark.parametrize('kind', ['scribble', 'mask', 'mask contour', 'arrow'])
def test_numbers_far_outside_are_refused_before_anything_is_drawn(kind, picture):
    numbers = '1,1,1e9,1e9' if kind == 'arrow' else '1,1,1e9,1e9,5,40'
    with pytest.raises(ValueError, match='further outside the picture of 64x48 px'):
        draw_prompts(picture, [parse_region(f'{kind}:{numbers}')])


def test_a_small_file_cannot_stall_the_server(model, monkeypatch):
    "Slivers are refused, and a picture with markers is drawn once, whoever is asked how often."
    visit = Visit(dict(one=model, two=model), Limits())
    for size in ((50_000, 500), (8_000_000, 3), (3, 900)):
        with pytest.raises(
            Exception, match=f'too elongated: {size[0]} x {size[1]} pixels.*20 times'
        ) as e:
            visit.open(png(Image.new('L', size)))
        assert type(e.value).__name__ == 'ImageError' and visit.image is None
    visit.open(png(Image.new('L', (640, 32))))
    drawn = []
    monkeypatch.setattr(
        'vlmbench.demo.chat.draw_prompts', lambda *a: drawn.append(a) or draw_prompts(*a)
    )
    marks = json.dumps([dict(kind='mask contour', numbers=[64.5, 4.5, 500, 28])])
    for _ in range(2):
        assert [*visit.ask(QUESTION, marks, 3)]
    assert len(drawn) == 1 and all(c.marked.getbbox() for c in visit.chats.values())
    many = json.dumps([dict(kind='scribble', numbers=[5.0, 5.0, 30.0, 20.0] * 500)] * 3)
    with pytest.raises(ChatError, match='6000 numbers together, at most 4000'):
        next(visit.ask(QUESTION, many, 3))
    assert [*visit.ask('what is this ?', '[]', 3)] and visit.chats['left'].marked.getbbox() is None


# --------------------------------------------------------------------------------------------------
# sessions
def test_the_stream_says_what_evaluation_says(model, picture):
    question = '<image>\nwhat color is the circle ?'
    task = Task(
        't',
        [Sample('a', [Turn('user', question), Turn('assistant', 'red')], [picture])],
        max_new_tokens=12,
    )
    told = evaluate(model.model, model.processor, task).frame['prediction'].iloc[0]
    assert ''.join(model.stream([Turn('user', question)], [picture], 12)).strip() == told


@pytest.mark.fault('vip-10')
def test_history_pictures_and_markers(model, picture):
    chat = Chat(model, png(picture), ['rectangle:5,5,40,40'])
    pieces = list(chat.ask(QUESTION, max_new_tokens=5))
    assert ''.join(pieces).strip() == chat.history[0].answer
    chat.mark(parse_region('arrow:2,2,30,30', 'blue'))
    list(chat.ask(QUESTION, max_new_tokens=5))
    assert [e.asked for e in chat.history] == [
        'what is the object within the red rectangle ?',
        'what is the object pointed to by the blue arrow ?',
    ]
    expected = draw_prompts(picture, [parse_region('rectangle:5,5,40,40')])
    assert chat.history[0].image.tobytes() == expected.tobytes() != chat.history[1].image.tobytes()
    turns = [
        Turn('user', '<image>\n' + chat.history[0].asked),
        Turn('assistant', chat.history[0].answer),
        Turn('user', chat.history[1].asked),
    ]
    assert ''.join(model.stream(turns, [chat.marked], 5)).strip() == chat.history[1].answer, (
        'the second turn did not see the first'
    )
    with pytest.raises(ValueError, match='outside'):
        chat.mark('rectangle:500,5,540,40')
    assert chat.prompts[0].kind == 'arrow', 'a refused marker must change nothing'
    assert chat.open(picture).history == [] and chat.prompts == ()


def test_too_long_a_conversation_is_refused_and_changes_nothing(model, picture):
    chat = Chat(model, picture)
    with pytest.raises(ChatError, match='reads at most 1024'):
        list(chat.ask('is there a circle ? ' * 400))
    assert chat.history == [] and list(chat.ask('is there a circle ?', max_new_tokens=3))


def test_breaking_off_frees_the_model(model, picture):
    before = threading.active_count()
    answer = Chat(model, picture).ask('what is this ?', max_new_tokens=900)
    next(answer)
    answer.close()
    assert not model._lock.locked() and threading.active_count() <= before


def test_sampling_follows_the_seed_and_leaves_the_global_generator_alone(model, picture):
    state = torch.get_rng_state()
    say = lambda seed: ''.join(
        model.stream([Turn('user', '<image>\nwhat ?')], [picture], 8, temperature=3.0, seed=seed)
    )
    assert say(1) == say(1) != say(2)
    assert torch.equal(torch.get_rng_state(), state)


def test_many_threads_one_model_no_mixed_answers(model):
    "Twenty questions at once: each gets the answer that it gets alone."
    asks = [
        f'<image>\nthere is a {c} {s} . what color is the {s} ?'
        for c in ('red', 'blue', 'green', 'purple')
        for s in ('circle', 'square', 'ring', '7', '4')
    ]
    shown = [Image.new('RGB', (64, 64), (12 * i, 0, 255 - 12 * i)) for i in range(20)]
    say = lambda i: ''.join(model.stream([Turn('user', asks[i])], [shown[i]], 8)).strip()
    alone = [say(i) for i in range(20)]
    with ThreadPoolExecutor(20) as pool:
        assert list(pool.map(say, range(20))) == alone
    assert len(set(alone)) >= 4, alone


# --------------------------------------------------------------------------------------------------
# terminal
def test_chat_command_streams_turns_from_a_pipe_and_saves_the_marked_picture(
    model, picture, tmp_path
):
    model.model.save_pretrained(tmp_path / 'run' / 'model')
    model.processor.save_pretrained(tmp_path / 'run' / 'model')
    picture.save(tmp_path / 'photo.png')
    words = [sys.executable, '-c', 'from vlmbench.run.cli import main; main()', 'chat']

    def call(*args, said=''):
        return subprocess.run(
            [*words, *map(str, args)],
            input=said,
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=os.environ | dict(COLUMNS='200'),
        )

    done = call(
        'run',
        '--image',
        'photo.png',
        '--region',
        'ellipse:5,5,40,40',
        '--color',
        'blue',
        '--max-new-tokens',
        5,
        '--device',
        'cpu',
        said=f'{QUESTION}\nand where is it ?\n/nonsense\n/image\n',
    )
    assert done.returncode == 0, done.stderr
    terms, *lines = done.stdout.splitlines()
    assert terms == 'run: base run: licence unknown'
    assert lines[:2] == [
        'marked picture: photo-marked.png',
        'marker 1: <region> = within the blue ellipse',
    ]
    chat = Chat(model, picture, [parse_region('ellipse:5,5,40,40', 'blue')])
    for q in (QUESTION, 'and where is it ?'):
        list(chat.ask(q, max_new_tokens=5))
    assert [
        x.removeprefix('run> ').removesuffix(' [cut at --max-new-tokens]')
        for x in lines
        if x.startswith('run> ')
    ] == [e.answer for e in chat.history]
    assert 'refused: /nonsense' in done.stdout
    assert 'refused: /image needs more' in done.stdout
    assert np.asarray(Image.open(tmp_path / 'photo-marked.png')).tobytes() == chat.marked.tobytes()


@pytest.mark.parametrize(
    'args, why',
    [
        (('--image', 'photo.png', '--region', 'star:1,2'), 'kinds are'),
        (('--image', 'none.png'), 'missing'),
        (('--region', 'point:1,2'), 'add --image'),
        (
            (
                '--image',
                'photo.png',
                '--region',
                'point:1,2',
                '--region',
                'point:3,4',
                '--region',
                'point:5,6',
                '--color',
                'red',
                '--color',
                'blue',
            ),
            '2 colours for 3',
        ),
        (('--device', 'tpu'), 'use one of cuda'),
        (('--load-4bit', '--load-8bit'), 'exclude each other'),
        ((), 'no config.json'),
        (('--image', 'photo.png', '--color', 'pink', '--region', 'point:1,2'), 'colours are red'),
        (('--image', 'photo.png', '--color', 'red'), 'add --region'),
    ],
)
def test_chat_command_refuses_in_one_line(args, why, picture, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picture.save('photo.png')
    Path('model').mkdir()
    if args and args[0] in ('--device', '--load-4bit'):
        Path('model/config.json').write_text(json.dumps(dict(model_type='vlmbench')))
    done = CliRunner().invoke(
        app, ['chat', 'model', *args, '--question', 'x'], standalone_mode=False
    )
    assert (
        isinstance(done.exception, ParameterError)
        and why in str(done.exception)
        and done.exception.exit_code == 2
    )
    assert not list(tmp_path.glob('*marked*')), 'a refused command must write nothing'


@pytest.mark.parametrize(
    'args, why',
    [
        (('--save', 'photo.png', '--image', 'photo.png'), 'is the picture itself'),
        (('--save', './sub/../photo.png', '--image', 'photo.png'), 'is the picture itself'),
        (('--save', 'x.jpg', '--image', 'photo.png'), 'end the name in .png'),
        (
            ('--question', 'where is <region1> ?', '--image', 'photo.png'),
            'there are 1 markers, up to <region0>',
        ),
        (('--question', ' '), 'empty'),
        (('--image', 'http://127.0.0.1:9/x.png'), 'unreachable: http://127.0.0.1:9/x.png'),
    ],
)
def test_chat_command_refuses_before_the_model_loads(args, why, picture, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picture.save('photo.png')
    Path('sub').mkdir()
    before = Path('photo.png').read_bytes()
    monkeypatch.setattr(ChatModel, 'load', lambda *a, **kw: pytest.fail('the model was loaded'))
    more = ('--region', 'point:3,3') if '--image' in args and args[0] != '--image' else ()
    done = CliRunner().invoke(
        app, ['chat', 'model', *args, *more, '--question', 'x'], standalone_mode=False
    )
    assert isinstance(done.exception, ParameterError) and why in str(done.exception)
    assert Path('photo.png').read_bytes() == before and sorted(
        p.name for p in Path('.').iterdir()
    ) == ['photo.png', 'sub']


def test_a_picture_that_cannot_be_written_is_one_line(model, picture, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picture.save('photo.png')
    Path('file').write_text('')
    monkeypatch.setattr(ChatModel, 'load', lambda *a, **kw: model)
    done = CliRunner().invoke(
        app,
        ['chat', 'm', '--image', 'photo.png', '--save', 'file/x.png', '--question', 'what ?'],
        standalone_mode=False,
    )
    assert isinstance(done.exception, ParameterError) and 'file' in str(done.exception)
    chat = Chat(model, 'photo.png', ['point:3,3'])
    said = io.StringIO()
    converse(chat, ['/save photo.png', '/save ok.png'], said)
    assert (
        'refused: photo.png is the picture itself' in said.getvalue() and Path('ok.png').is_file()
    )


def test_pictures_from_the_web_are_fetched_within_the_limit(picture):
    class Page(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == '/a.png' else 404)
            self.end_headers()
            self.wfile.write(png(picture))

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(('127.0.0.1', 0), Page) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        at = f'http://127.0.0.1:{web.server_port}/'
        assert (
            Chat(None, open_picture(at + 'a.png'), ['point:3,3']).image.tobytes()
            == picture.tobytes()
        )
        for name, why in (('a.png', 'more than 0.001 MB'), ('b.png', 'unreachable.*404')):
            with pytest.raises(ImageError, match=why):
                open_picture(at + name, 0.001)
        web.shutdown()
    assert open_picture('x.png') == 'x.png' and free_name(at + 'a.png?b=c').name == 'a-marked.png'


# system, sys.platform, devices that may be named there ('' is the one that is found)
MACHINES = [('Darwin', 'darwin', ['', 'mps']), ('Windows', 'win32', [''])]


@pytest.mark.parametrize('flag', ['--load-4bit', '--load-8bit'])
@pytest.mark.parametrize('system, name, devices', MACHINES)
def test_small_weights_are_refused_where_there_is_no_cuda(
    system, name, devices, flag, tmp_path, monkeypatch
):
    "On a Mac and on Windows as they usually are, `chat` and `serve` say so before they load."
    monkeypatch.setattr(sys, 'platform', name)
    monkeypatch.setattr(platform, 'system', lambda: system)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: 'mps' in devices)
    (tmp_path / 'config.json').write_text(json.dumps(dict(model_type='vlmbench')))
    for command in (['chat', '--question', 'x'], ['serve']):
        for device in devices:
            place = ['--device', device] if device else []
            done = CliRunner().invoke(app, [*command, str(tmp_path), flag, *place])
            assert isinstance(done.exception, ParameterError) and done.exception.exit_code == 2
            said = str(done.exception)
            assert f'{flag} needs a CUDA device' in said and '\n' not in said


@pytest.mark.parametrize('option, value', [('--max-pixels', '-1'), ('--max-upload-mb', 'nan')])
def test_limits_that_are_none_are_refused_in_one_line(option, value):
    done = CliRunner().invoke(app, ['serve', 'm', option, value])
    assert isinstance(done.exception, ParameterError) and 'must be above 0' in str(done.exception)


def test_a_port_that_is_none_is_refused():
    done = CliRunner().invoke(app, ['serve', 'm', '--port', '99999'])
    assert done.exit_code == 2 and '65535' in done.output
    page = type(
        'Page', (), dict(launch=lambda self, **kw: socket.socket().bind(('127.0.0.1', 99999)))
    )()
    with pytest.raises(ChatError, match='99999 cannot be bound.*--port'):
        launch(page, Limits(), port=99999)


@pytest.mark.parametrize('bits', ['load_4bit', 'load_8bit'])
def test_quantised_loading_without_cuda_or_library_names_the_way_out(bits, monkeypatch):
    from vlmbench.demo.chat import quantization

    off = dict(load_4bit=False, load_8bit=False)
    if not torch.cuda.is_available():
        with pytest.raises(ChatError, match='needs a CUDA device.*--device cpu'):
            quantization(**off | {bits: True})
    monkeypatch.setitem(sys.modules, 'bitsandbytes', None)
    with pytest.raises(ChatError, match=r'needs bitsandbytes.*vlmbench\[quant\]'):
        quantization(**off | {bits: True}, device='cpu')


def test_weights_may_be_spread_by_a_device_map(model, picture, tmp_path):
    model.model.save_pretrained(tmp_path)
    model.processor.save_pretrained(tmp_path)
    spread = ChatModel.load(
        tmp_path,
        device_map={'model.vision': 'cpu', 'model.language_model': 'cpu', 'lm_head': 'cpu'},
    )
    ask = [Turn('user', '<image>\nwhat is this ?')]
    assert list(spread.stream(ask, [picture], 6)) == list(model.stream(ask, [picture], 6))


@pytest.mark.parametrize(
    'missing, call',
    [
        ('gradio', lambda: build_page({})),
        ('fastapi', lambda: add_command('any', 'http://127.0.0.1:1')),
        ('anywidget', marker_board),
        ('ipywidgets', lambda: PointAndAsk(None)),
    ],
)
@pytest.mark.fault('vip-13')
def test_a_missing_extra_is_named(missing, call, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    _widget_class.cache_clear()
    with pytest.raises(ImportError, match=r"pip install 'vlmbench\[serve\]'"):
        call()


# --------------------------------------------------------------------------------------------------
# server
class Slow(ChatModel):
    "A model that answers when it is let go; counts how many of its answers are under way."

    def stream(self, turns, images=(), **settings):
        self.waiting.set()
        assert self.go.wait(60)
        yield 'done '
        return 'stop'


@pytest.fixture(scope='module')
def gradio(tmp_path_factory):
    folder = tmp_path_factory.mktemp('uploads')
    old = os.environ.get('GRADIO_TEMP_DIR')
    os.environ['GRADIO_TEMP_DIR'] = str(folder)
    yield pytest.importorskip('gradio', reason='gradio is not installed (extra: serve)')
    if old is None:
        del os.environ['GRADIO_TEMP_DIR']
    else:
        os.environ['GRADIO_TEMP_DIR'] = old


def launched(models, limits):
    page = build_page(models, limits)
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    return page, launch(page, limits, port=port).rstrip('/')


@pytest.fixture(scope='module')
def server(gradio, model):
    "A running page with two models, small limits."
    page, url = launched(
        dict(one=model, two=tiny('two', 1)),
        Limits(queue=25, max_upload_mb=1, max_pixels=1_000_000, max_new_tokens=16),
    )
    yield url
    page.close()


class Tab:
    "What one browser tab does, over plain HTTP."

    count = 0

    def __init__(self, url):
        Tab.count += 1
        self.url, self.session, self.http = (
            url,
            f'tab{Tab.count}-{os.getpid()}',
            httpx.Client(timeout=60, trust_env=False),
        )
        config = self.http.get(f'{url}/config').json()
        self.fns = {d['api_name']: d['id'] for d in config['dependencies'] if d['api_name']}

    def upload(self, data, name='a.png'):
        return self.http.post(f'{self.url}/gradio_api/upload', files=dict(files=(name, data)))

    def call(self, name, *data):
        return self.http.post(
            f'{self.url}/gradio_api/run/{name}',
            json=dict(data=list(data), session_hash=self.session, fn_index=self.fns[name]),
        )

    def open(self, data, name='a.png'):
        up = self.upload(data, name)
        if up.status_code != 200:
            return up
        return self.call(
            'open_picture',
            dict(path=up.json()[0], orig_name=name, meta=dict(_type='gradio.FileData')),
            None,
        )

    def join(self, question, marks=()):
        return self.http.post(
            f'{self.url}/gradio_api/queue/join',
            json=dict(
                data=[question, json.dumps(list(marks)), 8, 0, 1, None],
                fn_index=self.fns['ask'],
                session_hash=self.session,
                trigger_id=None,
            ),
        )

    def events(self):
        with self.http.stream(
            'GET', f'{self.url}/gradio_api/queue/data', params=dict(session_hash=self.session)
        ) as r:
            for line in r.iter_lines():
                if line.startswith('data:'):
                    event = json.loads(line[5:])
                    yield event
                    if event['msg'] in ('process_completed', 'close_stream'):
                        return

    def ask(self, question, marks=()):
        "The last messages of the left side, and how many steps it took to get there."
        assert self.join(question, marks).status_code == 200
        events = list(self.events())
        assert events[-1]['success'], events[-1]
        return events


def test_twenty_at_once_nothing_lost_nothing_mixed(server, model):
    "Twenty tabs, each with its own picture, marker and question, ask in the same moment."
    tabs = [Tab(server) for _ in range(20)]
    colours = [(12 * i, 255 - 12 * i, 7 * i) for i in range(20)]
    facts = [
        (c, s)
        for c in ('red', 'blue', 'green', 'purple')
        for s in ('circle', 'square', 'ring', '7', '4')
    ]
    mark = dict(kind='rectangle', numbers=[4, 4, 40, 40], color='red', alpha=200)

    def one(i):
        assert tabs[i].open(png(Image.new('RGB', (64, 64), colours[i]))).status_code == 200
        events = tabs[i].ask(
            f'there is a {facts[i][0]} {facts[i][1]} <region> . what color is the {facts[i][1]} ?',
            [mark],
        )
        return events

    with ThreadPoolExecutor(20) as pool:
        got = list(pool.map(one, range(20)))
    answers = []
    for i, events in enumerate(got):
        chat = Chat(
            model,
            Image.new('RGB', (64, 64), colours[i]),
            [parse_region('rectangle:4,4,40,40', 'red', 200)],
        )
        list(
            chat.ask(
                f'there is a {facts[i][0]} {facts[i][1]} <region> . what color is the '
                f'{facts[i][1]} ?',
                max_new_tokens=8,
            )
        )
        said = json.dumps(events)
        assert chat.history[0].asked in said, f'tab {i} was shown another question'
        others = [f'there is a {c} {s} within' for j, (c, s) in enumerate(facts) if j != i]
        assert not any(o in said for o in others), f'tab {i} saw the question of another'
        answers.append(chat.history[0].answer)
        assert json.dumps(answers[-1])[1:-1] in said, (i, answers[-1])
    assert len(set(answers)) >= 4, answers


def chunk(kind, data):
    return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))


def bomb(side=40_000):
    "A PNG of a few kB that would take gigabytes."
    rows = zlib.compress(bytes(2_000_000), 9)
    return (
        b'\x89PNG\r\n\x1a\n'
        + chunk(b'IHDR', struct.pack('>IIBBBBB', side, side, 8, 2, 0, 0, 0))
        + chunk(b'IDAT', rows)
        + chunk(b'IEND', b'')
    )


def text_bomb():
    "A small picture with a compressed comment of 200 MB."
    whole = png(Image.new('RGB', (8, 8)))
    return whole[:33] + chunk(b'zTXt', b'c\0\0' + zlib.compress(bytes(200_000_000), 9)) + whole[33:]


HOSTILE = {
    'bomb.png': (bomb, 'too large'),
    'text.png': (text_bomb, 'refused'),
    'drawing.svg': (
        lambda: b'<svg xmlns="http://www.w3.org/2000/svg"><script>1</script></svg>',
        'SVG',
    ),
    'svg-in-disguise.png': (
        lambda: b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>',
        'SVG',
    ),
    'page.html': (lambda: b'<!doctype html><p>hi', 'HTML page'),
    'words.png': (lambda: b'not a picture at all', 'no image format'),
    'empty.png': (lambda: b'', 'empty'),
    'cut.png': (lambda: png(Image.effect_noise((300, 300), 50))[:4000], 'refused'),
    'zip.jpg': (lambda: b'PK\3\4' + bytes(100), 'zip archive'),
    'wide.png': (lambda: png(Image.new('RGB', (5000, 300))), '5000 x 300'),
    'p.pdf': (lambda: b'%PDF-1.7', 'PDF'),
}


@pytest.mark.parametrize('name', HOSTILE)
def test_hostile_uploads_are_refused_with_a_reason(server, name):
    make, why = HOSTILE[name]
    tab = Tab(server)
    began = time.monotonic()
    done = tab.open(make(), name)
    assert (
        'This picture was refused' in done.text
        and why in done.text
        and '"picture"' not in done.text
    ), done.text[:300]
    assert time.monotonic() - began < 20
    assert tab.open(png(Image.new('RGB', (8, 8)))).status_code == 200, 'the tab must go on working'


def test_an_upload_over_the_limit_is_cut_off(server):
    done = Tab(server).upload(os.urandom(1_500_000))
    assert done.status_code == 413


def test_paths_lead_nowhere(server, tmp_path):
    secret = tmp_path / 'secret.png'
    secret.write_bytes(png(Image.new('RGB', (8, 8), 'red')))
    tab = Tab(server)
    file = lambda **kw: dict(dict(orig_name='a.png', meta=dict(_type='gradio.FileData')), **kw)
    hits = []
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        s.listen()
        s.settimeout(0.2)
        elsewhere = f'http://127.0.0.1:{s.getsockname()[1]}/x.png'
        for path in (
            str(secret),
            '/etc/passwd',
            '../../../../etc/passwd',
            str(Path(__file__)),
            elsewhere,
            'file:///etc/passwd',
            'a\0b',
        ):
            for fields in (dict(path=path), dict(path=path, url=elsewhere)):
                done = tab.call('open_picture', file(**fields), None)
                assert (
                    done.status_code != 200 or 'refused' in done.text
                ) and 'root:' not in done.text, (path, done.text[:200])
        try:
            hits.append(s.accept())
        except TimeoutError:
            hits.append(None)
    assert hits == [None], 'the server fetched an address that a visitor named'
    up = tab.upload(png(Image.new('RGB', (8, 8))), '../../../evil.png').json()[0]
    assert (
        Path(up).resolve().is_relative_to(Path(os.environ['GRADIO_TEMP_DIR']).resolve())
        and Path(up).name == 'evil.png'
    )
    for path in (str(secret), '/etc/passwd', '/../../etc/passwd', '..%2f..%2fetc%2fpasswd'):
        assert tab.http.get(f'{server}/gradio_api/file={path}').status_code in (403, 404)


@pytest.mark.parametrize(
    'question, marks, why',
    [
        ('what is <region> ?', [], 'nothing is marked yet'),
        ('', [], 'empty'),
        ('x' * 5000, [], '2,000'),
        ('a <image> b', [], 'leave <image> out'),
        ('what ?', [dict(kind='star', numbers=[1])], 'kinds are'),
        ('what ?', [dict(kind='point', numbers=[900, 900])], 'outside'),
        ('what ?', [dict(kind='point', numbers=[1, 1])] * 99, 'at most 24'),
    ],
)
def test_bad_questions_are_refused_with_a_reason(server, question, marks, why):
    tab = Tab(server)
    assert tab.open(png(Image.new('RGB', (64, 64)))).status_code == 200
    assert tab.join(question, marks).status_code == 200
    events = list(tab.events())
    assert 'Refused' in json.dumps(events) and why in json.dumps(events), events[-1]


def test_a_full_queue_refuses_politely_and_loses_no_one(gradio, model):
    slow = Slow(model.model, model.processor, 'slow')
    slow.waiting, slow.go = threading.Event(), threading.Event()
    page, url = launched(dict(slow=slow), Limits(queue=2))
    try:
        tabs = [Tab(url) for _ in range(5)]
        assert tabs[0].join('first ?').status_code == 200 and slow.waiting.wait(20)
        codes = [t.join('next ?') for t in tabs[1:]]
        assert [c.status_code for c in codes] == [200, 200, 503, 503]
        assert (
            'all 2 places in the queue are taken' in codes[2].text
            and 'press Ask again' in codes[2].text
        )
        slow.go.set()
        with ThreadPoolExecutor(3) as pool:
            ends = list(pool.map(lambda t: list(t.events()), tabs[:3]))
        assert all(e[-1]['success'] and 'done' in json.dumps(e) for e in ends)
        tabs[3].ask('again ?')
    finally:
        slow.go.set()
        page.close()


def test_the_server_keeps_to_itself(gradio):
    s = launch_settings(Limits())
    assert (
        s['server_name'] == '127.0.0.1'
        and s['share'] is False
        and s['allowed_paths'] == []
        and s['ssr_mode'] is False
    )
    assert os.environ['GRADIO_ANALYTICS_ENABLED'] == 'False'


class Endless(ChatModel):
    "A model that never ends an answer by itself."

    def stream(self, turns, images=(), **settings):
        self.closed = False
        try:
            while True:
                time.sleep(0.01)
                yield 'and '
        finally:
            self.closed = True


def test_stopping_ends_both_sides_and_leaves_the_history_as_it_was(model, picture):
    sides = {n: Endless(model.model, model.processor, n) for n in ('one', 'two')}
    visit = Visit(sides, Limits(), picture)
    for i, state in enumerate(visit.ask('what is this ?', '[]', 16)):
        if i == 4:
            visit.halt.set()
    for side, m in zip(('left', 'right'), sides.values()):
        assert visit.chats[side].history == [] and m.closed
        assert [x['role'] for x in state[side]] == [
            'user',
            'assistant',
            'assistant',
        ] and 'Stopped' in state[side][-1]['content']


def test_palette_and_kinds_reach_the_page():
    settings = board_settings()
    assert list(settings['kinds']) == list(MARKERS) and list(settings['palette']) == list(PALETTE)
    assert all(f"'{k}'" in board_js() or f'{k}:' in board_js() for k in MARKERS), (
        'a kind without an icon'
    )
