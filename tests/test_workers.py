import os
import signal

import pandas as pd
import pytest
from conftest import reproducible

import placesearch as ps
from placesearch.errors import StudyError
from placesearch.evaluation.workers import KEEPS_MEMORY, Assignment, Workers
from placesearch.models.architecture import Architecture
from placesearch.placement import Placement
from placesearch.records import StepEnded, Task
from placesearch.training.loop import Protocol

from test_study import config  # isort: skip


def assignment(**changes):
    plain = Architecture(backbone=changes.get("backbone", "mine:tiny"), num_classes=10, input_size=(3, 32, 32))
    protocol = Protocol(changes.get("epochs", 1), 128, 0.05, 0, "fp32")
    return Assignment(plain, protocol, changes.get("data", "digits"), "cpu", evaluate=changes.get("evaluate"))


def test_two_workers_give_the_same_table_as_one(workplace):
    one = ps.run(config(name="one", trials=10)).trials_frame()
    two = ps.run(config(name="two", trials=10, jobs=2)).trials_frame()
    pd.testing.assert_frame_equal(reproducible(one), reproducible(two))


def test_a_killed_worker_is_replaced_and_its_trial_tried_again(workplace):
    killed = []

    def kill_once(event):
        if isinstance(event, StepEnded) and not killed:
            killed.append(event.trial)
            os.kill(workers._workers[0].process.pid, signal.SIGKILL)

    workers = Workers(1, assignment(epochs=20), kill_once)
    with workers:
        workers.submit(Task(5, Placement(), None))
        (record,) = workers.results()
    assert killed == [5]
    assert (record.trial, record.state) == (5, "COMPLETE")


def test_a_trial_that_kills_its_worker_twice_fails_with_the_reason(workplace):
    def kill(event):
        if isinstance(event, StepEnded):
            os.kill(workers._workers[0].process.pid, signal.SIGKILL)

    workers = Workers(1, assignment(epochs=400), kill)
    with workers:
        workers.submit(Task(5, Placement(), None))
        (record,) = workers.results()
    assert (record.trial, record.state) == (5, "FAIL")
    assert record.error == "its worker process died twice (signal 9); out of memory?"


def test_a_worker_that_cannot_get_ready_says_why(workplace):
    with Workers(1, assignment(data="nowhere"), print) as workers:
        workers.submit(Task(0, Placement(), None))
        with pytest.raises(StudyError, match="no data set 'nowhere'"):
            workers.results()


@pytest.mark.parametrize("own", [{}, {"MALLOC_TRIM_THRESHOLD_": "131072"}])
def test_a_worker_keeps_freed_memory_unless_the_user_decided_otherwise(workplace, monkeypatch, own):
    for name in KEEPS_MEMORY:
        monkeypatch.delenv(name, raising=False)
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    with Workers(1, assignment(evaluate="mine:environment"), print) as workers:
        workers.submit(Task(0, Placement(), None))
        (record,) = workers.results()
    told = dict(pair.split("=") for pair in record.error.removeprefix("ValueError: ").split())
    assert told == KEEPS_MEMORY | own
    assert not set(KEEPS_MEMORY) - set(own) & set(os.environ)


def test_no_worker_outlives_its_pool(workplace):
    workers = Workers(1, assignment(epochs=400), print)
    with workers:
        workers.submit(Task(0, Placement(), None))
        process = workers._workers[0].process
    assert process.poll() == -signal.SIGKILL
