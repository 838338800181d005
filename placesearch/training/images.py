"""Images in files: opened, turned upright, brought to bytes and to one size.

An image becomes what torchvision's `ImageFolder` makes of it (Pillow's conversion to RGB, which leaves out
transparency; of several frames the first), with two differences: it is turned as its EXIF orientation says, as every
viewer shows it, and grey images of more than 8 bits are scaled by one range of values for the whole data set instead
of being cut off at 255.
"""

import math
import struct
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from placesearch.errors import DataError, printable, reason_of

_EIGHT_BITS = (".jpg", ".jpeg", ".bmp", ".webp")
"""Suffixes of formats that have no deeper images."""

_DEPTHS = (8, 10, 12, 14, 16)
"""Bits that sensors have."""

_DAMAGED = (
    *(OSError, ValueError, SyntaxError, EOFError, IndexError, KeyError, TypeError, OverflowError, struct.error),
    Image.DecompressionBombError,
)
"""What decoders raise on damaged files."""

_ORIENTATION = 0x0112
"""The tag of the orientation in EXIF; 1 is upright."""


class CorruptImageError(DataError):
    """A file is no image that can be decoded."""


class DeepImageError(DataError):
    """An image has more than 8 bits, and no range of values has been worked out yet."""


@dataclass(frozen=True, slots=True)
class ValueRange:
    """The values of images of more than 8 bits that become 0 and 255.

    Args:
        low: Becomes 0.
        high: Becomes 255.
        note: Where they come from, in a sentence.
    """

    low: float
    high: float
    note: str

    def to_bytes(self, values: np.ndarray) -> np.ndarray:
        """Scale values to 0..255, rounded."""
        scaled = (values.astype(np.float64) - self.low) * (255.0 / (self.high - self.low))
        return np.asarray(scaled.round().clip(0, 255).astype(np.uint8))


@contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """Open an image, to be decoded in the block.

    Raises:
        CorruptImageError: If it cannot be decoded.
        DataError: If the system cannot read the file.
    """
    try:
        with Image.open(path) as image:
            yield image
    except DataError:
        raise
    except _DAMAGED as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise DataError(f"cannot read image {printable(path)}: {error.strerror}") from None
        raise CorruptImageError(
            f"cannot read image {printable(path)}: {printable(reason_of(error))}; restore or remove the file, or leave "
            "all such files out of a new study: --skip-corrupt"
        ) from None


def is_grey(image: Image.Image) -> bool:
    """Tell whether an opened image has one channel, besides transparency."""
    return image.mode in ("1", "L", "LA", "La", "F") or image.mode.startswith("I")


def values_of(files: Sequence[Path], *, by_suffix: bool = False) -> ValueRange | None:
    """Look through a data set for images of more than 8 bits; return the one range by which all of them are scaled.

    Integers from 0 are scaled from the smallest of 8, 10, 12, 14 and 16 bits that holds the largest value of the whole
    data set, so that 12 bits in files of 16 use all shades; larger integers from 0 to the largest one. Decimals within
    0..1 or 0..255 are scaled from that. All others from the smallest to the largest value.

    Args:
        files: All images of the data set.
        by_suffix: Whether formats that have no deeper images are known by their suffix and not opened, and what cannot
            be decoded is passed over until it is met.

    Returns:
        The range, or None if no image has more than 8 bits.

    Raises:
        CorruptImageError: If an image cannot be decoded.
        DataError: If only some images have more than 8 bits, one is in colour with 16 bits a channel, or a value is no
            number.
    """
    possible = [path for path in files if not by_suffix or path.suffix.lower() not in _EIGHT_BITS]
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(lambda path: _extremes(path, skip_corrupt=by_suffix), possible))
    deep = [(path, ends) for path, ends in zip(possible, found, strict=True) if ends is not None]
    if not deep:
        return None
    flat = set(files) - {path for path, _ in deep}
    if flat:
        some = min(flat)
        raise DataError(
            f"images of 8 and of more bits cannot be compared: {printable(deep[0][0])} is deeper than "
            f"{printable(some)}; bring all images to one depth"
        )
    low, high = min(ends[0] for _, ends in deep), max(ends[1] for _, ends in deep)
    whole = all(ends[2] for _, ends in deep)
    told = f"values are {low:g}..{high:g}"
    if whole and low >= 0:
        bits = next((bits for bits in _DEPTHS if high < 2**bits), None)
        low, high = 0.0, 2.0**bits - 1 if bits else high
        return ValueRange(
            low, high, f"{told}, {f'taken for {bits} bits' if bits else 'integers'}: 0..{high:g} become 0..255"
        )
    if not whole and low >= 0 and high <= 255:
        low, high = 0.0, 1.0 if high <= 1 else 255.0
    elif low == high:
        high = low + 1
    return ValueRange(low, high, f"{told}: {low:g}..{high:g} become 0..255")


def decoded(
    files: Sequence[Path],
    size: tuple[int, int, int],
    values: ValueRange | None = None,
    seen: Counter[str] | None = None,
) -> Tensor:
    """Read images, several at a time, and bring them to one size.

    They are resized so that they cover it, and cropped in the middle.

    Args:
        files: One file an image.
        size: Channels (1 or 3), height and width.
        values: The range of values of images of more than 8 bits.
        seen: Where given, counts what was changed: images `turned`, of several `frames`, with `transparency`, in
            `colour` though one channel is asked for.

    Returns:
        uint8 (n, height, width, channels).

    Raises:
        CorruptImageError: If an image cannot be decoded.
        DeepImageError: If an image has more than 8 bits and there is no range of values.
        DataError: If the system cannot read a file.
    """
    channels, height, width = size
    images = torch.empty(len(files), height, width, channels, dtype=torch.uint8)

    def decode(index: int) -> tuple[str, ...]:
        with opened(files[index]) as image:
            picture = _as_bytes(image, files[index], values)
            changes = _changes(image, channels)
            if "turned" in changes:
                picture.getexif()[_ORIENTATION] = image.getexif()[_ORIENTATION]
                picture = ImageOps.exif_transpose(picture)
            if picture.mode == "P" and "transparency" in picture.info:
                picture = picture.convert("RGBA")  # with the same colours, without a warning
            picture = picture.convert("L" if channels == 1 else "RGB")
        scale = max(height / picture.height, width / picture.width)
        if scale != 1:
            lengths = max(width, round(picture.width * scale)), max(height, round(picture.height * scale))
            picture = picture.resize(lengths, Image.Resampling.BILINEAR)
        left, top = (picture.width - width) // 2, (picture.height - height) // 2
        pixels = np.array(picture.crop((left, top, left + width, top + height)))
        images[index] = torch.from_numpy(pixels).reshape(height, width, channels)
        return changes

    with ThreadPoolExecutor() as pool:
        for changes in pool.map(decode, range(len(files))):
            if seen is not None:
                seen.update(changes)
    return images


def _changes(image: Image.Image, channels: int) -> tuple[str, ...]:
    """Name what is changed in an image on its way to bytes."""
    changes = (
        ("turned", image.getexif().get(_ORIENTATION, 1) in range(2, 9)),
        ("frames", getattr(image, "n_frames", 1) > 1),
        ("transparency", image.has_transparency_data),
        ("colour", channels == 1 and not is_grey(image)),
    )
    return tuple(name for name, applies in changes if applies)


def _deep_colour(image: Image.Image) -> bool:
    """Tell whether an image has 16 bits a channel in colour, of which Pillow keeps the upper 8 without a word."""
    tiles = getattr(image, "tile", [])
    return not is_grey(image) and any(";16" in str(part) for tile in tiles for part in _flat(tile[3]))


def _flat(arguments: Any) -> tuple[Any, ...]:
    return arguments if isinstance(arguments, tuple) else (arguments,)


def _is_deep(image: Image.Image) -> bool:
    return image.mode == "F" or image.mode.startswith("I")


def _as_bytes(image: Image.Image, path: Path, values: ValueRange | None) -> Image.Image:
    if not _is_deep(image) and not _deep_colour(image):
        return image
    if values is None:
        raise DeepImageError(f"{printable(path)} has more than 8 bits")
    return Image.fromarray(values.to_bytes(np.asarray(image)))


def _extremes(path: Path, *, skip_corrupt: bool) -> tuple[float, float, bool] | None:
    """Return the smallest and largest value of a deep image, and whether they are integers; None for 8 bits."""
    try:
        with opened(path) as image:
            if _deep_colour(image):
                raise DataError(
                    f"{printable(path)} is in colour with 16 bits a channel, which is not read; convert such images to "
                    "8 bits, by one rule for all of them"
                )
            if not _is_deep(image):
                return None
            values = np.asarray(image)
    except CorruptImageError:
        if not skip_corrupt:
            raise
        return None
    low, high = float(values.min()), float(values.max())
    if not math.isfinite(low) or not math.isfinite(high):
        raise DataError(f"{printable(path)} has values that are no finite numbers; replace them")
    return low, high, values.dtype.kind in "iu"


def corrupt(files: Sequence[Path]) -> list[Path]:
    """Decode images, several at a time; return those that cannot be decoded.

    Raises:
        DataError: If the system cannot read a file.
    """

    def is_corrupt(path: Path) -> bool:
        try:
            with opened(path) as image:
                image.load()
        except CorruptImageError:
            return True
        return False

    with ThreadPoolExecutor() as pool:
        return [path for path, bad in zip(files, pool.map(is_corrupt, files), strict=True) if bad]


def notes_on(seen: Counter[str], number: int) -> list[str]:
    """Say what was changed in images.

    Args:
        seen: What `decoded` counted.
        number: Of how many images.
    """
    said = {
        "turned": "turned upright, as their EXIF orientation says",
        "frames": "with several frames, of which the first is taken",
        "transparency": "with transparency, which is left out",
        "colour": "in colour, turned to grey because the input has one channel",
    }
    return [f"note: {seen[change]:,} of {number:,} images {text}" for change, text in said.items() if seen[change]]
