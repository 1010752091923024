"""Build the documentation site from the notebooks: no Quarto, no CDN, warnings are errors.

    python docs/build.py [--output _site] [--jobs 2] [--only nbs/data/00_record.ipynb ...]
    [--no-execute] [--no-math]

1. Every notebook is executed in a process of its own, in its own folder, and its outputs are kept
   in `_proc/run`; it is not executed again while it and the modules that it reads stay the same.
   Exported cells fold away behind an API entry for each public symbol. Notebooks in `nbs/runs` are
   experiments and not executed.
2. Names in backticks become links; pages for commands, data cards, stored results and the
   contributor guide join, and those behind the four doors (`_proc/src`).
3. Sphinx with myst-nb writes `_site`, which opens from file:// with search: all of it, or only
   what differs from the last time where no page has come, gone or changed its title. A last pass
   refuses resources from other hosts.
"""

import argparse
import filecmp
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from commands import command_pages
from doors import navigation, title_and_subtitle
from links import link_pages
from notebooks import execute_all, notebooks
from pages import data_cards, guide
from places import kept_dir, nbs, root, src_dir
from results import copy_reports, results_pages


def mathjax(static: Path) -> None:
    "MathJax 3 from its npm package into the static folder, once; formulas then need no network."
    if (static / 'mathjax' / 'tex-mml-chtml.js').exists():
        return
    if not shutil.which('npm'):
        sys.exit(
            'docs: MathJax comes from npm, which is not installed. Install npm, or pass --no-math '
            'to show TeX.'
        )
    with tempfile.TemporaryDirectory() as tmp:
        fetch = ['npm', 'pack', 'mathjax@3', '--silent', '--pack-destination', tmp]
        subprocess.run(fetch, check=True, stdout=subprocess.DEVNULL)
        with tarfile.open(next(Path(tmp).glob('mathjax-*.tgz'))) as tar:
            for m in tar.getmembers():
                name = m.name.removeprefix('package/es5/')
                wanted = re.fullmatch(r'tex-mml-chtml\.js|output/chtml/fonts/woff-v2/[\w.-]+', name)
                if not m.isfile() or not wanted:
                    continue
                target = static / 'mathjax' / name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(tar.extractfile(m).read())
    print('  MathJax unpacked')


def titles() -> str:
    "Every page with its title: what the navigation of all the others shows."
    pages = [p for p in src_dir.rglob('*') if p.suffix in ('.md', '.ipynb')]
    names = sorted(p.relative_to(src_dir).with_suffix('').as_posix() for p in pages)
    return '\n'.join(f'{name}: {title_and_subtitle(name)[0]}' for name in names)


def bring_over() -> None:
    "Put what this build wrote where Sphinx reads; a file that stays the same keeps its time."
    for old in kept_dir.rglob('*') if kept_dir.exists() else ():
        if old.is_file() and not (src_dir / old.relative_to(kept_dir)).is_file():
            old.unlink()
    for new in src_dir.rglob('*'):
        kept = kept_dir / new.relative_to(src_dir)
        if new.is_dir() or kept.is_file() and filecmp.cmp(new, kept, shallow=False):
            continue
        kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(new, kept)


def start_over_if_pages_differ(output: Path) -> None:
    "Forget the site that was built before unless it is whole, with the same pages and titles."
    stamp, now = root / '_proc' / 'titles.txt', f'{output}\n{titles()}'
    whole = stamp.exists() and (output / 'searchindex.js').exists()  # written last
    if not whole or stamp.read_text(encoding='utf8') != now:
        shutil.rmtree(output, ignore_errors=True)
    stamp.write_text(now, encoding='utf8')


def foreign_resources(site: Path) -> list[str]:
    "Scripts, styles, fonts and pictures that a page would fetch from another host."
    loads = re.compile(
        r'<(?:script|img|iframe|source)\b[^>]*?\bsrc="((?:https?:)?//[^"]+)"|'
        r'<link\b(?=[^>]*rel="(?:stylesheet|preload|icon)")[^>]*?href="((?:https?:)?//[^"]+)"'
    )
    found = []
    for page in sorted(site.rglob('*.html')):
        html = re.sub(r'<pre.*?</pre>', '', page.read_text(encoding='utf8'), flags=re.S)
        found += [f'{page.relative_to(site)}: {m[1] or m[2]}' for m in loads.finditer(html)]
    return found


def main() -> None:
    ap = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ap.add_argument('--output', type=Path, default=root / '_site')
    ap.add_argument('--jobs', type=int, default=2, help='notebooks and pages made at once')
    ap.add_argument(
        '--only',
        nargs='*',
        type=Path,
        help='only these notebooks and the home page; a draft: warnings do not count',
    )
    ap.add_argument(
        '--no-execute', action='store_true', help='do not run example cells: pages without outputs'
    )
    ap.add_argument(
        '--no-math', action='store_true', help='do without MathJax: formulas appear as TeX'
    )
    args = ap.parse_args()

    files = notebooks()
    if args.only:
        files = [p for p in files if p in {o.resolve() for o in args.only} | {nbs / 'index.ipynb'}]
    print(f'docs: {len(files)} notebooks', flush=True)
    execute_all(files, args.jobs, not args.no_execute)
    shutil.rmtree(src_dir, ignore_errors=True)
    src_dir.mkdir(parents=True)
    link_pages(files)
    navigation(files, results_pages(), [*command_pages(), *data_cards()], guide())
    if not args.no_math:
        mathjax(root / 'docs' / '_static')
    start_over_if_pages_differ(args.output)
    bring_over()
    strict = [] if args.only else ['-W']
    folders = ['-c', root / 'docs', '-d', root / '_proc' / 'doctrees', kept_dir, args.output]
    sphinx = [
        sys.executable,
        '-m',
        'sphinx',
        *strict,
        '--keep-going',
        '-q',
        '-j',
        str(args.jobs),
        '-b',
        'html',
        *map(str, folders),
    ]
    if subprocess.run(sphinx).returncode:
        sys.exit('docs: Sphinx reported warnings; they count as errors')
    copy_reports(args.output)
    if found := foreign_resources(args.output):
        sys.exit('docs: these pages fetch from another host:\n  ' + '\n  '.join(found))
    print(f'docs: open {args.output / "index.html"}')


if __name__ == '__main__':
    main()
