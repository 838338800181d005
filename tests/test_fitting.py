import pytest

from placesearch.evaluation.fitting import ROOM, WORTH, fit


@pytest.mark.parametrize(
    ("paces", "size", "measured"),
    [
        ([10, 10.9], 1, 2),  # one worker fills the GPU
        ([10, 18, 24, 24.5, 99], 3, 4),  # the first that does not help ends it
        ([10, 8], 1, 2),
        ([10, 20, 30, 40, 50, 60, 70, 80], 8, 8),
        ([10, 10 * WORTH], 1, 2),  # exactly a tenth more is not more than a tenth
        ([10, 0], 1, 2),  # two cannot train together
        ([0, 0], 1, 2),
    ],
)
def test_workers_are_added_as_long_as_each_brings_a_tenth(paces, size, measured):
    assert fit(lambda count: paces[count - 1], lambda: 1.0, most=8) == (size, paces[:measured])


def test_no_more_are_measured_than_may_run():
    assert fit(float, lambda: 1.0, most=1) == (1, [1.0])
    assert fit(float, lambda: 1.0, most=3) == (3, [1.0, 2.0, 3.0])


@pytest.mark.parametrize(("gigabytes", "size"), [(10, 1), (24.9, 1), (25, 2), (35, 3), (200, 8)])
def test_memory_is_left_for_one_more_and_a_half(gigabytes, size):
    running = 0

    def pace(count):
        nonlocal running
        running = count
        return float(count)

    assert ROOM == 1.5
    assert fit(pace, lambda: gigabytes - 10.0 * running, most=8)[0] == size
