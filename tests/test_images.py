from collections import Counter

import numpy as np
import pytest
from PIL import Image

from placesearch.errors import DataError
from placesearch.training.images import DeepImageError, decoded, notes_on, values_of

SIZE = (3, 8, 8)


def saved(path, array, **options):
    Image.fromarray(array).save(path, **options)
    return path


def shades(low, high, kind):
    return np.linspace(low, high, 64).reshape(8, 8).astype(kind)


@pytest.mark.parametrize(
    ("name", "kind", "high", "top"),
    [
        ("a.png", np.uint16, 60_000, 65_535),
        ("a.tif", np.uint16, 60_000, 65_535),
        ("a.png", np.uint16, 4_000, 4_095),
        ("a.png", np.uint16, 1_000, 1_023),
        ("a.png", np.uint16, 250, 255),
        ("a.tif", np.int32, 1_000_000, 1_000_000),
        ("a.tif", np.float32, 0.9, 1),
        ("a.tif", np.float32, 200, 255),
    ],
)
def test_deep_images_are_scaled_from_the_smallest_depth_that_holds_the_whole_data_set(tmp_path, name, kind, high, top):
    paths = [
        saved(tmp_path / f"dark{name}", shades(0, high / 3, kind)),
        saved(tmp_path / f"light{name}", shades(high / 2, high, kind)),
    ]
    values = values_of(paths)
    assert (values.low, values.high) == (0, top)
    images = decoded(paths, SIZE, values)
    for path, image in zip(paths, images, strict=True):
        expected = np.asarray(Image.open(path), dtype=np.float64) / top * 255
        assert np.abs(image.numpy() - expected[..., None]).max() <= 0.5 + 1e-6
    assert values_of(paths[:1]).high <= values.high


def test_deep_images_with_negative_values_are_scaled_from_the_smallest_to_the_largest(tmp_path):
    paths = [
        saved(tmp_path / "a.tif", shades(-1000, 0, np.int32)),
        saved(tmp_path / "b.tif", shades(0, 3000, np.int32)),
    ]
    values = values_of(paths)
    assert (values.low, values.high) == (-1000, 3000)
    images = decoded(paths, SIZE, values)
    assert images[0].min() == 0
    assert images[1].max() == 255


def test_without_a_range_a_deep_image_is_not_cut_off_but_refused(tmp_path):
    path = saved(tmp_path / "a.png", shades(0, 60_000, np.uint16))
    with pytest.raises(DeepImageError):
        decoded([path], SIZE)


def test_images_of_8_bits_need_no_range(tmp_path):
    assert values_of([saved(tmp_path / "a.png", shades(0, 255, np.uint8))]) is None


def colour16(path):
    """Write a PNG of 16 bits in colour, which Pillow can only read."""
    import struct
    import zlib

    rows = b"".join(b"\0" + struct.pack(">24H", *range(1000, 25_000, 1000)) for _ in range(8))

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )
    return path


def test_what_cannot_be_scaled_is_refused_in_a_line(tmp_path):
    deep = saved(tmp_path / "deep.png", shades(0, 60_000, np.uint16))
    flat = saved(tmp_path / "flat.png", shades(0, 255, np.uint8))
    with pytest.raises(DataError, match=r"deep.png is deeper than .*flat.png; bring all images to one depth"):
        values_of([deep, flat])
    with pytest.raises(DataError, match=r"16 bits a channel, which is not read"):
        values_of([colour16(tmp_path / "colour.png")])
    with pytest.raises(DeepImageError):
        decoded([tmp_path / "colour.png"], SIZE)
    broken = shades(0, 1, np.float32)
    broken[0, 0] = np.nan
    with pytest.raises(DataError, match="no finite numbers"):
        values_of([saved(tmp_path / "nan.tif", broken)])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_upright_and_counted(tmp_path, orientation):
    """The stored pixels are what the camera's sensor saw: undoing the turn by hand gives the scene again."""
    scene = np.zeros((8, 8), np.uint8)
    scene[:4, :4] = 255
    scene[:4, 4:] = 100
    undo = {
        1: lambda a: a,
        2: np.fliplr,
        3: lambda a: np.rot90(a, 2),
        4: np.flipud,
        5: np.transpose,
        6: lambda a: np.rot90(a, 1),
        7: lambda a: np.rot90(np.transpose(a), 2),
        8: lambda a: np.rot90(a, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path / "a.png", np.ascontiguousarray(undo(scene)), exif=exif)
    seen = Counter()
    assert (decoded([path], SIZE, seen=seen)[0, :, :, 0].numpy() == scene).all()
    assert seen["turned"] == (orientation != 1)


def test_what_was_changed_is_told(tmp_path):
    red = np.zeros((8, 8, 4), np.uint8)
    red[..., 0], red[..., 3] = 255, 128
    path = saved(tmp_path / "a.png", red)
    frames = [Image.fromarray(shades(0, 255, np.uint8)) for _ in range(2)]
    frames[0].save(tmp_path / "b.tif", save_all=True, append_images=frames[1:])
    seen = Counter()
    images = decoded([path, tmp_path / "b.tif"], (1, 8, 8), seen=seen)
    assert images.shape == (2, 8, 8, 1)
    assert images[0].unique().tolist() == [76]  # 0.299 * 255
    assert notes_on(seen, 2) == [
        "note: 1 of 2 images with several frames, of which the first is taken",
        "note: 1 of 2 images with transparency, which is left out",
        "note: 1 of 2 images in colour, turned to grey because the input has one channel",
    ]


def test_images_cover_an_input_that_is_no_square(tmp_path):
    array = np.zeros((20, 40, 3), np.uint8)
    array[:, 20:] = 200
    images = decoded([saved(tmp_path / "a.png", array)], (3, 10, 16))
    assert images.shape == (1, 10, 16, 3)
    assert (images[0, :, :6] == 0).all()
    assert (images[0, :, 10:] == 200).all()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB"])
def test_every_mode_is_what_pillow_makes_of_it(tmp_path, mode):
    picture = Image.new("RGB", (8, 8), (200, 100, 50))
    picture = picture.convert("LAB") if mode == "LAB" else picture.convert(mode)
    suffix = "png" if mode in ("1", "L", "LA", "P", "RGB", "RGBA") else "tif"
    picture.save(tmp_path / f"a.{suffix}")
    path = tmp_path / f"a.{suffix}"
    with Image.open(path) as opened:
        expected = np.array(opened.convert("RGB"))
    assert (decoded([path], SIZE)[0].numpy() == expected).all()


def test_a_deep_image_is_found_under_any_suffix(tmp_path):
    path = saved(tmp_path / "a.png", shades(0, 4_000, np.uint16)).rename(tmp_path / "a.jpg")
    assert values_of([path], by_suffix=True) is None
    assert values_of([path]).high == 4095


def test_a_deep_image_that_is_torn_is_named(tmp_path):
    path = saved(tmp_path / "a.png", np.random.default_rng(0).integers(0, 4000, (64, 64)).astype(np.uint16))
    path.write_bytes(path.read_bytes()[:-3000])
    with pytest.raises(DataError, match=r"cannot read image .*a.png"):
        values_of([path])
    assert values_of([path], by_suffix=True) is None
