import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from placesearch.training.team import ALONE, Team, gathered, own_device

TORCHRUN = Path(sys.executable).with_name("torchrun")

SCRIPT = """
import sys
import placesearch as ps
from placesearch import earnest
earnest.pick_precision = lambda device: "fp32"  # so that rounding stays below what is compared
architecture = ps.Architecture(
    backbone="mine:" + sys.argv[2], num_classes=10, input_size=(3, 32, 32),
    placement=ps.Placement.parse("unit1.conv2=se(r=2)"),
)
trained = ps.train(architecture, "digits", epochs=3, batch_size=64, learning_rate=0.3, output=sys.argv[1], device="cpu")
"""


def test_shares_of_a_batch_are_its_parts_in_order():
    shares = [Team(rank, 4).share(24, 12) for rank in range(4)]
    assert [index for share in shares for index in range(share.start, share.stop)] == list(range(24, 36))
    assert ALONE.share(24, 12) == slice(24, 36)


def test_a_process_by_itself_waits_for_nobody(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    model = nn.Linear(1, 1)
    with gathered() as team:
        assert team == ALONE
        assert team.joined(model) is model
        assert team.mean(torch.tensor(0.5)) == 0.5
        team.wait()


def test_each_process_has_its_own_gpu_where_there_are_some(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert own_device("auto") == "auto"
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert (own_device("auto"), own_device("cuda"), own_device("cpu")) == ("cuda:1", "cuda:1", "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert own_device("auto") == "auto"


def results(workplace, network, processes):
    Path("script.py").write_text(SCRIPT)
    folder = f"{network}-{processes}"
    start = [str(TORCHRUN), "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else [sys.executable]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(workplace), *sys.path])}
    subprocess.run([*start, "script.py", folder, network], env=environment, check=True, timeout=200)
    return yaml.safe_load(Path(folder, "result.yaml").read_text())


@pytest.mark.slow
def test_two_processes_train_what_one_trains(workplace):
    """Without batch norms to rounding; with them each process has the statistics of its own share alone."""
    one, two = (results(workplace, "normless", processes) for processes in (1, 2))
    assert two["conditions"]["processes"] == 2
    for before, after in zip(one["log"], two["log"], strict=True):
        for name in ("train_loss", "val_loss", "val_accuracy"):
            assert after[name] == pytest.approx(before[name], abs=1e-4)
    assert two["test_loss"] == pytest.approx(one["test_loss"], abs=1e-4)
    assert one["log"][-1]["train_loss"] < one["log"][0]["train_loss"] - 0.05  # something was learned
    one, two = (results(workplace, "tiny", processes) for processes in (1, 2))
    assert two["log"][0]["train_loss"] != one["log"][0]["train_loss"]
    assert two["test_loss"] == pytest.approx(one["test_loss"], abs=0.3)


@pytest.mark.slow
def test_a_batch_that_processes_cannot_share_is_refused(workplace):
    Path("script.py").write_text(SCRIPT.replace("batch_size=64", "batch_size=63"))
    start = [str(TORCHRUN), "--standalone", "--nproc-per-node", "2", "script.py", "out", "tiny"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(workplace), *sys.path])}
    ended = subprocess.run(start, env=environment, check=False, capture_output=True, text=True, timeout=200)
    assert ended.returncode != 0
    assert "a batch of 63 cannot be shared among 2 processes" in ended.stderr
