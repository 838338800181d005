import json
import signal
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from test_datasets import damaged, make_tree
from test_study import config

import placesearch as ps
from placesearch.confirming import fresh_seeds
from placesearch.errors import InputError, StudyError
from placesearch.records import StudyBegan, TrialBegan, TrialEnded


def steady(candidate):
    """An evaluation of one's own: a little better with each block; what is on top depends on seed, split and blocks."""
    random = torch.Generator().manual_seed(candidate.seed + len(str(candidate.placement)))
    gain = 0.03 * len(candidate.placement) if candidate.split == "test" else 0.0
    return 0.5 + gain + 0.001 * float(torch.rand((), generator=random))


def lines(name):
    return [json.loads(line) for line in (Path("studies") / name / "confirm.jsonl").read_text().splitlines()]


def stored(name):
    """What is kept, without what a stopwatch measured and the order of arrival."""
    kept = [{key: value for key, value in line.items() if key != "seconds"} for line in lines(name)]
    return sorted(kept, key=lambda line: (line["start"], line["seed"], line["placement"]))


def files(folder):
    """All files and what is in them; to a journal Optuna adds a line whenever it is opened."""
    return {path: path.name == "journal.log" or path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("seed", [0, 7, 2**31 - 1, 2**31, 2**32 - 1])
def test_fresh_seeds_are_far_from_those_of_the_search_and_always_the_same(seed):
    seeds = fresh_seeds(seed, 1000)
    assert seeds[:5] == fresh_seeds(seed, 5)
    assert len(set(seeds)) == 1000
    near = {(seed + number) % 2**32 for number in range(10_000)}
    assert not near & set(seeds)
    assert 0 <= min(seeds) <= max(seeds) < 2**32


@pytest.mark.slow
def test_a_confirmation_goes_on_where_it_stopped_and_takes_more_seeds(workplace):
    ps.run(config(name="s", trials=5))
    events = []

    def interrupt(event):
        if isinstance(event, TrialEnded) and event.record.trial == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="reports/s"):
        ps.confirm("s", seeds=2, allow=["mine:tiny"], jobs=1, watch=interrupt)
    assert len(lines("s")) == 2
    found = ps.confirm("s", seeds=2, allow=["mine:tiny"], jobs=1, watch=events.append)
    placements = {str(record.placement) for record in found.front} | {str(r.placement) for r in found.records[:3]}
    assert {line["placement"] for line in lines("s")} == placements
    assert len(lines("s")) == 2 * len(placements)
    began = events[0]
    assert isinstance(began, StudyBegan)
    assert (len(began.finished), began.trials, began.split) == (2, 2 * len(placements), "test")
    assert all(event.task.split == "test" for event in events if isinstance(event, TrialBegan))

    kept = stored("s")
    Path("studies/s/confirm.jsonl").unlink()
    ps.confirm("s", seeds=2, allow=["mine:tiny"], jobs=2)
    assert stored("s") == kept  # another number of workers, and no interrupt

    before = lines("s")
    assert ps.confirm("s", seeds=2, allow=["mine:tiny"], jobs=1).ended == "all trainings were there already"
    assert lines("s") == before
    frame = pd.read_csv("reports/s/verdict.csv")
    assert {"plain", "se-everywhere"} <= set(frame.against) <= {"plain", "se-everywhere", "cbam-everywhere"}
    assert set(frame.seeds) == {2}
    confirmed = pd.read_csv("reports/s/confirmed.csv")
    assert set(confirmed.seed) == {2**31, 2**31 + 1}
    assert not set(confirmed.seed) & {record.seed for record in found.records}
    summary = Path("reports/s/summary.md").read_text()
    assert "## Verdict" in summary
    assert "No longer on the front" not in summary
    assert ps.load_study("s").confirmed.verdicts == found.confirmed.verdicts


def test_a_study_with_its_own_evaluation_is_confirmed_by_it_on_the_test_split(workplace):
    ps.run(config(name="s", trials=8), evaluate=steady)
    found = ps.confirm("s", seeds=4, epochs=3, top=1, evaluate=steady, allow=["mine:tiny"])
    kept = lines("s")
    assert {line["epochs"] for line in kept} == {3}
    assert len(kept) in (4 * 3, 4 * 4)  # the references, and one member, which may be one of them
    better = {str(p) for p in found.confirmed.better_than_plain}
    assert better == {line["placement"] for line in kept} - {"none"}  # 0.03 a block, thirty times the noise
    assert found.best.placement != ps.Placement()
    assert "alone, on whatever the evaluation tests on" in Path("reports/s/summary.md").read_text()
    more = ps.confirm("s", seeds=5, epochs=3, top=1, evaluate=steady, allow=["mine:tiny"])
    assert lines("s")[: len(kept)] == kept
    assert {one.seeds for one in more.confirmed.verdicts} == {5}
    with pytest.raises(StudyError, match="was evaluated by 'test_confirming:steady', not by"):
        ps.confirm("s", evaluate=print, allow=["mine:tiny"])
    with pytest.raises(InputError, match="names code, 'test_confirming:steady'"):
        ps.confirm("s", allow=["mine:tiny"])


@pytest.mark.slow
def test_an_ordinary_resnet_is_compared_with_a_deeper_one(workplace):
    ps.run(ps.StudyConfig(backbone="resnet18", name="s", data="digits", trials=2, input_size=32), evaluate=steady)
    found = ps.confirm("s", seeds=2, evaluate=steady)
    assert found.confirmed.bigger == ("resnet18[4,2,2,2]", 11_181_642 + 2 * 73_984)
    assert {line["backbone"] for line in lines("s")} == {"resnet18", "resnet18[4,2,2,2]"}
    se = next(one for one in found.confirmed.verdicts if one.against == "bigger-plain")
    assert (se.reference, se.seeds) == ("se-everywhere", 2)


def test_blocks_that_change_nothing_are_not_called_better_and_plain_is_recommended(workplace):
    ps.run(config(name="s", trials=4, blocks="mine:Still", sites="residual"))
    found = ps.confirm("s", seeds=2, jobs=1, allow=["mine:tiny", "mine:Still"])
    still = [one for one in found.confirmed.verdicts if "Still" in str(one.placement) and one.against == "plain"]
    for one in still:
        assert (one.difference, one.verdict) == (0.0, "no difference shown")
    assert found.best.placement == ps.Placement()
    text = Path("reports/s/architectures/best.yaml").read_text()
    assert text.startswith("# plain: on fresh seeds, nothing was shown to beat it\n")
    assert ps.Architecture.load("reports/s/architectures/best.yaml", allow=["mine:tiny"]) == found.best


@pytest.mark.slow
def test_a_study_that_starts_from_a_branch_is_confirmed_from_scratch_as_well(workplace):
    ps.run(config(name="s", trials=3, epochs=3, start="branch"))
    found = ps.confirm("s", seeds=2, jobs=1, top=1, allow=["mine:tiny"])
    starts = pd.DataFrame(lines("s")).groupby("start").accuracy.apply(list)
    assert len(starts["scratch"]) == len(starts["branch"]) == 6
    plain = [line for line in lines("s") if line["placement"] == "none"]
    assert len({(line["seed"], line["loss"]) for line in plain}) == 2  # plain goes on with its own training
    assert {one.start for one in found.confirmed.verdicts} == {"scratch", "branch"}
    branches = {path.name for path in Path("studies/s").glob("branch-*.safetensors")}
    assert branches == {"branch-3-0.safetensors"}


def test_what_cannot_be_confirmed_is_refused_in_one_line(workplace):
    allow = ["mine:tiny"]
    with pytest.raises(StudyError, match="no study 's'"):
        ps.confirm("s")
    ps.run(config(name="s", trials=1, timeout=1e-9))
    with pytest.raises(StudyError, match="no finished trial to confirm"):
        ps.confirm("s", allow=allow)
    ps.run(config(name="s", trials=1))
    before = files(workplace)
    for wrong in ({"seeds": 1}, {"epochs": 0}, {"top": 0}, {"jobs": 9}, {"device": "x"}):
        with pytest.raises(InputError):
            ps.confirm("s", allow=allow, **wrong)
    with pytest.raises(InputError, match="--allow mine:tiny"):
        ps.confirm("s")
    assert files(workplace) == before

    def meddle(event):
        if isinstance(event, TrialBegan):
            with pytest.raises(StudyError, match="another process"):
                ps.confirm("s", allow=allow)
            with pytest.raises(StudyError, match="another process"):
                ps.run(config(name="s"))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ps.confirm("s", allow=allow, jobs=1, watch=meddle)


def test_the_command_line_prints_the_verdict(workplace, capsys, monkeypatch):
    from placesearch.cli import main

    ps.run(config(name="s", trials=3), evaluate=steady)
    capsys.readouterr()
    allow = ["--allow", "mine:tiny", "--allow", "test_confirming:steady"]
    for command, says in (
        (["confirm", "s", "--seeds", "3", "--jobs", "1", *allow], "confirming s, 0 of 9 trainings are there already"),
        (["report", "s"], "verdict on s, on the test split"),
    ):
        monkeypatch.setattr("sys.argv", ["placesearch", *command])
        with pytest.raises(SystemExit) as caught:
            main()
        out, err = capsys.readouterr()
        assert (caught.value.code, err) == (0, "")
        assert says in out
        assert "better" in out


@pytest.mark.slow
def test_kill_9_in_mid_training_loses_no_finished_one(call, start):
    ps.run(config(name="s", trials=3))
    command = ["confirm", "s", "--seeds", "2", "--epochs", "20", "--allow", "mine:tiny", "--jobs", "2"]
    for kills in range(2):
        process = start(*command)
        deadline = time.monotonic() + 120
        while not Path("studies/s/confirm.jsonl").exists() or len(lines("s")) <= kills:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(0.1 * kills)
        process.send_signal(signal.SIGKILL)
        process.wait()
    kept = lines("s")
    code, _, err = call(*command)
    assert (code, err) == (0, "")
    assert lines("s")[: len(kept)] == kept
    interrupted = stored("s")
    assert len(interrupted) == 6
    Path("studies/s/confirm.jsonl").unlink()
    ps.confirm("s", seeds=2, epochs=20, allow=["mine:tiny"], jobs=1)
    assert stored("s") == interrupted


def test_images_that_the_study_left_out_are_left_out_of_its_confirmation(workplace):
    tree = make_tree(workplace / "tree", ["train", "val", "test"], count=40)
    damaged(tree / "test" / "dog" / "7.png", "torn")
    ps.run(config(name="s", data="tree", trials=1, skip_corrupt=True))
    ps.confirm("s", seeds=2, allow=["mine:tiny"], jobs=1)
    assert {line["images"] for line in lines("s")} == {79}
