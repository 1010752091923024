"""The command line: thin, light to load, honest exit codes."""

import json, os, subprocess, sys

import pytest
from typer.testing import CliRunner

import vlmbench
import warm_kernels
from vlmbench.run.cli import app
from vlmbench.run.manifest import Run


def call(*words):
    return CliRunner().invoke(app, [str(w) for w in words])


def vlmbench_process(*words, cwd):
    return warm_kernels.vlmbench(*words, cwd=cwd, env=os.environ | dict(COLUMNS='160'))


def test_version_and_help_name_every_command():
    assert call('--version').output.strip() == f'vlmbench {vlmbench.__version__}'
    text = call('--help').output
    assert (
        all(w in text for w in ('run', 'runs', 'bench', 'data')) and call('nonsense').exit_code == 2
    )
    assert call('bench', '--help').exit_code == 0 and '--seeds' in call('bench', '--help').output


def test_loading_the_command_line_and_the_engine_imports_nothing_heavy():
    code = (
        'import sys, vlmbench.run.cli, vlmbench.run.engine; '
        "heavy = 'torch', 'transformers', 'papermill', 'pandas', 'matplotlib', 'IPython'; "
        'print([m for m in heavy if m in sys.modules])'
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.stdout.strip() == '[]', done.stdout + done.stderr


def test_a_mistyped_parameter_is_one_line_and_code_two(tmp_path):
    done = vlmbench_process('run', 'train', 'recpie=llava', 'seed=one', cwd=tmp_path)
    assert done.returncode == 2 and not (tmp_path / 'runs').exists()
    assert "did you mean 'recipe'" in done.stderr and "'seed' must be int" in done.stderr
    assert 'Traceback' not in done.stderr


def test_a_device_that_is_not_here_is_refused_before_the_kernel(tmp_path):
    for device in ('gpu', 'cuda:99'):
        done = vlmbench_process('run', 'evaluate', f'device={device}', 'out=r', cwd=tmp_path)
        assert done.returncode == 2 and f"device '{device}'" in done.stderr, done.stderr
        assert 'leave device out' in done.stderr and not (tmp_path / 'r').exists()


def test_the_exit_code_is_the_notebooks_and_values_may_hold_equals_signs(tmp_path):
    import nbformat

    kernel = dict(name='python3', display_name='python3', language='python')
    nb = nbformat.v4.new_notebook(metadata=dict(kernelspec=kernel))
    nb.cells = [
        nbformat.v4.new_code_cell(
            "note: str = ''\nfail: bool = False\nout: str = ''", metadata=dict(tags=['parameters'])
        ),
        nbformat.v4.new_code_cell("print('note', note)\nif fail: raise SystemExit(3)"),
    ]
    nbformat.write(nb, tmp_path / 'demo.ipynb')
    good = vlmbench_process('run', 'demo.ipynb', 'note=a=b', 'out=good', cwd=tmp_path)
    bad = vlmbench_process('run', 'demo.ipynb', 'fail=true', 'out=bad', cwd=tmp_path)
    assert good.returncode == 0 and 'note a=b' in good.stdout and bad.returncode == 1
    again = vlmbench_process('run', 'demo.ipynb', 'out=good', cwd=tmp_path)
    assert again.returncode == 2 and 'completed run' in again.stderr
    assert (
        vlmbench_process(
            'run', 'demo.ipynb', 'note=c', 'out=good', '--overwrite', cwd=tmp_path
        ).returncode
        == 0
    )
    rows = vlmbench_process('runs', '.', cwd=tmp_path).stdout.splitlines()
    assert rows[0].split()[:2] == ['id', 'notebook']
    assert sorted(r.split()[2] for r in rows[1:]) == ['completed', 'failed']


def test_show_lists_the_parameters_without_running():
    text = call('run', 'train', '--show').output
    assert 'recipe' in text and 'Literal' in text and 'method' in text


def test_runs_as_table_and_as_json(tmp_path):
    with Run(tmp_path / 'a', 'train', dict(recipe='llava', scale='tiny', seed=3)) as run:
        run.record(results=dict(score=0.625))
    table = call('runs', tmp_path).output.splitlines()
    assert table[1].split()[1:7] == ['train', 'llava', 'tiny', '3', 'completed', '0.625']
    assert json.loads(call('runs', tmp_path, '--json').output)[0]['results'] == dict(score=0.625)
    lost = call('runs', tmp_path / 'nowhere')
    assert 'no such folder' in str(lost.exception or lost.output)


def test_bench_refuses_unknown_methods_and_no_seeds(tmp_path):
    done = vlmbench_process('bench', '--methods', 'llama', cwd=tmp_path)
    assert done.returncode == 2 and 'known: llava' in done.stderr
    assert vlmbench_process('bench', '--seeds', '0', cwd=tmp_path).returncode == 2


@pytest.mark.parametrize('words, why', [(('--difficulty', 'brutal'), 'easy'), ((), 'not empty')])
def test_data_world_refuses_with_a_reason(tmp_path, words, why):
    (tmp_path / 'file').write_text('x')
    done = vlmbench_process('data', 'world', tmp_path, *words, cwd=tmp_path)
    assert done.returncode == 2 and why in done.stderr and 'Traceback' not in done.stderr


@pytest.mark.parametrize('words', ['convert m s3://b/x', 'export m gs://b/x', 'bench --out s3://b'])
def test_an_address_is_no_folder_to_write(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = CliRunner().invoke(app, words.split())
    assert said.exit_code == 1 and 'is a folder of this machine' in str(said.exception)
    assert not list(tmp_path.iterdir())


def test_cost_says_where_an_answer_has_room():
    asked = 'cost', 'llava', '--scale', 'tiny', '--gpu', 'rtx3090'
    whole, fewer = call(*asked), call(*asked, '--load', '4bit')
    assert 'has room on one rtx3090' in whole.output and 'the blocks in 4bit' in fewer.output
    weights = [
        line.split()[2:]
        for said in (whole, fewer)
        for line in said.output.splitlines()
        if line.startswith('weights (B)')
    ]
    assert weights[0] == weights[2] and weights[1] != weights[3]
    refused = call(*asked, '--load', '2bit')
    assert refused.exit_code and 'load must be one of 4bit, 8bit' in str(refused.exception)


def test_a_warning_of_a_command_is_its_message(tmp_path):
    "A row cache, a release, a base: whoever types a command sees no line of source."
    code = (
        'import sys, warnings; from vlmbench.run import cli; '
        "cli.app = lambda: warnings.warn('the pictures are squashed'); cli.main()"
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == 'warning: the pictures are squashed\n'


def test_the_early_checks_of_a_training_bring_no_torch():
    "They run in the process that starts the kernel, which imports it all again."
    code = """
import sys
from vlmbench.run.early import check_train
from vlmbench.run.engine import find_notebook
from vlmbench.run.parameters import load_notebook, notebook_parameters
declared = notebook_parameters(load_notebook(find_notebook('train')))
check_train({name: one.default for name, one in declared.items()})
print('torch' in sys.modules)
"""
    said = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert said.stdout == 'False\n', said.stderr


@pytest.mark.parametrize(
    'given, why',
    [
        (dict(recipe='lava'), "unknown recipe 'lava'; recipes are llava"),
        (dict(scale='tinny'), "unknown scale 'tinny'; scales are tiny"),
        (dict(variant='["llm=lorra"]'), 'choose one of full, lora'),
        (dict(stages='["algin"]'), "did you mean 'align'"),
        (dict(overrides='["stages.align.rate=1"]'), "'align' has no setting 'rate'"),
        (dict(data='.'), "stage 'align' reads caption_train"),
        (dict(data='nowhere'), 'is no folder'),
    ],
)
def test_a_plan_that_cannot_be_leaves_no_folder(given, why, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [f'{name}={value}' for name, value in given.items()]
    refused = call('run', 'train', *words)
    assert refused.exit_code and why in str(refused.exception)
    assert not any(tmp_path.iterdir())


def test_a_hub_that_cannot_be_reached_is_no_traceback(tmp_path, monkeypatch):
    "Without a network, and nobody having said that there is none."
    import httpx
    import huggingface_hub

    def unreachable(*given, **more):
        raise httpx.ConnectError('Name or service not known')

    monkeypatch.setenv('VLMBENCH_HOME', str(tmp_path))
    monkeypatch.setattr(huggingface_hub, 'get_hf_file_metadata', unreachable)
    for scale, fetch in (('small', 'hf download'), ('laptop', 'vlmbench weights laptop')):
        refused = call('run', 'train', f'scale={scale}')
        assert fetch in str(refused.exception) and 'ConnectError' in str(refused.exception)


def test_run_alone_lists_the_notebooks():
    said = call('run').output
    assert 'train ' in said and 'a language model learns to see' in said
