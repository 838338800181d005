import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import reproducible
from networks import evaluate
from test_study import config

import placesearch as ps
from placesearch.errors import InputError, StudyError

STUDIES = Path(__file__).parents[1] / "studies"


def own(**changes):
    values = {"backbone": "mine:tiny", "input_size": 32, "epochs": 3, "trials": 6, "reductions": (2, 4), "name": "s"}
    return ps.StudyConfig(**{**values, **changes})


def test_a_function_takes_the_place_of_the_training(workplace):
    seen = []

    def mine(candidate):
        seen.append(candidate)
        return evaluate(candidate)

    study = ps.run(own(), evaluate=mine)
    assert [record.error for record in study.records] == [None] * 6
    assert [record.val_accuracy for record in study.records] == [(1 + len(r.placement)) / 10 for r in study.records]
    assert len({record.val_loss for record in study.records}) == 1  # the same start for all
    assert [candidate.placement for candidate in seen] == [record.placement for record in study.records]
    assert {(c.seed, c.epochs, c.split, c.device) for c in seen} == {(0, 3, "validation", torch.device("cpu"))}
    assert seen[0].architecture.num_classes == 1000
    assert study.records[1].params == sum(w.numel() for w in seen[1].build().parameters())
    assert "test_own" in (study.folder / "summary.md").read_text()
    assert study.best.found.val_accuracy in {record.val_accuracy for record in study.front}


@pytest.mark.slow
def test_workers_import_it_by_name_and_give_the_same_results(workplace):
    one = ps.run(own(), evaluate="mine:evaluate")
    two = ps.run(own(name="t", jobs=2, evaluate="mine:evaluate"))
    pd.testing.assert_frame_equal(*(reproducible(study.trials_frame()) for study in (one, two)))


def test_nothing_is_built_before_it_is_asked_for(workplace, monkeypatch):
    monkeypatch.setattr(ps.Candidate, "build", lambda _: pytest.fail("built"))
    study = ps.run(own(trials=3), evaluate=lambda _: 0.5)
    assert [record.val_accuracy for record in study.records] == [0.5] * 3
    assert [record.val_loss for record in study.records] == [None] * 3


@pytest.mark.parametrize(
    ("returned", "says"),
    [
        (None, "no accuracy"),
        ("good", "accuracy 'good', which is no number"),
        ({"score": 0.5}, "no accuracy"),
        (1.5, "accuracy 1.5; expected a number within 0..1"),
        (float("nan"), "accuracy nan"),
        ({"accuracy": 0.5, "loss": float("inf")}, "loss inf"),
        ({"accuracy": 0.5, "curve": [0.1, 7]}, "curve with 7.0; expected a number within 0..1"),
        ({"accuracy": 0.5, "curve": 3}, "curve 3, which is no list of numbers"),
        (ValueError("a\nreason"), "ValueError: a reason"),
    ],
)
def test_what_cannot_be_used_fails_its_trial_and_the_search_goes_on(workplace, returned, says):
    def mine(candidate):
        if not candidate.placement:
            return 0.5
        if isinstance(returned, Exception):
            raise returned
        return returned

    study = ps.run(own(trials=4), evaluate=mine)
    assert [record.state for record in study.records] == ["COMPLETE", "FAIL", "FAIL", "FAIL"]
    assert says in study.records[1].error
    assert study.records[1].params > study.records[0].params  # costs are known all the same


def test_a_tensor_is_a_number_too(workplace):
    assert (
        ps.run(own(trials=1), evaluate=lambda _: torch.tensor(0.25, requires_grad=True)).records[0].val_accuracy == 0.25
    )


def test_a_curve_is_kept_with_its_trial(workplace):
    study = ps.run(own(trials=2), evaluate=lambda _: {"accuracy": 0.5, "curve": [0.25, torch.tensor(0.5)]})
    assert [record.curve for record in study.records] == [(0.25, 0.5)] * 2


@pytest.mark.slow
def test_it_starts_from_weights_if_there_are_any(workplace):
    torch.save(torch.nn.Module.state_dict(evaluate_start()), "w.pt")
    study = ps.run(own(weights="w.pt", trials=2), evaluate="mine:evaluate")
    assert [record.val_loss for record in study.records] == pytest.approx([3 * 0.125] * 2)


def evaluate_start():
    from networks import Tiny

    model = Tiny(10)
    torch.nn.init.constant_(model.stem.weight, 0.125)
    return model


def test_another_evaluation_is_another_study(workplace):
    ps.run(own(trials=1), evaluate="mine:evaluate")
    with pytest.raises(StudyError, match="evaluate mine:evaluate -> None"):
        ps.run(config(name="s", epochs=3))


@pytest.mark.parametrize(
    ("changes", "given", "says"),
    [
        ({"start": "branch"}, "mine:evaluate", "cannot start from there"),
        ({}, "evaluate", "names no code"),
        ({}, "mine:nothing", "no function 'nothing'"),
        ({"evaluate": "mine"}, None, "evaluate"),
    ],
)
def test_an_evaluation_that_cannot_be_used_gets_one_line_and_leaves_no_trace(workplace, changes, given, says):
    with pytest.raises(InputError) as caught:
        ps.run(own(**changes), evaluate=given)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not Path("studies").exists()


@pytest.mark.slow
def test_on_the_command_line_it_is_trusted_and_in_a_file_only_if_allowed(call):
    options = ["--input-size", "32", "--reductions", "2,4", "--trials", "2", "--jobs", "1"]
    code, out, err = call("run", "--backbone", "mine:tiny", "--evaluate", "mine:evaluate", *options)
    assert (code, err) == (0, "")
    assert "mine:evaluate with 5 epochs" in out
    assert "front of mine-tiny-own" in out
    Path("s.yaml").write_text("backbone: mine:tiny\nevaluate: mine:evaluate\n")
    code, _, err = call("run", "s.yaml", *options, "--allow", "mine:tiny")
    assert (code, err.count("\n")) == (2, 1)
    assert "s.yaml names code, 'mine:evaluate'; if you trust it, add --allow mine:evaluate" in err
    assert call("run", "s.yaml", *options, "--allow", "mine:tiny", "--allow", "mine:evaluate")[0] == 0


@pytest.mark.slow
def test_the_study_of_a_detector_runs_as_its_file_says(call, workplace):
    (workplace / "studies").mkdir()
    for name in ("detector.yaml", "detector.py"):
        shutil.copy(STUDIES / name, workplace / "studies" / name)
    command = next(
        line.removeprefix("# placesearch ")
        for line in (STUDIES / "detector.yaml").read_text().splitlines()
        if line.startswith("# placesearch ")
    )
    code, out, err = call(*command.split(), "--trials", "2")
    assert (code, err) == (0, "")
    frame = pd.read_csv("reports/detector/trials.csv")
    assert set(frame.state) == {"COMPLETE"}
    assert (frame.val_accuracy > 0).all()  # a box is hardly ever right by chance
    assert "2/2" in out
