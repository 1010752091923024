"""Speed of EVE's patch embedding, forward and backward: all images at once against a loop over images.

    python benchmarks/eve_patch_speed.py [--channels 256] [--hidden 512] [--images 6] [--repeats 3]

Published geometry (672 px canvas, patches of 14 px, windows of 2 x 2) at a reduced width, mixed aspect ratios. The named baseline is the
straightforward form: convolve the padded canvas, then for every image crop, attend with keys and values computed, append, project. Prints the
largest difference of the two outputs, both times (best of the repeats, in turn) and the ratio."""

import argparse, time

import torch

from vlmbench.models.patch import PatchFrontEnd

SHAPES = [(672, 672), (504, 672), (672, 504), (392, 672), (672, 308), (84, 672)]


def attend(a, query, keys):
    "Textbook attention of one query per set, keys and values computed."
    k, v = a.kv_proj(a.kv_norm(keys)).chunk(2, -1)
    split = lambda x: x.unflatten(-1, (a.heads, -1)).transpose(-2, -3)
    weights = (split(a.q_proj(a.q_norm(query))[:, None]) @ split(k).mT * a.scale).softmax(-1)
    return a.out_proj((weights @ split(v)).transpose(1, 2).flatten(1))


def loop(front, pixels, sizes):
    c, out = front.config, []
    p, k = c['patch_stride'], c['conv_stride']
    for x, (height, width) in zip(front.patch_embedding(pixels), sizes.tolist()):
        x = x[:, : height // p, : width // p]
        h, w = x.shape[1] // k, x.shape[2] // k
        f = x.unflatten(2, (w, k)).unflatten(1, (h, k)).permute(1, 3, 2, 4, 0).reshape(h * w, k * k, -1)
        tokens = f.mean(1) + attend(front.local_attention, f.mean(1), f)
        start = front.class_embedding[None]
        start = start + attend(front.global_attention, start, tokens[None])
        rows = torch.cat([tokens.unflatten(0, (h, w)), front.split_embedding.expand(h, 1, -1)], 1)
        out.append(front.projector(torch.cat([start, rows.flatten(0, 1)])))
    return torch.cat(out)


def timed(run, front):
    front.zero_grad()
    began = time.perf_counter()
    run().square().mean().backward()
    return time.perf_counter() - began


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (('channels', 256), ('hidden', 512), ('images', 6), ('repeats', 3)):
        parser.add_argument(f'--{name}', type=int, default=value)
    args = parser.parse_args()
    torch.manual_seed(0)
    front = PatchFrontEnd(dict(channels=args.channels), args.hidden)
    sizes = torch.tensor([SHAPES[i % len(SHAPES)] for i in range(args.images)])
    pixels = torch.zeros(len(sizes), 3, 672, 672)
    for x, (h, w) in zip(pixels, sizes.tolist()):
        x[:, :h, :w] = torch.randn(3, h, w)
    forms = dict(ours=lambda: front(pixels, sizes)[0], loop=lambda: loop(front, pixels, sizes))
    with torch.no_grad():
        print(f'largest difference: {(forms["ours"]() - forms["loop"]()).abs().max():.1e}')
    times = {n: [] for n in forms}
    for _ in range(args.repeats):
        for n, f in forms.items():
            times[n].append(timed(f, front))
    best = {n: min(t) for n, t in times.items()}
    print(f'{len(sizes)} images: ours {best["ours"]:.3f} s, loop {best["loop"]:.3f} s, ratio {best["loop"] / best["ours"]:.2f} (bar 2)')


if __name__ == '__main__':
    main()
