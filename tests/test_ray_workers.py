import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import reproducible

import placesearch as ps
from placesearch.errors import InputError, StudyError
from placesearch.evaluation.ray_workers import Actor, RayWorkers, data_of, images_of
from placesearch.evaluation.versions import versions
from placesearch.placement import Placement
from placesearch.records import StepEnded, Task, Told, TrialBegan, TrialEnded
from placesearch.training.datasets import load_data

from test_study import config  # isort: skip
from test_workers import assignment  # isort: skip

OWN = {"backbone": "mine:tiny", "evaluate": "mine:scored", "reductions": (2, 4)}

ray_of_their_own = pytest.mark.filterwarnings("ignore")  # Ray and what it imports warn about each other
"""What a test on a cluster has; the versions of Ray are not ours to mend."""


@pytest.fixture
def cluster(workplace, monkeypatch):
    """Three nodes in this machine: one with nothing but the driver, two with two processors each."""
    pytest.importorskip("ray", reason="needs Ray: pip install -e '.[ray]'")
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("PAUSE", "0.5")
    started = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    started.workers = [started.add_node(num_cpus=2) for _ in range(2)]
    yield started
    started.shutdown()


def test_data_come_out_as_they_were_put_in():
    data = load_data("digits", 8)
    again = data_of(images_of(data))
    assert again.fingerprint() == data.fingerprint()
    assert (again.classes, again.flip) == (data.classes, data.flip)
    assert again.splits["train"].images.data_ptr() == data.splits["train"].images.data_ptr()  # no copy


def test_an_actor_refuses_to_work_with_other_code(workplace):
    task = Task(0, Placement(), None)
    other = versions() | {"torch": "2.0.0", "code": "0" * 16}
    told, _ = Actor(".").evaluate(task, assignment(), None, other)
    assert told.startswith(
        f"its results would not compare: torch 2.0.0 -> {versions()['torch']}; code 0000000000000000"
    )
    told, _ = Actor(".").evaluate(task, assignment(backbone="mine:nothing"), None, versions())
    assert told.startswith("module 'mine' has no function 'nothing'")


def test_an_actor_evaluates_as_a_worker_does_and_tells_how_far_it_is(workplace):
    actor, seen = Actor("."), []
    actor._see = lambda event: seen.append((event, actor.status()[0] > 0))
    images = images_of(load_data("digits", 32))
    record, lines = actor.evaluate(Task(3, Placement(), None), assignment(), images, versions())
    assert (record.trial, record.state, lines) == (3, "COMPLETE", [])
    assert isinstance(seen[-1][0], StepEnded)
    assert all(running for _, running in seen)
    assert actor.status()[0] == 0.0


def test_what_an_evaluation_prints_comes_with_what_it_returns(workplace):
    (workplace / "loud.py").write_text(
        "import sys\n"
        "def evaluate(candidate): print('heard'); print('10 %\\r20 %', end='', file=sys.stderr); return 0.5\n"
    )
    given = assignment(evaluate="loud:evaluate")
    record, lines = Actor(".").evaluate(Task(0, Placement(), None), given, None, versions())
    assert (record.state, lines) == ("COMPLETE", ["heard", "20 %"])


@pytest.mark.parametrize(("folder", "kept"), [(".", "studies"), ("/nowhere", "temporary")])
def test_a_node_without_the_study_keeps_branches_among_temporary_files(workplace, monkeypatch, folder, kept):
    (workplace / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(workplace / "temporary"))
    given = assignment(epochs=5)
    given = replace(given, protocol=replace(given.protocol, start="branch"), branches="studies/s")
    (workplace / "studies" / "s").mkdir(parents=True)
    images = images_of(load_data("digits", 32))
    record, _ = Actor(folder).evaluate(Task(0, Placement(), None), given, images, versions())
    assert record.state == "COMPLETE", record.error
    assert [path.relative_to(workplace).parts[0] for path in workplace.rglob("branch-*.safetensors")] == [kept]


def test_without_ray_one_line_names_the_extra(workplace, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"--engine ray needs Ray, .*: pip install 'placesearch\[ray\]'"):
        ps.run(ps.StudyConfig(**OWN, engine="ray", trials=3))


def test_a_function_without_a_name_cannot_be_sent_to_a_cluster(workplace):
    with pytest.raises(InputError, match="needs an evaluation by its name"):
        ps.run(config(engine="ray"), evaluate=lambda candidate: 0.5)


@pytest.mark.slow
@ray_of_their_own
def test_a_study_on_a_cluster_is_the_same_as_one_in_this_process_though_a_node_dies(cluster):
    alone = ps.run(ps.StudyConfig(**OWN, name="alone", trials=24, jobs=1))
    events, ended = [], []

    def watch(event):
        events.append(event)
        ended.append(isinstance(event, TrialEnded))
        if sum(ended) == 8 and ended[-1]:
            cluster.remove_node(cluster.workers[0], allow_graceful=False)

    shared = ps.run(ps.StudyConfig(**OWN, name="shared", trials=24, engine="ray", address=cluster.address), watch=watch)
    pd.testing.assert_frame_equal(reproducible(shared.trials_frame()), reproducible(alone.trials_frame()))
    told = [event.line for event in events if isinstance(event, Told)]
    assert "4 trials at a time: that is what the Ray cluster has room for" in told
    assert len(cluster.list_all_nodes()) == 2  # one of three has died
    began = [event.task.trial for event in events if isinstance(event, TrialBegan)]
    assert sorted(began) == list(range(24))


@pytest.mark.slow
@ray_of_their_own
def test_training_on_a_cluster_tells_its_steps_and_nodes_that_join_are_used(cluster, monkeypatch):
    monkeypatch.setattr("placesearch.evaluation.ray_workers.ROOM_EVERY", 1.0)
    events = []

    def watch(event):
        events.append(event)
        if isinstance(event, TrialEnded) and event.record.trial == 2:
            cluster.add_node(num_cpus=1)

    settings = {"trials": 14, "epochs": 8}
    found = ps.run(config(name="s", engine="ray", jobs=5, address=cluster.address, **settings), watch=watch)
    alone = ps.run(config(name="alone", **settings))
    pd.testing.assert_frame_equal(reproducible(found.trials_frame()), reproducible(alone.trials_frame()))
    assert any(isinstance(event, StepEnded) for event in events)
    assert any(isinstance(event, Told) and event.line.startswith("5 trials at a time") for event in events)


@pytest.mark.slow
@ray_of_their_own
def test_what_hangs_dies_twice_or_cannot_get_ready_ends_as_it_does_elsewhere(cluster, workplace):
    (workplace / "odd.py").write_text(
        "import os, time\n"
        "def hang(candidate): time.sleep(3600 if candidate.placement else 0); return 0.5\n"
        "def die(candidate): os._exit(3) if candidate.placement else None; return 0.5\n"
    )
    given = OWN | {"engine": "ray", "address": cluster.address, "trials": 2, "jobs": 2}
    hung = ps.run(ps.StudyConfig(**given | {"evaluate": "odd:hang"}, name="hung", trial_timeout=2))
    assert [record.state for record in hung.records] == ["COMPLETE", "FAIL"]
    assert hung.records[1].error == "took longer than 2 s, its time limit (--trial-timeout)"
    dead = ps.run(ps.StudyConfig(**given | {"evaluate": "odd:die"}, name="dead"))
    assert [record.state for record in dead.records] == ["COMPLETE", "FAIL"]
    assert dead.records[1].error.startswith("its actor died twice")
    with RayWorkers(1, 8, lambda _: None, cluster.address) as workers:
        workers.assign(assignment(backbone="mine:nothing"), None)
        workers.submit(Task(0, Placement(), None))
        with pytest.raises(StudyError, match="an actor could not get ready: module 'mine' has no function"):
            workers.results()


@pytest.mark.slow
@ray_of_their_own
def test_a_trial_that_takes_down_node_after_node_fails(cluster, workplace, monkeypatch):
    monkeypatch.setattr("placesearch.evaluation.ray_workers.MOST_NODES", 1)
    (workplace / "odd.py").write_text("import time\ndef hang(candidate): time.sleep(3600)\n")
    with RayWorkers(4, 8, lambda _: None, cluster.address) as workers:
        workers.assign(assignment(evaluate="odd:hang"), None)
        for trial in range(4):
            workers.submit(Task(trial, Placement(), None))
        while any(hand.task is None for hand in workers._hands) or len(workers._hands) < 4:
            assert workers.results(timeout=0.5) == []
        cluster.remove_node(cluster.workers[0], allow_graceful=False)
        records = workers.results()
        records += workers.results() if len(records) < 2 else []
    assert [record.state for record in records] == ["FAIL", "FAIL"]
    assert {record.error for record in records} == {"its node died 1 times; out of memory?"}


@pytest.mark.slow
@ray_of_their_own
@pytest.mark.parametrize("kind", ["without", "other"])
def test_a_node_that_lacks_this_code_or_has_another_ends_the_run_with_the_difference(workplace, kind):
    pytest.importorskip("ray", reason="needs Ray: pip install -e '.[ray]'")
    from ray.cluster_utils import Cluster

    there = workplace / "there" / "placesearch"
    if kind == "other":
        shutil.copytree(Path(ps.__file__).parent, there, ignore=shutil.ignore_patterns("__pycache__"))
        with (there / "front.py").open("a") as file:
            file.write("# another line\n")
    else:
        there.mkdir(parents=True)
        (there / "__init__.py").write_text("raise ImportError('not installed here')\n")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=1, env_vars={"PYTHONPATH": str(there.parent)})
        said = (
            r"would not compare: code \w{16} -> \w{16}" if kind == "other" else "could not begin: .*not installed here"
        )
        with pytest.raises(StudyError, match=said):
            ps.run(ps.StudyConfig(**OWN, name="s", trials=2, engine="ray", address=cluster.address))
    finally:
        cluster.shutdown()


@pytest.mark.slow
def test_ray_leaves_the_screen_and_sigterm_to_the_command(workplace, start):
    pytest.importorskip("ray", reason="needs Ray: pip install -e '.[ray]'")
    (workplace / "odd.py").write_text(
        "import os, time\ndef die(candidate): os._exit(3) if candidate.placement else print('spoken'); return 0.5\n"
    )
    own = ["--backbone", "mine:tiny", "--evaluate", "odd:die", "--reductions", "2,4", "--engine", "ray"]
    running = start("run", *own, "--trials", "100000", "--jobs", "1", "--name", "s", start_new_session=True)
    out = []
    for line in running.stdout:
        out.append(line)
        if "trial 1: failed" in line:
            running.send_signal(signal.SIGTERM)
    assert running.wait(60) == 130, running.stderr.read()
    assert running.stderr.read().splitlines() == [
        "placesearch: interrupted; reports are in reports/s/, and the same command goes on where it stopped"
    ]
    assert "trial 0: spoken\n" in out
    ours = re.compile(r"study s|  |\d+ trials? at a time|trial 0: spoken|\d+/100000  trial |note")
    assert [line for line in out if not ours.match(line)] == []
    assert _raylets(running.pid) == []


@pytest.mark.slow
def test_a_cluster_whose_head_is_gone_ends_the_run_with_one_line(cluster, workplace):
    address = cluster.address
    (workplace / "run.py").write_text(
        "import sys, placesearch as ps\n"
        "from placesearch.evaluation import ray_workers\n"
        "ray_workers.SILENCE = 5.0\n"
        f"config = ps.StudyConfig(**{OWN!r}, name='s', trials=1000, engine='ray', address={address!r})\n"
        "try: ps.run(config, watch=lambda event: print(type(event).__name__, flush=True))\n"
        "except ps.errors.StudyError as error: print(error)\n"
    )
    command = [sys.executable, "run.py"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        for line in running.stdout:
            if line == "TrialEnded\n" and cluster.head_node.live_processes():
                cluster.head_node.kill_gcs_server()
                break
        out, _ = running.communicate(timeout=50)  # before Ray's minute is over
    assert running.returncode == 0
    assert out.splitlines()[-1] == (
        f"the Ray cluster {address} has not answered for 5 s; every finished trial is kept, the same command goes on"
    )


@pytest.mark.slow
def test_a_cluster_of_its_own_ends_with_the_command_even_if_that_is_killed(workplace, start):
    pytest.importorskip("ray", reason="needs Ray: pip install -e '.[ray]'")
    own = ["--backbone", "mine:tiny", "--evaluate", "mine:scored", "--engine", "ray", "--jobs", "1", "--name", "s"]
    running = start("run", *own, "--trials", "60", env={"PAUSE": "0.3"}, start_new_session=True)
    log = workplace / "studies" / "s" / "journal.log"
    until = time.monotonic() + 120
    while not (log.exists() and log.read_text().count('"op_code":6') >= 2):  # two trials have ended
        assert running.poll() is None
        assert time.monotonic() < until
        time.sleep(0.2)
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    until = time.monotonic() + 60
    while _raylets(running.pid):
        assert time.monotonic() < until
        time.sleep(0.5)
    code = start("run", *own, "--trials", "6")
    _, err = code.communicate(timeout=120)
    assert code.returncode == 0, err
    assert torch.arange(6).tolist() == pd.read_csv("reports/s/trials.csv").trial.tolist()[:6]


def _raylets(session):
    """What works of the session that a command began; two agents of Ray itself take longer to notice."""
    out = subprocess.run(["ps", "-o", "pid=,comm=", "-s", str(session)], capture_output=True, text=True, check=False)
    return [
        line
        for line in out.stdout.splitlines()
        if not {"defunct", "Agent", "DashboardA", "RuntimeEnv"} & set(re.split(r"\W+", line))
    ]


def test_the_address_of_a_cluster_is_refused_where_none_is_used(workplace):
    with pytest.raises(InputError, match="--address is that of a Ray cluster; it needs --engine ray"):
        ps.run(ps.StudyConfig(**OWN, address="auto", trials=3))
