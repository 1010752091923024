"""lmms-eval asks a model of ours by chat messages: turns and pictures in their places, batched, on
ranks, beside tasks that have no messages of their own."""

import pytest
import torch

import vlmbench
from test_lmms import answers, command, write_tasks
from vlmbench.data.record import Sample, Turn
from vlmbench.data.world import asset_path
from vlmbench.demo.serve import world_picture
from vlmbench.evaluate.lmms import lmms_models
from vlmbench.evaluate.lmms_chat import messages_sample
from vlmbench.evaluate.prompts import prompt_inputs, read_answers, stop_ids

TALKS = """task: {name}
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {folder}/rows.parquet}}, cache_dir: {folder}/cache}}
test_split: test
output_type: generate_until
doc_to_visual: !function pictures.two
doc_to_text: '{{{{question}}}}'
doc_to_messages: !function talks.{name}
doc_to_target: '{{{{answer}}}}'
generation_kwargs: {{until: ["\\n"], max_new_tokens: 8, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 0.0}}
"""
MESSAGES = """def say(text):
    return dict(type='text', text=text)


def show(picture):
    return dict(type='image', url=picture.convert('RGB'))


def talk(row):
    question = [say(row['question'])] + [show(row['other'])] * (len(row['question']) % 2)
    return [
        dict(role='user', content=[show(row['image']), say('what is this ?')]),
        dict(role='assistant', content=[say('a red square')]),
        dict(role='user', content=question),
    ]


def film(row):
    return [dict(role='user', content=[dict(type='video', url='a.mp4'), say('what ?')])]
"""


def write_talks(folder):
    rows = write_tasks(folder)
    (folder / 'talks.py').write_text(MESSAGES)
    for name in ('talk', 'film'):
        (folder / f'{name}.yaml').write_text(TALKS.format(name=name, folder=folder))
    return rows


def talks(rows):
    "The questions of task `talk` as this package has them."
    found = []
    for n, row in enumerate(rows):
        two = len(row['question']) % 2
        turns = [
            Turn('user', '<image>\nwhat is this ?'),
            Turn('assistant', 'a red square'),
            Turn('user', row['question'] + '<image>' * two),
        ]
        found.append(Sample(str(n), turns, [row['image'], row['other']][: 1 + two]))
    assert len({len(sample.images) for sample in found}) == 2
    return found


def said(model, samples):
    "The model's own answers, one by one."
    vlm, processor, found = model.model, model.processor, []
    for sample in samples:
        inputs = prompt_inputs(processor, [sample])
        with torch.no_grad():
            ids = vlm.generate(**inputs, max_new_tokens=8, do_sample=False)
        new = ids[:, inputs['input_ids'].shape[1] :]
        (one,) = read_answers(new, stop_ids(vlm, processor), processor.tokenizer)
        found.append(one['prediction'])
    return found


@pytest.fixture(scope='module')
def model():
    return vlmbench.load(asset_path('vlm'), device='cpu')


def test_the_entry_point_names_both_classes():
    "And lmms-eval takes the chat one unless it is told otherwise."
    pytest.importorskip('lmms_eval.models.registry_v2', exc_type=ImportError)
    from lmms_eval.models.registry_v2 import ModelRegistryV2

    registry = ModelRegistryV2()
    registry.register_manifest(lmms_models())
    assert not registry.get_model_class('vlmbench').is_simple
    assert registry.get_model_class('vlmbench', force_simple=True).is_simple


def test_a_message_is_read_as_training_rows_are():
    picture, say = world_picture(1), lambda text: dict(type='text', text=text)
    show = dict(type='image', url=picture)
    one = messages_sample('t', 0, [dict(role='user', content=[say('a'), show, show, say('b ?')])])
    assert one.turns == [Turn('user', 'a<image><image>\nb ?')] and len(one.images) == 2
    plain = messages_sample('t', 1, [dict(role='user', content='what is red ?')])
    assert plain.turns == [Turn('user', 'what is red ?')] and not plain.images
    for content, why in (
        ([dict(type='audio', url='a.wav')], 'task t, row 2.*audio'),
        ([show, say('<image> <image> ?')], 'task t, row 2.*image count'),
        ([dict(type='image', url='not/there.png'), say('?')], 'task t, row 2.*there.png'),
    ):
        with pytest.raises(ValueError, match=why):
            messages_sample('t', 2, [dict(role='user', content=content)])
    twice = [dict(role='user', content='a'), dict(role='user', content='b')]
    with pytest.raises(ValueError, match='row 3.*both from the user'):
        messages_sample('t', 3, twice)


@pytest.mark.slow
def test_messages_and_plain_tasks_by_one_command(model, tmp_path):
    "Batched with different numbers of pictures, on one rank and on two."
    pytest.importorskip('lmms_eval.evaluator', exc_type=ImportError)
    rows = write_talks(tmp_path)
    for part in (model.model, model.processor):
        part.save_pretrained(tmp_path / 'saved')
    where = dict(model=tmp_path / 'saved', tasks='talk,pairs,things')
    one = command(tmp_path, **where, logs=tmp_path / 'one')
    assert [one['talk'][n] for n in range(len(rows))] == said(model, talks(rows))
    assert [one['things'][n] for n in range(len(rows))] == [
        str(model.ask(row['image'], row['question'])) for row in rows
    ]
    simple = command(tmp_path, **where, logs=tmp_path / 'simple', more=['--force_simple'])
    assert simple['pairs'] == one['pairs'] and simple['things'] == one['things']
    assert simple['talk'] == one['pairs'] != one['talk']  # two pictures and a text, no turns
    assert command(tmp_path, **where, ranks=2, logs=tmp_path / 'two') == one


@pytest.mark.slow
def test_in_process_a_task_with_messages_is_asked_by_them(model, tmp_path):
    from lmms_eval.tasks import TaskManager
    from vlmbench.evaluate.in_process import VisionSuite

    rows = write_talks(tmp_path)
    settings = dict(tasks=['talk'], task_folder=str(tmp_path), batch_size=4, limit=None)
    suite = VisionSuite(settings | dict(device='cpu', pictures='all'))
    loaded = model.model, model.processor
    found = suite.ask(loaded, 'talk', None, tmp_path, None)
    assert answers(found, 'talk') == said(model, talks(rows))
    assert isinstance(suite.manager, TaskManager)
    suite = VisionSuite(settings | dict(tasks=['film'], device='cpu', pictures='all'))
    with pytest.raises(ValueError, match="task film, row [0-4]: .*'video'"):
        suite.ask(loaded, 'film', None, tmp_path, None)
