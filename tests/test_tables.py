import math

import pandas as pd

from placesearch.placement import Placement
from placesearch.records import TrialRecord
from placesearch.reporting.tables import front_frame, trials_frame

OBJECTIVES = ("accuracy", "macs", "params")
GOOD = TrialRecord(
    trial=0, state="COMPLETE", placement=Placement(), val_accuracy=0.9, val_loss=0.3, macs=10, params=20, epochs=1,
    seconds=2.5, seed=0, reference="plain", training_seconds=2.0,
)  # fmt: skip
FAILED = TrialRecord(
    trial=1, state="FAIL", placement=Placement.parse("a=se(r=4)"), macs=11, params=21, epochs=1, seed=0, error="nan, so"
)
BETTER = TrialRecord(
    trial=2, state="COMPLETE", placement=Placement.parse("a=cbam(r=4,k=3)"), val_accuracy=0.95, macs=12, params=22
)


def test_the_columns_are_those_of_the_documentation():
    assert list(trials_frame([]).columns)[:13] == (
        [
            "trial",
            "state",
            "placement",
            "val_accuracy",
            "val_loss",
            "macs",
            "params",
            "latency_ms",
            "epochs",
            "seconds",
            "seed",
            "reference",
            "error",
        ]
    )
    assert list(front_frame([], OBJECTIVES).columns)[:10] == (
        [
            "trial",
            "placement",
            "val_accuracy",
            "estimate",
            "estimate_low",
            "estimate_high",
            "replicates",
            "macs",
            "params",
            "latency_ms",
        ]
    )


def test_what_was_not_measured_is_empty_never_zero(tmp_path):
    path = tmp_path / "trials.csv"
    trials_frame([GOOD, FAILED]).to_csv(path, index=False)
    rows = path.read_text().splitlines()
    assert rows[1].rstrip(",") == "0,COMPLETE,none,0.9,0.3,10,20,,1,2.5,0,plain,,2.0"
    assert rows[2].rstrip(",") == '1,FAIL,a=se(r=4),,,11,21,,1,,0,,"nan, so"'
    again = pd.read_csv(path)
    assert math.isnan(again.val_accuracy[1])
    assert again.macs.tolist() == [10, 11]


def test_a_trial_that_was_stopped_shows_where_and_is_never_in_the_front():
    stopped = TrialRecord(
        trial=3, state="PRUNED", placement=Placement.parse("b=se(r=4)"), macs=1, params=1, epochs=5, seed=0,
        curve=(0.25, 0.5), stopped_after=3, forecast=0.99,
    )  # fmt: skip
    row = trials_frame([GOOD, stopped]).loc[1]
    assert (row.state, row.curve, row.stopped_after, row.forecast) == ("PRUNED", "0.25 0.5", 3, 0.99)
    assert math.isnan(row.val_accuracy)
    front = front_frame([GOOD, stopped], OBJECTIVES)
    assert front.trial.tolist() == [0]
    assert not {"curve", "stopped_after", "forecast"} & set(front)


def test_the_front_is_ordered_by_cost_and_counts_replicates():
    again = TrialRecord(
        trial=3, state="COMPLETE", placement=BETTER.placement, val_accuracy=0.8, macs=12, params=22, seed=1
    )
    table = front_frame([BETTER, FAILED, GOOD, again], OBJECTIVES)
    assert table.trial.tolist() == [0, 2]
    assert table.replicates.tolist() == [1, 2]
    assert table.estimate.isna().all()


def test_tables_of_nothing_are_empty():
    assert len(trials_frame([])) == 0
    assert len(front_frame([FAILED], OBJECTIVES)) == 0
