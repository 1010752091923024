"""Bring everything that is generated from the notebooks up to date, in one place:

* every file              formatted (ruff format, notebooks too)
* `vlmbench/`              exported modules (nbdev_export)
* `nbs/**/*.ipynb`         without stray metadata (nbdev_clean) and without outputs, which only
                           tutorials keep (scripts/tutorials.py)
* `vlmbench/_notebooks/`   copies of `nbs/runs/*.ipynb`, so that an installed wheel can run them
* `README.md`              `nbs/index.ipynb` as Markdown

    python scripts/export.py            write
    python scripts/export.py --check    write, and exit 1 naming every file that was not current
"""

import hashlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
from execnb.nbio import read_nb, write_nb
from nbconvert import MarkdownExporter

root = Path(__file__).resolve().parent.parent
NOTICE = (
    '<!-- Made from nbs/index.ipynb by scripts/export.py: edit the notebook, not this file. -->\n\n'
)


def notebooks(folder: Path) -> list[Path]:
    "Every notebook below `folder`, checkpoints left out."

    def hidden(p: Path) -> bool:
        return any(s.startswith(('.', '_')) for s in p.relative_to(folder).parts)

    return sorted(p for p in folder.rglob('*.ipynb') if not hidden(p))


def strip() -> None:
    """Empty the outputs of every notebook but the tutorials, which are read where nothing is
    executed; the site makes them afresh."""
    for path in notebooks(root / 'nbs'):
        if path.parent.name == 'tutorials':
            continue
        nb = read_nb(path)
        stored = [c for c in nb.cells if c.cell_type == 'code' and c.outputs]
        for cell in stored:
            cell.outputs = []
        if stored:
            write_nb(nb, path)


def mirror() -> None:
    "Copy `nbs/runs/*.ipynb` to `vlmbench/_notebooks/` and delete copies whose original is gone."
    src, dst = root / 'nbs' / 'runs', root / 'vlmbench' / '_notebooks'
    dst.mkdir(exist_ok=True)
    wanted = {p.name for p in notebooks(src)} if src.exists() else set()
    for old in dst.glob('*.ipynb'):
        if old.name not in wanted:
            old.unlink()
    for name in sorted(wanted):
        shutil.copyfile(src / name, dst / name)


def readme() -> None:
    """Render the home page notebook as README.md: no directives, no hidden cells, links relative to
    the root."""
    nb = nbformat.read(root / 'nbs' / 'index.ipynb', as_version=4)
    nb.cells = [c for c in nb.cells if not re.match(r'#\|\s*hide\b', c.source)]
    for cell in nb.cells:
        if cell.cell_type == 'code':
            cell.source = re.sub(r'^#\|.*\n?', '', cell.source, flags=re.M)
        else:
            inside = re.sub(r'\]\((?![a-z]+:|#|/|\.\./)([^)]+)\)', r'](nbs/\1)', cell.source)
            cell.source = inside.replace('](../', '](')
    nb.metadata['language_info'] = {'name': 'python'}
    body, _ = MarkdownExporter().from_notebook_node(nb)
    text = '\n'.join(line.rstrip() for line in body.strip().splitlines())
    (root / 'README.md').write_text(
        NOTICE + re.sub(r'\n{3,}', '\n\n', text) + '\n', encoding='utf8'
    )


def snapshot() -> dict[str, str]:
    "Hash of every file these steps may write."
    package = root / 'vlmbench'
    files = [
        *notebooks(root / 'nbs'),
        *package.rglob('*.py'),
        *(package / '_notebooks').glob('*.ipynb'),
        root / 'README.md',
    ]
    return {
        str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in files
        if p.exists()
    }


def main(check: bool) -> int:
    before = snapshot()
    bin_ = Path(sys.executable).parent
    subprocess.run([bin_ / 'ruff', 'format', '--quiet', '.'], cwd=root, check=True)
    for tool in ('nbdev_export', 'nbdev_clean'):
        subprocess.run([bin_ / tool], cwd=root, check=True)
    strip()
    mirror()
    readme()
    after = snapshot()

    # a module whose notebook is gone would survive every export
    def orphan(p: Path) -> bool:
        m = re.search(r'File to edit: (\S+\.ipynb)', p.read_text(encoding='utf8'))
        return bool(m) and not (p.parent / m[1]).exists()

    orphans = [str(p.relative_to(root)) for p in (root / 'vlmbench').rglob('*.py') if orphan(p)]
    changed = sorted(n for n in before.keys() | after.keys() if before.get(n) != after.get(n))
    for name in orphans:
        print(f'{name}: exported from a notebook that no longer exists; delete it', file=sys.stderr)
    print(
        f'{len(after)} files, {len(changed)} {"not current" if check else "updated"}',
        *changed,
        sep='\n  ',
    )
    return int(bool(orphans) or (check and bool(changed)))


if __name__ == '__main__':
    if set(sys.argv[1:]) - {'--check'}:
        sys.exit(__doc__)
    sys.exit(main('--check' in sys.argv))
