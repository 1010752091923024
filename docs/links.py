"""Links of the site's pages: names in backticks to their API entries, papers to arXiv, files of the
project to their pages, and what a method's page cites."""

import os
import re
from pathlib import Path

import nbformat
from nbformat.v4 import new_markdown_cell
from places import nbs, root, run_dir, src_dir


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
