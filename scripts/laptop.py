"""Every method on pretrained weights, two steps a stage, through the commands: seconds a step and
peak memory, measured beside planned -> figures/laptop/steps.csv

    export VLMBENCH_HOME=~/vlmbench; vlmbench weights laptop
    python scripts/laptop.py RUNS_FOLDER [METHOD ...]

Each run trains all stages at their own rows a step, asks four questions, and writes its model; rows
of methods that are not named stay as they are stored. PRECISION=bf16 measures under autocast.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd

from vlmbench.cost.planner import plan
from vlmbench.methods.recipes import BUILT_IN, find_scale, get_recipe

STEPS = Path(__file__).resolve().parent.parent / 'figures' / 'laptop' / 'steps.csv'


def two_steps(method: str) -> list[str]:
    "Settings that bound every stage of `method` by two steps."
    stages = [stage.name for stage in get_recipe(method, find_scale('laptop')).stages]
    bound = [(f'stages.{s}.budget_targets=None', f'stages.{s}.steps=2') for s in stages]
    return [setting for pair in bound for setting in pair]


def train(method: str, folder: Path, precision: str) -> Path:
    "A run of `method` through the command line; returns its folder."
    words = ['run', 'train', f'recipe={method}', 'scale=laptop', f'precision={precision}']
    words += [f'overrides={json.dumps(two_steps(method))}', 'limit=4', f'out={folder}']
    words += [f'data={folder.parent / "world"}', 'batch_size=4']
    command = [sys.executable, '-m', 'vlmbench', *words, '--overwrite']
    subprocess.run(command, check=True, env=os.environ | dict(HF_HUB_OFFLINE='1'))
    return folder


def rows_of(method: str, folder: Path, precision: str) -> list[dict]:
    "One row a stage of a run: its second step, the peak so far, and what the planner says."
    planned, found = plan(method, 'laptop', precision=precision).set_index('stage'), []
    for stage in json.loads((folder / 'recipe.json').read_text(encoding='utf8'))['stages']:
        text = (folder / 'stages' / stage['name'] / 'metrics.jsonl').read_text(encoding='utf8')
        steps = [row for row in map(json.loads, text.splitlines()) if row['event'] == 'step']
        last = steps[-1]
        found.append(
            dict(
                method=method,
                stage=stage['name'],
                precision=precision,
                rows=stage['global_rows'],
                micro_batch=stage['batch_rows'],
                recomputed=stage['gradient_checkpointing'],
                seconds=round(last['step_s'], 1),
                tokens=last['tokens'],
                targets=last['targets'],
                peak_gb=round(last['memory_mb']['rss'] / 1e3, 2),
                planned_gb=round(planned.peak[stage['name']] / 1e9, 2),
            )
        )
    return found


def main(place: str, *methods: str) -> None:
    precision = os.environ.get('PRECISION', 'fp32')
    root = Path(place).resolve()
    if not (root / 'world').exists():
        command = [sys.executable, '-m', 'vlmbench', 'data', 'world', str(root / 'world')]
        subprocess.run(command, check=True)
    for method in methods or BUILT_IN:
        rows = pd.DataFrame(
            rows_of(method, train(method, root / f'{method}-{precision}', precision), precision)
        )
        if STEPS.exists():
            old = pd.read_csv(STEPS)
            rows = pd.concat([old[~((old.method == method) & (old.precision == precision))], rows])
        STEPS.parent.mkdir(parents=True, exist_ok=True)
        rows.to_csv(STEPS, index=False)
        print(rows.to_string(index=False), flush=True)


if __name__ == '__main__':
    main(*sys.argv[1:])
