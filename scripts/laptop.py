"""Every method on pretrained weights, through the commands: seconds a step and peak memory,
measured beside planned -> figures/laptop/steps.csv

    export VLMBENCH_HOME=~/vlmbench; vlmbench weights laptop
    python scripts/laptop.py RUNS_FOLDER [METHOD ...]

Each run trains every stage for two steps of one micro-batch, asks two questions and writes its
model; rows of methods that are not named stay as they are stored. PRECISION=bf16 measures under
autocast. What is measured of a step is CPU time, which other processes on the same cores hardly
change: a step on two idle cores takes half of it, times the micro-batches of the recipe.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import psutil

from vlmbench.cost.planner import plan
from vlmbench.methods.recipes import BUILT_IN, find_scale, get_recipe

STEPS = Path(__file__).resolve().parent.parent / 'figures' / 'laptop' / 'steps.csv'


def two_steps(method: str) -> list[str]:
    "Settings that bound every stage of `method` by two steps of one micro-batch."
    found = []
    for stage in get_recipe(method, find_scale('laptop')).stages:
        settings = dict(budget_targets=None, steps=2, global_rows=stage.batch_rows)
        found += [f'stages.{stage.name}.{name}={value}' for name, value in settings.items()]
    return found


def core_seconds(process: psutil.Process) -> float:
    "CPU time of a process and everything below it, so far."
    total = 0.0
    for one in [process, *process.children(recursive=True)]:
        try:
            times = one.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


def steps_in(folder: Path, stage: str) -> int:
    "Steps that a running stage has logged."
    log = folder / 'stages' / stage / 'metrics.jsonl'
    if not log.exists():
        return 0
    return log.read_text(encoding='utf8').count('"event": "step"')


def own_gb(process: psutil.Process) -> float:
    """Memory of the largest process below `process` that is its own: pages of a mapped weights
    file are the system's to take back, and are left out (Linux)."""
    held = [0]
    for one in process.children(recursive=True):
        try:
            status = Path(f'/proc/{one.pid}/status').read_text()
        except OSError:  # it has ended
            continue
        sizes = dict(line.split(':', 1) for line in status.splitlines() if line.startswith('Rss'))
        held.append(sum(int(sizes[name].split()[0]) for name in ('RssAnon', 'RssShmem') if sizes))
    return max(held) * 1024 / 1e9


def train(method: str, folder: Path, precision: str) -> tuple[dict[str, float], dict[str, float]]:
    """A run of `method` through the command line; returns, for every stage, the CPU time that
    passed between its first and its second step, and the most memory of its own so far."""
    stages = [stage.name for stage in get_recipe(method, find_scale('laptop')).stages]
    words = ['run', 'train', f'recipe={method}', 'scale=laptop', f'precision={precision}']
    words += [f'overrides={json.dumps(two_steps(method))}', 'limit=2', f'out={folder}']
    words += [f'data={folder.parent / "world"}', 'batch_size=2']
    command = [sys.executable, '-m', 'vlmbench', *words, '--overwrite']
    at: dict[tuple[str, int], float] = {}
    held, most = {}, 0.0
    begun = subprocess.Popen(command, env=os.environ | dict(HF_HUB_OFFLINE='1'))
    process = psutil.Process(begun.pid)
    while begun.poll() is None:
        for stage in stages:
            key = stage, steps_in(folder, stage)
            if key not in at:
                at[key] = core_seconds(process)
                held[stage] = most
        most = max(most, own_gb(process))
        time.sleep(0.1)
    if begun.returncode:
        raise SystemExit(f'{" ".join(command)} failed')
    return {stage: at[stage, 2] - at[stage, 1] for stage in stages}, held


def rows_of(method: str, folder: Path, precision: str, measured: tuple[dict, dict]) -> list[dict]:
    "One row a stage of a run: its second step, the peak so far, and what the planner says."
    spent, held = measured
    whole = get_recipe(method, find_scale('laptop'))
    planned, found = plan(method, 'laptop', precision=precision).set_index('stage'), []
    for stage in whole.stages:
        text = (folder / 'stages' / stage.name / 'metrics.jsonl').read_text(encoding='utf8')
        steps = [row for row in map(json.loads, text.splitlines()) if row['event'] == 'step']
        last, batches = steps[-1], stage.step_rows // stage.batch_rows
        found.append(
            dict(
                method=method,
                stage=stage.name,
                precision=precision,
                rows=stage.step_rows,
                micro_batch=stage.batch_rows,
                recomputed=stage.gradient_checkpointing,
                core_seconds=round(spent[stage.name], 1),
                # two idle cores share the work of all micro-batches
                seconds_a_step=round(spent[stage.name] * batches / 2, 1),
                tokens=last['tokens'],
                targets=last['targets'],
                peak_gb=round(last['memory_mb']['rss'] / 1e3, 2),
                own_gb=round(held[stage.name], 2),
                planned_gb=round(planned.peak[stage.name] / 1e9, 2),
            )
        )
    return found


PROCESS = """
import ipykernel.kernelapp, vlmbench.run.jobs, vlmbench.lab.plots
from pathlib import Path
status = Path('/proc/self/status').read_text()
print(next(line.split()[1] for line in status.splitlines() if line.startswith('RssAnon')))
"""


def process_gb() -> float:
    "What the kernel of a run holds before there is a model: the interpreter and its libraries."
    said = subprocess.run([sys.executable, '-c', PROCESS], capture_output=True, text=True)
    said.check_returncode()
    return int(said.stdout) * 1024 / 1e9


def beside_planned(rows: pd.DataFrame) -> pd.DataFrame:
    """`rows` with what a process holds before its model, and by how much the memory that it came
    to hold differs from that and the plan together."""
    before = process_gb()
    off = (100 * (rows.own_gb / (rows.planned_gb + before) - 1)).round()
    return rows.assign(process_gb=round(before, 2), off_percent=off)


def main(place: str, *methods: str) -> None:
    precision = os.environ.get('PRECISION', 'fp32')
    root = Path(place).resolve()
    if not (root / 'world').exists():
        command = [sys.executable, '-m', 'vlmbench', 'data', 'world', str(root / 'world')]
        subprocess.run(command, check=True)
    for method in methods or BUILT_IN:
        folder = root / f'{method}-{precision}'
        measured = train(method, folder, precision)
        rows = pd.DataFrame(rows_of(method, folder, precision, measured))
        if STEPS.exists():
            old = pd.read_csv(STEPS)
            rows = pd.concat([old[~((old.method == method) & (old.precision == precision))], rows])
        rows = beside_planned(rows)
        STEPS.parent.mkdir(parents=True, exist_ok=True)
        rows.to_csv(STEPS, index=False)
        lines = [list(rows.columns), ['---'] * len(rows.columns), *rows.values.tolist()]
        text = [f'| {" | ".join(map(str, line))} |\n' for line in lines]
        STEPS.with_name('table.md').write_text(''.join(text), encoding='utf8')
        print(rows.to_string(index=False), flush=True)


if __name__ == '__main__':
    main(*sys.argv[1:])
