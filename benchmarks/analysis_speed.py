"""Cost of the layer analysis, as ratios measured in one run: all streaming metrics against a plain forward pass on the
same batches, drop-one with prefix reuse against naive forwards of pruned models, and peak memory against the number of
samples.

    python benchmarks/analysis_speed.py [--layers 12] [--hidden 256] [--vocab 4096] [--device cpu] [--repeats 3]

Targets: at most 1.5x, at most 0.6x, flat. The batch looks like a VLM's: image tokens, a question, a short answer. On
the CPU the clock is processor time, which other work on the machine disturbs less than wall time; on a GPU it is wall
time after synchronisation."""
import argparse, json, os, platform, subprocess, sys, time
os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from vlmbench.analysis.ablation import drop_one
from vlmbench.analysis.streams import stream
from vlmbench.analysis.suite import streaming_metrics
from vlmbench.models.depth import prune


def build(a):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(hidden_size=a.hidden, intermediate_size=a.hidden * 11 // 4,
                                        num_hidden_layers=a.layers, num_attention_heads=a.hidden // 64,
                                        num_key_value_heads=a.hidden // 64, vocab_size=a.vocab, pad_token_id=0,
                                        bos_token_id=1, eos_token_id=None,
                                        max_position_embeddings=4096)).eval().to(a.device, getattr(torch, a.dtype))


def batch(a, seed=0):
    """`rows` samples of `image` image tokens, a question of `question` tokens and an answer of `answer` tokens,
    right padding of up to 8."""
    g, t = torch.Generator().manual_seed(seed), 1 + a.image + a.question + a.answer
    ids = torch.randint(4, a.vocab, (a.rows, t), generator=g)
    at, lengths = torch.arange(t), t - torch.randint(0, 8, (a.rows, 1), generator=g)
    mask = (at < lengths).long()
    image = ((at >= 1) & (at <= a.image)).expand(a.rows, t)
    labels = torch.where((at >= lengths - a.answer) & (at < lengths), ids, -100)
    return {k: v.to(a.device) for k, v in dict(input_ids=ids, attention_mask=mask, labels=labels,
                                               image_mask=image).items()}


def seconds(f, a):
    "Best of `repeats` times, after one warm-up: the least disturbed by other work on the machine."
    clock = time.process_time if a.device == 'cpu' else time.perf_counter
    def once():
        if a.device != 'cpu': torch.cuda.synchronize()
        t = clock()
        f()
        if a.device != 'cpu': torch.cuda.synchronize()
        return clock() - t
    once()
    return min(once() for _ in range(a.repeats))


@torch.no_grad()
def plain(model, batches):
    for x in batches: model(input_ids=x['input_ids'], attention_mask=x['attention_mask'], use_cache=False)


@torch.no_grad()
def naive_drop_one(pruned, batches):
    for m in pruned:
        for x in batches:
            m(input_ids=x['input_ids'], attention_mask=x['attention_mask'], labels=x['labels'], use_cache=False)


def resident_peak():
    "Peak resident MB of this process. Not `getrusage`, whose figure a child inherits."
    with open('/proc/self/status') as f: return next(int(l.split()[1]) for l in f if l.startswith('VmHWM')) / 2**10


def peak_memory(a, batches):
    "Peak resident MB of a fresh process (CPU), or peak allocated MB (GPU), of one stream over `batches` batches."
    args = [sys.executable, __file__, '--peak', str(batches),
            *(f'--{k}={v}' for k, v in vars(a).items() if k not in ('peak',))]
    return float(subprocess.run(args, capture_output=True, text=True, check=True).stdout.split()[-1])


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for k, v in dict(layers=12, hidden=256, vocab=4096, rows=4, image=144, question=24, answer=8, batches=1, repeats=3,
                     peak=0).items():
        p.add_argument(f'--{k}', type=int, default=v)
    p.add_argument('--device', default='cpu')
    p.add_argument('--dtype', default='float32')
    a = p.parse_args()
    model, data = build(a), [batch(a, i) for i in range(a.batches)]
    if a.peak:
        stream(model, (batch(a, i) for i in range(a.peak)), streaming_metrics())
        return print(torch.cuda.max_memory_allocated() / 2**20 if a.device != 'cpu' else resident_peak())
    forward = seconds(lambda: plain(model, data), a)
    every = seconds(lambda: stream(model, data, streaming_metrics()), a)
    single = {type(m).__name__: seconds(lambda m=m: stream(model, data, [type(m)()]), a) / forward
              for m in streaming_metrics()}
    pruned = [prune(model, [i]) for i in range(a.layers)]
    naive, reuse = seconds(lambda: naive_drop_one(pruned, data), a), seconds(lambda: drop_one(model, data), a)
    few, many = peak_memory(a, 2), peak_memory(a, 20)
    out = dict(streaming_over_forward=round(every / forward, 3), drop_one_over_naive=round(reuse / naive, 3),
               peak_mb_2_batches=round(few),
               peak_mb_20_batches=round(many), peak_growth=round(many / few - 1, 4), forward_s=round(forward, 4),
               single_metric_over_forward={k: round(v, 3) for k, v in single.items()}, settings=vars(a),
               torch=torch.__version__, machine=platform.machine())
    print(json.dumps(out, indent=1))


if __name__ == '__main__': main()
