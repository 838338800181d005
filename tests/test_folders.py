import os
import shutil

import pytest
from PIL import Image

from placesearch.errors import DataError
from placesearch.training.folders import SPLIT_NAMES, read_tree


def image(path, shade=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), (shade, 0, 0)).save(path)


def fill(folder, classes=("cat", "dog"), count=2):
    for name in classes:
        for index in range(count):
            image(folder / name / f"{index}.png", index)


def names(tree):
    return {split: [path.relative_to(tree.root).as_posix() for path, _ in files] for split, files in tree.files.items()}


@pytest.mark.parametrize("writing", [str.lower, str.upper, str.capitalize])
@pytest.mark.parametrize("train", SPLIT_NAMES["train"])
@pytest.mark.parametrize("validation", SPLIT_NAMES["validation"])
def test_splits_have_any_usual_name_in_any_case(tmp_path, writing, train, validation):
    folders = {"train": writing(train), "validation": writing(validation), "test": writing("testing")}
    for index, name in enumerate(folders.values(), 1):
        fill(tmp_path / name, count=index)
    tree = read_tree(tmp_path)
    assert tree.classes == ("cat", "dog")
    assert {split: len(files) for split, files in tree.files.items()} == {"train": 2, "validation": 4, "test": 6}
    assert all(path.parts[-3] == folders[split] for split, files in tree.files.items() for path, _ in files)
    assert tree.notes == ()


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (["train/cat", "train/dog", "val/cat", "val/dog", "valid/cat", "valid/dog"], "two folders for one split"),
        (["train/cat", "train/dog", "Train/cat", "Train/dog"], "two folders for one split, 'Train' and 'train'"),
        (["train/cat", "train/dog", "owl"], "mixes splits and classes: 'train' .* 'owl' beside it"),
        (["test/cat", "test/dog"], "has 'test' but no split to train on"),
        (["val/cat", "val/dog", "test/cat", "test/dog"], "no split to train on"),
        (["train", "test"], "train holds no class folders"),
        (["train/cat"], "two or more classes; found only 'cat'"),
        (["cat"], "two or more classes; found only 'cat'"),
        (["train/cat", "train/dog", "val/cat", "val/dog", "val/owl"], "has class 'owl', which .*train lacks"),
        (["train/cat", "train/dog", "val/cat"], "val/dog holds no images"),
    ],
)
def test_a_tree_that_can_be_read_in_two_ways_or_in_none_is_refused_in_a_line(tmp_path, folders, message):
    for folder in folders:
        image(tmp_path / folder / "0.png")
    with pytest.raises(DataError, match=message) as refused:
        read_tree(tmp_path)
    assert "\n" not in str(refused.value)


def test_a_class_may_have_the_name_of_a_split(tmp_path):
    fill(tmp_path, ("bus", "car", "train"))
    assert read_tree(tmp_path).classes == ("bus", "car", "train")


def test_a_split_without_class_folders_is_left_out_and_told(tmp_path):
    fill(tmp_path / "train")
    for index in range(3):
        image(tmp_path / "test" / f"{index}.jpg")
    (tmp_path / "val").mkdir()
    tree = read_tree(tmp_path)
    assert list(tree.files) == ["train"]
    assert tree.notes == (
        "note: left out: 'val', because it is empty; validation is cut from train",
        "note: left out: 'test', because its 3 images lie in no class folders; test is cut from train",
    )


def test_a_folder_without_images_beside_the_splits_is_left_out_and_told(tmp_path):
    fill(tmp_path / "train")
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "all.json").touch()
    assert read_tree(tmp_path).notes == ("note: left out: folder 'annotations', which holds no images",)


def test_the_only_folder_in_a_folder_is_read_instead_of_it(tmp_path):
    fill(tmp_path / "archive" / "pets" / "train")
    tree = read_tree(tmp_path)
    assert tree.classes == ("cat", "dog")
    assert tree.notes == (f"note: the data are read from {tmp_path / 'archive' / 'pets'}, the only folder there",)


def test_what_is_no_image_is_left_out_and_counted(tmp_path):
    fill(tmp_path)
    for name in (".hidden.png", "._0.png", ".DS_Store", "Thumbs.db"):
        (tmp_path / "cat" / name).touch()
    image(tmp_path / "cat" / ".ipynb_checkpoints" / "0-checkpoint.png")
    image(tmp_path / ".cache" / "0.png")
    image(tmp_path / "__MACOSX" / "0.png")
    for name in ("a.txt", "b.TXT", "c.heic", "LICENSE"):
        (tmp_path / "dog" / name).touch()
    image(tmp_path / "beside.png")
    tree = read_tree(tmp_path)
    assert names(tree) == {"train": ["cat/0.png", "cat/1.png", "dog/0.png", "dog/1.png"]}
    assert tree.notes == (
        "note: left out of the folder: 5 hidden files and folders, or left behind by a system; 4 of other types "
        "(2 .txt, 1 .heic, 1 without a suffix); 1 images beside the class folders",
    )


def test_subfolders_count_whatever_they_are_called_and_links_are_followed_but_not_in_a_circle(tmp_path):
    fill(tmp_path / "tree", count=1)
    image(tmp_path / "tree" / "cat" / "x.jpg" / "deep.PNG")
    image(tmp_path / "elsewhere" / "far.png")
    (tmp_path / "tree" / "dog" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "tree" / "dog" / "round").symlink_to(tmp_path / "tree" / "dog")
    tree = read_tree(tmp_path / "tree")
    assert names(tree) == {"train": ["cat/0.png", "cat/x.jpg/deep.PNG", "dog/0.png", "dog/linked/far.png"]}
    assert tree.notes == ("note: left out of the folder: 1 that are no regular files, or links in a circle",)


def test_a_pipe_is_not_waited_for(tmp_path):
    fill(tmp_path)
    os.mkfifo(tmp_path / "cat" / "pipe.png")
    assert len(read_tree(tmp_path).files["train"]) == 4


def test_names_that_are_not_utf8_are_escaped_in_all_that_is_written(tmp_path):
    fill(tmp_path, ("dog",))
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    shutil.copytree(tmp_path / "dog", os.fsdecode(folder))
    tree = read_tree(tmp_path)
    assert tree.classes == ("caf\\xe9", "dog")
    assert tree.name_of(tree.files["train"][0][0]) == "caf\\xe9/0.png"
    left = read_tree(tmp_path, ["caf\\xe9/0.png"])
    assert [tree.name_of(path) for path, label in left.files["train"] if label == 0] == ["caf\\xe9/1.png"]


def test_a_folder_that_may_not_be_read_is_named(tmp_path):
    fill(tmp_path)
    with pytest.raises(DataError, match=r"nowhere is no folder"):
        read_tree(tmp_path / "nowhere")
