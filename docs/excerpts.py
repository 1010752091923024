"""Excerpts below search results, also where the site is opened from disk: browsers let no page read
another by file://, so the prose of every page travels in a script that only the search loads."""

import json
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

LONGEST = 6000  # characters of a page's prose: 450 pages make 2 MB


def prose(doctree: nodes.document) -> str:
    "Paragraphs of a page, without code, outputs and formulas."
    said = []
    for paragraph in doctree.findall(nodes.paragraph):
        text = ' '.join(paragraph.astext().split())
        said.append(text if text.endswith(('.', ':', '?', '!')) else f'{text}.')
    return ' '.join(said)[:LONGEST]


def kept(env: BuildEnvironment) -> dict[str, str]:
    "The excerpts of an environment by page; they stay with it from one build to the next."
    if not hasattr(env, 'excerpts'):
        env.excerpts = {}
    return env.excerpts


def read(app: Sphinx, doctree: nodes.document) -> None:
    kept(app.env)[app.env.docname] = prose(doctree)


def merge(app: Sphinx, env: BuildEnvironment, docnames: set[str], other: BuildEnvironment) -> None:
    kept(env).update({name: kept(other)[name] for name in docnames if name in kept(other)})


def purge(app: Sphinx, env: BuildEnvironment, docname: str) -> None:
    kept(env).pop(docname, None)


def scripts(app: Sphinx, pagename: str, template: str, context: dict, doctree) -> None:
    if pagename == 'search':
        app.add_js_file('excerpts.js')
        app.add_js_file('search_excerpts.js')


def write(app: Sphinx, exception: Exception | None) -> None:
    if exception is None:
        said = json.dumps(kept(app.env), ensure_ascii=False, sort_keys=True)
        target = Path(app.outdir) / '_static' / 'excerpts.js'
        target.write_text(f'const EXCERPTS = {said};\n', encoding='utf8')


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect('doctree-read', read)
    app.connect('env-merge-info', merge)
    app.connect('env-purge-doc', purge)
    app.connect('html-page-context', scripts)
    app.connect('build-finished', write)
    return dict(parallel_read_safe=True, parallel_write_safe=True)
