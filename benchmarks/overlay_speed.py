"""Rows per second with a marker of each kind, beside plain image loading (PNG decode to RGB) of the same picture.

`ratio` is the time of loading plus drawing over the time of loading alone, measured alternately in one run."""
import argparse, io, random, statistics, time

import numpy as np
from PIL import Image

from vlmbench.data.overlay import MARKERS, PALETTE, draw_marker, sample_alpha, sample_marker
from vlmbench.data.region import Region

def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--width', type=int, default=640); p.add_argument('--height', type=int, default=480); p.add_argument('--rows', type=int, default=40)
    a = p.parse_args()
    size, noise = (a.width, a.height), np.random.default_rng(0).integers(0, 255, (a.height//8, a.width//8, 3), dtype=np.uint8)
    buffer = io.BytesIO(); Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(buffer, 'PNG')
    w, h = size
    region = Region((w*.2, h*.2, w*.6, h*.7), ((w*.2, h*.5, w*.4, h*.2, w*.6, h*.4, w*.5, h*.7),))
    def load(): return Image.open(io.BytesIO(buffer.getvalue())).convert('RGB')
    print(f'{"kind":14} {"rows/s":>8} {"loading":>8} {"ratio":>6}')
    for kind in MARKERS:
        rng, plain, drawn = random.Random(0), [], []
        for _ in range(a.rows):
            t = time.perf_counter(); load(); plain.append(time.perf_counter() - t)
            t = time.perf_counter(); img = load()
            draw_marker(img, sample_marker(rng, kind, region, size), rng.choice(list(PALETTE)), sample_alpha(rng, kind))
            drawn.append(time.perf_counter() - t)
        x, y = statistics.median(drawn), statistics.median(plain)
        print(f'{kind:14} {1/x:8.0f} {1/y:8.0f} {x/y:6.2f}')

if __name__ == '__main__': main()
