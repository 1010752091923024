"""Typed notebook parameters: what is accepted, what is refused, and that text and value
round-trip."""

import papermill
import pytest
from hypothesis import given, strategies as st

from vlmbench.options import OptionType, check_value, parse_text
from vlmbench.run.engine import find_notebook
from vlmbench.run.parameters import (
    ParameterError,
    check_parameters,
    load_notebook,
    notebook_parameters,
    parse_assignments,
    read_parameters,
)

DECLARED = read_parameters("""
# a comment line is fine
steps: int = 10       # optimizer steps
lr: float = 1e-3      # learning rate # with a second hash
quick: bool = False
name: str = 'llava'   # '#' inside a string is no comment
layers: Optional[list[int]] = None
tags: list[str] = []
precision: Literal['fp32', 'bf16'] = 'fp32'
""")


def test_declaration_is_read_in_order_with_help_and_defaults():
    assert list(DECLARED) == ['steps', 'lr', 'quick', 'name', 'layers', 'tags', 'precision']
    assert DECLARED['steps'].help == 'optimizer steps' and DECLARED['lr'].default == 1e-3
    assert str(DECLARED['layers'].type) == 'Optional[list[int]]'


@pytest.mark.parametrize(
    'source, why',
    [
        ('steps = 3', 'not a typed parameter'),
        ('a: int = 1; b: int = 2', 'one parameter on one line'),
        ('a: int = [\n1]', 'one parameter on one line'),
        ('a: dict = {}', 'is not one of'),
        ('a: int = 1\na: int = 2', 'declared twice'),
        ('a: int = len("x")', 'literal'),
        ('a: int', 'not a typed parameter'),
        ('a: int = "1"', 'default'),
        ('a: bool = 0', 'default'),
        ('a: int = None', 'None is not allowed'),
        ('import os', 'not a typed parameter'),
        ('a: int = (', 'not valid Python'),
    ],
)
def test_a_faulty_declaration_is_refused_with_its_place(source, why):
    with pytest.raises(ParameterError, match='parameters cell') as e:
        read_parameters(source)
    assert why in str(e.value)


@pytest.mark.parametrize(
    'name, text, value',
    [
        ('lr', '1e-3', 1e-3),
        ('lr', '3', 3.0),
        ('steps', '1_000', 1000),
        ('steps', '-2', -2),
        ('quick', 'true', True),
        ('quick', 'No', False),
        ('name', 'a=b', 'a=b'),
        ('name', '7', '7'),
        ('name', '', ''),
        ('layers', '0,2', [0, 2]),
        ('layers', 'none', None),
        ('layers', '[1, 2]', [1, 2]),
        ('layers', '', []),
        ('tags', 'x,y z', ['x', 'y z']),
        ('precision', 'bf16', 'bf16'),
    ],
)
def test_text_is_read_by_the_declared_type(name, text, value):
    got = check_parameters(DECLARED, {name: text})[name]
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    'name, bad',
    [
        ('steps', '1.5'),
        ('steps', '1e3'),
        ('steps', 'many'),
        ('steps', 1.5),
        ('steps', True),
        ('steps', None),
        ('lr', 'fast'),
        ('lr', 'nan'),
        ('lr', 'inf'),
        ('lr', True),
        ('lr', float('nan')),
        ('quick', 'maybe'),
        ('quick', 'off'),
        ('quick', '0'),
        ('quick', ''),
        ('quick', 1),
        ('name', 7),
        ('layers', '1,x'),
        ('layers', [1, 2.5]),
        ('layers', '[1,'),
        ('layers', "__import__('os')"),
        ('precision', 'fp8'),
        ('precision', 3),
        ('tags', [1]),
    ],
)
def test_a_wrong_type_is_refused_and_named(name, bad):
    with pytest.raises(ParameterError, match=f"parameter '{name}' must be") as e:
        check_parameters(DECLARED, {name: bad})
    assert e.value.exit_code == 2 and 'Nothing was run' in str(e.value)


def test_all_faults_are_reported_at_once_with_the_nearest_name():
    with pytest.raises(ParameterError) as e:
        check_parameters(DECLARED, {'stpes': 3, 'lr': 'x', 'zzz': 1})
    assert (
        "did you mean 'steps'?" in str(e.value)
        and "'lr' must be float" in str(e.value)
        and "'zzz'" in str(e.value)
    )


@given(
    st.one_of(
        st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.booleans(), st.text()
    )
)
def test_text_of_a_value_reads_back_as_the_value(value):
    kind = type(value).__name__
    assert parse_text(str(value), OptionType(kind)) == value


@given(st.lists(st.integers()))
def test_lists_read_back_in_both_spellings(values):
    assert parse_text(','.join(map(str, values)), OptionType('list[int]')) == values
    assert parse_text(str(values), OptionType('list[int]')) == values


@given(
    st.text(), st.sampled_from(['int', 'float', 'bool', 'list[int]', 'list[float]', 'list[str]'])
)
def test_any_text_is_either_read_or_refused(text, kind):
    try:
        value = check_value(text, OptionType(kind))
    except ValueError:
        return
    assert type(value).__name__ == kind.split('[')[0]


@given(st.from_regex(r'[a-z]{1,8}', fullmatch=True), st.text())
def test_assignments_split_at_the_first_equals_sign(key, value):
    assert parse_assignments([f'{key}={value}']) == {key: value}


@pytest.mark.parametrize('words', [['lr'], ['=3'], ['a b=3'], ['lr=1', 'lr=2']])
def test_a_word_that_is_no_assignment_is_refused(words):
    with pytest.raises(ParameterError):
        parse_assignments(words)


def test_only_one_cell_may_declare_and_a_broken_file_is_named(tmp_path):
    cell = dict(
        cell_type='code',
        metadata=dict(tags=['parameters']),
        source=['a: int = 1\n', 'b: str = "x"'],
    )
    assert list(notebook_parameters({'cells': [cell]})) == ['a', 'b']
    with pytest.raises(ParameterError, match='keep one'):
        notebook_parameters({'cells': [cell, cell]})
    for content in ('', '{', '[]', '{"cells": 3}'):
        (tmp_path / 'x.ipynb').write_text(content)
        with pytest.raises(ParameterError, match='x.ipynb: not a notebook'):
            load_notebook(tmp_path / 'x.ipynb')


def test_a_type_may_carry_a_name():
    above = dict(cell_type='code', metadata={}, source="%time\nKind = Literal['a', 'b']\nX = Kind")
    kept = "kind: Kind = 'a'\nkinds: Optional[Kind] = None"
    cell = dict(cell_type='code', metadata=dict(tags=['parameters']), source=kept)
    found = notebook_parameters({'cells': [above, cell]})
    literal = OptionType('literal', choices=('a', 'b'))
    assert found['kind'].type == literal
    assert found['kinds'].type == OptionType('literal', True, ('a', 'b'))
    with pytest.raises(ParameterError, match="kind: type 'Kind' is not one of"):
        notebook_parameters({'cells': [cell, above]})


RUNS = sorted(p.stem for p in find_notebook('train').parent.glob('*.ipynb'))


@pytest.mark.parametrize('name', RUNS)
def test_papermill_alone_knows_every_parameter_of_a_run_notebook(name):
    path = find_notebook(name)
    declared = notebook_parameters(load_notebook(path), name)
    assert list(papermill.inspect_notebook(str(path))) == list(declared)
