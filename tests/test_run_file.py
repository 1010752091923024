"""A run as one YAML file: for every run notebook, checked like the command line, which wins."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import vlmbench.run.engine as engine
from vlmbench.run.cli import app
from vlmbench.run.parameters import ParameterError, load_notebook, notebook_parameters

NOTEBOOKS = sorted((Path(__file__).parents[1] / 'nbs' / 'runs').glob('*.ipynb'))


@pytest.fixture
def ask(monkeypatch):
    "What `vlmbench run` hands to the engine, after the engine's own check."
    given = {}

    def run_notebook(name, params, **kw):
        path = engine.find_notebook(name)
        declared = notebook_parameters(load_notebook(path), path.stem)
        given.update(engine.check_parameters(declared, params, path.stem))
        return 0

    monkeypatch.setattr(engine, 'run_notebook', run_notebook)

    def command(*words):
        given.clear()
        done = CliRunner().invoke(app, list(words))
        if done.exception and not isinstance(done.exception, SystemExit):
            raise done.exception
        return dict(given), done.stdout

    return command


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_every_run_notebook_takes_a_file(ask, path, tmp_path):
    declared = notebook_parameters(load_notebook(path), path.stem)
    file = tmp_path / 'run.yaml'
    # JSON is YAML; a parameter without a value is left to its default
    values = {name: one.default for name, one in declared.items()}
    file.write_text(json.dumps(values))
    given, said = ask('run', str(path), '--file', str(file))
    assert given == values and 'replaces' not in said
    file.write_text(f'outt: {tmp_path}')
    with pytest.raises(ParameterError, match="unknown parameter 'outt': did you mean 'out'"):
        ask('run', str(path), '--file', str(file))


def test_the_command_line_wins_and_says_so(ask, tmp_path):
    file = tmp_path / 'run.yaml'
    file.write_text('recipe: eve\nseed: 3\nbudget: 5e-1\nstages: [pretrain]\nevaluate: no\n')
    given, said = ask('run', 'train', '--file', str(file), 'seed=4')
    assert given == dict(recipe='eve', seed=4, budget=0.5, stages=['pretrain'], evaluate=False)
    assert f'note: seed=4 of the command line replaces 3 of {file}' in said
    file.write_text('seed: many\nbudgett: 1')
    with pytest.raises(ParameterError, match='seed.*must be int.*many.*') as error:
        ask('run', 'train', '--file', str(file))
    assert "'budgett': did you mean 'budget'" in str(error.value)


def test_a_file_runs_no_code_and_is_named_when_it_is_wrong(ask, tmp_path):
    mark = tmp_path / 'ran'
    file = tmp_path / 'run.yaml'
    file.write_text(f'seed: !!python/object/apply:pathlib.Path.touch [!!python/name:x {mark}]')
    with pytest.raises(ParameterError, match='no parameters can be read there'):
        ask('run', 'train', '--file', str(file))
    assert not mark.exists()
    with pytest.raises(ParameterError, match='none.yaml'):
        ask('run', 'train', '--file', str(tmp_path / 'none.yaml'))


def test_a_file_goes_to_slurm_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path('run.yaml').write_text('recipe: llava,eve\nevaluate: false\nstages: [pretrain]\n')
    words = ['submit', 'train', '--file', 'run.yaml', 'stages=[]', '--dry-run']
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert 'replaces' in done.stdout and '#SBATCH' in done.stdout
