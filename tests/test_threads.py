import threading

import pytest

from placesearch.search import threads
from placesearch.search.threads import OneThread


class Libraries:
    """A stand-in for linear algebra: one setting for the whole process, each limit restores what it found."""

    def __init__(self):
        self.setting = 4

    def limit(self, limits, user_api):  # noqa: ARG002 - as that of threadpoolctl
        found, self.setting = self.setting, limits
        outer = self

        class Limit:
            def restore_original_limits(self):
                outer.setting = found

        return Limit()


@pytest.fixture
def libraries(monkeypatch):
    monkeypatch.setattr(threads, "_CONTROLLER", libraries := Libraries())
    return libraries


def interleave(enter, libraries):
    """Let a second thread enter before the first has left, and leave after it; return what it then saw."""
    first_in, second_in, first_out, seen = *(threading.Event() for _ in range(3)), []

    def first():
        with enter():
            first_in.set()
            second_in.wait(30)
        first_out.set()

    def second():
        first_in.wait(30)
        with enter():
            second_in.set()
            first_out.wait(30)
            seen.append(libraries.setting)

    workers = [threading.Thread(target=work) for work in (first, second)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    return seen


def test_two_threads_that_interleave_leave_the_setting_as_they_found_it(libraries):
    limit = OneThread("blas")
    assert interleave(lambda: limit, libraries) == [1]
    assert libraries.setting == 4


def test_limits_that_do_not_know_of_each_other_would_leave_it_wrong(libraries):
    assert interleave(lambda: OneThread("blas"), libraries) == [4]
    assert libraries.setting == 1


def test_the_limit_may_be_entered_again_by_its_holder(libraries):
    limit = OneThread("blas")
    with limit:
        with limit:
            assert libraries.setting == 1
        assert libraries.setting == 1
    assert libraries.setting == 4
