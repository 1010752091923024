"""API entries of the site: a symbol in, Markdown out.

A signature, the docstring, a table of parameters (from the comment beside each one) and a table of
public methods. Objects are taken from the exported package, so what is printed is what a user
imports.
"""

import dataclasses
import inspect
import re
from typing import Any

from fastcore.docments import docments

EMPTY = inspect.Parameter.empty


def escape(text: str) -> str:
    "Protect `<image>`-like words, `$` and `*args` from Markdown, outside code spans and fences."
    parts = re.split(r'(```.*?```|``.*?``|`[^`\n]*`)', text, flags=re.S)
    for i in range(0, len(parts), 2):
        parts[i] = re.sub(r'<(?=[\w|/!])', '&lt;', parts[i]).replace('$', r'\$')
        parts[i] = re.sub(
            r'(?<![\w*])(\*{1,2})(?=(?:args|kwargs|kw)\b)',
            lambda m: m[1].replace('*', r'\*'),
            parts[i],
        )
    return ''.join(parts)


def docstring(obj: Any) -> str:
    """The docstring as Markdown; an indented block under a line becomes a list, one item per
    first-level line."""
    doc = inspect.getdoc(obj) if not (inspect.isclass(obj) and '__doc__' not in vars(obj)) else None
    if (
        dataclasses.is_dataclass(obj)
        and inspect.isclass(obj)
        and (doc or '').startswith(f'{obj.__name__}(')
    ):
        doc = None
    out, indent, fence = [], None, False
    for line in (doc or '').splitlines():
        if line.lstrip().startswith('```'):
            fence = not fence
        depth = len(line) - len(line.lstrip())
        if fence or depth < 2 or not line.strip() or re.match(r'\s*([-*+]|\d+\.|\|)\s', line):
            indent = None
            out.append(line)
            continue
        if indent is None:
            indent = depth
            if out and out[-1].strip():
                out.append('')
        out.append(('- ' if depth <= indent else '  ') + line.strip())
    return escape('\n'.join(out))


def annotation(a: Any) -> str:
    "A type as it would be written."
    if a is EMPTY or a is None:
        return ''
    a = (
        getattr(a, '__origin__', a) if hasattr(a, '__metadata__') else a
    )  # the type that is annotated
    text = a if isinstance(a, str) else inspect.formatannotation(a)
    # typing's few classes (BinaryIO) come as what Python prints for a class
    text = re.sub(r"<class '([\w.]+)'>", r'\1', text)
    homes = (
        r'typing|collections\.abc|pathlib|PIL\.Image|torch\.nn\.modules\.module|vlmbench(?:\.\w+)+'
    )
    return re.sub(rf'\b(?:{homes})\.(?=[A-Z])', '', text)


def default(d: Any) -> str:
    "A default value, short."
    if d is EMPTY:
        return ''
    if isinstance(d, type(dataclasses.MISSING)):
        return ''
    text = getattr(d, '__name__', None) or repr(d)
    if not isinstance(d, str):
        text = re.sub(r"<(?:class|function) '?(?:[\w.]+\.)?(\w+)'?[^>]*>", r'\1', text)
        text = re.sub(r'<[^>]*>', '...', text)  # what has no source form
    return text if len(text) <= 48 else text[:45] + '...'


def signature(obj: Any, name: str) -> str:
    "`def name(...) -> ...` or `class name(...)`, one parameter a line when it does not fit."
    kind = (
        'class'
        if inspect.isclass(obj)
        else 'async def'
        if inspect.iscoroutinefunction(obj)
        else 'def'
    )
    if isinstance(obj, property):
        return f'property {name}'
    try:
        sig = inspect.signature(obj)
    except (ValueError, TypeError):
        return f'{kind} {name}'
    items, star = [], False
    params = [p for p in sig.parameters.values() if p.name not in ('self', 'cls')]
    for p in params:
        if p.kind is p.KEYWORD_ONLY and not star:
            items.append('*')
            star = True
        if p.kind is p.VAR_POSITIONAL:
            star = True
        text = {p.VAR_POSITIONAL: '*', p.VAR_KEYWORD: '**'}.get(p.kind, '') + p.name
        typ, dflt = annotation(p.annotation), default(p.default)
        if typ:
            text += f': {typ}'
        if dflt:
            text += f' = {dflt}' if typ else f'={dflt}'
        items.append(text)
    ret = annotation(sig.return_annotation) if kind != 'class' else ''
    tail = f' -> {ret}' if ret and ret != 'None' else ''
    line = f'{kind} {name}({", ".join(items)}){tail}'
    return (
        line if len(line) <= 96 else f'{kind} {name}(\n    ' + ',\n    '.join(items) + f',\n){tail}'
    )


def cell(text: Any) -> str:
    "A table cell."
    return escape(str(text)).replace('|', r'\|').replace('\n', ' ').strip()


def code(text: str) -> str:
    "Inline code, also inside a table."
    return f'`{text.replace("|", chr(92) + "|")}`' if text else ''


def parameters(obj: Any) -> str:
    "Markdown table of the parameters that carry a comment; empty when none does."
    try:
        dm = docments(obj, full=True, returns=True)
    except (ValueError, TypeError, OSError, KeyError, SyntaxError):
        return ''  # no source or signature to read
    rows = [(n, p) for n, p in dm.items() if n not in ('self', 'cls')]
    if not any(p.get('docment') for _, p in rows):
        return ''
    out = ['| Parameter | Type | Default | Description |', '|---|---|---|---|']
    for name, p in rows:
        if name == 'return' and not p.get('docment'):
            continue
        label = '*returns*' if name == 'return' else code(name)
        dflt = '' if name == 'return' else code(default(p.get('default', EMPTY)))
        out.append(
            f'| {label} | {code(annotation(p.get("anno", EMPTY)))} | {dflt} | '
            f'{cell(p.get("docment") or "")} |'
        )
    return '\n'.join(out)


def methods(cls: type, documented: set[str]) -> str:
    """Markdown table of the public methods and properties `cls` itself defines and that have no
    entry of their own."""
    rows = []
    for name, member in vars(cls).items():
        if name.startswith('_') or f'{cls.__name__}.{name}' in documented:
            continue
        fn = getattr(member, '__func__', member)
        if not (inspect.isfunction(fn) or isinstance(fn, property)):
            continue
        target = fn.fget if isinstance(fn, property) else fn
        if target is None or target.__module__ != cls.__module__:
            continue
        doc = inspect.cleandoc(target.__doc__ or '').split('\n\n')[
            0
        ]  # not what a base class says of its own
        if not doc:
            continue
        flat = (
            signature(fn, name).replace(',\n)', ')').replace('(\n    ', '(').replace('\n    ', ' ')
        )
        sig = name if isinstance(fn, property) else re.sub(r'^(async )?def ', '', flat)
        rows.append(f'| {code(sig)} | {cell(doc)} |')
    return '\n'.join(['| Member | What it does |', '|---|---|', *rows]) if rows else ''


def entry(
    obj: Any, name: str, level: int = 3, label: str = '', documented: set[str] = frozenset()
) -> str:
    "One API entry: anchor, heading, signature, text, parameters, members."
    head = [f'({label})=' if label else '', f'{"#" * level} {name}'.replace('_', r'\_')]
    body = [
        f'```python\n{signature(obj, name)}\n```',
        docstring(obj),
        parameters(obj),
        methods(obj, documented) if inspect.isclass(obj) else '',
    ]
    return '\n'.join(filter(None, head)) + '\n\n' + '\n\n'.join(filter(None, body))
