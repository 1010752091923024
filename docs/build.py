"""Build the documentation site from the notebooks: no Quarto, no CDN, warnings are errors.

    python docs/build.py [--output _site] [--jobs 2] [--only nbs/data/00_record.ipynb ...] [--no-execute] [--no-math]

1. Every notebook is executed in a process of its own, in its own folder, and the outputs are kept (`_proc/run`; a notebook whose
   source and package are unchanged is not executed again). Exported cells fold away behind an API entry for each public symbol.
   Notebooks in `nbs/runs` are not executed: they are experiments.
2. Names in backticks become links to the symbol's entry; pages for data cards, results and the contributor guide join (`_proc/src`).
3. Sphinx with myst-nb writes `_site`, which opens from file:// with search; a last pass refuses any resource from another host.
"""
import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path

import nbformat
import yaml

root = Path(__file__).resolve().parent.parent
nbs, run_dir, src_dir = root/'nbs', root/'_proc'/'run', root/'_proc'/'src'
sys.path.insert(0, str(root/'docs'))
CELL_FLAGS = {'gpu', 'slow', 'notest'}
# left navigation: caption -> folder of nbs/
SECTIONS = {'Tutorials': 'tutorials', 'Data': 'data', 'Models': 'models', 'Distillation': 'distill', 'Layer analysis': 'analysis',
            'Training': 'train', 'Methods': 'methods', 'Evaluation': 'evaluate', 'Lab': 'lab', 'Running experiments': 'run', 'Runs': 'runs'}


def notebooks() -> list[Path]:
    "Every notebook of the project, in reading order."
    return sorted(p for p in nbs.rglob('*.ipynb') if not any(s.startswith(('.', '_')) for s in p.relative_to(nbs).parts))


def default_exp(nb) -> str | None:
    "Full name of the module a notebook exports to."
    m = next((m for c in nb.cells if c.cell_type == 'code' and (m := re.search(r'^#\|\s*default_exp\s+(\S+)', c.source, re.M))), None)
    return f'vlmbench.{m[1]}' if m else None


# ---------------------------------------------------------------------------------------------------------------- step 1
def prepare(src: Path, dst: Path, execute: bool) -> None:
    "Execute one notebook and turn its exported cells into API entries. Runs in a process of its own."
    from importlib import import_module

    from execnb.shell import CaptureShell
    from nbdev.process import NBProcessor
    from nbdev.processors import add_show_docs, hide_line, populate_language, strip_ansi
    from render import entry

    nb = NBProcessor(src, procs=[populate_language, add_show_docs, strip_ansi, hide_line], process=True).nb
    nb.cells = [c for auto, group in groupby(nb.cells, lambda c: bool(getattr(c, 'has_sd', False)))
                for c in (reversed(list(group)) if auto else group)]  # nbdev adds the entries of one cell last name first
    raw = nbformat.reads(src.read_text(encoding='utf8'), as_version=4)
    modname, shell = default_exp(raw), CaptureShell(src) if execute else None
    module = import_module(modname) if modname else None
    asked = [c.source for c in nb.cells if c.cell_type == 'code' and c.source.startswith('show_doc(')]
    documented = {re.match(r'show_doc\(\s*([\w.]+)', s)[1] for s in asked}
    os.chdir(src.parent)
    out, level, labels, pending = [], 1, [], []

    def flush() -> None:  # folded source comes after the entries that describe it
        out.extend(pending)
        pending.clear()

    for cell in nb.cells:
        directives = dict(getattr(cell, 'directives_', None) or {})
        if cell.cell_type != 'code':
            flush()
            if cell.cell_type == 'markdown':
                heads = re.findall(r'^(#{1,6}) ', re.sub(r'```.*?```', '', cell.source, flags=re.S), re.M)
                if heads: level = len(heads[-1])
                out.append(nbformat.v4.new_markdown_cell(cell.source))
            continue
        if m := re.match(r'show_doc\(\s*([\w.]+)', cell.source):
            name, obj = m[1], module
            for part in name.split('.'): obj = getattr(obj, part, None)
            if obj is None and shell is not None:  # a symbol of another module, imported in the notebook
                first, *rest = name.split('.')
                obj = shell.user_ns.get(first)
                for part in rest: obj = getattr(obj, part, None)
            if obj is None: raise SystemExit(f'{src.relative_to(root)}: show_doc({name}) names nothing in {modname}')
            label = f'{modname or src.stem}.{name}'.lower()
            if label in labels: label += '-' + str(len(labels))
            labels.append(label)
            cell = nbformat.v4.new_markdown_cell(entry(obj, name, min(level + 1, 4), label, documented))
            cell.metadata['symbol'] = {'name': name, 'label': label, 'module': modname}
            out.append(cell)
            continue
        flush()
        flagged = CELL_FLAGS & directives.keys() or directives.get('eval:', [''])[0].lower() == 'false'
        if shell is not None and not flagged and cell.source.strip():
            shell.cell(cell)
            if shell.exc: raise SystemExit(f'{src.relative_to(root)}: this cell failed\n\n{cell.source}\n\n{shell.prettytb(fname=src.name)}')
        if 'hide' in directives or 'default_exp' in directives: continue
        new = nbformat.v4.new_code_cell(re.sub(r'^#\|.*\n?', '', cell.source, flags=re.M).strip('\n'))
        if not new.source.strip(): continue
        exported = {'export', 'exports', 'exporti'} & directives.keys()
        only_imports = all(re.match(r'(from|import|#|\s|\))', ln) or not ln for ln in new.source.splitlines())
        imports = only_imports and 'import' in new.source
        if exported or imports:
            new.metadata['tags'] = ['hide-input']
            new.metadata['mystnb'] = {'code_prompt_show': 'Imports' if imports else 'Source', 'code_prompt_hide': 'Imports' if imports else 'Source'}
        if imports and not pending and out and out[-1].metadata.get('imports'):
            out[-1].source += '\n' + new.source
            continue
        if imports: new.metadata['imports'] = True
        new.outputs = [] if exported else clean_outputs(cell.get('outputs') or [])
        if directives.get('echo:', [''])[0] == 'false' or 'hide_input' in directives: new.metadata['tags'] = ['remove-input']
        if directives.get('output:', [''])[0] == 'false' or 'hide_output' in directives: new.outputs = []
        (pending if exported and not imports else out).append(new)
    flush()
    if nbs/'runs' in src.parents:
        note = nbformat.v4.new_markdown_cell('```{note}\nPapermill executes this notebook, one parameter a line: `vlmbench run '
                                             f'{src.stem} name=value`. It is shown here as it stands, without results.\n```')
        out.insert(1, note)
    page = nbformat.v4.new_notebook(cells=out)
    page.metadata.update(kernelspec={'name': 'python3', 'display_name': 'Python 3', 'language': 'python'}, language_info={'name': 'python'})
    for i, c in enumerate(page.cells): c['id'] = f'c{i}'
    dst.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(page, dst)


def clean_outputs(outputs: list) -> list:
    "Outputs as nbformat wants them: no stderr, no widget state (it would load a script from a CDN)."
    keep = []
    for o in json.loads(json.dumps(outputs)):
        if o.get('name') == 'stderr': continue
        data = o.get('data', {})
        if 'application/vnd.jupyter.widget-view+json' in data: data.pop('application/vnd.jupyter.widget-view+json')
        if o['output_type'] == 'execute_result': o.setdefault('execution_count', None)
        keep.append(nbformat.from_dict(o))
    return keep


def fingerprint() -> str:
    "Changes when anything an executed notebook can see changes: package, assets, this builder."
    h = hashlib.sha256()
    for p in sorted([*(root/'vlmbench').rglob('*'), *(root/'docs').glob('*.py'), *(root/'data_cards').glob('*'), *(root/'figures').rglob('*.json')]):
        if p.is_file() and '__pycache__' not in p.parts: h.update(str(p.relative_to(root)).encode() + p.read_bytes())
    return h.hexdigest()


def execute_all(files: list[Path], jobs: int, execute: bool, timeout: int = 600) -> None:
    "Prepare the notebooks that changed, `jobs` at a time; one failure stops the build and shows the cell."
    package = fingerprint()
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'OMP_WAIT_POLICY': 'PASSIVE', 'HF_HUB_OFFLINE': '1', 'PYTHONDONTWRITEBYTECODE': '1'}

    def one(src: Path) -> str | None:
        rel = src.relative_to(nbs)
        dst, runs = run_dir/rel, execute and rel.parts[0] != 'runs'
        key = hashlib.sha256(f'{package}{runs}'.encode() + src.read_bytes()).hexdigest()
        stamp = dst.with_suffix('.key')
        if dst.exists() and stamp.exists() and stamp.read_text() == key: return None
        cmd = [sys.executable, __file__, '--prepare', str(src), str(dst)] + ([] if runs else ['--no-execute'])
        try: done = subprocess.run(cmd, env=env, capture_output=True, text=True, timeout=timeout)
        except subprocess.TimeoutExpired: return f'{rel}: still running after {timeout} s'
        if done.returncode: return f'{rel}: exit {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}'
        stamp.write_text(key)
        print(f'  {rel}', flush=True)
        return None

    wanted = {run_dir/p.relative_to(nbs) for p in files}
    for old in run_dir.rglob('*.ipynb') if run_dir.exists() else ():
        if old not in wanted: old.unlink()
    with ThreadPoolExecutor(jobs) as pool: failures = [f for f in pool.map(one, files) if f]
    if failures: sys.exit('\n\n'.join(failures) + f'\n{len(failures)} of {len(files)} notebooks failed')


# ---------------------------------------------------------------------------------------------------------------- step 2
def link_pages(files: list[Path]) -> None:
    "Copy the executed notebooks to the Sphinx source folder with symbol names linked."
    pages = {p.relative_to(nbs): nbformat.read(run_dir/p.relative_to(nbs), as_version=4) for p in files}
    symbols, home, modules = {}, {}, {}
    for rel, nb in pages.items():
        for cell in nb.cells:
            if s := cell.metadata.get('symbol'):
                symbols.setdefault(s['name'], set()).add(s['label'])
                symbols[f"{s['module']}.{s['name']}"] = {s['label']}
                home[s['label']] = rel
                modules[s['module']] = rel

    def link(text: str, rel: Path, own: str | None) -> str:
        def sub(m: re.Match) -> str:
            name = m[1]
            if name in modules: return f'[{m[0]}](/{modules[name].as_posix()})' if modules[name] != rel else m[0]
            parts = name.split('.')
            for n in range(len(parts), 0, -1):  # `Packer.push` links to Packer where push has no entry
                hits = symbols.get('.'.join(parts[:n]), ())
                here = [h for h in hits if home[h] == rel]
                if here or len(hits) == 1:
                    label = (here or list(hits))[0]
                    return m[0] if label == own else f'[{m[0]}](#{label})'
                if n == len(parts) and len(parts) == 1: break
            return m[0]
        chunks = re.split(r'(```.*?```|^#.*$|^\|.*\|$(?=\n\|[-: |]+\|$))', text, flags=re.S | re.M)
        for i in range(0, len(chunks), 2):
            chunks[i] = re.sub(r'(?<![`\[\w])`([A-Za-z_][\w.]*)(?:\(\))?`(?![`\]\w])', sub, chunks[i])
        return ''.join(chunks)

    for rel, nb in pages.items():
        for cell in nb.cells:
            if cell.cell_type == 'markdown':
                own = (cell.metadata.get('symbol') or {}).get('label')
                cell.source = outside_links(link(cell.source, rel, own), nbs/rel)
        dst = src_dir/rel
        dst.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(nb, dst)


def outside_links(text: str, src: Path) -> str:
    "Links from a notebook to files outside nbs/: known ones become pages, the rest keep their words and lose the link."
    def sub(m: re.Match) -> str:
        words, target = m[1], m[2]
        if re.match(r'[a-z]+:|#|/', target): return m[0]
        path = Path(os.path.normpath(src.parent/target.split('#')[0]))
        if not path.is_relative_to(root) or path.is_relative_to(nbs): return m[0]
        rel = path.relative_to(root)
        if rel.parts[0] == 'data_cards' and rel.suffix == '.md': return f'[{words}](/data_cards/{rel.name})'
        if rel.name == 'CONTRIBUTING.md': return f'[{words}](/contributing.md)'
        if rel.parts[0] == 'figures' and path.is_file() and path.suffix in ('.png', '.svg'): return f'[{words}](/{rel.as_posix()})'
        return words
    return re.sub(r'(?<!\\)\[([^\]\[]*)\]\(([^)\s]+)\)', sub, text)


def front_matter(text: str) -> tuple[dict, str]:
    "Split a Markdown page into its YAML head and the rest."
    m = re.match(r'---\n(.*?)\n---\n?(.*)', text, re.S)
    return (yaml.safe_load(m[1]) or {}, m[2]) if m else ({}, text)


def data_cards() -> list[str]:
    "One page per card in data_cards/: the front matter as a table on top of the text."
    from render import cell, escape
    names = []
    for card in sorted((root/'data_cards').glob('*.md')):
        head, body = front_matter(card.read_text(encoding='utf8'))
        def show(v): return ', '.join(map(show, v)) if isinstance(v, list) else '; '.join(f'{k}: {show(x)}' for k, x in v.items()) if isinstance(v, dict) else str(v)
        rows = [f"| {cell(k.replace('_', ' '))} | {cell(show(v))} |" for k, v in head.items() if v not in (None, [], {})]
        title = re.search(r'^# (.+)$', body, re.M)
        body = body if title else f"# {head.get('pretty_name', card.stem)}\n\n{body}"
        table = '\n'.join(['', '| field | value |', '|---|---|', *rows, '']) if rows else ''
        text = re.sub(r'^(# .+)$', lambda m: m[1] + '\n' + table, body, count=1, flags=re.M)
        text = re.sub(r'\]\((\w[\w-]*\.md)\)', r'](\1)', escape(text).replace(r'\$', '$') if '$' not in text else text)
        (src_dir/'data_cards').mkdir(parents=True, exist_ok=True)
        (src_dir/'data_cards'/card.name).write_text(text, encoding='utf8')
        names.append(f'data_cards/{card.stem}')
    return names


def results_page() -> list[str]:
    "figures/ as a page: for each folder its README.md, its table, its pictures, and a link to the full report."
    fig = root/'figures'
    if not fig.exists(): return []
    lead = fig/'README.md'
    out = ['# Results', '', '> Stored runs: every number has its seeds and its manifests', '']
    out += [re.sub(r'^# .*\n', '', front_matter(lead.read_text(encoding='utf8'))[1]).strip(), ''] if lead.exists() else []
    for folder in [fig, *sorted(d for d in fig.iterdir() if d.is_dir())]:
        inner = folder.glob('*') if folder == fig else folder.rglob('*')
        pictures = sorted(p for p in inner if p.suffix in ('.png', '.svg') and 'runs' not in p.relative_to(folder).parts)
        note, table, report = folder/'README.md', folder/'table.md', folder/'report.html'
        if folder != fig:
            text = front_matter(note.read_text(encoding='utf8'))[1].strip() if note.exists() else ''
            head = re.match(r'# (.+)\n?', text)
            out += [f"## {head[1] if head else folder.name.replace('_', ' ')}", '', re.sub(r'^#', '##', text[head.end():] if head else text, flags=re.M), '']
            if table.exists(): out += [table.read_text(encoding='utf8'), '']
            if report.exists(): out += [f'<p><a class="report" href="{report.relative_to(root).as_posix()}">Full report: curves, examples, freeze tables, speed</a></p>', '']
        for p in pictures:
            target = src_dir/p.relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(p, target)
            out += [f'![{p.stem}]({p.relative_to(root).as_posix()})', '', f'*{p.stem.replace("_", " ").replace("-", ": ", 1)}*', '']
    if len(out) < 6: return []
    (src_dir/'results.md').write_text('\n'.join(out) + '\n', encoding='utf8')
    return ['results']


def copy_reports(site: Path) -> None:
    "Reports are pages of their own, kept as they are."
    for report in (root/'figures').glob('*/report.html'):
        target = site/report.relative_to(root)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(report, target)


def navigation(files: list[Path], cards: list[str], results: list[str]) -> None:
    "Append hidden table-of-contents blocks to the home page: the left navigation."
    def tree(caption: str, docs: list[str]) -> str:
        return f'```{{toctree}}\n:hidden:\n:caption: {caption}\n\n' + '\n'.join(docs) + '\n```' if docs else ''
    rels = [p.relative_to(nbs).with_suffix('').as_posix() for p in files]
    placed, blocks = {'index', 'lab_log'}, []
    for caption, folder in SECTIONS.items():
        mine = [r for r in rels if r.startswith(f'{folder}/')]
        placed.update(mine)
        blocks.append(tree(caption, mine))
    blocks.insert(2, tree('Data cards', cards))
    rest = [r for r in rels if r not in placed]
    more = results + (['lab_log'] if 'lab_log' in rels else []) + rest + (['contributing'] if (src_dir/'contributing.md').exists() else [])
    blocks.append(tree('Project', more))
    index = src_dir/'index.ipynb'
    nb = nbformat.read(index, as_version=4)
    nb.cells.append(nbformat.v4.new_markdown_cell('\n\n'.join(b for b in blocks if b), id='navigation'))
    nbformat.write(nb, index)


# ---------------------------------------------------------------------------------------------------------------- step 3
def mathjax(static: Path) -> None:
    "MathJax 3 from its npm package into the static folder, once; formulas then need no network."
    if (static/'mathjax'/'tex-mml-chtml.js').exists(): return
    if not shutil.which('npm'): sys.exit('docs: MathJax comes from npm, which is not installed. Install npm, or pass --no-math to show formulas as TeX.')
    with tempfile.TemporaryDirectory() as tmp:
        subprocess.run(['npm', 'pack', 'mathjax@3', '--silent', '--pack-destination', tmp], check=True, stdout=subprocess.DEVNULL)
        with tarfile.open(next(Path(tmp).glob('mathjax-*.tgz'))) as tar:
            for m in tar.getmembers():
                name = m.name.removeprefix('package/es5/')
                if m.isfile() and (name == 'tex-mml-chtml.js' or name.startswith('output/chtml/fonts/woff-v2/')):
                    target = static/'mathjax'/name
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(tar.extractfile(m).read())
    print('  MathJax unpacked')


def foreign_resources(site: Path) -> list[str]:
    "Scripts, styles, fonts and pictures that a page would fetch from another host."
    found = []
    for page in sorted(site.rglob('*.html')):
        html = re.sub(r'<pre.*?</pre>', '', page.read_text(encoding='utf8'), flags=re.S)
        for m in re.finditer(r'<(?:script|img|iframe|source)\b[^>]*?\bsrc="((?:https?:)?//[^"]+)"|<link\b(?=[^>]*rel="(?:stylesheet|preload|icon)")[^>]*?href="((?:https?:)?//[^"]+)"', html):
            found.append(f'{page.relative_to(site)}: {m[1] or m[2]}')
    return found


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--output', type=Path, default=root/'_site')
    ap.add_argument('--jobs', type=int, default=2)
    ap.add_argument('--only', nargs='*', type=Path, help='build only these notebooks and the home page; a draft: warnings do not count')
    ap.add_argument('--no-execute', action='store_true', help='do not run example cells: pages without outputs')
    ap.add_argument('--no-math', action='store_true', help='do without MathJax: formulas appear as TeX')
    ap.add_argument('--prepare', nargs=2, type=Path, metavar=('SRC', 'DST'), help=argparse.SUPPRESS)
    args = ap.parse_args()
    if args.prepare: return prepare(*args.prepare, execute=not args.no_execute)

    files = notebooks()
    if args.only: files = [p for p in files if p in {o.resolve() for o in args.only} | {nbs/'index.ipynb'}]
    print(f'docs: {len(files)} notebooks', flush=True)
    execute_all(files, args.jobs, not args.no_execute)
    shutil.rmtree(src_dir, ignore_errors=True)
    src_dir.mkdir(parents=True)
    link_pages(files)
    guide = root/'CONTRIBUTING.md'
    if guide.exists(): (src_dir/'contributing.md').write_text(outside_links(guide.read_text(encoding='utf8'), guide), encoding='utf8')
    navigation(files, data_cards() if not args.only else [], results_page())
    if not args.no_math: mathjax(root/'docs'/'_static')
    shutil.rmtree(args.output, ignore_errors=True)
    sphinx = [sys.executable, '-m', 'sphinx', *([] if args.only else ['-W']), '--keep-going', '-q', '-b', 'html', '-c', str(root/'docs'), '-d', str(root/'_proc'/'doctrees'), str(src_dir), str(args.output)]
    if subprocess.run(sphinx).returncode: sys.exit('docs: Sphinx reported warnings; they count as errors')
    copy_reports(args.output)
    if found := foreign_resources(args.output): sys.exit('docs: these pages fetch from another host:\n  ' + '\n  '.join(found))
    print(f'docs: open {args.output/"index.html"}')


if __name__ == '__main__': main()
