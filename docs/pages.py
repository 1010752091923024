"""Pages of the site that are no notebooks: data cards and the contributor guide."""

import re

import yaml
from links import relink
from places import root, src_dir
from render import cell, escape

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


def guide() -> list[str]:
    "CONTRIBUTING.md as a page."
    page = root / 'CONTRIBUTING.md'
    (src_dir / 'contributing.md').write_text(
        relink(page.read_text(encoding='utf8'), page), encoding='utf8'
    )
    return ['contributing']
