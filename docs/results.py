"""Stored results as pages: one for each method with the claims about it, one for each folder of
figures/, and an overview that keeps the headings which older links lead to."""

import csv
import re
import shutil
from pathlib import Path

from links import relink
from pages import front_matter
from places import root, src_dir
from render import cell

from vlmbench.methods.credits import REFERENCES

TITLES = {
    'llava': 'LLaVA, the control',
    'vip_llava': 'ViP-LLaVA',
    'eve': 'EVE',
    'vora': 'VoRA',
    'zero': 'Zero-shot grafting',
    'visual_region': 'Visual region',
}
# how the source of a claim ("EVE, table 4") names a method
PAPERS = {
    'EVE': 'eve',
    'VoRA': 'vora',
    'zero': 'zero',
    'visual region': 'visual_region',
    'ViP-LLaVA': 'vip_llava',
}
CLAIMS = ('claims_encoder_free', 'claims_depth', 'claims_importance', 'claims_markers')
ASKED_OF = {'claims_importance': 'visual_region', 'claims_markers': 'vip_llava'}
# pictures of figures/ that belong to a method
PICTURES = {
    'llava': ('control/figures', 'layers/scores.png'),
    'vip_llava': ('claims_markers', 'markers'),
    'eve': ('claims_encoder_free',),
    'vora': ('claims_encoder_free',),
    'zero': ('claims_depth/claims_zero.png', 'claims_depth/split_sweep.png'),
    'visual_region': (
        'claims_depth/claims_visual_region.png',
        'claims_depth/region_size_and_pruning.png',
        'claims_importance',
    ),
}
VERDICTS = {'holds': 'holds', 'reversed': 'the opposite is seen', 'not shown': 'not shown'}


def rows_of(path: Path) -> list[dict[str, str]]:
    "Rows of a stored table."
    with open(path, encoding='utf8', newline='') as f:
        return list(csv.DictReader(f))


def percent(value: str, sign: str = '') -> str:
    "A stored share as per cent."
    return f'{100 * float(value):{sign}.1f}'


def said_where(says: str) -> tuple[str, str, str]:
    """A claim in words, the paper that makes it and where: "more data helps; EVE, figure 7". No
    paper: a claim of our own."""
    parts = says.split('; ')
    for i, part in enumerate(parts):
        paper, _, where = part.partition(', ')
        if paper in PAPERS:
            return '; '.join(parts[:i]), paper, '; '.join([where, *parts[i + 1 :]])
    return says, '', ''


def claims() -> list[dict[str, str]]:
    """Every claim of figures/claims_*: its row with `method`, `asked` (the claim in words),
    `source` (where in the paper) and `folder`."""
    found = []
    for folder in CLAIMS:
        table = root / 'figures' / folder / 'claims.csv'
        for row in rows_of(table) if table.exists() else ():
            asked, paper, where = said_where(row['says'])
            method = PAPERS[paper] if paper else ASKED_OF[folder]
            found.append(row | dict(method=method, asked=asked, source=where, folder=folder))
    return found


def measured(row: dict[str, str]) -> str:
    "What a claim's two arms scored, in words."
    if row.get('share'):
        low, high = percent(row['share_low']), percent(row['share_high'])
        return f'{percent(row["share"])}% kept [{low}, {high}]'
    sides = ', '.join(
        f'{row[side].replace("_", " ")} {percent(row[f"{side}_score"])}%'
        for side in ('better', 'worse')
    )
    gap = ', '.join(percent(row[limit], '+') for limit in ('low', 'high'))
    return f'{sides}: {percent(row["difference"], "+")} points [{gap}]'


def claims_of(method: str) -> list[str]:
    "Table of the claims about a method; empty where its paper makes none that were asked."
    mine = [row for row in claims() if row['method'] == method]
    if not mine:
        return []
    out = [
        '## Claims',
        '',
        f'{said(mine)} Intervals are 95% over {mine[0]["seeds"]} seeds and all questions. What was '
        'asked is what a model of this size can answer; it is not the experiment of the paper.',
        '',
        '| claim | what was asked | in the paper | measured | verdict |',
        '|---|---|---|---|---|',
    ]
    for row in mine:
        verdict = VERDICTS[row['verdict']]
        if row.get('share') and row['verdict'] == 'reversed':
            verdict = 'does not hold'
        words = [row['claim'].replace('_', ' '), row['asked'], row['source'], measured(row)]
        out.append('| ' + ' | '.join(map(cell, words)) + f' | **{verdict}** |')
    folders = sorted({row['folder'] for row in mine})
    pages = ', '.join(f'[{title_of(root / "figures" / f)}]({f}.md)' for f in folders)
    return [*out, '', f'The whole experiments, with every arm: {pages}.', '']


def said(rows: list[dict[str, str]]) -> str:
    "How many claims hold, in a sentence."
    count = [sum(row['verdict'] == verdict for row in rows) for verdict in VERDICTS]
    return (
        f'Of {len(rows)} claims {count[0]} hold, {count[1]} are reversed or do not hold and '
        f'{count[2]} are not shown.'
    )


def whole_budget(method: str) -> list[str]:
    "What a method scores at its recipe's whole budget."
    table = root / 'figures' / 'bench' / 'methods.csv'
    stored = rows_of(table) if table.exists() else []
    mine = [row for row in stored if row['method'] == method]
    if not mine:
        return []
    names = dict(vqa_test='questions about pictures', text_test='questions about text')
    out = [
        '## At the whole budget',
        '',
        '| task | right, % | each seed | to the control, points |',
        '|---|---|---|---|',
    ]
    for row in sorted(mine, key=lambda row: row['task'], reverse=True):
        right = f'{percent(row["score"])} [{percent(row["low"])}, {percent(row["high"])}]'
        gap = ''
        if row['difference']:
            limits = ', '.join(percent(row[limit], '+') for limit in ('gap_low', 'gap_high'))
            gap = f'{percent(row["difference"], "+")} [{limits}]'
        out.append(f'| {names[row["task"]]} | {right} | {row["by_seed"]} | {gap} |')
    return [*out, '', 'All methods side by side: [the bench](bench.md).', '']


def picture(path: Path) -> list[str]:
    "A stored picture with its caption, copied to where Sphinx finds it."
    target = src_dir / path.relative_to(root)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, target)
    caption = path.stem.replace('_', ' ').replace('-', ': ', 1)
    return [f'![{caption}](/{path.relative_to(root).as_posix()})', '', f'*{caption}*', '']


def pictures_below(folder: Path) -> list[Path]:
    "Pictures of a folder in the order of their names, without those of single runs."
    found = [folder] if folder.is_file() else folder.rglob('*')
    return sorted(
        p
        for p in found
        if p.suffix in ('.png', '.svg') and 'runs' not in p.relative_to(folder).parts
    )


def method_page(method: str) -> str:
    "The page of a method: claims, what was asked, verdicts, pictures, and where it comes from."
    paper = REFERENCES[method]
    arxiv = f'[arXiv {paper.arxiv}](https://arxiv.org/abs/{paper.arxiv})'
    out = [
        f'# {TITLES[method]}: results',
        '',
        f'> {paper.title} ({paper.year}, {arxiv})',
        '',
        *whole_budget(method),
        *claims_of(method),
    ]
    found = [p for where in PICTURES[method] for p in pictures_below(root / 'figures' / where)]
    if found:
        out += ['## Pictures', '']
    for path in found:
        out += picture(path)
    if method == 'llava':
        out += ['More: [the control](control.md), [its layers](layers.md).', '']
    return '\n'.join(out)


def stored(folder: Path) -> tuple[str, str]:
    "Title and text of a stored result's README.md."
    note = folder / 'README.md'
    text = front_matter(note.read_text(encoding='utf8'))[1].strip() if note.exists() else ''
    head = re.match(r'# (.+)\n?', text)
    body = text[head.end() :] if head else text
    # a folder's own pictures follow on the page, whether its README shows them or not
    body = re.sub(r'^!\[[^\]]*\]\([^/)]+\)\n*', '', body, flags=re.M).strip()
    title = head[1] if head else f'{folder.name.capitalize().replace("_", " ")} numbers'
    return title, relink(body, note)


def title_of(folder: Path) -> str:
    "What a stored result is called."
    return stored(folder)[0]


def experiment_page(folder: Path) -> str:
    "A stored result: its README.md, table.md, a link to report.html, its pictures."
    title, body = stored(folder)
    table, report = folder / 'table.md', folder / 'report.html'
    out = [f'# {title}', '', body, '']
    if table.exists():
        out += [table.read_text(encoding='utf8'), '']
    if report.exists():
        where = f'../{report.relative_to(root).as_posix()}'
        words = 'Full report: curves, examples, what trained, speed and memory'
        out += [f'<p><a class="report" href="{where}">{words}</a></p>', '']
    for path in pictures_below(folder):
        out += picture(path)
    return '\n'.join(out)


def by_method() -> list[str]:
    "The overview's table: a method a row, with the link to its page."
    bench = root / 'figures' / 'bench' / 'methods.csv'
    right = {
        row['method']: f'{percent(row["score"])} [{percent(row["low"])}, {percent(row["high"])}]'
        for row in (rows_of(bench) if bench.exists() else ())
        if row['task'] == 'vqa_test'
    }
    asked = claims()
    out = [
        '## By method',
        '',
        '| method | right, % | claims that hold | reversed | not shown |',
        '|---|---|---:|---:|---:|',
    ]
    for method, title in TITLES.items():
        mine = [row for row in asked if row['method'] == method]
        counts = [str(sum(row['verdict'] == v for row in mine)) if mine else '' for v in VERDICTS]
        row = [f'[{title}](results/{method}.md)', right.get(method, ''), *counts]
        out.append('| ' + ' | '.join(row) + ' |')
    words = 'Right: questions about held-out pictures at the whole budget of each recipe'
    return [*out, '', f'{words}, three seeds. {said(asked)}', '']


def overview(folders: list[Path], intro: str) -> list[str]:
    "The overview: methods first, then each stored result by its first paragraph."
    lines = ['# Results', '', '> Stored runs: every number has its seeds and its manifests', '']
    lines += [intro, '', *by_method()]
    bench = root / 'figures' / 'bench' / 'methods.png'
    if bench.exists():
        lines += picture(bench)
    for folder in folders:
        title, body = stored(folder)
        first = body.split('\n\n')[0].rstrip(':')
        first = '' if first.startswith(('|', '```', '    ')) else first
        link = f'[{title}](results/{folder.name}.md)'
        lines += [f'## {title}', '', first, '', f'All of it: {link}', '']
    return lines


def results_pages() -> list[str]:
    """figures/ as pages; returns the one that the navigation shows. Folders named under `order` in
    the front matter of figures/README.md come first, in that order."""
    fig = root / 'figures'
    if not fig.exists():
        return []
    lead = fig / 'README.md'
    head, intro = front_matter(lead.read_text(encoding='utf8')) if lead.exists() else ({}, '')
    intro = re.sub(r'^# .*\n', '', intro.strip()).strip()
    rank = {name: i for i, name in enumerate(head.get('order', []))}
    folders = sorted(d for d in fig.iterdir() if d.is_dir() and d.name != 'published')
    folders.sort(key=lambda d: rank.get(d.name, len(rank)))
    (src_dir / 'results').mkdir(parents=True, exist_ok=True)
    pages = {method: method_page(method) for method in TITLES}
    pages |= {folder.name: experiment_page(folder) for folder in folders}
    for name, text in pages.items():
        (src_dir / 'results' / f'{name}.md').write_text(text + '\n', encoding='utf8')
    lines = overview(folders, intro)
    lines += ['```{toctree}', ':hidden:', '', *(f'results/{name}' for name in pages), '```', '']
    (src_dir / 'results.md').write_text('\n'.join(lines), encoding='utf8')
    return ['results']


def copy_reports(site: Path) -> None:
    "Reports are pages of their own, kept as they are."
    for report in (root / 'figures').glob('*/report.html'):
        target = site / report.relative_to(root)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(report, target)
