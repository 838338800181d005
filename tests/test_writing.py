import pytest

from placesearch.models.architecture import Architecture
from placesearch.reporting.writing import Subject, caution, sampling_error, summary, write_report

from test_tables import BETTER, FAILED, GOOD  # isort: skip

SUBJECT = Subject(
    name="mine",
    objectives=("accuracy", "macs", "params"),
    architecture=Architecture(backbone="resnet18", num_classes=10, input_size=(3, 32, 32)),
    facts=(("backbone", "resnet18"),),
    validation_images=100,
)


def test_each_member_of_the_front_gets_a_config_and_the_pick_another(tmp_path):
    write_report(tmp_path, SUBJECT, [GOOD, FAILED, BETTER])
    folder = tmp_path / "architectures"
    assert sorted(path.name for path in folder.iterdir()) == ["best.yaml", "trial-0.yaml", "trial-2.yaml"]
    loaded = Architecture.load(folder / "trial-2.yaml")
    assert loaded.placement == BETTER.placement
    assert loaded.found.model_dump() == {
        "study": "mine", "trial": 2, "val_accuracy": 0.95, "macs": 12, "params": 22
    }  # fmt: skip
    best = Architecture.load(folder / "best.yaml")
    assert best.found.trial in (0, 2)


def test_writing_again_takes_away_configs_that_left_the_front_and_nothing_else(tmp_path):
    write_report(tmp_path, SUBJECT, [GOOD])
    kept = tmp_path / "architectures" / "my notes.txt"
    kept.write_text("kept")
    dominating = type(GOOD)(trial=5, state="COMPLETE", placement=GOOD.placement, val_accuracy=0.99, macs=1, params=1)
    write_report(tmp_path, SUBJECT, [GOOD, dominating])
    names = sorted(path.name for path in (tmp_path / "architectures").iterdir())
    assert names == ["best.yaml", "my notes.txt", "trial-5.yaml"]


def test_a_study_without_success_has_no_best(tmp_path):
    write_report(tmp_path, SUBJECT, [FAILED])
    assert list((tmp_path / "architectures").iterdir()) == []
    assert "No trial succeeded" in (tmp_path / "summary.md").read_text()


def test_the_summary_shows_front_references_failures_and_how_far_to_trust_it():
    text = summary(SUBJECT, [GOOD, FAILED, BETTER])
    for part in (
        "plain: `none`",
        "`a=cbam(r=4,k=3)`",
        "95.00 %",
        "nan, so",
        "| backbone | resnet18 |",
        "2 complete, 1 failed",
    ):
        assert part in text
    assert "standard deviation of 2.2 points" in caution(SUBJECT, [GOOD, BETTER])  # sqrt(.95 * .05 / 100)


def test_the_sampling_error_is_binomial():
    assert sampling_error(0.5, 100) == pytest.approx(0.05)
    assert sampling_error(1.0, 100) == 0.0
