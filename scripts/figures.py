"""Redraw the stored results: for every `figures/<name>/runs/` (run folders with their manifests)
write `figures/<name>/report.html`, its pictures and `table.md`, the accuracies with intervals over
seeds.

    python scripts/figures.py [NAME ...]
    python scripts/figures.py --store-claims RUN_FOLDER      a completed claims_* run ->
    figures/claims_*/
    python scripts/figures.py --store-bench FOLDER           a completed bench -> figures/bench/
    python scripts/figures.py --store-speed RUN_FOLDER       a completed speed run -> figures/speed/
    python scripts/figures.py --cost                         published costs beside the planner's ->
    figures/cost/
    python scripts/figures.py --ranks                        one, two and four CPU ranks ->
    figures/scale/
    python scripts/figures.py --peers                        beside Trainer and TRL ->
    figures/peers/
    python scripts/figures.py --readers                      memory of the record readers ->
    figures/readers/
    python scripts/figures.py --methods                      stored claims -> figures/methods/,
    all methods side by side

A stored claims run keeps its tables, pictures and reading, every answer's score (`scores.parquet`)
and one line per training with its whole manifest (`manifests.jsonl`); models and generations stay
where they were made.
"""

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from vlmbench.cost.planner import cost_figure
from vlmbench.cost.published import answer_table, savings_table, training_plans, training_table
from vlmbench.data.sources import prepare_data
from vlmbench.evaluate.results import accuracy_table, load_results, paired_table
from vlmbench.lab.plots import PALETTE, forest_figure, save_png
from vlmbench.lab.report import write_report
from vlmbench.speed.peers import peers_figure, peers_table
from vlmbench.speed.ranks import ranks_table
from vlmbench.speed.readers import reader_table

root = Path(__file__).resolve().parent.parent / 'figures'

# what is set side by side: name, claims run, arm; the first is the control
METHODS = [
    ('LLaVA, the control', 'claims_encoder_free', 'llava'),
    ('ViP-LLaVA', 'claims_markers', 'vip_llava'),
    ('EVE', 'claims_encoder_free', 'eve'),
    ('VoRA', 'claims_encoder_free', 'vora'),
    ('zero, grafted', 'claims_depth', 'graft'),
    ('zero, grafted and tuned', 'claims_depth', 'tuned'),
    ('visual region, a quarter', 'claims_depth', 'uniform'),
    ('LoRA in every layer', 'claims_depth', 'region_all'),
]


def table(folders: list[Path]) -> str:
    """Accuracy in percent by task, method and condition (columns) and question type (rows), as
    Markdown."""
    acc = accuracy_table(load_results(folders))
    out = []
    for task, part in acc.groupby('task', sort=False):
        limits = zip(part['score'], part['low'], part['high'])
        part = part.assign(
            column=part['method'].str.replace('_', ' ') + ' (' + part['condition'] + ')',
            cell=[f'{100 * s:.1f} [{100 * lo:.1f}, {100 * hi:.1f}]' for s, lo, hi in limits],
        )
        wide = part.pivot_table(
            index='question_type', columns='column', values='cell', aggfunc='first', sort=False
        )
        wide = wide.fillna('')
        wide = wide.loc[[i for i in wide.index if i != 'all'] + ['all']]
        out += [
            f'**{task.replace("_", " ")}**, percent right with 95% interval',
            '',
            markdown(wide.rename_axis('question type').reset_index()),
            '',
        ]
    return '\n'.join(out)


def manifest_of(folder: Path) -> dict:
    "The manifest of a run."
    return json.loads((folder / 'manifest.json').read_text(encoding='utf8'))


def completed(run: Path) -> dict:
    manifest = manifest_of(run)
    if manifest['status'] != 'completed':
        sys.exit(f'{run} is {manifest["status"]}: only completed runs are stored')
    return manifest


def store_claims(run: Path) -> Path:
    "Copy a completed claims run to figures/<notebook>/ and return that folder."
    manifest = completed(run)
    name = manifest['notebook']
    if not name.startswith('claims_'):
        sys.exit(f'{run} is a run of {name}, not of a claims notebook')
    store = root / name
    shutil.rmtree(store, ignore_errors=True)
    store.mkdir(parents=True)
    for f in [*run.glob('*.csv'), *(run / 'figures').glob('*.png')]:
        shutil.copyfile(f, store / f.name)
    said, folders = manifest['parameters'], [Path(f) for f in manifest['compared']]
    settings = ', '.join(f'{k} {said[k]}' for k in ('seeds', 'budget', 'scale') if k in said)
    title = json.loads((run / f'{name}.ipynb').read_text(encoding='utf8'))['cells'][0]['source']
    title = ''.join(title).splitlines()[0]
    pruned = sum('pruned_from' in manifest_of(f) for f in folders)
    counts = f'{len(folders) - pruned} trainings' + (
        f' and {pruned} pruned models' if pruned else ''
    )
    head = f'{title}\n\n{counts}, {settings}.\n\n'
    (store / 'README.md').write_text(
        head + (run / 'reading.md').read_text(encoding='utf8'), encoding='utf8'
    )
    keep(store, folders, [run])
    return store


def keep(store: Path, folders: list[Path], first: list[Path] = ()) -> None:
    """The score of every answer (`scores.parquet`) and a line per manifest (`manifests.jsonl`),
    those of `first` ahead."""
    frame = load_results(folders)
    words = dict.fromkeys(
        ('method', 'task', 'id', 'question_type', 'cluster', 'condition', 'prompt_hash'), 'category'
    )
    frame = frame[frame['condition'] == 'image'][[*words, 'seed', 'score']]
    frame.astype(words | dict(score='float32', seed='int16')).to_parquet(
        store / 'scores.parquet', compression='zstd'
    )
    here = f'{Path.cwd()}/'  # what is stored names no folder of a machine
    with open(store / 'manifests.jsonl', 'w', encoding='utf8') as f:
        f.writelines(
            json.dumps(manifest_of(folder)).replace(here, '') + '\n'
            for folder in [*first, *folders]
        )


def store_bench(bench: Path) -> Path:
    """Copy the report of a bench, its pictures, scores and manifests to figures/bench/ and return
    that folder."""
    folders = sorted(p.parent for p in bench.glob('*-s*/manifest.json'))
    left = [f.name for f in folders if manifest_of(f)['status'] != 'completed']
    if left or not folders:
        sys.exit(f'{bench}: runs that are not completed: {", ".join(left) or "all"}')
    store = root / 'bench'
    shutil.rmtree(store / 'figures', ignore_errors=True)
    (store / 'figures').mkdir(parents=True)
    shutil.copyfile(bench / 'report.html', store / 'report.html')
    for f in (bench / 'figures').glob('*.png'):
        shutil.copyfile(f, store / 'figures' / f.name)
    keep(store, folders)
    side_by_side(pd.read_parquet(store / 'scores.parquet'), 'llava', store)
    return store


def markdown(frame: pd.DataFrame) -> str:
    "The columns of a frame as a Markdown table, without a newline at its end."
    cells = frame.astype(object).where(frame.notna(), '').itertuples(index=False)
    rows = [frame.columns, ['---'] * frame.shape[1], *cells]
    return '\n'.join(f'| {" | ".join(map(str, r))} |' for r in rows)


def store_speed(run: Path) -> Path:
    """Copy tables and pictures of a speed run to figures/speed/, write them out in a README, and
    return that folder."""
    manifest, store = completed(run), root / 'speed'
    if manifest['parameters']['measures'] != []:
        sys.exit(f'{run} left measures out: only whole runs are stored')
    for name in (
        'speed.csv',
        'speed.json',
        'speed.png',
        'overlay.csv',
        'inference.csv',
        'inference.png',
    ):
        shutil.copyfile(run / name, store / name)
    host, asked, version = manifest['host'], manifest['parameters'], manifest['versions']['torch']
    table = pd.read_csv(store / 'speed.csv').round(3)
    missed = ', '.join(f'`{n}`' for n in table['name'][table['met'].eq(False)])
    where = ', '.join(host['gpus']) or f'{host["usable_cpus"]} CPU cores'
    (store / 'README.md').write_text(
        f"""# Speed

`make speed`, {asked['rounds']} rounds, {where}, {manifest['seconds'] / 60:.0f} minutes,
torch {version}.
Ratios are medians over rounds of two alternatives timed in turns; `planned` is the same ratio in
FLOPs where time is judged, `timed` the same in time where it is not; memory is the peak above the
start of a step, in MB (`streams_memory`: of the whole process).

{markdown(table[['name', 'measure', 'ratio', 'bar', 'met', 'planned', 'timed']])}

Not met: {missed or 'none'} (why: the lab log).

Both alternatives by themselves, on this machine:

{markdown(table[['name', 'ours', 'baseline', 'ours_mb', 'baseline_mb']])}

## Markers

Rows per second, a picture of 640 x 480 px loaded and marked.

{markdown(pd.read_csv(store / 'overlay.csv'))}

## What an answer costs

One picture and 64 text tokens up to the first token; random weights. `published / 8`: the papers'
pictures, widths divided by eight, depths by four.

{markdown(pd.read_csv(store / 'inference.csv').round(3))}
""",
        encoding='utf8',
    )
    return store


def store_cost() -> Path:
    "Published costs beside the planner's: table.md and cost.png in figures/cost/."
    store, plans = root / 'cost', training_plans()
    tables = [training_table(plans), savings_table(plans), answer_table()]
    save_png(cost_figure(plans), store / 'cost.png', dpi=100)
    (store / 'table.md').write_text('\n\n'.join(map(markdown, tables)) + '\n', encoding='utf8')
    return store


def ranks_figure(table: pd.DataFrame) -> Figure:
    "Seconds a step and MB of states on a rank, one bar a layout."
    names = [f'{row.parallel}, {row.ranks}' for row in table.itertuples()]
    figure, axes = plt.subplots(1, 2, figsize=(7.2, 2.4), layout='constrained', sharey=True)
    for axis, column, label in zip(
        axes, ('seconds', 'states_mb'), ('seconds a step', 'MB of states on a rank')
    ):
        bars = axis.barh(names, table[column], color=PALETTE[0])
        axis.bar_label(bars, fmt='%.2f', padding=3)
        axis.set_xlabel(label)
        axis.margins(x=0.2)
        axis.spines[['top', 'right']].set_visible(False)
    axes[0].invert_yaxis()
    return figure


def store_ranks() -> Path:
    "Train on one, two and four CPU ranks and write figures/scale/."
    place = root / 'scale'
    with tempfile.TemporaryDirectory() as folder:
        table = ranks_table(prepare_data(''), folder)
    save_png(ranks_figure(table), place / 'ranks.png')
    table.to_csv(place / 'ranks.csv', index=False)
    rounded = table.assign(loss_difference=table['loss_difference'].map('{:.1e}'.format)).round(3)
    (place / 'README.md').write_text(
        f"""# Several ranks

`python scripts/figures.py --ranks`: six steps of the control's instruction stage at scale `tiny`,
four micro-batches of six rows a step, on gloo ranks of one machine with {os.cpu_count()} cores.
`states_mb`: trained weights in fp32 with AdamW's two moments, as rank 0 holds them; `share`: of one
process; `peak_mb`: of rank 0's whole process; `loss_difference`: largest relative difference of a
step's loss from one process. Ranks that share cores are slower than one process: the times say what
the collectives cost here, not what a cluster gains.

{markdown(rounded)}

![seconds and states](ranks.png)
""",
        encoding='utf8',
    )
    return place


def store_peers(table: pd.DataFrame | None = None) -> Path:
    "Train beside transformers' Trainer and TRL (or take what was measured), write figures/peers/."
    place = root / 'peers'
    table = peers_table() if table is None else table
    save_png(peers_figure(table), place / 'peers.png')
    table.to_csv(place / 'peers.csv', index=False)
    (place / 'README.md').write_text(
        f"""# Beside other trainers

`python scripts/figures.py --peers`: a LLaVA of width 256 with four layers, its weights and its
encoded rows trained by our loop, by transformers' Trainer (`grouped`: with batches of similar
lengths) and by TRL's SFTTrainer, each in a process of its own on one CPU thread, in fp32, without
recomputation. Padded batches hold 16 rows; packed ones hold no more positions. Rows are `short`
(questions about a picture), `long` (text of 20 to 400 tokens with a tail) or short with a
`vocabulary` of 32,000. `ratio`: our target tokens a CPU second over theirs; `fill`: share of
positions that held a token; `peak_mb`: above what the process held before training.

{markdown(table.drop(columns=['round', 'targets_per_s']).round(2))}

![target tokens a CPU second, and peak memory](peers.png)

Wall times are in `peers.csv`; on a machine that is shared with other work they say less.
""",
        encoding='utf8',
    )
    return place


def store_readers() -> Path:
    "Measure the record readers on files of two sizes and write figures/readers/README.md."
    few, many = 10_000, 200_000
    table = pd.concat([reader_table(n) for n in (few, many)])
    peak = table.set_index(['reader', 'rows'])['peak_mb']
    growth = {r: peak[r, many] / peak[r, few] for r in dict.fromkeys(table['reader'])}
    grown = ', '.join(f'`{reader}` {times:.1f}' for reader, times in growth.items())
    (root / 'readers' / 'README.md').write_text(
        f"""# Readers: memory does not grow with the file

`python scripts/figures.py --readers`: LLaVA-like files of {few:,} and {many:,} rows, each read in a
process of its own. Peak memory (MB of 2^20 bytes) is above the level before the file is opened.
`Records` gives any row by its number and keeps 24 bytes a row.

{markdown(table.round(1))}

Peak memory of the larger file over that of the smaller: {grown}.
""",
        encoding='utf8',
    )
    return root / 'readers'


def side_by_side(frame: pd.DataFrame, control: str, store: Path) -> None:
    """The methods of `frame` on pictures and on text, each beside `control`: methods.csv, table.md
    and methods.png in `store`. Holm's p within a task. Stops when a method shares no seed or
    question with the control."""
    frame = frame[frame['task'].isin(['vqa_test', 'text_test'])].astype(
        dict.fromkeys(('method', 'task'), str)
    )
    scores = accuracy_table(frame).query("question_type == 'all'")
    pairs = [paired_table(part, baseline=control) for _, part in frame.groupby('task', sort=False)]
    if left := [line for p in pairs for line in p.attrs['left_out']]:
        sys.exit('\n'.join(left))
    gaps = pd.concat(pairs).rename(columns=dict(a='method', low='gap_low', high='gap_high'))
    seeds = (
        frame.groupby(['method', 'task', 'seed'])['score']
        .mean()
        .groupby(['method', 'task'])
        .agg(lambda v: ' '.join(f'{100 * x:.1f}' for x in v))
        .rename('by_seed')
        .reset_index()
    )
    t = (
        scores[['method', 'task', 'score', 'low', 'high']]
        .merge(seeds, 'left')
        .merge(gaps[['method', 'task', 'difference', 'gap_low', 'gap_high', 'p', 'p_holm']], 'left')
    )
    t.to_csv(store / 'methods.csv', index=False)
    word = lambda r: f'{100 * r.score:.1f} [{100 * r.low:.1f}, {100 * r.high:.1f}]'
    gap = lambda r: (
        ''
        if r.method == control
        else (f'{100 * r.difference:+.1f} [{100 * r.gap_low:+.1f}, {100 * r.gap_high:+.1f}]')
    )
    on = {task: part.set_index('method', drop=False) for task, part in t.groupby('task')}
    beside = 'to the control, points'
    rows = []
    order = on['vqa_test'].sort_values('score', ascending=False, kind='stable')
    for v in pd.concat([order.loc[[control]], order.drop(control)]).itertuples():
        x = on['text_test'].loc[v.method]
        p = '' if v.method == control else f'{v.p_holm:.2g}'
        rows.append([v.method.replace('_', ' '), word(v), v.by_seed, gap(v), p, word(x), gap(x)])
    columns = ['method', 'pictures, %', 'seeds', beside, 'p (Holm)', 'text, %', beside]
    (store / 'table.md').write_text(
        markdown(pd.DataFrame(rows, columns=columns)) + '\n', encoding='utf8'
    )
    rest, at = order.drop(control), 100 * order.loc[control, 'score']
    save_png(
        forest_figure(
            [f'{r.method.replace("_", " ")}, {100 * r.score:.1f}%' for r in rest.itertuples()],
            rest['difference'],
            rest['gap_low'],
            rest['gap_high'],
            PALETTE[1 : 1 + len(rest)],
            label=f'distance to the control ({at:.1f}%), points (95% over seeds and questions)',
        ),
        store / 'methods.png',
    )


def methods() -> Path:
    """All methods beside the control, from the stored claims, in figures/methods/. Stops when their
    settings differ."""
    heads = {
        n: json.loads((root / n / 'manifests.jsonl').open(encoding='utf8').readline())['parameters']
        for n in dict.fromkeys(n for _, n, _ in METHODS)
    }
    if len({(h['seeds'], h['budget'], h['scale']) for h in heads.values()}) > 1:
        sys.exit(f'the stored claims cannot be compared, their settings differ: {heads}')
    store = root / 'methods'
    store.mkdir(exist_ok=True)
    scores = {n: pd.read_parquet(root / n / 'scores.parquet') for n in heads}
    side_by_side(
        pd.concat(
            [scores[n][scores[n]['method'] == arm].assign(method=name) for name, n, arm in METHODS]
        ),
        METHODS[0][0],
        store,
    )
    return store


def main(names: list[str]) -> int:
    drawn = {
        '--methods': methods,
        '--cost': store_cost,
        '--peers': store_peers,
        '--readers': store_readers,
        '--ranks': store_ranks,
    }
    if len(names) == 1 and names[0] in drawn:
        print(drawn[names[0]]())
        return 0
    stores = {
        '--store-bench': store_bench,
        '--store-speed': store_speed,
        '--store-claims': store_claims,
    }
    if names and names[0] in stores:
        for folder in names[1:]:
            print(stores[names[0]](Path(folder)))
        return 0
    found = sorted(p for p in root.glob('*/runs') if not names or p.parent.name in names)
    if unknown := set(names) - {p.parent.name for p in found}:
        sys.exit(f'no stored runs for {sorted(unknown)} below {root}')
    if not found:
        sys.exit(f'{root} holds no stored runs: copy run folders to {root}/<name>/runs/')
    for store in found:
        folders = sorted({p.parent for p in store.rglob('manifest.json')})
        page = write_report(folders, store.parent)
        (store.parent / 'table.md').write_text(table(folders), encoding='utf8')
        print(f'{page.relative_to(root.parent)}: {len(folders)} runs')
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
