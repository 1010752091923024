"""Cost of the layer analysis, as ratios measured in one run: all streaming metrics, and each by
itself, against a plain forward pass of the same batch (at most 1.5), their peak memory at twenty
batches against two (flat), and drop-one with prefix reuse against naive forwards of pruned models
(at most 0.6).

    python benchmarks/analysis_speed.py [--layers 12] [--hidden 512] [--vocab 4096] [--rounds 3]
    [--device cpu]"""

import argparse, json

from vlmbench.speed.methods import drop_one_speed, stream_memory, stream_speed

if __name__ == '__main__':
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, value in dict(
        layers=12, hidden=512, vocab=4096, image=144, text=72, answer=8
    ).items():
        p.add_argument(f'--{name}', type=int, default=value)
    p.add_argument('--rounds', type=int, default=3)
    p.add_argument('--device', default='cpu')
    p.add_argument('--clock', choices=('wall', 'cpu'), default='wall')
    a = vars(p.parse_args())
    timed, rest = {k: a.pop(k) for k in ('rounds', 'clock')}, a
    print(
        json.dumps(
            dict(
                streams=stream_speed(each=True, **timed, **rest),
                memory=stream_memory(**rest),
                drop_one=drop_one_speed(**timed, **rest),
            ),
            indent=1,
        )
    )
