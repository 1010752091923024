"""What the control learns of things: figures/things/control.csv, control.png and manifests.jsonl.

    python scripts/thing_control.py LABEL=RUN [LABEL=...]   add runs of `scale=things`
    python scripts/thing_control.py                         draw what is stored

Scores are those of `vqa_test` by question type, with the blind answers and the best fixed answer
of a run that has asked them. Folders in the manifests are shortened to their last part.
"""

import json
import re
import sys
from pathlib import Path

import pandas as pd

place = Path(__file__).resolve().parent.parent / 'figures' / 'things'
stored, manifests = place / 'control.csv', place / 'manifests.jsonl'
FLOORS = dict(blind='without the picture', majority='best fixed answer')


def scores(run: Path, label: str) -> list[dict]:
    "Rows of one run: right answers in %, with their interval."
    rows = []
    for condition in ('', *FLOORS):
        path = run / 'results' / f'vqa_test{"@" if condition else ""}{condition}.json'
        if not path.exists():
            continue
        for row in json.loads(path.read_text(encoding='utf8'))['by_type']:
            if condition == 'majority' and row['question_type'] == 'all':
                continue
            numbers = {key: round(100 * row[key], 1) for key in ('score', 'low', 'high')}
            rows.append(
                dict(run=label, condition=condition or 'picture', question=row['question_type'])
                | dict(questions=row['n'], **numbers)
            )
    return rows


def shortened(value):
    "A manifest's value without the folders of the machine it was made on."
    if isinstance(value, dict):
        return {key: shortened(one) for key, one in value.items()}
    if isinstance(value, list):
        return [shortened(one) for one in value]
    return re.sub(r'(?<![\w.])/[\w./-]*/(?=[^/]+$)', '', value) if isinstance(value, str) else value


def draw(table: pd.DataFrame, path: Path) -> None:
    "A group of bars for each question type, the floors as lines across it."
    seen = table[table['condition'] == 'picture'].pivot(
        index='question', columns='run', values='score'
    )
    seen = seen[table['run'].unique()].sort_values(table['run'].iloc[0], ascending=False)
    seen = pd.concat([seen.drop(index='all'), seen.loc[['all']]])
    ax = seen.plot.bar(figsize=(10, 4), width=0.8, rot=0, xlabel='', ylabel='right, %')
    for (condition, label), line in zip(FLOORS.items(), ('-', ':')):
        floor = table[table['condition'] == condition].drop_duplicates('question')
        floor = floor.set_index('question')['score'].reindex(seen.index)
        for number, value in enumerate(floor):
            ax.hlines(
                value,
                number - 0.45,
                number + 0.45,
                color='black',
                lw=1,
                ls=line,
                label=None if number else label,
            )
    ax.set_ylim(0, 100)
    ax.spines[['top', 'right']].set_visible(False)
    ax.legend(fontsize=8, frameon=False, ncols=2)
    ax.figure.tight_layout()
    ax.figure.savefig(path, dpi=130)


table = pd.read_csv(stored) if stored.exists() else pd.DataFrame()
kept = manifests.read_text(encoding='utf8').splitlines() if manifests.exists() else []
for given in sys.argv[1:]:
    label, _, where = given.partition('=')
    run = Path(where).resolve()
    table = table[table['run'] != label] if len(table) else table
    table = pd.concat([table, pd.DataFrame(scores(run, label))])
    manifest = json.loads((run / 'manifest.json').read_text(encoding='utf8'))
    kept = [line for line in kept if json.loads(line)['label'] != label]
    kept.append(json.dumps(dict(label=label) | shortened(manifest)))
place.mkdir(parents=True, exist_ok=True)
table.to_csv(stored, index=False)
manifests.write_text('\n'.join(kept) + '\n', encoding='utf8')
draw(table, place / 'control.png')
