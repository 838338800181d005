"""The trials of a study that several processes work on: `placesearch.search.trials` in a shared storage."""

import random
from dataclasses import replace

import pytest
from sqlalchemy.exc import IntegrityError, OperationalError

from placesearch.errors import InputError, StudyError
from placesearch.placement import Placement
from placesearch.search.trials import Trials, read_shared
from placesearch.storage_url import StorageUrl

from test_trials import OBJECTIVES, REFERENCES, SPACE, added, finished, go_on, opened  # isort: skip


@pytest.fixture(
    params=["sqlite", pytest.param("postgres", marks=pytest.mark.slow), pytest.param("mariadb", marks=pytest.mark.slow)]
)
def url(request, tmp_path):
    if request.param != "sqlite":
        server = request.getfixturevalue(request.param)
        server.create()
        return StorageUrl.parse(server.url)
    return StorageUrl.parse(f"sqlite:///{tmp_path}/shared.db")


def joined(url, sampler="additive", lag=7, **options):
    """A process that works on the study, as far as the storage can tell."""
    trials = Trials(url, "s", OBJECTIVES)
    trials.begin(SPACE, REFERENCES, sampler, 0, added, lag=lag, **options)
    return trials


def texts(trials):
    return [(record.trial, str(record.placement), record.seed) for record in trials.records()]


@pytest.mark.parametrize("sampler", ["additive", *(pytest.param(n, marks=pytest.mark.slow) for n in ("tpe", "nsga2"))])
def test_several_processes_get_what_one_would_get_and_nothing_twice(tmp_path, url, sampler):
    go_on(one := opened(tmp_path, sampler), 40)
    random.seed(1)
    workers = [joined(url, sampler) for _ in range(3)]
    running: list = []
    while not workers[0].is_over(40):
        worker = random.choice(workers)
        if random.random() < 0.6 and (asked := worker.ask(40)) is not None:
            running.append((worker, asked))
        elif running:
            worker, asked = running.pop(random.randrange(len(running)))
            worker.complete(finished(asked))
    assert texts(workers[1]) == texts(one)
    assert all(worker.ask(40) is None for worker in workers)
    assert workers[2].count() == 40


def test_a_process_is_given_no_trial_whose_suggestion_depends_on_one_that_runs(url):
    workers = [joined(url, lag=4) for _ in range(2)]
    tasks = [worker.ask() for worker in (*workers, *workers, workers[0])]
    assert [task.trial for task in tasks] == [0, 1, 2, 3, 4]
    assert [worker.ask() for worker in workers] == [None, None]
    workers[1].complete(finished(tasks[1]))
    assert workers[0].ask() is None  # the first one still runs
    workers[0].complete(finished(tasks[0]))
    assert workers[1].ask().trial == 5


def test_positions_that_another_process_has_begun_and_not_placed_are_placed_for_it(url):
    """It may have been killed between the two, or be slow; what a position gets does not depend on who says it."""
    first, second = joined(url), joined(url)
    go_on(first, 6)
    first._take_next(first._all(), None)  # the seventh is begun, and that is all
    assert first._claimed == {6}
    task = second.ask()
    assert task.trial == 7
    placed = second._all()[6].user_attrs["placement"]
    assert str(first.ask().placement) == placed != str(task.placement)


def test_what_a_process_leaves_is_taken_up_by_the_next_to_ask(url):
    first, second = joined(url), joined(url)
    tasks = [first.ask(), first.ask()]
    assert second.ask().trial == 2
    first.leave()
    assert [second.ask(), second.ask()] == tasks
    assert second.ask().trial == 3


def test_a_result_that_comes_after_the_trial_was_taken_over_and_ended_is_dropped(url):
    slow, quick = joined(url), joined(url)
    task = slow.ask()
    slow._storage.set_trial_state_values(slow._all()[0]._trial_id, state=slow._all()[0].state.WAITING)
    assert quick.ask() == task
    quick.complete(finished(task))
    slow.complete(replace(finished(task), val_accuracy=0.123))
    assert slow.records() == quick.records() == [finished(task)]


def test_no_trial_is_begun_beyond_the_number_asked_for(url):
    workers = [joined(url) for _ in range(4)]
    tasks = [worker.ask(3) for worker in workers]
    assert sorted(task.trial for task in tasks if task) == [0, 1, 2]
    assert not workers[0].is_over(3)
    for worker, task in zip(workers, tasks, strict=True):
        if task:
            worker.complete(finished(task))
    assert workers[0].is_over(3)
    assert not workers[0].is_over(4)


def test_a_study_in_which_everything_was_tried_is_over_for_all(url):
    workers = []
    for _ in range(2):
        workers.append(Trials(url, "s", OBJECTIVES))
        workers[-1].begin(small := SPACE.__class__({"a": ("none", "se(r=4)", "se(r=16)")}), {"plain": Placement()},
                          "random", 0, added)  # fmt: skip
    tasks = [task for worker in workers for _ in range(3) if (task := worker.ask()) is not None]
    assert len(tasks) == 3 == small.size
    assert not workers[0].is_over()
    for task in tasks:
        workers[0].complete(finished(task))
    assert workers[0].is_over()
    assert workers[1].is_over()


def test_a_trial_is_stored_whole_or_not_at_all(url, monkeypatch):
    trials = joined(url)
    task = trials.ask()
    monkeypatch.setattr(trials._study, "tell", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trials.complete(finished(task))
    (stored,) = joined(url)._all()
    assert stored.state.name == "RUNNING"
    assert "val_accuracy" not in stored.user_attrs
    monkeypatch.undo()
    trials.complete(finished(task))
    assert joined(url).records() == [finished(task)]


def test_a_definition_is_kept_whole_however_long_it_is(url):
    trials = joined(url)
    assert trials.definition() is None
    text = "ä: [1, 2]\n" * 5000
    trials.define(text)
    assert trials.definition() == read_shared(url, "s") == text
    assert read_shared(url, "another") is None


def test_a_study_that_is_not_there_is_made_only_if_asked_for(url):
    with pytest.raises(StudyError, match="no study 's' in (sqlite|postgresql|mysql)://"):
        Trials(url, "s", OBJECTIVES, make=False)
    assert read_shared(url, "s") is None
    joined(url)
    Trials(url, "s", OBJECTIVES, make=False)


def test_a_storage_that_cannot_be_reached_is_told_in_a_line(tmp_path):
    with pytest.raises(InputError, match="cannot use sqlite:////nowhere/s.db: unable to open database file"):
        Trials(StorageUrl.parse("sqlite:////nowhere/s.db"), "s", OBJECTIVES)


def test_a_trial_that_is_placed_and_ends_while_another_process_places_it_for_its_owner_is_left_alone(url, monkeypatch):
    first, second = joined(url), joined(url)
    go_on(first, 6)
    first._take_next(first._all(), None)
    place = second._place

    def slow(trial):
        if trial.number == 6 and second.count() == 8 and not first.records()[6:]:
            first.complete(finished(first.ask()))
        return place(trial)

    monkeypatch.setattr(second, "_place", slow)
    assert second.ask().trial == 7
    assert len(first.records()) == 7


def test_a_position_whose_placement_another_process_writes_at_the_same_moment_is_still_given_out(url, monkeypatch):
    """The database refuses the second of the two, and who has begun the position asks again."""
    trials = joined(url)
    go_on(trials, 6)
    place, refused = trials._place, []

    def refuse(trial):
        if not refused:
            refused.append(trial.number)
            raise IntegrityError("insert", {}, Exception("duplicate key"))
        return place(trial)

    monkeypatch.setattr(trials, "_place", refuse)
    assert (trials.ask().trial, refused) == (6, [6])


def test_a_position_that_was_stored_though_the_storage_was_away_before_it_said_so_is_given_out(url, monkeypatch):
    trials = joined(url)
    create = trials._storage.create_new_trial

    def cut_off(*arguments):
        monkeypatch.undo()
        create(*arguments)
        raise OperationalError("commit", {}, Exception("server closed the connection"))

    monkeypatch.setattr(trials._storage, "create_new_trial", cut_off)
    assert trials.ask().trial == 0
    assert trials.count() == 1


def test_a_trial_whose_result_cannot_be_stored_yet_stays_alive(url, monkeypatch):
    """Its owner waits for the storage; another process must not take it over as soon as that is back."""
    trials = joined(url)
    task = trials.ask()
    monkeypatch.setattr(trials._study, "tell", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trials.complete(finished(task))
    assert trials._claims.is_own(trials._all()[0])
    monkeypatch.undo()
    trials.complete(finished(task))
    assert not trials._claims.is_own(trials._all()[0])
