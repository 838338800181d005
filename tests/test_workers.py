import os
import shutil
import signal
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import reproducible

import placesearch as ps
from placesearch.errors import DataError, InputError, StudyError
from placesearch.evaluation.worker import serve
from placesearch.evaluation.workers import KEEPS_MEMORY, Assignment, Began, Pace, Workers
from placesearch.models.architecture import Architecture
from placesearch.placement import Placement
from placesearch.records import OutOfMemory, StepEnded, StudyBegan, Task, Told, TrialEnded
from placesearch.training.loop import Protocol

from test_datasets import make_tree  # isort: skip
from test_own import own  # isort: skip
from test_study import config  # isort: skip

SE = Placement.parse("unit1.bn2=se(r=2)")


def assignment(**changes):
    plain = Architecture(backbone=changes.get("backbone", "mine:tiny"), num_classes=10, input_size=(3, 32, 32))
    protocol = Protocol(changes.get("epochs", 1), 128, 0.05, 0, "fp32")
    return Assignment(plain, protocol, changes.get("data", "digits"), "cpu", evaluate=changes.get("evaluate"))


def test_two_workers_give_the_same_table_as_one(workplace):
    one = ps.run(config(name="one", trials=10)).trials_frame()
    two = ps.run(config(name="two", trials=10, jobs=2)).trials_frame()
    pd.testing.assert_frame_equal(reproducible(one), reproducible(two))


@pytest.mark.slow
def test_waiting_for_results_can_have_an_end(workplace):
    with Workers(1, assignment(), lambda _: None) as workers:
        workers.submit(Task(0, Placement(), None))
        assert workers.results(timeout=0.0) == []  # importing torch alone takes longer
        (record,) = workers.results()
    assert record.state == "COMPLETE"


@pytest.mark.slow
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


def is_running(process):
    """Tell whether a process runs, so neither ended nor a zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def ended(workers, count):
    """Records of so many trials, by position."""
    records = {}
    while len(records) < count:
        records |= {record.trial: record for record in workers.results()}
    return records


@pytest.mark.slow
def test_a_trial_that_takes_too_long_fails_at_once_and_its_worker_is_replaced(workplace):
    with Workers(1, assignment(evaluate="mine:hangs"), print, trial_timeout=0.5) as workers:
        workers.submit(Task(4, SE, "se-everywhere", epochs=3, seed=7))
        (record,) = workers.results()
        assert workers._workers == []
        workers.submit(Task(5, Placement(), None))  # a new worker takes seconds to get ready, which do not count
        (after,) = workers.results()
    assert record.error == "took longer than 0.5 s, its time limit (--trial-timeout)"
    assert (record.trial, record.state, record.placement, record.reference) == (4, "FAIL", SE, "se-everywhere")
    assert (record.epochs, record.seed, record.val_accuracy) == (3, 7, None)
    assert 0.5 <= record.seconds < 5
    assert (after.trial, after.state) == (5, "COMPLETE")
    assert Path("evaluated").read_text() == f"{SE}\nnone\n"  # it is not tried again


@pytest.mark.slow
def test_a_study_with_a_time_limit_goes_on_past_trials_that_hang(workplace):
    study = ps.run(own(trials=3, trial_timeout="0.5s", jobs=1, evaluate="mine:hangs"))
    assert [record.state for record in study.records] == ["COMPLETE", "FAIL", "FAIL"]
    assert study.records[1].error == "took longer than 0.5 s, its time limit (--trial-timeout)"
    assert study.records[1].params > study.records[0].params
    study = ps.run(own(trials=4, trial_timeout="0.4s", jobs=1, evaluate="mine:hangs"))  # it may change between runs
    assert [record.trial for record in study.records] == [0, 1, 2, 3]
    assert study.records[3].error == "took longer than 0.4 s, its time limit (--trial-timeout)"


def test_with_a_time_limit_a_function_without_a_name_is_refused(workplace):
    with pytest.raises(InputError, match="workers cannot import the evaluation"):
        ps.run(own(trial_timeout="1s"), evaluate=lambda _: 0.5)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in Linux's /proc")
def test_a_dead_worker_is_noticed_even_if_a_child_of_it_lives_and_that_ends_too(workplace):
    with Workers(1, assignment(evaluate="mine:hangs_once"), print) as workers:
        workers.submit(Task(0, SE, None))
        while not Path("child").exists():
            assert workers.results(timeout=0.1) == []
        child = int(Path("child").read_text())
        assert is_running(child)
        os.kill(workers._workers[0].process.pid, signal.SIGKILL)
        (record,) = workers.results(timeout=120)
        assert record.state == "COMPLETE"  # it was tried again
        assert not is_running(child)


@pytest.mark.slow
def test_when_the_memory_of_the_gpu_does_not_suffice_fewer_run_at_a_time_and_the_trial_again(workplace):
    told = []
    with Workers(2, assignment(evaluate="mine:hungry"), told.append) as workers:
        workers.hire(2)
        for trial, placement in enumerate((Placement(), SE)):
            workers.submit(Task(trial, placement, None))
        records = ended(workers, 2)
        assert workers.size == len(workers._workers) == 1
    assert {trial: (record.state, record.val_accuracy) for trial, record in records.items()} == {
        0: ("COMPLETE", 0.1), 1: ("COMPLETE", 0.2)
    }  # fmt: skip
    lines = [event.line for event in told]
    assert lines[0].endswith("out of memory on the GPU with 2 trials at a time; it runs again, from now on 1 at a time")


@pytest.mark.slow
def test_a_trial_for_which_the_memory_of_the_gpu_never_suffices_fails_when_it_was_alone(workplace):
    with Workers(3, assignment(evaluate="mine:starving"), print) as workers:
        workers.submit(Task(0, SE, None))
        (record,) = workers.results()
        assert (record.state, record.error) == (
            "FAIL", "OutOfMemoryError: CUDA out of memory. Tried to allocate 1.00 GiB."
        )  # fmt: skip
        assert workers.size == 1
    assert Path("evaluated").read_text().splitlines() == [str(SE)] * 3  # with 3, with 2, and alone


@pytest.mark.slow
def test_a_study_that_ran_out_of_memory_has_the_table_of_one_that_did_not(workplace):
    told = []
    two = ps.run(own(name="two", jobs=2, evaluate="mine:hungry"), watch=told.append)
    assert any("out of memory on the GPU" in event.line for event in told if isinstance(event, Told))
    one = ps.run(own(name="one", jobs=1, evaluate="mine:hungry"))
    pd.testing.assert_frame_equal(*(reproducible(study.trials_frame()) for study in (one, two)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; written without one at hand")
def test_what_a_gpu_says_when_its_memory_does_not_suffice_is_understood(workplace):
    told = []
    study = ps.run(own(jobs=2, trials=2, device="cuda", evaluate="mine:huge"), watch=told.append)
    assert [record.state for record in study.records] == ["FAIL", "FAIL"]
    assert study.records[0].error.startswith("OutOfMemoryError: CUDA out of memory")
    assert any("it runs again, from now on 1 at a time" in event.line for event in told if isinstance(event, Told))


@dataclass(frozen=True)
class Unready:
    """An assignment for which a worker cannot get ready, or whose evaluator meets an image that it cannot read."""

    problem: Exception

    @property
    def protocol(self):
        return assignment().protocol

    def evaluator(self):
        if isinstance(self.problem, DataError):
            return self
        raise self.problem

    def evaluate(self, *_):
        raise self.problem


def answers(problem, asked):
    """What a worker says that gets an `Unready` assignment and a task."""
    ours, theirs = Pipe()
    ours.send(Unready(problem))
    ours.send(asked)
    serve(theirs)
    theirs.close()
    said = []
    with suppress(EOFError):
        while True:
            said.append(ours.recv())
    return said


def test_a_worker_without_the_memory_to_get_ready_says_so_of_its_task(workplace):
    problem = torch.OutOfMemoryError("CUDA out of memory.")
    (record,) = answers(problem, Task(3, SE, None))
    assert isinstance(record, OutOfMemory)
    assert (record.trial, record.state, record.error) == (3, "FAIL", "OutOfMemoryError: CUDA out of memory.")
    assert answers(problem, Pace(1.0)) == [0.0]
    with pytest.raises(RuntimeError, match="another"):
        answers(RuntimeError("another"), Task(3, SE, None))


def test_an_image_that_cannot_be_read_ends_a_worker_and_the_search_with_the_reason(workplace, monkeypatch):
    began, error = answers(DataError("cannot read image x.png"), Task(3, SE, None))
    assert isinstance(began, Began)
    assert (type(error), str(error)) == (DataError, "cannot read image x.png")
    with Workers(1, assignment(), print) as workers:
        workers.hire(1)
        ours, theirs = Pipe()
        monkeypatch.setattr(workers._workers[0], "pipe", ours)
        theirs.send(error)
        with pytest.raises(DataError, match=r"cannot read image x.png"):
            workers.results()


def test_a_worker_that_cannot_get_ready_says_why(workplace):
    with Workers(1, assignment(data="nowhere"), print) as workers:
        workers.submit(Task(0, Placement(), None))
        with pytest.raises(StudyError, match="no data set 'nowhere'"):
            workers.results()


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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
    with Workers(1, assignment(backbone="mine:large"), print) as workers:
        assert workers.pace(1, 0.1) == 0.0
    with Workers(1, assignment(), print) as workers:
        workers.hire(2)
        workers._workers[1].process.kill()
        workers._workers[1].process.wait()
        assert workers.pace(2, 0.1) == 0.0
    with Workers(1, assignment(data="nowhere"), print) as workers, pytest.raises(StudyError, match="get ready"):
        workers.pace(1, 0.1)


@pytest.mark.slow
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
