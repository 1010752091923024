"""Numbers and places that no run can mean are said in one line, before a kernel starts."""

import re

import pytest
from typer.testing import CliRunner

from vlmbench.run.cli import app
from vlmbench.run.engine import find_notebook
from vlmbench.run.parameters import (
    ParameterError,
    check_parameters,
    load_notebook,
    notebook_parameters,
)
from vlmbench.train.checkpoint import CheckpointError, check_identity


def refused(*words):
    "What a command says that refuses what it was told."
    said = CliRunner().invoke(app, list(words))
    assert isinstance(said.exception, (ParameterError, SystemExit)), said.exception
    assert said.exit_code != 0
    return f'{said.output} {said.exception}'


@pytest.mark.parametrize(
    'words, why',
    [
        ('train gpus=0', 'gpus=0 must be at least 1'),
        ('train gpus=5 device=cpu', '24 rows, and 5 ranks cannot share them evenly: use 1, 2, 3'),
        ('train nodes=5 gpus=1', '24 rows, and 5 ranks cannot share them'),
        ('train offload=true', 'only parallel=fsdp and parallel=hsdp'),
        ('train bad_rows=7', 'bad_rows=7.0 must be a share between 0 and 1'),
        ('train workers=-1', 'workers=-1 must be at least 0'),
        ('evaluate limit=0', 'limit=0 must be at least 1'),
        ('region_tasks batch_size=0', 'batch_size=0 must be at least 1'),
    ],
)
def test_a_number_that_means_nothing_is_refused_at_once(words, why, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert why in refused('run', *words.split(), f'out={tmp_path}/run')
    assert not (tmp_path / 'run' / 'manifest.json').exists()


@pytest.mark.parametrize('taken', ['file', 'file/below'])
def test_a_run_folder_that_is_a_file_is_named(taken, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'file').touch()
    why = f'{tmp_path / "file"} is a file, and no run folder'
    assert why in refused('run', 'train', f'out={taken}')
    assert why in refused('submit', 'train', f'out={taken}', '--dry-run')
    assert why in refused('bench', '--methods', 'llava', '--out', taken)


@pytest.mark.parametrize(
    'words, why',
    [
        ('--gpus 2 gpus=3', 'gpus=3 is more than a job has (--gpus 2)'),
        ('nodes=2', 'nodes=2 is more than a job has (--nodes 1)'),
        ('--gpus 5', '24 rows, and 5 ranks cannot share them'),
        ('--nodes 5', "nodes=5: stage 'align': a step has 24 rows, and 5 ranks cannot share them"),
        ('--nodes 5 --gpus 1', 'cannot share them evenly: use 1, 2, 3, 4, 6, 8, 12, 24 ranks'),
        ('--nodes 2 --gpus 5', 'gpus=5, nodes=2: stage'),
    ],
)
def test_a_job_that_asks_for_too_little_is_not_printed(words, why, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert why in refused('submit', 'train', *words.split(), '--dry-run')


def test_a_bench_of_jobs_with_a_layout_that_does_not_fit_is_not_submitted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ['--methods', 'llava', '--jobs', 'slurm', '--nodes', '5', '--out', 'b']
    assert '24 rows, and 5 ranks cannot share them evenly' in refused('bench', *words)
    assert not (tmp_path / 'b').exists()


def test_a_file_for_a_cluster_needs_no_weights_here(tmp_path, monkeypatch):
    "Ranks on a CPU are no GPUs of Slurm's, and weights may lie on the cluster alone."
    pytest.importorskip('submitit')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    words = ['submit', 'train', 'recipe=zero', 'scale=llama-3.1-8b', 'precision=bf16']
    done = CliRunner().invoke(app, [*words, 'gpus=2', 'device=cpu', '--dry-run'])
    assert done.exit_code == 0, done.output
    assert done.stderr.startswith('note: not on this machine: scale=llama-3.1-8b needs meta-llama/')
    assert '#SBATCH --nodes=1' in done.stdout and 'note' not in done.stdout
    assert 'needs meta-llama/' in refused(*words)


def test_what_a_refused_resume_advises_can_be_typed():
    "The advice names parameters of the notebook, in words that it reads, and all differences."
    saved, now = (
        dict(recipe='llava', stages=['a'], seed=0),
        dict(recipe='eve', stages=['b'], seed=1),
    )
    with pytest.raises(CheckpointError) as refusal:
        check_identity(saved, now)
    advice = re.findall(r'(resume=\w+|allow_changed=\S+)', str(refusal.value))
    words = dict(word.split('=', 1) for word in advice)
    declared = notebook_parameters(load_notebook(find_notebook('train')))
    read = check_parameters(declared, words, 'train')
    assert read['resume'] is False
    check_identity(saved, now, read['allow_changed'])
