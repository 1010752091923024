"""Construction of the image-bidirectional attention mask: `vlmbench.models.masks` against one token at a time.

    python benchmarks/vora_mask_speed.py [--rows 4] [--tokens 2048] [--rounds 5]

The named baseline is the straightforward construction: a causal mask with padding, then a walk over every token of every row that
opens the square of each run of image tokens. Both make the same additive float mask `[rows, 1, tokens, tokens]` from the same flags, which is checked. The
ratio of processor time (median over rounds, in turns in one process) is printed; the bar is 20."""

import argparse

import torch

from vlmbench.models.masks import attention_mask
from vlmbench.run.speed import ratio, time_in_turns

BAR = 20


def rows_of(rows: int, tokens: int, image: int = 576) -> tuple[torch.Tensor, torch.Tensor]:
    "Image numbers (-1 text) and padding mask: images of `image` tokens with text between them, the last quarter row padded by a tenth."
    ids, real = torch.full((rows, tokens), -1), torch.ones(rows, tokens, dtype=torch.bool)
    n = 0
    for r in range(rows):
        at = 20 + 7 * r
        while at + image <= tokens - tokens // 10:
            ids[r, at : at + image], n, at = n, n + 1, at + image + 64
    real[-1, tokens - tokens // 10 :] = False
    return ids, real


def token_by_token(vision: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    "The additive mask, every token visited in turn."
    rows, tokens = real.shape
    low = torch.finfo(torch.float32).min
    mask = torch.triu(torch.full((tokens, tokens), low), diagonal=1).repeat(rows, 1, 1)
    mask = mask.masked_fill(~real[:, None, :], low)
    for b in range(rows):
        start = None
        for i in range(tokens + 1):
            if i < tokens and vision[b, i]:
                start = i if start is None else start
            elif start is not None:
                mask[b, start:i, start:i] = 0.0
                start = None
    return mask[:, None]


def main(rows: int = 4, tokens: int = 2048, rounds: int = 5) -> float:
    "Print seconds and ratios; returns the ratio for the same additive mask."
    ids, real = rows_of(rows, tokens)
    flags = ids >= 0
    ours = lambda: attention_mask('eager', image_ids=ids, padding_mask=real, bidirectional_images=True)
    boolean = lambda: attention_mask('sdpa', image_ids=ids, padding_mask=real, bidirectional_images=True)
    theirs = lambda: token_by_token(flags, real)
    assert torch.equal((ours()[:, 0] == 0)[real], (theirs()[:, 0] == 0)[real]), 'the two masks differ'
    took = time_in_turns({'ours': ours, 'ours, boolean': boolean, 'token by token': theirs}, rounds, clock='cpu')
    for name, seconds in took.items():
        print(f'{name:16}{sorted(seconds)[len(seconds) // 2]:9.4f} s')
    out = ratio(took['token by token'], took['ours'])
    print(f'token by token / ours = {out:.1f} at {rows} x {tokens} tokens (bar {BAR})')
    print(f'token by token / ours, boolean (what sdpa gets) = {ratio(took["token by token"], took["ours, boolean"]):.1f}')
    return out


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--rows', type=int, default=4)
    p.add_argument('--tokens', type=int, default=2048)
    p.add_argument('--rounds', type=int, default=5)
    main(**vars(p.parse_args()))
