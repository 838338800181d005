import json
import signal
import subprocess
import sys
import time
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path

import optuna
import pytest
from optuna.storages import JournalStorage

from placesearch.errors import StudyError
from placesearch.search.journal import at_once, open_journal

GOOD = '{"op_code":0,"worker_id":"w","study_name":"s","directions":[1]}\n'


def written(tmp_path, trials=3):
    """A journal with a few finished trials, and its bytes."""
    path = tmp_path / "journal.log"
    study = optuna.create_study(storage=open_journal(path, JournalStorage), study_name="s")
    for number in range(trials):
        study.tell(study.ask(), float(number))
    return path, path.read_bytes()


def values(path):
    study = optuna.load_study(storage=open_journal(path, JournalStorage), study_name="s")
    return [trial.value for trial in study.trials if trial.state.is_finished()]


@pytest.mark.filterwarnings("error")
def test_a_torn_last_line_is_cut_off_wherever_it_is_torn(tmp_path):
    path, whole = written(tmp_path)
    lines = whole.splitlines(keepends=True)
    body = b"".join(lines[:-1])
    for length in range(len(lines[-1])):
        path.write_bytes(body + lines[-1][:length])
        assert values(path) == [0.0, 1.0]
        assert path.read_bytes() == body


def test_without_mending_the_study_would_be_lost(tmp_path):
    """Why the mending exists: Optuna itself glues the next line onto the torn one."""
    path, whole = written(tmp_path)
    path.write_bytes(whole[:-5])
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(path)))
    study = optuna.load_study(storage=storage, study_name="s")
    with pytest.raises((json.JSONDecodeError, AttributeError)):
        study.ask()


def test_a_mended_journal_goes_on(tmp_path):
    path, whole = written(tmp_path)
    path.write_bytes(whole + b'{"op_code":4,"worker')
    study = optuna.load_study(storage=open_journal(path, JournalStorage), study_name="s")
    study.tell(study.ask(), 3.0)
    assert values(path) == [0.0, 1.0, 2.0, 3.0]


def test_zeros_after_a_power_cut_are_cut_off(tmp_path):
    path, whole = written(tmp_path)
    path.write_bytes(whole + b"\0" * 300)
    assert values(path) == [0.0, 1.0, 2.0]
    assert path.read_bytes() == whole


def test_an_undamaged_journal_is_left_as_it_is(tmp_path):
    path, whole = written(tmp_path)
    open_journal(path, JournalStorage)
    assert path.read_bytes() == whole


@pytest.mark.parametrize("damage", [b"garbage\n", b"[1]\n", b'{"worker":1}\n'])
def test_damage_before_the_last_line_is_refused_and_left_as_it_is(tmp_path, damage):
    path, whole = written(tmp_path)
    lines = whole.splitlines(keepends=True)
    path.write_bytes(lines[0] + damage + b"".join(lines[1:]))
    before = path.read_bytes()
    with pytest.raises(StudyError, match="line 2"):
        open_journal(path, JournalStorage)
    assert path.read_bytes() == before


def studied(path):
    return optuna.create_study(storage=open_journal(path, JournalStorage), study_name="s", load_if_exists=True)


def test_what_is_stored_at_once_is_written_in_one_piece_and_read_back(tmp_path):
    path = tmp_path / "journal.log"
    study = studied(path)
    for number in range(3):
        before = path.read_bytes()
        with at_once(study._storage):
            trial = study.ask()
            trial.suggest_categorical("a", ("x", "y"))
            trial.set_user_attr("n", number)
            assert trial.user_attrs["n"] == number  # what was stored can be read in the block
            study.tell(trial, float(number))
            assert path.read_bytes() == before
        assert path.read_bytes().startswith(before)
    study.ask()  # and on without a block
    assert [trial.value for trial in study.get_trials()] == [0.0, 1.0, 2.0, None]
    again = studied(path)
    assert [trial.user_attrs.get("n") for trial in again.get_trials()] == [0, 1, 2, None]


def test_where_lines_begin_is_forgotten_once_they_are_read(tmp_path):
    """Else a study of many sites would remember tens of thousands of places; what another writes is still read."""
    path = tmp_path / "journal.log"
    storage, other = (open_journal(path, JournalStorage) for _ in range(2))
    study = optuna.create_study(storage=storage, study_name="s")
    for number in range(20):
        trial = study.ask()
        with at_once(storage):
            for key in range(5):
                trial.set_user_attr(str(key), number)
        remembered = len(storage._backend._log_number_offset)
        optuna.load_study(storage=other, study_name="s").tell(number, float(number))
    assert remembered < 12
    assert [trial.value for trial in study.trials] == values(path) == [float(number) for number in range(20)]
    assert all(len(trial.user_attrs) == 5 for trial in study.trials)


def test_others_may_write_between_two_blocks(tmp_path):
    one, two = (studied(tmp_path / "journal.log") for _ in range(2))
    for number in range(6):
        study = (one, two)[number % 2]
        with at_once(study._storage):
            study.tell(study.ask(), float(number))
    for study in (one, two):
        assert [trial.value for trial in study.get_trials()] == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]


def test_a_line_that_another_writer_tore_is_cut_off_before_the_next_is_written(tmp_path):
    path = tmp_path / "journal.log"
    study = studied(path)
    study.tell(study.ask(), 1.0)
    for torn in (b'{"op_code":4,"wor', b"\0" * 100, b'{"op_code":4}'):
        with path.open("ab") as file:
            file.write(torn)
        with at_once(study._storage):
            study.tell(study.ask(), 2.0)
        assert torn + b"\n" not in path.read_bytes()
        assert all("op_code" in json.loads(line) for line in path.read_bytes().splitlines())
    assert values(path) == [1.0, 2.0, 2.0, 2.0]
    with path.open("ab") as file:
        file.write(b"garbage\n" + GOOD.encode())
    with pytest.raises(StudyError, match="damaged in a line that was written just now, which is not its last"):
        ask_at_once(study)


def ask_at_once(study):
    with at_once(study._storage):
        study.ask()


WRITER = """
import sys
from pathlib import Path
import optuna
from optuna.storages import JournalStorage
from placesearch.search.journal import at_once, open_journal
study = optuna.load_study(storage=open_journal(Path("journal.log"), JournalStorage), study_name="s")
for number in range(int(sys.argv[2])):
    with at_once(study._storage):
        trial = study.ask()
        trial.set_user_attr("by", sys.argv[1])
        trial.set_user_attr("long", "x" * 20_000)
        study.tell(trial, float(number))
"""


@pytest.mark.slow
def test_what_several_processes_write_at_once_is_there_once_though_one_is_killed(workplace):
    path = Path("journal.log")
    studied(path)
    one, two, killed = (
        subprocess.Popen([sys.executable, "-c", WRITER, name, count])
        for name, count in (("one", "15"), ("two", "15"), ("killed", "100000"))
    )
    deadline = time.monotonic() + 120
    while path.read_bytes().count(b'"by":"killed"') < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    assert (killed.wait(), one.wait(timeout=120), two.wait(timeout=120)) == (-signal.SIGKILL, 0, 0)
    written = {}
    for trial in studied(path).get_trials():
        if trial.state.is_finished():
            written.setdefault(trial.user_attrs["by"], []).append(trial.value)
    counted = [float(number) for number in range(15)]
    assert (written["one"], written["two"]) == (counted, counted)
    assert written["killed"] == [float(number) for number in range(len(written["killed"]))]
    assert len(written["killed"]) >= 5


def test_a_clock_that_jumps_loses_and_doubles_nothing(tmp_path, monkeypatch):
    jumps = iter([timedelta(0), timedelta(days=-3650), timedelta(hours=5), timedelta(days=3650), timedelta(seconds=-1)])

    class Jumping(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.now(tz) + next(jumps, timedelta(days=-1))

    monkeypatch.setattr("optuna.storages.journal._storage.datetime", Jumping)
    path = tmp_path / "journal.log"
    for number in range(5):
        study = studied(path)  # opened anew, as by the next run
        with at_once(study._storage):
            study.tell(study.ask(), float(number))
    trials = studied(path).get_trials()
    assert [(trial.number, trial.value) for trial in trials] == [(number, float(number)) for number in range(5)]
    starts = [trial.datetime_start for trial in trials]
    assert starts != sorted(starts)  # the clock did jump


def test_a_piece_that_was_torn_by_a_kill_leaves_a_study_that_goes_on(tmp_path):
    path = tmp_path / "journal.log"
    study = studied(path)
    with at_once(study._storage):
        study.tell(study.ask(), 1.0)
    whole = path.read_bytes()
    for length in range(len(whole) - 80, len(whole)):
        path.write_bytes(whole[:length])
        again = studied(path)
        again.tell(again.ask(), 2.0)
        assert [trial.value for trial in studied(path).get_trials()][-1] == 2.0


def test_what_was_stored_before_an_error_in_the_block_is_kept(tmp_path):
    study = studied(tmp_path / "journal.log")
    with suppress(KeyError), at_once(study._storage):
        study.tell(study.ask(), 1.0)
        raise KeyError
    assert [trial.value for trial in studied(tmp_path / "journal.log").get_trials()] == [1.0]
