"""The order of Pillow 13's two resizing passes, on any Pillow: the vectors were made with it."""

from PIL import Image

_resize = Image.Image.resize


def vertical_first(old, new) -> bool:
    """Pillow 13 shrinks the height first where it loses more than twice the pixels the width does;
    before, never."""
    lost_w, lost_h = old[0] - new[0], old[1] - new[1]
    return lost_h > 0 and lost_h > 2 * lost_w


def resize_as_pillow_13(image, size, resample=None, *args, **kwargs):
    "`Image.resize` in single passes, each of which every Pillow computes alike."
    if args or kwargs:
        raise TypeError('only size and resample are expected here')
    size = tuple(size)
    between = (
        (image.width, size[1]) if vertical_first(image.size, size) else (size[0], image.height)
    )
    return _resize(_resize(image, between, resample), size, resample)
