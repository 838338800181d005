from placesearch.placement import Placement
from placesearch.records import TrialRecord
from placesearch.reporting.tables import VERDICT_COLUMNS, confirmed_frame, verdict_frame
from placesearch.reporting.verdict_section import verdict_section, verdict_text
from placesearch.reporting.writing import pick, write_report
from placesearch.verdict.verdicts import judge

from test_verdicts import MEMBER, PLAIN, trainings  # isort: skip
from test_writing import SUBJECT  # isort: skip

RECORDS = [
    TrialRecord(trial=0, state="COMPLETE", placement=Placement(), val_accuracy=0.7, macs=10, params=20, epochs=1),
    TrialRecord(
        trial=1, state="COMPLETE", placement=Placement.parse(MEMBER), val_accuracy=0.9, macs=11, params=21, epochs=1
    ),
]
BETTER = [0.90, 0.921, 0.909, 0.892, 0.90]
UNCLEAR = [0.85, 0.77, 0.83, 0.80, 0.79]


def test_verdict_csv_has_the_columns_of_the_documentation_and_what_the_search_promised():
    confirmed = judge([*PLAIN, *trainings(BETTER, text=MEMBER)])
    frame = verdict_frame(confirmed, RECORDS, None, {Placement.parse(MEMBER)})
    assert list(frame.columns)[:8] == [
        "placement", "against", "seeds", "difference", "difference_low", "difference_high", "p_value", "verdict"
    ]  # fmt: skip
    (row,) = frame.to_dict("records")
    assert (row["placement"], row["against"], row["seeds"], row["verdict"]) == (MEMBER, "plain", 5, "better")
    assert round(row["search_observed"], 6) == 0.2
    assert row["difference_low"] < row["difference"] < row["difference_high"]
    assert row["on_front"]
    assert verdict_frame(None, RECORDS, None, set()).columns.tolist() == list(VERDICT_COLUMNS)
    assert confirmed_frame(confirmed).test_accuracy.tolist() == [one.accuracy for one in PLAIN] + BETTER


def test_no_difference_comes_with_the_largest_gain_that_is_still_possible():
    (one,) = judge([*PLAIN, *trainings(UNCLEAR, text=MEMBER)]).verdicts
    assert verdict_text(one) == f"no difference shown; at most {100 * one.high:+.2f} points"
    (one,) = judge([*PLAIN[:1], *trainings([0.9], text=MEMBER)]).verdicts
    assert verdict_text(one) == "no difference shown: fewer than two seeds"
    (one,) = judge([*trainings([0.5] * 5, name="plain"), *trainings([0.6] * 5, text=MEMBER)]).verdicts
    assert "nothing to test" in verdict_text(one)


def test_the_section_tells_what_left_the_front_what_is_new_there_and_what_was_promised():
    confirmed = judge([*PLAIN, *trainings(UNCLEAR, text=MEMBER)])
    text = "\n".join(verdict_section(confirmed, RECORDS, None, {Placement.parse("b=se(r=2)")}))
    assert f"No longer on the front: `{MEMBER}`." in text
    assert "On the front, but not confirmed yet: `b=se(r=2)`." in text
    assert f"| `{MEMBER}` | +20.00 |  | +0.40 (" in text
    assert "There is no bigger plain network" in text
    bigger = trainings([0.6, 0.7], name="bigger-plain", backbone="resnet18[3,2,2,2]", params=11_255_626)
    text = "\n".join(verdict_section(judge([*PLAIN, *bigger, *trainings(UNCLEAR, text=MEMBER)]), RECORDS, None, set()))
    assert "bigger-plain is `resnet18[3,2,2,2]`" in text
    assert "11,255,626 params" in text


def test_the_pick_follows_the_verdict():
    objectives = ("accuracy", "params")
    best, why = pick(objectives, RECORDS)
    assert "not confirmed" in why
    best, why = pick(objectives, RECORDS, None, judge([*PLAIN, *trainings(BETTER, text=MEMBER)]))
    assert (str(best.placement), "beat plain" in why) == (MEMBER, True)
    best, why = pick(objectives, RECORDS, None, judge([*PLAIN, *trainings(UNCLEAR, text=MEMBER)]))
    assert (best.placement, "nothing was shown to beat it" in why) == (Placement(), True)
    one_seed = judge([*PLAIN[:1], *trainings([0.9], text=MEMBER)])
    assert pick(objectives, RECORDS, None, one_seed) == pick(objectives, RECORDS)
    beyond = TrialRecord(trial=2, state="COMPLETE", placement=Placement.parse("b=se(r=2)"), val_accuracy=0.99,
                         macs=1, params=1, epochs=1)  # fmt: skip
    best, _ = pick(objectives, [*RECORDS, beyond], None, judge([*PLAIN, *trainings(BETTER, text=MEMBER)]))
    assert str(best.placement) == MEMBER  # although it left the front


def test_reports_without_a_confirmation_keep_no_verdict_of_an_earlier_study(tmp_path):
    write_report(tmp_path, SUBJECT, RECORDS, None, judge([*PLAIN, *trainings(BETTER, text=MEMBER)]))
    assert (tmp_path / "architectures" / "best.yaml").read_text().startswith("# the knee of the placements that fresh")
    assert {"verdict.csv", "confirmed.csv"} <= {path.name for path in tmp_path.iterdir()}
    write_report(tmp_path, SUBJECT, RECORDS)
    assert not {"verdict.csv", "confirmed.csv"} & {path.name for path in tmp_path.iterdir()}
