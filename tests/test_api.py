"""OpenAI's own client asks a served model: whole answers, streams, pictures with markers, refusals,
and several questions at once, over a real socket."""

import base64
import io
import threading
import time
import warnings

import pytest

import vlmbench
from vlmbench.data.scene import WorldConfig, make_scene
from vlmbench.data.world import asset_path, render
from vlmbench.demo import batches
from vlmbench.demo.api import serve_api


openai = pytest.importorskip('openai')
QUESTION = 'how many objects are there ?'


@pytest.fixture(scope='module')
def served():
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        model = vlmbench.load(asset_path('vlm'), device='cpu')
    server, address = serve_api(dict(tiny=model), port=0, max_new_tokens=8)
    yield model, openai.OpenAI(base_url=address, api_key='none', max_retries=0)
    server.should_exit = True


def picture(number=7):
    return render(make_scene(WorldConfig(), 'test', number))


def seeing(url, *others):
    "A message of the user with the picture at `url`, and `others` parts."
    return [dict(role='user', content=[dict(type='image_url', image_url=dict(url=url)), *others])]


def messages(text, image=None):
    part = dict(type='text', text=text)
    if image is None:
        return [dict(role='user', content=[part])]
    file = io.BytesIO()
    image.save(file, 'PNG')
    encoded = base64.b64encode(file.getvalue()).decode()
    return seeing(f'data:image/png;base64,{encoded}', part)


def ask(client, text, image=None, **settings):
    return client.chat.completions.create(model='tiny', messages=messages(text, image), **settings)


def test_a_whole_answer_is_the_models(served):
    model, client = served
    reply = ask(client, QUESTION, picture())
    assert reply.choices[0].message.content == model.ask(picture(), QUESTION, max_new_tokens=8)
    assert reply.choices[0].finish_reason == 'stop'
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    (card,) = client.models.list()
    assert card.id == 'tiny' and card.licence == model.licence != ''


def test_a_stream_says_the_same(served):
    model, client = served
    usage = dict(include_usage=True)
    chunks = list(ask(client, QUESTION, picture(), stream=True, stream_options=usage))
    pieces = [c.choices[0].delta.content or '' for c in chunks if c.choices]
    assert ''.join(pieces).strip() == model.ask(picture(), QUESTION, max_new_tokens=8)
    assert chunks[-1].usage.completion_tokens >= 1
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == 'stop'


def test_markers_and_text_alone(served):
    model, client = served
    region, question = ['rectangle:2,2,40,40'], 'what is the object <region> ?'
    marked = ask(client, question, picture(), extra_body=dict(regions=region))
    wanted = model.ask(picture(), question, region, max_new_tokens=8)
    assert marked.choices[0].message.content == wanted
    assert ask(client, 'what is it ?').choices[0].message.content == model.ask(
        None, 'what is it ?', max_new_tokens=8
    )


def test_a_cut_answer_says_so(served):
    _, client = served
    reply = ask(client, QUESTION, picture(), max_tokens=1)
    assert (reply.usage.completion_tokens, reply.choices[0].finish_reason) == (1, 'length')


def test_questions_that_wait_are_answered_together(served):
    model, client = served
    alone = [model.ask(picture(n), QUESTION, max_new_tokens=8) for n in range(5)]
    replies = {}

    def read(number):
        draw = dict(temperature=1.5, seed=3) if number == 4 else {}
        replies[number] = ask(client, QUESTION, picture(number), **draw)

    readers = [threading.Thread(target=read, args=[number]) for number in range(5)]
    with model._lock:
        for reader in readers:
            reader.start()
        time.sleep(1)  # all of them wait for the model now
    for reader in readers:
        reader.join()
    greedy = [replies[n].choices[0].message.content for n in range(4)]
    assert greedy == alone[:4]  # a drawn row beside them changes nothing
    drawn = model.ask(picture(4), QUESTION, max_new_tokens=8, temperature=1.5, seed=3)
    assert replies[4].choices[0].message.content == drawn


def asked_together(served, texts):
    "The replies to several questions that wait for the model together, or what was raised instead."
    model, client = served
    replies = {}

    def read(number):
        draw = dict(temperature=1.5, seed=3) if number == 2 else {}
        try:
            reply = ask(client, texts[number], picture(number), **draw)
            replies[number] = reply.choices[0].message.content
        except openai.APIStatusError as refused:
            replies[number] = refused

    readers = [threading.Thread(target=read, args=[number]) for number in range(len(texts))]
    with model._lock:
        for reader in readers:
            reader.start()
        time.sleep(1)
    for reader in readers:
        reader.join()
    return replies


@pytest.fixture
def wanted(served):
    "What three questions get alone, the last of them drawn."
    model, _ = served
    alone = [model.ask(picture(n), QUESTION, max_new_tokens=8) for n in range(2)]
    drawn = model.ask(picture(2), QUESTION, max_new_tokens=8, temperature=1.5, seed=3)
    return dict(enumerate([*alone, drawn]))


def test_one_question_that_fails_leaves_the_others_their_answers(served, wanted):
    model, _ = served
    embed = model.model.get_input_embeddings()
    (bad,) = model.processor.tokenizer('zero', add_special_tokens=False)['input_ids']

    def spoil(module, inputs, output):
        return output.masked_fill((inputs[0] == bad)[..., None], float('nan'))

    hook = embed.register_forward_hook(spoil)
    replies = asked_together(served, [QUESTION] * 3 + ['zero ?'])
    hook.remove()
    failed = replies.pop(3)
    assert replies == wanted
    assert failed.status_code == 500 and 'NaN' in failed.message and "zero ?'" in failed.message


def test_what_fails_in_the_middle_of_a_batch_goes_on_alone(served, wanted, monkeypatch):
    deal, calls = batches._DrawRows.__call__, []

    def fail_once(self, input_ids, scores):
        calls.append(len(scores))
        if calls == [3, 3]:
            raise RuntimeError('CUDA out of memory')
        return deal(self, input_ids, scores)

    monkeypatch.setattr(batches._DrawRows, '__call__', fail_once)
    assert asked_together(served, [QUESTION] * 3) == wanted
    assert calls[:2] == [3, 3] and set(calls[2:]) == {1}


def test_a_reader_who_leaves_frees_the_model(served):
    model, client = served
    stream = ask(client, QUESTION, picture(), stream=True)
    next(iter(stream))
    stream.close()
    assert ask(client, QUESTION, picture()).choices[0].message.content
    assert model._lock.acquire(timeout=5)
    model._lock.release()


@pytest.mark.parametrize(
    'settings, said',
    [
        (dict(top_p=1.5), 'top_p'),
        (dict(n=2), 'n:'),
        (dict(logprobs=True), 'logprobs is not supported here; known are'),
        (dict(temperature=-0.5), 'temperature'),
        (dict(extra_body=dict(regions=['rectangle:1,1,9,9'])), 'regions need a picture'),
        (dict(model='other'), "model 'other' is not served; there are tiny"),
        (dict(messages=[dict(role='tool', content='x', tool_call_id='1')]), 'messages.0.role'),
        (dict(messages=[dict(role='assistant', content='x')]), "must be the user's"),
        (dict(messages=messages('<image> what ?')), 'holds <image>'),
        (dict(messages=messages('<|image_pad|> what ?')), 'holds <|image_pad|>'),
        (dict(messages=[dict(role='user', content='what ?', images=['a.png'])]), "'images', which"),
        (dict(messages=seeing('http://169.254.169.254/')), 'fetches no addresses'),
        (dict(messages=seeing('data:image/png;base64,AAAA')), 'not an image'),
    ],
)
def test_what_cannot_be_honoured_is_named(served, settings, said):
    _, client = served
    asked = dict(model='tiny', messages=messages('what is it ?')) | settings
    with pytest.raises(openai.APIStatusError) as refused:
        client.chat.completions.create(**asked)
    assert refused.value.status_code in (400, 404) and said in refused.value.message
    assert ask(client, QUESTION, picture()).choices[0].message.content
