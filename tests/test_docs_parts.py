"""Parts of the site's builder that need no built site: what is made from `--help`, what is made
anew, which words become links."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parent.parent / 'docs'


@pytest.fixture(scope='module')
def docs():
    "The builder's folder where its modules find each other."
    sys.path.insert(0, str(DOCS))
    yield
    sys.path.remove(str(DOCS))


def test_a_line_of_help_is_a_row(docs):
    from commands import said

    line = ('--gpus <int range>', 'GPUs of each node.  [default: 0; x>=0]')
    assert said(line) == ('--gpus', 'int range, x>=0', '0', 'GPUs of each node.')
    line = ('notebook <str>', 'A name, or a path (see [1]).  [required]')
    assert said(line) == ('notebook', 'str, required', '', 'A name, or a path (see [1]).')
    assert said(('--show', 'List [all] of them.')) == ('--show', '', '', 'List [all] of them.')


def test_every_command_and_option_has_its_row(docs):
    from commands import command_page, commands

    found = commands()
    assert {('run',), ('data',), ('data', 'mix')} <= set(found)
    page = command_page(('data', 'mix'), found[('data', 'mix')], {})
    said = subprocess.run(
        [sys.executable, '-m', 'vlmbench', 'data', 'mix', '--help'],
        env={'COLUMNS': '200', 'TERM': 'dumb', 'PYTHONPATH': str(DOCS.parent), 'PATH': '/usr/bin'},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    options = {word for word in said.split() if word.startswith('--') and word.strip('-').isalpha()}
    assert len(options) > 5
    assert not {o for o in options if f'`{o}`' not in page and f'`{o} ' not in page}


def test_a_page_is_made_anew_where_its_notebook_or_a_module_it_reads_changed(docs, tmp_path):
    from notebooks import is_current

    stamp = tmp_path / 'a.json'
    made = dict(key='k', read={'vlmbench/a.py': '1'}, seconds=1, started=[])
    stamp.write_text(json.dumps(made))
    package = {'vlmbench/a.py': '1', 'vlmbench/b.py': '2'}
    assert not is_current(stamp, 'k', package)  # there is no page yet
    (tmp_path / 'a.ipynb').write_text('{}')
    assert is_current(stamp, 'k', package)
    assert is_current(stamp, 'k', package | {'vlmbench/b.py': '3'})
    assert not is_current(stamp, 'k', package | {'vlmbench/a.py': '3'})
    assert not is_current(stamp, 'k', {'vlmbench/b.py': '2'})
    assert not is_current(stamp, 'other', package)


def test_a_process_that_starts_others_reads_the_whole_package(docs):
    code = (
        'import sys; sys.path.insert(0, sys.argv[1])\n'
        'from notebooks import Watch, package_files\n'
        'watch = Watch()\nimport vlmbench.options, subprocess\nread = watch.read()\n'
        'assert "vlmbench/options.py" in read and "vlmbench/__init__.py" in read, read\n'
        'assert not any("models/" in name for name in read), read\n'
        'subprocess.run(["git", "--version"], stdout=-3)\nassert watch.read() == read\n'
        'subprocess.run([sys.executable, "-c", ""])\nassert watch.read() == package_files()\n'
    )
    subprocess.run([sys.executable, '-c', code, str(DOCS)], check=True, cwd=DOCS.parent)


def test_papers_become_links_outside_of_code_and_links(docs):
    from links import papers_linked

    link = '[arXiv 2406.11832](https://arxiv.org/abs/2406.11832)'
    assert papers_linked('EVE (arXiv 2406.11832).') == f'EVE ({link}).'
    for text in ('`arXiv 2406.11832`', link, '```\narXiv:2406.11832\n```', 'arXiv 24'):
        assert papers_linked(text) == text
