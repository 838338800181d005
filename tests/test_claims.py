import os
import subprocess
import sys
from copy import deepcopy

import optuna
import pytest
from optuna.trial import TrialState

from placesearch.search.claims import BEAT_SECONDS, GRACE_SECONDS, SETTLE_SECONDS, Claims, Owner


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def study():
    return optuna.create_study()


def elsewhere(number=1):
    """A process on another machine."""
    return Owner("another boot", 1, "1", f"elsewhere-{number}")


def here(name="here"):
    return Owner("this boot", 1, "1", name)


def trials(study):
    return study.get_trials(deepcopy=False)


def looked(claims, study, clock, seconds, step=1.0, alive=()):
    """Look once a second as long as nothing is found, while others beat."""
    until = clock.now + seconds
    while clock.now < until:
        clock.now += step
        if clock.now % BEAT_SECONDS < step:
            for other in alive:
                other.beat()
        if (found := claims.lost(trials(study))) is not None:
            return found
    return None


def test_a_trial_whose_owner_beats_is_never_lost(study, clock):
    owner, other = Claims(study._storage, elsewhere(), clock), Claims(study._storage, here(), clock)
    study.ask()
    owner.begin(trials(study)[0]._trial_id)
    assert looked(other, study, clock, 20 * GRACE_SECONDS, alive=[owner]) is None


def test_a_trial_whose_owner_is_silent_is_taken_over_after_the_grace_and_not_before(study, clock):
    owner, other = Claims(study._storage, elsewhere(), clock), Claims(study._storage, here(), clock)
    study.ask()
    owner.begin(trials(study)[0]._trial_id)
    assert looked(other, study, clock, GRACE_SECONDS) is None
    found = looked(other, study, clock, 2 * SETTLE_SECONDS + 3)
    assert found is not None
    assert found.number == 0
    assert other.is_own(found)
    assert looked(owner, study, clock, 10, alive=[other]) is None


def test_clocks_of_other_machines_do_not_matter(study):
    """One is an hour behind, and jumps."""
    behind, ours = Clock(), Clock()
    behind.now = -3600.0
    owner, other = Claims(study._storage, elsewhere(), behind), Claims(study._storage, here(), ours)
    study.ask()
    owner.begin(trials(study)[0]._trial_id)
    for _ in range(3 * int(GRACE_SECONDS / BEAT_SECONDS)):
        behind.now += 1000.0
        ours.now += BEAT_SECONDS
        owner.beat()
        assert other.lost(trials(study)) is None


def test_of_several_that_find_a_lost_trial_one_takes_it(study, clock):
    names = [f"here-{number}" for number in range(8)]
    finders = [Claims(study._storage, here(name), clock) for name in names]
    study.ask()
    Claims(study._storage, elsewhere(), clock).begin(trials(study)[0]._trial_id)
    taken = []
    for tick in range(1000):
        clock.now += 0.1
        finder = finders[tick % len(finders)]
        if tick % 100 == 0:
            for other in finders:
                other.beat()
        if (found := finder.lost(trials(study))) is not None:
            taken.append((finder, found.number))
    assert len(taken) == 1


@pytest.mark.parametrize("apart", [0.0, 0.7, 1.5, 2.3, 2.9])
def test_several_that_find_a_lost_trial_one_after_the_other_do_not_keep_it_from_each_other(study, clock, apart):
    study.ask()
    Claims(study._storage, here("gone"), clock).begin(trials(study)[0]._trial_id)
    finders = [Claims(study._storage, here(f"finder {number}"), clock) for number in range(3)]
    found = []
    for tenth in range(900):
        clock.now = tenth / 10
        for number, finder in enumerate(finders):
            since = tenth - round(10 * apart * number)
            if since >= 0 and since % 10 == 0 and finder.lost(trials(study)) is not None:
                found.append(number)
    assert len(found) == 1


def test_who_takes_a_lost_trial_over_and_dies_loses_it_again(study, clock):
    first, second = (Claims(study._storage, elsewhere(number), clock) for number in (2, 3))
    study.ask()
    Claims(study._storage, elsewhere(), clock).begin(trials(study)[0]._trial_id)
    assert looked(first, study, clock, 2 * GRACE_SECONDS) is not None
    assert looked(second, study, clock, GRACE_SECONDS) is None
    assert looked(second, study, clock, GRACE_SECONDS) is not None


def test_one_that_wants_a_lost_trial_and_dies_is_not_waited_for(study, clock):
    """Its name stands beside the trial, and it never comes for it."""
    first, second = (Claims(study._storage, elsewhere(number), clock) for number in (2, 3))
    study.ask()
    Claims(study._storage, elsewhere(), clock).begin(trials(study)[0]._trial_id)
    assert looked(second, study, clock, GRACE_SECONDS) is None
    first.lost(trials(study))
    clock.now += GRACE_SECONDS + 1
    second.lost(trials(study))
    first.lost(trials(study))
    assert looked(second, study, clock, 10 * SETTLE_SECONDS) is not None


@pytest.mark.parametrize("waits", [[GRACE_SECONDS + 1], [GRACE_SECONDS + 1, SETTLE_SECONDS + 1]])
def test_a_trial_whose_result_comes_while_it_is_taken_over_is_not_lost(study, clock, waits):
    """It was read before its result came, and then its process was found to have ended."""
    study.ask()
    Claims(study._storage, elsewhere(), clock).begin(trials(study)[0]._trial_id)
    claims = Claims(study._storage, here(), clock)
    for wait in waits:
        assert claims.lost(trials(study)) is None
        clock.now += wait
    read = deepcopy(trials(study))
    study.tell(0, 1.0)
    assert claims.lost(read) is None
    assert not claims.is_own(read[0])


def test_a_trial_that_nobody_signed_is_lost_after_the_grace(study, clock):
    """Its process was killed between the two."""
    study.ask()
    claims = Claims(study._storage, here(), clock)
    assert looked(claims, study, clock, GRACE_SECONDS) is None
    assert looked(claims, study, clock, 10 * SETTLE_SECONDS) is not None


def test_trials_that_wait_or_have_ended_are_not_lost(study, clock):
    study.enqueue_trial({})
    study.tell(study.ask(), 1.0)
    study.enqueue_trial({})
    assert [trial.state for trial in trials(study)] == [TrialState.COMPLETE, TrialState.WAITING]
    assert looked(Claims(study._storage, here(), clock), study, clock, 10 * GRACE_SECONDS) is None


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="process ids are told by /proc")  # noqa: PTH110
@pytest.mark.slow
def test_a_process_of_this_machine_is_known_to_be_gone_as_soon_as_it_is(study, clock):
    code = "from placesearch.search.claims import Owner; print(*Owner.this_process().plain(), sep='|'); input()"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    machine, pid, born, name = process.stdout.readline().strip().split("|")
    owner = Owner(machine, int(pid), born, name)
    assert not owner.is_gone()
    process.kill()
    while process.poll() is None and not owner.is_gone():  # a zombie is gone, too
        pass
    assert owner.is_gone()
    process.communicate()
    assert owner.is_gone()
    assert Owner(machine, os.getpid(), born, name).is_gone()  # this process id now, another process
    assert not Owner.this_process().is_gone()
    study.ask()
    Claims(study._storage, owner, clock).begin(trials(study)[0]._trial_id)
    claims = Claims(study._storage, Owner.this_process(), clock)
    assert looked(claims, study, clock, 2 * SETTLE_SECONDS + 2) is not None


def test_two_processes_that_are_one_by_their_ids_are_two_by_their_names():
    first, second = Owner.this_process(), Owner.this_process()
    assert (first.machine, first.pid, first.born) == (second.machine, second.pid, second.born)
    assert first.name != second.name
    assert Owner(*first.plain()) == first


def test_a_beat_that_cannot_be_written_is_written_the_next_time(study, clock, monkeypatch):
    claims = Claims(study._storage, here(), clock)
    study.ask()
    claims.begin(trials(study)[0]._trial_id)
    with monkeypatch.context() as away:
        away.setattr(study._storage, "set_trial_system_attr", lambda *_: 1 / 0)
        claims.beat()
    assert trials(study)[0].system_attrs["placesearch:beat"] == 0
    claims.beat()
    assert trials(study)[0].system_attrs["placesearch:beat"] == 1
