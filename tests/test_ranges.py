"""Numbers and places that no run can mean are said in one line, before a kernel starts."""

import pytest
from typer.testing import CliRunner

from vlmbench.run.cli import app


def refused(*words):
    "What a command says that refuses what it was told."
    said = CliRunner().invoke(app, list(words))
    assert type(said.exception).__name__ in ('ParameterError', 'SystemExit'), said.exception
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
