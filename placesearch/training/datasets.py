"""Data sets: always three splits, brought to one input size; in memory as bytes, or read as needed if they do not fit.

A split that the source lacks is cut from train: stratified, fixed once for all (it does not depend on the study's
seed), a fifth of it and at most 5,000 images.
"""

import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
import torchvision.datasets as tv
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from placesearch.errors import DataError, did_you_mean, reason_of

SPLITS = ("train", "validation", "test")
MEMORY_SHARE = 0.2
"""Share of memory up to which a data set is held there, once for all worker processes on a processor."""

CUT_SHARE, CUT_LIMIT, CUT_SEED = 0.2, 5000, 2026


@dataclass(frozen=True, slots=True)
class Split:
    """Images and their classes.

    Args:
        images: uint8 tensor (n, height, width, 3).
        labels: int64 tensor (n,).
    """

    images: Tensor
    labels: Tensor

    @property
    def side(self) -> int:
        """Height and width of the images in pixels."""
        return self.images.shape[1]

    def take(self, indices: Tensor) -> Tensor:
        """Return images, uint8 (n, height, width, 3), where the split is."""
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
        side: Height and width that the images are brought to, in pixels.
    """

    files: tuple[Path, ...]
    labels: Tensor
    side: int

    def take(self, indices: Tensor) -> Tensor:
        """Read images, several at a time; return them as uint8 (n, height, width, 3) in memory.

        Raises:
            DataError: If a file cannot be read.
        """
        return _decoded([self.files[index] for index in indices.tolist()], self.side)

    def part(self, indices: Tensor) -> "FileSplit":
        """Return a split of some of the images."""
        return FileSplit(tuple(self.files[index] for index in indices.tolist()), self.labels[indices], self.side)

    def on(self, device: torch.device) -> "FileSplit":
        """Return the split with its labels on a device; the images stay in their files."""
        return FileSplit(self.files, self.labels.to(device), self.side)


@dataclass(frozen=True, slots=True)
class Data:
    """A data set at one input size.

    Args:
        splits: `train`, `validation` and `test`.
        classes: Names of the classes, in the order of the labels.
        flip: Whether a mirrored image shows the same class.
    """

    splits: Mapping[str, Split | FileSplit]
    classes: tuple[str, ...]
    flip: bool

    def fingerprint(self) -> str:
        """Return a hash of all images and their classes; of images in files, of names and sizes of the files."""
        digest = hashlib.sha256("\0".join(self.classes).encode())
        for name in SPLITS:
            split = self.splits[name]
            digest.update(f"\0{name} {split.side} ".encode() + split.labels.cpu().numpy().tobytes())
            if isinstance(split, Split):
                digest.update(split.images.cpu().contiguous().numpy().data)
            else:
                for file in split.files:
                    digest.update(f"{file.parent.name}/{file.name} {file.stat().st_size}\0".encode())
        return digest.hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Source:
    """A data set that has a name.

    Args:
        load: Returns images (n, height, width, 3) uint8 and labels for `train` and, where the source has one, `test`.
        classes: Number of classes.
        side: Native side of its images in pixels.
        flip: Whether a mirrored image shows the same class.
    """

    load: Callable[[], dict[str, Split]]
    classes: int
    side: int
    flip: bool


def _digits() -> dict[str, Split]:
    """Scikit-learn's 1,797 handwritten digits, 8x8 in 17 shades, brought to 32x32x3."""
    from sklearn.datasets import load_digits  # here, because it takes 1.5 s and only this data set needs it

    digits = load_digits()
    small = torch.from_numpy(digits.images.astype(np.float32) * (255.0 / 16.0))[:, None]
    images = _resized(small.expand(-1, 3, -1, -1), 32).permute(0, 2, 3, 1).contiguous()
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
    "digits": Source(_digits, classes=10, side=32, flip=False),
    "cifar10": Source(_torchvision("cifar10", tv.CIFAR10), classes=10, side=32, flip=True),
    "cifar100": Source(_torchvision("cifar100", tv.CIFAR100), classes=100, side=32, flip=True),
    "fashion_mnist": Source(_torchvision("fashion_mnist", tv.FashionMNIST), classes=10, side=28, flip=True),
    "mnist": Source(_torchvision("mnist", tv.MNIST), classes=10, side=28, flip=False),
}
"""Every data set by name; everything else is the path of a tree of image folders."""


def inspect_data(spec: str, *, skip_corrupt: bool = False) -> tuple[int, int]:
    """Return the number of classes and the native side of the images, without loading them.

    Args:
        spec: A name in `SOURCES`, or the path of a tree of image folders, for which the side is the shorter one of
            its first image, at most 224.
        skip_corrupt: Whether the first image that can be read will do.

    Raises:
        DataError: If there is no such data set or the folder is unusable.
    """
    if spec in SOURCES:
        return SOURCES[spec].classes, SOURCES[spec].side
    tree = _read_tree(Path(spec))
    for path, _ in tree["train"]:
        try:
            with _opened(path) as image:
                return len(_class_names(Path(spec))), min(*image.size, 224)
        except _CorruptImageError:
            if not skip_corrupt:
                raise
    raise DataError(f"{spec} holds no image that can be read")


def corrupt_images(spec: str) -> tuple[str, ...]:
    """Decode every image of a data set once; return those that cannot be decoded, as `load_data` leaves them out.

    Args:
        spec: A name in `SOURCES`, which has none, or the path of a tree of image folders.

    Raises:
        DataError: If there is no such data set, the folder is unusable, or the system cannot read a file.
    """
    if spec in SOURCES:
        return ()
    files = [path for split in _read_tree(Path(spec)).values() for path, _ in split]

    def is_corrupt(path: Path) -> bool:
        try:
            with _opened(path) as image:
                image.convert("RGB")
        except _CorruptImageError:
            return True
        return False

    with ThreadPoolExecutor() as pool:
        corrupt = [path for path, bad in zip(files, pool.map(is_corrupt, files), strict=True) if bad]
    return tuple(path.relative_to(spec).as_posix() for path in corrupt)


def load_data(spec: str, side: int, skipped: Collection[str] = ()) -> Data:
    """Load a data set with its three splits, at side x side pixels.

    It is held in memory unless it is a tree of image folders that would take more than `MEMORY_SHARE` of it; then each
    batch is read from its files.

    Args:
        spec: A name in `SOURCES`, or the path of a tree of image folders.
        side: Height and width of the input; images of another size are resized (those of folders so that their
            shorter side fits, and cropped in the middle).
        skipped: Files of the tree that are left out, by their paths in it, as `corrupt_images` returns them.

    Raises:
        DataError: If there is no such data set, a file cannot be read, or a class has too few images for three splits.
    """
    if spec in SOURCES:
        source = SOURCES[spec]
        loaded, flip = source.load(), source.flip
        splits: dict[str, Split | FileSplit] = {
            name: Split(_at_side(split.images, side), split.labels) for name, split in loaded.items()
        }
        classes = tuple(str(label) for label in range(source.classes))
    else:
        tree = _read_tree(Path(spec), skipped)
        classes, flip = _class_names(Path(spec)), True
        held = sum(len(files) for files in tree.values()) * side * side * 3 <= MEMORY_SHARE * _memory()
        splits = {}
        for name, files in tree.items():
            paths, labels = tuple(path for path, _ in files), torch.tensor([label for _, label in files])
            splits[name] = Split(_decoded(paths, side), labels) if held else FileSplit(paths, labels, side)
    if len(splits) < len(SPLITS):
        splits = _with_missing_cut(splits, classes)
    return Data({name: splits[name] for name in SPLITS}, classes, flip)


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
    """Cut the splits that are missing from train, from every class the same share of what train had."""
    missing = [name for name in SPLITS if name not in splits]
    labels = splits["train"].labels.numpy()
    share = min(CUT_SHARE, CUT_LIMIT / len(labels))
    random = np.random.default_rng(CUT_SEED)
    part = np.full(len(labels), "train", dtype=object)
    for label, name in enumerate(classes):
        members = random.permutation(np.flatnonzero(labels == label))
        if len(members) <= len(missing):
            raise DataError(
                f"class '{name}' has too few images to cut {' and '.join(missing)} from; {len(members)} found"
            )
        count = max(1, round(share * len(members)))
        for index, split in enumerate(missing):
            part[members[index * count : (index + 1) * count]] = split
    whole = splits["train"]
    cut = {name: whole.part(torch.from_numpy(np.flatnonzero(part == name))) for name in ("train", *missing)}
    return {**splits, **cut}


def _resized(images: Tensor, side: int) -> Tensor:
    """Bring float images (n, 3, height, width) in 0..255 to side x side, rounded to bytes."""
    resized = F.interpolate(images, size=(side, side), mode="bilinear", align_corners=False, antialias=True)
    return resized.round().clamp(0, 255).to(torch.uint8)


def _at_side(images: Tensor, side: int) -> Tensor:
    if images.shape[1:3] == (side, side):
        return images
    parts = [_resized(part.permute(0, 3, 1, 2).float(), side).permute(0, 2, 3, 1) for part in images.split(1024)]
    return torch.cat(parts).contiguous()


def _read_tree(root: Path, skipped: Collection[str] = ()) -> dict[str, list[tuple[Path, int]]]:
    """List files and labels of a tree: train/ and any of val/, test/ with class folders, or class folders alone."""
    if not root.exists():
        known = ", ".join(SOURCES)
        raise DataError(
            f"no data set '{root}'{did_you_mean(str(root), SOURCES)}; known: {known}, or the path of a folder"
        )
    if not root.is_dir():
        raise DataError(f"{root} is no folder; expected class folders, or train/ with class folders")
    names = _class_names(root)
    parts = {"train": root / "train", "validation": root / "val", "test": root / "test"}
    folders = (
        {name: path for name, path in parts.items() if path.is_dir()} if parts["train"].is_dir() else {"train": root}
    )
    tree, left_out = {}, {root / path for path in skipped}
    for split, folder in folders.items():
        strangers = sorted({path.name for path in _folders(folder)} - set(names))
        if strangers:
            raise DataError(f"{folder} has class '{strangers[0]}', which {folders['train']} lacks")
        files = []
        for label, name in enumerate(names):
            images = sorted(
                path for path in (folder / name).rglob("*") if path.suffix.lower() in tv.folder.IMG_EXTENSIONS
            )
            files_of_class = [(path, label) for path in images if path not in left_out]
            if not files_of_class:
                raise DataError(
                    f"class folder {folder / name} holds no images{' that can be decoded' if images else ''}"
                )
            files += files_of_class
        tree[split] = files
    return tree


def _class_names(root: Path) -> tuple[str, ...]:
    folder = root / "train" if (root / "train").is_dir() else root
    names = tuple(sorted(path.name for path in _folders(folder)))
    if len(names) < 2:
        found = f"only '{names[0]}'" if names else "none"
        raise DataError(f"{folder} needs one folder of images for each of two or more classes; found {found}")
    return names


def _folders(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]


def _memory() -> int:
    """Return the bytes of memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


class _CorruptImageError(DataError):
    """A file is no image that can be decoded."""


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """Open an image, to be decoded in the block.

    Raises:
        _CorruptImageError: If it cannot be decoded.
        DataError: If the system cannot read the file.
    """
    try:
        with Image.open(path) as image:
            yield image
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise DataError(f"cannot read image {path}: {error.strerror}") from None
        raise _CorruptImageError(
            f"cannot read image {path}: {reason_of(error)}; restore or remove the file, or leave all such files out of "
            "a new study: --skip-corrupt"
        ) from None


def _decoded(files: Sequence[Path], side: int) -> Tensor:
    """Read images, several at a time, and bring them to side x side pixels."""
    images = torch.empty(len(files), side, side, 3, dtype=torch.uint8)

    def decode(index: int) -> None:
        with _opened(files[index]) as opened:
            image = opened.convert("RGB")
        scale = side / min(image.size)
        if scale != 1:
            image = image.resize([max(side, round(length * scale)) for length in image.size], Image.Resampling.BILINEAR)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        images[index] = torch.from_numpy(np.array(image.crop((left, top, left + side, top + side))))

    with ThreadPoolExecutor() as pool:
        for _ in pool.map(decode, range(len(files))):
            pass
    return images
