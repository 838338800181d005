from hypothesis import given
from hypothesis import strategies as st

from placesearch.front import front, knee, non_dominated
from placesearch.placement import Placement
from placesearch.records import TrialRecord

OBJECTIVES = ("accuracy", "macs", "params")
coordinate = st.integers(0, 4).map(float) | st.just(float("nan"))
clouds = st.integers(1, 3).flatmap(lambda d: st.lists(st.tuples(*[coordinate] * d), max_size=12))


def brute_force(points):
    """The definition, point by point and coordinate by coordinate."""

    def dominates(a, b):
        if any(x != x for x in a):
            return False
        return all(x <= y for x, y in zip(a, b, strict=True)) and any(x < y for x, y in zip(a, b, strict=True))

    return [not any(x != x for x in p) and not any(dominates(q, p) for q in points) for p in points]


def record(trial, accuracy, macs, params, state="COMPLETE"):
    return TrialRecord(trial=trial, state=state, placement=Placement(), val_accuracy=accuracy, macs=macs, params=params)


@given(clouds)
def test_the_front_equals_brute_force(points):
    assert non_dominated(points) == brute_force(points)


def test_no_points_one_point_and_ties():
    assert non_dominated([]) == []
    assert non_dominated([(1.0, 2.0)]) == [True]
    assert non_dominated([(1.0, 2.0), (1.0, 2.0)]) == [True, True]
    assert non_dominated([(float("nan"), 0.0), (1.0, 2.0)]) == [False, True]


def test_accuracy_goes_up_and_costs_go_down():
    records = [record(0, 0.9, 10, 10), record(1, 0.8, 10, 10), record(2, 0.95, 20, 10), record(3, 0.9, 9, 11)]
    assert [member.trial for member in front(records, OBJECTIVES)] == [3, 0, 2]


def test_a_failed_trial_is_never_on_the_front():
    records = [record(0, None, 1, 1, state="FAIL"), record(1, 0.5, 10, 10)]
    assert [member.trial for member in front(records, OBJECTIVES)] == [1]
    assert front(records[:1], OBJECTIVES) == []


def test_the_knee_is_the_member_nearest_to_the_ideal():
    members = [record(0, 0.80, 10, 100), record(1, 0.89, 11, 101), record(2, 0.90, 20, 200)]
    assert knee(members, OBJECTIVES).trial == 1
    assert knee(members[:1], OBJECTIVES).trial == 0


def test_the_knee_ignores_an_objective_in_which_all_are_equal():
    members = [record(0, 0.8, 10, 100), record(1, 0.9, 10, 110)]
    assert knee(members, ("accuracy", "macs")).trial == 1
