"""What the ranks of `test_large_models.py` run: a language model of 200 MB in a folder, and the
memory that a rank has for itself while it is built, trained and exported."""

import os

os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')
import hashlib
import json
import threading
import time
import warnings
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from sharding_stubs import scale_of, short
from vlmbench.data.scene import world_tokenizer
from vlmbench.evaluate.assess import load_tasks
from vlmbench.evaluate.generate import evaluate
from vlmbench.evaluate.in_shards import ready_to_ask
from vlmbench.methods.recipes import get_method
from vlmbench.train import loop, sharding
from vlmbench.train.checkpoint import export
from vlmbench.train.prepare import TrainPlan
from vlmbench.train.process import Ranks
from vlmbench.train.stages import run_stages


def write_large(root, dtype='float32'):
    "In `root/llm` a decoder of eight blocks of 26 MB (in fp32), with the world's tokenizer."
    tokenizer = world_tokenizer()
    size = dict(hidden_size=640, intermediate_size=2560, num_hidden_layers=8)
    heads = dict(num_attention_heads=10, num_key_value_heads=10, head_dim=64)
    torch.manual_seed(0)
    config = Qwen3Config(vocab_size=len(tokenizer), tie_word_embeddings=True, **size, **heads)
    model = Qwen3ForCausalLM(config).to(vars(torch)[dtype])
    model.save_pretrained(Path(root) / 'llm')
    tokenizer.save_pretrained(Path(root) / 'llm')
    return sum(p.numel() * p.element_size() for p in model.parameters())


def own_memory():
    "Bytes of this process that are no file's: it shares those with nobody, and cannot drop them."
    for line in Path('/proc/self/status').read_text().splitlines():
        if line.startswith('RssAnon'):
            return int(line.split()[1]) * 1024
    raise OSError('/proc/self/status has no RssAnon')


def noting(said, owner, method, name):
    "Replace `method` of class `owner` by one that notes its largest peak as `said[name]`."
    call = getattr(owner, method)

    def noted(self, *given):
        with Peak() as peak:
            value = call(self, *given)
        said[name] = max(said.get(name, 0), peak.bytes)
        return value

    setattr(owner, method, noted)


class Peak:
    "Context manager: `bytes` is how far the process's own memory rose above the beginning."

    def __enter__(self):
        self.began, self.bytes, self.running = own_memory(), 0, True
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self):
        while self.running:
            self.bytes = max(self.bytes, own_memory() - self.began)
            time.sleep(0.002)

    def __exit__(self, *exc):
        self.running = False
        self.thread.join()


def weights_hash(named):
    h = hashlib.sha256()
    for name, p in sorted(named):
        p = p.full_tensor() if hasattr(p, 'full_tensor') else p
        h.update(f'{name} {p.dtype}'.encode())
        h.update(p.detach().contiguous().view(torch.uint8).numpy())
    return h.hexdigest()


def note_drawn(said):
    """Note in `said['drawn']` a hash of what each stage trains anew, before its first step: in the
    first all that trains, in the second LoRA beside the projector that the first has trained."""
    begin, said['drawn'] = loop.Trainer.begin, []

    def noted(trainer, cleanup):
        groups = [group for group in trainer.layout.plan.groups if group.trained]
        new = groups if not said['drawn'] else [g for g in groups if g.tune.how == 'lora']
        named = [item for group in new for item in group.trained.items()]
        said['drawn'].append((len(named), weights_hash(named)))
        begin(trainer, cleanup)

    loop.Trainer.begin = noted


def ask(ended, ranks, parallel, root, out):
    "Ask the trained model about pictures."
    (task,) = load_tasks(Path(root) / 'world', ['vqa_test'], 4).values()
    with ready_to_ask(ended.model, ranks, sharding.Parallel(parallel), out) as (model, how):
        evaluate(model, ended.processor, task, 2, **how)


def memory_run(root, out, name='llava', variant=(), dtype='float32', **settings):
    """All stages of a method on the large model, two steps each. Each rank leaves in
    `memory-RANK.json` the peaks while it was built, cut, trained, put together, merged and
    exported and asked, what it has for itself behind the last stage, and a hash of the weights."""
    torch.set_num_threads(1)
    method = get_method(name, dict(variant))
    scale = scale_of(root, dtype)
    recipe = short(method.recipe(scale), 2)
    ranks, said = Ranks('cpu'), {}
    note_drawn(said)
    noting(said, loop.Trainer, 'set_up', 'shard')
    noting(said, sharding.Sharded, 'close', 'put together')
    noting(said, TrainPlan, 'merge', 'merge')
    noting(said, type(method), 'after_stage', 'merge')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        with Peak() as peak:
            state = method.start(recipe, scale, device='cpu')
        said['build'] = peak.bytes
        with Peak() as peak:
            settings = dict(progress_seconds=None) | settings
            ended = run_stages(method, state, Path(root) / 'world', Path(out), **settings)
        said['train'], said['kept'] = peak.bytes, own_memory() - peak.began
        with Peak() as peak:
            if ranks.rank == 0:
                export(ended.model, ended.processor, Path(out) / 'model')
        said['export'] = peak.bytes
        ranks.agree(True)
        with Peak() as peak:
            ask(ended, ranks, settings.get('parallel'), root, out)
        said['ask'] = peak.bytes
    said['weights'] = weights_hash(ended.model.named_parameters())
    said['left'] = [path.name for path in Path(out).rglob('.tmp-*')]
    (Path(out) / f'memory-{ranks.rank}.json').write_text(json.dumps(said))


class AtStep:
    "A stop flag that is set when the loop asks for the `asked`-th time, which it does once a step."

    reason = 'stopped by the test'

    def __init__(self, asked):
        self.left = asked

    def is_set(self):
        self.left -= 1
        return self.left < 0


def stopped_run(root, out, asked, name='llava', **settings):
    """As `memory_run`, until a stop flag is seen. Each rank leaves in `stopped-RANK.json` what was
    put together from the moment on in which its last state was begun, and the peak since then."""
    from torch.distributed.tensor import DTensor

    from vlmbench.train.process import Preempted

    torch.set_num_threads(1)
    method, said = get_method(name), dict(gathered=[], files=0)
    scale = scale_of(root)
    recipe = short(method.recipe(scale), 2)
    full, through, save = DTensor.full_tensor, sharding.through_files, loop.Trainer.save
    stops = []

    def gathering(tensor, **kw):
        said['gathered'] += [tensor.numel()] * bool(stops)
        return full(tensor, **kw)

    def writing(*given, **kw):
        said['files'] += bool(stops)
        return through(*given, **kw)

    def saving(trainer, wait=True):
        if trainer.asked_to_stop and not stops:
            stops.append(Peak().__enter__())
        return save(trainer, wait)

    DTensor.full_tensor, sharding.through_files, loop.Trainer.save = gathering, writing, saving
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        state = method.start(recipe, scale, device='cpu')
        settings = dict(progress_seconds=None, stop_flag=AtStep(asked)) | settings
        try:
            run_stages(method, state, Path(root) / 'world', Path(out), **settings)
        except Preempted as e:
            said['state'] = Path(e.path).name
    stops[0].__exit__()
    said['peak'] = stops[0].bytes
    rank = Ranks('cpu').rank
    (Path(out) / f'stopped-{rank}.json').write_text(json.dumps(said))
