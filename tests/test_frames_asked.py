"""Several pictures of a first question are the frames of a clip, token for token as in training,
for models that were trained so."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import vlmbench.demo.ask  # noqa: F401 (gives ChatModel its `ask`)
from vlmbench.checkpoints.load import load_vlm
from vlmbench.data.record import Sample, Turn, frames_prompt, sample_from_vora
from vlmbench.demo.chat import Chat, ChatModel
from vlmbench.evaluate.generate import evaluate
from vlmbench.evaluate.prompts import check_prompt, prompt_inputs, render_prompt
from vlmbench.evaluate.scorers import ExactMatch
from vlmbench.evaluate.tasks import Task
from vlmbench.methods.recipes import get_method, get_recipe
from vlmbench.methods.vora import PAPER_SCALE, VoRA
from vlmbench.models.processor import VLMProcessor
from vlmbench.run.cli import app
from vlmbench.train.recipe import RecipeError, override
from vlmbench.train.scale import get_scale
from vlmbench.train.stages import run_stages

QUESTION = 'what is there ?'
COLORS = 'red', 'green', 'blue'


@pytest.fixture(scope='module')
def vora():
    "Model and processor of a tiny VoRA, as its run begins."
    tiny = get_scale('tiny')
    state = VoRA().start(VoRA().recipe(tiny), tiny)
    return state.model.eval(), state.processor


@pytest.fixture(scope='module')
def folder(vora, tmp_path_factory):
    "Its folder, with the pictures a.png, b.png, c.png beside it."
    place = tmp_path_factory.mktemp('vora')
    for part in vora:
        part.save_pretrained(place / 'model')
    for name, color in zip('abc', COLORS):
        Image.new('RGB', (64, 64), color).save(place / f'{name}.png')
    return place


def pictures(n=3):
    return [Image.new('RGB', (64, 64), COLORS[i % 3]) for i in range(n)]


def trained_ids(processor, n=3):
    "What training shows before the answer of a row of `n` frames."
    row = dict(
        id='c',
        frames=[f'{i}.png' for i in range(n)],
        conversations=[
            {'from': 'human', 'value': QUESTION},
            {'from': 'gpt', 'value': 'a red circle'},
        ],
    )
    sample = sample_from_vora(row)
    object.__setattr__(sample, 'images', pictures(n))
    encoded = processor.encode(sample)
    return encoded.input_ids[: int((encoded.labels != -100).nonzero()[0])].tolist()


def placed(n=3):
    return Sample('q', [Turn('user', '<image>\n' * n + QUESTION)], pictures(n))


def test_evaluation_asks_with_the_ids_of_training(vora):
    _, processor = vora
    ids = prompt_inputs(processor, [placed()])['input_ids'][0].tolist()
    assert ids == trained_ids(processor) and ids.count(processor.image_token_id) == 3 * 64
    assert frames_prompt(3) + QUESTION in render_prompt(processor, placed())
    check_prompt(processor, placed(), 'a red circle')
    # one picture has no stamp, and a question that speaks of its pictures keeps its own marks
    one = prompt_inputs(processor, [placed(1)])['input_ids'][0]
    assert (
        one.tolist() == processor.encode(placed(1), add_generation_prompt=True).input_ids.tolist()
    )
    own = Sample('q', [Turn('user', 'is <image> as <image> ?')], pictures(2))
    assert render_prompt(processor, own).count('1s:') == 0


def test_chat_and_ask_show_what_training_showed(vora, monkeypatch):
    model, processor = vora
    asked, generate = [], type(model).generate

    def watched(self, **settings):
        asked.append(settings['input_ids'][0].tolist())
        return generate(self, **settings)

    monkeypatch.setattr(type(model), 'generate', watched)
    chat = Chat(ChatModel(model, processor), pictures())
    list(chat.ask(QUESTION, max_new_tokens=2))
    ChatModel(model, processor).ask(pictures(), QUESTION, max_new_tokens=2)
    assert asked == [trained_ids(processor)] * 2
    list(chat.ask('what color is it ?', max_new_tokens=2))
    assert asked[2][: len(asked[0])] == asked[0]  # the second question has no pictures of its own
    assert asked[2].count(processor.image_token_id) == 3 * 64


def test_content_parts_and_a_video_of_frames(vora):
    _, processor = vora
    text = dict(type='text', text=QUESTION)
    say = lambda *parts: [dict(role='user', content=[*parts, text])]
    read = dict(add_generation_prompt=True, tokenize=True, return_dict=True)

    def ids(*parts, **settings):
        found = processor.apply_chat_template(say(*parts), **read, **settings)
        return found['input_ids'][0].tolist()

    shown = [dict(type='image', image=p) for p in pictures()]
    assert ids(*shown) == trained_ids(processor)
    assert ids(dict(type='video', video=pictures())) == trained_ids(processor)
    # sampled: to `frames`, and to sixteen at most
    assert ids(dict(type='video', frames=pictures(9)), frames=3) == trained_ids(processor)
    assert ids(dict(type='video', frames=pictures(40))) == trained_ids(processor, 16)
    batch = processor.apply_chat_template([say(*shown), say(*shown)], **read)
    assert batch['input_ids'].tolist() == [trained_ids(processor)] * 2
    with pytest.raises(ValueError, match="'walk.mp4' is no list of frames"):
        ids(dict(type='video', path='walk.mp4'))
    with pytest.raises(ValueError, match='frames=17: a clip has 1 to 16'):
        ids(dict(type='video', frames=pictures(20)), frames=17)


def test_the_processor_keeps_its_stamps_and_others_have_none(vora, folder):
    _, processor = vora
    _, loaded = load_vlm(folder / 'model', 'cpu')
    assert loaded.stamps and loaded.chat_template == processor.chat_template
    assert prompt_inputs(loaded, [placed()])['input_ids'][0].tolist() == trained_ids(processor)
    plain = VLMProcessor(
        processor.tokenizer, processor.transform, processor.front_end, template='world'
    )
    assert not plain.stamps and '1s:' not in render_prompt(plain, placed())
    assert 'stamped' not in plain.chat_template


def test_chat_command_with_repeated_pictures(folder):
    ask = ['chat', str(folder / 'model'), '--question', QUESTION, '--max-new-tokens', '3']
    shown = [part for name in 'abc' for part in ('--image', str(folder / f'{name}.png'))]
    done = CliRunner().invoke(app, [*ask, *shown])
    assert done.exit_code == 0, done.output
    assert f'you> {QUESTION}' in done.output
    refused = CliRunner().invoke(app, [*ask, *shown, '--image', 'walk.mp4'])
    assert refused.exit_code and 'walk.mp4 is a video file' in str(refused.exception)


def test_a_task_of_clips_is_evaluated(vora):
    item = Sample('q', [*placed().turns, Turn('assistant', 'red')], pictures())
    result = evaluate(*vora, Task('clips', [item], ExactMatch()), max_new_tokens=3)
    assert len(result.frame) == 1


def test_rows_widen_by_the_frames():
    tiny = get_scale('tiny')
    assert [s.max_tokens for s in get_recipe('vora', tiny).stages] == [512, 512]
    wide = get_recipe('vora', tiny, variant=['frames=9'])
    assert [s.max_tokens for s in wide.stages] == [512 + 8 * 64] * 2
    paper = VoRA(frames=4).recipe(PAPER_SCALE)
    assert {s.max_tokens for s in paper.stages} == {4 * 1024 + 2048}
    native = VoRA(frames=4, anyres=True).recipe(PAPER_SCALE).stages[-1]
    assert native.max_tokens == 4 * 4000 + 2048
    with pytest.raises(RecipeError, match='at most 16, got 17'):
        get_method('vora', ['frames=17'])


@pytest.mark.parametrize('frames, kept', [(0, 5), (9, 9)])
def test_nine_frames_train_at_tiny(tmp_path, frames, kept):
    "Without the option a clip is cut to the frames that a row holds, with it all are seen."
    (tmp_path / 'world').mkdir()
    for i, picture in enumerate(pictures(9)):
        picture.save(tmp_path / f'world/{i}.png')
    row = dict(
        id='c',
        frames=[f'{i}.png' for i in range(9)],
        conversations=[
            {'from': 'human', 'value': QUESTION},
            {'from': 'gpt', 'value': 'a red circle'},
        ],
    )
    for name in ('caption_train', 'text_train', 'vqa_train'):
        (tmp_path / f'world/{name}.jsonl').write_text(json.dumps(row))
    tiny, method = get_scale('tiny'), VoRA(r=4, frames=frames, distill='none')
    plan = method.recipe(tiny)
    short = dict(steps=1, batch_rows=1, accumulation=1, global_rows=None, budget_targets=None)
    plan = override(
        plan, {f'stages.{s.name}.{k}': v for s in plan.stages for k, v in short.items()}
    )
    done = run_stages(method, method.start(plan, tiny), tmp_path / 'world', tmp_path / 'out')
    steps = [r.history[r.history.event == 'step'] for r in done.stages]
    assert all(np.isfinite(s.loss).all() for s in steps)
    assert all(s.images.sum() % kept == 0 and s.images.sum() > 0 for s in steps)
    assert not any(done.quarantined.values()) and torch.is_tensor(next(done.model.parameters()))
