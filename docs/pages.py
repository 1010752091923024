"""Pages of the site that are no notebooks: data cards, stored results, the contributor guide; and
the navigation."""

import re
import shutil
from pathlib import Path

import nbformat
import yaml
from notebooks import relink
from places import nbs, root, src_dir
from render import cell, escape

# left navigation: caption -> folder of nbs/
SECTIONS = {
    'Tutorials': 'tutorials',
    'Data': 'data',
    'Models': 'models',
    'Distillation': 'distill',
    'Layer analysis': 'analysis',
    'Training': 'train',
    'Methods': 'methods',
    'Evaluation': 'evaluate',
    'What it costs': 'cost',
    'Lab': 'lab',
    'Using a model': 'demo',
    'Running experiments': 'run',
    'Runs': 'runs',
}
CARD_ROLES = {
    'embedded': 'In this package',
    'pre-training': 'Pre-training',
    'instruction tuning': 'Instruction tuning',
    'text training': 'Text for training',
    'evaluation': 'Evaluation',
    'text evaluation': 'Text for evaluation',
    'image source': 'Sources of pictures',
}


def front_matter(text: str) -> tuple[dict, str]:
    "Split a Markdown page into its YAML head and the rest."
    m = re.match(r'---\n(.*?)\n---\n?(.*)', text, re.S)
    return (yaml.safe_load(m[1]) or {}, m[2]) if m else ({}, text)


def show(value) -> str:
    "A front-matter value as a table cell."
    if isinstance(value, list):
        return ', '.join(map(show, value))
    if isinstance(value, dict):
        return '; '.join(f'{k}: {show(v)}' for k, v in value.items())
    text = cell(f'{value:,}' if type(value) is int else value)
    return f'<{text}>' if re.fullmatch(r'https?://[^\s|]+', text) else text


def card_page(name: str, head: dict, body: str) -> str:
    "One data card, the facts of its front matter as a table below the title."
    hidden = ('files', 'known_faults', 'pretty_name')
    facts = {
        k: v
        for k, v in head.items()
        if k not in hidden and v not in (None, [], {}, 'unknown', ['unknown'])
    }
    rows = '\n'.join(f'| {k.replace("_", " ")} | {show(v)} |' for k, v in facts.items())
    if not re.search(r'^# ', body, re.M):
        body = f'# {head.get("pretty_name", name)}\n\n{body}'
    table = f'\n\n| fact | |\n|---|---|\n{rows}\n'
    return re.sub(r'^# .+$', lambda m: m[0] + table, escape(body), count=1, flags=re.M)


def data_cards() -> list[str]:
    """A page per card in data_cards/ and an overview of all of them; returns what the navigation
    shows."""
    cards = {
        p.stem: front_matter(p.read_text(encoding='utf8'))
        for p in sorted((root / 'data_cards').glob('*.md'))
        if p.stem not in ('index', 'README')
    }
    if not cards:
        return []
    folder = src_dir / 'data_cards'
    folder.mkdir(parents=True, exist_ok=True)
    for name, (head, body) in cards.items():
        (folder / f'{name}.md').write_text(card_page(name, head, body), encoding='utf8')

    def row(name: str, head: dict) -> str:
        size = head.get('size') or {}
        facts = [
            size.get('rows', ''),
            size.get('images', ''),
            head.get('license_name') or head.get('license', ''),
            [m.replace('_', ' ') for m in head.get('used_by', [])],
        ]
        return (
            f'| [{cell(head.get("pretty_name", name))}]({name}.md) | '
            + ' | '.join(map(show, facts))
            + ' |'
        )

    out = [
        '# Data sets',
        '',
        '> Source, licence, row schema and known faults of every data set the methods name',
        '',
        'Check a local copy against its card with `vlmbench data check CARD FOLDER`. "unknown" '
        'means that the fact '
        'could not be established; read the source before you use the data.',
        '',
    ]
    roles = {n: h.get('role', 'other') for n, (h, _) in cards.items()}
    for role in [*CARD_ROLES, *sorted(set(roles.values()) - CARD_ROLES.keys())]:
        mine = [n for n in cards if roles[n] == role]
        mine.sort(key=lambda n: str(cards[n][0].get('pretty_name', n)).lower())
        if not mine:
            continue
        out += [
            f'## {CARD_ROLES.get(role, role.replace("_", " ").capitalize())}',
            '',
            '| data set | rows | images | licence | used by |',
            '|---|---:|---:|---|---|',
            *(row(n, cards[n][0]) for n in mine),
            '',
        ]
    out += ['```{toctree}', ':hidden:', '', *cards, '```', '']
    (folder / 'index.md').write_text('\n'.join(out), encoding='utf8')
    return ['data_cards/index']


def result_section(folder: Path) -> list[str]:
    "A stored result: its README.md, table.md, a link to report.html."
    note, table, report = folder / 'README.md', folder / 'table.md', folder / 'report.html'
    text = front_matter(note.read_text(encoding='utf8'))[1].strip() if note.exists() else ''
    head = re.match(r'# (.+)\n?', text)
    body = re.sub(r'^#', '##', text[head.end() :] if head else text, flags=re.M)
    # a folder's own pictures follow on the page, whether its README shows them or not
    body = re.sub(r'^!\[[^\]]*\]\([^/)]+\)\n*', '', body, flags=re.M)
    out = [f'## {head[1] if head else folder.name.replace("_", " ")}', '', body, '']
    if table.exists():
        out += [table.read_text(encoding='utf8'), '']
    if report.exists():
        where = report.relative_to(root).as_posix()
        words = 'Full report: curves, examples, what trained, speed and memory'
        out += [f'<p><a class="report" href="{where}">{words}</a></p>', '']
    return out


def results_page() -> list[str]:
    """figures/ as a page: for each folder what is stored there, and its pictures; returns what the
    navigation shows. Folders named under `order` in the front matter of figures/README.md come
    first, in that order."""
    fig = root / 'figures'
    lead = fig / 'README.md'
    head, intro = front_matter(lead.read_text(encoding='utf8')) if lead.exists() else ({}, '')
    rank = {n: i for i, n in enumerate(head.get('order', []))}
    folders = sorted(d for d in fig.iterdir() if d.is_dir()) if fig.exists() else []
    folders = [fig, *sorted(folders, key=lambda d: rank.get(d.name, len(rank)))] if folders else []
    out = []
    for folder in folders:
        if folder != fig:
            out += result_section(folder)
        inner = folder.glob('*') if folder == fig else folder.rglob('*')
        for p in sorted(
            p
            for p in inner
            if p.suffix in ('.png', '.svg') and 'runs' not in p.relative_to(folder).parts
        ):
            target = src_dir / p.relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(p, target)
            caption = p.stem.replace('_', ' ').replace('-', ': ', 1)
            out += [f'![{p.stem}]({p.relative_to(root).as_posix()})', '', f'*{caption}*', '']
    if not out:
        return []
    intro = re.sub(r'^# .*\n', '', intro.strip()).strip()
    head = [
        '# Results',
        '',
        '> Stored runs: every number has its seeds and its manifests',
        '',
        intro,
        '',
    ]
    (src_dir / 'results.md').write_text('\n'.join(head + out) + '\n', encoding='utf8')
    return ['results']


def copy_reports(site: Path) -> None:
    "Reports are pages of their own, kept as they are."
    for report in (root / 'figures').glob('*/report.html'):
        target = site / report.relative_to(root)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(report, target)


def guide() -> list[str]:
    "CONTRIBUTING.md as a page."
    page = root / 'CONTRIBUTING.md'
    (src_dir / 'contributing.md').write_text(
        relink(page.read_text(encoding='utf8'), page), encoding='utf8'
    )
    return ['contributing']


def navigation(files: list[Path], cards: list[str], results: list[str], more: list[str]) -> None:
    "Append hidden table-of-contents blocks to the home page: the left navigation."

    def tree(caption: str, docs: list[str]) -> str:
        return (
            f'```{{toctree}}\n:hidden:\n:caption: {caption}\n\n' + '\n'.join(docs) + '\n```'
            if docs
            else ''
        )

    rels = [p.relative_to(nbs).with_suffix('').as_posix() for p in files]
    parts = {
        caption: [r for r in rels if r.startswith(f'{folder}/')]
        for caption, folder in SECTIONS.items()
    }
    placed = {'index', 'lab_log', *(r for part in parts.values() for r in part)}
    parts['Data'] += cards
    parts['Project'] = results + [r for r in rels if r == 'lab_log' or r not in placed] + more
    nb = nbformat.read(src_dir / 'index.ipynb', as_version=4)
    blocks = '\n\n'.join(b for b in (tree(c, d) for c, d in parts.items()) if b)
    nb.cells.append(nbformat.v4.new_markdown_cell(blocks, id='navigation'))
    nbformat.write(nb, src_dir / 'index.ipynb')
