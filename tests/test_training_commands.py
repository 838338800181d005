import os
import pty
import select
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from conftest import COMMAND
from safetensors.torch import load_file

TEXT = """\
placesearch: 1
backbone: mine:tiny
num_classes: 10
input_size: [3, 32, 32]
placement:
  - {site: unit1.bn2, block: se, reduction: 2}
"""
TRAIN = ["train", "a.yaml", "--data", "digits", "--batch-size", "64", "--allow", "mine:tiny", "--device", "cpu"]


@pytest.fixture
def file(workplace):
    Path("a.yaml").write_text(TEXT)
    return workplace


def invoke(capsys, monkeypatch, *arguments):
    from placesearch.cli import main

    monkeypatch.setattr("sys.argv", ["placesearch", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    return caught.value.code, *capsys.readouterr()


@pytest.mark.slow
def test_a_training_tells_each_epoch_in_a_line_and_the_test_accuracy_at_the_end(file, capsys, monkeypatch):
    code, out, err = invoke(capsys, monkeypatch, *TRAIN, "--epochs", "2")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "training mine:tiny: unit1.bn2=se(r=2)"
    assert [line.split(":")[0] for line in lines if line.startswith("epoch")] == ["epoch 1/2", "epoch 2/2"]
    assert "done: test accuracy " in out
    assert "reports/a-train/best.safetensors" in out
    assert "\x1b" not in out
    code, out, err = invoke(capsys, monkeypatch, *TRAIN, "--epochs", "2")
    assert (code, err) == (0, "")
    assert out.startswith("done already: test accuracy ")
    assert invoke(capsys, monkeypatch, *TRAIN, "--epochs", "2", "--quiet") == (0, "", "")
    code, out, err = invoke(capsys, monkeypatch, *TRAIN, "--epochs", "3")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "epochs: 2 then, 3 now" in err


@pytest.mark.slow
def test_a_training_that_goes_wrong_ends_with_exit_code_1(file, capsys, monkeypatch):
    Path("a.yaml").write_text(TEXT.replace("tiny", "broken"))
    code, _, err = invoke(capsys, monkeypatch, *TRAIN, "--allow", "mine:broken")
    assert (code, err.count("\n")) == (1, 1)
    assert "the training loss became" in err


def wait_for(process, path):
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_training_that_was_ended_from_outside_goes_on(file, call, start, how):
    command = [*TRAIN, "--epochs", "30"]
    process = start(*command, "--output", "cut")
    wait_for(process, Path("cut/log.csv"))
    time.sleep(0.3)
    process.send_signal(how)
    _, err = process.communicate(timeout=60)
    if how == signal.SIGINT:
        assert process.returncode == 130
        assert err == "placesearch: interrupted; the same command goes on after the last finished epoch\n"
    finished = len(Path("cut/log.csv").read_text().splitlines()) - 1
    assert 1 <= finished < 30
    code, out, err = call(*command, "--output", "cut")
    assert (code, err) == (0, "")
    assert out.count("val. loss") in (30 - finished, 29 - finished)
    assert call(*command, "--output", "whole")[0] == 0
    for name in ("best", "last"):
        cut, whole = load_file(f"cut/{name}.safetensors"), load_file(f"whole/{name}.safetensors")
        assert all(torch.equal(cut[key], whole[key]) for key in whole)


@pytest.mark.slow
def test_a_terminal_sees_how_far_the_epoch_is(file):
    controller, terminal = pty.openpty()
    process = subprocess.Popen(
        [str(COMMAND), *TRAIN, "--epochs", "20"],
        stdout=terminal,
        stderr=terminal,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "120", "NO_COLOR": "1"},
    )
    os.close(terminal)
    seen = b""
    while select.select([controller], [], [], 60)[0]:
        try:
            chunk = os.read(controller, 65536)
        except OSError:  # the other end was closed
            break
        seen += chunk
    os.close(controller)
    assert process.wait(timeout=60) == 0
    text = seen.decode()
    assert "epoch 20/20: val. accuracy" in text
    assert "done: test accuracy" in text
    assert "\x1b[3" not in text  # no colours, as NO_COLOR asks
