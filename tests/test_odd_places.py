"""Files whose name says something else than their contents, and paths that lead nowhere."""

import gzip
import json

import pytest
from typer.testing import CliRunner

from vlmbench.data.record import Records
from vlmbench.data.stream_rows import json_rows
from vlmbench.methods.recipes import find_scale, get_recipe
from vlmbench.models.vlm import build_vlm
from vlmbench.run.cli import app

ROW = dict(id='a', conversations=[{'from': 'human', 'value': 'x ?'}, {'from': 'gpt', 'value': 'y'}])


@pytest.mark.parametrize('name', ['a.json', 'a.jsonl', 'a.ndjson'])
@pytest.mark.parametrize('indent', [None, 2])
@pytest.mark.parametrize('start', ['', '\n  ', '\ufeff'])
def test_a_list_is_a_list_whatever_the_file_is_called(name, indent, start, tmp_path):
    path = tmp_path / name
    path.write_text(start + json.dumps([ROW, ROW | dict(id='b')], indent=indent), encoding='utf8')
    assert [sample.id for sample in Records(path)] == ['a', 'b']
    if not name.endswith('.ndjson'):
        (tmp_path / f'{name}.gz').write_bytes(gzip.compress(path.read_bytes()))
        for file in (path, tmp_path / f'{name}.gz'):
            assert [stored['id'] for _, stored in json_rows(file)] == ['a', 'b']


@pytest.mark.parametrize('name', ['a.json', 'a.jsonl'])
def test_lines_are_lines_whatever_the_file_is_called(name, tmp_path):
    path = tmp_path / name
    path.write_text('\n'.join(json.dumps(ROW | dict(id=i)) for i in 'ab'))
    assert [sample.id for sample in Records(path)] == ['a', 'b']
    assert [stored['id'] for _, stored in json_rows(path)] == ['a', 'b']


@pytest.mark.parametrize('notebook', ['evaluate', 'layers', 'prune', 'harness', 'train'])
def test_a_model_that_is_nowhere_is_refused_before_there_is_a_folder(
    notebook, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    refused = CliRunner().invoke(app, ['run', notebook, 'model=runs/gone/model'])
    assert f'relative paths begin at {tmp_path}' in str(refused.exception)
    assert not any(tmp_path.iterdir())


def test_names_and_paths_in_python():
    with pytest.raises(ValueError, match='/nope: there is no such folder'):
        build_vlm('/nope')
    assert get_recipe('llava', 'tiny') == get_recipe('llava', find_scale('tiny'))
