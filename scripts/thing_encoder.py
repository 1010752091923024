"""The curve of an encoder of things: writes figures/things/encoder.csv and encoder.png.

    python scripts/thing_encoder.py LABEL=RUN/vit/metrics.jsonl [LABEL=...]   add runs to the table
    python scripts/thing_encoder.py                                           draw what is stored

A run of `vlmbench run base world=things` leaves its metrics.jsonl in its folder `vit`. The scores
are those of the training's own linear heads on held-out pictures.
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

place = Path(__file__).resolve().parent.parent / 'figures' / 'things'
stored = place / 'encoder.csv'
SCORES = [f'{key}_{style}' for key in ('name', 'mark', 'there') for style in ('seen', 'unseen')]


def read_run(label: str, path: str) -> pd.DataFrame:
    "What a run saw and how its heads did, scores in %."
    log = pd.read_json(path, lines=True)
    out = log[['pictures', 'names']].copy()
    out.insert(0, 'run', label)
    out['minutes'] = (log['seconds'] / 60).round(2)
    out['cpu_minutes'] = (log['cpu'] / 60).round(2)
    for score in SCORES:
        out[score] = (100 * log[score]).round(1)
    return out


def draw(table: pd.DataFrame, path: Path) -> None:
    "One panel for each score; a full line for seen styles, a broken one for the unseen style."
    titles = dict(name='Thing under its box', mark='Marked thing', there='A thing that is there')
    fig, axes = plt.subplots(1, 3, figsize=(10, 3.2), sharey=True)
    for ax, (key, title) in zip(axes, titles.items()):
        for number, (label, rows) in enumerate(table.groupby('run', sort=False)):
            for style, line in (('seen', '-'), ('unseen', '--')):
                ax.plot(
                    rows['pictures'] / 1000,
                    rows[f'{key}_{style}'],
                    line,
                    color=f'C{number}',
                    marker='.',
                    label=label if style == 'seen' else None,
                )
        ax.set(title=title, xlabel='thousand pictures seen', ylim=(0, 100))
    axes[0].axhline(85, color='grey', lw=0.8, ls=':')
    axes[0].set_ylabel('held-out pictures, %')
    axes[1].legend(fontsize=8, frameon=False)
    fig.tight_layout()
    fig.savefig(path, dpi=130)


table = pd.read_csv(stored) if stored.exists() else pd.DataFrame()
for given in sys.argv[1:]:
    label, _, path = given.partition('=')
    kept = table[table['run'] != label] if len(table) else table
    table = pd.concat([kept, read_run(label, path)])
place.mkdir(parents=True, exist_ok=True)
table.to_csv(stored, index=False)
draw(table, place / 'encoder.png')
