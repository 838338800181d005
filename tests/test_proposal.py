import itertools

import numpy as np
import pytest

from placesearch.placement import BlockSetting, Placement
from placesearch.search.effects import Model
from placesearch.search.evidence import Evidence, Score, Vocabulary
from placesearch.search.proposal import BEYOND, Proposer, _gains

SETTINGS = [BlockSetting.parse(text) for text in ("se(r=4)", "se(r=16)", "cbam(r=4,k=3)")]
CHOICES = {site: [None, *SETTINGS] for site in "abcd"}
COSTS = [np.array([0.0, 5.0, 2.0, 9.0]), np.array([0.0, 1.0, 1.0, 3.0])] * 2
EVERY = [
    Placement({site: setting for site, setting in zip("abcd", row, strict=True) if setting})
    for row in itertools.product(*CHOICES.values())
]


def cost(placement, costs=COSTS):
    return float(sum(c[1 + SETTINGS.index(placement[s])] for s, c in zip("abcd", costs, strict=True) if s in placement))


def effects(seed, pairs):
    """A draw of effects after a few scores."""
    random = np.random.default_rng(seed)
    scores = [Score(EVERY[i], float(random.normal())) for i in random.integers(0, len(EVERY), 6)]
    variances = np.log(np.array([0.1, 0.1, 0.3, 1.0, 0.3, 1e-9, 1e-9, 1, 1, 1, 1.0, 1, 1]))
    variances[5] = np.log(pairs)
    return Model(Evidence(Vocabulary(dict.fromkeys("abcd", SETTINGS)), scores), variances=variances).draw(random)


def area(points, cheapest, end):
    """What a set of (cost, value) covers above a value and up to a cost, counted step by step."""
    points = sorted(points)
    edges = [*(c for c, _ in points), end]
    heights = np.maximum.accumulate([max(value, cheapest) for _, value in points])
    return sum((right - left) * (h - cheapest) for left, right, h in zip(edges, edges[1:], heights, strict=False))


def test_gains_are_differences_of_areas():
    random = np.random.default_rng(0)
    seen, points = random.random((7, 2)), random.random((30, 2))
    cheapest = seen[seen[:, 0].argmin(), 1]
    end = 1.2
    before = area(seen.tolist(), cheapest, end)
    expected = [area([*seen.tolist(), point], cheapest, end) - before for point in points.tolist()]
    np.testing.assert_allclose(_gains(seen, points, end), expected, atol=1e-12)


@pytest.mark.parametrize("pairs", [1e-9, 0.5])
@pytest.mark.parametrize("seed", range(8))
def test_the_proposal_adds_as_much_to_the_front_as_anything_that_is_untried(seed, pairs):
    """Against all 256 placements, one by one; with pairs, where the search is no exact one, nearly as much."""
    drawn = effects(seed, pairs)
    proposer = Proposer(CHOICES, [COSTS])
    random = np.random.default_rng(seed)
    tried = {EVERY[0]: 0, **{EVERY[i]: 0 for i in random.integers(0, len(EVERY), 12)}}
    known = {p: (float(drawn.of([p])[0]), (cost(p),)) for p in tried}
    found = proposer.propose(drawn, known, random)
    assert found not in tried
    seen = np.array([(c[0], value) for value, c in known.values()])
    dearest = sum(c.max() for c in COSTS)
    gains = _gains(seen, np.array([(cost(p), float(drawn.of([p])[0])) for p in EVERY]), BEYOND * dearest)
    assert gains[EVERY.index(found)] >= (1 - 1e-9 if pairs < 1e-6 else 0.9) * gains.max()


def test_a_budget_is_kept():
    limited = [COSTS]
    for seed in range(10):
        proposer = Proposer(CHOICES, [COSTS], [9.0], limited)
        found = proposer.propose(effects(seed, 0.5), {Placement(): (0.0, (0.0,))}, np.random.default_rng(seed))
        assert cost(found) <= 9


def test_in_the_end_everything_was_proposed_once():
    choices = {site: CHOICES[site] for site in "ab"}
    vocabulary = Vocabulary(dict.fromkeys("ab", SETTINGS))
    model = Model(Evidence(vocabulary, [Score(Placement(), 0.0), Score(Placement({"a": SETTINGS[0]}), 1.0)]))
    proposer, tried, random = Proposer(choices, [COSTS[:2]]), {}, np.random.default_rng(0)
    for _ in range(16):
        drawn = model.draw(random)
        known = {p: (float(drawn.of([p])[0]), (0.0,)) for p in tried}
        tried[proposer.propose(drawn, known, random)] = None
    assert len(tried) == 16


def test_several_costs_and_none_at_all_are_both_fine():
    random = np.random.default_rng(0)
    for costs in ([], [COSTS, COSTS[::-1]]):
        found = Proposer(CHOICES, costs).propose(effects(0, 0.1), {Placement(): (0.0, [0.0] * len(costs))}, random)
        assert found in EVERY


def test_what_was_reached_is_the_share_of_the_best_area():
    """Against all 256 placements; the best front itself has reached everything, plain alone nothing."""
    dearest = BEYOND * sum(c.max() for c in COSTS)
    for seed in range(4):
        drawn = effects(seed, 1e-9)
        points = [(cost(p), float(drawn.of([p])[0])) for p in EVERY]
        plain = points[EVERY.index(Placement())]
        whole = area(points, plain[1], dearest)
        members = {EVERY[i]: (cost(EVERY[i]),) for i in np.random.default_rng(seed).integers(0, len(EVERY), 5)}
        own = area([plain, *((c[0], float(drawn.of([p])[0])) for p, c in members.items())], plain[1], dearest)
        proposer, random = Proposer(CHOICES, [COSTS]), np.random.default_rng(0)
        assert proposer.reached(drawn, members, random) == pytest.approx(own / whole)
        assert proposer.reached(drawn, {Placement(): (0.0,)}, random) == 0
        assert proposer.reached(drawn, {p: (cost(p),) for p in EVERY}, random) == pytest.approx(1)
