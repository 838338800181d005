"""`benchmarks/faults.py`: a few of its kills, and that it finds what is lost, doubled, differing or left."""

import random
import subprocess
import time
from pathlib import Path

import pandas as pd
import pytest
from benchmarks import faults
from benchmarks.faults import FAULTS, Bench, Found

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/cwd").exists(), reason="looks for processes in Linux's /proc"),
]


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("faults").resolve(), None, 12, random.Random(0))


@pytest.mark.parametrize("fault", ["worker", "parent", "all", "line"])
def test_kills_at_moments_that_were_drawn_cost_a_study_nothing(bench, fault):
    found = FAULTS[fault].try_it(bench, 2)
    assert found.tried == 2
    assert (found.lost, found.doubled, found.differing, found.left) == (0, 0, 0, 0)


@pytest.mark.parametrize("fault", ["command", "server"])
def test_kills_of_who_shares_a_study_and_of_its_database_cost_it_nothing(postgres, tmp_path, fault):
    postgres.create()
    found = FAULTS[fault].try_it(Bench(tmp_path.resolve(), postgres, 12, random.Random(0)), 2)
    assert found.tried == 2
    assert (found.lost, found.doubled, found.differing, found.left) == (0, 0, 0, 0)


def test_whatever_a_fault_would_cost_a_study_is_found(bench, monkeypatch):
    study = bench.study()
    study.end()
    stored, notes = study.stored(), (study.folder / "notes").read_text()
    report = study.folder / "reports" / study.folder.name / "trials.csv"
    whole = pd.read_csv(report, dtype=str, keep_default_na=False)

    def found(trials=whole, held=(), noted=""):
        """What is found if trials.csv and the storage have these trials, and the storage held those before."""
        trials.to_csv(report, index=False)
        (study.folder / "notes").write_text(notes + noted)
        there = [trial for trial in stored if str(trial.number) in set(trials.trial)]
        monkeypatch.setattr(study, "stored", lambda: there)
        study.before, study.lost, seen = dict(held), set(), Found()
        study.add_to(seen, 1, bench.expected)
        return seen

    def other(column, value):
        changed = whole.copy()
        changed.loc[11, column] = value
        return changed

    study.remember()
    before = study.before
    assert found(held=before) == Found(tried=1, studies=1)
    assert found(noted=notes.splitlines(keepends=True)[3]) == Found(tried=1, studies=1, retried=1)
    assert found(whole[:-1], held=before) == Found(tried=1, studies=1, lost=1, differing=1)
    assert found(held=before | {3: (before[3][0], [0.0, 0.0], {})}) == Found(tried=1, studies=1, lost=1)
    assert found(pd.concat([whole, whole[-1:]])).doubled == 1
    assert found(other("placement", whole.placement[1])) == Found(tried=1, studies=1, doubled=1, differing=1)
    assert found(other("val_accuracy", "0.123")) == Found(tried=1, studies=1, differing=1)


def test_a_process_that_is_left_is_found_and_ended(bench, monkeypatch):
    monkeypatch.setattr(faults, "ENDING", 3.0)
    study = bench.study()
    study.end()
    with subprocess.Popen(["sleep", "1000"], cwd=study.folder) as process:
        began = time.monotonic()
        study.see_processes_end()
        assert time.monotonic() - began >= 3
    assert (study.left, process.returncode) == (1, -9)


def test_a_row_takes_the_place_of_the_one_before_and_others_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(faults, "REPORT", tmp_path / "faults.md")
    row = {"fault": "parent", "storage": "journal", **vars(Found(tried=1, retried=7)), "where": "a machine"}
    faults.keep(row)
    faults.keep(row | {"storage": "postgresql"})
    faults.keep(row | {"fault": "worker"})
    faults.keep(row | {"tried": 2})
    table = pd.read_csv(tmp_path / "faults.csv")
    assert table[["fault", "storage", "tried"]].to_numpy().tolist() == [
        ["worker", "journal", 1], ["parent", "postgresql", 1], ["parent", "journal", 2]
    ]  # fmt: skip
    page = (tmp_path / "faults.md").read_text()
    assert "| `kill -9` of the main process | journal | 2 | 0 | 0 | 0 | 7 | 0 | 0 |" in page
