"""The list of models and the workers that answer for it: heartbeats, the shortest queue, tokens,
and workers that die. Their processes and the page are in test_demo_browser.py."""

import hashlib
import json
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

pytest.importorskip('fastapi', reason='fastapi is not installed (extra: serve)')

from fastapi import FastAPI
from fastapi.testclient import TestClient
from starlette.routing import Mount

from vlmbench.data.overlay import MARKERS
from vlmbench.data.scene import WorldConfig, make_scene
from vlmbench.data.world import asset_path, render
from vlmbench.demo.api import serve_app
from vlmbench.demo.chat import ChatModel
from vlmbench.demo.controller import Controller, build_controller
from vlmbench.demo.remote import Worker
from vlmbench.demo.visit import SIDES, Limits, Visit
from vlmbench.demo.votes import Votes
from vlmbench.demo.worker import Heart, build_worker
from vlmbench.models.vlm import build_vlm

QUESTION = 'how many objects are there ?'


@pytest.fixture(scope='module')
def model():
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return ChatModel.load(asset_path('vlm'), device='cpu', name='tiny')


@pytest.fixture
def picture():
    return render(make_scene(WorldConfig(), 'test', 7))


class Network(httpx.BaseTransport):
    """Applications by host name, in this process. `dead` hosts refuse; an answer of one that is
    `dying` breaks off after its first word."""

    def __init__(self, **apps):
        self.apps = {host: TestClient(app) for host, app in apps.items()}
        self.dead, self.dying, self.asked = set(), set(), []

    def handle_request(self, request):
        host = request.url.host
        self.asked.append(host)
        if host in self.dead:
            raise httpx.ConnectError('refused')
        sent = dict(content=request.read(), headers=dict(request.headers))
        reply = self.apps[host].request(request.method, str(request.url), **sent)
        body = [reply.content]
        if host in self.dying and reply.headers['content-type'].startswith('text/event-stream'):
            body = self.broken(reply.content)
        return httpx.Response(reply.status_code, content=iter(body))

    @staticmethod
    def broken(content):
        for event in content.split(b'\n\n'):
            yield event + b'\n\n'
            if json.loads(event.removeprefix(b'data: '))['choices'][0]['delta'].get('content'):
                raise httpx.ReadError('connection reset by peer')


def listed(network, *names, **settings):
    "A controller that knows a worker at each host; `names` in pairs of host and model."
    controller = Controller(http=httpx.Client(transport=network), **settings)
    for host, name in names:
        controller.beat(Worker(f'id-of-{host}', name, f'http://{host}'))
    network.asked.clear()
    return controller


def last(visit, side):
    return visit.messages(side)[-1]['content']


# --------------------------------------------------------------------------------------------------
# the list
def test_who_is_silent_for_two_heartbeats_leaves_and_comes_back(model):
    now = [100.0]
    network = Network(a=build_worker(model))
    controller = listed(network, clock=lambda: now[0])
    worker = Worker('id-of-a', 'tiny', 'http://a')
    assert controller.beat(worker) == 15.0
    for seconds, there in ((29.9, ['tiny']), (0.2, [])):
        now[0] += seconds
        assert list(controller) == there
    assert 'tiny' not in controller
    controller.beat(worker)
    assert list(controller) == ['tiny'] and network.asked == ['a', 'a'], 'it is looked at again'
    now[0] += 15
    controller.beat(worker)
    assert network.asked == ['a', 'a'], 'a worker that is known is not asked again'


def test_local_models_stand_beside_remote_ones(model, picture):
    network = Network(a=build_worker(model))
    controller = listed(network, local=dict(own=model))
    controller.beat(Worker('id-of-a', 'tiny', 'http://a'))
    assert list(controller) == ['own', 'tiny'] and controller['own'] is model
    visit = Visit(controller, Limits(), picture)
    assert [chat.model.name for chat in visit.active.values()] == ['tiny'] * 2  # own is named so
    assert [type(chat.model).__name__ for chat in visit.active.values()] == [
        'ChatModel',
        'RemoteModel',
    ]
    list(visit.ask(QUESTION, '[]', 8))
    assert last(visit, 'left') == last(visit, 'right') == 'three'
    with pytest.raises(ValueError, match='a model own of its own: give another --name'):
        controller.beat(Worker('id-of-b', 'own', 'http://a'))


def test_the_shortest_queue_is_asked(model, picture):
    network = Network(a=build_worker(model), b=build_worker(model))
    controller = listed(network, ('a', 'tiny'), ('b', 'tiny'))

    def asked(**queues):
        for host, queue in queues.items():
            controller.beat(Worker(f'id-of-{host}', 'tiny', f'http://{host}', queue=queue))
        with controller.turn('tiny') as worker:
            return worker.id

    assert asked(a=2, b=1) == 'id-of-b' and asked(a=0, b=1) == 'id-of-a'
    assert {asked(a=0, b=0), asked(a=0, b=0)} == {'id-of-a', 'id-of-b'}, 'equal ones take turns'
    # what is under way here counts at once, without waiting for a heartbeat
    with controller.turn('tiny') as first, controller.turn('tiny') as second:
        assert {first.id, second.id} == {'id-of-a', 'id-of-b'}
    assert {worker.queue for worker in controller.workers()} == {0}
    with pytest.raises(ValueError, match='messages'):  # no question at all
        list(controller['tiny'].stream([]))
    assert {worker.queue for worker in controller.workers()} == {0}, 'a refusal is counted out'


def test_a_worker_says_how_many_wait(model, picture):
    app = build_worker(model)
    client, batcher = TestClient(app), app.state.batchers['tiny']
    body = dict(model='tiny', messages=[dict(role='user', content='what is it ?')], max_tokens=2)
    with model._lock, ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(client.post, '/v1/chat/completions', json=body) for _ in range(3)]
        end = time.monotonic() + 20
        while batcher.pending < 3 and time.monotonic() < end:
            time.sleep(0.02)
        assert batcher.pending == 3
        model._lock.release()
        assert [reply.result().status_code for reply in waiting] == [200] * 3
        model._lock.acquire()
    assert batcher.pending == 0


# --------------------------------------------------------------------------------------------------
# what reaches a worker
@pytest.mark.parametrize('kind', MARKERS)
def test_markers_reach_a_worker_as_they_reach_a_local_model(kind, model, picture, monkeypatch):
    from vlmbench.demo import api

    given = []

    def recorded(model, turns, images, *settings):
        given.append((list(turns), [image.tobytes() for image in images], settings))
        return question_for(model, turns, images, *settings)

    question_for = api.question_for
    monkeypatch.setattr(api, 'question_for', recorded)
    controller = listed(Network(a=build_worker(model)), ('a', 'tiny'), local=dict(own=model))
    visit = Visit(controller, Limits(), picture)
    mark = dict(kind=kind, numbers=[5, 5, 40, 40], color='blue', alpha=77)
    list(visit.ask('what is <region> ?', json.dumps([mark]), 4, 1.5, 0.9))
    local, remote = (visit.chats[side] for side in SIDES)
    (turns, images, settings), asked = given[0], local.history[-1].asked
    assert [turn.text for turn in turns] == [f'<image>\n{asked}'] and 'blue' in asked
    assert images == [local.marked.tobytes()] != [picture.tobytes()]
    assert settings == (4, 1.5, 0, 0.9)
    assert remote.history[-1].answer == local.history[-1].answer
    (mine,), (theirs,) = (m.encoder_view(local.marked) for m in (model, remote.model))
    assert mine.tobytes() == theirs.tobytes()


def test_a_conversation_and_its_refusals_reach_the_page(model, picture):
    network = Network(a=build_worker(model, max_new_tokens=3))
    visit = Visit(listed(network, ('a', 'tiny')), Limits(max_question=99_000), picture)
    chat = visit.chats['left']
    list(visit.ask(QUESTION, '[]', 8))
    state = list(visit.ask('is there a zebra ?', '[]', 1))[-1]
    assert 'was cut at the longest length' in state['left'][-1]['content']
    assert 'not know: zebra.' in state['left'][-1]['content'] and chat.history[0].answer == 'three'
    state = list(visit.ask('what ' * 9999, '[]', 2))[-1]
    assert 'reads at most' in state['left'][-1]['content'] and len(chat.history) == 2


# --------------------------------------------------------------------------------------------------
# workers that die
def test_a_dead_worker_is_passed_over(model, picture):
    network = Network(a=build_worker(model), b=build_worker(model))
    controller = listed(network, ('a', 'tiny'), ('b', 'tiny'))
    network.dead.add('a')
    visit = Visit(controller, Limits(), picture)
    list(visit.ask(QUESTION, '[]', 8))
    assert last(visit, 'left') == 'three' and [w.id for w in controller.workers()] == ['id-of-b']


def test_a_worker_that_dies_while_answering_is_told_and_asked_again(model, picture):
    other = ChatModel(model.model, model.processor, 'other')
    network = Network(a=build_worker(model), b=build_worker(model), c=build_worker(other))
    controller = listed(network, ('a', 'tiny'), ('c', 'other'))
    network.dying.add('a')
    visit = Visit(controller, Limits(), picture)
    state = list(visit.ask(QUESTION, '[]', 8))[-1]
    told = state['left'][-1]['content']
    assert told == (
        'This model could not answer: the worker that was answering for tiny is gone: ask again'
    ), told
    assert state['right'][-1]['content'] == 'three' and visit.answered == {'right'}
    assert list(controller) == ['other'] and not visit.comparable
    state = list(visit.again(8))[-1]
    assert 'no worker answers for tiny any more: reload the list' in state['left'][-1]['content']
    controller.beat(Worker('id-of-b', 'tiny', 'http://b'))
    state = list(visit.again(8))[-1]
    assert [state[side][-1]['content'] for side in SIDES] == ['three', 'three']
    assert visit.comparable


def test_stopping_frees_the_worker(model, picture):
    parts = asset_path('llm'), asset_path('vit'), dict(projector='mlp2x_gelu')
    endless = ChatModel(*build_vlm(*parts, template='world', seed=1), 'endless')
    endless.stops = []
    app = build_worker(endless)
    server, port = serve_app(app, port=0)
    controller = Controller()
    controller.beat(Worker('id-of-a', 'endless', f'http://127.0.0.1:{port}'))
    visit = Visit(controller, Limits(), picture)
    for i, state in enumerate(visit.ask(QUESTION, '[]', 1024)):
        if i == 4:
            visit.halt.set()
    assert 'Stopped' in state['left'][-1]['content'] and visit.chats['left'].history == []
    batcher, end = app.state.batchers['endless'], time.monotonic() + 20
    while batcher.pending and time.monotonic() < end:
        time.sleep(0.05)
    assert controller.workers()[0].queue == 0 and batcher.pending == 0
    assert endless._lock.acquire(timeout=20), 'the worker still writes'
    server.should_exit = True


# --------------------------------------------------------------------------------------------------
# the page
def test_the_page_follows_the_list(model, picture, tmp_path):
    "What its events return: the choices of both sides, what is visible, and the votes."
    pytest.importorskip('gradio', reason='gradio is not installed (extra: serve)')
    from vlmbench.demo.serve import _Handlers

    other = ChatModel(model.model, model.processor, 'other')
    now = [0.0]
    network = Network(a=build_worker(model), c=build_worker(other))
    controller = listed(network, clock=lambda: now[0])
    do = _Handlers(controller, Limits(), [picture], Votes(tmp_path))
    visit, board, *page = do.start('http://here:10000')

    def seen(page):
        lists = page[: len(do.lists(visit, ''))]
        (left, right), (column, _) = lists[:2], lists[2:4]
        return left.choices, left.value, right.value, column.visible, lists[-1]

    none = [('(none)', '(none)')]
    *empty, told = seen(page)
    assert empty == [none, '(none)', '(none)', False] and '--to http://here:10000' in told
    *_, refused = do.ask(QUESTION, '[]', 8, 0.2, 0.7, visit)
    assert 'Refused: no model is chosen' in str(refused)
    for host, name in (('a', 'tiny'), ('c', 'other')):
        controller.beat(Worker(f'id-of-{host}', name, f'http://{host}'))
    visit, *page = do.reload(visit, 'http://here:10000')
    *full, told = seen(page)
    names = [('tiny', 'tiny'), ('other', 'other')]
    assert full == [names, 'tiny', 'other', True] and '2 on the list' in told
    *_, last = do.ask(QUESTION, '[]', 8, 0.2, 0.7, visit)
    vote = do.controls(visit)[3]
    assert vote.interactive and vote.visible
    visit, *controls = do.vote('tie', visit)
    assert not controls[3].interactive and controls[-1].value == 'Kept: Tie. Thank you.'
    (line,) = map(json.loads, (tmp_path / 'votes.jsonl').read_text().splitlines())
    assert line['models'] == dict(A='tiny', B='other') and line['answers']['A'] == 'three'
    assert line['picture_sha256'] == hashlib.sha256(picture.convert('RGB').tobytes()).hexdigest()
    now[0] = 31.0
    controller.beat(Worker('id-of-c', 'other', 'http://c'))
    visit, *page = do.reload(visit, 'http://here:10000')
    *left, told = seen(page)
    assert left[1:] == ['(none)', 'other', True] and '1 on the list' in told


# --------------------------------------------------------------------------------------------------
# tokens
def test_a_token_is_asked_for_everywhere_and_told_nowhere(model, picture, capfd):
    token = 'a-long-secret-word'
    network = Network(node7=build_worker(model, token=token))
    controller = listed(network, token=token)
    page = FastAPI(routes=[Mount('/workers', build_controller(controller))])
    away = TestClient(page, client=('10.0.0.7', 50000))

    class Line(httpx.BaseTransport):
        def handle_request(self, request):
            sent = dict(content=request.read(), headers=dict(request.headers))
            reply = away.request(request.method, str(request.url), **sent)
            return httpx.Response(reply.status_code, content=reply.content)

    card = dict(id='0' * 32, name='tiny', port=40000, address='http://node7')
    heart = lambda token: Heart(
        'http://page', card, lambda: 0, token, httpx.Client(transport=Line())
    )
    for wrong in (None, 'another', token[:-1]):
        with pytest.raises(
            ValueError, match='http://page refuses: the token is missing'
        ) as refused:
            heart(wrong).first()
        assert token not in str(refused.value)
    assert heart(token).first() == 15.0
    visit = Visit(controller, Limits(), picture)
    list(visit.ask(QUESTION, '[]', 8))
    assert last(visit, 'left') == 'three'
    body = dict(model='tiny', messages=[dict(role='user', content='what ?')])
    for path in ('/v1/chat/completions', '/v1/reading'):
        reply = network.apps['node7'].post(path, json=body)
        assert reply.status_code == 401 and token not in reply.text
    assert network.apps['node7'].get('/v1/models').status_code == 401
    # a page that knows another token is refused by the worker, in words
    controller.token = 'another'
    state = list(visit.ask(QUESTION, '[]', 8))[-1]
    assert 'the token (API key) is missing or is another one' in state['left'][-1]['content']
    assert token not in ''.join(capfd.readouterr())
