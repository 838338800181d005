import itertools
import random
from dataclasses import replace

import pytest

from placesearch.models.architecture import Architecture
from placesearch.placement import BlockSetting, Placement
from placesearch.records import TrialRecord
from placesearch.reporting.picture_tables import (
    AVERAGE_COLUMNS,
    CANDIDATE_COLUMNS,
    HISTORY_COLUMNS,
    averages_frame,
    candidates_frame,
    costs_of,
    history_frame,
    hypervolume,
    picture_tables,
)
from placesearch.reporting.writing import Subject
from placesearch.search.findings import Average, Effect, Findings, Interval

SE, CBAM = BlockSetting("se", 4), BlockSetting("cbam", 4, 3)
SUBJECT = Subject(
    name="drawn",
    objectives=("accuracy", "params"),
    architecture=Architecture(backbone="resnet18", num_classes=10, input_size=(3, 32, 32)),
    facts=(("backbone", "resnet18"), ("versions", "python 3.11")),
    validation_images=100,
    added={"a.0.bn2": {SE: (5, 10), CBAM: (6, 12)}, "b.0.bn2": {SE: (5, 20)}},
    sites={"a.0.bn2": (8, 16, 16), "a.0": (8, 16, 16), "b.0.bn2": (16, 8, 8)},
)


def record(trial, words, accuracy, params, **changes):
    fields = {"state": "COMPLETE", "val_accuracy": accuracy, "params": params, "macs": 100, "epochs": 1, "seed": 0}
    return TrialRecord(trial=trial, placement=Placement.parse(words), **{**fields, **changes})


RECORDS = [
    record(0, "none", 0.80, 100, reference="plain", seconds=30.0),
    record(1, "a.0.bn2=se(r=4) b.0.bn2=se(r=4)", 0.84, 130, reference="se-everywhere", curve=(0.5, 0.7)),
    record(2, "b.0.bn2=se(r=4)", 0.90, 120, seconds=31.5),
    record(3, "a.0.bn2=cbam(r=4,k=3)", None, 112, state="FAIL", error="the loss became nan"),
    record(4, "a.0.bn2=se(r=4)", 0.81, 110),
    record(5, "b.0.bn2=se(r=4)", 0.82, 120, seed=1),
    record(6, "a.0=cbam(r=4,k=3)", 0.30, 112, reference="cbam-after-every-block"),
]
FINDINGS = Findings(
    accuracy={
        Placement.parse(words): Interval(value, value - 0.02, value + 0.02)
        for words, value in (
            ("none", 0.80),
            ("a.0.bn2=se(r=4) b.0.bn2=se(r=4)", 0.87),
            ("b.0.bn2=se(r=4)", 0.85),
            ("a.0.bn2=se(r=4)", 0.79),
            ("a.0=cbam(r=4,k=3)", 0.30),
        )
    },
    effects=(
        Effect("a.0.bn2", SE, 2, Interval(-0.01, -0.03, 0.01)),
        Effect("a.0.bn2", CBAM, 0, Interval(0.0, -0.04, 0.04)),
        Effect("b.0.bn2", SE, 3, Interval(0.05, 0.03, 0.07)),
        Effect("a.0", CBAM, 1, Interval(-0.08, -0.10, -0.06)),
        Effect("a.0.bn2", BlockSetting("se"), 1, Interval(0.02, -0.01, 0.05), "b.0.bn2", "se"),
    ),
    epochs=1,
    noise=0.02,
    lack_of_fit=0.1,
    averages=(
        Average("site", "a.0.bn2", "", Interval(-0.005, -0.03, 0.02)),
        Average("site", "b.0.bn2", "", Interval(0.05, 0.03, 0.07)),
        Average("site", "a.0", "", Interval(-0.08, -0.10, -0.06)),
        Average("block", "", "se", Interval(0.02, 0.01, 0.03)),
        Average("kernel_size", "3", "cbam", Interval(0.0, -0.01, 0.01)),
    ),
)
TABLES = picture_tables(SUBJECT, RECORDS, FINDINGS)


def test_each_placement_is_one_row_with_what_is_known_of_it():
    table = candidates_frame(RECORDS, SUBJECT.objectives, FINDINGS)
    assert list(table.columns) == list(CANDIDATE_COLUMNS)
    assert table.trial.tolist() == [0, 1, 2, 4, 6]
    assert table.on_front.tolist() == [
        True,
        True,
        True,
        False,
        False,
    ]  # 0.80, 0.87 and 0.85; 0.79 costs more than plain
    assert table.replicates.tolist() == [1, 1, 2, 1, 1]
    assert table.reference.fillna("").tolist() == ["plain", "se-everywhere", "", "", "cbam-after-every-block"]
    assert table.estimate_low[2] == pytest.approx(0.83)
    assert table.val_accuracy[2] == 0.90


def test_without_findings_the_front_is_as_observed_and_estimates_are_empty():
    table = candidates_frame(RECORDS, SUBJECT.objectives)
    assert table[table.on_front].trial.tolist() == [0, 2, 4]
    assert table.estimate.isna().all()
    assert picture_tables(SUBJECT, RECORDS).accuracy.tolist() == table.val_accuracy.tolist()


def test_a_placement_is_shown_by_its_longest_trial():
    longer = record(7, "a.0.bn2=se(r=4)", 0.83, 110, epochs=4)
    assert candidates_frame([*RECORDS, longer], SUBJECT.objectives, FINDINGS).trial.tolist() == [0, 1, 2, 7, 6]


def test_the_history_values_placements_at_what_is_expected_of_them_now():
    table = history_frame(RECORDS, SUBJECT.objectives, FINDINGS)
    assert list(table.columns) == list(HISTORY_COLUMNS)
    assert table.trial.tolist() == [0, 1, 2, 4, 5, 6]
    assert set(table.cost) == {"params"}
    # from 0.80 at 100 params up to 130: 0.87 at 130 is at the limit, 0.85 at 120 holds for 10 of 30
    assert table.hypervolume.tolist() == pytest.approx([0, 0, 0.5, 0.5, 0.5, 0.5])
    assert table.gain.tolist() == pytest.approx([0, 0, 0.5 / 30, 0.5 / 30, 0.5 / 30, 0.5 / 30])


def test_each_cost_has_a_history_of_its_own():
    records = [replace(one, macs=100 + one.trial) for one in RECORDS]
    table = history_frame(records, ("accuracy", "macs", "params"), FINDINGS)
    assert table.cost.unique().tolist() == ["macs", "params"]
    assert costs_of(("accuracy", "latency_ms", "macs")) == ["latency_predicted_ms", "macs"]


def test_the_hypervolume_is_the_number_of_squares_below_the_front():
    rng = random.Random(0)
    for _ in range(50):
        points = [(rng.randrange(10), rng.randrange(10)) for _ in range(rng.randrange(6))]
        squares = itertools.product(range(10), range(2, 10))  # costs below 10, accuracies above 2
        covered = sum(any(c <= x and a > y for c, a in points) for x, y in squares)
        assert hypervolume(points, level=2, limit=10) == covered


def test_tables_of_nothing_are_empty():
    for records in ([], [RECORDS[3]]):
        tables = picture_tables(SUBJECT, records)
        assert all(len(table) == 0 for table in (tables.candidates, tables.effects, tables.averages, tables.history))
    assert list(averages_frame(None).columns) == list(AVERAGE_COLUMNS)


def test_averages_are_told_as_they_were_found():
    table = averages_frame(FINDINGS)
    assert len(table) == 5
    row = table[table["of"] == "kernel_size"].iloc[0]
    assert (row.value, row.block, row.effect_low, row.effect_high) == ("3", "cbam", -0.01, 0.01)
    assert not table.isna().to_numpy().any()
