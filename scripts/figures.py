"""Redraw the stored results: for every `figures/<name>/runs/` (run folders with their manifests) write
`figures/<name>/report.html`, its pictures and `table.md`, the accuracies with intervals over seeds.

    python scripts/figures.py [NAME ...]
"""
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


def main(names: list[str]) -> int:
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
