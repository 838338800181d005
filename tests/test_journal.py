import json
from contextlib import suppress

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


def test_others_may_write_between_two_blocks(tmp_path):
    one, two = (studied(tmp_path / "journal.log") for _ in range(2))
    for number in range(6):
        study = (one, two)[number % 2]
        with at_once(study._storage):
            study.tell(study.ask(), float(number))
    for study in (one, two):
        assert [trial.value for trial in study.get_trials()] == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]


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
