"""Picture sheet of marker styles, columns, on three things of two worlds, rows: writes
figures/markers/styles.png. The thin style has one setting changed at a time."""

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from vlmbench.data.marker_style import draws_look, marker_look
from vlmbench.data.scene import WorldConfig
from vlmbench.data.thing_scene import render_things
from vlmbench.data.thing_world import thing_samples
from vlmbench.data.things import ThingConfig
from vlmbench.data.world import render, scene_samples

SIDE, GAP, TOP, LEFT = 208, 8, 40, 116
THIN = dict(style='thin')
STYLES = [
    ('published', {}),
    ('published,\nkinds rectangle+ellipse', dict(kinds='rectangle+ellipse')),
    ('thin', THIN),
    ('thin, stroke 4', THIN | dict(stroke=4)),
    ('thin, gap 0', THIN | dict(gap=0)),
    ('thin, palette all', THIN | dict(palette='all')),
    ('thin, alpha 96', THIN | dict(alpha=96)),
    ('thin, kinds arrow', THIN | dict(kinds='arrow')),
]


def scene_row(world: str, index: int):
    "A region row of a world, with its picture."
    if world == 'things':
        scene, rows = thing_samples('region', 'test', index, ThingConfig(), one_question=True)
        picture = render_things(scene)
    else:
        scene, rows = scene_samples('region', 'test', index, WorldConfig(), one_question=True)
        picture = render(scene, WorldConfig())
    rows[0].images[:] = [picture]
    return rows[0]


ROWS = [('things', 0), ('things', 7), ('things', 11), ('world1', 4)]
font = ImageFont.load_default(14)
size = LEFT + len(STYLES) * (SIDE + GAP), TOP + len(ROWS) * (SIDE + GAP + 20)
sheet = Image.new('RGB', size, 'white')
d = ImageDraw.Draw(sheet)
for j, (name, _) in enumerate(STYLES):
    d.text((LEFT + j * (SIDE + GAP), 2), name, fill='black', font=font)
for i, (world, index) in enumerate(ROWS):
    row, y = scene_row(world, index), TOP + i * (SIDE + GAP + 20)
    d.text((4, y + SIDE // 2), f'{world}\n{row.images[0].size[0]} px', fill='black', font=font)
    for j, (_, change) in enumerate(STYLES):
        drawn = draws_look(marker_look(**change))(row)
        x = LEFT + j * (SIDE + GAP)
        sheet.paste(drawn.images[0].resize((SIDE, SIDE), Image.Resampling.LANCZOS), (x, y))
        said = drawn.turns[0].text.rpartition('thing ')[2].rpartition('object ')[2]
        d.text((x, y + SIDE + 2), said.removesuffix(' ?')[:34], fill=(170, 30, 30), font=font)
folder = Path(__file__).resolve().parent.parent / 'figures' / 'markers'
sheet.save(folder / 'styles.png', optimize=True)
