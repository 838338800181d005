import numpy as np
from test_effects import VOCABULARY, columns, placements

from placesearch.placement import Placement
from placesearch.search.effects import Model
from placesearch.search.evidence import GROUPS, SUMS, Evidence, Score


def test_counts_are_those_of_explicit_effects():
    every = placements(20)
    evidence = Evidence(VOCABULARY, [Score(placement, 0.0) for placement in every])
    counts, some = evidence.among(0, 20), evidence.among(5, 12)
    for group in GROUPS:
        matrix = columns(every, group)
        assert np.array_equal(counts[group], matrix @ matrix.T), group
        assert np.array_equal(some[group], matrix[5:12] @ matrix[:12].T), group


def test_placements_that_have_no_score_have_something_in_common_with_those_that_have():
    every = placements(20)
    evidence = Evidence(VOCABULARY, [Score(placement, 0.0) for placement in every[:12]])
    others = [*every[12:], every[3], Placement()]
    found = evidence.common(others, VOCABULARY.rows(others), 10)
    for group in GROUPS:
        matrix = columns([*every[:10], *others], group)
        assert np.array_equal(found[group], matrix[10:] @ matrix[:10].T), group
    assert set(VOCABULARY.rows(others)) == set(SUMS)


def test_scores_that_come_one_by_one_give_the_same_to_the_last_bit():
    random = np.random.default_rng(4)
    scores = [Score(placement, float(random.normal())) for placement in placements(40)]
    grown = Evidence(VOCABULARY)
    for score in scores:
        grown.add(score)
        if len(grown) == 20:
            half = Model(grown)
    assert np.array_equal(half.variances, Model(Evidence(VOCABULARY, scores[:20])).variances)
    assert np.array_equal(Model(grown, 20).estimate(placements(3, 7))[0], half.estimate(placements(3, 7))[0])
