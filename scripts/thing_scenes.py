"""Picture sheet of the world of things, with captions, questions and thin markers: writes
figures/things/scenes.png. Rows are easy, default, hard and the held-out style."""

import random
import textwrap
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vlmbench.data.marker_style import mark_region
from vlmbench.data.thing_scene import render_things
from vlmbench.data.thing_world import caption, thing_samples
from vlmbench.data.things import ThingConfig

ACROSS, SIDE, TEXT, GAP = 6, 192, 92, 8
ROWS = [('easy', 'test'), ('default', 'test'), ('default', 'test'), ('hard', 'test')]
ROWS += [('default', 'unseen')]
font = ImageFont.load_default(10)
sheet = Image.new('RGB', (ACROSS * (SIDE + GAP), len(ROWS) * (SIDE + TEXT + GAP)), 'white')
d = ImageDraw.Draw(sheet)
for i, (level, split) in enumerate(ROWS):
    config = ThingConfig.at(level, odd_share=0.0, seed=3 + i)
    for j in range(ACROSS):
        kind = 'region' if j % 3 == 2 else 'vqa'
        scene, rows = thing_samples(kind, split, j, config, one_question=True)
        picture, row = render_things(scene), rows[j % len(rows)]
        question = row.turns[0].text.removeprefix('<image>\n')
        if row.regions:
            picture, words = mark_region(picture, row.regions[0], 'thin', random.Random(j))
            question = question.replace('<region>', words)
        x, y = j * (SIDE + GAP), i * (SIDE + TEXT + GAP)
        sheet.paste(picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS), (x, y))
        asked = textwrap.fill(f'{question} -> {row.turns[1].text}', 40)
        d.text((x, y + SIDE + 2), asked, fill=(170, 30, 30), font=font)
        below = y + SIDE + 4 + 12 * len(asked.splitlines())
        said = textwrap.wrap(caption(scene, np.random.default_rng(j)), 42)
        d.text((x, below), '\n'.join(said[:5]), fill='black', font=font)
folder = Path(__file__).resolve().parent.parent / 'figures' / 'things'
folder.mkdir(exist_ok=True)
sheet.save(folder / 'scenes.png', optimize=True)
