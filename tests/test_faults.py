"""The fault catalogue: every row has a report and a test that exists and is marked with its id."""

import ast
import json
import re
from pathlib import Path

import yaml
from typer.testing import CliRunner

from vlmbench.run.cli import app
from vlmbench.run.faults import card_faults, faults_table

ROOT = Path(__file__).resolve().parent.parent


def marked_tests() -> tuple[set[str], set[tuple[str, str]]]:
    "Every test of the folder, and (fault, test) for each mark fault('ID')."
    tests, marks = set(), set()
    for path in sorted((ROOT / 'tests').glob('test_*.py')):
        for node in ast.walk(ast.parse(path.read_text(encoding='utf8'))):
            if not isinstance(node, ast.FunctionDef) or not node.name.startswith('test_'):
                continue
            name = f'tests/{path.name}::{node.name}'
            tests.add(name)
            for mark in node.decorator_list:
                if isinstance(mark, ast.Call) and ast.unparse(mark.func) == 'pytest.mark.fault':
                    marks |= {(arg.value, name) for arg in mark.args}
    return tests, marks


def own_faults():
    table = faults_table()
    return table[~table['id'].isin(card_faults()['id'])]


def test_each_named_test_exists_and_is_marked():
    tests, marks = marked_tests()
    table = faults_table()
    assert set(table['test']) <= tests, sorted(set(table['test']) - tests)
    own = own_faults()
    assert set(zip(own['id'], own['test'])) == marks


def test_each_row_names_a_public_report():
    one = r'[\w.-]+/[\w.-]+(?:#\d+|@[0-9a-f]{7,40})'
    for row in own_faults().itertuples():
        assert re.fullmatch(rf'{one}(?:; {one})*', row.reported), row
        assert row.symptom and row.instead, row


def test_faults_of_data_sets_are_those_of_their_cards():
    stated = []
    for path in sorted((ROOT / 'data_cards').glob('*.md')):
        head = re.match(r'---\n(.*?)\n---\n', path.read_text(encoding='utf8'), re.S)
        known = yaml.safe_load(head[1]).get('known_faults', []) if head else []
        stated += [fault for fault in known if fault != 'unknown']
    assert card_faults()['symptom'].tolist() == stated and len(stated) > 100
    assert (card_faults()['reported'] != '').all()


def test_the_command_lists_finds_and_refuses():
    run = CliRunner().invoke(app, ['faults'])
    assert run.exit_code == 0 and len(run.output.splitlines()) == len(faults_table()) + 1
    found = json.loads(CliRunner().invoke(app, ['faults', 'EXIF', '--json']).output)
    assert [row['id'] for row in found] == ['opened-exif']
    nothing = CliRunner().invoke(app, ['faults', 'no such thing'])
    assert nothing.exit_code != 0 and "no fault mentions 'no such thing'" in str(nothing.exception)
