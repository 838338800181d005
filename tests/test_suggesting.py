from itertools import product

import numpy as np

from placesearch.placement import BlockSetting, Placement
from placesearch.search.evidence import Score
from placesearch.search.suggesting import Suggester, is_repeat, last_estimate

SETTINGS = [BlockSetting.parse(text) for text in ("se(r=4)", "se(r=16)", "cbam(r=4,k=3)")]
CHOICES = {f"s{index}": [None, *SETTINGS] for index in range(6)}
COSTS = [[np.array([0.0, 4.0, 1.0, 5.0])] * 6]
GOOD = {"s1", "s4"}


def truth(placement):
    """SE helps at two sites, CBAM nowhere."""
    return 0.8 + 0.01 * sum((site in GOOD) * (1 if s.block == "se" else -1) for site, s in placement.items())


def cost(placement):
    return [float(sum(COSTS[0][0][1 + SETTINGS.index(setting)] for setting in placement.values()))]


def run(trials, noise, seed):
    """A search that always sees all scores but the last seven."""
    random, suggester = np.random.default_rng(seed), Suggester(CHOICES, COSTS)
    tried, scores = {Placement(): [0.0]}, [Score(Placement(), truth(Placement()))]
    for trial in range(trials):
        seen, random_of_trial = scores[: max(1, len(scores) - 7)], np.random.default_rng((seed, trial))
        waiting = {score.placement for score in scores[len(seen) :]}
        placement = suggester.suggest(seen, tried, waiting, trial, random_of_trial)
        assert placement not in (waiting if is_repeat(trial) else tried)
        tried[placement] = cost(placement)
        scores.append(Score(placement, truth(placement) + float(random.normal(0, noise))))
    return suggester, scores


def test_it_finds_what_helps_under_noise_as_large_as_the_effect():
    """Over 16 seeds, both sites were among the best two in 14; by chance 1 of 15 would be."""
    found, late = 0, []
    for seed in range(4):
        suggester, scores = run(60, 0.01, seed)
        wanted = [Placement({site: SETTINGS[1]}) for site in CHOICES]
        added = suggester.model(scores).added(wanted)[0]
        found += len(set(np.array(list(CHOICES))[np.argsort(-added)[:2]]) & GOOD)
        late += [sum(site in score.placement for site in GOOD) for score in scores[-20:]]
    assert found >= 6  # of 8; by chance it would be 2.7
    assert np.mean(late) > 1.5  # of 2; by chance it would be 1


def test_suggestions_depend_on_what_is_given_alone():
    """Not on what the suggester was asked before."""
    suggester, scores = run(25, 0.01, 0)
    tried = {score.placement: cost(score.placement) for score in scores}
    again = Suggester(CHOICES, COSTS).suggest(scores, tried, (), 26, np.random.default_rng(7))
    assert suggester.suggest(scores, tried, (), 26, np.random.default_rng(7)) == again


def test_what_is_repeated_is_the_member_of_the_front_of_which_least_is_known():
    """Of those alike in all else the one with fewer scores; none that is dominated, that waits or that has no score."""
    free, dear = Placement(), Placement({"s1": SETTINGS[0]})
    bad, other = Placement({"s2": SETTINGS[2]}), Placement({"s5": SETTINGS[0]})
    suggester = Suggester(CHOICES, COSTS)
    scores = [Score(free, 0.80), Score(dear, 0.90), Score(bad, 0.70)] * 2 + [Score(free, 0.80)] * 4
    tried = {placement: cost(placement) for placement in (free, dear, bad, other)}

    def suggest(position, *waiting):
        return suggester.suggest(scores, tried, waiting, position, np.random.default_rng(0))

    assert suggest(31) == dear
    assert suggest(31, dear) == free
    assert suggest(31, dear, free) not in tried
    assert suggest(32) not in tried


def test_every_other_suggestion_is_what_is_expected_to_add_most():
    """Which no random number changes."""
    suggester, scores = run(30, 0.002, 0)
    tried = {score.placement: cost(score.placement) for score in scores}
    odd, even = (
        {suggester.suggest(scores, tried, (), position, np.random.default_rng(n)) for n in range(8)}
        for position in (1, 2)
    )
    assert len(odd) == 1 < len(even)


def test_a_budget_is_kept_from_the_first_suggestion_on():
    suggester, tried, scores = Suggester(CHOICES, COSTS, (), [6.0], COSTS), {}, []
    for trial in range(20):
        placement = suggester.suggest(scores[:-7], tried, (), trial, np.random.default_rng(trial))
        tried[placement] = cost(placement)
        scores.append(Score(placement, truth(placement)))
    assert max(value for (value,) in tried.values()) <= 6


def test_variances_are_estimated_less_and_less_often():
    times = sorted({last_estimate(size) for size in range(2, 1001)})
    assert all(last_estimate(size) <= size for size in range(2, 1001))
    assert len(times) < 40


def test_the_front_settles_as_scores_come_in_and_later_with_more_noise():
    reached = {}
    for noise, seed in product((0.001, 0.02), (0, 1)):
        suggester, scores = run(60, noise, seed)
        costs = {score.placement: cost(score.placement) for score in scores}
        for size in (10, 60):
            reached[noise, size] = reached.get((noise, size), 0.0) + suggester.reached(scores[:size], costs, 0) / 2
    assert reached[0.001, 10] < reached[0.001, 60] > 0.8
    assert reached[0.02, 60] < reached[0.001, 60] - 0.05


def test_a_model_that_takes_over_work_is_the_same_to_the_last_bit():
    suggester, scores = run(40, 0.01, 2)
    step_by_step = [suggester.model(scores[:size]) for size in range(2, len(scores))][-1]
    at_once = Suggester(CHOICES, COSTS).model(scores[:-1])
    wanted = [score.placement for score in scores]
    assert np.array_equal(step_by_step.estimate(wanted)[0], at_once.estimate(wanted)[0])
    assert np.array_equal(step_by_step.estimate(wanted)[1], at_once.estimate(wanted)[1])
