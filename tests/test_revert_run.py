"""`run evaluate revert= revert_to=`: answers are those of the model with these layers put back."""

import pandas as pd
import pytest
import torch

from test_runs import bases  # noqa: F401
from vlmbench.analysis.weights import revert_layers
from vlmbench.checkpoints.load import load_vlm
from vlmbench.data.world import asset_path
from vlmbench.evaluate.results import Results
from vlmbench.run.engine import find_notebook, run_notebook
from vlmbench.run.jobs import evaluate_job
from vlmbench.run.manifest import Manifest
from vlmbench.run.parameters import ParameterError, load_notebook, notebook_parameters
from vlmbench.train.checkpoint import export


@pytest.fixture(scope='module')
def tuned(tmp_path_factory):
    "The model of the package with noise on the weights of two layers."
    model, processor = load_vlm(asset_path('vlm'))
    layers = model.model.language_model.layers
    torch.manual_seed(0)
    with torch.no_grad():
        for layer in (layers[1], layers[3]):
            for weight in layer.parameters():
                weight += 3 * weight.std() * torch.randn_like(weight) if weight.ndim > 1 else 0
    place = tmp_path_factory.mktemp('tuned') / 'model'
    export(model, processor, place)
    return place


def answers(model, world, folder, **given):
    "What an evaluation of `model` writes: the answers by question."
    declared = notebook_parameters(load_notebook(find_notebook('evaluate')), 'evaluate')
    settings = {name: one.default for name, one in declared.items()}
    settings |= dict(tasks=['vqa_test'], limit=8, blind=False, device='cpu') | given
    Manifest(folder).start('evaluate', settings)
    evaluate_job(settings, str(model), str(world), str(folder))
    frame: pd.DataFrame = Results.load(folder / 'results', 'vqa_test.head8').frame
    return dict(zip(frame['id'], frame['prediction']))


def test_layers_put_back_answer_as_before(tuned, bases, tmp_path):  # noqa: F811
    base, world = asset_path('vlm'), bases / 'world'
    before = answers(base, world, tmp_path / 'a')
    assert answers(tuned, world, tmp_path / 'b') != before
    given = dict(revert=[1, 3], revert_to=str(base))
    assert answers(tuned, world, tmp_path / 'c', **given) == before
    one, _ = load_vlm(tuned)
    revert_layers(one, base, [1])
    half, whole = one.state_dict(), load_vlm(base)[0].state_dict()
    changed = {name.split('layers.')[1][0] for name in half if not half[name].equal(whole[name])}
    assert changed == {'3'}


MODEL = str(asset_path('vlm'))


@pytest.mark.parametrize(
    'given, why',
    [(dict(revert=[3]), 'needs revert_to'), (dict(revert_to=MODEL), 'name the layers')],
)
def test_half_a_request_is_refused_before_a_kernel_starts(tmp_path, given, why):
    with pytest.raises(ParameterError, match=why):
        run_notebook('evaluate', dict(model=MODEL, out=str(tmp_path / 'r')) | given, quiet=True)
    assert not (tmp_path / 'r').exists()
