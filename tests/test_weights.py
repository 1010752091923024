"""`vlmbench weights`: wheels become folders that transformers loads, or nothing is left."""

import importlib.util
import json

import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Dinov2Model
from typer.testing import CliRunner

import mini_weights
from vlmbench.checkpoints import laptop
from vlmbench.checkpoints.wheels import WeightsError
from vlmbench.data.home import kept_model
from vlmbench.data.template import get_template
from vlmbench.methods.eve import teacher_ratio
from vlmbench.methods.recipes import BUILT_IN
from vlmbench.methods.vora import VoRA
from vlmbench.methods.zero import split
from vlmbench.data.record import Turn
from vlmbench.models.vlm import load_tower, tower_transform
from vlmbench.run.cli import app
from vlmbench.run.expected import CORE_SECONDS
from vlmbench.train.scale import Scale, get_scale


@pytest.fixture(scope='module')
def wheels(tmp_path_factory):
    "A folder with the two wheels, and the set that they make."
    folder = tmp_path_factory.mktemp('wheels')
    return folder, mini_weights.write_wheels(folder)


@pytest.fixture
def place(wheels, tmp_path, monkeypatch):
    "VLMBENCH_HOME, with small weights as the set `laptop`."
    folder, parts = wheels
    monkeypatch.setenv('VLMBENCH_HOME', str(tmp_path / 'home'))
    monkeypatch.setattr(laptop, 'SETS', dict(laptop=parts))
    return tmp_path / 'home'


def ask(*words):
    return CliRunner().invoke(app, ['weights', *map(str, words)])


def test_the_command_makes_folders_that_transformers_loads(place, wheels):
    done = ask('laptop', '--wheels', wheels[0])
    assert done.exit_code == 0, done.output
    text, tower = (kept_model(part.hub) for part in wheels[1])
    found, info = AutoModelForCausalLM.from_pretrained(text, output_loading_info=True)
    assert not info['missing_keys'] and not info['unexpected_keys']
    original = mini_weights.llama().state_dict()
    for name, value in found.state_dict().items():
        want = mini_weights.in_blocks(original[name]) if value.ndim == 2 else original[name]
        torch.testing.assert_close(value, want, rtol=1e-6, atol=1e-7, msg=name)
    assert 'quantization_config' not in json.loads((text / 'config.json').read_text())
    tokenizer = AutoTokenizer.from_pretrained(text)
    assert tokenizer.chat_template == mini_weights.TOLD
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert found.generation_config.eos_token_id == 2
    saw, info = Dinov2Model.from_pretrained(tower, output_loading_info=True)
    assert not info['missing_keys'] and not info['unexpected_keys']
    for name, value in mini_weights.dinov2().state_dict().items():
        if 'mask_token' in name:
            assert not saw.state_dict()[name].any()  # not in the graph
        else:
            torch.testing.assert_close(saw.state_dict()[name], value, rtol=1e-6, atol=1e-6)
    for part in wheels[1]:
        card = (kept_model(part.hub) / 'README.md').read_text()
        assert 'license: apache-2.0' in card and part.wheel.sha256 in card
        assert not [p for p in kept_model(part.hub).parent.iterdir() if p.name.startswith('.')]


def test_the_tower_sees_as_its_processor_says(place, wheels):
    ask('laptop', '--wheels', wheels[0])
    folder = kept_model(wheels[1][1].hub)
    tower = load_tower(folder)
    cut = tower_transform(folder, tower.config)
    assert (cut.mode, cut.size, cut.short) == ('crop', 224, 256)
    assert cut.mean == (0.485, 0.456, 0.406)
    padded = tower_transform(folder, tower.config, 'pad')
    assert (padded.mode, padded.size, padded.mean) == ('pad', 224, cut.mean)


def test_a_second_time_nothing_is_made(place, wheels):
    first = ask('laptop', '--wheels', wheels[0])
    files = {p: p.stat().st_mtime_ns for p in place.rglob('*') if p.is_file()}
    second = ask('laptop')  # nothing is fetched, either
    assert first.exit_code == second.exit_code == 0, second.output
    assert second.output.count('is there already') == 2
    assert files == {p: p.stat().st_mtime_ns for p in place.rglob('*') if p.is_file()}
    listed = json.loads(ask('--json').output)
    assert [row['here'] for row in listed] == ['here', 'here']


def test_what_somebody_else_put_there_stays(place, wheels):
    mine = place / 'models' / wheels[1][0].hub
    mine.mkdir(parents=True)
    (mine / 'config.json').write_text('{}')
    done = ask('laptop', '--wheels', wheels[0])
    assert 'made by somebody else, and stays' in done.output
    assert [p.name for p in mine.iterdir()] == ['config.json']
    assert [row['here'] for row in json.loads(ask('--json').output)] == ['other', 'here']


def test_another_content_is_refused_before_anything_is_written(place, wheels, tmp_path):
    for path in wheels[0].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes()[:-1] + b'x')
    done = ask('laptop', '--wheels', tmp_path)
    assert 'SHA-256' in str(done.exception) and 'declared' in str(done.exception)
    assert not list((place / 'models').rglob('*')) if (place / 'models').exists() else True


def test_without_a_way_to_an_index_the_error_names_the_folder(place, wheels, monkeypatch):
    monkeypatch.setenv('PIP_NO_INDEX', '1')
    monkeypatch.setenv('PIP_CONFIG_FILE', '/dev/null')
    done = ask('laptop')
    assert 'pip could not fetch mini-text==0.1' in str(done.exception)
    assert '--wheels FOLDER with mini_text-0.1-py3-none-any.whl' in str(done.exception)
    assert not [p for p in place.rglob('*') if p.is_file()]


def test_an_interrupted_conversion_leaves_nothing(place, wheels, monkeypatch):
    text = wheels[1][0]

    def stopped(file, folder):
        (folder / 'config.json').write_text('{}')
        raise KeyboardInterrupt

    halved = laptop.Part(**vars(text) | dict(write=stopped))
    with pytest.raises(KeyboardInterrupt):
        laptop.put(halved, wheels[0] / text.wheel.file, print)
    assert not list((place / 'models' / 'mini').iterdir())
    assert laptop.put(text, wheels[0] / text.wheel.file, print).is_dir()


@pytest.mark.parametrize('name', ['gguf', 'onnx'])
def test_without_the_extra_the_error_names_it(place, wheels, monkeypatch, name):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, 'find_spec', lambda n, *a: None if n == name else real(n, *a)
    )
    with pytest.raises(
        WeightsError, match=f"{name}, which is not installed: pip install 'vlmbench"
    ):
        laptop.put_set('laptop', wheels[0])


def test_without_a_home_the_error_says_how_to_name_one(monkeypatch):
    monkeypatch.delenv('VLMBENCH_HOME', raising=False)
    assert 'export VLMBENCH_HOME=' in str(ask('laptop').exception)
    assert 'Accept the terms' in str(ask('gemma-270m').exception)
    assert ask().output.count('apache-2.0') == 2


def test_a_graph_without_a_tower_is_refused(tmp_path):
    from vlmbench.checkpoints.onnx_tower import write_tower

    with pytest.raises(WeightsError, match='cannot be read as an ONNX'):
        (tmp_path / 'none.onnx').write_bytes(b'nothing of the kind')
        write_tower(tmp_path / 'none.onnx', tmp_path)
    mini_weights.write_onnx(tmp_path / 'half.onnx', mini_weights.dinov2(), without='layer.1.norm1')
    with pytest.raises(WeightsError, match='lacks .*layer.1.norm1'):
        write_tower(tmp_path / 'half.onnx', tmp_path)


def test_the_template_is_chatml_with_a_newline_behind_every_turn():
    talk = [Turn('user', 'hello'), Turn('assistant', 'yes'), Turn('user', 'again')]
    shown = get_template('smollm2').render(talk, add_generation_prompt=True)
    said = 'You are a helpful AI assistant named SmolLM, trained by Hugging Face'
    turns = [('system', said), *((t.role, t.text) for t in talk)]
    want = ''.join(f'<|im_start|>{role}\n{text}<|im_end|>\n' for role, text in turns)
    assert shown == want + '<|im_start|>assistant\n'


def test_a_tower_that_takes_any_picture_teaches_at_the_scales_size(place, wheels):
    ask('laptop', '--wheels', wheels[0])
    text, tower = (part.hub for part in wheels[1])
    scale = Scale('mini', text, tower, 56, 'smollm2', image_mode='pad', like='laptop')
    teacher = scale.tower()
    assert teacher.config.image_size == scale.tower_config.image_size == 56  # its file says 70
    assert teacher(torch.zeros(1, 3, 56, 56)).last_hidden_state.shape == (1, 17, 64)
    assert teacher_ratio(56, dict(patch_stride=7, conv_stride=2), scale.tower_config) == 1
    seen = VoRA()._pictures(scale, teacher)
    assert (seen.mode, seen.size, seen.mean) == ('pad', 56, (0.485, 0.456, 0.406))


def test_the_surrogate_begins_where_the_trajectory_turns():
    cut = split(get_scale('laptop'))
    # the translator begins as the first layer that it replaces
    assert ([*cut.kept], [*cut.translators]) == ([*range(22), 29], [21])


def test_the_time_of_a_bench_is_that_of_the_stored_steps(project_root):
    stored = pd.read_csv(project_root / 'figures' / 'laptop' / 'steps.csv')
    for row in stored.itertuples():
        told = CORE_SECONDS[row.precision][row.method][row.stage]
        assert told == round(row.core_seconds * row.rows / row.micro_batch)
    assert set(stored.method) == set(BUILT_IN) and stored.peak_gb.max() < 8
