"""Redraw the stored results: for every `figures/<name>/runs/` (run folders with their manifests) write
`figures/<name>/report.html`, its pictures and `table.md`, the accuracies with intervals over seeds.

    python scripts/figures.py [NAME ...]
    python scripts/figures.py --store-claims RUN_FOLDER      a completed claims_* run -> figures/claims_*/

A stored claims run keeps its tables, pictures and reading, every answer's score (`scores.parquet`) and one line per
training with its whole manifest (`manifests.jsonl`); models and generations stay where they were made.
"""
import json
import shutil
import sys
from pathlib import Path

from vlmbench.evaluate.results import accuracy_table, load_results
from vlmbench.lab.report import write_report

root = Path(__file__).resolve().parent.parent/'figures'


def table(folders: list[Path]) -> str:
    "Accuracy in percent by task, method and condition (columns) and question type (rows), as Markdown."
    acc = accuracy_table(load_results(folders))
    out = []
    for task, part in acc.groupby('task', sort=False):
        limits = zip(part['score'], part['low'], part['high'])
        part = part.assign(column=part['method'].str.replace('_', ' ') + ' (' + part['condition'] + ')',
                           cell=[f'{100*s:.1f} [{100*lo:.1f}, {100*hi:.1f}]' for s, lo, hi in limits])
        wide = part.pivot_table(index='question_type', columns='column', values='cell', aggfunc='first', sort=False)
        wide = wide.fillna('')
        wide = wide.loc[[i for i in wide.index if i != 'all'] + ['all']]
        rows = [['question type', *wide.columns], ['---']*(1 + len(wide.columns)),
                *([i, *r] for i, r in zip(wide.index, wide.to_numpy()))]
        out += [f'**{task.replace("_", " ")}**, percent right with 95% interval', '',
                *('| ' + ' | '.join(r) + ' |' for r in rows), '']
    return '\n'.join(out)


def store_claims(run: Path) -> Path:
    "Copy a completed claims run to figures/<notebook>/ and return that folder."
    manifest = json.loads((run/'manifest.json').read_text(encoding='utf8'))
    if manifest['status'] != 'completed': sys.exit(f"{run} is {manifest['status']}: only completed runs are stored")
    name = manifest['notebook']
    if not name.startswith('claims_'): sys.exit(f'{run} is a run of {name}, not of a claims notebook')
    store = root/name
    shutil.rmtree(store, ignore_errors=True)
    store.mkdir(parents=True)
    for f in [*run.glob('*.csv'), *(run/'figures').glob('*.png')]: shutil.copyfile(f, store/f.name)
    said, folders = manifest['parameters'], [Path(f) for f in manifest['compared']]
    settings = ', '.join(f'{k} {said[k]}' for k in ('seeds', 'budget', 'scale') if k in said)
    head = f"# {name.replace('_', ' ').capitalize()}\n\n{len(folders)} trainings, {settings}.\n\n"
    (store/'README.md').write_text(head + (run/'reading.md').read_text(encoding='utf8'), encoding='utf8')
    frame = load_results(folders)
    frame = frame[frame['condition'] == 'image'][['method', 'seed', 'task', 'id', 'question_type', 'cluster', 'score']]
    words = {c: 'category' for c in ('method', 'task', 'id', 'question_type', 'cluster')}
    frame.astype({**words, 'score': 'float32', 'seed': 'int16'}).to_parquet(store/'scores.parquet', compression='zstd')
    with open(store/'manifests.jsonl', 'w', encoding='utf8') as f:
        for folder in [run, *folders]: f.write(json.dumps(json.loads((folder/'manifest.json').read_text())) + '\n')
    return store


def main(names: list[str]) -> int:
    if names[:1] == ['--store-claims']:
        for run in names[1:]: print(store_claims(Path(run)))
        return 0
    found = sorted(p for p in root.glob('*/runs') if not names or p.parent.name in names)
    if unknown := set(names) - {p.parent.name for p in found}:
        sys.exit(f'no stored runs for {sorted(unknown)} below {root}')
    if not found: sys.exit(f'{root} holds no stored runs: copy run folders to {root}/<name>/runs/')
    for store in found:
        folders = sorted({p.parent for p in store.rglob('manifest.json')})
        page = write_report(folders, store.parent)
        (store.parent/'table.md').write_text(table(folders), encoding='utf8')
        print(f'{page.relative_to(root.parent)}: {len(folders)} runs')
    return 0


if __name__ == '__main__': sys.exit(main(sys.argv[1:]))
