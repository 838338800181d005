import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SCRIPT = Path(__file__).parent / "benchmarks" / "placebench.py"
specification = importlib.util.spec_from_file_location("placebench", SCRIPT)
placebench = importlib.util.module_from_spec(specification)
sys.modules["placebench"] = placebench
specification.loader.exec_module(placebench)


def test_there_are_81_different_placements_and_the_first_is_plain():
    placements = [str(placement) for placement in placebench.placements()]
    assert len(set(placements)) == 81
    assert placements[0] == "none"


def test_means_that_differ_without_noise_are_reliable_even_where_seeds_differ():
    effects, seeds = np.array([[0.1], [0.3], [0.2]]), np.array([[0.0, 0.5, 0.2, 0.4]])
    assert placebench.reliability(effects + seeds) == pytest.approx(1)


def test_two_seeds_have_the_reliability_of_cronbachs_alpha():
    scores = np.random.default_rng(1).normal(size=(30, 1)) + np.random.default_rng(2).normal(size=(30, 2))
    covariance = np.cov(scores.T)
    alpha = 2 * (1 - np.trace(covariance) / covariance.sum())
    assert placebench.reliability(scores) == pytest.approx(alpha)


def test_a_torn_last_line_is_left_out(tmp_path):
    (tmp_path / "trainings.jsonl").write_bytes(b'{"seed": 0}\n{"seed"')
    assert placebench.read_log(tmp_path) == [{"seed": 0}]


@pytest.mark.slow
def test_a_killed_table_goes_on_where_it_stopped_and_can_be_exported(tmp_path):
    random = np.random.default_rng(0)
    for split, count in (("train", 20), ("test", 5)):
        for name in "ab":
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                Image.fromarray(random.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    log, tables = tmp_path / "log", tmp_path / "tables"
    folders = ["--log", str(log), "--into", str(tables)]
    trial = ["--data", str(tmp_path / "data"), "--protocol", "5000x12", "--first", "2", "--images", "16"]
    command = [sys.executable, str(SCRIPT), "train", *folders, *trial, "--epochs", "1", "--jobs", "1"]
    path = log / "trainings.jsonl"
    first = subprocess.Popen(command, start_new_session=True)
    while first.poll() is None and not (path.exists() and path.read_bytes().count(b"\n")):
        time.sleep(0.02)
    os.killpg(first.pid, signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL, "it ended before it could be killed"
    kept = path.read_bytes()
    path.write_bytes(kept + b'{"torn')
    subprocess.run(command, check=True)
    lines = path.read_bytes()
    assert lines.startswith(kept)
    keys = [placebench.key_of(json.loads(line)) for line in lines.splitlines()]
    assert len(keys) == len(set(keys)) == 8
    subprocess.run([sys.executable, str(SCRIPT), "export", *folders], check=True)
    written = {file.name: file.read_bytes() for file in tables.iterdir()}
    assert written.keys() == {"trainings.csv", "curves.csv", "correct.csv"}
    path.unlink()
    subprocess.run([sys.executable, str(SCRIPT), "export", *folders], check=True)
    assert {file.name: file.read_bytes() for file in tables.iterdir()} == written
    for row in placebench.read_tables(tables):
        bits = np.unpackbits(np.frombuffer(placebench.base64.b64decode(row["correct"]), np.uint8), count=10)
        assert bits.mean() == pytest.approx(float(row["test_accuracy"]))
