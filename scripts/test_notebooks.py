"""The notebooks' own tests, each notebook in a process of its own, two at a time.

python scripts/test_notebooks.py [PATH ...]      all, or those at or below these paths

nbdev_test runs one notebook after the other in the same process. What one leaves behind, such as
its own copy of a class that it has registered with transformers, then decides whether the next
passes, and which is next differs from run to run. Here nbdev's `test_nb` does the same work in
copies of a process that has imported everything else.
"""

import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

root = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(root / 'docs'))

from copies import in_a_copy, warm_context

JOBS, TIMEOUT = 2, 600  # processes; seconds for one notebook


def test_one(path: Path) -> None:
    "Run one notebook's cells; ends the process with 1 where one fails."
    from nbdev.config import get_config
    from nbdev.test import test_nb

    passed, _ = test_nb(path, skip_flags=get_config().tst_flags.split(), basepath=root)
    sys.exit(0 if passed else 1)


def chosen(paths: list[str]) -> list[Path]:
    "The notebooks at or below `paths`, without run notebooks, which need settings."
    found = []
    for path in map(Path, paths):
        found += [path.resolve()] if path.is_file() else sorted(path.resolve().rglob('*.ipynb'))
    nbs = root / 'nbs'
    inside = [(path, path.relative_to(nbs).parts) for path in found]
    return [p for p, parts in inside if parts[0] != 'runs' and not any(x[0] in '._' for x in parts)]


def main() -> None:
    files = chosen(sys.argv[1:] or [str(root / 'nbs')])
    context, failures, took = warm_context(), [], []
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(JOBS) as pool:

        def one(path: Path) -> None:
            name, started = path.relative_to(root / 'nbs'), time.monotonic()
            said = Path(folder) / f'{"-".join(name.parts)}.log'
            failure = in_a_copy(context, test_one, (path,), said, TIMEOUT)
            took.append((time.monotonic() - started, name))
            print(f'{"FAILED" if failure else "ok"} {name}', flush=True)
            if failure:
                failures.append(f'{name}: {failure}')

        list(pool.map(one, files))
    for seconds, name in sorted(took, reverse=True)[:10]:
        print(f'{seconds:4.0f} s  {name}')
    print(f'{len(files) - len(failures)} of {len(files)} notebooks passed')
    sys.exit('\n\n'.join(failures) or 0)


if __name__ == '__main__':
    main()
