import base64
import io
import json

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import reproducible

import placesearch as ps
from placesearch.definition import read_definition_of
from placesearch.errors import DataError, InputError, StudyError
from placesearch.models.backbones import load_backbone
from placesearch.records import StepEnded, StudyBegan, Told, TrialBegan, TrialEnded
from placesearch.search import samplers, stopping
from placesearch.training import datasets


def config(**changes):
    values = {"backbone": "mine:tiny", "trials": 6, "epochs": 1, "batch_size": 128, "input_size": 32}
    values |= {"reductions": (2, 4), "jobs": 1}
    return ps.StudyConfig(**{**values, **changes})


def test_a_study_writes_everything_that_the_documentation_names(workplace):
    study = ps.run(config(name="s"))
    assert [record.reference for record in study.records[:3]] == [
        "plain", "se-everywhere", "cbam-everywhere cbam-last-stage"
    ]  # fmt: skip
    folder = workplace / "reports" / "s"
    trials = pd.read_csv(folder / "trials.csv")
    assert trials.trial.tolist() == list(range(6))
    assert set(trials.state) == {"COMPLETE"}
    assert trials.placement.is_unique
    assert trials.equals(pd.read_csv(io.StringIO(study.trials_frame().to_csv(index=False))))
    front = pd.read_csv(folder / "front.csv")
    assert set(front.trial) <= set(trials.trial)
    assert (folder / "summary.md").exists()
    assert (folder / "report.html").stat().st_size > 1e6
    for picture in ("front.svg", "map.svg"):
        assert "</svg>" in (folder / picture).read_text(encoding="utf-8")
    assert pd.read_csv(folder / "candidates.csv").trial.tolist() == list(range(6))
    assert study.sites_frame().to_csv(index=False) == (folder / "sites.csv").read_text(encoding="utf-8")
    assert "hardware" in dict(study.subject.facts)
    assert list(study.subject.sites)[:2] == ["unit1.bn2", "unit1"]  # the network's own order
    assert (workplace / "studies" / "s" / "journal.log").exists()
    assert study.best == ps.Architecture.load(folder / "architectures" / "best.yaml", allow=["mine:tiny"])


def test_every_config_rebuilds_the_model_with_the_recorded_costs(workplace):
    study = ps.run(config(name="s"))
    for path in (workplace / "reports" / "s" / "architectures").glob("*.yaml"):
        architecture = ps.Architecture.load(path, allow=["mine:tiny"])
        model = architecture.build()
        assert type(model).__module__ == "mine"
        cost, record = ps.profile(model, architecture.input_size), study.records[architecture.found.trial]
        assert (cost.macs, cost.params) == (architecture.found.macs, architecture.found.params)
        assert (cost.macs, cost.macs_full, cost.params) == (record.macs, record.macs_full, record.params)
        assert sum(weight.numel() for weight in model.parameters()) == architecture.found.params
        assert (record.placement, record.val_accuracy) == (architecture.placement, architecture.found.val_accuracy)


def test_two_runs_and_an_interrupted_one_give_the_same_table(workplace):
    tables = [ps.run(config(name="one")).trials_frame(), ps.run(config(name="two")).trials_frame()]
    ps.run(config(name="three", trials=2))
    ps.run(config(name="three", trials=3))
    tables.append(ps.run(config(name="three")).trials_frame())
    first = reproducible(tables[0])
    for table in tables[1:]:
        pd.testing.assert_frame_equal(reproducible(table), first)
    other = ps.run(config(name="four", seed=1, trials=1)).trials_frame()
    assert other.val_loss[0] != first.val_loss[0]


def test_an_interrupt_writes_the_reports_and_the_same_command_goes_on(workplace):
    whole = ps.run(config(name="whole")).trials_frame()

    def interrupt(event):
        if isinstance(event, StepEnded) and event.trial == 3 and event.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="reports"):
        ps.run(config(name="s"), watch=interrupt)
    assert pd.read_csv(workplace / "reports" / "s" / "trials.csv").trial.tolist() == [0, 1, 2]
    table = ps.run(config(name="s")).trials_frame()
    pd.testing.assert_frame_equal(reproducible(table), reproducible(whole))


def test_events_tell_the_course_of_a_study(workplace):
    events = []
    ps.run(config(name="s", trials=2, epochs=2), watch=events.append)
    assert isinstance(events[0], StudyBegan)
    assert [event.task.trial for event in events if isinstance(event, TrialBegan)] == [0, 1]
    assert [event.record.trial for event in events if isinstance(event, TrialEnded)] == [0, 1]
    steps = [event for event in events if isinstance(event, StepEnded) and event.trial == 0]
    assert [event.step for event in steps] == list(range(1, steps[0].steps + 1))
    assert [event.epoch for event in steps] == [1] * (len(steps) // 2) + [2] * (len(steps) // 2)


def test_a_training_that_becomes_nan_fails_its_trial_and_the_search_goes_on(workplace):
    study = ps.run(config(name="s", backbone="mine:fragile", trials=8))
    failed = [record for record in study.records if record.state == "FAIL"]
    for record in study.records:
        assert (record.state == "FAIL") == ("unit1.bn2" in record.placement)
    assert failed
    for record in failed:
        assert record.error == "the training loss became nan in epoch 1 of 1"
        assert (record.val_accuracy, record.val_loss) == (None, None)
        assert record.macs > 0
    assert not {record.trial for record in failed} & {record.trial for record in study.front}
    assert len(study.records) == 8


def test_a_study_in_which_everything_fails_has_no_front(workplace):
    study = ps.run(config(name="s", backbone="mine:broken", trials=2))
    assert [record.state for record in study.records] == ["FAIL", "FAIL"]
    assert (study.front, study.best) == ([], None)
    assert pd.read_csv(workplace / "reports" / "s" / "trials.csv").val_accuracy.isna().all()


def test_another_study_under_the_same_name_is_refused_with_the_difference(workplace):
    ps.run(config(name="s", trials=1))
    before = {path: path.read_bytes() for path in workplace.rglob("*") if path.is_file()}
    with pytest.raises(StudyError, match=r"epochs 1 -> 2; seed 0 -> 3.*--name"):
        ps.run(config(name="s", epochs=2, seed=3))
    with pytest.raises(StudyError, match=r"reductions 2,4 -> 4"):
        ps.run(config(name="s", reductions=(4,)))
    assert {path: path.read_bytes() for path in workplace.rglob("*") if path.is_file()} == before
    assert len(ps.run(config(name="s", trials=2, timeout="1h", device="cpu")).records) == 2


def test_a_backbone_that_changed_under_its_name_is_refused(workplace):
    import mine

    ps.run(config(name="s", trials=1))
    mine.Unit = lambda channels, unit=mine.Unit: mine.nn.Sequential(unit(channels))
    with pytest.raises(StudyError, match=r"site unit1.bn2 8x4x4 -> None"):
        ps.run(config(name="s", trials=2))


def test_data_that_changed_under_their_path_are_refused(workplace):
    from test_datasets import grey, make_tree

    make_tree(workplace / "tree", ["train"], count=10)
    ps.run(config(name="s", trials=1, data="tree"))
    grey(3).save(workplace / "tree" / "train" / "cat" / "more.png")
    with pytest.raises(StudyError, match="train images 12 -> 13"):
        ps.run(config(name="s", trials=2, data="tree"))


@pytest.mark.slow
def test_corrupt_images_are_left_out_if_asked_for_told_kept_and_part_of_what_the_study_is(workplace):
    from test_datasets import damaged, make_tree

    tree = make_tree(workplace / "tree", ["train", "val", "test"], count=40)
    bad = [damaged(tree / name, "torn") for name in ("train/cat/0.png", "train/dog/7.png", "val/cat/3.png")]
    values = {"data": "tree", "trials": 2}
    before = sorted(workplace.iterdir())
    with pytest.raises(DataError, match=r"tree/train/cat/0.png: .*--skip-corrupt"):
        ps.run(config(name="s", **values))
    assert [path for path in sorted(workplace.iterdir()) if path.name != "__pycache__"] == before
    told = []
    one = ps.run(config(name="s", skip_corrupt=True, **values), watch=told.append)
    note = "note: corrupt and left out: train/cat/0.png, train/dog/7.png, val/cat/3.png; studies/s/study.yaml keeps "
    assert any(line.startswith(note) for line in told[0].lines)
    assert "78 train, 79 validation, 80 test images in 2 classes, without 3 corrupt files" in one.subject.facts[1][1]
    assert read_definition_of("s").skipped == ("train/cat/0.png", "train/dog/7.png", "val/cat/3.png")
    two = ps.run(config(name="two", skip_corrupt=True, jobs=2, **values))
    for path in bad:
        path.unlink()
    with pytest.raises(StudyError, match="skip-corrupt True -> False"):
        ps.run(config(name="s", **values))
    clean = ps.run(config(name="clean", **values))
    pd.testing.assert_frame_equal(*(reproducible(study.trials_frame()) for study in (one, two)))
    pd.testing.assert_frame_equal(*(reproducible(study.trials_frame()) for study in (one, clean)))


def test_files_that_were_left_out_stay_out_of_a_study_when_they_were_repaired(workplace):
    from test_datasets import damaged, grey, make_tree

    bad = damaged(make_tree(workplace / "tree", ["train"], count=40) / "train" / "cat" / "3.png", "torn")
    values = {"name": "s", "data": "tree", "skip_corrupt": True}
    ps.run(config(trials=1, **values))
    grey(3).save(bad)
    study = ps.run(config(trials=2, **values))
    assert [record.trial for record in study.records] == [0, 1]
    assert "without 1 corrupt file" in study.subject.facts[1][1]
    damaged(bad.with_name("4.png"), "torn")
    with pytest.raises(DataError, match=r"4.png"):
        ps.run(config(trials=3, **values))


def test_an_image_that_becomes_corrupt_ends_the_search_and_no_trial_fails_for_it(workplace, monkeypatch):
    from test_datasets import damaged, make_tree

    tree = make_tree(workplace / "tree", ["train", "val", "test"], count=40)
    monkeypatch.setattr(datasets, "MEMORY_SHARE", 0)
    bad, whole = tree / "train" / "dog" / "7.png", (tree / "train" / "dog" / "7.png").read_bytes()

    def damage(event):
        if isinstance(event, TrialEnded) and event.record.trial == 1:
            damaged(bad, "torn")

    values = {"name": "s", "data": "tree", "trials": 4}
    with pytest.raises(DataError, match=r"cannot read image .*dog/7.png"):
        ps.run(config(**values), watch=damage)
    assert [record.state for record in ps.load_study("s").records] == ["COMPLETE", "COMPLETE"]
    bad.write_bytes(whole)
    study = ps.run(config(**values))
    assert [(record.trial, record.state) for record in study.records] == [(n, "COMPLETE") for n in range(4)]


def test_an_evaluation_of_the_users_own_reads_its_images_by_itself(workplace):
    with pytest.raises(InputError, match="--skip-corrupt is for the built-in training"):
        ps.run(config(name="s", evaluate="mine:evaluate", skip_corrupt=True))

    def mine(candidate):
        raise DataError("cannot read image mine.png")

    (record,) = ps.run(config(name="s", trials=1), evaluate=mine).records
    assert (record.state, record.error) == ("FAIL", "DataError: cannot read image mine.png")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda folder: (folder / "study.yaml").write_text("config: ["), "study.yaml is damaged"),
        (lambda folder: (folder / "study.yaml").write_text("placesearch: 1\n"), "study.yaml is damaged"),
        (lambda folder: (folder / "study.yaml").write_text("placesearch: 9\n"), "newer"),
        (lambda folder: (folder / "study.yaml").unlink(), "study.yaml is missing"),
        (lambda folder: (folder / "journal.log").write_text("x\n" * 3), "journal.log is damaged in line 1"),
    ],
)
def test_a_damaged_study_is_refused_and_nothing_is_written_over(workplace, damage, says):
    ps.run(config(name="s", trials=1))
    damage(workplace / "studies" / "s")
    before = {path: path.read_bytes() for path in workplace.rglob("*") if path.is_file()}
    with pytest.raises(InputError) as caught:
        ps.run(config(name="s", trials=2))
    assert says in str(caught.value)
    assert {path: path.read_bytes() for path in workplace.rglob("*") if path.is_file()} == before


def test_a_study_that_is_being_run_is_refused(workplace):
    def meddle(event):
        if isinstance(event, TrialBegan):
            with pytest.raises(StudyError, match="another process"):
                ps.run(config(name="s"))

    ps.run(config(name="s", trials=1), watch=meddle)


def test_bad_input_leaves_no_trace(workplace):
    before = sorted(workplace.iterdir())
    for changes in (
        {"backbone": "resnet19"},
        {"data": "nothing"},
        {"reductions": (99,)},
        {"sampler": "best"},
        {"device": "x"},
    ):
        with pytest.raises(InputError):
            ps.run(config(**changes))
    assert [path for path in sorted(workplace.iterdir()) if path.name != "__pycache__"] == before


def test_a_timeout_of_an_instant_runs_nothing_and_a_new_run_goes_on(workplace):
    study = ps.run(config(name="s", trials=2, timeout=1e-9))
    assert (study.records, study.ended) == ((), "stopped before 1e-09 s were over; the same command goes on")
    assert len(ps.run(config(name="s", trials=2)).records) == 2


@pytest.mark.slow
def test_any_blocks_at_any_kinds_of_sites_can_be_searched(workplace):
    study = ps.run(config(name="s", blocks="eca,spatial,mine:Gate", sites="stage,last,head", trials=8))
    assert {record.state for record in study.records} == {"COMPLETE"}
    suggested = [record.placement for record in study.records if record.reference is None]
    assert suggested
    assert {setting.block for placement in suggested for setting in placement.values()} <= {
        "eca",
        "spatial",
        "mine:Gate",
    }
    assert {site for placement in suggested for site in placement} <= {"unit2"}


def test_nothing_over_the_budget_is_trained(workplace):
    told = []
    study = ps.run(config(name="s", max_params="+4%", max_macs="1M", trials=12), watch=told.append)
    plain = sum(weight.numel() for weight in load_backbone("mine:tiny", 10).parameters())
    params = [record.params for record in study.records]
    assert plain < max(params) <= 1.04 * plain < plain + 2 * (25 + 99)  # CBAM with r=8, k=7 at both sites
    assert len({record.placement for record in study.records}) == len(params)
    lines = "\n".join(told[0].lines)
    assert f"budget: at most 1,000,000 macs, {1.04 * plain:,.2f} params" in lines
    assert "over the budget and left out: cbam-everywhere" in lines
    with pytest.raises(StudyError, match=r"max-params \+4% -> \+3%"):
        ps.run(config(name="s", max_params="+3%", max_macs="1M", trials=13))
    with pytest.raises(InputError, match=r"mine:tiny has 2,682 params without any block, more than --max-params 2k"):
        ps.run(config(name="t", max_params="2k"))
    with pytest.raises(InputError, match="no block fits into the budget"):
        ps.run(config(name="t", max_params="+0.1%"))


def test_a_flat_axis_is_named_and_another_suggested(workplace):
    told = []
    values = {"blocks": "spatial", "kernel_sizes": "1", "reductions": "4", "trials": 1, "objectives": "accuracy,params"}
    ps.run(config(name="s", **values), watch=told.append)
    flat = [line for line in told[0].lines if line.startswith("note: params vary by only 0.22 %")]  # 2 * 3 of 2,682
    assert flat
    assert "macs_full vary by" in flat[0]
    ps.run(config(name="t", trials=1), watch=told.append)
    assert not [line for event in told[1:] for line in getattr(event, "lines", ()) if "vary by only" in line]


def test_costs_are_kept_with_the_study_and_not_counted_again(workplace, monkeypatch):
    ps.run(config(name="s", trials=3))
    monkeypatch.setattr("placesearch.costs.additive.profile", None)
    assert len(ps.run(config(name="s", trials=6)).records) == 6


@pytest.mark.slow
def test_a_study_from_weights_starts_all_trials_from_them_and_says_so(workplace):
    torch.save(load_backbone("mine:tiny", 1000).state_dict(), "w.pt")
    one = ps.run(config(name="s", weights="w.pt", sites="residual,block", trials=5))
    assert {record.state for record in one.records} == {"COMPLETE"}
    assert "from w.pt (sha256" in (one.folder / "summary.md").read_text()
    two = ps.run(config(name="t", weights="w.pt", sites="residual,block", trials=5, jobs=2))
    frames = [reproducible(study.trials_frame()) for study in (one, two)]
    pd.testing.assert_frame_equal(*frames)
    after_block = next(record for record in one.records if record.reference == "cbam-after-every-block")
    assert after_block.factors == {"unit1": 4.0, "unit2": 4.0}

    torch.save(load_backbone("mine:tiny", 1000).state_dict(), "w.pt")
    with pytest.raises(StudyError, match="checkpoint w.pt"):
        ps.run(config(name="s", weights="w.pt", sites="residual,block", trials=6))
    with pytest.raises(StudyError, match="weights w.pt -> None"):
        ps.run(config(name="s", sites="residual,block", trials=6))


@pytest.mark.slow
def test_a_study_from_a_branch_trains_the_plain_network_up_to_there_once(workplace):
    values = {"start": "branch", "epochs": 3, "trials": 5}
    told = []
    one = ps.run(config(name="s", **values), watch=told.append)
    lines = [event.line for event in told if isinstance(event, Told)]
    assert lines[0] == "the first trials train the plain network up to the branch point, from where all go on"
    assert {record.state for record in one.records} == {"COMPLETE"}
    assert "taken over with blocks as the identity" in (one.folder / "summary.md").read_text()
    two = ps.run(config(name="t", **{**values, "trials": 2}))
    two = ps.run(config(name="t", jobs=2, **values))
    pd.testing.assert_frame_equal(*(reproducible(study.trials_frame()) for study in (one, two)))
    scratch = ps.run(config(name="u", epochs=3, trials=2))
    assert scratch.records[0].val_loss == one.records[0].val_loss  # plain goes on with its own training
    assert scratch.records[1].val_loss != one.records[1].val_loss
    with pytest.raises(StudyError, match="start branch -> scratch"):
        ps.run(config(name="s", epochs=3, trials=6))


@pytest.mark.parametrize(
    ("values", "says"),
    [({"start": "pretrained"}, "needs weights"), ({"start": "scratch", "weights": "w.pt"}, "takes no weights")],
)
def test_a_start_that_does_not_go_with_the_weights_is_refused(workplace, values, says):
    with pytest.raises(InputError, match=says):
        ps.run(config(name="s", **values))


def test_what_each_validation_image_came_to_is_kept(workplace):
    study = ps.run(config(name="s", trials=2, epochs=4))
    for record in ps.load_study("s").records:
        bits = np.unpackbits(np.frombuffer(base64.b64decode(record.correct), np.uint8), count=359)
        assert bits.mean() == pytest.approx(record.val_accuracy)
    assert study.records[0].correct != study.records[1].correct


def test_a_loaded_study_equals_the_one_that_was_run(workplace):
    study = ps.run(config(name="s", trials=2))
    loaded = ps.load_study("s")
    assert (loaded.subject, loaded.records) == (study.subject, study.records)
    with pytest.raises(StudyError, match="there are: s"):
        ps.load_study("t")


def test_the_default_for_digits_is_the_smallest_input_with_a_map_of_four_pixels(workplace):
    from placesearch.plan import prepare

    cpu = torch.device("cpu")
    for stem, side in (("original", 97), ("small", 32)):
        definition = prepare(ps.StudyConfig(backbone="resnet18", stem=stem), cpu).definition
        assert definition.input_size == (3, side, side)
    assert definition.name == "resnet18-digits"
    assert (definition.config.trials, definition.config.timeout) == (10, 300.0)


def test_a_last_map_that_is_too_small_is_told_with_the_two_ways_out(workplace):
    events = []
    ps.run(config(name="s", backbone="resnet18", trials=1, input_size=32, timeout=1e-9), watch=events.append)
    note = next(line for line in events[0].lines if line.startswith("note"))
    assert "--stem small" in note
    assert "--input-size" in note


def test_the_threads_of_a_trial_are_fixed_and_given_back(workplace):
    before = torch.get_num_threads()
    during = set()

    def note(event):
        if isinstance(event, StepEnded):
            during.add(torch.get_num_threads())

    torch.set_num_threads(2)
    ps.run(config(name="s", trials=1), watch=note)
    assert during == {1}
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)


@pytest.mark.parametrize("start", ["scratch", "branch"])
def test_a_study_of_brief_and_long_trainings_speaks_of_the_long_ones(workplace, start):
    study = ps.run(config(trials=17, long_epochs=2, sampler="additive", start=start))
    frame = study.trials_frame()
    count = int(frame.reference.notna().sum()) - frame[frame.epochs == 2].reference.notna().sum()
    assert frame.epochs.tolist() == ([1] * count + [1, 1, 1, 1, 2] * 4)[: len(frame)]
    assert study.findings.epochs == 2
    assert "trainings of 2 epochs" in study.caution
    front = study.front_frame()
    assert (front.estimate_low <= front.estimate).all()
    assert (front.estimate <= front.estimate_high).all()
    effects = pd.read_csv(study.folder / "sites.csv")
    assert list(effects.columns[:10]) == [
        "site", "block", "reduction", "kernel_size", "tried", "effect", "effect_low", "effect_high", "macs", "params"
    ]  # fmt: skip
    assert effects[effects.site.str.endswith("bn2") & effects.with_site.isna()].params.notna().all()
    branches = sorted(path.name for path in (workplace / "studies" / study.name).glob("branch*.safetensors"))
    assert branches == (["branch-1-0.safetensors", "branch-2-0.safetensors"] if start == "branch" else [])


def test_long_trainings_are_longer_and_need_our_sampler(workplace):
    with pytest.raises(InputError, match="no longer than the 1 epochs of others"):
        ps.run(config(long_epochs=1))
    with pytest.raises(InputError, match="needs the sampler 'additive'"):
        ps.run(config(long_epochs=4, sampler="tpe"))


@pytest.mark.slow
def test_a_study_can_end_when_its_front_has_settled(workplace, monkeypatch):
    monkeypatch.setattr(samplers, "SETTLED", 0.0)
    study = ps.run(config(trials=60, until="settled"))
    assert study.ended == "the front has settled"
    assert len(study.records) == 30  # the first multiple of ten with twenty scores before the last seven
    more = ps.run(config(trials=32))
    assert len(more.records) == 32
    with pytest.raises(InputError, match="needs the sampler 'additive'"):
        ps.run(config(name="t", until="settled", sampler="random"))


def eager(monkeypatch):
    """Stop whatever is expected to end below its best rival, from the fourth trial on that may be known."""
    monkeypatch.setattr(stopping, "DOUBT", 0.5)
    monkeypatch.setattr(stopping, "FEWEST", 4)
    return config(name="s", trials=14, epochs=2, blocks="se,cbam,eca", stop_early=True)


@pytest.mark.slow
def test_hopeless_trials_are_stopped_shown_and_never_in_the_front(workplace, monkeypatch):
    asked = eager(monkeypatch)
    study = ps.run(asked)
    stopped = [record for record in study.records if record.state == "PRUNED"]
    assert len(study.records) == 14
    assert stopped
    for record in stopped:
        assert (record.stopped_after, record.epochs, record.val_accuracy, record.reference) == (1, 2, None, None)
        assert record.macs > 0
    assert not {record.placement for record in stopped} & {record.placement for record in study.front}
    assert (
        f"{14 - len(stopped)} complete, {len(stopped)} stopped early, 0 failed"
        in (study.folder / "summary.md").read_text()
    )
    assert "stopped early" in study.caution
    table = pd.read_csv(study.folder / "trials.csv")
    assert table.curve.notna().all()
    assert table.forecast.notna().tolist() == [record.state == "PRUNED" for record in study.records]
    assert ps.load_study("s").records == study.records
    pieces = [ps.run(asked.model_copy(update={"name": "t", "trials": count})) for count in (12, 14)]
    pd.testing.assert_frame_equal(*(reproducible(each.trials_frame()) for each in (study, pieces[-1])))
    with pytest.raises(StudyError, match="stop-early True -> False"):
        ps.run(asked.model_copy(update={"stop_early": False, "trials": 15}))


@pytest.mark.slow
def test_two_workers_stop_what_one_stops(workplace, monkeypatch):
    asked = eager(monkeypatch)
    tables = [ps.run(asked.model_copy(update={"name": f"s{jobs}", "jobs": jobs})).trials_frame() for jobs in (1, 2)]
    pd.testing.assert_frame_equal(*map(reproducible, tables))
    assert (tables[0].state == "PRUNED").any()


def test_trainings_of_one_epoch_are_not_stopped_and_that_is_said_only_if_it_was_asked_for(workplace):
    told = []
    for name, asked in (("s", True), ("t", False)):
        ps.run(config(name=name, trials=1, stop_early=asked), watch=told.append)
    lines = [
        [line for line in event.lines if "--stop-early" in line] for event in told if isinstance(event, StudyBegan)
    ]
    assert [len(of_run) for of_run in lines] == [1, 0]
    assert "one epoch" in lines[0][0]
    ps.run(config(name="u", trials=1, epochs=2, stop_early=True), watch=told.append)
    assert not [line for event in told[-1:] for line in getattr(event, "lines", ()) if "--stop-early" in line]
    with pytest.raises(InputError, match="your own evaluation has to decide by itself"):
        ps.run(config(name="v", evaluate="mine:evaluate", stop_early=True))


def test_a_study_that_goes_on_under_other_code_says_so_and_keeps_it(workplace, monkeypatch):
    def notes():
        told = []
        study = ps.run(config(name="s", trials=trials), watch=told.append)
        return study, [line for event in told if isinstance(event, StudyBegan) for line in event.lines]

    note = "what scores depend on changed after 2 trials; scores before and after may not compare"
    trials = 2
    assert not any("may not compare" in line for line in notes()[1])
    monkeypatch.setattr("placesearch.definition.code_fingerprint", lambda *_: "another")
    trials = 3
    study, lines = notes()
    assert f"note: {note}" in lines
    assert ("code", note) in study.subject.facts
    trials = 4
    study, lines = notes()
    assert f"note: {note}" not in lines  # it is known
    assert ("code", note) in study.subject.facts


def test_a_report_of_other_trials_is_moved_aside_and_named(workplace):
    ps.run(config(name="s", trials=2))
    (workplace / "studies" / "s").rename(workplace / "kept")
    before = (workplace / "reports" / "s" / "trials.csv").read_text()
    told = []
    ps.run(config(name="s", trials=1), watch=told.append)
    assert (workplace / "reports" / "s-earlier-1" / "trials.csv").read_text() == before
    lines = [line for event in told if isinstance(event, StudyBegan) for line in event.lines]
    assert "note: reports/s held the report of other trials; it is kept as reports/s-earlier-1" in lines
    (workplace / "reports" / "s" / "confirmed.csv").write_text("placement,seed\n")
    ps.load_study("s").write_report()
    assert (workplace / "reports" / "s-earlier-2" / "confirmed.csv").exists()
    ps.load_study("s").write_report()
    assert not (workplace / "reports" / "s-earlier-3").exists()


@pytest.mark.parametrize("kind", ["lambda", "local", "method", "main"])
def test_an_evaluation_that_workers_cannot_import_is_refused_at_once(workplace, kind):
    def local(candidate):
        return 0.5

    class Own:
        def method(self, _candidate):
            return 0.5

    of_main = type(local)(local.__code__, {}, "of_main")
    of_main.__module__, of_main.__qualname__ = "__main__", "of_main"
    evaluate = {"lambda": lambda candidate: 0.5, "local": local, "method": Own().method, "main": of_main}[kind]
    with pytest.raises(InputError, match="workers cannot import the evaluation .*jobs=1"):
        ps.run(config(name="s", jobs=2), evaluate=evaluate)
    assert not (workplace / "studies" / "s").exists()
    assert len(ps.run(config(name="s", trials=1), evaluate=evaluate).records) == 1


def test_an_evaluation_in_the_main_script_is_refused_by_name():
    with pytest.raises(InputError, match="in the main script"):
        ps.run(config(name="s", evaluate="__main__:f"))


def test_an_emptied_journal_is_told(workplace):
    ps.run(config(name="s", trials=2))
    (workplace / "studies" / "s" / "journal.log").write_bytes(b"")
    told = []
    study = ps.run(config(name="s", trials=1), watch=told.append)
    lines = [line for event in told if isinstance(event, StudyBegan) for line in event.lines]
    assert any("journal.log is empty or missing although the study had begun" in line for line in lines)
    assert any("it is kept as reports/s-earlier-1" in line for line in lines)
    assert len(study.records) == 1


def test_a_journal_without_one_of_its_lines_is_read_or_refused_in_a_line_and_no_trial_is_lost_silently(workplace):
    """Without the line that ended it, a trial was never ended: it is run again, to the same score."""
    before = ps.run(config(name="s", trials=3)).trials_frame()
    path = workplace / "studies" / "s" / "journal.log"
    lines = path.read_text().splitlines(keepends=True)
    refused = 0
    for left_out in range(1, len(lines)):
        path.write_text("".join(lines[:left_out] + lines[left_out + 1 :]))
        try:
            after = ps.load_study("s").trials_frame()
        except StudyError as error:
            refused += "\n" not in str(error)
        else:
            ended = json.loads(lines[left_out])["op_code"] == 6
            assert len(after) == len(before) - ended, lines[left_out]
            assert after.placement.isin(before.placement).all()
    assert refused >= 4 * len(before)  # what made it, and what it needs
