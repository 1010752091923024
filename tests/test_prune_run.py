"""The prune notebook on a finished run of random models with two layers: removal, repair, the model
on disk."""

import json

import pytest
from transformers import AutoModelForImageTextToText

import vlmbench.models.vlm  # noqa: F401
from test_runs import bases, benched, trained  # noqa: F401
from vlmbench.models.depth import depth_of
from vlmbench.run.engine import run_notebook
from vlmbench.run.manifest import Manifest


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


@pytest.mark.parametrize(
    'given, says',
    [
        (dict(model='nowhere'), 'nowhere: no model there'),
        (dict(k=2, region=[0]), 'only 1 layers lie outside'),
    ],
)
def test_bad_requests_are_refused(trained, bases, tmp_path, given, says):  # noqa: F811
    given = (
        dict(model=str(trained), data=str(bases / 'world'), calibration=4, limit=6, device='cpu')
        | given
    )
    assert run_notebook('prune', given, tmp_path / 'p', progress=False, quiet=True) == 1
    assert says in (tmp_path / 'p' / 'prune.ipynb').read_text()
