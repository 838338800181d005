import heapq
import statistics

import numpy as np
import pytest

from placesearch.cli.course import Course
from placesearch.placement import Placement
from placesearch.records import StepEnded, StudyBegan, Task, TrialBegan, TrialEnded, TrialRecord
from placesearch.search.samplers import LAG
from placesearch.search.suggesting import long_number

STEPS = 50


class Simulated:
    """A study as `placesearch.study` runs it, on a clock of its own: trials take as long as they are drawn to take.

    Candidates differ in how long they take, a training differs from the next, each has a fixed part beside its
    epochs, workers have to get ready first, and suggestions take time.
    """

    def __init__(
        self, seed, jobs, trials=None, epochs=None, lengths=(5, 20), before=0, steps=True, suggestion=0.1, ready=6.0
    ):
        self.random = np.random.default_rng(seed)
        self.jobs, self.trials, self.steps = jobs, trials, steps
        self.lengths, self.references, self.suggestion, self.ready = lengths, 6, suggestion, ready
        self.now = 1000.0
        self.epoch = float(self.random.uniform(0.5, 8.0))
        self.timeout = epochs and epochs * self.epoch
        self.finished = [self.ended(position, self.seconds_of(position)) for position in range(before)]

    def epochs_at(self, position):
        is_long = len(self.lengths) > 1 and long_number(position - self.references) is not None
        return self.lengths[1] if is_long else self.lengths[0]

    def seconds_of(self, position):
        candidate = self.random.uniform(0.85, 1.25)
        training = self.random.lognormal(0.0, 0.08)
        return self.epoch * (0.3 + self.epochs_at(position) * candidate * training)

    def ended(self, position, seconds):
        epochs = self.epochs_at(position)
        return TrialRecord(
            trial=position, state="COMPLETE", placement=Placement(), val_accuracy=0.9, epochs=epochs, seconds=seconds
        )

    def fits(self, epochs, records, began):
        usual = epochs * statistics.median([r.seconds / r.epochs for r in records]) if records else 0.0
        return self.timeout is None or (self.now - began < self.timeout and self.now - began + usual <= self.timeout)

    def events(self):
        """Yield every event; `now` is when it happens."""
        began, records, running, told = self.now, list(self.finished), {}, []
        yield StudyBegan(
            name="s",
            finished=tuple(records),
            trials=self.trials,
            seconds_left=self.timeout,
            jobs=self.jobs,
            objectives=("accuracy", "params"),
            lines=(),
            epochs=self.lengths[0],
            long_epochs=self.lengths[1] if len(self.lengths) > 1 else None,
            references=self.references,
        )
        position, ready = len(records), self.now + self.ready
        while True:
            while len(running) < self.jobs and not (running and min(running) < position - LAG):
                if self.trials is not None and len(records) + len(running) >= self.trials:
                    break
                epochs = self.epochs_at(position)
                if not self.fits(epochs, records, began):
                    break
                self.now += self.suggestion * self.epoch
                yield TrialBegan(Task(position, Placement(), None), epochs)
                start, seconds = max(self.now, ready), self.seconds_of(position)
                for step in range(1, STEPS + 1) if self.steps else ():
                    when = start + 0.05 * seconds + 0.9 * seconds * step / STEPS
                    heapq.heappush(told, (when, position, StepEnded(position, step, STEPS, 1)))
                running[position] = seconds
                heapq.heappush(told, (start + seconds, position, None))
                position += 1
            if not running:
                return
            while True:
                when, trial, event = heapq.heappop(told)
                self.now = max(self.now, when)
                if event is None:
                    break
                yield event
            records.append(self.ended(trial, running.pop(trial)))
            yield TrialEnded(records[-1])


def follow(simulated):
    """Return (time, estimate) after each event, and when the last trial ended."""
    course = Course(lambda: simulated.now)
    estimates, end, told = [], simulated.now, 0
    for event in simulated.events():
        course.hear(event)
        if not isinstance(event, StepEnded):
            end = simulated.now
        elif (told := told + 1) % 5:
            continue
        estimates.append((simulated.now, course.seconds_left()))
    return estimates, end


def error_after(simulated, share=1 / 3):
    """Return by which share the time left is wrong after a share of the time from the beginning to the last end."""
    began = simulated.now
    estimates, end = follow(simulated)
    when, left = next((when, left) for when, left in estimates if when - began >= share * (end - began))
    return left / (end - when) - 1


STUDIES = {
    "two lengths, two workers": {"jobs": 2, "trials": 50},
    "two lengths, one worker": {"jobs": 1, "trials": 50},
    "two lengths, eight workers": {"jobs": 8, "trials": 80},
    "a few trials of one length": {"jobs": 2, "trials": 16, "lengths": (3,)},
    "an evaluation without steps": {"jobs": 2, "trials": 40, "steps": False},
    "gone on with": {"jobs": 2, "trials": 50, "before": 12},
    "slow suggestions": {"jobs": 2, "trials": 100, "lengths": (1,), "suggestion": 0.6},
    "limited by time": {"jobs": 2, "epochs": 250},
    "limited by time, one worker": {"jobs": 1, "epochs": 250},
    "limited by time, one length": {"jobs": 2, "epochs": 100, "lengths": (5,)},
    "limited by both": {"jobs": 2, "trials": 400, "epochs": 500},
}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", STUDIES)
def test_after_a_third_of_a_run_the_time_left_is_right_within_a_fifth(name, seed):
    assert abs(error_after(Simulated(seed, **STUDIES[name]))) <= 0.2


def study_began(**values):
    usual = {"name": "s", "finished": (), "trials": 10, "seconds_left": None, "jobs": 1}
    usual |= {"objectives": ("accuracy", "params"), "lines": (), "epochs": 1}
    return StudyBegan(**(usual | values))


class Clock:
    now = 50.0

    def __call__(self):
        return self.now


def began(trial, epochs=1):
    return TrialBegan(Task(trial, Placement(), None), epochs)


def ended(trial, seconds, epochs=1, **values):
    fields = {"state": "COMPLETE", "placement": Placement(), "epochs": epochs, "seconds": seconds}
    return TrialEnded(TrialRecord(trial=trial, **(fields | values)))


def test_nothing_is_said_before_there_is_anything_to_go_by_but_a_time_limit():
    clock = Clock()
    course = Course(clock)
    assert (course.seconds_left(), course.share_done()) == (None, None)
    course.hear(study_began())
    course.hear(began(0))
    clock.now += 10
    assert (course.seconds_left(), course.share_done()) == (None, 0.0)
    course.hear(study_began(trials=None, seconds_left=60.0))
    clock.now += 15
    assert (course.seconds_left(), course.share_done(), course.measured) == (45.0, 0.25, False)
    course.hear(study_began(trials=None))  # until settled
    course.hear(ended(0, 5.0))
    assert (course.seconds_left(), course.share_done(), course.measured) == (None, None, True)


def test_the_pace_of_the_first_training_tells_before_it_ends():
    clock = Clock()
    course = Course(clock)
    course.hear(study_began(trials=4))
    course.hear(began(0))
    clock.now += 100  # until it is ready
    course.hear(StepEnded(0, 1, 101, 1))
    clock.now += 20
    course.hear(StepEnded(0, 51, 101, 1))
    assert course.seconds_left() == pytest.approx(20 + 3 * 40.4)  # 0.4 s a step
    assert course.share_done() == pytest.approx(51 / 101 / 4)
    clock.now += 5
    course.hear(StepEnded(0, 1, 101, 1))  # its worker died, another one took it over
    assert course.share_done() == pytest.approx(1 / 101 / 4)


def test_long_trials_to_come_are_counted_as_long_before_one_was_seen():
    clock = Clock()
    course = Course(clock)
    course.hear(study_began(trials=8, epochs=1, long_epochs=4, references=2))
    course.hear(began(0))
    clock.now += 3
    course.hear(ended(0, 3.0))
    assert course.seconds_left() == 6 * 3.0 + 12.0  # position 6 is the fifth after the references


def test_a_trial_that_was_lost_is_run_under_its_own_position():
    course = Course(Clock())
    records = tuple(ended(trial, 3.0).record for trial in (0, 1, 2, 3, 4, 5, 7))
    course.hear(study_began(finished=records, trials=9, long_epochs=4, references=2))
    assert course.seconds_left() == 12.0 + 3.0  # the long one is missing, and the one at the end


def test_a_worker_waits_where_the_next_suggestion_may_depend_on_what_still_runs():
    course = Course(Clock())
    course.hear(study_began(finished=tuple(ended(n, 1.0).record for n in range(4)), trials=13, jobs=8, long_epochs=100))
    # position 4 takes 100 s; the next seven run beside it, the one after them has to wait for it, and so has the last
    # one, at 9 another long one begins beside it
    assert course.seconds_left() == 101.0


def test_very_many_trials_are_not_all_played_through():
    course = Course(Clock())
    course.hear(study_began(trials=1_000_000, jobs=2))
    course.hear(began(0))
    course.hear(ended(0, 2.0))
    assert course.seconds_left() == pytest.approx(1_000_000 * 2.0, rel=0.01)
    course.hear(study_began(trials=None, seconds_left=1e6))
    assert course.seconds_left() == 1e6


def test_how_many_run_at_a_time_is_seen_and_failures_count_as_they_took():
    course = Course(Clock())
    course.hear(study_began(trials=12, jobs=1))  # measured only once the workers are there
    for trial in range(4):
        course.hear(began(trial))
    for trial in range(4):
        course.hear(ended(trial, 6.0 if trial else None, state="COMPLETE" if trial else "FAIL"))
    assert course.seconds_left() == pytest.approx(2 * 18.0 / 4)  # one took no time at all
    assert len(course.records) == 4
    assert course.running == ()
