import gzip
import pickle
import struct
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from sklearn.datasets import load_digits

from placesearch.errors import DataError
from placesearch.training import datasets
from placesearch.training.datasets import (
    SOURCES,
    DataInfo,
    corrupt_images,
    inspect_data,
    load_data,
    share_data,
    shared_data,
)


def grey(level, size=(10, 8)):
    return Image.new("RGB", size, (level, level, level))


def make_tree(root, splits, classes=("cat", "dog"), count=5):
    level = 0
    for split in splits:
        for name in classes:
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                level += 1
                grey(level).save(folder / f"{index}.png")
    return root


def shades(split):
    """The grey level of each image: tells the images of `make_tree` apart."""
    return split.images[:, 0, 0, 0].tolist()


def test_digits_are_the_published_images_split_once_and_stratified():
    data = load_data("digits", 32)
    counts = {name: len(split.labels) for name, split in data.splits.items()}
    assert sum(counts.values()) == 1797
    assert counts["validation"] == counts["test"] == 359
    whole = np.bincount(load_digits().target)
    for split in data.splits.values():
        share = torch.bincount(split.labels) / len(split.labels)
        assert np.allclose(share, whole / whole.sum(), atol=0.01)
    assert data.splits["train"].images.shape[1:] == (32, 32, 3)
    assert data.splits["train"].images.dtype == torch.uint8
    assert not data.flip


def test_no_digit_is_in_two_splits_and_the_split_is_fixed():
    data, again = load_data("digits", 32), load_data("digits", 32)
    seen = {}
    for name, split in data.splits.items():
        assert torch.equal(split.images, again.splits[name].images)
        for image in split.images:
            assert seen.setdefault(image.numpy().tobytes(), name) == name
    assert len(seen) == len({image.tobytes() for image in load_digits().images})


def test_digits_at_another_size_are_the_same_images():
    small, large = load_data("digits", 32).splits["train"], load_data("digits", 64).splits["train"]
    assert large.images.shape[1:3] == (64, 64)
    assert torch.equal(small.labels, large.labels)
    difference = small.images.float().mean((1, 2, 3)) - large.images.float().mean((1, 2, 3))
    assert difference.abs().max() < 2


def test_a_tree_with_all_three_splits_is_taken_as_it_is(tmp_path):
    data = load_data(str(make_tree(tmp_path, ["train", "val", "test"])), 8)
    assert data.classes == ("cat", "dog")
    assert shades(data.splits["train"]) == list(range(1, 11))
    assert shades(data.splits["validation"]) == list(range(11, 21))
    assert shades(data.splits["test"]) == list(range(21, 31))
    assert data.splits["test"].labels.tolist() == [0] * 5 + [1] * 5


def test_a_missing_test_split_is_half_of_a_validation_split(tmp_path):
    data = load_data(str(make_tree(tmp_path, ["train", "val"], count=10)), 8)
    assert shades(data.splits["train"]) == list(range(1, 21))
    assert sorted(shades(data.splits["validation"]) + shades(data.splits["test"])) == list(range(21, 41))
    for name in ("validation", "test"):
        assert torch.bincount(data.splits[name].labels).tolist() == [5, 5]
    assert data.notes == ("note: there is no test split; half of the validation split is it",)


@pytest.mark.parametrize("splits", [["train"], ["train", "test"], ["."]])
def test_a_missing_split_is_cut_from_train_from_every_class(tmp_path, splits):
    data = load_data(str(make_tree(tmp_path, splits, count=10)), 8)
    every = [level for split in data.splits.values() for level in shades(split)]
    assert sorted(every) == list(range(1, 20 * len(splits) + 1))
    missing = {"validation", "test"} - {{"val": "validation"}.get(name, name) for name in splits}
    for name in missing:
        assert torch.bincount(data.splits[name].labels).tolist() == [2, 2]


def test_images_are_resized_by_their_shorter_side_and_cropped_in_the_middle(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for index in range(3):
            picture = Image.new("RGB", (40, 20), "black")
            picture.paste((255, 255, 255), (10, 0, 30, 20))
            picture.save(tmp_path / name / f"{index}.png")
    images = load_data(str(tmp_path), 10).splits["train"].images
    assert images.shape[1:] == (10, 10, 3)
    assert images.float().mean() > 240


@pytest.mark.parametrize("splits", [["train", "val", "test"], ["train"]])
def test_what_does_not_fit_into_memory_is_read_from_its_files_and_is_the_same(tmp_path, monkeypatch, splits):
    make_tree(tmp_path, splits, count=10)
    held = load_data(str(tmp_path), 8)
    monkeypatch.setattr(datasets, "MEMORY_SHARE", 0)
    read = load_data(str(tmp_path), 8)
    for name in datasets.SPLITS:
        one, two = held.splits[name], read.splits[name]
        assert isinstance(two, datasets.FileSplit)
        assert one.size == two.size == (3, 8, 8)
        assert torch.equal(one.labels, two.labels)
        order = torch.randperm(len(one.labels))
        assert torch.equal(one.take(order), two.take(order))


def test_a_file_that_breaks_later_is_named_when_it_is_read(tmp_path, monkeypatch):
    make_tree(tmp_path, ["train"], count=10)
    monkeypatch.setattr(datasets, "MEMORY_SHARE", 0)
    split = load_data(str(tmp_path), 8).splits["train"]
    split.files[3].write_bytes(b"no image")
    split.take(torch.tensor([0, 1, 2]))
    with pytest.raises(DataError, match=split.files[3].name):
        split.take(torch.tensor([2, 3]))


def damaged(path, how):
    """Damage an image file."""
    whole = path.read_bytes()
    path.write_bytes({"empty": b"", "text": b"no picture", "torn": whole[: len(whole) // 2]}[how])
    return path


def read_all(spec):
    for split in load_data(spec, 8).splits.values():
        split.take(torch.arange(len(split.labels)))


@pytest.mark.parametrize("how", ["empty", "text", "torn"])
def test_a_corrupt_image_is_named_and_refused_with_what_to_do(tmp_path, monkeypatch, how):
    make_tree(tmp_path, ["train"], count=10)
    read_all(str(tmp_path))
    bad = damaged(tmp_path / "train" / "dog" / "3.png", how)
    for share in (0.2, 0):
        monkeypatch.setattr(datasets, "MEMORY_SHARE", share)
        with pytest.raises(
            DataError, match=r"dog/3.png: .*; restore or remove the file, or .*--skip-corrupt"
        ) as caught:
            read_all(str(tmp_path))
        assert str(bad) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_an_image_of_too_many_pixels_is_corrupt(tmp_path, monkeypatch):
    make_tree(tmp_path, ["train"], count=10)
    grey(0, (40, 40)).save(tmp_path / "train" / "cat" / "bomb.png")
    assert corrupt_images(str(tmp_path)) == ()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 700)  # more than twice as many are refused, some more are warned of
    assert corrupt_images(str(tmp_path)) == ("train/cat/bomb.png",)


@pytest.mark.parametrize("splits", [["train", "val", "test"], ["train"], ["."]])
@pytest.mark.parametrize("share", [0.2, 0])
def test_corrupt_images_are_found_and_what_is_left_is_the_tree_without_them(tmp_path, monkeypatch, splits, share):
    monkeypatch.setattr(datasets, "MEMORY_SHARE", share)
    make_tree(tmp_path / "tree", splits, count=10)
    bad = [damaged(tmp_path / "tree" / splits[-1] / name, "torn") for name in ("cat/0.png", "dog/7.png")]
    found = corrupt_images(str(tmp_path / "tree"))
    assert list(found) == [path.relative_to(tmp_path / "tree").as_posix() for path in bad]
    left = load_data(str(tmp_path / "tree"), 8, found)
    for path in bad:
        path.unlink()
    expected = load_data(str(tmp_path / "tree"), 8)
    for name in datasets.SPLITS:
        every = torch.arange(len(expected.splits[name].labels))
        assert torch.equal(left.splits[name].labels, expected.splits[name].labels)
        assert torch.equal(left.splits[name].take(every), expected.splits[name].take(every))


def test_a_data_set_that_has_a_name_has_no_corrupt_images():
    assert corrupt_images("digits") == ()


def test_what_the_system_cannot_read_is_not_corrupt_but_refused(tmp_path):
    make_tree(tmp_path, ["train"], count=10)
    (tmp_path / "train" / "cat" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(DataError, match=r"cannot read image .*gone.png: No such file or directory$"):
        corrupt_images(str(tmp_path))


def test_a_class_of_corrupt_images_alone_is_refused(tmp_path):
    make_tree(tmp_path, ["train"], count=4)
    for path in (tmp_path / "train" / "cat").iterdir():
        damaged(path, "torn")
    with pytest.raises(DataError, match="cat holds no images that can be decoded"):
        load_data(str(tmp_path), 8, corrupt_images(str(tmp_path)))


def test_the_native_side_is_that_of_the_first_image_that_is_not_corrupt_if_so_asked(tmp_path):
    make_tree(tmp_path, ["train"])
    damaged(tmp_path / "train" / "cat" / "0.png", "text")
    with pytest.raises(DataError, match=r"cannot read image .*0.png"):
        inspect_data(str(tmp_path))
    assert inspect_data(str(tmp_path), skip_corrupt=True).side == 8
    for path in (tmp_path / "train").rglob("*.png"):
        damaged(path, "text")
    with pytest.raises(DataError, match="holds no image that can be read"):
        inspect_data(str(tmp_path), skip_corrupt=True)


def test_the_native_side_is_known_without_loading(tmp_path):
    digits, cifar = inspect_data("digits"), inspect_data("cifar100")
    assert (len(digits.classes), digits.channels, digits.side) == (10, 1, 32)
    assert (len(cifar.classes), cifar.channels, cifar.side) == (100, 3, 32)
    tree = inspect_data(str(make_tree(tmp_path, ["train"], count=3)))
    assert tree == DataInfo(("cat", "dog"), 3, 8, {"train": 6})


@pytest.mark.parametrize("spec", ["cifra10", "no/such/folder"])
def test_an_unknown_data_set_gets_one_line(spec):
    for reading in (lambda: inspect_data(spec), lambda: load_data(spec, 32)):
        with pytest.raises(DataError, match="known: digits") as caught:
            reading()
        assert "\n" not in str(caught.value)


def test_unusable_folders_get_one_line(tmp_path):
    def refused(says):
        with pytest.raises(DataError, match=says) as caught:
            load_data(str(tmp_path), 8)
        assert "\n" not in str(caught.value)

    refused("two or more classes; found none")
    (tmp_path / "cat").mkdir()
    grey(1).save(tmp_path / "cat" / "1.png")
    refused("found only 'cat'")
    (tmp_path / "dog").mkdir()
    refused("dog holds no images")
    for index in range(4):
        grey(index).save(tmp_path / "dog" / f"{index}.png")
    refused("class 'cat' has too few images")
    for index in range(4):
        grey(index).save(tmp_path / "cat" / f"{index}.png")
    load_data(str(tmp_path), 8)
    (tmp_path / "cat" / "0.png").write_bytes(b"no picture")
    refused("cannot read image .*0.png")


def test_a_class_that_train_lacks_is_refused(tmp_path):
    make_tree(tmp_path, ["train"])
    make_tree(tmp_path, ["test"], classes=("cat", "dog", "owl"))
    with pytest.raises(DataError, match="'owl'"):
        load_data(str(tmp_path), 8)


def write_cifar10(root, per_batch):
    """Write a CIFAR-10 of a few random images, in the format of its authors."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for name in [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]:
        batch = {
            "data": random.integers(0, 256, (per_batch, 3072), dtype=np.uint8),
            "labels": [index % 10 for index in range(per_batch)],
        }
        (folder / name).write_bytes(pickle.dumps(batch))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [str(label) for label in range(10)]}))


def test_a_local_copy_of_cifar10_is_read_by_torchvision(tmp_path, monkeypatch):
    monkeypatch.setenv("PLACESEARCH_DATA", str(tmp_path))
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *_: True)
    write_cifar10(tmp_path, per_batch=40)
    data = load_data("cifar10", 32)
    assert {name: len(split.labels) for name, split in data.splits.items()} == {
        "train": 160, "validation": 40, "test": 40
    }  # fmt: skip
    first = pickle.loads((tmp_path / "cifar-10-batches-py" / "test_batch").read_bytes())  # noqa: S301 - made right here
    assert data.splits["test"].images[0, 0, 0].tolist() == first["data"][0].reshape(3, 32, 32)[:, 0, 0].tolist()


def test_the_download_goes_through_torchvision(tmp_path, monkeypatch, serve):
    """torchvision's own download and unpacking, from a server on this machine instead of the authors'."""
    write_cifar10(tmp_path / "source", per_batch=10)
    archive = tmp_path / "cifar.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "source" / "cifar-10-batches-py", "cifar-10-batches-py")
    monkeypatch.setenv("PLACESEARCH_DATA", str(tmp_path / "data"))
    kind = torchvision.datasets.CIFAR10
    monkeypatch.setattr(kind, "url", f"{serve(tmp_path)}/{archive.name}")
    monkeypatch.setattr(kind, "filename", archive.name)
    monkeypatch.setattr(kind, "tgz_md5", None)
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": None})
    for name in ("train_list", "test_list"):
        monkeypatch.setattr(kind, name, [[file, None] for file, _ in getattr(kind, name)])
    assert len(load_data("cifar10", 32).splits["test"].labels) == 10
    assert (tmp_path / "data" / "cifar-10-batches-py" / "test_batch").exists()


@pytest.fixture
def serve():
    """Serve a folder over HTTP on this machine and return its address."""
    running = []

    def begin(folder):
        handler = partial(SimpleHTTPRequestHandler, directory=str(folder))
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        running.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}"

    yield begin
    for server in running:
        server.shutdown()
        server.server_close()


def test_a_grey_data_set_becomes_rgb(tmp_path, monkeypatch):
    monkeypatch.setenv("PLACESEARCH_DATA", str(tmp_path))
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    random = np.random.default_rng(0)
    for part, count in (("train", 50), ("t10k", 20)):
        pixels = random.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        images = raw / f"{part}-images-idx3-ubyte"
        images.write_bytes(struct.pack(">IIII", 2051, count, 28, 28) + pixels.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, count) + labels.tobytes())
        (raw / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(b""))
    data = load_data("fashion_mnist", 28)
    assert data.splits["test"].images.shape == (20, 28, 28, 3)
    assert torch.equal(data.splits["test"].images[..., 0], data.splits["test"].images[..., 2])
    assert (
        data.splits["test"].images[0, :, :, 1].numpy().tobytes()
        == (raw / "t10k-images-idx3-ubyte").read_bytes()[16:800]
    )


def test_without_a_network_one_line_says_how_to_point_at_a_copy(tmp_path, monkeypatch):
    monkeypatch.setenv("PLACESEARCH_DATA", str(tmp_path))
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", "http://127.0.0.1:9/nothing-listens-here.tar.gz")
    with pytest.raises(DataError, match="PLACESEARCH_DATA") as caught:
        load_data("cifar10", 32)
    assert "--data PATH" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_named_source_tells_its_classes_and_side():
    assert all(source.classes >= 10 and source.side >= 28 for source in SOURCES.values())


def test_whether_a_tree_fits_depends_on_the_memory_of_the_machine(tmp_path, monkeypatch):
    make_tree(tmp_path, ["train"])
    assert isinstance(load_data(str(tmp_path), 8).splits["train"], datasets.Split)
    monkeypatch.setattr("os.sysconf", lambda name: 10)
    assert isinstance(load_data(str(tmp_path), 8).splits["train"], datasets.FileSplit)


def test_shared_data_are_the_same_data(tmp_path):
    data = load_data(str(make_tree(tmp_path / "tree", ["train", "val", "test"])), 8)
    assert share_data(data, tmp_path / "data")
    mapped = shared_data(tmp_path / "data")
    assert (mapped.classes, mapped.flip, list(mapped.splits)) == (data.classes, data.flip, list(data.splits))
    for name, split in data.splits.items():
        assert torch.equal(mapped.splits[name].images, split.images)
        assert torch.equal(mapped.splits[name].labels, split.labels)


def test_images_that_stay_in_their_files_and_a_full_disk_are_shared_by_nobody(tmp_path, monkeypatch):
    tree = str(make_tree(tmp_path / "tree", ["train", "val", "test"]))
    assert not share_data(load_data(tree, 8), tmp_path / "nowhere" / "data")
    monkeypatch.setattr(datasets, "MEMORY_SHARE", 0.0)
    assert not share_data(load_data(tree, 8), tmp_path / "data")
    assert [path.name for path in tmp_path.iterdir()] == ["tree"]


def test_damaged_shared_data_are_refused_in_one_line(tmp_path):
    (tmp_path / "data").write_bytes(b"x" * 100)
    with pytest.raises(DataError, match="cannot read"):
        shared_data(tmp_path / "data")


@pytest.mark.parametrize("share", [datasets.MEMORY_SHARE, 0])
def test_deep_images_are_scaled_by_one_rule_that_is_told_in_memory_and_in_files(tmp_path, monkeypatch, share):
    monkeypatch.setattr(datasets, "MEMORY_SHARE", share)
    for name, level in (("dark", 600), ("light", 3400)):
        (tmp_path / name).mkdir()
        for index in range(6):
            Image.fromarray(np.full((8, 8), level + index, np.uint16)).save(tmp_path / name / f"{index}.png")
    data = load_data(str(tmp_path), 8)
    images = data.splits["train"].take(torch.arange(len(data.splits["train"].labels)))
    for label, level in ((0, 600), (1, 3400)):
        of_class = images[data.splits["train"].labels == label].float()
        assert abs(float(of_class.mean()) - level / 4095 * 255) < 1
    assert data.notes == (
        "note: the images have more than 8 bits; values are 600..3405, taken for 12 bits: 0..4095 become 0..255 in the "
        "whole data set",
    )


def test_images_of_one_channel_stay_so_if_asked_and_need_not_be_square(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for index in range(3):
            Image.new("L", (40, 20), 100 + index).save(tmp_path / name / f"{index}.png")
    assert inspect_data(str(tmp_path)).channels == 1
    split = load_data(str(tmp_path), (1, 10, 16)).splits["train"]
    assert split.size == (1, 10, 16)
    assert split.images.shape[1:] == (10, 16, 1)
    digits = load_data("digits", (1, 32, 32)).splits["train"].images
    assert torch.equal(digits.expand(-1, -1, -1, 3), load_data("digits", 32).splits["train"].images)
    with pytest.raises(DataError, match="1 channel or 3, not 2"):
        load_data("digits", (2, 8, 8))
