"""The papermill engine: refuses before a kernel starts, forwards signals, tells the truth about how
a run ended."""

import os, signal, subprocess, sys, time
from pathlib import Path

import nbformat, psutil, pytest

from vlmbench.run.engine import find_notebook, run_notebook, verdict
from vlmbench.run.manifest import Manifest
from vlmbench.run.parameters import ParameterError

pytestmark = pytest.mark.usefixtures('real_kernels')

PARAMETERS = "steps: int = 3  # steps\nlr: float = 0.1\nout: str = ''"
OPEN_RUN = (
    "from vlmbench.run.manifest import Run, Preempted\nrun = Run(out, 'demo', "
    'dict(steps=steps, lr=lr))'
)
TRAIN = """import time
from pathlib import Path
(run.folder/'ready').touch()
for step in range(600):
    if run.stop.is_set():
        (run.folder/'checkpoint').write_text(str(step))
        raise Preempted()
    time.sleep(.05)"""


def write(folder: Path, *cells: str) -> Path:
    "A run notebook named demo whose first cell declares the parameters."
    kernel = dict(name='python3', display_name='python3', language='python')
    nb = nbformat.v4.new_notebook(metadata=dict(kernelspec=kernel))
    nb.cells = [nbformat.v4.new_code_cell(s) for s in (PARAMETERS, *cells)]
    nb.cells[0].metadata['tags'] = ['parameters']
    nbformat.write(nb, folder / 'demo.ipynb')
    return folder / 'demo.ipynb'


def papermill(*words: object, engine: bool = True, **kw) -> subprocess.Popen:
    command = [
        sys.executable,
        '-m',
        'papermill',
        *(['--engine', 'vlmbench'] if engine else []),
        '--no-progress-bar',
    ]
    return subprocess.Popen(
        [*command, *map(str, words)],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | dict(HF_TOKEN='hf_SecretOfTheSuite'),
        **kw,
    )


def wait_for(path: Path, process: subprocess.Popen, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None and time.monotonic() < end, (
            f'{path.name} never came: {process.communicate()[1]}'
        )
        time.sleep(0.05)


def statuses(path: Path) -> list[str]:
    return [
        c.metadata.papermill.status for c in nbformat.read(path, 4).cells if c.cell_type == 'code'
    ]


def test_refused_by_papermills_own_command_before_anything_starts(tmp_path):
    nb = write(tmp_path, "open('ran', 'w')")
    p = papermill(
        nb, tmp_path / 'new' / 'out.ipynb', '-p', 'stpes', 3, '-p', 'lr', 'fast', cwd=tmp_path
    )
    message = p.communicate()[1]
    assert (
        p.returncode == 2 and "did you mean 'steps'" in message and "'lr' must be float" in message
    )
    assert (
        'Traceback' not in message
        and not (tmp_path / 'ran').exists()
        and not (tmp_path / 'new').exists()
    )


def test_term_lets_the_notebook_checkpoint_and_the_next_attempt_continue(tmp_path):
    nb = write(tmp_path, OPEN_RUN, TRAIN, "print('after')")
    p = papermill(
        nb, tmp_path / 'r' / 'out.ipynb', '-y', '{lr: 1e-3}', cwd=tmp_path
    )  # YAML reads 1e-3 as text
    wait_for(tmp_path / 'r' / 'ready', p)
    p.send_signal(signal.SIGTERM)
    message = p.communicate(timeout=60)[1]
    m = Manifest(tmp_path / 'r').read()
    assert (
        p.returncode == 75 == m['exit_code']
        and m['status'] == 'preempted'
        and 'preempted: ' in message
    )
    assert m['signals'] == ['SIGTERM'] and m['parameters'] == dict(
        steps=3, lr=1e-3, out=str(tmp_path / 'r')
    )
    assert int((tmp_path / 'r' / 'checkpoint').read_text()) >= 0
    saved = nbformat.read(tmp_path / 'r' / 'out.ipynb', 4)
    assert (
        'lr = 0.001' in saved.cells[1].source
        and statuses(tmp_path / 'r' / 'out.ipynb')[-1] == 'not run'
    )
    for name in ('manifest.json', 'out.ipynb'):
        assert 'hf_SecretOfTheSuite' not in (tmp_path / 'r' / name).read_text()

    done = write(tmp_path, OPEN_RUN, 'run.record(results=dict(score=1.)); run.finish()')
    assert run_notebook(done, {}, tmp_path / 'r', progress=False) == 0
    m = Manifest(tmp_path / 'r').read()
    assert m['status'] == 'completed' and [a['status'] for a in m['attempts']] == ['preempted']
    with pytest.raises(ParameterError, match='completed run'):
        run_notebook(done, {}, tmp_path / 'r', progress=False)


def test_a_kernel_without_a_handler_is_interrupted_and_the_notebook_saved(tmp_path):
    nb = write(
        tmp_path,
        "import time, pathlib\nprint('begun', flush=True); pathlib.Path(out, 'ready').touch(); "
        'time.sleep(60)',
    )
    p = papermill(nb, tmp_path / 'r' / 'out.ipynb', cwd=tmp_path)
    wait_for(tmp_path / 'r' / 'ready', p)
    p.send_signal(signal.SIGUSR1)
    p.communicate(timeout=30)
    m = Manifest(tmp_path / 'r').read()
    assert p.returncode == 75 and m['status'] == 'preempted' and 'KeyboardInterrupt' in m['reason']
    assert 'begun' in (tmp_path / 'r' / 'out.ipynb').read_text() and 'failed' in statuses(
        tmp_path / 'r' / 'out.ipynb'
    )


def test_a_killed_kernel_is_failed_and_takes_its_children_along(tmp_path):
    child = [sys.executable, '-c', 'import time; time.sleep(300)']
    nb = write(
        tmp_path,
        f'import subprocess, os, signal, pathlib\np = subprocess.Popen({child!r}, '
        'start_new_session=True)\n'
        "pathlib.Path(out, 'child').write_text(str(p.pid)); os.kill(os.getpid(), signal.SIGKILL)",
        'print(1)',
    )
    assert run_notebook(nb, {}, tmp_path / 'r', progress=False, quiet=True) == 138
    m = Manifest(tmp_path / 'r').read()
    assert (
        m['status'] == 'failed'
        and m['exit_code'] == 138
        and 'the kernel died: SIGKILL' in m['reason']
    )
    assert m['killed_processes'] == 1
    assert not psutil.pid_exists(int((tmp_path / 'r' / 'child').read_text()))
    assert [s for s in statuses(tmp_path / 'r' / 'demo.ipynb')][-2:] == ['failed', 'not run']


def test_a_chatty_cell_neither_times_out_nor_bloats_and_a_failing_one_is_named(tmp_path):
    nb = write(
        tmp_path,
        "for i in range(20_000): print('line', i, flush=True)",
        "raise ValueError('seven is no head count')",
    )
    assert run_notebook(nb, dict(steps='5'), tmp_path / 'r', progress=False, quiet=True) == 1
    m = Manifest(tmp_path / 'r').read()
    assert (
        m['status'] == 'failed'
        and m['reason'] == 'ValueError: seven is no head count'
        and m['exit_code'] == 1
    )
    log = (tmp_path / 'r' / 'output.log').read_text()
    assert log.startswith('line 0\n') and log.count('\n') >= 20_000 and 'line 19999' in log
    assert (tmp_path / 'r' / 'demo.ipynb').stat().st_size < 300_000
    assert 'the rest is in output.log' in (tmp_path / 'r' / 'demo.ipynb').read_text()


def test_a_killed_engine_leaves_a_lost_run_and_no_kernel(tmp_path):
    nb = write(
        tmp_path,
        OPEN_RUN,
        "import os\n(run.folder/'pid').write_text(str(os.getpid()))\nimport time; time.sleep(60)",
    )
    p = papermill(nb, tmp_path / 'r' / 'out.ipynb', cwd=tmp_path)
    wait_for(tmp_path / 'r' / 'pid', p)
    time.sleep(0.1)
    kernel = psutil.Process(int((tmp_path / 'r' / 'pid').read_text()))
    p.kill()
    p.communicate()
    assert Manifest(tmp_path / 'r').status() == 'lost'
    psutil.wait_procs([kernel], timeout=15)
    assert not kernel.is_running()


def test_the_same_notebook_under_plain_papermill_writes_its_own_manifest(tmp_path):
    nb = write(
        tmp_path,
        OPEN_RUN,
        'run.record(results=dict(score=lr*steps))',
        'run.finish() if steps < 5 else 1/0',
    )
    for steps, status in ((4, 'completed'), (6, 'failed')):
        out = tmp_path / f'r{steps}'
        p = papermill(
            nb,
            tmp_path / 'out.ipynb',
            '-p',
            'steps',
            steps,
            '-p',
            'out',
            out,
            engine=False,
            cwd=tmp_path,
        )
        p.communicate(timeout=60)
        m = Manifest(out).read()
        assert m['status'] == status and m['results'] == dict(score=0.1 * steps)
        assert (p.returncode == 0) == (status == 'completed')
    assert m['reason'] == 'ZeroDivisionError: division by zero'


def test_notebooks_are_found_by_name_and_path(tmp_path, monkeypatch):
    nb = write(tmp_path)
    assert find_notebook(nb) == nb
    (tmp_path / 'nbs' / 'runs').mkdir(parents=True)
    nb.rename(tmp_path / 'nbs' / 'runs' / 'demo.ipynb')
    monkeypatch.chdir(tmp_path)
    assert find_notebook('demo') == find_notebook('demo.ipynb') == Path('nbs/runs/demo.ipynb')
    with pytest.raises(ParameterError, match='demo'):
        find_notebook('nothing')


class CellError(Exception):
    def __init__(self, name, value):
        self.ename, self.evalue = name, value


@pytest.mark.parametrize(
    'error, signals, finished, status',
    [
        (None, [], True, 'completed'),
        (None, ['SIGTERM'], True, 'completed'),
        (None, ['SIGTERM'], False, 'preempted'),
        (None, ['SIGINT'], False, 'interrupted'),
        (CellError('KeyboardInterrupt', ''), [], False, 'interrupted'),
        (CellError('SystemExit', '75'), [], False, 'preempted'),
        (CellError('SystemExit', '0'), [], False, 'completed'),
        (CellError('SystemExit', '3'), [], False, 'failed'),
        (CellError('ValueError', 'x'), [], False, 'failed'),
        (RuntimeError('no kernel'), [], False, 'failed'),
        (None, [], False, 'failed'),
    ],
)
def test_verdicts(error, signals, finished, status):
    assert verdict(error, signals, finished)[0] == status


def test_two_runs_started_from_the_same_folder_have_kernels_of_their_own(tmp_path):
    nb = write(
        tmp_path,
        'import os, time\nfrom pathlib import '
        "Path\nPath(out).mkdir(exist_ok=True)\n(Path(out)/'ready').touch()\n"
        "while not Path('go').exists(): time.sleep(.05)\nprint('kernel of', out)",
    )
    both = [
        papermill(nb, tmp_path / f'{n}.ipynb', '-p', 'out', n, engine=True, cwd=tmp_path)
        for n in ('a', 'b')
    ]
    for n, p in zip('ab', both):
        wait_for(tmp_path / n / 'ready', p)
    (tmp_path / 'go').touch()
    for n, p in zip('ab', both):
        assert p.wait(60) == 0, p.communicate()[1]
        texts = [
            o.get('text', '')
            for c in nbformat.read(tmp_path / f'{n}.ipynb', 4).cells
            for o in c.get('outputs', [])
        ]
        assert f'kernel of {n}\n' in texts
    assert not list(tmp_path.glob('kernel-ipc*'))
