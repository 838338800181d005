import os
import shutil
import signal
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import reproducible

import placesearch as ps
from placesearch.errors import InputError, StudyError
from placesearch.evaluation.workers import KEEPS_MEMORY, Assignment, Workers
from placesearch.models.architecture import Architecture
from placesearch.placement import Placement
from placesearch.records import StepEnded, StudyBegan, Task, Told, TrialEnded
from placesearch.training.loop import Protocol

from test_datasets import make_tree  # isort: skip
from test_study import config  # isort: skip


def assignment(**changes):
    plain = Architecture(backbone=changes.get("backbone", "mine:tiny"), num_classes=10, input_size=(3, 32, 32))
    protocol = Protocol(changes.get("epochs", 1), 128, 0.05, 0, "fp32")
    return Assignment(plain, protocol, changes.get("data", "digits"), "cpu", evaluate=changes.get("evaluate"))


def test_two_workers_give_the_same_table_as_one(workplace):
    one = ps.run(config(name="one", trials=10)).trials_frame()
    two = ps.run(config(name="two", trials=10, jobs=2)).trials_frame()
    pd.testing.assert_frame_equal(reproducible(one), reproducible(two))


def test_waiting_for_results_can_have_an_end(workplace):
    with Workers(1, assignment(), lambda _: None) as workers:
        workers.submit(Task(0, Placement(), None))
        assert workers.results(timeout=0.0) == []  # importing torch alone takes longer
        (record,) = workers.results()
    assert record.state == "COMPLETE"


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


@pytest.mark.slow
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


def test_workers_map_the_data_that_the_main_process_decoded(workplace, monkeypatch):
    tree = make_tree(workplace / "tree", ["train", "val", "test"], count=80)
    one = ps.run(config(name="one", data="tree", trials=4)).trials_frame()

    def watch(event):
        if isinstance(event, StudyBegan):  # after this nobody needs them any more
            shutil.rmtree(tree)

    two = ps.run(config(name="two", data="tree", trials=4, jobs=2), watch=watch).trials_frame()
    assert set(two.state) == {"COMPLETE"}
    pd.testing.assert_frame_equal(reproducible(one), reproducible(two))
    assert sorted(path.name for path in (workplace / "studies" / "two").iterdir()) == sorted(
        path.name for path in (workplace / "studies" / "one").iterdir()
    )


def test_workers_hired_ahead_wait_for_their_assignment_and_are_all_used(workplace):
    with Workers(2, None, print) as workers:
        workers.hire(2)
        processes = [worker.process for worker in workers._workers]
        workers.assign(assignment())
        for trial in range(2):
            workers.submit(Task(trial, Placement(), None))
        records = workers.results()
        records += workers.results() if len(records) < 2 else []
        assert [worker.process for worker in workers._workers] == processes
    assert {(record.trial, record.state) for record in records} == {(0, "COMPLETE"), (1, "COMPLETE")}


def test_a_worker_that_dies_before_its_assignment_is_replaced(workplace):
    with Workers(1, None, print) as workers:
        workers.hire(1)
        workers._workers[0].process.kill()
        workers._workers[0].process.wait()
        workers.assign(assignment())
        workers.submit(Task(0, Placement(), None))
        (record,) = workers.results()
    assert record.state == "COMPLETE"


def test_a_run_that_is_refused_leaves_no_worker_behind(workplace, monkeypatch):
    hired = []
    hire = Workers.hire

    def note(workers, count):
        hire(workers, count)
        hired.extend(worker.process for worker in workers._workers)

    monkeypatch.setattr(Workers, "hire", note)
    with pytest.raises(InputError, match="no data set 'nowhere'"):
        ps.run(config(data="nowhere", jobs=2))
    assert [process.poll() for process in hired] == [-signal.SIGKILL] * 2


def test_no_worker_is_hired_while_latencies_are_measured(workplace, monkeypatch):
    monkeypatch.setattr(Workers, "hire", lambda *_: pytest.fail("hired"))
    with pytest.raises(InputError, match="no data set"):
        ps.run(config(data="nowhere", jobs=2, objectives=("accuracy", "latency_ms")))


@pytest.mark.slow
def test_a_pace_is_steps_a_second_over_all_workers_and_leaves_them_ready(workplace):
    with Workers(1, assignment(), print) as workers:
        one = workers.pace(1, 0.3)
        two = workers.pace(2, 0.3)
        assert min(one, two) > 0
        assert len(workers._workers) == 2
        workers.keep(1)
        assert (workers.size, len(workers._workers)) == (1, 1)
        workers.submit(Task(0, Placement(), None))
        (record,) = workers.results()
    assert (record.trial, record.state) == (0, "COMPLETE")


@pytest.mark.slow
def test_workers_that_cannot_train_or_die_have_no_pace(workplace):
    with Workers(1, assignment(backbone="mine:broken"), print) as workers:
        assert workers.pace(1, 0.1) == 0.0
    with Workers(1, assignment(), print) as workers:
        workers.hire(2)
        workers._workers[1].process.kill()
        workers._workers[1].process.wait()
        assert workers.pace(2, 0.1) == 0.0
    with Workers(1, assignment(data="nowhere"), print) as workers, pytest.raises(StudyError, match="get ready"):
        workers.pace(1, 0.1)


def test_a_study_with_as_many_workers_as_were_measured_gives_the_same_table(workplace, monkeypatch):
    one = ps.run(config(name="one")).trials_frame()
    paces, told = {1: 10.0, 2: 19.0, 3: 19.5}, []
    monkeypatch.setattr("placesearch.study.jobs_for", lambda *_: 1)  # as on a GPU, where none is at hand
    monkeypatch.setattr("placesearch.staffing._is_fitted", lambda *_: True)
    monkeypatch.setattr("placesearch.staffing._free_memory", lambda _: 1.0)
    monkeypatch.setattr(Workers, "pace", lambda workers, count, _: (workers.hire(1), paces[count])[1])
    two = ps.run(config(name="two", jobs="auto"), watch=told.append).trials_frame()
    line = "2 at a time; steps of the plain network a second, by the number of workers: 1: 10.0, 2: 19.0, 3: 19.5"
    assert line in [event.line for event in told if isinstance(event, Told)]
    pd.testing.assert_frame_equal(reproducible(one), reproducible(two))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; written without one at hand")
def test_on_a_gpu_the_number_of_workers_is_measured(workplace):
    told = []
    auto = ps.run(config(name="auto", jobs="auto", device="cuda"), watch=told.append).trials_frame()
    assert any("at a time; steps of the plain network" in event.line for event in told if isinstance(event, Told))
    one = ps.run(config(name="one", jobs=1, device="cuda")).trials_frame()
    memory = ["train_memory_mb", "inference_memory_mb"]
    pd.testing.assert_frame_equal(*(reproducible(table).drop(columns=memory, errors="ignore") for table in (auto, one)))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory of processes is read from Linux's /proc")
def test_neither_the_study_nor_its_workers_grow_from_trial_to_trial(workplace, monkeypatch):
    processes, sizes = [os.getpid()], []
    hire = Workers._hire

    def note(workers):
        worker = hire(workers)
        processes.append(worker.process.pid)
        return worker

    def resident(process):
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

    def watch(event):
        if isinstance(event, TrialEnded) and event.record.trial in (20, 59):
            sizes.append([resident(process) for process in processes])

    monkeypatch.setattr(Workers, "_hire", note)
    values = {"backbone": "mine:heavy", "reductions": (1, 2, 4, 8), "batch_size": 512, "trials": 60, "jobs": 2}
    ps.run(config(name="s", **values), watch=watch)
    before, after = sizes
    assert len(before) == 3
    assert [now / then for then, now in zip(before, after, strict=True)] == pytest.approx([1, 1, 1], abs=0.05)


def test_no_worker_outlives_its_pool(workplace):
    workers = Workers(1, assignment(epochs=400), print)
    with workers:
        workers.submit(Task(0, Placement(), None))
        process = workers._workers[0].process
    assert process.poll() == -signal.SIGKILL
