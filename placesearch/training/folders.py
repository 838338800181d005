"""Image folders: which of a tree's files are images of which class in which split, and what is left out.

A tree is what `torchvision.datasets.ImageFolder` reads: one folder for each class, with images in it and in its
subfolders, also behind symbolic links. Above them there may be one folder for each split.
"""

import os
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS

from placesearch.errors import DataError, printable

SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
"""What the folder of a split may be called, in any case."""

_MEANS = {name: split for split, names in SPLIT_NAMES.items() for name in names}
_OF_SYSTEMS = {"__macosx", "thumbs.db", "desktop.ini"}
"""What operating systems and archives leave behind, besides names that begin with a dot."""


@dataclass(frozen=True, slots=True)
class ImageTree:
    """The images of a tree.

    Args:
        root: Its folder.
        classes: Names of the classes, sorted; what is not UTF-8 in the name of a folder is escaped.
        files: For each split that the tree has, its images and the positions of their classes.
        notes: What was left out or read in another way than it stands there, in sentences.
    """

    root: Path
    classes: tuple[str, ...]
    files: Mapping[str, Sequence[tuple[Path, int]]]
    notes: tuple[str, ...] = ()

    def name_of(self, file: Path) -> str:
        """Return the path of an image within the tree, as text that can be written anywhere."""
        return printable(file.relative_to(self.root).as_posix())


def read_tree(root: Path, skipped: Collection[str] = ()) -> ImageTree:
    """List the images of a tree.

    Rules: a folder that has the name of a split (`SPLIT_NAMES`) and folders in it is that split; so `train/` among
    other folders of images stays a class. Where a folder holds nothing but one folder, that is read instead of it.
    Files and folders whose names begin with a dot or that systems leave behind, files of other types, links in a
    circle and splits without class folders are left out, which the notes say.

    Args:
        root: The folder.
        skipped: Images to leave out, as `ImageTree.name_of` has them.

    Raises:
        DataError: If the folder is not there or cannot be read, holds fewer than two classes, a class holds no images,
            two folders are the same split, or folders of splits stand beside folders of classes.
    """
    if not root.is_dir():
        raise DataError(f"{printable(root)} is no folder; expected class folders, or train/ with class folders")
    left = _LeftOut()
    top = _unpacked(root, left)
    folders = _splits(top, left)
    names = _class_folders(folders["train"])
    if len(names) < 2:
        found = f"only '{printable(names[0])}'" if names else "none"
        raise DataError(
            f"{printable(folders['train'])} needs one folder of images for each of two or more classes; found {found}"
        )
    without = set(skipped)
    files: dict[str, list[tuple[Path, int]]] = {}
    tree = ImageTree(root, tuple(map(printable, names)), files)
    for split, folder in folders.items():
        strangers = sorted(set(_class_folders(folder)) - set(names))
        if strangers:
            raise DataError(
                f"{printable(folder)} has class '{printable(strangers[0])}', which {printable(folders['train'])} lacks"
            )
        left.loose(folder)
        files[split] = []
        for label, name in enumerate(names):
            images = sorted(_images(folder / name, left)) if (folder / name).is_dir() else []
            kept = [path for path in images if not without or tree.name_of(path) not in without]
            if not kept:
                raise DataError(
                    f"class folder {printable(folder / name)} holds no images{' that can be decoded' if images else ''}"
                )
            files[split] += [(path, label) for path in kept]
    return ImageTree(root, tree.classes, files, tuple(left.notes()))


class _LeftOut:
    """What was passed over, for the notes."""

    def __init__(self) -> None:
        self.sentences: list[str] = []
        self.hidden = self.links = self.beside = 0
        self.types: Counter[str] = Counter()

    def loose(self, folder: Path) -> None:
        """Count the images that lie beside the class folders."""
        self.beside += sum(_is_image(entry.name) and entry.is_file() for entry in _entries(folder))

    def notes(self) -> Iterator[str]:
        yield from self.sentences
        parts = []
        if self.hidden:
            parts.append(f"{self.hidden:,} hidden files and folders, or left behind by a system")
        if self.types:
            several = ", ".join(
                f"{count:,} {name}" for name, count in sorted(self.types.items(), key=lambda of: (-of[1], of[0]))[:3]
            )
            more = len(self.types) - 3
            number = sum(self.types.values())
            parts.append(f"{number:,} of other types ({several}{f' and {more} types more' if more > 0 else ''})")
        if self.links:
            parts.append(f"{self.links:,} that are no regular files, or links in a circle")
        if self.beside:
            parts.append(f"{self.beside:,} images beside the class folders")
        if parts:
            yield f"note: left out of the folder: {'; '.join(parts)}"


def _unpacked(root: Path, left: _LeftOut) -> Path:
    """Go down while a folder holds one folder and no images, as archives are often packed."""
    folder = root
    while True:
        inner = _class_folders(folder)
        alone = len(inner) == 1 and not any(_is_image(entry.name) for entry in _entries(folder))
        if not alone or (inner[0].lower() in _MEANS and _class_folders(folder / inner[0])):
            break
        if not _class_folders(folder / inner[0]):
            break
        folder = folder / inner[0]
        if len(folder.parts) - len(root.parts) > 32:
            raise DataError(f"{printable(root)} holds one folder in another without end")
    if folder != root:
        left.sentences.append(f"note: the data are read from {printable(folder)}, the only folder there")
    return folder


def _splits(top: Path, left: _LeftOut) -> dict[str, Path]:
    """Return the folders of splits, or the folder itself as `train` where it holds class folders."""
    folders = _class_folders(top)
    named = [name for name in folders if name.lower() in _MEANS]
    with_classes = [name for name in named if _class_folders(top / name)]
    if not with_classes:
        train = next((name for name in named if _MEANS[name.lower()] == "train"), None)
        if train is not None and len(named) == len(folders):
            raise DataError(f"{printable(top / train)} holds no class folders; expected one for each class")
        return {"train": top}
    splits: dict[str, str] = {}
    for name in sorted(named):
        split = _MEANS[name.lower()]
        if split in splits:
            raise DataError(
                f"{printable(top)} has two folders for one split, '{splits[split]}' and '{name}'; remove one of them"
            )
        splits[split] = name
    for name in sorted(set(folders) - set(named)):
        if next(_images(top / name, _LeftOut()), None) is not None:
            raise DataError(
                f"{printable(top)} mixes splits and classes: '{with_classes[0]}' is a split with class folders, and "
                f"'{printable(name)}' beside it holds images; move one of them away"
            )
        left.sentences.append(f"note: left out: folder '{printable(name)}', which holds no images")
    if "train" not in splits:
        raise DataError(
            f"{printable(top)} has '{with_classes[0]}' but no split to train on; expected a folder train or training"
        )
    if splits["train"] not in with_classes:
        raise DataError(f"{printable(top / splits['train'])} holds no class folders; expected one for each class")
    for split in ("validation", "test"):
        if split in splits and splits[split] not in with_classes:
            images = sum(1 for _ in _images(top / splits[split], _LeftOut()))
            what = f"its {images:,} images lie in no class folders" if images else "it is empty"
            left.sentences.append(f"note: left out: '{splits.pop(split)}', because {what}; {split} is cut from train")
    return {split: top / splits[split] for split in SPLIT_NAMES if split in splits}


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in _OF_SYSTEMS


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMG_EXTENSIONS) and not _is_hidden(name)


def _class_folders(folder: Path) -> list[str]:
    """Return the names of the folders in a folder, sorted, without hidden ones."""
    return sorted(entry.name for entry in _entries(folder) if entry.is_dir() and not _is_hidden(entry.name))


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise DataError(f"cannot read folder {printable(folder)}: {error.strerror}") from None


def _images(folder: Path, left: _LeftOut, within: tuple[str, ...] = ()) -> Iterator[Path]:
    """Yield the images in a folder and its subfolders, also behind links; count what is passed over."""
    real = os.path.realpath(folder)
    if real in within:
        left.links += 1
        return
    for entry in _entries(folder):
        if _is_hidden(entry.name):
            left.hidden += 1
        elif entry.is_dir():
            yield from _images(folder / entry.name, left, (*within, real))
        elif not entry.is_file() and not (
            entry.is_symlink() and _is_image(entry.name)
        ):  # that is missed, not passed over
            left.links += 1
        elif _is_image(entry.name):
            yield folder / entry.name
        else:
            left.types[printable(Path(entry.name).suffix.lower()) or "without a suffix"] += 1
