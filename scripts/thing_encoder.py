"""The curve of an encoder of things: writes figures/things/encoder.csv and encoder.png.

    python scripts/thing_encoder.py LABEL=RUN/vit [LABEL=...]   add runs to the table
    python scripts/thing_encoder.py                             draw what is stored

A run of `vlmbench run base world=things` leaves the state of its encoder in its folder `vit`. The
scores are those of the training's own linear heads on held-out pictures; a target that the plan
gives no weight has none.
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import torch

place = Path(__file__).resolve().parent.parent / 'figures' / 'things'
stored = place / 'encoder.csv'
SCORES = dict(name='name', mark='mark', there='presence')  # score -> weight of its target


def read_run(label: str, path: str) -> pd.DataFrame:
    "What a run saw and how its heads did, scores in %."
    state = torch.load(Path(path) / 'state.pt', weights_only=True)
    log = pd.DataFrame(state['log'])
    out = log[['pictures', 'names']].copy()
    out.insert(0, 'run', label)
    out['minutes'] = log['seconds'] / 60
    out['cpu_minutes'] = log['cpu'] / 60
    for score, target in SCORES.items():
        for column in (f'{score}_seen', f'{score}_unseen'):
            out[column] = 100 * log[column] if state['plan'][target] else float('nan')
    return out.round(2)


def draw(table: pd.DataFrame, path: Path) -> None:
    "One panel for each score; a full line for seen styles, a broken one for the unseen style."
    titles = dict(name='Thing under its box', mark='Marked thing', there='A thing that is there')
    fig, axes = plt.subplots(
        1, 3, figsize=(10, 3.8), sharex=True, sharey=True, layout='constrained'
    )
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
        ax.set(title=title, xlabel='thousand pictures seen', xscale='log', ylim=(0, 100))
        ax.set_xticks(
            [0.5, 1, 2, 5, 10, 20, 50, 80], ['0.5', '1', '2', '5', '10', '20', '50', '80']
        )
        ax.xaxis.set_minor_formatter('')
    axes[0].axhline(85, color='grey', lw=0.8, ls=':')
    axes[0].set_ylabel('held-out pictures, %')
    handles, labels = axes[0].get_legend_handles_labels()
    fig.legend(handles, labels, fontsize=8, frameon=False, ncols=4, loc='outside lower center')
    fig.savefig(path, dpi=130)


table = pd.read_csv(stored) if stored.exists() else pd.DataFrame()
for given in sys.argv[1:]:
    label, _, path = given.partition('=')
    kept = table[table['run'] != label] if len(table) else table
    table = pd.concat([kept, read_run(label, path)])
place.mkdir(parents=True, exist_ok=True)
table.to_csv(stored, index=False)
draw(table, place / 'encoder.png')
