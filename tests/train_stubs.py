"""A tiny random VLM and a packed, resumable loader over synthetic samples, shared by the training
tests (and by the processes they start)."""

import os

os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')
import time
import warnings
from pathlib import Path

import torch

from vlmbench.data.mixture import StatefulSampler
from vlmbench.data.packing import BatchLoader, collate_packed, pack
from vlmbench.data.template import Encoded
from vlmbench.models.vlm import VLMConfig, VLMForConditionalGeneration
from vlmbench.train.launch import launch
from vlmbench.train.loop import train
from vlmbench.train.recipe import Stage, full, layers, lora

# ranks import the stubs by name
HERE = str(Path(__file__).parent)
ENV = dict(PYTHONPATH=os.pathsep.join([HERE, os.environ.get('PYTHONPATH', '')]))
VOCAB, IMAGE, PIXELS, PATCHES = 40, 4, 16, 4


def tiny_vlm(dropout=0.0, depth=3, tie=False, seed=0):
    "1 image = 4 tokens of a two-block CLIP tower at 16 x 16 pixels; a three-block Llama."
    torch.manual_seed(seed)
    text = dict(
        model_type='llama',
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=depth,
        num_attention_heads=2,
        max_position_embeddings=128,
        attention_dropout=dropout,
        tie_word_embeddings=tie,
    )
    backbone = dict(
        model_type='clip_vision_model',
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=PIXELS,
        patch_size=8,
        attention_dropout=dropout,
    )
    return VLMForConditionalGeneration(
        VLMConfig(
            text_config=text,
            vision_config=dict(type='encoder', backbone=backbone, select_layers=[-1]),
            image_token_id=IMAGE,
        )
    )


def encode(i, images=True):
    """Sample `i`: an image in three of four samples, a prompt, an answer of 1 to 9 tokens; all
    drawn from a generator seeded with `i`."""
    g = torch.Generator().manual_seed(1000 + i)
    n = int(torch.randint(1, 10, (), generator=g))
    prompt = int(torch.randint(2, 6, (), generator=g))
    with_image = images and i % 4 != 3
    text = torch.randint(5, VOCAB, (prompt + n,), generator=g)
    ids = torch.cat([torch.full((PATCHES * with_image,), IMAGE), text])
    labels = torch.cat([torch.full((len(ids) - n,), -100), text[prompt:]])
    image_ids = torch.where(ids == IMAGE, 0, -1)
    pixels = (
        [dict(pixel_values=torch.randn(3, PIXELS, PIXELS, generator=g), size=(PIXELS, PIXELS))]
        if with_image
        else []
    )
    return Encoded(ids, labels, image_ids, pixels, f's{i}')


def packed_loader(
    n=60, seed=0, rows=2, max_tokens=48, rank=0, ranks=1, images=True, prefetch=2, **kw
):
    return BatchLoader(
        range(n),
        lambda i: encode(i, images),
        StatefulSampler(n, seed=seed, rank=rank, ranks=ranks),
        max_tokens,
        rows,
        buffer=8,
        prefetch=prefetch,
        **kw,
    )


VARIANTS = dict(
    full=dict(
        vision=full(1e-3),
        projector=full(),
        embed=full(),
        layers=full(),
        norm=full(),
        lm_head=full(),
    ),
    lora=dict(projector=full(), layers=lora(4, 8, dropout=0.2, layers=(0, 2))),
    frozen=dict(projector=full()),
    blocks=dict(projector=full(), layers=layers((1,))),
)


def a_stage(variant='full', steps=6, **kw):
    kw = dict(lr=3e-3, accumulation=2, warmup_ratio=0.3, weight_decay=0.01) | kw
    if not kw.get('budget_targets'):
        kw['steps'] = steps
    return Stage('stage', VARIANTS[variant], data='synthetic', **kw)


def run(out, variant='full', dropout=0.1, model=None, loader=None, stage=None, steps=6, **kw):
    "Train the tiny VLM; returns (model, result)."
    model = tiny_vlm(dropout) if model is None else model
    kw = dict(device='cpu', progress_seconds=None, save_every=2) | kw
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', message='gradient audit|.*dropped .* lines')
        return model, train(
            model,
            None,
            stage or a_stage(variant, steps),
            None,
            out,
            loader=packed_loader() if loader is None else loader,
            **kw,
        )


class StopAfter:
    "A stop flag that is set once `steps` optimizer steps of `loader` have been taken."

    def __init__(self, loader, micro):
        self.loader, self.micro = loader, micro

    def is_set(self):
        return self.loader.counts['batches'] >= self.micro


class RowLoader:
    """Micro-batches of two rows (one with images, one text-only); of `ranks` 2, rank 0 gets the
    first row and rank 1 the second."""

    def __init__(self, rank, ranks, poison=False):
        self.i, self.rank, self.ranks = 0, rank, ranks
        with_images = list(pack([encode(i) for i in range(60) if i % 4 != 3], 48))
        text = list(pack([encode(i, False) for i in range(60, 120)], 48))
        if poison:
            with_images[0][0].images[0]['pixel_values'][0, 0, 0] = float('nan')
        self.pairs = list(zip(with_images, text))

    def state_dict(self):
        return dict(i=self.i)

    def load_state_dict(self, state):
        self.i = state['i']

    def __iter__(self):
        while True:
            pair = self.pairs[self.i % len(self.pairs)]
            self.i += 1
            yield collate_packed([*pair] if self.ranks == 1 else [pair[self.rank]], 0, 48)


class StopAtBatch:
    def __init__(self, loader, batches):
        self.loader, self.batches = loader, batches

    def is_set(self):
        return self.batches is not None and self.loader.i >= self.batches


def stubs_on_ranks(target, folder, ranks, timeout, **kwargs):
    "`launch` of a stub on CPU ranks of one thread, with logs in `folder/logs`."
    logs = dict(log_dir=folder / 'logs', threads=1, timeout=timeout, env=ENV)
    return launch(target, kwargs, ranks, **logs)


def two_rank_run(out, steps, stop_after=None, poison=False, parallel=None):
    """What each of two ranks runs (started by `vlmbench.train.launch`); only rank 0 is asked to
    stop, or holds a poisoned image."""
    rank = int(os.environ['RANK'])
    torch.set_num_threads(1)
    loader = RowLoader(rank, 2, poison and rank == 0)
    stop = StopAtBatch(loader, 2 * stop_after if stop_after and rank == 0 else None)
    run(
        out,
        dropout=0.0,
        stage=a_stage('full', steps, accumulation=4),
        loader=loader,
        save_every=None,
        stop_flag=stop,
        parallel=parallel,
    )


def sharded_state(out):
    """Each of two ranks holds half of a layer (FSDP2): one step, save, another step, and the state
    put back is the one saved."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from vlmbench.train.checkpoint import (
        CheckpointError,
        load_optimizer_tensors,
        load_state,
        load_weights,
        optimizer_tensors,
        save_state,
    )

    rank = int(os.environ['RANK'])
    dist.init_process_group('gloo')
    try:
        torch.manual_seed(0)
        layer = torch.nn.Linear(4, 6)
        fully_shard(layer, mesh=init_device_mesh('cpu', (2,)))
        params = dict(layer.named_parameters())
        optimizer = torch.optim.AdamW(
            [dict(params=list(params.values()), param_names=list(params))], lr=0.1
        )

        def step():
            optimizer.zero_grad()
            layer(torch.arange(8.0).view(2, 4)).square().mean().backward()
            optimizer.step()

        def agree(ok):
            ok = torch.tensor(int(ok))
            dist.all_reduce(ok, dist.ReduceOp.MIN)
            return bool(ok)

        kw = dict(rank=rank, ranks=2, agree=agree)
        whole = lambda: {n: t.full_tensor().detach().clone() for n, t in params.items()}
        step()
        at_save = whole()
        path = save_state(out, 1, params, optimizer_tensors(optimizer), {}, {}, {}, **kw)
        dist.barrier()
        step()
        after = whole()
        state = load_state(path, rank=rank, ranks=2)
        assert all(torch.equal(t, state.weights[n]) for n, t in at_save.items())
        load_weights(params, state.weights)
        load_optimizer_tensors(optimizer, state.optimizer)
        step()
        assert all(torch.equal(t, after[n]) for n, t in whole().items()), 'the resumed step differs'
        try:
            save_state(out, 2, params, {}, {}, dict(odd=object() if rank else 1), {}, **kw)
        except CheckpointError as e:
            assert ('object' if rank else 'another rank') in str(e) and 'intact' in str(e)
        else:
            raise AssertionError('a state that rank 1 cannot write was written')
    finally:
        dist.destroy_process_group()


def sleepy(out):
    with open(os.path.join(out, f'pid-{os.environ["RANK"]}'), 'w') as f:
        f.write(str(os.getpid()))
    time.sleep(300)


def one_fails(failing):
    "One rank has a reason to fail, the others wait for it; all have said something before."
    import torch.distributed as dist

    dist.init_process_group('gloo')
    print('said before', flush=True)
    if int(os.environ['RANK']) == failing:
        raise ValueError('7.json row 3: no picture')
    dist.all_reduce(torch.ones(1))
    raise AssertionError('came through')
