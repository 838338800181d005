"""Image folders put together at random: what torchvision's `ImageFolder` would give by our rules, or one line."""

import os
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.datasets import ImageFolder

from placesearch.errors import DataError
from placesearch.training.datasets import inspect_data, load_data
from placesearch.training.folders import SPLIT_NAMES

IN_CI = 150
COUNT = int(os.environ.get("PLACESEARCH_FUZZ", IN_CI))
"""How many trees; more by hand."""

CLASSES = ("cat", "dog", "train", "Owl", "two words", "caf\udce9", "x.jpg")
ORDINARY = st.sampled_from(["rgb", "grey", "palette", "alpha", "upper", "deeper down", "linked"])
PASSED_OVER = ("hidden", "hidden folder", "text", "thumbs", "circle", "pipe")
ODD = st.sampled_from(["deep", "corrupt", "empty", "broken link", "no utf8", *PASSED_OVER])
FILES = st.lists(ORDINARY, min_size=4, max_size=6), st.lists(ODD, max_size=2)
SPLITS = st.one_of(
    st.just(("",)),
    st.tuples(*(st.sampled_from([*names, *map(str.title, names)]) for names in SPLIT_NAMES.values())),
    st.tuples(st.sampled_from(SPLIT_NAMES["train"]), st.sampled_from([*SPLIT_NAMES["validation"], "cat", "train"])),
    st.tuples(st.sampled_from(["", "val", "Testing"]), st.sampled_from(["test", "dev"])),
)


def write(folder, index, kind):
    """Write one file of a kind; return whether something is passed over there."""
    path, shade = folder / f"{index}.png", 20 * index + len(folder.name)
    if kind == "deep":
        Image.fromarray(np.full((5, 6), 400 * index + 300, np.uint16)).save(path)
    elif kind in ("corrupt", "empty"):
        path.write_bytes(b"\x89PNG no more" if kind == "corrupt" else b"")
    elif kind == "hidden":
        (folder / f"._{index}.png").touch()
    elif kind == "hidden folder":
        (folder / ".ipynb_checkpoints").mkdir(exist_ok=True)
    elif kind in ("text", "thumbs"):
        (folder / (f"{index}.txt" if kind == "text" else "Thumbs.db")).touch()
    elif kind == "broken link":
        path.symlink_to(folder / "nowhere.png")
    elif kind == "circle":
        (folder / f"round{index}").symlink_to(folder)
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        mode = {"grey": "L", "palette": "P", "alpha": "RGBA"}.get(kind, "RGB")
        picture = Image.new("RGB", (5, 6), (shade, 0, 255 - shade)).convert(mode)
        if kind == "upper":
            path = folder / f"{index}.PNG"
        elif kind == "no utf8":
            path = folder / f"\udcff{index}.png"
        elif kind == "deeper down":
            path = folder / "more" / f"{index}.png"
            path.parent.mkdir(exist_ok=True)
        elif kind == "linked":
            kept = folder.parent / ".kept"
            kept.mkdir(exist_ok=True)
            path.symlink_to(kept / f"{folder.name}{index}.png")
            path = kept / f"{folder.name}{index}.png"
        picture.save(path)
    return kind in PASSED_OVER


class Filtered(ImageFolder):
    """torchvision's reader, without what is hidden or left behind by systems; a circle of links is not followed."""

    def find_classes(self, directory):
        names = sorted(entry.name for entry in os.scandir(directory) if entry.is_dir() and entry.name[0] != ".")
        return names, {name: index for index, name in enumerate(names)}


def is_image(path):
    file = Path(path)
    passed_over = any(part.startswith((".", "round")) and part != ".kept" for part in file.parts[-3:])
    return file.suffix.lower() == ".png" and not passed_over and (file.is_symlink() or file.is_file())


def read(root):
    """Return what is known of a tree and what is loaded, or what it is refused with."""
    try:
        return inspect_data(root), load_data(root, 8), ""
    except DataError as error:
        return None, None, str(error)


@pytest.mark.slow
@settings(
    max_examples=COUNT,
    deadline=None,
    derandomize=COUNT == IN_CI,
    suppress_health_check=list(HealthCheck),
    database=None,
)
@given(SPLITS, st.lists(st.sampled_from(CLASSES), min_size=1, max_size=3, unique=True), st.data())
def test_a_random_tree_is_what_image_folder_would_give_by_our_rules_or_one_line(splits, classes, data):
    splits = tuple(dict.fromkeys(splits))
    with tempfile.TemporaryDirectory() as name:
        root, passed_over, kinds = Path(name), 0, Counter()
        odd = data.draw(st.booleans())
        for split in splits:
            for label in classes:
                folder = root / split / label
                folder.mkdir(parents=True, exist_ok=True)
                drawn = data.draw(FILES[0]) + (data.draw(FILES[1]) if odd else [])
                for index, kind in enumerate(drawn):
                    passed_over += write(folder, index, kind)
                    kinds[kind] += 1
        info, loaded, refused = read(name)
        if refused:
            assert "\n" not in refused
            refused.encode()
            means = [split for split, names in SPLIT_NAMES.items() for given in splits if given.lower() in names]
            plain = splits == ("",) and len(classes) > 1 and "train" not in classes
            usual = "train" in means and len(set(means)) == len(splits) and len(classes) > 1
            reasons = {"corrupt", "empty", "broken link", "deep"} & set(kinds)
            assert reasons or not (plain or usual), refused
            return
        folders = [root / split for split in splits]
        expected = Counter()
        for folder in folders:
            for path, label in Filtered(str(folder), is_valid_file=is_image).samples:
                expected[(os.path.relpath(path, folder), label)] += 1
        found = sum(len(split.labels) for split in loaded.splits.values())
        assert found == sum(expected.values())
        labels = torch.cat([split.labels for split in loaded.splits.values()])
        by_class = Counter(label for (_, label), count in expected.items() for _ in range(count))
        assert torch.bincount(labels, minlength=len(by_class)).tolist() == [
            by_class[label] for label in sorted(by_class)
        ]
        assert info.classes == loaded.classes
        for text in (*info.classes, *info.notes, *loaded.notes):
            text.encode()
        if passed_over:
            assert any("left out" in note for note in info.notes)
        if kinds["deep"]:
            assert any("more than 8 bits" in note for note in loaded.notes)
        if kinds["alpha"]:
            assert any("transparency" in note for note in loaded.notes)
