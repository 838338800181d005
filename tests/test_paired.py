import numpy as np
import pytest
from scipy import stats

from placesearch.verdict.paired import LEVEL, POWER, Paired, holm, paired

RANDOM = np.random.default_rng(0)


def test_with_one_number_a_seed_it_is_the_paired_t_test():
    one, other = RANDOM.random((2, 5))
    found = paired((one - other)[:, None])
    expected = stats.ttest_rel(one, other)
    assert found.p_value == pytest.approx(expected.pvalue)
    assert found.interval(0.05) == pytest.approx(tuple(expected.confidence_interval(0.95)))


def test_if_all_seeds_give_the_same_the_images_alone_decide():
    of_images = RANDOM.integers(-1, 2, 40).astype(float)
    found = paired(np.tile(of_images, (4, 1)))
    assert found.p_value == pytest.approx(stats.ttest_1samp(of_images, 0).pvalue)
    assert found.freedom == pytest.approx(39)


def test_if_all_images_give_the_same_the_seeds_alone_decide():
    of_seeds = RANDOM.random(6)
    found = paired(np.tile(of_seeds[:, None], (1, 50)))
    assert found.p_value == pytest.approx(stats.ttest_1samp(of_seeds, 0).pvalue)
    assert found.freedom == pytest.approx(5)


def test_seeds_that_agree_by_chance_are_not_taken_for_sure():
    differences = np.array([[1.0, 0, 0, 0], [0, 1, 0, 0]])  # both means are 1/4
    rest = np.array([[0.5, -0.5, 0, 0], [-0.5, 0.5, 0, 0]])
    found = paired(differences)
    assert found.error**2 >= (rest**2).sum() / 3 / 8  # what neither explains, of the mean of eight
    assert found.error > 0


def test_the_variance_is_right_on_average_when_seeds_and_images_both_vary():
    seeds, images, of_seed, of_image, of_rest = 5, 60, 0.3, 1.0, 2.0
    parts = [
        of_seed * RANDOM.standard_normal((3000, seeds, 1)),
        of_image * RANDOM.standard_normal((3000, 1, images)),
        of_rest * RANDOM.standard_normal((3000, seeds, images)),
    ]
    variances = [paired(differences).error ** 2 for differences in sum(parts)]
    truth = of_seed**2 / seeds + of_image**2 / images + of_rest**2 / (seeds * images)
    assert np.mean(variances) == pytest.approx(truth, rel=0.1)


def test_no_difference_at_all_has_a_p_value_of_one_and_always_the_same_one_has_none():
    assert paired(np.zeros((5, 7))).p_value == 1.0
    assert paired(np.zeros((5, 7))).interval(0.05) == (0.0, 0.0)
    assert paired(np.full((5, 1), 0.02)).p_value is None


@pytest.mark.parametrize("freedom", [1, 4, 9.5, 200])
def test_the_detectable_difference_is_found_with_the_stated_power(freedom):
    level = LEVEL / 12
    effect = Paired(0.0, 2.0, freedom).detectable(level) / 2.0
    shares = (np.arange(20_000) + 0.5) / 20_000
    errors = np.sqrt(stats.chi2.ppf(shares, freedom) / freedom)  # of the estimated by the true standard error
    power = stats.norm.sf(stats.t.isf(level / 2, freedom) * errors - effect).mean()
    assert power == pytest.approx(POWER, abs=0.002)


def test_holm_rejects_what_its_step_by_step_definition_rejects():
    for _ in range(200):
        p_values = (RANDOM.random(6) ** 3).tolist()
        rejected, left = set(), set(range(6))
        while left and min(p_values[i] for i in left) <= LEVEL / len(left):
            smallest = min(left, key=lambda i: p_values[i])
            rejected.add(smallest)
            left.remove(smallest)
        corrected, _ = holm(p_values)
        assert {i for i in range(6) if corrected[i] <= LEVEL} == rejected


def test_an_interval_leaves_zero_out_exactly_if_a_difference_is_claimed():
    claims = 0
    for _ in range(200):
        found = [Paired(float(d), 1.0, 4) for d in RANDOM.normal(4, 4, 5)]
        corrected, levels = holm([one.p_value for one in found])
        for one, p_value, level in zip(found, corrected, levels, strict=True):
            low, high = one.interval(level)
            assert (low > 0 or high < 0) == (p_value <= LEVEL)
            claims += p_value <= LEVEL
    assert 200 < claims < 800


def test_equals_are_told_apart_in_at_most_one_study_of_twenty():
    """Six equal networks, five seeds, every pair compared: 15 comparisons a study, 600 studies."""
    wrong = 0
    for _ in range(600):
        scores = RANDOM.standard_normal((6, 5))
        pairs = [paired((scores[a] - scores[b])[:, None]) for a in range(6) for b in range(a)]
        wrong += min(holm([pair.p_value for pair in pairs])[0]) <= LEVEL
    assert wrong <= stats.binom.isf(0.001, 600, LEVEL)
