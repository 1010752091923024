"""Notebooks on their way to the site: executed, exported cells folded behind API entries, symbol
names linked.

python docs/notebooks.py SRC DST [--no-execute]      one notebook, in a process of its own
"""

import hashlib
import json
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from itertools import groupby
from pathlib import Path

import nbformat
from copies import in_a_copy, warm_context
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from places import nbs, root, run_dir, src_dir

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


def prepare(src: Path, dst: Path, execute: bool) -> None:
    """Execute one notebook and write it with API entries in place of exported cells. Exits with the
    cell that failed."""
    from execnb.shell import CaptureShell
    from nbdev.process import NBProcessor
    from nbdev.processors import add_show_docs, hide_line, populate_language, strip_ansi
    from render import entry

    nb = NBProcessor(
        src, procs=[populate_language, add_show_docs, strip_ansi, hide_line], process=True
    ).nb
    nb.cells = [
        c
        for auto, group in groupby(nb.cells, lambda c: bool(getattr(c, 'has_sd', False)))
        for c in (reversed(list(group)) if auto else group)
    ]  # nbdev adds a cell's entries last name first
    modname = module_name(nbformat.reads(src.read_text(encoding='utf8'), as_version=4))
    module, shell = (
        import_module(modname) if modname else None,
        CaptureShell(src) if execute else None,
    )
    shown = {
        i: m[1]
        for i, c in enumerate(nb.cells)
        if (m := re.match(r'show_doc\(\s*([\w.]+)', c.source))
    }
    os.chdir(src.parent)
    out, level, labels, sources = [], 1, set(), []
    for i, cell in enumerate(nb.cells):
        directives = dict(getattr(cell, 'directives_', None) or {})
        if i in shown:
            name = shown[i]
            obj = find_symbol(name, module, shell.user_ns if shell else {})
            if obj is None:
                sys.exit(f'{src.relative_to(root)}: show_doc({name}) names nothing in {modname}')
            label = f'{modname or src.stem}.{name}'.lower()
            if label in labels:
                label += f'-{len(labels)}'
            labels.add(label)
            new = new_markdown_cell(entry(obj, name, min(level + 1, 4), label, set(shown.values())))
            new.metadata['symbol'] = dict(name=name, label=label, module=modname)
            out.append(new)
            continue
        out += sources  # folded source comes after the entries that describe it
        sources = []
        if cell.cell_type == 'markdown':
            heads = re.findall(
                r'^(#{1,6}) ', re.sub(r'```.*?```', '', cell.source, flags=re.S), re.M
            )
            if heads:
                level = len(heads[-1])
            out.append(new_markdown_cell(cell.source))
        if cell.cell_type != 'code':
            continue
        if (
            shell
            and cell.source.strip()
            and not SKIPPED & directives.keys()
            and first(directives, 'eval:') != 'false'
        ):
            shell.cell(cell)
            if shell.exc:
                trace = shell.prettytb(fname=src.name)
                sys.exit(f'{src.relative_to(root)}: this cell failed\n\n{cell.source}\n\n{trace}')
        new = code_cell(cell, directives)
        if new is None:
            continue
        folded = new.metadata.pop('folded')
        if folded == 'imports' and out and out[-1].metadata.get('imports'):
            out[-1].source += '\n' + new.source
        elif folded == 'source':
            sources.append(new)
        else:
            if folded:
                new.metadata['imports'] = True
            out.append(new)
    out += sources
    if nbs / 'runs' in src.parents:
        out.insert(1, new_markdown_cell(about_run(src)))
    page = new_notebook(cells=out)
    page.metadata.update(
        kernelspec=dict(name='python3', display_name='Python 3', language='python'),
        language_info=dict(name='python'),
    )
    for i, c in enumerate(page.cells):
        c['id'] = f'c{i}'
    dst.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(page, dst)


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
    context = warm_context()
    costs = {}

    def one(src: Path) -> str | None:
        rel = src.relative_to(nbs)
        dst, runs = run_dir / rel, execute and rel.parts[0] != 'runs'
        key = hashlib.sha256(f'{base}{runs}'.encode() + src.read_bytes()).hexdigest()
        stamp = dst.with_suffix('.json')
        if is_current(stamp, key, package):
            return None
        what = src, dst, runs, stamp, key
        if failure := in_a_copy(context, made_anew, what, dst.with_suffix('.log'), timeout):
            return f'{rel}: {failure}'
        costs[rel] = json.loads(stamp.read_text(encoding='utf8'))['seconds']
        print(f'  {rel}', flush=True)

    wanted = {run_dir / p.relative_to(nbs) for p in files}
    for old in run_dir.rglob('*.ipynb') if run_dir.exists() else ():
        if old not in wanted:
            old.unlink()
    with ThreadPoolExecutor(jobs) as pool:
        failures = [f for f in pool.map(one, files) if f]
    for rel in sorted(costs, key=costs.get, reverse=True)[:10]:
        print(f'{costs[rel]:6.1f} s  {rel}')
    print(f'{len(costs)} notebooks executed in {sum(costs.values()):.0f} s of a processor')
    if failures:
        sys.exit('\n\n'.join(failures) + f'\n{len(failures)} of {len(files)} notebooks failed')


def link_pages(files: list[Path]) -> None:
    """Copy the executed notebooks to the Sphinx source folder, names in backticks linked to their
    API entries."""
    pages = {
        p.relative_to(nbs): nbformat.read(run_dir / p.relative_to(nbs), as_version=4) for p in files
    }
    symbols, home, modules = {}, {}, {}  # name -> labels; label -> page; module -> page
    for rel, nb in pages.items():
        for cell in nb.cells:
            if s := cell.metadata.get('symbol'):
                symbols.setdefault(s['name'], set()).add(s['label'])
                symbols[f'{s["module"]}.{s["name"]}'] = {s['label']}
                home[s['label']], modules[s['module']] = rel, rel

    def target(name: str, rel: Path, own: str | None) -> str | None:
        if name in modules:
            return f'/{modules[name].as_posix()}' if modules[name] != rel else None
        parts = name.split('.')
        for n in range(len(parts), 0, -1):  # `Packer.push` leads to Packer where push has no entry
            labels = symbols.get('.'.join(parts[:n]), set())
            here = sorted(x for x in labels if home[x] == rel) or (
                sorted(labels) if len(labels) == 1 else []
            )
            if here:
                return f'#{here[0]}' if here[0] != own else None

    def link(text: str, rel: Path, own: str | None) -> str:
        def sub(m: re.Match) -> str:
            return f'[{m[0]}]({to})' if (to := target(m[1], rel, own)) else m[0]

        chunks = re.split(
            r'(```.*?```|^#.*$)', text, flags=re.S | re.M
        )  # not in fences and headings
        names = r'(?<![`\[\w])`([A-Za-z_][\w.]*)(?:\(\))?`(?![`\]\w])'
        return ''.join(c if i % 2 else re.sub(names, sub, c) for i, c in enumerate(chunks))

    for rel, nb in pages.items():
        for cell in nb.cells:
            if cell.cell_type != 'markdown':
                continue
            own = (cell.metadata.get('symbol') or {}).get('label')
            cell.source = relink(papers_linked(link(cell.source, rel, own)), nbs / rel)
        nb.cells += citation(rel)
        dst = src_dir / rel
        dst.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(nb, dst)


def papers_linked(text: str) -> str:
    "`arXiv 2406.11832` as a link, outside of code and links."
    chunks = re.split(r'(```.*?```|`[^`\n]*`|\[[^\]]*\]\([^)]*\)|<[^>\s]+>)', text, flags=re.S)
    named = r'\barXiv[: ](\d{4}\.\d{4,5})\b'
    said = r'[arXiv \1](https://arxiv.org/abs/\1)'
    return ''.join(c if i % 2 else re.sub(named, said, c) for i, c in enumerate(chunks))


def citation(page: Path) -> list:
    "The last cell of a method's page: its paper's BibTeX entry, and what it owes; else nothing."
    from vlmbench.methods.credits import CREDITS, REFERENCES, credits_text

    method = page.stem.partition('_')[2]
    if page.parent.name != 'methods' or method not in REFERENCES:
        return []
    paper = REFERENCES[method]
    head = f'## To cite\n\n{paper.title} ({paper.year}), arXiv {paper.arxiv}.\n\n'
    text = head + credits_text(paper, CREDITS.get(method))
    return [new_markdown_cell(papers_linked(text), id='citation')]


def relink(text: str, src: Path) -> str:
    """Links from `src` to files outside nbs/: those with a page lead there, the others keep only
    their words."""

    def sub(m: re.Match) -> str:
        words, link = m[1], m[2]
        if re.match(r'[a-z]+:|#|/', link):
            return m[0]
        path = Path(os.path.normpath(src.parent / link.split('#')[0]))
        if not path.is_relative_to(root) or path.is_relative_to(nbs):
            return m[0]
        rel = path.relative_to(root)
        if rel.parts[0] == 'data_cards':
            return f'[{words}](/data_cards/{rel.name if rel.suffix else "index.md"})'
        if rel.name == 'CONTRIBUTING.md':
            return f'[{words}](/contributing.md)'
        if rel.parts[0] == 'figures':
            stored = path if path.is_dir() else path.parent
            page = root / 'figures' in stored.parents and (stored / 'README.md').exists()
            named = f'results/{stored.name}.md' if page else 'results.md'
            return f'[{words}](/{rel.as_posix() if rel.suffix in (".png", ".svg") else named})'
        return words

    return re.sub(r'(?<!\\)\[([^\]\[]*)\]\(([^)\s]+)\)', sub, text)


if __name__ == '__main__':
    prepare(*(Path(a).resolve() for a in sys.argv[1:3]), execute='--no-execute' not in sys.argv)
