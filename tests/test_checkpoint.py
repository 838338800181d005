import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from placesearch.errors import InputError
from placesearch.training import checkpoint
from placesearch.training.checkpoint import Snapshot, follow, load_snapshot

SNAPSHOT = Snapshot(
    told={"log": [{"epoch": 1, "val_loss": 0.1}], "settings": {"ema": None}},
    weights={"a.weight": torch.randn(3, 2), "steps": torch.tensor(7), "empty": torch.zeros(0)},
    momentum={"a.weight": torch.randn(3, 2).to(torch.bfloat16)},
    average={"a.weight": torch.randn(3, 2)},
    dice={"state": torch.get_rng_state()},
)


def test_a_checkpoint_reads_back_to_the_last_bit(tmp_path):
    SNAPSHOT.save(tmp_path / "c.safetensors")
    read = load_snapshot(tmp_path / "c.safetensors")
    assert read.told == SNAPSHOT.told
    for part in ("weights", "momentum", "average", "dice"):
        was, now = getattr(SNAPSHOT, part), getattr(read, part)
        assert was.keys() == now.keys()
        assert all(torch.equal(was[name], now[name]) and was[name].dtype == now[name].dtype for name in was)
    assert [path.name for path in tmp_path.iterdir()] == ["c.safetensors"]


def cut(content):
    return content[: len(content) - 3]


def flip_a_bit_of_a_weight(content):
    return content[:-1] + bytes([content[-1] ^ 1])


def change_what_is_told(content):
    return content.replace(rb"\"epoch\": 1", rb"\"epoch\": ,")


@pytest.mark.parametrize("damage", [cut, flip_a_bit_of_a_weight, change_what_is_told, lambda _: b"", lambda _: b"yes"])
def test_a_damaged_checkpoint_is_refused_in_one_line(tmp_path, damage):
    path = tmp_path / "c.safetensors"
    SNAPSHOT.save(path)
    changed = damage(path.read_bytes())
    assert changed != path.read_bytes()
    path.write_bytes(changed)
    with pytest.raises(InputError, match=r"c.safetensors is damaged or no checkpoint \(.+\); remove it") as caught:
        load_snapshot(path)
    assert "\n" not in str(caught.value)


def test_other_files_are_no_checkpoints(tmp_path):
    save_file({"weights.a": torch.zeros(1)}, tmp_path / "w.safetensors")
    torch.save({"weights": torch.zeros(1)}, tmp_path / "p.safetensors")
    for name in ("w", "p", "missing"):
        with pytest.raises(InputError, match="damaged or no checkpoint"):
            load_snapshot(tmp_path / f"{name}.safetensors")


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch):
    path = tmp_path / "c.safetensors"
    SNAPSHOT.save(path)
    before = path.read_bytes()

    def full(_, fresh, __):
        fresh.write_bytes(before[:10])
        raise checkpoint.SafetensorError("No space left on device")

    monkeypatch.setattr(checkpoint.safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match="could not be written"):
        SNAPSHOT.save(path)
    assert path.read_bytes() == before


def test_averaged_weights_are_the_exponential_mean():
    """With constant weights w and decay d the average of w0 after n late steps is w + d**n (w0 - w)."""
    average, model = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    average.weight.data.fill_(3.0)
    model.running_mean.fill_(8.0)
    model.num_batches_tracked.fill_(5)
    for step in range(10_000, 10_004):
        follow(average, model, 0.5, step)
    assert average.weight.tolist() == [1 + 0.5**4 * 2] * 2
    assert average.running_mean.tolist() == [8 - 0.5**4 * 8] * 2
    assert average.num_batches_tracked == 5
