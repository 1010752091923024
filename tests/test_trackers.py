"""Trackers of one's own, MLflow, and places that are no folders: refused before a run starts."""

import os
import sys
import types

import pytest

from vlmbench.run.engine import run_notebook
from vlmbench.run.manifest import Run
from vlmbench.run.parameters import ParameterError
from vlmbench.train.metrics import MetricLog, Tracker, make_tracker

pytestmark = pytest.mark.filterwarnings('ignore')


class Kept(Tracker):
    "A tracker of somebody else's package."

    made = []

    def __init__(self, out_dir, project, run, config):
        self.facts, self.rows, self.open = (project, run, config), [], True
        Kept.made.append(self)

    def log(self, row, step):
        self.rows.append((step, dict(row)))

    def close(self):
        self.open = False


def test_a_class_by_its_path_gets_every_row_and_is_closed(tmp_path):
    tracker = make_tracker(f'{__name__}:Kept', tmp_path, run='align', config=dict(lr=1))
    log = MetricLog(tmp_path, [tracker])
    log.log(dict(step=3, event='step', loss=0.5, lr=dict(vision=1e-3)))
    log.close()
    kept = Kept.made[-1]
    assert kept.facts == ('vlmbench', 'align', dict(lr=1)) and not kept.open
    assert kept.rows == [(3, dict(loss=0.5, **{'lr/vision': 1e-3}))]


@pytest.mark.parametrize(
    'name, why',
    [
        ('mlflow', "needs the package 'mlflow'"),
        ('json:JSONDecoder', "json has no class 'JSONDecoder'"),
        ('json:none', "json has no class 'none'"),
        ('nowhere.at.all:Own', 'cannot be imported'),
        ('tensorbord', 'trackers are tensorboard'),
    ],
)
def test_what_cannot_track_is_refused_before_a_kernel_starts(tmp_path, monkeypatch, name, why):
    monkeypatch.setitem(sys.modules, 'mlflow', None)
    with pytest.raises(ParameterError, match=why):
        run_notebook('train', dict(out=str(tmp_path / 'run'), trackers=[name]), quiet=True)
    assert not (tmp_path / 'run').exists()


def test_mlflow_keeps_its_rows_in_the_folder_of_the_stage(tmp_path, monkeypatch):
    pytest.importorskip('mlflow')
    pytest.importorskip('alembic')
    from mlflow import MlflowClient

    for _ in range(2):  # a run that goes on finds the experiment
        tracker = make_tracker('mlflow', tmp_path, run='align', config=dict(lr=1))
        for step in (1, 2):
            tracker.log({'loss': step / 2, 'lr/vision': 1e-3}, step)
        tracker.close()
    client = MlflowClient(tracking_uri=f'sqlite:///{tmp_path}/mlflow.db')
    experiment = client.get_experiment_by_name('vlmbench').experiment_id
    runs = client.search_runs([experiment])
    assert [run.info.status for run in runs] == ['FINISHED', 'FINISHED']
    history = client.get_metric_history(runs[0].info.run_id, 'loss')
    assert [(one.step, one.value) for one in history] == [(1, 0.5), (2, 1.0)]


def fake_mlflow(said):
    "What `MlflowTracker` calls of MLflow, noted in `said`."

    class Client:
        def __init__(self, tracking_uri):
            said['uri'] = tracking_uri

        def get_experiment_by_name(self, name):
            return None

        def create_experiment(self, name, artifact_location):
            said['files'] = artifact_location
            return 'e'

        def create_run(self, experiment, run_name):
            return types.SimpleNamespace(info=types.SimpleNamespace(run_id=f'{experiment}/r'))

        def log_dict(self, run, config, file):
            said['config'] = config

        def log_batch(self, run, metrics):
            said.setdefault('rows', []).append((run, metrics))

        def set_terminated(self, run):
            said['ended'] = run

    package, entities = types.ModuleType('mlflow'), types.ModuleType('mlflow.entities')
    package.MlflowClient = Client
    entities.Metric = lambda name, value, now, step: (name, value, step)
    return package, entities


def test_mlflow_is_asked_for_no_server(tmp_path, monkeypatch):
    said = {}
    package, entities = fake_mlflow(said)
    package.__spec__ = types.SimpleNamespace(name='mlflow')
    alembic = types.ModuleType('alembic')
    alembic.__spec__ = types.SimpleNamespace(name='alembic')
    for name, module in (
        ('mlflow', package),
        ('mlflow.entities', entities),
        ('alembic', alembic),
    ):
        monkeypatch.setitem(sys.modules, name, module)
    log = MetricLog(tmp_path, [make_tracker('mlflow', tmp_path, config=dict(lr=1))])
    log.log(dict(step=3, event='step', loss=0.5))
    log.close()
    assert said['uri'] == f'sqlite:///{tmp_path}/mlflow.db' and said['files'].startswith('file:')
    assert said['rows'] == [('e/r', [('loss', 0.5, 3)])] and said['ended'] == 'e/r'


@pytest.mark.parametrize(
    'notebook, places, why',
    [
        ('train', dict(out='s3://bucket/run'), 'out=s3://bucket/run: out is a folder'),
        ('evaluate', dict(data='gs://bucket/data', model='m'), 'copy it here first'),
        ('train', dict(image_roots=['a', 'https://host/b']), 'image_roots=https://host/b'),
    ],
)
def test_an_address_is_no_folder(tmp_path, monkeypatch, notebook, places, why):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ParameterError, match=why):
        run_notebook(notebook, places, quiet=True)
    assert os.listdir() == []


def test_a_run_of_a_notebook_at_hand_takes_no_address_either(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ParameterError, match='copy it there'):
        Run('s3://bucket/run', 'mine', {})
    assert os.listdir() == []
