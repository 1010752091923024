"""Picture sheet of all marker kinds (columns) in five styles (rows): writes
figures/markers/markers.png."""

import random
from pathlib import Path

from PIL import Image, ImageDraw

from vlmbench.data.overlay import MARKERS, PALETTE, draw_marker, sample_alpha, sample_marker
from vlmbench.data.region import Region

SIDE = 168
ROWS = [
    ('alpha 128, width 3', dict(alpha=128, width=3)),
    ('constant', dict(alpha=128, style='constant')),
    ('random', {}),
    ('random', {}),
    ('opaque', dict(alpha=255)),
]
base = Image.new('RGB', (SIDE, SIDE))
for y in range(SIDE):
    ImageDraw.Draw(base).line([(0, y), (SIDE, y)], fill=(70 + y // 3, 95 + y // 4, 120))
corners = [(45, 90), (70, 45), (115, 50), (130, 95), (95, 125)]
ImageDraw.Draw(base).polygon(corners, fill=(205, 200, 185))
region = Region((45.0, 45.0, 130.0, 125.0), (tuple(float(v) for xy in corners for v in xy),))
sheet = Image.new('RGB', (110 + len(MARKERS) * (SIDE + 6), 20 + len(ROWS) * (SIDE + 6)), 'white')
d, names = ImageDraw.Draw(sheet), list(PALETTE)
for j, kind in enumerate(MARKERS):
    d.text((116 + j * (SIDE + 6), 4), kind, fill='black')
    for i, (label, s) in enumerate(ROWS):
        rng = random.Random(10 * i + j)
        d.text((4, 90 + i * (SIDE + 6)), label, fill='black')
        m = sample_marker(
            rng, kind, region, base.size, s.get('width'), s.get('style', ''), anchor=SIDE
        )
        img = draw_marker(
            base, m, names[(3 * i + j) % 9], s.get('alpha') or sample_alpha(rng, kind)
        )
        sheet.paste(img, (110 + j * (SIDE + 6), 20 + i * (SIDE + 6)))
sheet.save(Path(__file__).resolve().parent.parent / 'figures' / 'markers' / 'markers.png')
