"""What the ranks of `test_sharding.py` run: all methods on tiny random models, with the same four
micro-batches a step at every number of ranks."""

import os

os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')
import json
import warnings
from dataclasses import replace
from pathlib import Path

import torch

from vlmbench.methods.recipes import get_method
from vlmbench.train import loop
from vlmbench.train.scale import Scale
from vlmbench.train.sharding import local_bytes
from vlmbench.train.stages import run_stages

LANES = 4
ROWS = dict(caption_train=12, vqa_train=16, text_train=12, region_train=12, vqa_test=2)
METHODS = {
    'llava': {},
    'vip_llava_lora': dict(llm='lora'),
    'vip_llava': {},
    'visual_region': {},
    'vora': {},
    'eve': {},
    'zero': {},
}


def scale_of(root, dtype='float32'):
    root = Path(root)
    places = str(root / 'llm'), str(root / 'vit')
    return Scale('mini', *places, 64, 'world', like='tiny', dtype=dtype)


def short(recipe, steps):
    "Every stage for `steps` steps of four micro-batches of a row, without dropout."
    # a gradient that is zero but for rounding must not become a step of full size
    bound = dict(steps=steps, budget_targets=None, eps=1e-5)
    bound |= dict(batch_rows=1, accumulation=LANES, global_rows=None)
    stages = []
    for stage in recipe.stages:
        # every rank draws numbers of its own
        trains = {group: replace(tune, dropout=0.0) for group, tune in stage.trains.items()}
        stages.append(replace(stage, trains=trains, **bound))
    return replace(recipe, stages=tuple(stages))


def two_tokens(report):
    "A callback that generates: embedding, blocks and head, all ranks together."
    prompt = torch.arange(5, 13)[None]
    made = report.model.generate(input_ids=prompt, max_new_tokens=2, do_sample=False)
    return dict(sum=int(made.sum()))


def run_method(root, out, name, steps=2, dtype='float32', stop_after=None, **settings):
    "Train `name` on the tiny models; returns the end of `run_stages` and the bytes held."
    method, held = get_method(name.split('_lora')[0], METHODS[name]), []
    scale = scale_of(root, dtype)
    recipe = short(method.recipe(scale), steps)
    state = method.start(recipe, scale, device='cpu')

    def measure(trainer, end=loop.Trainer.end):
        moments = [t for s in trainer.optimizer.state.values() for t in s.values()]
        weights = [*trainer.layout.model.parameters()]
        held.append(local_bytes([*moments, *weights]))
        end(trainer)

    before, loop.Trainer.end = loop.Trainer.end, measure
    callback = loop.Callback(two_tokens, name='words')
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            ended = run_stages(
                method,
                state,
                Path(root) / 'world',
                Path(out) / name,
                progress_seconds=None,
                callbacks=[callback],
                stop_flag=StopAfter(stop_after),
                **settings,
            )
    finally:
        loop.Trainer.end = before
    return ended, held


def run_all(root, out, methods=tuple(METHODS), **settings):
    "All methods in one layout; rank 0 leaves weights, histories and bytes in `out/results.pt`."
    torch.set_num_threads(1)
    rank, results = int(os.environ.get('RANK', 0)), {}
    for name in methods:
        ended, held = run_method(root, out, name, **settings)
        weights = dict(ended.model.named_parameters())
        assert all(type(p) is torch.nn.Parameter for p in weights.values()), name
        assert not any('FSDP' in type(m).__name__ for m in ended.model.modules()), name
        rows = []
        if rank == 0:
            for stage in ended.stages:
                lines = (stage.out_dir / 'metrics.jsonl').read_text().splitlines()
                rows += [row for row in map(json.loads, lines) if row['event'] != 'run']
        weights = {n: p.detach() for n, p in weights.items()}
        results[name] = dict(weights=weights, rows=rows, held=held)
    if rank == 0:
        torch.save(results, Path(out) / 'results.pt')


class StopAfter:
    "A stop flag that is set once `steps` steps have been made, and never for None."

    reason = 'stopped by the test'

    def __init__(self, steps):
        self.steps, self.asked = steps, 0

    def is_set(self):
        self.asked += 1  # the loop asks once a step
        return self.steps is not None and self.asked >= self.steps


def elastic_run(out, stop_after=None, parallel=None, steps=6, accumulation=4):
    "The tiny VLM on synthetic samples, each rank its part; notes the samples of every step."
    import train_stubs

    torch.set_num_threads(1)
    rank, ranks = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
    stage = train_stubs.a_stage('full', steps, batch_rows=1, accumulation=accumulation)
    loader = train_stubs.packed_loader(600, rank=rank, ranks=ranks, rows=1)
    noted, step_once = [], loop.Trainer.step_once

    def noting(trainer):
        row, micro = step_once(trainer)
        noted.append([trainer.step, [i for batch in micro for i in batch['sample_ids']]])
        return row, micro

    loop.Trainer.step_once = noting
    try:
        train_stubs.run(
            out,
            dropout=0.0,
            stage=stage,
            loader=loader,
            stop_flag=StopAfter(stop_after),
            parallel=parallel,
            save_every=None,
        )
    finally:
        loop.Trainer.step_once = step_once
        name = f'samples-{noted[0][0]}-{ranks}-{rank}.json' if noted else 'none.json'
        Path(out).mkdir(parents=True, exist_ok=True)
        (Path(out) / name).write_text(json.dumps(noted))


def run_options(root, out):
    "LLaVA under FSDP with every option, and ranks whose data end at different micro-batches."
    import train_stubs

    for name, options in dict(
        bf16=dict(dtype='bfloat16', precision='bf16'),
        offload=dict(offload=True),
        compile=dict(compile='eager'),
    ).items():
        place = Path(out) / name
        place.mkdir(parents=True, exist_ok=True)
        run_all(root, place, ['llava'], parallel='fsdp', **options)
    rank = int(os.environ['RANK'])
    for parallel in ('ddp', 'fsdp'):
        loader = train_stubs.RowLoader(rank, 2)
        batches = iter(loader)
        kept = [next(batches) for _ in range(4 - rank)]  # rank 1 has one less in the second step
        loader.__class__ = type('Ending', (), dict(__iter__=lambda self: iter(kept)))
        loader.state_dict = dict
        train_stubs.run(
            Path(out) / parallel,
            dropout=0.0,
            stage=train_stubs.a_stage('full', 4),
            loader=loader,
            parallel=parallel,
            save_every=None,
        )


def background_run(out, steps=6, fail_on=None, at_step=4, part='trees', **settings):
    """The tiny VLM with a state every second step; rank `fail_on` cannot write `part` of that of
    `at_step`, and each rank leaves what it was told in `told-RANK.txt`."""
    import train_stubs
    from vlmbench.train import checkpoint

    torch.set_num_threads(1)
    rank, ranks = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
    states, shards = checkpoint._StateWriter, checkpoint.dcp.FileSystemWriter
    writer, write = dict(trees=(states, states.write), shards=(shards, shards.write_data))[part]
    written = []

    def failing(self, *given):
        written.append(self)
        if rank == fail_on and len(written) == at_step // 2:
            raise OSError(28, 'No space left on device')
        return write(self, *given)

    setattr(writer, write.__name__, failing)
    stage = train_stubs.a_stage('full', steps, batch_rows=1, accumulation=2)
    loader = train_stubs.packed_loader(600, rank=rank, ranks=ranks, rows=1)
    told = 'nothing'
    try:
        train_stubs.run(out, dropout=0.0, stage=stage, loader=loader, keep_last=9, **settings)
    except checkpoint.CheckpointError as e:
        told = str(e)
    Path(out, f'told-{rank}.txt').write_text(told)


def named_run(root, out, parallel=None):
    """Zero through its three stages; rank 0 leaves what each stage trains and what its states hold
    in `names.json`, with the tensors that were gathered while a state was written; every rank
    leaves in `grafts-RANK.json` the types of the parameters that each of its grafts has seen."""
    from torch.distributed.tensor import DTensor

    from vlmbench.methods import zero
    from vlmbench.train import checkpoint

    torch.set_num_threads(1)
    gathered, full, save, stages = [], DTensor.full_tensor, loop.Trainer.save, {}

    def counting(tensor, **settings):
        gathered.append(1)
        return full(tensor, **settings)

    def saving(trainer, wait=True):
        before = len(gathered)
        path = save(trainer, wait)
        trained = sorted(name for group in trainer.plan.groups for name in group.trained)
        if wait:
            if trainer.layout.shards:
                held = checkpoint._shapes(path)[0]
            else:
                held = checkpoint.load_file(path / 'weights.safetensors')
            stages[trainer.stage.name] = dict(
                trained=trained, held=sorted(held), gathered=len(gathered) - before
            )
        return path

    grafts, graft = [], zero.graft_onto

    def grafting(where, state):
        grafts.append(sorted({type(p).__name__ for p in state.model.parameters()}))
        return graft(where, state)

    zero.graft_onto = grafting
    DTensor.full_tensor, loop.Trainer.save = counting, saving
    method = get_method('zero', dict(stages=['adapt', 'encoder', 'decoder']))
    scale = scale_of(root)
    recipe = short(method.recipe(scale), 1)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        state = method.start(recipe, scale, device='cpu')
        settings = dict(progress_seconds=None, parallel=parallel)
        run_stages(method, state, Path(root) / 'world', Path(out), **settings)
    zero.graft_onto, DTensor.full_tensor, loop.Trainer.save = graft, full, save
    rank = int(os.environ.get('RANK', 0))
    (Path(out) / f'grafts-{rank}.json').write_text(json.dumps(grafts))
    if rank == 0:
        (Path(out) / 'names.json').write_text(json.dumps(stages))
