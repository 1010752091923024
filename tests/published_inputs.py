"""Inputs as the original repositories lay them out, for parity: ViP-LLaVA's splicing of features
into embedded text, EVE's square canvas with a mask."""

import torch
from PIL import Image
from pillow_order import resize_as_pillow_13

from vlmbench.data.image import ImageTransform, mean_color
from vlmbench.data.picture import to_rgb


def splice(
    model,
    input_ids,
    features,
    labels=None,
    attention_mask=None,
    max_length=None,
    side='right',
    slot=-200,
):
    """`inputs_embeds`, `labels`, `attention_mask`, `position_ids` with one entry of `features`
    `[tokens, hidden]` at every `slot`. The original inserts features behind the tokenizer and cuts
    afterwards, perhaps inside a picture; vlmbench counts image tokens beforehand.

    `features` are taken in order over the batch; a row without a slot takes one as well and places
    nothing."""
    embed, rows, features = model.get_input_embeddings(), [], iter(features)
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    if labels is None:
        labels = torch.full_like(input_ids, -100)
    for ids, targets, keep in zip(input_ids, labels, attention_mask.bool()):
        ids, targets = ids[keep], targets[keep]
        slots = (ids == slot).nonzero()[:, 0].tolist()
        parts, wanted, start = [], [], 0
        if not slots:
            parts.append(next(features)[:0])
        for end in [*slots, len(ids)]:
            parts.append(embed(ids[start:end]))
            wanted.append(targets[start:end])
            if end < len(ids):
                parts.append(next(features))
                wanted.append(targets.new_full((len(parts[-1]),), -100))
            start = end + 1
        rows.append((torch.cat(parts)[:max_length], torch.cat(wanted)[:max_length]))
    longest = max(len(embeds) for embeds, _ in rows)

    def pad(x, value):
        extra = x.new_full((longest - len(x), *x.shape[1:]), value)
        return torch.cat([x, extra] if side == 'right' else [extra, x])

    ones = [torch.ones(len(embeds), dtype=torch.long) for embeds, _ in rows]
    return dict(
        inputs_embeds=torch.stack([pad(embeds, 0) for embeds, _ in rows]),
        labels=torch.stack([pad(wanted, -100) for _, wanted in rows]),
        attention_mask=torch.stack([pad(one, 0) for one in ones]),
        position_ids=torch.stack([pad(one.cumsum(0) - 1, 0) for one in ones]),
    )


def canvas(image, size, teacher=336, patch=14):
    """The square picture of `size` px as EVE makes it, and the box (left, top, right, bottom) that
    holds the image. The short side's number of patches is rounded up in floating point, as
    there."""
    if size % teacher or teacher % patch:
        raise ValueError(
            f'canvas {size} must be a multiple of teacher {teacher}, that of patch {patch}'
        )
    image = to_rgb(image)
    (width, height), ratio = image.size, size // teacher
    long, short = max(image.size), min(image.size)
    patches = -int(-(teacher * short / long / patch) // 1)
    before, inside = (teacher // patch - patches) // 2 * patch * ratio, patches * patch * ratio
    wide = width > height
    image = resize_as_pillow_13(image, (size, inside) if wide else (inside, size))
    if inside == size:
        return image, (0, 0, size, size)
    square = Image.new('RGB', (size, size), mean_color(ImageTransform().mean))
    corner = (0, before) if wide else (before, 0)
    square.paste(image, corner)
    return square, (*corner, corner[0] + image.width, corner[1] + image.height)


def uncanvas(pixels, patch_stride, conv_stride=2):
    """`[images, 4, S, S]` with EVE's mask last -> `pixel_values` `[images, 3, S, S]`, `image_sizes`
    `[images, 2]`. Of an empty canvas (a row without picture, of which the original embeds a corner
    and throws it away): as many whole windows of `conv_stride` patches as 16 patches a side
    hold."""
    out, sizes, window = torch.zeros_like(pixels[:, :3]), [], patch_stride * conv_stride
    for x, picture in zip(pixels, out):
        mask = x[3] > 0
        rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
        if len(rows):
            top, left, bottom, right = map(
                int, (rows[0], columns[0], rows[-1] + 1, columns[-1] + 1)
            )
        else:
            top, left = 0, 0
            bottom, right = (min(16 * patch_stride, n) // window * window for n in mask.shape)
        picture[:, : bottom - top, : right - left] = x[:3, top:bottom, left:right]
        sizes.append((bottom - top, right - left))
    return out, torch.tensor(sizes)
