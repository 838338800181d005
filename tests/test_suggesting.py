import numpy as np

from placesearch.placement import BlockSetting, Placement
from placesearch.search.evidence import Score
from placesearch.search.suggesting import Suggester, last_estimate

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
        placement = suggester.suggest(scores[: max(1, len(scores) - 7)], tried, np.random.default_rng((seed, trial)))
        assert placement not in tried
        tried[placement] = cost(placement)
        scores.append(Score(placement, truth(placement) + float(random.normal(0, noise))))
    return suggester, scores


def test_it_finds_what_helps_under_noise_as_large_as_the_effect():
    for seed in range(3):
        suggester, scores = run(60, 0.01, seed)
        wanted = [Placement({site: SETTINGS[1]}) for site in CHOICES]
        added = suggester.model(scores).added(wanted)[0]
        assert set(np.array(list(CHOICES))[np.argsort(-added)[:2]]) == GOOD
        late = [sum(site in score.placement for site in GOOD) for score in scores[-20:]]
        assert np.mean(late) > 1.4  # of 2; by chance it would be 1


def test_suggestions_depend_on_what_is_given_alone():
    """Not on what the suggester was asked before."""
    suggester, scores = run(25, 0.01, 0)
    tried = {score.placement: cost(score.placement) for score in scores}
    again = Suggester(CHOICES, COSTS).suggest(scores, tried, np.random.default_rng(7))
    assert suggester.suggest(scores, tried, np.random.default_rng(7)) == again


def test_what_is_repeated_is_the_member_of_the_front_of_which_least_is_known():
    """Of those alike in all else the one with fewer scores; none that is dominated, that waits or that has no score."""
    free, dear = Placement(), Placement({"s1": SETTINGS[0]})
    bad, other = Placement({"s2": SETTINGS[2]}), Placement({"s5": SETTINGS[0]})
    suggester = Suggester(CHOICES, COSTS)
    scores = [Score(free, 0.80), Score(dear, 0.90), Score(bad, 0.70)] * 2 + [Score(free, 0.80)] * 4
    tried = {placement: cost(placement) for placement in (free, dear, bad, other)}

    def suggest(waiting):
        return suggester.suggest(scores, tried, np.random.default_rng(0), waiting)

    assert suggest([]) == dear
    assert suggest([dear]) == free
    assert suggest([dear, free]) not in tried
    assert suggest(None) not in tried


def test_a_budget_is_kept_from_the_first_suggestion_on():
    suggester, tried, scores = Suggester(CHOICES, COSTS, (), [6.0], COSTS), {}, []
    for trial in range(20):
        placement = suggester.suggest(scores[:-7], tried, np.random.default_rng(trial))
        tried[placement] = cost(placement)
        scores.append(Score(placement, truth(placement)))
    assert max(value for (value,) in tried.values()) <= 6


def test_variances_are_estimated_less_and_less_often():
    times = sorted({last_estimate(size) for size in range(2, 1001)})
    assert all(last_estimate(size) <= size for size in range(2, 1001))
    assert len(times) < 40


def test_the_front_settles_as_scores_come_in_and_later_with_more_noise():
    reached = []
    for noise in (0.001, 0.02):
        suggester, scores = run(60, noise, 1)
        costs = {score.placement: cost(score.placement) for score in scores}
        reached.append([suggester.reached(scores[:size], costs, 0) for size in (10, 60)])
    assert reached[0][0] < reached[0][1]
    assert reached[0][1] > 0.9 > reached[1][1]


def test_a_model_that_takes_over_work_is_the_same_to_the_last_bit():
    suggester, scores = run(40, 0.01, 2)
    step_by_step = [suggester.model(scores[:size]) for size in range(2, len(scores))][-1]
    at_once = Suggester(CHOICES, COSTS).model(scores[:-1])
    wanted = [score.placement for score in scores]
    assert np.array_equal(step_by_step.estimate(wanted)[0], at_once.estimate(wanted)[0])
    assert np.array_equal(step_by_step.estimate(wanted)[1], at_once.estimate(wanted)[1])
