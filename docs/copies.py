"""Notebooks in processes of their own that need not import torch and the rest anew: each is a copy
of one process that has: for the site, for `make test-notebooks` and for `make tutorials`."""

import atexit
import os
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any, Callable

# other packages that nearly every notebook imports (ten seconds of a processor). Never vlmbench
# itself: what a notebook needs of it, it must import
IMPORTED = [
    'warm',
    'papermill',
    'torch',
    'transformers.models.clip.modeling_clip',
    'transformers.models.llama.modeling_llama',
    'transformers.models.siglip.modeling_siglip',
    'peft',
    'accelerate',
    'datasets',
    'sklearn.metrics',
    'scipy.stats',
    'matplotlib.pyplot',
    'nbdev.process',
    'nbdev.processors',
    'nbdev.showdoc',
    'nbdev.test',
    'execnb.shell',
]


def warm_context() -> ForkServerContext:
    "Where copies come from; what they find in the environment is set here."
    os.environ |= dict(OMP_NUM_THREADS='1', OMP_WAIT_POLICY='PASSIVE', HF_HUB_OFFLINE='1')
    # what tutorials leave below runs/ when somebody reads them
    runs = tempfile.mkdtemp(prefix='vlmbench-runs-')
    atexit.register(shutil.rmtree, runs, ignore_errors=True)
    os.environ['VLMBENCH_RUNS'] = runs
    context = get_context('forkserver')
    context.set_forkserver_preload(IMPORTED)
    return context


def _written(said: Path, target: Callable, arguments: tuple[Any, ...]) -> None:
    "`target` with all that it prints, also from processes that it starts, in the file `said`."
    with open(said, 'w', encoding='utf8') as f:
        os.dup2(f.fileno(), 1)
        os.dup2(f.fileno(), 2)
    target(*arguments)
    sys.stdout.flush()


def in_a_copy(
    context: ForkServerContext, target: Callable, arguments: tuple, said: Path, timeout: float
) -> str | None:
    """Run `target(*arguments)` in a copy; None, or what went wrong with the last it printed.
    `timeout`: seconds."""
    said.parent.mkdir(parents=True, exist_ok=True)
    process = context.Process(target=_written, args=(said, target, arguments))
    process.start()
    process.join(timeout)
    if process.is_alive():
        process.kill()
        return f'still running after {timeout:.0f} s'
    if process.exitcode:
        return f'exit {process.exitcode}\n{said.read_text(encoding="utf8")[-8000:]}'
    said.unlink()
    return None


@dataclass(frozen=True)
class Work:
    "What one copy does: `target(*arguments)`; what it prints goes to the file `said`."

    name: str
    target: Callable
    arguments: tuple
    said: Path


@dataclass(frozen=True)
class Outcome:
    "How it ended: `failure` is None, or what went wrong; `seconds` it took."

    name: str
    failure: str | None
    seconds: float


def in_copies(work: list[Work], jobs: int, timeout: float) -> list[Outcome]:
    "All of `work`, `jobs` at a time, each at most `timeout` seconds; a line is printed for each."
    context = warm_context()

    def one(what: Work) -> Outcome:
        started = time.monotonic()
        failure = in_a_copy(context, what.target, what.arguments, what.said, timeout)
        print(f'  {"FAILED " if failure else ""}{what.name}', flush=True)
        return Outcome(what.name, failure, time.monotonic() - started)

    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(one, work))
