"""Images: every odd file is decoded right or refused with a reason; policies equal transformers'
PIL processors."""

import io, json, os, struct, warnings, zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image, ImageFile, ImageOps
from pillow_order import resize_as_pillow_13
from safetensors.torch import load_file
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from vlmbench.data.image import (
    CLIP_MEAN,
    CLIP_STD,
    NEXT_GRID,
    ImageTransform,
    any_aspect_size,
    best_grid,
    from_image_processor,
    native_size,
    pad_to_square,
    to_tensor,
)
from vlmbench.data.picture import (
    ImageError,
    ImageWarning,
    load_image,
    resolve_path,
    to_rgb,
    upright,
)
from vlmbench.data.record import ImageRef

GOLDEN = Path(os.environ.get('VLMBENCH_GOLDEN', Path(__file__).parent / 'golden'))


def noise(w=40, h=30, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8))


def encoded(img, format, **kw):
    out = io.BytesIO()
    img.save(out, format, **kw)
    return out.getvalue()


def png_header(w, h):
    "A PNG that claims w x h pixels and holds none."
    chunk = lambda name, data: (
        struct.pack('>I', len(data)) + name + data + struct.pack('>I', zlib.crc32(name + data))
    )
    return (
        b'\x89PNG\r\n\x1a\n'
        + chunk(b'IHDR', struct.pack('>IIBBBBB', w, h, 8, 2, 0, 0, 0))
        + chunk(b'IDAT', zlib.compress(b''))
        + chunk(b'IEND', b'')
    )


# --- decoding


@pytest.mark.parametrize('format', ['PNG', 'BMP', 'TIFF', 'PPM', 'GIF', 'JPEG', 'WEBP'])
def test_formats(format):
    img = load_image(encoded(noise(), format))
    assert img.mode == 'RGB' and img.size == (40, 30)
    if format in ('PNG', 'BMP', 'TIFF', 'PPM'):
        assert np.array_equal(np.asarray(img), np.asarray(noise()))


def test_sixteen_bit_grey_is_scaled_not_clipped():
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    got = np.asarray(load_image(encoded(Image.fromarray(ramp), 'PNG')))
    assert (
        np.array_equal(got[..., 0], ramp >> 8)
        and got.max() == 255
        and np.array_equal(got[..., 0], got[..., 2])
    )
    assert np.array_equal(
        np.asarray(load_image(encoded(Image.fromarray(ramp), 'TIFF')))[..., 1], ramp >> 8
    )
    for bad in (
        np.full((2, 2), 0.5, np.float32),
        np.full((2, 2), 70_000, np.int32),
        np.full((2, 2), -1, np.int32),
    ):
        with pytest.raises(ImageError, match='pixel range'):
            load_image(encoded(Image.fromarray(bad), 'TIFF'))


def test_cmyk_and_grey_modes():
    cmyk = Image.new('CMYK', (8, 8), (0, 255, 255, 0))
    for format in ('JPEG', 'TIFF'):
        r, g, b = load_image(encoded(cmyk, format)).getpixel((4, 4))
        assert r > 240 and g < 15 and b < 15
    for mode, fill in (('1', 1), ('L', 255), ('LA', (255, 128)), ('HSV', (0, 0, 255))):
        assert to_rgb(Image.new(mode, (2, 2), fill)).getpixel((0, 0)) == (255, 255, 255), mode


def test_palette_with_transparency():
    img = Image.new('P', (2, 1))
    img.putpalette([255, 0, 0, 0, 0, 255])
    img.putdata([0, 1])
    data = encoded(img, 'PNG', transparency=bytes([0, 255]))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert [load_image(data).getpixel((x, 0)) for x in (0, 1)] == [(255, 0, 0), (0, 0, 255)]
        assert [load_image(data, background=(9, 9, 9)).getpixel((x, 0)) for x in (0, 1)] == [
            (9, 9, 9),
            (0, 0, 255),
        ]


@pytest.mark.parametrize('orientation', range(1, 9))
def test_exif_orientation_equals_pillow(orientation):
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(noise(), 'JPEG', exif=exif)
    assert np.array_equal(
        np.asarray(load_image(data)),
        np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data)))),
    )
    assert load_image(data, exif=False).size == (40, 30)


def test_damaged_exif_is_announced():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(noise(), 'JPEG', exif=exif)
    at = data.index(b'Exif\0\0')
    broken = data[: at + 6] + b'\xff' * 12 + data[at + 18 :]
    said = []
    assert load_image(broken, note=said.append).size == (40, 30) and said == [
        'unreadable EXIF, orientation ignored'
    ]


def test_animation_gives_the_first_frame_and_says_so():
    frames = [noise(seed=1), noise(seed=2)]
    for format in ('GIF', 'PNG', 'WEBP', 'TIFF'):
        kw = dict(lossless=True) if format == 'WEBP' else {}
        data = encoded(frames[0], format, save_all=True, append_images=frames[1:], **kw)
        said = []
        img = load_image(data, note=said.append)
        assert len(said) == 1 and 'first frame' in said[0], format
        if format != 'GIF':
            assert np.array_equal(np.asarray(img), np.asarray(frames[0])), format
    with pytest.warns(ImageWarning, match='first frame'):
        load_image(data)


@pytest.mark.parametrize('format', ['PNG', 'JPEG', 'WEBP', 'GIF', 'BMP', 'TIFF'])
def test_truncated(format):
    data = encoded(noise(200, 200), format)
    with pytest.raises(ImageError, match='^(truncated|damaged): embedded picture'):
        load_image(data[: len(data) // 2])


def test_truncation_switch_of_other_libraries_is_announced(monkeypatch):
    monkeypatch.setattr(ImageFile, 'LOAD_TRUNCATED_IMAGES', True)
    said = []
    load_image(encoded(noise(), 'PNG'), note=said.append)
    assert 'LOAD_TRUNCATED_IMAGES' in said[0]


@pytest.mark.parametrize(
    'content, reason',
    [
        (b'', 'empty'),
        (b'\0' * 4096, 'only zeros'),
        (b'<svg xmlns="x"/>', 'SVG'),
        (b'<?xml version="1.0"?><svg/>', 'SVG'),
        (b'%PDF-1.4', 'PDF'),
        (b'  <!DOCTYPE html><title>404', 'HTML'),
        (b'version https://git-lfs.github.com/spec/v1\noid', 'Git LFS'),
        (b'hello', 'first bytes 68 65'),
        (b'%!PS-Adobe-3.0 EPSF-3.0', 'PostScript'),
        (png_header(30_000, 30_000), 'too large'),
        (png_header(9000, 9960), 'too large'),
        (b'PK\3\4', 'zip'),
        (png_header(50, 50), 'truncated|damaged'),
        (png_header(0, 5), 'empty|damaged|not an image'),
    ],
)
def test_refused_with_reason(content, reason, tmp_path):
    with pytest.raises(ImageError, match=reason):
        load_image(content)
    (tmp_path / 'a.jpg').write_bytes(content)
    with pytest.raises(ImageError, match=reason):
        load_image('a.jpg', tmp_path)


def test_pixel_limit_is_local():
    before, data = Image.MAX_IMAGE_PIXELS, encoded(noise(100, 100), 'PNG')
    with pytest.raises(ImageError, match='max_pixels=9,999'):
        load_image(data, max_pixels=9_999)
    assert (
        load_image(data, max_pixels=10_000).size == (100, 100) and Image.MAX_IMAGE_PIXELS == before
    )


def test_places(tmp_path):
    root, out = tmp_path / 'root', tmp_path / 'root-evil'
    root.mkdir()
    out.mkdir()
    (root / 'dir').mkdir()
    noise().save(root / 'a.png')
    noise().save(out / 'b.png')
    os.symlink(out / 'b.png', root / 'link.png')
    os.symlink(out, root / 'linked')
    os.symlink('loop.png', root / 'loop.png')
    os.mkfifo(root / 'pipe.png')
    assert (
        load_image('dir/../a.png', root).size == load_image(root / 'a.png', root).size == (40, 30)
    )
    for bad in (
        '../root-evil/b.png',
        str(out / 'b.png'),
        'link.png',
        'linked/b.png',
        '/etc/passwd',
        'dir/../../root-evil/b.png',
    ):
        with pytest.raises(ImageError, match='outside the root'):
            load_image(bad, root)
        with pytest.raises(ImageError, match='outside the root'):
            ImageRef(bad, str(root)).load()
    for bad, reason in (
        ('none.png', 'missing'),
        ('dir', 'is a folder'),
        ('pipe.png', 'device, pipe'),
        ('loop.png', 'unreadable|missing'),
        ('a.png/x', 'unreadable'),
        ('x' * 5000, 'unreadable'),
        ('a\0.png', 'null character'),
        ('', 'is a folder'),
    ):
        with pytest.raises(ImageError, match=reason):
            load_image(bad, root)
    assert load_image('link.png', (root, out)).size == (
        40,
        30,
    )  # a second root is an explicit permission
    assert resolve_path('/anywhere', None) == Path('/anywhere')


def test_no_file_stays_open(tmp_path):
    noise().save(tmp_path / 'a.png')
    (tmp_path / 'b.png').write_bytes(b'nonsense')
    count = lambda: len(os.listdir('/proc/self/fd'))
    before = count()
    for _ in range(20):
        load_image('a.png', tmp_path)
        with pytest.raises(ImageError):
            load_image('b.png', tmp_path)
    assert count() == before


@given(st.sampled_from(['PNG', 'JPEG', 'GIF', 'WEBP', 'TIFF', 'BMP']), st.data())
@settings(max_examples=80, deadline=None)
def test_any_damage_is_an_image_or_an_image_error(format, data):
    raw = bytearray(encoded(noise(24, 16), format))
    for _ in range(data.draw(st.integers(1, 6))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    raw = bytes(raw[: data.draw(st.integers(0, len(raw)))])
    try:
        img = load_image(raw, max_pixels=10**7, note=lambda what: None)
    except ImageError as e:
        assert ': ' in str(e)
    else:
        assert img.mode == 'RGB' and img.width * img.height <= 10**7


# --- policies equal the PIL processors

sizes = st.tuples(st.integers(1, 90), st.integers(1, 90))


@given(sizes, st.integers(4, 40))
@settings(max_examples=40, deadline=None)
def test_crop_pad_squash_equal_transformers(wh, size):
    img = noise(*wh)
    square = {'height': size, 'width': size}
    short = dict(size={'shortest_edge': size}, crop_size=square)
    for processor in (
        CLIPImageProcessorPil(**short),
        SiglipImageProcessorPil(size=square),
        LlavaImageProcessorPil(do_pad=True, **short),
    ):
        theirs = processor(img, return_tensors='pt')['pixel_values'][0]
        transform = from_image_processor(processor.to_dict())
        (ours,) = transform(img)
        assert torch.equal(ours['pixel_values'], theirs), (type(processor).__name__, transform.mode)
        assert (
            ours['size'] == tuple(theirs.shape[1:]) and ours['pixel_values'].dtype == torch.float32
        )


@given(sizes)
@settings(max_examples=30, deadline=None)
def test_tiles_equal_llava_next(wh):
    grid = [[14, 28], [28, 14], [28, 28], [42, 14], [14, 42]]
    processor = LlavaNextImageProcessorPil(
        size={'shortest_edge': 14}, crop_size={'height': 14, 'width': 14}, image_grid_pinpoints=grid
    )
    theirs = processor(noise(*wh), return_tensors='pt')['pixel_values'][0]
    transform = from_image_processor(processor.to_dict())
    ours = torch.stack([d['pixel_values'] for d in transform(noise(*wh))])
    assert transform.mode == 'tiles' and torch.equal(ours, theirs)


@pytest.mark.parametrize(
    'case', sorted((GOLDEN / 'vip_llava').glob('case_*')), ids=lambda p: p.name
)
def test_golden_llava_preprocessing(case, monkeypatch):
    monkeypatch.setattr(Image.Image, 'resize', resize_as_pillow_13)
    spec = json.loads((case / 'misc.json').read_text())
    tensors = load_file(case / 'preprocess.safetensors')
    policy = {'pad': 'pad', 'resize': 'squash', None: 'crop'}
    for p in spec['preprocess']:
        (ours,) = ImageTransform(
            policy[p['mode']], spec['size'], tuple(spec['mean']), tuple(spec['std'])
        )(load_image(case / p['image']))
        assert (ours['pixel_values'] - tensors[p['key']]).abs().max() < 1e-6, p


def test_golden_black_square():
    tensors = load_file(GOLDEN / 'vora' / 'common' / 'expand2square.safetensors')
    for k in [k for k in tensors if k.startswith('raw')]:
        ours = pad_to_square(Image.fromarray(tensors[k].numpy()), (0, 0, 0))
        assert np.array_equal(np.asarray(ours), tensors[k.replace('raw', 'square')].numpy())


def test_golden_native_and_any_aspect_sizes():
    util = json.loads((GOLDEN / 'vora' / 'common' / 'util.json').read_text())
    for r in util['smart_resize']:
        assert native_size(r['h'], r['w']) == tuple(r['out'])
    for r in util['smart_resize_factor28']:
        assert native_size(r['h'], r['w'], 28) == tuple(r['out'])
    for r in json.loads((GOLDEN / 'eve' / 'common' / 'geometry_real.json').read_text())['rows']:
        left, top, right, bottom = r['valid_box_xyxy']
        w, h = r['size']
        assert any_aspect_size(h, w, r['canvas'], r['canvas'] // 24) == (
            bottom - top,
            right - left,
        ), r


# --- properties


@given(
    st.integers(1, 4000), st.integers(1, 4000), st.sampled_from([(672, 28), (1344, 56), (64, 8)])
)
def test_any_aspect_properties(h, w, setting):
    long, multiple = setting
    H, W = any_aspect_size(h, w, long, multiple)
    assert max(H, W) == long and H % multiple == W % multiple == 0 and min(H, W) >= multiple
    exact = long * min(h, w) / max(h, w)
    assert exact - 1e-6 <= min(H, W) < exact + multiple


@given(
    st.integers(1, 3000),
    st.integers(1, 3000),
    st.sampled_from([14, 28]),
    st.sampled_from([32, 341, 4000]),
)
def test_native_properties(h, w, multiple, patches):
    "Thin sides are enlarged; only an aspect ratio is ever refused."
    budget = patches * multiple**2
    try:
        H, W = native_size(h, w, multiple, 16 * multiple**2, budget)
    except ImageError:
        assert max(h, w) / min(h, w) > 200
    else:
        assert max(h, w) / min(h, w) <= 200
        assert H % multiple == W % multiple == 0 and min(H, W) >= multiple and H * W <= budget


@given(st.integers(1, 2000), st.integers(1, 2000))
def test_best_grid_is_optimal(h, w):
    def kept(g):
        s = min(g[1] / w, g[0] / h)
        return min(int(w * s) * int(h * s), w * h)

    assert kept(best_grid(h, w, NEXT_GRID)) == max(map(kept, NEXT_GRID))


def test_tensor_is_the_formula():
    img = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).convert('RGB')
    expected = (np.asarray(img).astype(np.float64) / 255 - np.array(CLIP_MEAN)) / np.array(CLIP_STD)
    assert np.abs(to_tensor(img).permute(1, 2, 0).numpy() - expected).max() < 1e-5


def test_elongated_pictures_are_refused_before_they_fill_the_memory():
    sliver = Image.new('RGB', (60_000, 1))
    for mode in ('pad', 'crop'):
        with pytest.raises(ImageError, match='too elongated'):
            ImageTransform(mode, 336)(sliver)
    assert ImageTransform('squash', 14)(sliver)[0]['size'] == (14, 14)
    assert ImageTransform('any_aspect', 56, multiple=28)(sliver)[0]['size'] == (28, 56)


# --- the transform object


@given(
    st.sampled_from(['squash', 'pad', 'crop', 'tiles', 'any_aspect', 'native']),
    st.integers(1, 64),
    st.none() | st.tuples(*[st.integers(0, 255)] * 3),
)
def test_transform_survives_json(mode, size, background):
    t = ImageTransform(mode, size, background=background, grid=((size, size * 2),))
    again = ImageTransform.from_dict(json.loads(json.dumps(t.to_dict())))
    assert again == t and hash(again) == hash(t)


def test_transform_refuses_unknown_settings():
    for bad in (
        dict(mode='Squash'),
        dict(resample='cubic'),
        dict(mode='pad', size=(3, 4)),
        dict(mean=(0, 0)),
    ):
        with pytest.raises(ValueError):
            ImageTransform(**bad)
    for config, key in (
        ({'do_resize': False}, 'do_resize'),
        ({'rescale_factor': 1 / 127.5}, 'rescale_factor'),
        ({'resample': 9}, 'resample'),
        ({'size': {'longest_edge': 3}}, 'size'),
        ({'size': {'shortest_edge': 8}, 'do_center_crop': False}, 'do_center_crop'),
        ({'size': {'shortest_edge': 8}, 'do_center_crop': True, 'crop_size': 9}, 'short=8'),
    ):
        with pytest.raises(ValueError, match=key):
            from_image_processor(config)
    plain = from_image_processor({'size': {'height': 8, 'width': 6}, 'do_normalize': False})
    assert (
        plain(noise())[0]['size'] == (8, 6)
        and 0
        <= plain(noise())[0]['pixel_values'].min()
        <= plain(noise())[0]['pixel_values'].max()
        <= 1
    )


def test_vora_preprocessing_is_black_pad_and_clip():
    (ours,) = ImageTransform('pad', 28, background=(0, 0, 0))(noise())
    padded = Image.new('RGB', (40, 40))
    padded.paste(noise(), (0, 5))
    processor = CLIPImageProcessorPil(
        size={'shortest_edge': 28}, crop_size={'height': 28, 'width': 28}
    )
    assert torch.equal(
        ours['pixel_values'], processor(padded, return_tensors='pt')['pixel_values'][0]
    )


# --- orientation


def oriented(format, number, img=None):
    "An encoded picture whose EXIF data has orientation `number`."
    exif = Image.Exif()
    exif[0x0112] = number
    return encoded(
        img or noise(), format, exif=exif, **({'lossless': True} if format == 'WEBP' else {})
    )


def xmp_oriented(number):
    "A PNG that tells its orientation in XMP alone."
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_itxt('XML:com.adobe.xmp', f'<rdf:Description tiff:Orientation="{number}"/>')
    return encoded(noise(), 'PNG', pnginfo=info)


@pytest.mark.parametrize('number', range(1, 9))
@pytest.mark.parametrize('format', ['JPEG', 'PNG', 'WEBP', 'TIFF', 'XMP', 'RGBA', 'P', 'L', 'I;16'])
@pytest.mark.fault('opened-exif')
def test_every_door_gives_the_same_upright_pixels(tmp_path, format, number):
    "Mirrored orientations too, in every mode that is converted; `ImageOps` is the judge."
    if format == 'XMP':
        data = xmp_oriented(number)
    elif format in ('RGBA', 'P', 'L'):
        data = oriented('PNG', number, noise().convert(format))
    elif format == 'I;16':
        grey = np.random.default_rng(0).integers(0, 65536, (30, 40), dtype=np.uint16)
        data = oriented('PNG', number, Image.fromarray(grey))
    else:
        data = oriented(format, number)
    (tmp_path / 'p').write_bytes(data)
    stored = Image.open(io.BytesIO(data))
    stored.load()
    want = np.asarray(to_rgb(ImageOps.exif_transpose(stored)))
    upright_size = (30, 40) if number > 4 else (40, 30)
    opened = Image.open(tmp_path / 'p')
    doors = [
        data,
        bytearray(data),
        tmp_path / 'p',
        str(tmp_path / 'p'),
        ImageRef('p', str(tmp_path)),
        ImageRef('', None, data),
        Image.open(tmp_path / 'p'),
        opened.copy(),
        opened,
    ]
    for door in doors:
        got = load_image(door)
        assert got.size == upright_size and np.array_equal(np.asarray(got), want), door
        again = load_image(got)  # what was turned is not turned twice
        assert np.array_equal(np.asarray(again), want), door
    assert opened.getexif().get(0x0112) == stored.getexif().get(
        0x0112
    )  # the caller's own is left as it was
    assert upright(opened).size == upright_size
    for mode in ('squash', 'pad', 'crop', 'any_aspect', 'native', 'area', 'tiles'):
        transform = ImageTransform(mode, 28, patch=14, min_pixels=1, grid=((28, 56), (56, 28)))
        for a, b in zip(
            transform(Image.open(tmp_path / 'p')), transform(load_image(data)), strict=True
        ):
            assert a['size'] == b['size'] and torch.equal(a['pixel_values'], b['pixel_values'])
        for a, b in zip(transform.resize(opened), transform.resize(upright(opened)), strict=True):
            assert a.size == b.size and a.tobytes() == b.tobytes()
    assert torch.equal(to_tensor(opened), to_tensor(Image.fromarray(want)))


def test_the_stored_orientation_can_be_kept():
    data = oriented('JPEG', 6)
    for door in (data, Image.open(io.BytesIO(data))):
        lying = load_image(door, exif=False)
        assert lying.size == (40, 30) and load_image(lying).size == (40, 30)  # and it stays so


@pytest.mark.parametrize('number', [0, 9, 300, 'x'])
def test_an_orientation_nobody_defined_changes_nothing(number):
    img = noise()
    img.getexif()[0x0112] = number
    assert load_image(img).size == (40, 30)


def test_an_opened_picture_that_is_cut_has_a_reason():
    with pytest.raises(ImageError, match='truncated: picture of 40 x 30 pixels'):
        load_image(Image.open(io.BytesIO(encoded(noise(), 'PNG')[:-1000])))


@pytest.mark.parametrize('what', [None, 3, {}, [], object()])
def test_what_is_no_picture_is_named(what):
    with pytest.raises(ImageError, match=f'{type(what).__name__} is no picture; give'):
        load_image(what)
