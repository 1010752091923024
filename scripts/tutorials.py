"""Execute the tutorials and keep what they show in their files, so that a viewer that runs nothing
(a code host's, an editor's) shows their figures.

    python scripts/tutorials.py [NAME ...]     all of nbs/tutorials, or those of these names

What is kept is small and the same on every machine: pictures of few colours, made smaller until
the file is; no addresses in memory, no paths of this machine, no state of widgets. The hash of the
code that was executed stands in the notebook's metadata (`executed`); a test compares it.
"""

import base64
import hashlib
import io
import os
import re
import sys
import tempfile
from functools import cache
from pathlib import Path

from execnb.nbio import nb2str, read_nb, write_nb
from PIL import Image, ImageChops, ImageStat

root = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(root / 'docs'))

from copies import Work, in_copies
from notebooks import SKIPPED, clean_outputs

TUTORIALS = root / 'nbs' / 'tutorials'
JOBS, TIMEOUT = 2, 1800  # processes; seconds for one notebook
LARGEST = 46_500  # bytes of a file
# widest picture in px and its colours, from the best to what is still readable
SIZES = ((720, 64), (640, 48), (560, 32), (480, 24), (420, 16))
LONGEST = 2400  # characters of printed text in one output


def executed_hash(nb) -> str:
    "Hash of the code of a notebook; prose does not count."
    code = [''.join(c['source']) for c in nb['cells'] if c['cell_type'] == 'code']
    return hashlib.sha256('\n#%%\n'.join(code).encode()).hexdigest()[:16]


def told(text: str) -> str:
    "Printed text or a table without what differs from machine to machine."
    places = {os.environ['VLMBENCH_RUNS']: 'runs', str(root): '.', str(Path.home()): '~'}
    for place, said in places.items():
        text = text.replace(place, said)
    text = re.sub(r' at 0x[0-9a-f]+', '', text)
    text = re.sub(r"^\{.*'train_runtime'.*\}\n?", '', text, flags=re.M)  # how long a trainer took
    if len(text) > LONGEST and '<table' not in text:
        text = f'{text[:LONGEST].rstrip()}\n...\n'
    return text


def table(html: str) -> str:
    "A table without the styles that a viewer leaves out anyway, its ids counted from 0."
    html = re.sub(r'<style.*?</style>', '', html, flags=re.S)
    for i, name in enumerate(dict.fromkeys(re.findall(r'\bT_[0-9a-f]{5}', html))):
        html = html.replace(name, f'T_{i}')
    html = re.sub(r' (?:class|style|border|id|scope)="[^"]*"', '', html)
    return re.sub(r'>\s+<', '><', html).strip()


@cache
def picture(data: str, width: int, colours: int) -> tuple[str, str]:
    """A PNG in base64 as a smaller picture at most `width` px wide: its kind and base64. A drawing
    is a PNG of so many colours, those that lie farthest apart; what these do not reach, photographs
    and noise, is a JPEG, which keeps its colours."""
    with Image.open(io.BytesIO(base64.b64decode(data))) as shown:
        made = shown.convert('RGB')
    if made.width > width:
        made = made.resize((width, round(made.height * width / made.width)), Image.LANCZOS)
    few = made.quantize(colours, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    away = ImageStat.Stat(ImageChops.difference(made, few.convert('RGB'))).mean
    kept = io.BytesIO()
    if max(away) < 3:
        few.save(kept, 'PNG', optimize=True)
    else:
        made.save(kept, 'JPEG', quality=50, optimize=True, progressive=True)
    kind = 'image/png' if max(away) < 3 else 'image/jpeg'
    return kind, base64.b64encode(kept.getvalue()).decode()


def kept_output(output, width: int, colours: int):
    "An output as it is stored; None where nothing is left to show."
    if output['output_type'] == 'stream':
        text = told(''.join(output['text']))
        lines = re.sub(r'[^\n]*\r', '', text)  # what a live line said before its last word
        return dict(output_type='stream', name='stdout', text=lines.splitlines(keepends=True))
    data = {}
    for kind, value in output.get('data', {}).items():
        value = ''.join(value) if isinstance(value, (str, list)) else value
        if kind == 'image/png':
            small, value = picture(value, width, colours)
            data[small] = value
        elif kind == 'text/html':
            data[kind] = told(table(value)).splitlines(keepends=True)
        elif kind in ('text/plain', 'text/markdown', 'text/latex'):
            data[kind] = told(value).splitlines(keepends=True)
    if data.keys() - {'text/plain'}:
        data.pop('text/plain', None)
    return dict(output_type='display_data', data=data, metadata={}) if data else None


def rank(output) -> tuple[bool, int]:
    "Which outputs are left out first where all have no room: tables, then pictures, large ones."
    data = output.get('data', {})
    size = len(''.join(data.get('text/html', ''))) + len(data.get('image/png', ''))
    return 'image/png' in data, -size


def stored(outputs: list, left_out: list, width: int, colours: int) -> list:
    "Outputs of a cell as they are stored, a sentence in the place of those that are left out."
    kept = []
    for output in outputs:
        if any(output is other for other in left_out):
            text = '(too large to be kept in this file: run the cell, or see the page of the site)'
            kept.append(dict(output_type='display_data', data={'text/plain': [text]}, metadata={}))
        elif shown := kept_output(output, width, colours):
            kept.append(shown)
    return kept


def store(path: Path, outputs: dict[str, list]) -> None:
    "Write a notebook with its `outputs` by cell id, as large as fits."
    nb = read_nb(path)
    nb.metadata['executed'] = executed_hash(nb)
    large = sorted((o for cell in outputs.values() for o in cell), key=rank)
    for count in range(len(large) + 1):
        for width, colours in SIZES:
            for cell in nb.cells:
                if cell.cell_type == 'code':
                    shown = outputs.get(cell.id, [])
                    cell.outputs = stored(shown, large[:count], width, colours)
            if len(nb2str(nb).encode()) <= LARGEST:
                write_nb(nb, path)
                return
    raise ValueError(f'{path.name}: its source alone is larger than {LARGEST:,} bytes; split it')


def tutorial(path: Path) -> None:
    "Execute a tutorial and store what it shows."
    from execnb.shell import CaptureShell

    nb, shell, outputs = read_nb(path), CaptureShell(path), {}
    os.chdir(path.parent)
    for cell in nb.cells:
        flags = set(re.findall(r'^#\|\s*(\w+)', cell.source, re.M))
        if cell.cell_type != 'code' or flags & SKIPPED or '#| eval: false' in cell.source:
            continue
        shell.cell(cell)
        if shell.exc:
            sys.exit(f'{path.name}: {cell.source}\n\n{shell.prettytb(fname=path.name)}')
        outputs[cell.id] = clean_outputs(cell.get('outputs') or [])
    store(path, outputs)


def main() -> None:
    names = sys.argv[1:]
    files = [p for p in sorted(TUTORIALS.glob('*.ipynb')) if not names or p.stem in names]
    if unknown := set(names) - {p.stem for p in files}:
        sys.exit(f'{", ".join(sorted(unknown))}: no such tutorial in {TUTORIALS.relative_to(root)}')
    with tempfile.TemporaryDirectory() as folder:
        work = [Work(p.stem, tutorial, (p,), Path(folder) / f'{p.stem}.log') for p in files]
        done = in_copies(work, JOBS, TIMEOUT)
    for path in files:
        print(f'{path.stat().st_size:6,} bytes  {path.stem}')
    sys.exit('\n\n'.join(f'{o.name}: {o.failure}' for o in done if o.failure) or 0)


if __name__ == '__main__':
    main()
