"""Notebook kernels and commands without their start, for tests of what they do. A process imports
once what every run notebook imports, and each kernel is a copy of it; Jupyter starts
`warm_kernels.py ask`, which stands for the kernel: it passes on signals, and ends when and as the
copy does. `vlmbench` starts a command in the same way. What a start, a death and signals do is
tested with real processes (test_engine.py, test_cli.py, test_wheel.py).
"""

import atexit
import fcntl
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

# what packages read while they are imported: a kernel that has them otherwise starts as usual
READ_EARLY = (
    *('HF_', 'TRANSFORMERS_', 'TOKENIZERS_', 'DATASETS_', 'OMP_', 'MKL_', 'TORCH', 'PYTHON'),
    *('CUDA_', 'MPL', 'XDG_', 'HOME', 'LD_', 'PATH', 'JUPYTER_DATA_DIR', 'IPYTHONDIR', 'WANDB'),
)
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def read_early(environment):
    "The part of an environment that a finished import cannot follow."
    early = {k: v for k, v in environment.items() if k.startswith(READ_EARLY)}
    early.pop('OMP_NUM_THREADS', None)  # `use_threads` follows it
    return early


def use_threads(environment):
    "Compute with as many threads as `environment` says, all cores where it says nothing."
    import torch

    torch.set_num_threads(int(environment.get('OMP_NUM_THREADS', os.cpu_count())))


def install(folder):
    "A kernel `python3` below `folder` (for JUPYTER_PATH) whose kernels are copies."
    spec = Path(folder) / 'kernels' / 'python3' / 'kernel.json'
    spec.parent.mkdir(parents=True)
    ask = [sys.executable, '-I', '-S', __file__, 'ask', str(folder), str(os.getpid())]
    command = [*ask, 'ipykernel_launcher', '-f', '{connection_file}']
    spec.write_text(json.dumps(dict(argv=command, display_name='Python 3', language='python')))


def vlmbench(*words, cwd=None, env=None, timeout=600):
    "Run the command with `words` in the folder `cwd`, as subprocess.run does."
    folder = os.environ['VLMBENCH_TEST_KERNELS']
    spec = json.loads((Path(folder) / 'kernels' / 'python3' / 'kernel.json').read_text())
    owner = spec['argv'][spec['argv'].index('ipykernel_launcher') - 1]
    place = Path(folder) / 'commands'
    place.mkdir(exist_ok=True)
    command = [sys.executable, '-I', '-S', __file__, 'ask', str(place), owner, 'vlmbench']
    command += map(str, words)
    how = dict(cwd=cwd, env=env, timeout=timeout, capture_output=True, text=True)
    return subprocess.run(command, **how)


def start_as_usual(arguments):
    "Be a kernel or a command without a copy."
    os.execv(sys.executable, [sys.executable, '-m', *arguments])


def connect(folder, owner):
    """The way to the process that is copied, or None: it is started for the first kernel, which
    does not wait for its imports, and ends with `owner`."""
    with open(Path(folder) / 'lock', 'a') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (Path(folder) / 'log').exists():
            with open(Path(folder) / 'log', 'w') as log:
                command = [sys.executable, __file__, 'serve', folder, owner]
                # a run ends every process that has its number
                own = {k: v for k, v in os.environ.items() if not k.startswith('VLMBENCH_')}
                nothing = subprocess.DEVNULL
                subprocess.Popen(command, stdin=nothing, stdout=log, stderr=log, env=own)
    door = socket.socket(socket.AF_UNIX)
    try:
        door.connect(f'{folder}/socket')
    except OSError:
        return None
    return door


def ask(folder, owner, *arguments):
    "Stand for a kernel: ask for a copy, pass signals on, end as it does."
    door = connect(folder, owner)
    if door is None:
        start_as_usual(arguments)
    asked = dict(environment=dict(os.environ), folder=os.getcwd(), arguments=arguments)
    text = json.dumps(asked).encode()
    socket.send_fds(door, [len(text).to_bytes(4, 'big')], [0, 1, 2])
    door.sendall(text)
    pid = int(door.makefile('rb', buffering=0).readline())
    if not pid:  # its environment differs
        start_as_usual(arguments)
    for number in FORWARDED:
        signal.signal(number, lambda number, frame: os.kill(pid, number))
    code = int(door.makefile('rb', buffering=0).readline() or b'-9')
    if code < 0:
        signal.signal(-code, signal.SIG_DFL) if code != -9 else None
        os.kill(os.getpid(), -code)
    sys.exit(code)


def work(module):
    "Be what `module` is."
    if module == 'vlmbench':
        from vlmbench.run.cli import main

        main()
    else:
        from ipykernel import kernelapp

        kernelapp.launch_new_instance()


def become(asked, streams):
    "What the copy does: take over streams, folder and environment, and be a kernel or command."
    os.setpgid(0, 0)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    os.chdir(asked['folder'])
    os.environ.clear()
    os.environ.update(asked['environment'], JPY_PARENT_PID=str(os.getppid()))
    use_threads(asked['environment'])
    sys.argv = asked['arguments']
    signal.signal(signal.SIGINT, signal.default_int_handler)
    code = 0
    try:
        work(sys.argv[0])
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else int(e.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def take(door, environment, others):
    "Answer one stand-in: the number of its copy, or 0 if it must start as usual."
    head, streams, _, _ = socket.recv_fds(door, 4, 3)
    asked = json.loads(door.recv(int.from_bytes(head, 'big'), socket.MSG_WAITALL))
    pid, other = 0, read_early(asked['environment']).items() ^ read_early(environment).items()
    if other:
        print('a kernel starts as usual, because of', sorted(dict(other)), flush=True)
    else:
        pid = os.fork()
        if pid == 0:
            for other in (door, *others):
                other.close()
            become(asked, streams)
    for stream in streams:
        os.close(stream)
    door.sendall(f'{pid}\n'.encode())
    return pid


def alive(pid):
    "Whether there is such a process."
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True


def serve(folder, owner):
    "Import, then copy this process for each stand-in until the process `owner` is gone."
    os.setsid()
    environment = dict(os.environ)  # imports may add to it
    if not folder.endswith('commands'):  # what has imported this takes itself for a notebook
        import ipykernel.kernelapp  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import vlmbench.lab.plots, vlmbench.lab.report, vlmbench.run.bench, vlmbench.run.jobs  # noqa
    import vlmbench.run.cli  # noqa: F401

    sys.path.pop(0)
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(f'{folder}/socket')
    listening.listen(16)
    running = {}  # pid of a copy -> the door of its stand-in
    while alive(int(owner)):
        ready, _, _ = select.select([listening, *running.values()], [], [], 0.05)
        for pid, door in list(running.items()):
            if door in ready and not door.recv(1):  # the stand-in was killed
                os.kill(pid, signal.SIGKILL)
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                try:
                    door.sendall(f'{os.waitstatus_to_exitcode(status)}\n'.encode())
                except OSError:
                    pass
                running.pop(pid).close()
        if listening in ready:
            door, _ = listening.accept()
            if pid := take(door, environment, [listening, *running.values()]):
                running[pid] = door
            else:
                door.close()
    for pid in running:
        os.kill(pid, signal.SIGKILL)


if __name__ == '__main__':
    dict(ask=ask, serve=serve)[sys.argv[1]](*sys.argv[2:])
