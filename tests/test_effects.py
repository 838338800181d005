import itertools

import numpy as np
import pytest
from scipy.stats import multivariate_normal

from placesearch.placement import BlockSetting, Placement
from placesearch.search.effects import BIAS_SHARES, LEVEL, NAMES, OTHER_SHARES, SCALE_SPREAD, SHARES, SPREAD, Model
from placesearch.search.evidence import Evidence, Score, Vocabulary

SETTINGS = [BlockSetting.parse(text) for text in ("se(r=4)", "se(r=16)", "cbam(r=4,k=3)", "cbam(r=16,k=7)")]
VOCABULARY = Vocabulary(dict.fromkeys("abc", SETTINGS))
VARIANCES = np.log([0.3, 0.1, 0.5, 0.7, 0.2, 0.4, 0.15, 0.25, 0.35, 0.2, 0.6, 0.8, 1.0])


def placements(count, seed=0):
    random = np.random.default_rng(seed)
    drawn = random.integers(0, 5, (count, 3))
    return [Placement({site: SETTINGS[c - 1] for site, c in zip("abc", row, strict=True) if c}) for row in drawn]


def keys(placement):
    """The effects of a placement by group, written down by hand."""
    at = {site: (s.block, s.reduction, s.kernel_size) for site, s in placement.items()}
    settings = [(s, b, name, v) for s, (b, r, k) in at.items() for name, v in (("r", r), ("k", k)) if v]
    return {
        "block": [b for b, _, _ in at.values()],
        "setting": [setting[1:] for setting in settings],
        "site": list(at),
        "site block": [(s, b) for s, (b, _, _) in at.items()],
        "site setting": settings,
        "pair": [(s, at[s][0], t, at[t][0]) for s, t in itertools.combinations(sorted(at), 2)],
        "placement": [str(placement)],
    }


def columns(every, group):
    """The matrix of a linear model: how often each effect of a group is in each placement."""
    known = sorted({key for placement in every for key in keys(placement)[group]}, key=str)
    return np.array([[keys(placement)[group].count(key) for key in known] for placement in every], float)


def unit_of(scores):
    """The larger variance of the scores of one fidelity."""
    return max(np.var([s.accuracy for s in scores if s.brief == b]) for b in {s.brief for s in scores})


def by_regression(scores, wanted, variances, unit):
    """Mean and standard deviation of a Bayesian linear regression with explicit effects, in the space of weights."""
    v = dict(zip(NAMES, np.exp(variances), strict=True))
    every = [score.placement for score in scores] + wanted
    brief = np.array([score.brief for score in scores] + [False] * len(wanted))
    load = np.where(brief, v["scale"], 1.0)[:, None]
    y = np.array([score.accuracy for score in scores])
    center = y[~brief[: len(y)]].mean()
    parts = [(load * columns(every, group), v[group]) for group in SHARES]
    parts += [((brief == b)[:, None] * 1.0, LEVEL * unit) for b in (True, False)]
    if brief.any():
        parts += [(brief[:, None] * columns(every, group), v[f"bias {group}"]) for group in BIAS_SHARES]
    first = next(score.seed for score in scores if not score.brief)
    seeds = np.array([(score.seed, score.brief) for score in scores] + [(first, False)] * len(wanted))
    if len({score.seed for score in scores}) > 1:
        cells = [(seeds == cell).all(1)[:, None] * 1.0 for cell in {tuple(row) for row in seeds.tolist()}]
        parts += [(cell, v["seed"]) for cell in cells]
    matrix = np.hstack([part for part, _ in parts])
    prior = np.concatenate([np.full(part.shape[1], variance) for part, variance in parts])
    noise = np.where(brief, v["brief noise"], v["noise"])[: len(y)]
    x, at = matrix[: len(y)], matrix[len(y) :]
    precision = np.diag(1 / prior) + x.T @ (x / noise[:, None])
    covariance = np.linalg.inv(precision)
    mean = center + at @ covariance @ (x.T @ ((y - center) / noise))
    return mean, np.sqrt(np.einsum("ij,jk,ik->i", at, covariance, at))


@pytest.mark.parametrize(("seeds", "fidelities"), [(1, 1), (3, 1), (1, 2), (2, 2)])
def test_estimates_are_those_of_a_bayesian_regression_on_explicit_effects(seeds, fidelities):
    random = np.random.default_rng(1)
    scores = [
        Score(placement, float(random.normal(90, 2)), index % seeds, index % 3 > 0 and fidelities == 2)
        for index, placement in enumerate(placements(30))
    ]
    wanted = [*placements(6, seed=5), scores[0].placement, Placement()]
    mean, deviation = Model(Evidence(VOCABULARY, scores), variances=VARIANCES).estimate(wanted)
    expected_mean, expected_deviation = by_regression(scores, wanted, VARIANCES, unit_of(scores))
    np.testing.assert_allclose(mean, expected_mean, rtol=1e-6)
    np.testing.assert_allclose(deviation, expected_deviation, rtol=1e-4)


@pytest.mark.parametrize("seeds", [(0, 0), (0, 1), (2, 2)])
@pytest.mark.parametrize("briefs", [(0, 0), (0, 2), (2, 2)])
def test_a_model_goes_on_from_that_of_the_first_scores(seeds, briefs):
    """Also where the later ones are the first that are brief, or of another seed."""
    random = np.random.default_rng(4)
    scores = [
        Score(p, float(random.normal(90, 2)), i % (1 + seeds[i >= 40]), i % (1 + briefs[i >= 40]) > 0)
        for i, p in enumerate(placements(60, seed=4))
    ]
    evidence, wanted = Evidence(VOCABULARY, scores), [*placements(6, seed=5), scores[50].placement]
    first = Model(evidence, 40, VARIANCES)
    estimate = Model(evidence, start=first.start()).estimate(wanted)
    expected = by_regression(scores, wanted, VARIANCES, unit_of(scores[:40]))
    np.testing.assert_allclose(estimate[0], expected[0], rtol=1e-6)
    np.testing.assert_allclose(estimate[1], expected[1], rtol=1e-4)
    np.testing.assert_allclose(Model(evidence, start=first.start()).means(wanted), estimate[0], rtol=1e-12)
    again = Model(evidence, 40, start=first.start()).estimate(wanted)
    np.testing.assert_allclose(again, first.estimate(wanted), rtol=1e-12)


@pytest.mark.parametrize("brief", [False, True])
def test_draws_have_the_mean_and_the_spread_of_the_estimates(brief):
    random = np.random.default_rng(2)
    scores = [Score(p, float(random.normal(0, 2)), i % 2, brief and i % 2 > 0) for i, p in enumerate(placements(20))]
    variances = VARIANCES.copy()
    variances[list(SHARES).index("placement")] = -30  # what is peculiar to a placement is left out of draws
    model = Model(Evidence(VOCABULARY, scores), variances=variances)
    wanted = placements(5, seed=9)
    drawn = np.array([model.draw(random).of(wanted) for _ in range(3000)])
    mean, deviation = model.estimate(wanted)
    np.testing.assert_allclose(drawn.mean(0), mean, atol=5 * deviation.max() / 3000**0.5)
    np.testing.assert_allclose(drawn.std(0), deviation, rtol=0.1)
    np.testing.assert_allclose(model.expected().of(wanted), mean, atol=1e-6)


def test_what_single_blocks_and_pairs_add_makes_up_the_difference_from_plain():
    random = np.random.default_rng(3)
    scores = [Score(placement, float(random.normal(0, 2))) for placement in placements(25)]
    model = Model(Evidence(VOCABULARY, scores), variances=VARIANCES)
    two = Placement({"a": SETTINGS[0], "c": SETTINGS[2]})
    alone = model.added([Placement({site: setting}) for site, setting in two.items()])[0].sum()
    names = VOCABULARY.columns("site block")
    pair = model.interactions()[0][names.index(("a", "se")), names.index(("c", "cbam"))]
    expected = model.expected()
    assert alone + pair == pytest.approx(float(np.diff(expected.of([Placement(), two]))[0]), rel=1e-6)


def truth(placement):
    return 0.9 + 0.02 * ("a" in placement) - 0.01 * sum(s.block == "cbam" for s in placement.values())


def test_noise_and_effects_are_found_again():
    random = np.random.default_rng(5)
    scores = [Score(p, truth(p) + float(random.normal(0, 0.01))) for p in placements(300)]
    model = Model(Evidence(VOCABULARY, scores))
    assert 0.0075 < model.noise < 0.0125
    assert model.lack_of_fit < 0.2
    mean, deviation = model.estimate(placements(50, seed=6))
    errors = mean - np.array([truth(p) for p in placements(50, seed=6)])
    assert abs(errors).max() < 0.012
    assert (abs(errors) < 1.645 * deviation).mean() > 0.75


def test_long_scores_overrule_what_brief_ones_say_together():
    """Brief scores rise by 0.05 a block, which long ones show to be nothing."""
    random = np.random.default_rng(6)
    scores = []
    for index, p in enumerate(placements(120)):
        brief = index % 4 > 0
        value = 0.6 + 0.05 * len(p) + 0.7 * truth(p) if brief else truth(p)
        scores.append(Score(p, value + float(random.normal(0, 0.005)), brief=brief))
    wanted = placements(50, seed=6)
    error = Model(Evidence(VOCABULARY, scores)).estimate(wanted)[0] - np.array([truth(p) for p in wanted])
    long_only = [score for score in scores if not score.brief]
    less = Model(Evidence(VOCABULARY, long_only)).estimate(wanted)[0] - np.array([truth(p) for p in wanted])
    assert np.sqrt((error**2).mean()) < 0.005
    assert np.sqrt((error**2).mean()) < np.sqrt((less**2).mean())


def test_scores_that_are_all_alike_are_no_trouble():
    model = Model(Evidence(VOCABULARY, [Score(placement, 0.5) for placement in placements(5)]))
    mean, deviation = model.estimate([Placement()])
    assert mean[0] == pytest.approx(0.5, abs=1e-3)
    assert np.isfinite(deviation).all()


@pytest.mark.parametrize("fidelities", [1, 2])
def test_the_variances_are_the_most_probable_ones(fidelities):
    """No step away from them makes scores and prior more probable; the density is that of explicit effects."""
    random = np.random.default_rng(8)
    scores = [
        Score(p, truth(p) + float(random.normal(0, 0.01)), i % 2, i % 3 > 0 and fidelities == 2)
        for i, p in enumerate(placements(60))
    ]
    model = Model(Evidence(VOCABULARY, scores))
    y, brief = np.array([s.accuracy for s in scores]), np.array([s.brief for s in scores])
    y = y - y[~brief].mean()
    every = [score.placement for score in scores]
    counts = {group: (matrix := columns(every, group)) @ matrix.T for group in SHARES}
    unit = max(y[brief == b].var() for b in set(brief.tolist()))
    shares = {**SHARES, **{f"bias {g}": s for g, s in BIAS_SHARES.items()}, **OTHER_SHARES}

    def expected(name):
        part = counts.get(name.removeprefix("bias "))
        explained = 1.0 if part is None else max(np.diag(part).mean() - part.mean(), 0.05)
        return 0.0 if name == "scale" else np.log(shares[name] * unit / explained)

    first = np.array([expected(name) for name in NAMES])
    spread = np.array([SCALE_SPREAD if name == "scale" else SPREAD for name in NAMES])

    def density(variances):
        v = dict(zip(NAMES, np.exp(variances), strict=True))
        load = np.where(brief, v["scale"], 1.0)
        covariance = np.outer(load, load) * sum(v[group] * part for group, part in counts.items())
        covariance += sum(v[f"bias {group}"] * np.outer(brief, brief) * counts[group] for group in BIAS_SHARES)
        cells = [(score.seed, score.brief) for score in scores]
        covariance += v["seed"] * np.array([[float(one == two) for two in cells] for one in cells])
        covariance += np.diag(np.where(brief, v["brief noise"], v["noise"]) + 1e-9 * unit)
        covariance += LEVEL * unit * (brief[:, None] == brief[None, :])
        return multivariate_normal(cov=covariance).logpdf(y) - 0.5 * (((variances - first) / spread) ** 2).sum()

    best = density(model.variances)
    for index in range(len(NAMES)):
        for step in (-0.2, 0.2):
            moved = model.variances.copy()
            moved[index] += step
            assert density(moved) < best + 0.01


def test_weighted_sums_of_placements_add_what_the_placement_of_both_adds():
    model = Model(Evidence(VOCABULARY, [Score(p, 0.5 + 0.01 * len(p)) for p in placements(12)]), variances=VARIANCES)
    alone = [Placement({site: setting}) for site, setting in zip("ab", SETTINGS[1:], strict=False)]
    both = Placement({site: setting for placement in alone for site, setting in placement.items()})
    for weighted, direct in zip(model.added(alone, np.array([[1.0, 1.0]])), model.added([both]), strict=True):
        assert weighted == pytest.approx(direct)
    for weighted, direct in zip(model.added(alone, np.diag([2.0, -1.0])), model.added(alone), strict=True):
        assert abs(weighted) == pytest.approx(abs(direct) * [2.0, 1.0])
