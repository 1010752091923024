"""Readings of the published code of surrogate grafting that only tests need: its length order, its
hand-made batches, log-likelihoods as the harness defines them."""

from collections.abc import Sequence

import torch
from torch import nn

from vlmbench.data.template import IGNORE, Encoded
from vlmbench.models.modeling import place_features


def _deal(group, lengths, n):
    "Longest first into `n` batches of like total length."
    if len(group) % n:
        return [i for k in range(n) for i in group[k::n]]
    batches, load = [[] for _ in range(n)], [0.0] * n
    for i in group:
        k = load.index(min(load))
        batches[k].append(i)
        load[k] = load[k] + lengths[i] if len(batches[k]) < len(group) // n else float('inf')
    return [i for b in batches for i in b]


def _mega_batches(members, lengths, batch, mult, generator):
    order = (
        members
        if generator is None
        else [members[i] for i in torch.randperm(len(members), generator=generator).tolist()]
    )
    mega = [
        sorted(order[i : i + batch * mult], key=lambda i: lengths[i], reverse=True)
        for i in range(0, len(order), batch * mult)
    ]
    longest = max(range(len(mega)), key=lambda k: lengths[mega[k][0]])
    mega[0][0], mega[longest][0] = mega[longest][0], mega[0][0]
    return [i for m in mega for i in _deal(m, lengths, mult)]


def reference_length_order(
    lengths: Sequence[int],
    batch: int,
    mult: int,
    rank: int = 0,
    ranks: int = 1,
    seed: int = 0,
    epoch: int = 0,
    modality: bool = False,
    shuffle: bool = True,
) -> list[int]:
    """Sample numbers of one rank in the published length-grouped order; `mult` batches form a
    mega-batch."""
    if not lengths or 0 in lengths:
        raise ValueError('lengths: expected at least one, negative for text and none of them 0')
    g = torch.Generator().manual_seed(seed + epoch) if shuffle else None
    images, text = (
        [i for i, n in enumerate(lengths) if n > 0],
        [i for i, n in enumerate(lengths) if n < 0],
    )
    if not modality or not text or not images:
        order = _mega_batches(
            list(range(len(lengths))),
            [abs(n) for n in lengths] if modality else lengths,
            batch,
            mult,
            g,
        )
    else:
        size, parts = batch * mult, []
        for part in (images, text):
            part = _mega_batches(part, lengths, batch, mult, g)
            parts.append([part[i : i + size] for i in range(0, len(part), size)])
        mega, rest = [m for p in parts for m in p[:-1]], [i for p in parts for i in p[-1]]
        if g is not None:
            mega = [mega[i] for i in torch.randperm(len(mega), generator=g).tolist()]
        order = [i for m in mega for i in m] + sorted(rest)
        at = order.index(max(images, key=lambda i: lengths[i]))
        order[0], order[at] = order[at], order[0]
    order += order[: -len(order) % ranks]
    return order[rank::ranks]


def reference_batch(
    model: nn.Module, docs: Sequence[Encoded], max_tokens: int = 4096, ignore: Sequence[int] = ()
) -> dict:
    """`inputs_embeds` `[rows, tokens, hidden]` and unshifted `labels` `[rows, tokens]` as the
    published code pads and cuts them; labels in `ignore` become -100."""
    rows, labels = [], []
    for d in docs:
        x = model.get_input_embeddings()(d.input_ids[None])
        if d.images:
            pixels = torch.stack([i['pixel_values'] for i in d.images])
            x = place_features(
                x,
                d.input_ids[None],
                model.get_image_features(pixels)[0],
                model.config.image_token_id,
            )
        rows.append(x[0, :max_tokens])
        labels.append(d.labels[:max_tokens])
    pad = nn.utils.rnn.pad_sequence
    labels = pad(labels, True, IGNORE)
    return dict(
        inputs_embeds=pad(rows, True),
        labels=torch.where(
            torch.isin(labels, torch.tensor(list(ignore) or [IGNORE])), IGNORE, labels
        ),
    )


@torch.no_grad()
def loglikelihood(
    model: nn.Module, tokenizer, context: str, continuation: str, prefix_id: int
) -> tuple[float, bool]:
    """Sum of the continuation's log-probabilities after the context, and whether greedy decoding
    would write it. lm-eval's convention: spaces between the two belong to the continuation; an
    empty context is the token `prefix_id` (the end of a turn)."""
    if blank := len(context) - len(context.rstrip()):
        context, continuation = context[:-blank], context[-blank:] + continuation
    before = tokenizer.encode(context) if context else [prefix_id]
    ids = (
        tokenizer.encode(context + continuation)
        if context
        else [prefix_id, *tokenizer.encode(continuation)]
    )
    if len(ids) <= len(before):
        raise ValueError(
            f'loglikelihood: the continuation {continuation!r} adds no token to {context!r}'
        )
    ids, n = torch.tensor(ids, device=model.device)[None], len(ids) - len(before)
    logp = model(input_ids=ids[:, :-1]).logits[0, -n:].float().log_softmax(-1)
    return logp.gather(1, ids[0, -n:, None]).sum().item(), bool(
        (logp.argmax(-1) == ids[0, -n:]).all()
    )
