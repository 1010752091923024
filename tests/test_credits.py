"""What is cited and credited: one table, from which commands, pages and CITATION.cff are made."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from vlmbench.data.cards import load_card
from vlmbench.methods.base import Method
from vlmbench.methods.credits import CREDITS, REFERENCES, Reference, citation_file
from vlmbench.methods.recipes import BUILT_IN, METHODS, method_class
from vlmbench.run.cli import app
from vlmbench.run.cli_cite import cited
from vlmbench.run.cli_text import method_page
from vlmbench.run.parameters import ParameterError

ROOT = Path(__file__).resolve().parent.parent
ARXIV = dict(
    llava='2310.03744',
    vip_llava='2312.00784',
    eve='2406.11832',
    vora='2503.20680',
    zero='2505.22664',
    visual_region='2412.12785',
)


def parse_bibtex(text: str) -> list[dict[str, str]]:
    "The entries of strict BibTeX, one field a line; a line of any other form is an error."
    entries = []
    for block in text.strip().split('\n\n'):
        first, *lines, last = block.splitlines()
        head = re.fullmatch(r'@(\w+)\{([\w-]+),', first)
        assert head and last == '}', block
        entry = dict(type=head[1], key=head[2])
        for line in lines:
            field = re.fullmatch(r'  (\w+) = \{(.+)\},', line)
            assert field and field[1] not in entry, line
            assert field[2].count('{') == field[2].count('}'), line
            entry[field[1]] = field[2]
        entries.append(entry)
    return entries


@pytest.mark.parametrize('name', BUILT_IN)
def test_every_entry_has_the_number_of_its_paper(name):
    (entry,) = parse_bibtex(REFERENCES[name].bibtex())
    assert entry['eprint'] == ARXIV[name] and entry['archivePrefix'] == 'arXiv'
    assert {'title', 'author', 'year', 'url'} <= entry.keys()
    assert entry['type'] == ('misc' if name == 'vora' else 'inproceedings')


def test_the_entry_of_visual_region_is_that_of_the_proceedings():
    (entry,) = parse_bibtex(cited('visual_region'))
    assert '2025.acl-long.1484' in entry['url'] and entry['pages'] == '30715--30727'
    # another paper, to which the repository's news item leads
    assert '2410.09575' not in cited()


def test_the_command_prints_all_or_one():
    everything = CliRunner().invoke(app, ['cite'])
    assert [e['eprint'] for e in parse_bibtex(everything.output)] == [ARXIV[m] for m in BUILT_IN]
    assert parse_bibtex(CliRunner().invoke(app, ['cite', 'eve']).output)[0]['key'] == 'diao2024eve'
    unknown = CliRunner().invoke(app, ['cite', 'nobody'])
    assert unknown.exit_code != 0 and 'unknown recipe' in str(unknown.exception)


def test_the_files_at_the_top_are_the_table():
    text = (ROOT / 'CITATION.cff').read_text(encoding='utf8')
    assert text == citation_file(REFERENCES.values())
    assert (ROOT / 'CITATION.bib').read_text(encoding='utf8') == f'{cited()}\n'
    listed = [ref['identifiers'][0]['value'] for ref in yaml.safe_load(text)['references']]
    assert listed == [f'arXiv:{REFERENCES[name].arxiv}' for name in REFERENCES]


@pytest.mark.parametrize('name', METHODS.offered())
def test_every_method_says_whose_work_it_is(name):
    method = method_class(name)
    assert method.citation is not None and method.credits is not None
    assert method.citation.arxiv in method_page(name)
    assert method.credits.repository in method_page(name)


@pytest.mark.parametrize('name', BUILT_IN)
def test_the_page_of_a_method_shows_its_entry(name):
    assert method_class(name).citation is REFERENCES[name]
    assert method_class(name).credits is CREDITS[name]
    module = BUILT_IN[name].partition(':')
    (page,) = (ROOT / 'nbs' / 'methods').glob(f'??_{module[0].rpartition(".")[2]}.ipynb')
    cells = [''.join(cell['source']) for cell in json.loads(page.read_text())['cells']]
    assert f'Markdown({module[2]}.owed())' in cells


def test_what_the_authors_of_each_method_thank_is_listed():
    built = {name: credits.builds_on.keys() for name, credits in CREDITS.items()}
    assert {'LLaVA', 'Bunny'} <= built['visual_region']
    zero = {'llama-cookbook', 'LLaVA', 'LLaVA-NeXT', 'transformers', 'lmms-eval'}
    assert zero | {'lm-evaluation-harness', 'vLLM', 'torchshard'} <= built['zero']
    assert CREDITS['zero'].weights.startswith('CC BY-NC 4.0')


@dataclass(frozen=True)
class Silent(Method):
    name = 'silent'


@dataclass(frozen=True)
class Spoken(Method):
    name = 'spoken'
    citation = Reference('roe2026spoken', 'Spoken {VLMs}', ('Roe, Re',), 2026, '2601.00001')


def test_a_method_of_another_package_brings_its_own(monkeypatch):
    monkeypatch.setattr(METHODS, 'made_here', {})
    METHODS.register('silent', Silent)
    METHODS.register('spoken', Spoken)
    assert parse_bibtex(cited('spoken'))[0]['eprint'] == '2601.00001'
    assert '2601.00001' in cited() and '2601.00001' in Spoken.owed()
    with pytest.raises(ParameterError, match="'silent' says no paper"):
        cited('silent')


def test_vip_llava_data_is_for_research_only():
    for stage in ('vip_llava_stage2', 'vip_llava_stage3'):
        card = load_card(stage).front
        assert card['license'] == 'cc-by-nc-4.0' and 'Apache-2.0' in card['license_note']
