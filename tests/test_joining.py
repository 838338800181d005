import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import reproducible
from filelock import FileLock

import placesearch as ps
from placesearch.errors import InputError, StudyError
from placesearch.joining import refuse_other_code
from placesearch.searching import stored_definition
from placesearch.storage_url import VARIABLE, StorageUrl

from test_datasets import make_tree  # isort: skip
from test_study import config  # isort: skip

URL = "sqlite:///shared.db"
OWN = {"backbone": "mine:tiny", "evaluate": "mine:scored", "reductions": (2, 4), "blocks": ("se",), "jobs": 1}
ALLOWED = ("mine:tiny", "mine:scored")


def begun(**changes):
    """A study that was run on another machine, as far as this one can tell."""
    ps.run(ps.StudyConfig(**OWN | {"name": "s", "storage": URL, "trials": 4} | changes))
    shutil.rmtree("studies")
    shutil.rmtree("reports")


@pytest.mark.slow
def test_a_study_in_a_database_is_the_same_as_one_in_a_file(workplace):
    in_file = ps.run(ps.StudyConfig(**OWN, name="f", trials=8))
    in_database = ps.run(ps.StudyConfig(**OWN, name="d", trials=8, storage=URL))
    pd.testing.assert_frame_equal(reproducible(in_database.trials_frame()), reproducible(in_file.trials_frame()))
    assert not (workplace / "studies" / "d" / "journal.log").exists()
    assert ps.load_study("d").records == in_database.records
    assert ps.run(ps.StudyConfig(**OWN, name="d", trials=10, storage=URL)).records[:8] == in_database.records


def test_a_study_goes_on_from_another_machine_and_its_reports_can_be_written_there(call_here):
    begun()
    code, out, err = call_here("report", "s", "--storage", URL)
    assert (code, err) == (0, "")
    assert "front of s" in out
    assert len(pd.read_csv("reports/s/trials.csv")) == 4
    shutil.rmtree("studies")
    assert len(ps.run(ps.StudyConfig(**OWN, name="s", storage=URL, trials=6)).records) == 6


def test_a_worker_ends_when_the_process_that_runs_the_study_has_ended(workplace):
    begun()
    worked = ps.work("s", URL, jobs=1, allow=ALLOWED)
    assert (worked.trials, worked.ended) == (0, "the process that runs the study has ended")
    assert not (workplace / "studies").exists()  # a worker leaves nothing behind


@pytest.mark.slow
def test_a_worker_removes_what_killed_ones_have_left_and_nothing_of_those_that_live(workplace, monkeypatch):
    begun()
    monkeypatch.setattr(tempfile, "tempdir", str(workplace / "temporary"))
    for name in ("placesearch-killed", "placesearch-lives", "placesearch-young", "another"):
        lock = workplace / "temporary" / name / "run.lock"
        lock.parent.mkdir(parents=True)
        (lock.parent / "data.safetensors").touch()
        lock.touch()
        if name != "placesearch-young":
            os.utime(lock, (0, 0))
    with FileLock(workplace / "temporary" / "placesearch-lives" / "run.lock"):
        os.utime(workplace / "temporary" / "placesearch-lives" / "run.lock", (0, 0))
        ps.work("s", URL, jobs=1, allow=ALLOWED)
    left = {path.name for path in (workplace / "temporary").iterdir()}
    assert left == {"placesearch-lives", "placesearch-young", "another"}


def test_a_study_of_this_name_with_other_settings_is_refused(workplace):
    begun()
    with pytest.raises(StudyError, match=r"study 's' exists with other settings \(reductions 2,4 -> 2\)"):
        ps.run(ps.StudyConfig(**OWN | {"reductions": (2,)}, name="s", storage=URL))


def test_a_worker_names_the_study_that_is_missing(workplace):
    with pytest.raises(StudyError, match="no study 's' in sqlite:///shared.db; 'placesearch run --name s"):
        ps.work("s", URL)


def test_a_worker_imports_no_code_that_is_not_allowed(workplace):
    begun()
    sys.modules.pop("mine", None)
    with pytest.raises(InputError, match="names code, 'mine:tiny'; if you trust it, add --allow mine:tiny"):
        ps.work("s", URL, allow=["mine:scored"])
    assert "mine" not in sys.modules


def test_a_worker_with_other_code_is_refused_with_the_difference(workplace, monkeypatch):
    begun()
    monkeypatch.setattr("placesearch.definition.code_fingerprint", lambda: "0123456789abcdef")
    with pytest.raises(StudyError, match="cannot work on study 's', .*: code [0-9a-f]{16} -> 0123456789abcdef"):
        ps.work("s", URL, allow=ALLOWED)


@pytest.mark.slow
def test_a_worker_with_another_torch_or_on_another_kind_of_device_is_refused(workplace):
    begun()
    stored = stored_definition("s", StorageUrl.parse(URL))
    refuse_other_code(stored, torch.device("cpu"))
    older = replace(stored, versions=stored.versions | {"torch": "2.0.0"})
    with pytest.raises(StudyError, match=re.escape(f"torch 2.0.0 -> {stored.versions['torch']}")):
        refuse_other_code(older, torch.device("cpu"))
    with pytest.raises(StudyError, match="device cuda -> cpu"):
        refuse_other_code(replace(stored, device="cuda"), torch.device("cpu"))
    with pytest.raises(StudyError, match="precision fp16 -> "):
        refuse_other_code(replace(stored, protocol=replace(stored.protocol, precision="fp16")), torch.device("cpu"))


def test_a_worker_whose_images_are_others_is_refused_wherever_they_are(workplace):
    """One image differs, in names and sizes all are equal."""
    first = make_tree(Path("first"), ("train", "val", "test"))
    second, third = shutil.copytree(first, "second"), shutil.copytree(first, "third")
    shutil.copy(first / "train" / "cat" / "1.png", Path(third) / "train" / "cat" / "0.png")
    settings = {"data": "first", "name": "s", "storage": URL, "trials": 3, "batch_size": 4, "long_epochs": 0}
    ps.run(config(**settings))
    worked = ps.work("s", URL, jobs=1, data=str(second), allow=["mine:tiny"])
    assert worked.ended == "the process that runs the study has ended"
    with pytest.raises(StudyError, match="fingerprint of images [0-9a-f]{16} -> [0-9a-f]{16}"):
        ps.work("s", URL, jobs=1, data=str(third), allow=["mine:tiny"])
    shutil.rmtree(first)
    shutil.copytree(third, first)
    with pytest.raises(StudyError, match="fingerprint of images"):
        ps.run(config(**settings))


@pytest.mark.slow
def test_a_definition_that_somebody_damaged_is_refused_in_a_line(workplace):
    import optuna

    begun()
    study = optuna.load_study(storage=URL, study_name="s")
    for text in ("config: {", "placesearch: 2", "a: &a [1]", "placesearch: 1\nconfig: {backbone: 'x'}"):
        study._storage.set_study_system_attr(study._study_id, "placesearch:definition", 1)
        study._storage.set_study_system_attr(study._study_id, "placesearch:definition:0", text)
        with pytest.raises(InputError, match="the study's definition in sqlite:///shared.db"):
            ps.work("s", URL)


def test_a_password_on_the_command_line_is_refused_and_not_repeated(call_here):
    for arguments in (["run", "--backbone", "resnet18"], ["worker", "s"], ["report", "s"]):
        code, out, err = call_here(*arguments, "--storage", "postgresql://ann:hunter2@localhost/studies")
        assert code == 2
        assert "seen by everybody" in err
        assert "hunter2" not in out + err
    code, _, err = call_here("worker", "s")
    assert (code, VARIABLE in err) == (2, True)


# ---------------------------------------------------------------- several processes and a real server

STUDY = ("--name", "s", "--backbone", "mine:tiny", "--evaluate", "mine:scored", "--reductions", "2,4")


@pytest.fixture
def server(postgres, monkeypatch):
    """An empty database whose address is in the environment."""
    postgres.create()
    monkeypatch.setenv(VARIABLE, postgres.url)
    return postgres


@pytest.fixture
def crew(workplace, start):
    """Start workers, each in a folder of its own, which have nothing in common but the database."""

    def begin(count, *arguments, **options):
        workers = []
        for number in range(count):
            folder = workplace / f"worker-{number}"
            folder.mkdir()
            shutil.copy(workplace / "mine.py", folder)
            allow = [word for name in ALLOWED for word in ("--allow", name)]
            workers.append(
                start("worker", "s", "--wait", "2m", "--jobs", "1", *allow, *arguments, cwd=folder,
                      start_new_session=True, **options)
            )  # fmt: skip
        return workers

    return begin


def undisturbed(trials):
    """What one process makes of the study, without a database."""
    ps.run(ps.StudyConfig(**OWN | {"blocks": ("se", "cbam")}, name="alone", trials=trials, max_jobs=16))
    return reproducible(pd.read_csv("reports/alone/trials.csv"))


def begun_trials(path):
    return len(path.read_text().splitlines()) if path.exists() else 0


def wait_until(condition, seconds=120):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.mark.slow
def test_eight_workers_lose_and_double_nothing_though_one_and_the_server_are_killed(workplace, start, crew, server):
    """The very trials of an undisturbed run, each of them once."""
    log = workplace / "evaluated.log"
    environment = {"EVALUATED": str(log), "PAUSE": "0.3"}
    running = start("run", *STUDY, "--trials", "50", "--jobs", "1", "--max-jobs", "16", env=environment)
    workers = crew(7, env=environment)
    wait_until(lambda: begun_trials(log) >= 12)
    workers[0].kill()
    wait_until(lambda: begun_trials(log) >= 24)
    server.kill()
    time.sleep(1.0)
    server.start()
    out, err = running.communicate(timeout=240)
    ends = [worker.communicate(timeout=60) for worker in workers]
    assert running.returncode == 0, err
    found = reproducible(pd.read_csv("reports/s/trials.csv"))
    expected = undisturbed(50)
    assert found.trial.tolist() == list(range(50))
    pd.testing.assert_frame_equal(found, expected)
    assert [worker.returncode for worker in workers] == [-signal.SIGKILL] + [0] * 6, ends
    assert "does not answer" in out + err
    seen = out + err + "".join(map("".join, ends)) + server.dump()
    assert "trials begun here" in seen
    assert server.password not in seen
    assert server.password not in "".join(
        path.read_text(errors="replace") for path in workplace.rglob("*") if path.is_file()
    )
    evaluated = log.read_text().split()
    assert 50 <= len(evaluated) <= 50 + 1 + 8  # again: that of the killed one, those whose end could not be stored


@pytest.mark.slow
def test_the_password_is_in_no_title_of_a_process(workplace, start, server):
    running = start("run", *STUDY, "--trials", "30", "--jobs", "2", env={"PAUSE": "0.3"})
    wait_until(lambda: "s" in _studies(server))
    titles = subprocess.run(["ps", "-eo", "args", "-ww"], capture_output=True, text=True, check=True).stdout
    assert "placesearch run" in titles or "placesearch" in titles
    assert server.password not in titles
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=60)
    assert running.returncode == 130
    assert server.password not in out + err


def _studies(server):
    try:
        return [] if stored_definition("s", StorageUrl.parse(server.url)) is None else ["s"]
    except InputError:
        return []


@pytest.mark.slow
def test_a_wrong_password_and_a_missing_server_are_told_in_a_line_without_it(call, server):
    wrong = server.url.replace(server.password, "hunter2")
    code, out, err = call("worker", "s", env={VARIABLE: wrong})
    assert code == 2
    assert "password authentication failed" in err
    assert "hunter2" not in out + err
    code, out, err = call("worker", "s", env={VARIABLE: wrong.replace(f":{server.port}/", ":1/")})
    assert code == 2
    assert err.count("\n") == 1
    assert "hunter2" not in out + err


@pytest.mark.slow
@pytest.mark.parametrize("way", ["variable", "file", "service"])
def test_the_password_can_come_from_where_the_driver_looks_for_it(workplace, call, server, monkeypatch, way):
    monkeypatch.delenv(VARIABLE)
    given = workplace / "given"
    where = f"host=127.0.0.1\nport={server.port}\ndbname={server.database}\nuser=placesearch\n"
    given.write_text(
        f"[studies]\n{where}password={server.password}\n" if way == "service" else f"*:*:*:*:{server.password}\n"
    )
    given.chmod(0o600)
    own = {
        "variable": {"PGPASSWORD": server.password},
        "file": {"PGPASSFILE": str(given)},
        "service": {"PGSERVICEFILE": str(given)},
    }[way]
    url = "postgresql:///?service=studies" if way == "service" else server.public_url
    code, _, err = call("run", *STUDY, "--trials", "3", "--quiet", "--storage", url, env=own)
    assert (code, err) == (0, "")
    assert url in Path("studies/s/study.yaml").read_text()
    code, _, err = call("report", "s", env=own)
    assert (code, err) == (0, "")


@pytest.mark.slow
def test_a_study_whose_storage_is_away_does_not_hide_the_others(call_here):
    begun()
    ps.run(ps.StudyConfig(**OWN, name="here", trials=3))
    ps.run(ps.StudyConfig(**OWN, name="there", trials=3, storage="sqlite:///away.db"))
    Path("away.db").unlink()
    Path("away.db").mkdir()
    code, out, err = call_here("studies")
    assert code == 0
    assert "here" in out
    assert "there" not in out
    assert err.startswith("placesearch: there: cannot use sqlite:///away.db: unable to open")
    assert err.count("\n") == 1
