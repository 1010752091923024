"""Pages of the command line, one a command, made from what `--help` prints of it."""

import re

from places import src_dir
from render import cell, code, escape
from typer.main import get_command

from vlmbench.run.cli import app

EXPERIMENTS = 'Parameters of each notebook: [Experiments](/reference/runs).'
MORE = {'run': EXPERIMENTS, 'submit': EXPERIMENTS}


def commands(group=None, words: tuple[str, ...] = ()) -> dict[tuple[str, ...], object]:
    "Every command by its words: `('data', 'mix')`; groups stand before what they hold."
    found = {}
    for name, command in (group or get_command(app)).commands.items():
        here = (*words, name)
        found[here] = command
        if 'commands' in vars(command):
            found |= commands(command, here)
    return found


def page_name(words: tuple[str, ...]) -> str:
    return 'commands/' + '_'.join(words)


def said(record: tuple[str, str]) -> tuple[str, str, str, str]:
    """A line of `--help`, `('--gpus <int range>', 'GPUs of each node.  [default: 0; x>=0]')`, as
    name, type with its limits, default, meaning."""
    named, text = record
    name, _, kind = named.partition(' <')
    m = re.fullmatch(
        r'(.*?)(?:\s*\[((?:default: |required|env var: |x[<>]|\d[\d.]*<).*)\])?', text, re.S
    )
    default, limits = '', []
    for fact in (m[2] or '').split('; '):
        if fact.startswith('default: '):
            default = fact.removeprefix('default: ')
        elif fact:
            limits.append(fact)
    return name, ', '.join(filter(None, [kind.removesuffix('>'), *limits])), default, m[1].strip()


def table(records: list[tuple[str, str]], head: str) -> list[str]:
    "Arguments or options as a table; empty where there are none."
    if not records:
        return []
    out = [f'## {head}', '', '| name | type | default | meaning |', '|---|---|---|---|']
    for name, kind, default, meaning in map(said, records):
        out.append(f'| {code(name)} | {cell(kind)} | {code(default)} | {cell(meaning)} |')
    return [*out, '']


def linked(words: tuple[str, ...], command) -> str:
    "A command and the first line of its help as an item of a list."
    first = (command.help or '').split('\n\n')[0].replace('\n', ' ')
    return f'- [`vlmbench {" ".join(words)}`](/{page_name(words)}): {escape(first)}'


def command_page(words: tuple[str, ...], command, below: dict) -> str:
    "The page of a command: usage, what it does, arguments, options, commands below it."
    context = command.make_context(f'vlmbench {" ".join(words)}', [], resilient_parsing=True)
    first, _, rest = (command.help or '').partition('\n\n')
    records = {'argument': [], 'option': []}
    for parameter in command.get_params(context):
        if record := parameter.get_help_record(context):
            records[parameter.param_type_name].append(record)
    usage = command.get_usage(context).removeprefix('Usage: ')
    out = [f'# vlmbench {" ".join(words)}', '', f'> {escape(" ".join(first.split()))}', '']
    out += ['```text', usage, '```', '', escape(rest), '']
    out += [linked(sub, c) for sub, c in below.items()] + ['']
    out += table(records['argument'], 'Arguments') + table(records['option'], 'Options')
    out += [MORE.get(words[0], ''), '']
    if below:
        out += ['```{toctree}', ':hidden:', '', *(f'/{page_name(sub)}' for sub in below), '```']
    return '\n'.join(out) + '\n'


def command_pages() -> list[str]:
    "A page for each command and one that lists them; returns what the navigation shows."
    found = commands()
    (src_dir / 'commands').mkdir(parents=True, exist_ok=True)
    for words, command in found.items():
        below = {w: c for w, c in found.items() if w[:-1] == words}
        page = src_dir / f'{page_name(words)}.md'
        page.write_text(command_page(words, command, below), encoding='utf8')
    top = {w: c for w, c in found.items() if len(w) == 1}
    out = ['# Command line', '', '> Every command with its options, as `--help` prints them', '']
    for words, command in found.items():
        indent = '  ' * (len(words) - 1)
        out.append(indent + linked(words, command))
    out += ['', '```{toctree}', ':hidden:', '', *(f'/{page_name(w)}' for w in top), '```', '']
    (src_dir / 'commands' / 'index.md').write_text('\n'.join(out), encoding='utf8')
    return ['commands/index']
