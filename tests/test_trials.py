import itertools
from dataclasses import replace

import pytest
from optuna.artifacts import FileSystemArtifactStore, get_all_artifact_meta
from optuna.samplers import BaseSampler
from optuna.trial import TrialState

from placesearch.config import SAMPLERS
from placesearch.models.sites import Site
from placesearch.placement import Placement
from placesearch.records import Milestone, TrialRecord
from placesearch.search.samplers import LAG, OF_OPTUNA, derived_seed
from placesearch.search.space import make_space, reference_placements, with_budget
from placesearch.search.stopping import FEWEST
from placesearch.search.trials import Trials

OBJECTIVES = ("accuracy", "macs", "params")
SITES = [Site(name, frozenset({"residual"}), 16, 8, 8) for name in ("a", "b", "c")]
EVERY = [pytest.param(name, marks=pytest.mark.slow) if name == "gp" else name for name in SAMPLERS]
SPACE = make_space(SITES, ["se", "cbam"], [4, 16], [3])
REFERENCES = reference_placements(SITES)


def added(_, setting):
    """What a block adds to macs and to params."""
    return len(str(setting)), 2 * len(str(setting))


def opened(folder, sampler="tpe", seed=0, space=SPACE):
    trials = Trials(folder / "journal.log", "s", OBJECTIVES)
    trials.begin(space, REFERENCES, sampler, seed, added)
    return trials


def finished(asked):
    """A result that depends on the placement alone."""
    size = len(str(asked.placement))
    return TrialRecord(
        trial=asked.trial, state="COMPLETE", placement=asked.placement, reference=asked.reference,
        val_accuracy=derived_seed(size) / 2**32, val_loss=1.0, macs=size, params=2 * size, epochs=1, seconds=1.0,
        seed=asked.seed or 0,
    )  # fmt: skip


def go_on(trials, count):
    for _ in range(count):
        trials.complete(finished(trials.ask()))
    return [(record.trial, str(record.placement)) for record in trials.records()]


def test_references_come_first_and_those_outside_of_the_space_keep_their_text(tmp_path):
    trials = opened(tmp_path)
    go_on(trials, 4)
    records = trials.records()
    assert [record.reference for record in records] == [*REFERENCES, None]
    assert [record.placement for record in records[:3]] == list(REFERENCES.values())
    assert SPACE.chosen(REFERENCES["plain"]) is not None
    assert SPACE.chosen(records[2].placement) is None  # k=7 is not among the choices


def test_each_trial_has_its_config_attached_and_opening_the_journal_again_writes_nothing(tmp_path):
    trials = opened(tmp_path)
    for number in range(2):
        trials.complete(finished(trials.ask()), f"placesearch: 1 # {number}\n")
    written = (tmp_path / "journal.log").read_bytes()
    study = opened(tmp_path)._study
    assert (tmp_path / "journal.log").read_bytes() == written
    assert study.metric_names == list(OBJECTIVES)
    store = FileSystemArtifactStore(tmp_path / "artifacts")
    for number, trial in enumerate(study.get_trials()):
        (meta,) = get_all_artifact_meta(trial, storage=study._storage)
        assert meta.filename == f"trial-{number}.yaml"
        with store.open_reader(meta.artifact_id) as file:
            assert file.read() == f"placesearch: 1 # {number}\n".encode()


def test_a_config_that_cannot_be_written_loses_no_trial(tmp_path):
    (tmp_path / "artifacts").write_text("a file where the folder would be")
    trials = opened(tmp_path)
    trials.complete(finished(trials.ask()), "placesearch: 1\n")
    assert [record.trial for record in opened(tmp_path).records()] == [0]


@pytest.mark.parametrize("sampler", EVERY)
def test_an_interrupted_study_gets_the_suggestions_of_one_that_was_not(tmp_path, sampler):
    for name in ("whole", "pieces"):
        (tmp_path / name).mkdir()
    whole = go_on(opened(tmp_path / "whole", sampler), 24)
    for count in (1, 2, 9, 12):
        pieces = go_on(opened(tmp_path / "pieces", sampler), count)
    assert pieces == whole


@pytest.mark.parametrize("sampler", EVERY)
def test_no_placement_is_suggested_twice_and_the_search_ends_when_all_were_tried(tmp_path, sampler):
    space = make_space(SITES[:2], ["se"], [4, 16], [3])
    trials = opened(tmp_path, sampler, space=space)
    while (asked := trials.ask()) is not None:
        trials.complete(finished(asked))
    texts = [str(record.placement) for record in trials.records()]
    assert len(set(texts)) == len(texts)
    everything = {
        str(space.placement(dict(zip("ab", c, strict=True)))) for c in itertools.product(*space.choices.values())
    }
    assert set(texts) == everything | {str(placement) for placement in REFERENCES.values()}


@pytest.mark.parametrize("sampler", EVERY)
def test_within_a_budget_everything_affordable_is_tried_and_nothing_else(tmp_path, sampler):
    price = {"se(r=4)": 3, "se(r=16)": 2, "cbam(r=4,k=3)": 5, "cbam(r=16,k=3)": 4}
    space = with_budget(SPACE, [6], lambda _, setting: [price[str(setting)]])
    trials = Trials(tmp_path / "journal.log", "s", OBJECTIVES)
    trials.begin(space, {"plain": Placement()}, sampler, 0, added)
    while (asked := trials.ask()) is not None:
        trials.complete(finished(asked))
    texts = {str(record.placement) for record in trials.records()}
    affordable = [
        str(SPACE.placement(dict(zip("abc", texts, strict=True))))
        for texts in itertools.product(*SPACE.choices.values())
        if sum(price.get(text, 0) for text in texts) <= 6
    ]
    assert sorted(texts) == sorted(affordable)


@pytest.mark.parametrize("sampler", EVERY)
def test_suggestions_do_not_depend_on_how_many_trials_run_at_a_time(tmp_path, sampler):
    """Eight at a time, ending in reverse order, against one at a time."""
    for name in ("one", "eight"):
        (tmp_path / name).mkdir()
    one = go_on(opened(tmp_path / "one", sampler), 30)
    trials, running = opened(tmp_path / "eight", sampler), []
    while len(trials.records()) < 30:
        while len(running) < 8 and (asked := trials.ask(30)) is not None:
            running.append(asked)
        trials.complete(finished(running.pop()))
    assert [(record.trial, str(record.placement)) for record in trials.records()] == one


class Stubborn(BaseSampler):
    """A sampler that suggests the same each time, and notes which trials it was shown."""

    shown: list[list[tuple[TrialState, str]]]

    def infer_relative_search_space(self, study, trial):
        raise NotImplementedError

    def sample_relative(self, study, trial, search_space):  # noqa: ARG002
        self.shown.append([(t.state, str(SPACE.placement(t.params))) for t in study.get_trials(deepcopy=False)])
        return SPACE.chosen(Placement.parse("a=se(r=4) b=se(r=4) c=se(r=4)"))

    def sample_independent(self, study, trial, name, distribution):
        raise NotImplementedError


@pytest.fixture
def stubborn(monkeypatch):
    monkeypatch.setattr(Stubborn, "shown", [], raising=False)
    monkeypatch.setitem(OF_OPTUNA, "gp", lambda _: Stubborn())


def test_a_sampler_sees_what_runs_and_nothing_of_how_it_ended(tmp_path, stubborn):
    trials = opened(tmp_path, "gp")
    go_on(trials, 14)
    placements = [str(record.placement) for record in trials.records()]
    held = [text for text in placements if SPACE.chosen(Placement.parse(text)) is not None]
    finished_then, running_then = held[: -LAG - 1], held[-LAG - 1 : -1]
    assert Stubborn.shown[-1] == [
        *((TrialState.COMPLETE, text) for text in finished_then),
        *((TrialState.RUNNING, text) for text in running_then),
    ]


def test_what_a_sampler_suggests_again_is_varied_and_not_asked_for_many_times(tmp_path, stubborn):
    trials = opened(tmp_path, "gp")
    go_on(trials, len(REFERENCES) + 1)
    suggested = trials.records()[-1].placement
    assert len(Stubborn.shown) == 1
    go_on(trials, 1)
    assert len(Stubborn.shown) == 3
    assert len(set(trials.records()[-1].placement.items()) & set(suggested.items())) == len(SITES) - 1


@pytest.mark.parametrize("sampler", ["additive", "tpe"])
def test_the_sampler_learns_from_the_trials_that_it_may_see(tmp_path, sampler):
    """What earlier trials scored has to make a difference."""
    texts = []
    for name, sign in (("up", 1), ("down", -1)):
        (tmp_path / name).mkdir()
        trials = opened(tmp_path / name, sampler)
        for _ in range(40):
            asked = trials.ask()
            accuracy = 0.5 + 0.1 * sign * len(asked.placement)
            trials.complete(replace(finished(asked), val_accuracy=accuracy, macs=1, params=1))
        texts.append([len(record.placement) for record in trials.records()[20:]])
    assert sum(texts[0]) > sum(texts[1]) + 5


@pytest.mark.parametrize("long_epochs", [None, 4])
def test_now_and_then_a_member_of_the_front_is_repeated_under_the_next_seed(tmp_path, long_epochs):
    """And nothing else ever is, whether trials are interrupted or not."""
    for name, counts in (("whole", [75]), ("pieces", [36, 30, 9])):
        (tmp_path / name).mkdir()
        for count in counts:
            trials = Trials(tmp_path / name / "journal.log", "s", OBJECTIVES)
            trials.begin(SPACE, REFERENCES, "additive", 0, added, long_epochs)
            for _ in range(count):
                asked = trials.ask()
                trials.complete(replace(finished(asked), epochs=asked.epochs or 1))
    whole = Trials(tmp_path / "whole" / "journal.log", "s", OBJECTIVES).records()
    assert whole == trials.records()
    again: dict[object, list[TrialRecord]] = {}
    for record in whole:
        again.setdefault((record.placement, record.epochs), []).append(record)
    assert all([record.seed for record in same] == list(range(len(same))) for same in again.values())
    seen: set[Placement] = set()
    repeats = []
    for record in whole:
        if record.placement in seen and record.reference is None:
            repeats.append(record.trial - len(REFERENCES))
        seen.add(record.placement)
    assert repeats == [31, 39, 47, 55, 63, 71]
    if long_epochs:
        assert {record.epochs for record in whole if record.trial - len(REFERENCES) in repeats} == {long_epochs}


def test_seeds_differ(tmp_path):
    for name in ("0", "1"):
        (tmp_path / name).mkdir()
    assert go_on(opened(tmp_path / "0", seed=0), 8) != go_on(opened(tmp_path / "1", seed=1), 8)


def test_a_lost_trial_is_asked_again_under_its_position(tmp_path):
    for name in ("whole", "lost"):
        (tmp_path / name).mkdir()
    whole = go_on(opened(tmp_path / "whole"), 8)
    trials = opened(tmp_path / "lost")
    go_on(trials, 5)
    lost = trials.ask()  # and the process dies
    again = opened(tmp_path / "lost")
    assert len(again.records()) == 5
    assert again.ask() == lost
    again.complete(finished(lost))
    assert go_on(again, 2) == whole


def test_a_trial_lost_at_any_write_is_asked_again_with_the_same_placement(tmp_path):
    """Cut the journal after every single record that asking writes."""
    trials = opened(tmp_path)
    go_on(trials, 4)
    path = tmp_path / "journal.log"
    before = path.read_bytes()
    asked = trials.ask()
    lines = path.read_bytes()[len(before) :].splitlines(keepends=True)
    assert len(lines) >= 2
    for count in range(len(lines) + 1):
        path.write_bytes(before + b"".join(lines[:count]))
        again = opened(tmp_path)
        assert again.ask() == asked
        assert len(again.records()) == 4


def test_a_lost_reference_is_asked_again(tmp_path):
    asked = opened(tmp_path).ask()
    path = tmp_path / "journal.log"
    lines = path.read_bytes().splitlines(keepends=True)
    for count in range(1, len(lines) + 1):
        path.write_bytes(b"".join(lines[:count]))
        assert opened(tmp_path).ask() == asked


def test_what_is_stored_reads_back_equal(tmp_path):
    trials = opened(tmp_path)
    record = finished(trials.ask())
    trials.complete(record)
    asked = trials.ask()
    failed = TrialRecord(
        trial=asked.trial, state="FAIL", placement=asked.placement, reference=asked.reference, error="it broke", seed=0
    )
    trials.complete(failed)
    assert opened(tmp_path).records() == [record, failed]


def test_a_failed_trial_is_not_tried_again(tmp_path):
    trials = opened(tmp_path)
    for _ in range(12):
        asked = trials.ask()
        trials.complete(TrialRecord(trial=asked.trial, state="FAIL", placement=asked.placement, error="it broke"))
    assert len({record.placement for record in trials.records()}) == 12


def test_objectives_have_their_directions(tmp_path):
    import optuna

    trials = opened(tmp_path)
    go_on(trials, 1)
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(tmp_path / "journal.log")))
    study = optuna.load_study(storage=storage, study_name="s")
    assert [direction.name for direction in study.directions] == ["MAXIMIZE", "MINIMIZE", "MINIMIZE"]
    record = trials.records()[0]
    assert study.trials[0].values == [record.val_accuracy, record.macs, record.params]
    assert study.trials[0].params == SPACE.chosen(Placement())


def test_some_trials_are_long_and_the_first_long_ones_are_the_references(tmp_path):
    """Wherever the study was interrupted, and although each placement is suggested once only."""

    def go(folder, counts):
        folder.mkdir()
        for count in counts:
            trials = Trials(folder / "journal.log", "s", OBJECTIVES)
            trials.begin(SPACE, REFERENCES, "additive", 0, added, 4)
            for _ in range(count):
                expected = trials.next_epochs()
                asked = trials.ask()
                assert asked.epochs == expected
                trials.complete(replace(finished(asked), epochs=asked.epochs or 1))
        return [(record.epochs, record.reference, str(record.placement)) for record in trials.records()]

    whole = go(tmp_path / "whole", [31])
    assert [epochs for epochs, *_ in whole] == [1] * 3 + [1, 1, 1, 1, 4] * 4 + [1, 4] * 4
    assert [reference for _, reference, _ in whole[7:18:5]] == list(REFERENCES)
    suggested = [text for _, reference, text in whole if reference is None]
    assert len(set(suggested)) == len(suggested) == 31 - 6
    assert go(tmp_path / "pieces", [2, 3, 6, 20]) == whole


def test_a_long_trial_that_was_lost_comes_back_as_a_long_one(tmp_path):
    for _ in range(2):
        trials = Trials(tmp_path / "journal.log", "s", OBJECTIVES)
        trials.begin(SPACE, REFERENCES, "additive", 0, added, 4)
        for _ in range(7 - len(trials.records())):
            trials.complete(finished(trials.ask()))
        asked = trials.ask()
        assert (asked.trial, asked.epochs, asked.reference) == (7, 4, "plain")


def test_limits_are_constraints_that_optuna_understands(tmp_path):
    trials = Trials(tmp_path / "journal.log", "s", OBJECTIVES)
    trials.begin(SPACE, REFERENCES, "tpe", 0, added, None, {"macs": 20.0, "params": 1000.0})
    go_on(trials, 5)
    for trial, record in zip(trials._all(), trials.records(), strict=True):
        assert trial.constraints == {"macs": record.macs - 20.0, "params": record.params - 1000.0}


def test_a_front_settles_at_the_same_trial_however_many_run_at_a_time(tmp_path):
    """Nothing but two blocks matters, and there is hardly any noise."""

    def scored(asked):
        good = asked.placement.get("a") is not None and asked.placement["a"].block == "se"
        tiny = derived_seed(asked.trial) / 2**32
        return replace(finished(asked), val_accuracy=0.5 + 0.3 * good + 0.001 * tiny)

    ends = []
    for at_a_time in (1, 6):
        folder = tmp_path / str(at_a_time)
        folder.mkdir()
        trials, running = opened(folder, "additive"), []
        while True:
            while len(running) < at_a_time and not trials.is_settled() and (asked := trials.ask()) is not None:
                running.append(asked)
            if not running:
                break
            trials.complete(scored(running.pop()))
        ends.append(len(trials.records()))
    assert ends[0] == ends[1]
    assert 20 < ends[0] < 100
    assert not opened(tmp_path / "1", "tpe").is_settled()


EPOCHS = 5


def stopping(folder, sampler="additive", long_epochs=None, seed=0):
    folder.mkdir(exist_ok=True)
    trials = Trials(folder / "journal.log", "s", OBJECTIVES)
    trials.begin(SPACE, REFERENCES, sampler, seed, added, long_epochs, None, EPOCHS)
    return trials


def stopped_or_finished(asked):
    """SE is worth much and CBAM nothing; halfway there is half of it, which the end follows but for a little."""
    worth = 0.5 + 0.1 * sum(setting.block == "se" for setting in asked.placement.values())
    tiny = 1e-4 * derived_seed(asked.trial) / 2**32
    record = replace(finished(asked), epochs=asked.epochs or EPOCHS, curve=(worth / 2,), val_accuracy=worth + tiny)
    if worth / 2 >= asked.milestone.floor:
        return record
    forecast = asked.milestone.intercept + asked.milestone.slope * worth / 2
    return replace(record, state="PRUNED", val_accuracy=None, val_loss=None, stopped_after=3, forecast=forecast)


@pytest.mark.parametrize("sampler", EVERY)
def test_what_is_stopped_does_not_depend_on_how_many_run_at_a_time_or_on_interruptions(tmp_path, sampler):
    """Nor do suggestions, and no sampler stumbles over trials that were stopped."""
    one = stopping(tmp_path / "one", sampler, seed=1)
    for _ in range(34):
        one.complete(stopped_or_finished(one.ask()))
    many, running = stopping(tmp_path / "many", sampler, seed=1), []
    while len(many.records()) < 34:
        while len(running) < 8 and (asked := many.ask(34)) is not None:
            running.append(asked)
        many.complete(stopped_or_finished(running.pop()))
        if len(many.records()) % 9 == 0:
            many, running = stopping(tmp_path / "many", sampler, seed=1), []
    assert many.records() == one.records()
    records = one.records()
    first = 1 + min(record.trial for record in records if record.state == "PRUNED")
    assert first > FEWEST + LAG
    assert sum(record.state == "PRUNED" for record in records) > 1
    texts = [str(record.placement) for record in records]
    assert all(texts.count(str(record.placement)) == 1 for record in records if record.state == "PRUNED")
    cheaper = [(r.macs, r.val_accuracy) for r in records if r.state == "COMPLETE"]
    for record in records:
        if record.state == "PRUNED":
            assert max(value for macs, value in cheaper if macs <= record.macs) > record.forecast


def test_references_are_looked_at_and_never_stopped(tmp_path):
    trials = stopping(tmp_path / "s", long_epochs=20)
    epochs = []
    for _ in range(40):
        asked = trials.ask()
        if asked.reference:
            assert asked.milestone == Milestone(16 if asked.epochs else 4)
            epochs.append(asked.milestone.epoch)
        trials.complete(stopped_or_finished(asked))
    assert epochs == [4] * 3 + [16] * 3


def test_long_trials_are_compared_with_long_ones(tmp_path):
    """Brief ones score far more here; a long trial would be hopeless beside them."""
    trials = stopping(tmp_path / "s", long_epochs=20)
    for position in range(30):
        asked = trials.ask()
        if asked.epochs:
            assert asked.milestone == Milestone(16), position  # fewer than FEWEST long ones so far
        record = stopped_or_finished(asked)
        trials.complete(replace(record, val_accuracy=0.1) if asked.epochs else record)
    assert sum(record.state == "PRUNED" for record in trials.records()) > 2


def test_nothing_is_looked_at_unless_asked_for(tmp_path):
    assert opened(tmp_path).ask().milestone is None


def test_the_model_goes_by_the_forecast_of_what_was_stopped(tmp_path):
    """Whatever carries CBAM is stopped: the sampler learns from it all the same."""
    counts = []
    for name, forecast in (("bad", 0.2), ("good", 0.9)):
        trials = stopping(tmp_path / name)
        for _ in range(40):
            asked = trials.ask()
            cbam = sum(setting.block == "cbam" for setting in asked.placement.values())
            record = replace(finished(asked), val_accuracy=0.5, macs=1, params=1, epochs=EPOCHS)
            if cbam and not asked.reference:
                record = replace(record, state="PRUNED", val_accuracy=None, forecast=forecast, stopped_after=3)
            trials.complete(record)
        counts.append(sum(s.block == "cbam" for record in trials.records()[20:] for s in record.placement.values()))
    assert counts[0] < counts[1] - 5


def test_every_sampler_that_a_config_may_name_can_be_made():
    assert ("additive", *OF_OPTUNA) == SAMPLERS
