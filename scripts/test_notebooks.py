"""The notebooks' own tests, each notebook in a process of its own, two at a time.

python scripts/test_notebooks.py [PATH ...]      all, or those at or below these paths

nbdev_test runs one notebook after the other in the same process. What one leaves behind, such as
its own copy of a class that it has registered with transformers, then decides whether the next
passes, and which is next differs from run to run. Here nbdev's `test_nb` does the same work in
copies of a process that has imported everything else.
"""

import sys
import tempfile
from pathlib import Path

root = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(root / 'docs'))

from copies import Work, in_copies

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
    with tempfile.TemporaryDirectory() as folder:
        names = [path.relative_to(root / 'nbs') for path in files]
        logs = [Path(folder) / f'{"-".join(name.parts)}.log' for name in names]
        work = [Work(str(n), test_one, (p,), s) for n, p, s in zip(names, files, logs)]
        done = in_copies(work, JOBS, TIMEOUT)
    for outcome in sorted(done, key=lambda o: o.seconds, reverse=True)[:10]:
        print(f'{outcome.seconds:4.0f} s  {outcome.name}')
    failures = [f'{o.name}: {o.failure}' for o in done if o.failure]
    print(f'{len(files) - len(failures)} of {len(files)} notebooks passed')
    sys.exit('\n\n'.join(failures) or 0)


if __name__ == '__main__':
    main()
