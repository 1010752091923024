"""Draw the sheet of things: fetches six open emoji families from npm, renders 120 nouns of each at
48 px, cuts four free textures as grounds, and writes `vlmbench/assets/things/`.

    pip install resvg-py scikit-image      needed here only, not by the product
    python scripts/thing_sheet.py          writes sheet.webp, grounds.webp, sheet.json and NOTICE
    python scripts/thing_sheet.py --check  draws again and compares with what is stored

`names.json` in that folder is kept by hand: nouns, groups, the name of each icon, and each family's
package, version, checksum, author and licence.
"""

import base64
import hashlib
import io
import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import resvg_py
from PIL import Image
from skimage import data

root = Path(__file__).resolve().parent.parent
folder = root / 'vlmbench' / 'assets' / 'things'
CELL = 48  # side of a drawing, px
COLUMNS = 36  # drawings in a row of the sheet
GROUND = 160  # side of a ground, px
TRIAL = 192  # side of the first rendering, which only finds where the ink is, px
MIT = """Permission is hereby granted, free of charge, to any person obtaining a copy of this
software and associated documentation files (the "Software"), to deal in the Software without
restriction, including without limitation the rights to use, copy, modify, merge, publish,
distribute, sublicense, and/or sell copies of the Software, and to permit persons to whom the
Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or
substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING
BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND
NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM,
DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM,
OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE."""


def fetch(family: str, facts: dict, into: Path) -> dict:
    "The icons of a family, from its npm package; ends the program if the package is another one."
    package = f'@iconify-json/{family}@{facts["version"]}'
    done = subprocess.run(
        ['npm', 'pack', package, '--json'], cwd=into, check=True, capture_output=True, text=True
    )
    path = into / json.loads(done.stdout)[0]['filename'].replace('@', '').replace('/', '-')
    digest = base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
    if f'sha512-{digest}' != facts['integrity']:
        raise SystemExit(f'{package} is not the package that names.json has the checksum of')
    with tarfile.open(path) as tar:
        return json.load(tar.extractfile('package/icons.json'))


def body_of(icons: dict, name: str) -> dict:
    "An icon of a family by its name or by another name of the same icon."
    if name in icons['icons']:
        return icons['icons'][name]
    return icons['icons'][icons['aliases'][name]['parent']]


def rendered(body: str, view: tuple, side: int) -> Image.Image:
    "The square `view` (left, top, side) of a drawing, as RGBA of `side` px."
    left, top, extent = view
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {extent} {extent}" width="{side}" height="{side}">{body}</svg>'
    )
    png = resvg_py.svg_to_bytes(svg_string=svg, width=side, height=side)
    return Image.open(io.BytesIO(bytes(png))).convert('RGBA')


def drawing(icons: dict, name: str) -> Image.Image:
    "An icon that touches its cell on the longer side and is centred on the shorter one."
    icon = body_of(icons, name)
    side = max(icon.get('width', icons['width']), icon.get('height', icons['height']))
    trial = rendered(icon['body'], (0, 0, side), TRIAL)
    left, top, right, bottom = trial.getchannel('A').point(lambda a: 255 * (a > 8)).getbbox()
    scale = side / TRIAL
    extent = max(right - left, bottom - top) * scale
    view = (
        (left + right) / 2 * scale - extent / 2,
        (top + bottom) / 2 * scale - extent / 2,
        extent,
    )
    drawn = np.array(rendered(icon['body'], view, CELL))
    drawn[drawn[..., 3] == 0] = 0  # nothing under what is transparent: the file packs better
    return Image.fromarray(drawn)


def draw_sheet(names: dict) -> Image.Image:
    "All drawings: noun after noun, the families of a noun side by side."
    count = len(names['things']) * len(names['families'])
    sheet = Image.new('RGBA', (COLUMNS * CELL, -(-count // COLUMNS) * CELL))
    with tempfile.TemporaryDirectory() as tmp:
        icons = {f: fetch(f, facts, Path(tmp)) for f, facts in names['families'].items()}
    place = 0
    for thing in names['things'].values():
        for family in names['families']:
            drawn = drawing(icons[family], thing['icons'][family])
            sheet.paste(drawn, (place % COLUMNS * CELL, place // COLUMNS * CELL))
            place += 1
    return sheet


def draw_grounds(names: dict) -> Image.Image:
    "Four grey squares side by side, each with the same mean and spread."
    textures = dict(
        brick=data.brick(),
        grass=data.grass(),
        gravel=data.gravel(),
        hubble=data.hubble_deep_field().mean(2),
    )
    strip = Image.new('L', (GROUND * len(names['grounds']), GROUND))
    for number, name in enumerate(names['grounds']):
        square = Image.fromarray(textures[name][:480, :480].astype(np.uint8))
        grey = np.asarray(square.resize((GROUND, GROUND), Image.Resampling.LANCZOS), float)
        even = np.clip(128 + 32 * (grey - grey.mean()) / grey.std(), 0, 252)
        # steps of four: what nobody sees in a ground would be half of its bytes
        strip.paste(Image.fromarray((even / 4).round().astype(np.uint8) * 4), (number * GROUND, 0))
    return strip


def notice(names: dict) -> str:
    "Authors, licences, addresses and what was changed."
    parts = [
        'The drawings of things in sheet.webp are the work of others. Each was changed: rendered '
        f'at {CELL} px\nand cut to its ink; the scenes also turn, flip, scale and tint them. '
        'Nobody named here endorses\nthis package.\n'
    ]
    for family, facts in names['families'].items():
        parts.append(
            f'{facts["title"]} (npm @iconify-json/{family} {facts["version"]})\n'
            f'  Author:  {facts["author"]}, {facts["address"]}\n'
            f'  Licence: {facts["licence"]}, {facts["licence_address"]}\n'
            '  Changed: yes, as said above\n'
        )
    parts.append(
        'The grounds in grounds.webp are cut from pictures of scikit-image '
        '(https://scikit-image.org), made\nsmaller, grey and even. As that project states: brick '
        'is CC0-1.0\n(https://cc0textures.com/view.php?tex=Bricks25), gravel is CC0-1.0\n'
        '(https://cc0textures.com/view.php?tex=Gravel04), grass is CC0-1.0\n'
        '(https://www.deviantart.com/linolafett/art/Grass-01-434853879), the Hubble eXtreme Deep '
        'Field\nis in the public domain (NASA, HubbleSite).\n'
    )
    parts.append(f'The MIT licence\n\nCopyright (c) Microsoft Corporation.\n\n{MIT}\n')
    parts.append(
        'The text of Apache-2.0 is in LICENSE-Apache-2.0.txt beside this file; CC-BY-4.0 is at\n'
        'https://creativecommons.org/licenses/by/4.0/legalcode.\n'
    )
    return '\n'.join(parts)


def main(check: bool) -> None:
    names = json.loads((folder / 'names.json').read_text(encoding='utf8'))
    pictures = {'sheet.webp': draw_sheet(names), 'grounds.webp': draw_grounds(names)}
    if check:
        for file, drawn in pictures.items():
            stored = Image.open(folder / file).convert(drawn.mode)
            if stored.size != drawn.size or stored.tobytes() != drawn.tobytes():
                raise SystemExit(f'{folder / file} is not what this script draws; draw it again')
        print('as stored')
        return
    for file, drawn in pictures.items():
        drawn.save(folder / file, lossless=True, quality=100, method=6)
    facts = dict(cell=CELL, columns=COLUMNS, ground=GROUND)
    for file in (*pictures, 'names.json'):
        facts[file] = hashlib.sha256((folder / file).read_bytes()).hexdigest()
    (folder / 'sheet.json').write_text(json.dumps(facts, indent=1) + '\n', encoding='utf8')
    (folder / 'NOTICE').write_text(notice(names), encoding='utf8')
    apache = (root / 'LICENSE').read_text(encoding='utf8')
    (folder / 'LICENSE-Apache-2.0.txt').write_text(apache, encoding='utf8')
    for file in sorted(folder.iterdir()):
        print(file.name, file.stat().st_size)


if __name__ == '__main__':
    main('--check' in sys.argv[1:])
