"""Data sets: always three splits, brought to one input size; in memory as bytes, or read as needed if they do not fit.

A split that the source lacks is cut from train: stratified, fixed once for all (it does not depend on the study's
seed), a fifth of it and at most 5,000 images. Only where the source has train and validation, test is half of that
validation split, so that train stays what its makers meant it to be.
"""

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
import torchvision.datasets as tv
from safetensors import SafetensorError
from torch import Tensor

from placesearch.errors import DataError, did_you_mean, printable, reason_of
from placesearch.training.folders import ImageTree, read_tree
from placesearch.training.images import (
    CorruptImageError,
    DeepImageError,
    ValueRange,
    corrupt,
    decoded,
    is_grey,
    notes_on,
    opened,
    values_of,
)

SPLITS = ("train", "validation", "test")
MEMORY_SHARE = 0.2
"""Share of memory up to which a data set is held there, once for all worker processes on a processor."""

CUT_SHARE, CUT_LIMIT, CUT_SEED = 0.2, 5000, 2026


@dataclass(frozen=True, slots=True)
class Split:
    """Images and their classes.

    Args:
        images: uint8 tensor (n, height, width, channels).
        labels: int64 tensor (n,).
    """

    images: Tensor
    labels: Tensor

    @property
    def size(self) -> tuple[int, int, int]:
        """Channels, height and width of the images."""
        height, width, channels = self.images.shape[1:]
        return channels, height, width

    def take(self, indices: Tensor) -> Tensor:
        """Return images, uint8 (n, height, width, channels), where the split is."""
        return self.images[indices.to(self.images.device)]

    def part(self, indices: Tensor) -> "Split":
        """Return a split of some of the images."""
        return Split(self.images[indices], self.labels[indices])

    def on(self, device: torch.device) -> "Split":
        """Return the split on a device."""
        return Split(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True, slots=True)
class FileSplit:
    """Images in files, for data sets that do not fit into memory, and their classes.

    Args:
        files: One file an image.
        labels: int64 tensor (n,).
        size: Channels, height and width that the images are brought to.
        values: The range of values of images of more than 8 bits.
    """

    files: tuple[Path, ...]
    labels: Tensor
    size: tuple[int, int, int]
    values: ValueRange | None = None

    def take(self, indices: Tensor) -> Tensor:
        """Read images, several at a time; return them as uint8 (n, height, width, channels) in memory.

        Raises:
            DataError: If a file cannot be read.
        """
        return decoded([self.files[index] for index in indices.tolist()], self.size, self.values)

    def part(self, indices: Tensor) -> "FileSplit":
        """Return a split of some of the images."""
        files = tuple(self.files[index] for index in indices.tolist())
        return replace(self, files=files, labels=self.labels[indices])

    def on(self, device: torch.device) -> "FileSplit":
        """Return the split with its labels on a device; the images stay in their files."""
        return replace(self, labels=self.labels.to(device))


@dataclass(frozen=True, slots=True)
class Data:
    """A data set at one input size.

    Args:
        splits: `train`, `validation` and `test`.
        classes: Names of the classes, in the order of the labels.
        flip: Whether a mirrored image shows the same class.
        notes: What was changed or left out on the way, in sentences.
    """

    splits: Mapping[str, Split | FileSplit]
    classes: tuple[str, ...]
    flip: bool
    notes: tuple[str, ...] = ()

    def fingerprint(self) -> str:
        """Return a hash of all images and their classes; of images in files, of names and sizes of the files."""
        digest = hashlib.sha256("\0".join(self.classes).encode())
        for name in SPLITS:
            split = self.splits[name]
            channels, height, width = split.size
            size = str(height) if (channels, height) == (3, width) else f"{channels}x{height}x{width}"
            digest.update(f"\0{name} {size} ".encode() + split.labels.cpu().numpy().tobytes())
            if isinstance(split, Split):
                digest.update(split.images.cpu().contiguous().numpy().data)
            else:
                for file in split.files:
                    name_of = printable(f"{file.parent.name}/{file.name}")
                    digest.update(f"{name_of} {file.stat().st_size}\0".encode())
        return digest.hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Source:
    """A data set that has a name.

    Args:
        load: Returns images (n, height, width, 3) uint8 and labels for `train` and, where the source has one, `test`.
        classes: Number of classes.
        side: Native side of its images in pixels.
        flip: Whether a mirrored image shows the same class.
        grey: Whether its images are grey, with three equal channels.
    """

    load: Callable[[], dict[str, Split]]
    classes: int
    side: int
    flip: bool
    grey: bool


@dataclass(frozen=True, slots=True)
class DataInfo:
    """What is known of a data set before it is loaded.

    Args:
        classes: Names of the classes.
        channels: 1 if its images are grey, as far as the first one tells, else 3.
        side: Native side of its images in pixels.
        counts: Number of images of each split that the source has; empty where only loading tells.
        notes: What was left out or read in another way than it stands there, in sentences.
    """

    classes: tuple[str, ...]
    channels: int
    side: int
    counts: Mapping[str, int]
    notes: tuple[str, ...] = ()


def _digits() -> dict[str, Split]:
    """Scikit-learn's 1,797 handwritten digits, 8x8 in 17 shades, brought to 32x32x3."""
    from sklearn.datasets import load_digits  # here, because it takes 1.5 s and only this data set needs it

    digits = load_digits()
    small = torch.from_numpy(digits.images.astype(np.float32) * (255.0 / 16.0))[:, None]
    images = _resized(small.expand(-1, 3, -1, -1), 32, 32).permute(0, 2, 3, 1).contiguous()
    return {"train": Split(images, torch.from_numpy(digits.target.astype(np.int64)))}


def _torchvision(name: str, dataset: Callable[..., Any]) -> Callable[[], dict[str, Split]]:
    def load() -> dict[str, Split]:
        root = Path(os.environ.get("PLACESEARCH_DATA", Path.home() / ".cache" / "placesearch"))
        splits = {}
        for split in ("train", "test"):
            try:
                loaded = dataset(root=str(root), train=split == "train", download=True)
            except (OSError, RuntimeError) as error:
                raise DataError(
                    f"{name} is not under {root} and could not be downloaded ({reason_of(error)}); set "
                    "PLACESEARCH_DATA to the folder that holds torchvision's copy, or give a folder of images: "
                    "--data PATH"
                ) from None
            images = torch.as_tensor(np.asarray(loaded.data))
            if images.dim() == 3:
                images = images[..., None].expand(-1, -1, -1, 3)
            splits[split] = Split(images.contiguous(), torch.as_tensor(loaded.targets, dtype=torch.int64))
        return splits

    return load


SOURCES: dict[str, Source] = {
    "digits": Source(_digits, classes=10, side=32, flip=False, grey=True),
    "cifar10": Source(_torchvision("cifar10", tv.CIFAR10), classes=10, side=32, flip=True, grey=False),
    "cifar100": Source(_torchvision("cifar100", tv.CIFAR100), classes=100, side=32, flip=True, grey=False),
    "fashion_mnist": Source(_torchvision("fashion_mnist", tv.FashionMNIST), classes=10, side=28, flip=True, grey=True),
    "mnist": Source(_torchvision("mnist", tv.MNIST), classes=10, side=28, flip=False, grey=True),
}
"""Every data set by name; everything else is the path of a tree of image folders."""


def inspect_data(spec: str, *, skip_corrupt: bool = False) -> DataInfo:
    """Look at a data set without loading it.

    Args:
        spec: A name in `SOURCES`, or the path of a tree of image folders, for which the side is the shorter one of
            its first image, at most 224.
        skip_corrupt: Whether the first image that can be read will do.

    Raises:
        DataError: If there is no such data set or the folder is unusable.
    """
    if spec in SOURCES:
        source = SOURCES[spec]
        return DataInfo(_numbered(source.classes), 1 if source.grey else 3, source.side, {})
    tree = _tree(spec)
    for path, _ in tree.files["train"]:
        try:
            with opened(path) as image:
                channels, side = 1 if is_grey(image) else 3, min(*image.size, 224)
        except CorruptImageError:
            if not skip_corrupt:
                raise
            continue
        counts = {name: len(files) for name, files in tree.files.items()}
        return DataInfo(tree.classes, channels, side, counts, tree.notes)
    raise DataError(f"{printable(spec)} holds no image that can be read")


def corrupt_images(spec: str) -> tuple[str, ...]:
    """Decode every image of a data set once; return those that cannot be decoded, as `load_data` leaves them out.

    Args:
        spec: A name in `SOURCES`, which has none, or the path of a tree of image folders.

    Raises:
        DataError: If there is no such data set, the folder is unusable, or the system cannot read a file.
    """
    if spec in SOURCES:
        return ()
    tree = _tree(spec)
    return tuple(tree.name_of(path) for path in corrupt([path for files in tree.files.values() for path, _ in files]))


def load_data(spec: str, size: int | tuple[int, int, int], skipped: Collection[str] = ()) -> Data:
    """Load a data set with its three splits, at one size.

    It is held in memory unless it is a tree of image folders that would take more than `MEMORY_SHARE` of it; then each
    batch is read from its files.

    Args:
        spec: A name in `SOURCES`, or the path of a tree of image folders.
        size: Channels (1 or 3), height and width of the input; a single number stands for a square of three channels.
            Images of another size are resized, those of folders so that they cover it, and cropped in the middle. Grey
            images get three equal channels, colours become their luminance where there is one channel.
        skipped: Files of the tree that are left out, by their paths in it, as `corrupt_images` returns them.

    Raises:
        DataError: If there is no such data set, a file cannot be read, or a class has too few images for three splits.
    """
    size = (3, size, size) if isinstance(size, int) else size
    if size[0] not in (1, 3):
        raise DataError(f"images have 1 channel or 3, not {size[0]}; a network with others needs data of your own")
    notes: list[str] = []
    if spec in SOURCES:
        source = SOURCES[spec]
        loaded, flip, classes = source.load(), source.flip, _numbered(source.classes)
        splits: dict[str, Split | FileSplit] = {
            name: Split(_at_size(split.images, size), split.labels) for name, split in loaded.items()
        }
        if size[0] == 1 and not source.grey:
            notes.append(f"note: the images of {spec} are in colour, turned to grey because the input has one channel")
    else:
        tree = _tree(spec, skipped)
        classes, flip = tree.classes, True
        number = sum(map(len, tree.files.values()))
        if number * math.prod(size) <= MEMORY_SHARE * _memory():
            splits, notes = _held(tree, size)
        else:
            splits, notes = _in_files(tree, size)
    if len(splits) < len(SPLITS):
        if "validation" in splits:
            notes.append("note: there is no test split; half of the validation split is it")
        splits = _with_missing_cut(splits, classes)
    return Data({name: splits[name] for name in SPLITS}, classes, flip, tuple(notes))


def _numbered(classes: int) -> tuple[str, ...]:
    return tuple(str(label) for label in range(classes))


def _tree(spec: str, skipped: Collection[str] = ()) -> ImageTree:
    root = Path(spec).expanduser()
    if not root.exists():
        known = ", ".join(SOURCES)
        raise DataError(
            f"no data set '{printable(spec)}'{did_you_mean(spec, SOURCES)}; known: {known}, or the path of a folder"
        )
    return read_tree(root, skipped)


def _files(tree: ImageTree) -> dict[str, tuple[tuple[Path, ...], Tensor]]:
    """Return for each split its files and their labels."""
    return {
        name: (tuple(path for path, _ in files), torch.tensor([label for _, label in files]))
        for name, files in tree.files.items()
    }


def _held(tree: ImageTree, size: tuple[int, int, int]) -> tuple[dict[str, Split | FileSplit], list[str]]:
    """Decode all images; go through them again by one range of values where they have more than 8 bits."""
    parts, values = _files(tree), None
    while True:
        seen: Counter[str] = Counter()
        try:
            splits = {
                name: Split(decoded(files, size, values, seen), labels) for name, (files, labels) in parts.items()
            }
            break
        except DeepImageError:
            values = values_of([path for files, _ in parts.values() for path in files])
    notes = notes_on(seen, sum(len(files) for files, _ in parts.values()))
    return {**splits}, ([_depth_note(values)] if values else []) + notes


def _in_files(tree: ImageTree, size: tuple[int, int, int]) -> tuple[dict[str, Split | FileSplit], list[str]]:
    parts = _files(tree)
    values = values_of([path for files, _ in parts.values() for path in files], by_suffix=True)
    splits = {name: FileSplit(files, labels, size, values) for name, (files, labels) in parts.items()}
    return {**splits}, [_depth_note(values)] if values else []


def _depth_note(values: ValueRange) -> str:
    return f"note: the images have more than 8 bits; {values.note} in the whole data set"


def share_data(data: Data, path: Path) -> bool:
    """Write images and labels to a file from which other processes map them, so that they are decoded and held once.

    Returns:
        Whether that was done: images that stay in their own files, or a full disk, leave it to each process.
    """
    tensors: dict[str, Tensor] = {}
    for name, split in data.splits.items():
        if not isinstance(split, Split):
            return False
        tensors |= {f"{name}.images": split.images.contiguous(), f"{name}.labels": split.labels.contiguous()}
    try:
        safetensors.torch.save_file(tensors, path, {"classes": json.dumps(data.classes), "flip": json.dumps(data.flip)})
    except (OSError, SafetensorError):
        path.unlink(missing_ok=True)
        return False
    return True


def shared_data(path: Path) -> Data:
    """Map what `share_data` wrote; all processes that do so share its memory.

    Raises:
        DataError: If it cannot be read.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            told = {name: json.loads(text) for name, text in file.metadata().items()}
            parts = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it cannot be iterated over
    except (OSError, SafetensorError) as error:
        raise DataError(f"cannot read {path}: {error}") from None
    splits = {name: Split(parts[f"{name}.images"], parts[f"{name}.labels"]) for name in SPLITS}
    return Data(splits, tuple(told["classes"]), told["flip"])


def _with_missing_cut(splits: dict[str, Split | FileSplit], classes: tuple[str, ...]) -> dict[str, Split | FileSplit]:
    """Cut the splits that are missing from another, from every class the same share of what that had."""
    missing = [name for name in SPLITS if name not in splits]
    source, most = ("validation", 0.5) if "validation" in splits else ("train", CUT_SHARE)
    labels = splits[source].labels.numpy()
    share = min(most, CUT_LIMIT / len(labels))
    random = np.random.default_rng(CUT_SEED)
    part = np.full(len(labels), source, dtype=object)
    for label, name in enumerate(classes):
        members = random.permutation(np.flatnonzero(labels == label))
        if len(members) <= len(missing):
            raise DataError(
                f"class '{name}' has too few images to cut {' and '.join(missing)} from; {len(members)} found"
            )
        count = max(1, round(share * len(members)))
        for index, split in enumerate(missing):
            part[members[index * count : (index + 1) * count]] = split
    whole = splits[source]
    cut = {name: whole.part(torch.from_numpy(np.flatnonzero(part == name))) for name in (source, *missing)}
    return {**splits, **cut}


def _resized(images: Tensor, height: int, width: int) -> Tensor:
    """Bring float images (n, channels, height, width) in 0..255 to another size, rounded to bytes."""
    resized = F.interpolate(images, size=(height, width), mode="bilinear", align_corners=False, antialias=True)
    return resized.round().clamp(0, 255).to(torch.uint8)


def _at_size(images: Tensor, size: tuple[int, int, int]) -> Tensor:
    """Bring images (n, height, width, 3) to other channels, height and width."""
    channels, height, width = size
    if channels == 1:  # luminance by ITU-R 601, as Pillow has it; of three equal channels any of them
        weights = torch.tensor([0.299, 0.587, 0.114])
        parts = [(part.float() @ weights).round().to(torch.uint8)[..., None] for part in images.split(1024)]
        images = torch.cat(parts)
    if images.shape[1:3] == (height, width):
        return images
    parts = [
        _resized(part.permute(0, 3, 1, 2).float(), height, width).permute(0, 2, 3, 1) for part in images.split(1024)
    ]
    return torch.cat(parts).contiguous()


def _memory() -> int:
    """Return the bytes of memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
