"""Runs seen from outside: a queue asked by its own commands, and runs of other processes."""

import json
import os
import socket
import subprocess
import sys

import pytest

from vlmbench.lab.run_browser import RunActionError, can_stop, resume_plan, stop_run
from vlmbench.lab.run_folders import RunIndex


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    "squeue that knows job 7, and scancel that notes what it was told."
    tools = tmp_path / 'bin'
    tools.mkdir()
    for name, text in (
        ('squeue', "echo '7|PENDING|Priority'"),
        ('scancel', f'echo $@ > {tools}/told'),
    ):
        (tools / name).write_text(f'#!/bin/sh\n{text}\n')
        (tools / name).chmod(0o755)
    monkeypatch.setenv('PATH', f'{tools}:{os.environ["PATH"]}')
    return tools


def test_a_queued_job_is_in_the_table_and_can_be_cancelled(tmp_path, slurm):
    folder = tmp_path / 'runs' / 'waits'
    folder.mkdir(parents=True)
    asked = dict(job='7', notebook='train', parameters=dict(recipe='vora', scale='paper'))
    (folder / 'job.json').write_text(json.dumps(asked))
    index = RunIndex(tmp_path / 'runs')
    (row,), _ = index.refresh()
    assert (row['status'], row['queue'], row['where']) == ('submitted', 'pending', 'Priority')
    assert (row['recipe'], row['scale'], can_stop(row)) == ('vora', 'paper', True)
    stop_run(folder, row['job'])
    assert (slurm / 'told').read_text() == '7\n'
    (slurm / 'squeue').write_text('#!/bin/sh\n')
    (row,), _ = index.refresh()
    assert (row['status'], row['queue'], can_stop(row)) == ('never started', '', False)


def test_a_run_of_another_machine_is_left_alone(tmp_path):
    host = dict(hostname=socket.gethostname() + '-other')
    value = dict(status='running', pid=os.getpid(), host=host, notebook='train', parameters={})
    (tmp_path / 'manifest.json').write_text(json.dumps(value))
    (tmp_path / 'heartbeat').write_text('')
    (row,), _ = RunIndex(tmp_path).refresh()
    assert row['status'] == 'running' and not can_stop(row)
    with pytest.raises(RunActionError, match='not on this machine'):
        stop_run(tmp_path)
    with pytest.raises(RunActionError, match='still going on'):
        resume_plan(tmp_path)


def test_looking_at_runs_brings_nothing_heavy():
    code = (
        'import sys, vlmbench.run.manifest, vlmbench.lab.run_folders; '
        "print([m for m in ('torch', 'pandas', 'numpy', 'anywidget') if m in sys.modules])"
    )
    asked = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert asked.stdout == '[]\n'
