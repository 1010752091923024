"""The image-bidirectional attention mask and attention with it, beside the straightforward forms.

    python benchmarks/vora_mask_speed.py [--rows 4] [--tokens 2048] [--rounds 5] [--device cpu]
    [--clock cpu]

Two baselines build the dense additive mask: token by token (the named one, bar 20), and with one
slice for each image. `vlmbench.speed.methods` has both; the masks are compared before they are
timed."""

import argparse, json

from vlmbench.speed.methods import mask_speed, masked_attention_speed

if __name__ == '__main__':
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, value in dict(rows=4, tokens=2048, rounds=5).items():
        p.add_argument(f'--{name}', type=int, default=value)
    p.add_argument('--device', default='cpu')
    p.add_argument('--clock', choices=('wall', 'cpu'), default='wall')
    a = vars(p.parse_args())
    print(json.dumps(dict(mask=mask_speed(**a), attention=masked_attention_speed(**a)), indent=1))
