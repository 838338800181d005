import subprocess
import sys
import threading
import time

import optuna
import pytest
import sqlalchemy.exc
from optuna.exceptions import StorageInternalError

from placesearch.errors import InputError, StudyError
from placesearch.search.storage import Database, at_once, open_storage, patiently
from placesearch.storage_url import StorageUrl


def lost(message="server closed the connection"):
    """What a storage raises when its server is gone, as Optuna and SQLAlchemy wrap it."""
    error = StorageInternalError("An exception is raised during the commit.")
    error.__cause__ = sqlalchemy.exc.OperationalError("SELECT 1", {}, Exception(message))
    return error


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr("placesearch.search.storage.PAUSES", (0.001, 0.002))


@pytest.fixture
def study(tmp_path):
    storage = open_storage(StorageUrl.parse(f"sqlite:///{tmp_path}/s.db"))
    return optuna.create_study(storage=storage, study_name="s")


def test_what_fails_because_the_server_is_away_is_done_again_until_it_is_back():
    answers = iter([lost(), lost(), "at last"])

    def attempt():
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    told = []
    assert patiently(attempt, told.append) == "at last"
    assert told == [
        "the storage does not answer (server closed the connection); asking again until it does",
        "the storage answers again",
    ]


def test_patience_has_an_end(monkeypatch):
    monkeypatch.setattr("placesearch.search.storage.PATIENCE", 0.02)

    def attempt():
        raise lost()

    with pytest.raises(StudyError, match="did not answer for 0 s .*; the same command goes on"):
        patiently(attempt, lambda _: None)


@pytest.mark.parametrize("error", [ValueError("no"), StorageInternalError("no"), KeyError("no"), OSError("full")])
def test_what_does_not_go_away_by_itself_is_raised_at_once(error):
    calls = []

    def attempt():
        calls.append(1)
        raise error

    with pytest.raises(type(error)):
        patiently(attempt, pytest.fail)
    assert len(calls) == 1


def test_what_is_written_at_once_is_seen_by_others_whole_or_not_at_all(study, tmp_path):
    trial = study.ask()
    other = open_storage(StorageUrl.parse(f"sqlite:///{tmp_path}/s.db"))
    with at_once(study._storage):
        trial.set_user_attr("a", 1)
        assert other.get_trial(trial._trial_id).user_attrs == {}
        trial.set_user_attr("b", 2)
        assert study._storage.get_trial(trial._trial_id).user_attrs == {"a": 1, "b": 2}
    assert other.get_trial(trial._trial_id).user_attrs == {"a": 1, "b": 2}
    with pytest.raises(ZeroDivisionError), at_once(study._storage):
        trial.set_user_attr("c", 1 / 0)

    def broken():
        with at_once(study._storage):
            trial.set_user_attr("c", 3)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        broken()
    assert other.get_trial(trial._trial_id).user_attrs == {"a": 1, "b": 2}


@pytest.mark.slow
def test_other_threads_write_on_their_own_meanwhile(postgres):
    """As the beats of a worker do."""
    postgres.create()
    study = optuna.create_study(storage=open_storage(StorageUrl.parse(postgres.url)), study_name="s")
    first, second = study.ask(), study.ask()

    def broken():
        with at_once(study._storage):
            first.set_user_attr("a", 1)
            thread = threading.Thread(target=second.set_user_attr, args=("b", 2))
            thread.start()
            thread.join()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        broken()
    assert [trial.user_attrs for trial in study.trials] == [{}, {"b": 2}]


def test_a_driver_that_is_missing_is_told_with_the_extra_that_brings_it(monkeypatch):
    for name in ("psycopg", "pymysql"):
        monkeypatch.setitem(sys.modules, name, None)
    for url, extra in (("postgresql://h/d", "postgresql"), ("mysql://h/d", "mysql")):
        with pytest.raises(InputError, match=rf"{url} needs a package .*: pip install 'placesearch\[{extra}\]'"):
            open_storage(StorageUrl.parse(url))


def test_a_server_that_is_not_there_is_told_in_a_line_without_the_password():
    pytest.importorskip("psycopg")
    with pytest.raises(InputError, match="cannot use postgresql://ann@127.0.0.1:1/d: .*[Cc]onnection") as caught:
        open_storage(StorageUrl.parse("postgresql://ann:hunter2@127.0.0.1:1/d"))
    assert "hunter2" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_many_may_make_the_tables_at_the_same_moment(postgres):
    postgres.create()
    code = "import sys; from placesearch.search.storage import *; open_storage(StorageUrl.parse(sys.argv[1]))"
    opening = [subprocess.Popen([sys.executable, "-c", code, postgres.url]) for _ in range(4)]
    assert [process.wait(120) for process in opening] == [0] * 4


@pytest.mark.slow
def test_a_proxy_before_a_database_serves_as_the_database_does(postgres):
    pytest.importorskip("grpc", reason="needs grpcio: pip install -e '.[grpc]'")
    from servers import free_port
    from test_shared_trials import finished, joined

    postgres.create()
    port = free_port()
    code = (
        "import sys, warnings; warnings.simplefilter('ignore'); "
        "from optuna.storages import get_storage, run_grpc_proxy_server; "
        "run_grpc_proxy_server(get_storage(sys.argv[1]), host='127.0.0.1', port=int(sys.argv[2]))"
    )
    driver = StorageUrl.parse(postgres.url).revealed()
    proxy = subprocess.Popen([sys.executable, "-c", code, driver, str(port)])
    try:
        time.sleep(0.5)
        first, second = joined(StorageUrl.parse(f"grpc://127.0.0.1:{port}")), joined(StorageUrl.parse(postgres.url))
        for number in range(12):
            worker = (first, second)[number % 2]
            task = worker.ask()
            assert task.trial == number
            worker.complete(finished(task))
        assert first.records() == second.records()
        assert len(first.records()) == 12
        lost_one = first.ask()
        proxy.kill()
        proxy.wait()
        proxy = subprocess.Popen([sys.executable, "-c", code, driver, str(port)])
        first.complete(finished(lost_one))
        assert len(second.records()) == 13
    finally:
        proxy.kill()
        proxy.wait()


def test_a_database_is_one_of_the_kinds_that_can_be_given(tmp_path):
    class Mine(Database):
        pass

    from placesearch.search.storage import Journal, Proxy

    url = StorageUrl.parse(f"sqlite:///{tmp_path}/s.db")
    assert type(open_storage(url, (Journal, Mine, Proxy))) is Mine
