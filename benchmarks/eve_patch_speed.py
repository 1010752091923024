"""Speed of EVE's patch embedding, forward and backward: all images at once against a loop over
images.

    python benchmarks/eve_patch_speed.py [--channels 512] [--hidden 2048] [--images 6] [--rounds
    5] [--device cpu]

Published geometry (672 px canvas, patches of 14 px, windows of 2 x 2) at reduced widths, mixed
aspect ratios (bar 2). `vlmbench.speed.methods.patches_by_image` is the baseline; `planned` is
the ratio that the matrix products alone would give."""

import argparse, json

from vlmbench.speed.methods import patch_speed

if __name__ == '__main__':
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, value in dict(channels=512, hidden=2048, images=6, rounds=5).items():
        p.add_argument(f'--{name}', type=int, default=value)
    p.add_argument('--device', default='cpu')
    p.add_argument('--clock', choices=('wall', 'cpu'), default='wall')
    print(json.dumps(patch_speed(**vars(p.parse_args())), indent=1))
