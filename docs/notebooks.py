"""Notebooks on their way to the site: executed, exported cells folded behind API entries, symbol
names linked.

python docs/notebooks.py SRC DST [--no-execute]      one notebook, in a process of its own
"""

import hashlib
import json
import os
import re
import sys
from importlib import import_module
from itertools import groupby
from pathlib import Path

import nbformat
from copies import Work, in_copies
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from places import nbs, root, run_dir

SKIPPED = {'gpu', 'slow', 'notest'}  # cells with these flags are shown, not executed
WIDGET = 'application/vnd.jupyter.widget-view+json'
# programs that tell of the machine or of git, and read nothing of the package
QUIET_PROGRAMS = {'git', 'lscpu', 'uname', 'ldconfig', 'fc-list', 'nvidia-smi'}


def notebooks() -> list[Path]:
    "Every notebook of the project, in reading order."

    def hidden(p: Path) -> bool:
        return any(s.startswith(('.', '_')) for s in p.relative_to(nbs).parts)

    return sorted(p for p in nbs.rglob('*.ipynb') if not hidden(p))


def module_name(nb) -> str | None:
    "Full name of the module a notebook exports to, None if it exports nothing."
    found = (
        re.search(r'^#\|\s*default_exp\s+(\S+)', c.source, re.M)
        for c in nb.cells
        if c.cell_type == 'code'
    )
    m = next((m for m in found if m), None)
    return f'vlmbench.{m[1]}' if m else None


def find_symbol(name: str, module, names: dict):
    """The object `name` (dotted) of the exported module, or else of the notebook's own names; None
    if neither has it."""
    for scope in (module, names.get(name.split('.')[0])):
        obj = scope
        for part in name.split('.')[0 if scope is module else 1 :]:
            obj = getattr(obj, part, None)
        if obj is not None:
            return obj


def first(directives: dict, key: str) -> str:
    "The value of a directive such as `#| echo: false`, lower case."
    return directives.get(key, [''])[0].lower()


def clean_outputs(outputs: list) -> list:
    """Outputs as nbformat wants them: no stderr, no widget state (it would load a script from a
    CDN)."""
    keep = []
    for o in json.loads(json.dumps(outputs)):
        if o.get('name') == 'stderr':
            continue
        o.get('data', {}).pop(WIDGET, None)
        if o['output_type'] == 'execute_result':
            o.setdefault('execution_count', None)
        keep.append(nbformat.from_dict(o))
    return keep


def code_cell(cell, directives: dict):
    """A code cell as the site shows it: exported code and imports folded away; None when nothing is
    left to show."""
    source = re.sub(r'^#\|.*\n?', '', cell.source, flags=re.M).strip('\n')
    if not source.strip() or {'hide', 'default_exp'} & directives.keys():
        return None
    new = new_code_cell(source)
    exported = bool({'export', 'exports', 'exporti'} & directives.keys())
    imports = 'import' in source and all(
        re.match(r'(from|import|#|\s|\)|$)', line) for line in source.splitlines()
    )
    if exported or imports:
        label = 'Imports' if imports else 'Source'
        new.metadata.update(
            tags=['hide-input'], mystnb=dict(code_prompt_show=label, code_prompt_hide=label)
        )
    if first(directives, 'echo:') == 'false' or 'hide_input' in directives:
        new.metadata['tags'] = ['remove-input']
    quiet = exported or first(directives, 'output:') == 'false' or 'hide_output' in directives
    new.outputs = [] if quiet else clean_outputs(cell.get('outputs') or [])
    new.metadata['folded'] = 'imports' if imports else 'source' if exported else ''
    return new


def about_run(src: Path) -> str:
    "What stands at the top of a run notebook's page: how it is started, and its parameters."
    from render import cell, code

    from vlmbench.run.parameters import load_notebook, notebook_parameters

    note = f'An experiment: `vlmbench run {src.stem} name=value ...` executes it with checked '
    note += 'parameters. It is shown as it stands, without results.'
    out = ['```{note}', note, '```', '', '## Parameters', '']
    out += ['| name | type | default | meaning |', '|---|---|---|---|']
    for p in notebook_parameters(load_notebook(src), src.stem).values():
        row = code(p.name), code(str(p.type)), code(repr(p.default)), cell(p.help)
        out.append('| ' + ' | '.join(row) + ' |')
    return '\n'.join([*out, '', '## The notebook'])


class Page:
    """A notebook on its way to a page, cell by cell: `shown` are its API entries (cell number ->
    symbol), `shell` executes its examples (None: they are not executed)."""

    def __init__(self, src: Path, cells: list, execute: bool):
        from execnb.shell import CaptureShell

        self.src, self.cells, self.sources = src, [], []
        self.modname = module_name(nbformat.reads(src.read_text(encoding='utf8'), as_version=4))
        self.module = import_module(self.modname) if self.modname else None
        self.shell = CaptureShell(src) if execute else None
        entries = ((i, re.match(r'show_doc\(\s*([\w.]+)', c.source)) for i, c in enumerate(cells))
        self.shown = {i: m[1] for i, m in entries if m}
        self.level, self.labels = 1, set()

    def entry(self, name: str) -> None:
        "An API entry; the source that it describes comes after it."
        from render import entry

        obj = find_symbol(name, self.module, self.shell.user_ns if self.shell else {})
        if obj is None:
            here = self.src.relative_to(root)
            sys.exit(f'{here}: show_doc({name}) names nothing in {self.modname}')
        label = f'{self.modname or self.src.stem}.{name}'.lower()
        if label in self.labels:
            label += f'-{len(self.labels)}'
        self.labels.add(label)
        depth = min(self.level + 1, 4)
        new = new_markdown_cell(entry(obj, name, depth, label, set(self.shown.values())))
        new.metadata['symbol'] = dict(name=name, label=label, module=self.modname)
        self.cells.append(new)

    def prose(self, source: str) -> None:
        "A cell of prose; entries after it lie below its last heading."
        heads = re.findall(r'^(#{1,6}) ', re.sub(r'```.*?```', '', source, flags=re.S), re.M)
        if heads:
            self.level = len(heads[-1])
        self.cells.append(new_markdown_cell(source))

    def executed(self, cell, directives: dict) -> None:
        "Execute a cell, unless it is one that the site only shows; ends the process if it fails."
        skipped = SKIPPED & directives.keys() or first(directives, 'eval:') == 'false'
        if not self.shell or not cell.source.strip() or skipped:
            return
        self.shell.cell(cell)
        if self.shell.exc:
            trace = self.shell.prettytb(fname=self.src.name)
            here = self.src.relative_to(root)
            sys.exit(f'{here}: this cell failed\n\n{cell.source}\n\n{trace}')

    def code(self, cell, directives: dict) -> None:
        "A code cell with its output; imports that follow one another become one cell."
        self.executed(cell, directives)
        new = code_cell(cell, directives)
        if new is None:
            return
        folded = new.metadata.pop('folded')
        if folded == 'source':
            self.sources.append(new)
        elif folded and self.cells and self.cells[-1].metadata.get('imports'):
            self.cells[-1].source += '\n' + new.source
        else:
            if folded:
                new.metadata['imports'] = True
            self.cells.append(new)

    def add(self, number: int, cell) -> None:
        "The next cell of the notebook."
        if number in self.shown:
            self.entry(self.shown[number])
            return
        self.flush()
        if cell.cell_type == 'markdown':
            self.prose(cell.source)
        elif cell.cell_type == 'code':
            self.code(cell, dict(getattr(cell, 'directives_', None) or {}))

    def flush(self) -> None:
        "Put the folded source in its place: after the entries that describe it."
        self.cells += self.sources
        self.sources = []

    def write(self, dst: Path) -> None:
        "Write the page as a notebook."
        self.flush()
        if nbs / 'runs' in self.src.parents:
            self.cells.insert(1, new_markdown_cell(about_run(self.src)))
        page = new_notebook(cells=self.cells)
        page.metadata.update(
            kernelspec=dict(name='python3', display_name='Python 3', language='python'),
            language_info=dict(name='python'),
        )
        for i, cell in enumerate(page.cells):
            cell['id'] = f'c{i}'
        dst.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(page, dst)


def documented_cells(src: Path) -> list:
    "Cells of a notebook, an API entry after each that exports something, in the source's order."
    from nbdev.process import NBProcessor
    from nbdev.processors import add_show_docs, hide_line, populate_language, strip_ansi

    steps = [populate_language, add_show_docs, strip_ansi, hide_line]
    cells = []
    # nbdev adds a cell's entries last name first
    for added, group in groupby(
        NBProcessor(src, procs=steps, process=True).nb.cells,
        lambda c: bool(getattr(c, 'has_sd', False)),
    ):
        cells += reversed(list(group)) if added else group
    return cells


def prepare(src: Path, dst: Path, execute: bool) -> None:
    """Execute one notebook and write it with API entries in place of exported cells. Exits with the
    cell that failed."""
    cells = documented_cells(src)
    page = Page(src, cells, execute)
    os.chdir(src.parent)
    for number, cell in enumerate(cells):
        page.add(number, cell)
    page.write(dst)


def said_in(path: Path) -> str:
    "Hash of a file's bytes."
    return hashlib.sha256(path.read_bytes()).hexdigest()


def fingerprint() -> str:
    """Changes when what every executed notebook may read changes: assets, cards, results, these
    files. Modules of the package count notebook by notebook (`Watch`)."""
    seen = [
        *(root / 'vlmbench' / 'assets').rglob('*'),
        *(root / 'data_cards').glob('*'),
        *(root / 'figures').rglob('*.json'),
        root / 'settings.ini',
        *(root / 'docs' / name for name in ('notebooks.py', 'copies.py', 'warm.py', 'render.py')),
    ]
    files = [p for p in sorted(seen) if p.is_file()]
    said = ''.join(f'{p.relative_to(root)} {said_in(p)}\n' for p in files)
    return hashlib.sha256(said.encode()).hexdigest()


def package_files() -> dict[str, str]:
    "Every module and run notebook of the package with the hash of what it says."
    package = root / 'vlmbench'
    files = [*package.rglob('*.py'), *package.rglob('*.ipynb')]
    return {p.relative_to(root).as_posix(): said_in(p) for p in sorted(files)}


class Watch:
    """What of the package a notebook reads, seen from within its process: the modules that are
    imported, and all of them once it starts another process."""

    def __init__(self):
        self.started = set()
        sys.addaudithook(self.hook)

    def hook(self, event: str, arguments: tuple) -> None:
        if event == 'subprocess.Popen':
            self.started.add(Path(os.fspath(arguments[0] or arguments[1][0])).name)
        elif event in ('os.fork', 'os.posix_spawn', 'os.system'):
            self.started.add(event)

    def read(self) -> dict[str, str]:
        "Those files with their hashes."
        files = package_files()
        if self.started - QUIET_PROGRAMS:
            return files
        names = [n.replace('.', '/') for n in sys.modules if n.split('.')[0] == 'vlmbench']
        read = [p for n in names for p in (f'{n}.py', f'{n}/__init__.py') if p in files]
        return {p: files[p] for p in read}


def cost() -> float:
    "Processor seconds of this process and of those it has waited for."
    return sum(os.times()[:4])


def is_current(stamp: Path, key: str, package: dict[str, str]) -> bool:
    "Whether the page beside `stamp` was made from the same notebook and the same modules."
    if not stamp.with_suffix('.ipynb').exists() or not stamp.exists():
        return False
    made = json.loads(stamp.read_text(encoding='utf8'))
    return made['key'] == key and all(package.get(p) == h for p, h in made['read'].items())


def made_anew(src: Path, dst: Path, execute: bool, stamp: Path, key: str) -> None:
    "`prepare`, and beside the page what it was made from and what that cost."
    watch = Watch()
    prepare(src, dst, execute)
    made = dict(key=key, seconds=round(cost(), 2), read=watch.read(), started=sorted(watch.started))
    stamp.write_text(json.dumps(made), encoding='utf8')


def execute_all(files: list[Path], jobs: int, execute: bool, timeout: int = 900) -> None:
    """Prepare the notebooks that changed, `jobs` at a time. Exits with every failed cell once all
    have been tried."""
    base, package = fingerprint(), package_files()
    stamps, changed = {}, []
    for src in files:
        name = src.relative_to(nbs)
        dst, runs = run_dir / name, execute and name.parts[0] != 'runs'
        key = hashlib.sha256(f'{base}{runs}'.encode() + src.read_bytes()).hexdigest()
        stamps[name] = stamp = dst.with_suffix('.json')
        if not is_current(stamp, key, package):
            what = src, dst, runs, stamp, key
            changed.append(Work(name.as_posix(), made_anew, what, dst.with_suffix('.log')))
    for old in run_dir.rglob('*.ipynb') if run_dir.exists() else ():
        if old.relative_to(run_dir) not in stamps:
            old.unlink()
    done = in_copies(changed, jobs, timeout)
    failures = [f'{o.name}: {o.failure}' for o in done if o.failure]
    made = [stamps[Path(o.name)] for o in done if not o.failure]
    costs = {p: json.loads(p.read_text(encoding='utf8'))['seconds'] for p in made}
    for stamp in sorted(costs, key=costs.get, reverse=True)[:10]:
        print(f'{costs[stamp]:6.1f} s  {stamp.relative_to(run_dir).with_suffix("")}')
    print(f'{len(costs)} notebooks executed in {sum(costs.values()):.0f} s of a processor')
    if failures:
        sys.exit('\n\n'.join(failures) + f'\n{len(failures)} of {len(files)} notebooks failed')


if __name__ == '__main__':
    prepare(*(Path(a).resolve() for a in sys.argv[1:3]), execute='--no-execute' not in sys.argv)
