"""Ranks without their start: one process imports everything once, and every set of ranks that a
test asks for is a set of copies of it, joined by gloo as torchrun would join them. `launch`, which
starts torchrun, has tests of its own (test_launch.py, test_runs_ranks.py, test_large_models.py)."""

import atexit
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from functools import lru_cache
from pathlib import Path

os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')

from vlmbench.data.files import write_json
from vlmbench.train.launch import Layout, LaunchError, _Watch, rank_environment, worker

HERE = Path(__file__).parent


@lru_cache(maxsize=1)
def server():
    "The process that copies itself; it ends with this one."
    paths = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get('PYTHONPATH', '')])
    process = subprocess.Popen(
        [sys.executable, str(HERE / 'rank_server.py')],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, 'PYTHONPATH': paths, 'OMP_NUM_THREADS': '1'},
    )
    atexit.register(process.stdin.close)
    return process


def on_ranks(target, folder, ranks, timeout, until=None, **settings):
    """`target` on so many CPU ranks of one thread, with logs in `folder/logs`; returns and raises
    what `launch` does. `until`: asks the ranks to stop once it is true."""
    place = Path(folder).absolute() / 'logs'
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    write_json(place / 'work.json', dict(target=target, settings=settings))
    watch = _Watch(target, Layout(ranks), place, 300.0, timeout, None)
    with socket.create_server(('127.0.0.1', 0)) as free:
        port = free.getsockname()[1]
    env = rank_environment(Layout(ranks), place, 1)
    env |= dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), WORLD_SIZE=str(ranks))
    env |= dict(LOCAL_WORLD_SIZE=str(ranks), GROUP_RANK='0')
    asked = dict(folder=str(place), ranks=ranks, env=env, timeout=timeout)
    process = server()
    print(json.dumps(asked), file=process.stdin, flush=True)
    while until is not None and not (place / 'ended').exists():
        if until():
            watch.ask_to_stop('asked by the test')
            break
        time.sleep(0.02)
    said = process.stdout.readline()
    if said != 'ended\n':
        raise LaunchError(f'{target}: {said or "the server of the ranks is gone"}; see {place}')
    return watch.result()


def serve():
    "For each line of standard input, a set of ranks; a line of standard output when they are gone."
    # what the ranks import is there before they are
    import sharding_stubs, train_stubs  # noqa: F401
    import vlmbench.run.jobs  # noqa: F401

    out = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)
    for line in sys.stdin:
        asked = json.loads(line)
        said = run_ranks(**asked)
        Path(asked['folder'], 'ended').touch()
        print(said, file=out, flush=True)


def run_ranks(folder, ranks, env, timeout):
    "Copies of this process run the work in `folder`; once one fails the others are ended."
    running, end, failed = {}, time.monotonic() + timeout, False
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            os.environ.update(env, RANK=str(rank), LOCAL_RANK=str(rank))
            try:
                os.chdir(folder)
                worker(folder)
                code = 0
            except BaseException:  # it is written already
                code = 1
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        running[child] = rank
    while running and time.monotonic() < end:
        for child in list(running):
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                del running[child]
                failed = failed or os.waitstatus_to_exitcode(status) != 0
        if failed and running:
            end = min(end, time.monotonic() + 1)  # the others may be about to say why, too
        time.sleep(0.02)
    late = bool(running) and not failed
    for child in running:
        os.kill(child, 9)
        os.waitpid(child, 0)
    return f'no end after {timeout} s' if late else 'ended'


if __name__ == '__main__':
    serve()
