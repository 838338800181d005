import numpy as np
import pytest
from scipy.stats import t as student

from placesearch.records import Milestone
from placesearch.search import stopping
from placesearch.search.stopping import DOUBT, FEWEST, Ended, milestone, milestone_epoch


def trainings(count, slope=0.8, noise=0.005, seed=0):
    """Trainings on a line, the dearer the better."""
    random = np.random.default_rng(seed)
    at = np.sort(random.normal(0.4, 0.03, count))
    ends = 0.2 + slope * at + random.normal(0, noise, count)
    return [Ended((float(cost),), float(x), float(y)) for cost, (x, y) in enumerate(zip(at, ends, strict=True))]


@pytest.mark.parametrize("count", [10, 40])
def test_at_the_floor_the_upper_limit_of_the_end_is_the_best_rival(count):
    """The limit as textbooks have it, with matrices."""
    ended = trainings(count)
    found = milestone(3, (1000.0,), ended)
    rows = np.array([[1.0, other.on_the_way] for other in ended])
    ends = np.array([other.accuracy for other in ended])
    line, (rest,), *_ = np.linalg.lstsq(rows, ends, rcond=None)
    variance, at = rest / (count - 2), np.array([1.0, found.floor])
    of_line = at @ np.linalg.inv(rows.T @ rows) @ at
    limit = at @ line + student.ppf(1 - DOUBT, count - 2) * np.sqrt(variance * (2 + of_line))
    assert limit == pytest.approx(ends.max())
    assert (found.intercept, found.slope) == pytest.approx(tuple(line))
    assert found.epoch == 3


def test_only_candidates_that_cost_no_more_in_any_cost_are_rivals():
    ended = [Ended((cost, 10.0 - cost), e.on_the_way, e.accuracy) for e in trainings(12) for cost in e.costs]
    floors = [milestone(1, (cost, 10.0 - cost), ended).floor for cost in (2.0, 5.0, 11.0)]
    assert floors == sorted(floors)
    assert len(set(floors)) == 3
    assert milestone(1, (2.0, 8.0), ended) == milestone(1, (2.5, 8.0), ended)
    assert milestone(1, (2.0, 7.9), ended) == Milestone(1)
    assert milestone(1, (-1.0, 99.0), ended) == Milestone(1)


@pytest.mark.parametrize(
    "ended",
    [
        trainings(FEWEST - 1),
        trainings(30, slope=-0.8),
        trainings(30, slope=0.0, noise=0.02),
        [Ended((0.0,), 0.5, 0.1 * index) for index in range(20)],
    ],
    ids=["too few", "who leads falls behind", "no relation", "all equal on the way"],
)
def test_where_the_milestone_foretells_nothing_nothing_is_stopped(ended):
    assert milestone(1, (1000.0,), ended).floor == 0.0


def test_without_costs_every_candidate_is_a_rival():
    ended = [Ended((), other.on_the_way, other.accuracy) for other in trainings(20)]
    assert milestone(1, (), ended) == milestone(1, (1000.0,), trainings(20))


def test_a_candidate_as_good_as_its_rival_is_hardly_ever_stopped_and_a_bad_one_is():
    """Lines that are known; the rival is one training, the candidate is worth as much as it, or 12 deviations less."""
    stopped, rounds, noise = np.zeros(2), 2000, 0.005
    for seed in range(rounds):
        ended = trainings(15, noise=noise, seed=seed)
        floor = milestone(1, ended[0].costs, ended).floor
        worst = ended[0].on_the_way
        stopped += [worst < floor, worst - 12 * noise / 0.8 < floor]
    assert stopped[0] / rounds <= DOUBT
    assert stopped[1] / rounds > 0.9


def test_the_milestone_lies_between_the_first_epoch_and_the_last():
    assert (milestone_epoch(1), milestone_epoch(2)) == (None, 1)
    for epochs in range(3, 200):
        assert 1 <= milestone_epoch(epochs) < epochs
        assert abs(milestone_epoch(epochs) - stopping.SHARE * epochs) <= 0.5
