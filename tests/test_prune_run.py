"""The prune notebook on a finished run of random models with two layers: removal, repair, the model
on disk."""

import json
import re

import pytest
import torch
from transformers import AutoModelForImageTextToText
from typer.testing import CliRunner

import vlmbench.models.vlm  # noqa: F401
from test_released_placement import released
from test_runs import bases, benched, trained  # noqa: F401
from vlmbench.checkpoints.load import load_vlm
from vlmbench.data.world import asset_path
from vlmbench.models.depth import depth_of, prune
from vlmbench.run.cli import app
from vlmbench.run.engine import find_notebook, run_notebook
from vlmbench.run.layer_jobs import prune_job
from vlmbench.run.manifest import Manifest
from vlmbench.run.parameters import ParameterError, load_notebook, notebook_parameters


def test_a_run_loses_a_layer_and_is_healed(trained, bases, tmp_path):  # noqa: F811
    given = dict(
        model=str(trained),
        k=1,
        region=[1],
        heal=1.0,
        calibration=6,
        data=str(bases / 'world'),
        limit=6,
        device='cpu',
        importance='drop_one',
        iterative=True,
    )
    assert run_notebook('prune', given, tmp_path / 'p', progress=False) == 0
    m = Manifest(tmp_path / 'p').read()
    assert m['removed'] == [0] and m['kept'] == [1] and len(m['calibration_loss']) == 2
    assert m['results']['targets']['heal'] > 0 and 0 <= m['results']['vqa_test']['image'] <= 1
    small = AutoModelForImageTextToText.from_pretrained(tmp_path / 'p' / 'model')
    assert small.config.text_config.num_hidden_layers == 1 and depth_of(small).source_layers == 2
    stage = json.loads(
        (tmp_path / 'p' / 'stages' / 'heal' / 'metrics.jsonl').read_text().splitlines()[0]
    )['stage']
    assert (
        stage['trains']['projector']['how'] == 'full'
        and stage['trains']['layers']['how'] == 'frozen'
    )


@pytest.mark.slow
def test_bad_requests_are_refused(trained, bases, tmp_path):  # noqa: F811
    given = dict(model=str(trained), data=str(bases / 'world'), calibration=4, limit=6)
    given |= dict(device='cpu', remove=[0], region=[0])
    assert run_notebook('prune', given, tmp_path / 'p', progress=False, quiet=True) == 1
    assert 'they cannot go and stay' in (tmp_path / 'p' / 'prune.ipynb').read_text()


@pytest.mark.parametrize(
    'words, says',
    [
        (['prune', 'remove=[99]'], 'remove=99: .* has no layer 99, its decoder has layers 0..1'),
        (['prune', 'region=[0,2]'], 'region=0,2: .* has no layer 2'),
        (['prune', 'k=3'], 'k=3: the decoder of .* has only 2 layers'),
        (['layers', 'picked=2'], 'picked=2: .* has no layer 2'),
        (['evaluate', 'revert=[2]', 'revert_to=HUB'], 'revert=2: .* has no layer 2'),
    ],
)
@pytest.mark.parametrize('where', ['folder', 'hub'])
def test_layers_that_are_not_there_are_refused_before_the_kernel(
    where, words, says, tmp_path, hub, monkeypatch
):
    "A release in bf16, by its folder and by its name: the configuration says enough."
    folder = released(tmp_path, 'eve', torch.bfloat16)
    named = hub(folder, 'BAAI/EVE-7B-v1.0')
    model = named if where == 'hub' else str(folder)
    (tmp_path / 'elsewhere').mkdir()
    monkeypatch.chdir(tmp_path / 'elsewhere')
    notebook, *given = [word.replace('HUB', named) for word in words]
    done = CliRunner().invoke(app, ['run', notebook, f'model={model}', *given, 'device=cpu'])
    assert isinstance(done.exception, ParameterError) and re.search(says, str(done.exception))
    assert not any((tmp_path / 'elsewhere').iterdir())


def test_a_model_that_is_not_there_is_refused_before_the_kernel(tmp_path):
    with pytest.raises(ParameterError, match='model=nowhere: nothing is there'):
        run_notebook('prune', dict(model='nowhere'), tmp_path / 'p', progress=False, quiet=True)
    assert not (tmp_path / 'p').exists()


def test_named_layers_go_from_any_folder_and_keep_their_numbers(bases, tmp_path):  # noqa: F811
    declared = notebook_parameters(load_notebook(find_notebook('prune')), 'prune')
    settings = {name: one.default for name, one in declared.items()}
    settings |= dict(tasks=['vqa_test'], limit=4, device='cpu', calibration=0, remove=[1])
    source, gone = str(asset_path('vlm')), []
    for number in (1, 3):
        settings |= dict(model=source, remove=[number])
        Manifest(tmp_path / str(number)).start('prune', settings)
        done = prune_job(settings, str(bases / 'world'), str(tmp_path / str(number)))
        gone += done['removed']
        source = str(tmp_path / str(number) / 'model')
    assert gone == [1, 3] and done['losses'] == [None, None]
    assert {1, 3}.isdisjoint(done['kept']) and done['depth'] == len(done['kept']) + 1
    whole, _ = load_vlm(asset_path('vlm'))
    small, _ = load_vlm(source)
    at_once = prune(whole, [1, 3]).eval()
    ids = torch.arange(5, 13)[None]
    with torch.no_grad():
        assert torch.equal(small(input_ids=ids).logits, at_once(input_ids=ids).logits)
    settings |= dict(model=source, remove=[3])
    Manifest(tmp_path / 'again').start('prune', settings)
    with pytest.raises(ValueError, match=r'remove: layers \[3\] are not there'):
        prune_job(settings, str(bases / 'world'), str(tmp_path / 'again'))
