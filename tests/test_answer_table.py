"""Replies of every form, what a careful human grader makes of each, and why (answers.csv)."""

import csv
import json
import re
from collections import Counter
from pathlib import Path

import pytest

from vlmbench.evaluate.scorers import ExactMatch, MultipleChoice, parse_choice, parse_yes_no

KINDS = ('choice', 'number', 'open', 'yes/no')
RIGHT = (*'ABCDEFGHIJ', 'yes', 'no', '0', '1', '')


def read_table() -> list[dict[str, str]]:
    "The rows, with line breaks and invisible characters of the replies put back."
    with open(Path(__file__).parent / 'answers.csv', encoding='utf8', newline='') as file:
        rows = list(csv.DictReader(file))
    escapes = {'n': '\n', 'r': '\r', 't': '\t', '\\': '\\'}
    for row in rows:
        row['reply'] = re.sub(
            r'\\(?:([nrt\\])|(?:u(\w{4})|x(\w\w)))',
            lambda m: escapes[m[1]] if m[1] else chr(int(m[2] or m[3], 16)),
            row['reply'],
        )
    return rows


TABLE = read_table()


def graded(row: dict[str, str]) -> str:
    "What the scorers make of a row: the option, yes or no, or 1 for the right value."
    if row['kind'] == 'choice':
        return parse_choice(row['reply'], json.loads(row['truth']))
    if row['kind'] == 'yes/no':
        return parse_yes_no(row['reply'])
    return str(int(ExactMatch().score(row['reply'], dict(answers=[row['truth']]))))


def test_the_table_is_wide_and_argued():
    counts = Counter(row['kind'] for row in TABLE)
    assert set(counts) == set(KINDS) and sum(counts.values()) >= 300
    assert min(counts.values()) >= 30
    assert all(row['reason'] and row['right'] in RIGHT for row in TABLE)
    assert len({(r['kind'], r['reply'], r['truth']) for r in TABLE}) == len(TABLE)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.fault('letter-touches-text')
def test_replies_are_graded_as_a_careful_human_would(kind):
    rows = [row for row in TABLE if row['kind'] == kind]
    wrong = [
        (r['reply'], r['truth'], graded(r), r['right']) for r in rows if graded(r) != r['right']
    ]
    assert not wrong, f'{len(wrong)} of {len(rows)}: {wrong[:12]}'


@pytest.mark.parametrize('letter', 'ABCDabcd')
def test_no_letter_is_favoured(letter):
    "Every reply that names one letter and nothing else of the options, with another letter in it."
    options = ['cat', 'dog', 'bird', 'fish']
    for row in TABLE:
        if row['kind'] != 'choice' or json.loads(row['truth']) != options or row['right'] != 'B':
            continue
        alone = re.findall(r'(?<![A-Za-z])[A-DＡ-Ｄa-d](?![A-Za-z])', row['reply'])
        if alone != ['B'] or re.search('cat|dog|bird|fish', row['reply'], re.I):
            continue
        if letter.islower() and row['reply'].rstrip().endswith('?'):
            continue  # a small letter in a question names no option: "What about a?"
        said = re.sub(r'(?<![A-Za-z])B(?![A-Za-z])', letter, row['reply'])
        assert parse_choice(said, options) == letter.upper(), said
        right = MultipleChoice().score(said, dict(choices=options, answers=[letter.upper()]))
        assert right == 1, said
