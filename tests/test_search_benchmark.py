"""A part of `benchmarks/search.py`: landscapes, best fronts and scores against brute force and closed forms."""

from dataclasses import replace
from itertools import product

import numpy as np
import optuna
import pandas as pd
import pytest
from benchmarks import search

from placesearch.models.blocks import make_block


def every_placement(sites):
    return np.array(list(product(range(len(search.TEXTS)), repeat=sites)))


def volume(landscape, gains, costs):
    return search.hypervolume(np.asarray(gains, float), np.asarray(costs, float), landscape.space.dearest)


@pytest.fixture(autouse=True)
def _quiet():
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    yield
    optuna.logging.set_verbosity(before)


@pytest.mark.parametrize("channels", [64, 512])
def test_params_are_those_of_the_blocks(channels):
    for setting in search.SETTINGS:
        counted = sum(weight.numel() for weight in make_block(setting, channels).parameters())
        assert search.params_of(setting, channels) == counted


@pytest.mark.parametrize("name", ["additive", "saturating"])
def test_the_best_front_is_that_of_brute_force(name):
    landscape = search.make_landscape(name, 3, seed=1)
    matrix = every_placement(3)
    gains, costs = landscape.gains(matrix), landscape.space.cost(matrix)
    front = search.oracle_front(landscape)
    assert front.gains.max() == pytest.approx(gains.max(), abs=1e-12)
    assert volume(landscape, front.gains, front.costs) == pytest.approx(volume(landscape, gains, costs), rel=1e-12)
    assert landscape.gains(front.matrix) == pytest.approx(front.gains)
    assert landscape.space.cost(front.matrix) == pytest.approx(front.costs)


@pytest.mark.parametrize("name", ["interaction20", "interaction50", "deceptive"])
def test_the_best_front_with_interaction_is_nearly_that_of_brute_force(name):
    landscape = search.make_landscape(name, 5, seed=1)
    matrix = every_placement(5)
    best = volume(landscape, landscape.gains(matrix), landscape.space.cost(matrix))
    front = search.oracle_front(landscape)
    assert 0.998 * best <= volume(landscape, front.gains, front.costs) <= best * (1 + 1e-12)
    assert landscape.gains(front.matrix) == pytest.approx(front.gains)


@pytest.mark.parametrize("name", search.KINDS)
@pytest.mark.parametrize("sites", [8, 16])
def test_the_truth_has_the_stated_spread(name, sites):
    landscape = search.make_landscape(name, sites, seed=2)
    drawn = search.random_placements(20_000, sites, np.random.default_rng(5))
    assert landscape.gains(drawn).std() == pytest.approx(search.SIGNAL, rel=0.03)
    assert landscape.gains(np.zeros((1, sites), int))[0] == 0


def test_interaction_has_the_stated_share_of_the_variance():
    landscape = search.make_landscape("interaction50", 16, seed=0)
    drawn = search.random_placements(20_000, 16, np.random.default_rng(5))
    main = landscape.main[np.arange(16), drawn].sum(axis=1)
    rest = landscape.gains(drawn) - main
    assert rest.std() == pytest.approx(search.SIGNAL * 0.5**0.5, rel=0.05)
    assert abs(np.corrcoef(main, rest)[0, 1]) < 0.03


def test_what_deceives_is_good_alone_and_bad_together_and_the_other_way_round():
    landscape = search.make_landscape("deceptive", 16, seed=0)
    alone = landscape.gains(2 * np.eye(16, dtype=int))
    hurting = [site for site in range(16) if landscape.pairs[site, 1, :, 1].sum() < 0]
    helping = [site for site in range(16) if landscape.pairs[site, 1, :, 1].sum() > 0]
    for sites, sign in ((hurting, 1), (helping, -1)):
        assert (sign * alone[sites] > 0).all()
        together = np.zeros((1, 16), int)
        together[0, sites] = 2
        assert sign * landscape.gains(together)[0] < 0


def test_brief_scores_are_biased_towards_blocks():
    brief = search.make_landscape("additive+brief", 8, seed=3)
    drawn = search.random_placements(2_000, 8, np.random.default_rng(5))
    bias = brief.expected(drawn, "brief") - search.PLAIN["brief"] - search.BRIEF_SCALE * brief.gains(drawn)
    blocks = (drawn > 0).sum(axis=1)
    assert np.corrcoef(bias, blocks)[0, 1] > 0.2
    assert bias.std() > search.SIGNAL / 2


@pytest.mark.parametrize("kind", search.KINDS)
def test_brief_scores_that_tell_less_have_a_larger_bias_and_the_same_truth(kind):
    long, brief, far = (search.make_landscape(kind + name, 8, seed=3) for name in ("", "+brief", "+far"))
    drawn = search.random_placements(500, 8, np.random.default_rng(5))
    assert (long.gains(drawn) == brief.gains(drawn)).all()
    assert (long.gains(drawn) == far.gains(drawn)).all()
    assert far.bias == pytest.approx(search.FAR * brief.bias)


def test_long_trials_that_begin_late_begin_with_the_references_and_are_every_third(monkeypatch):
    positions = [position for position in range(40) if search.late_number(position) is not None]
    assert positions == [32, 35, 38]
    assert [search.late_number(position) for position in positions] == [0, 1, 2]
    monkeypatch.setitem(search.STRATEGIES, "late", replace(search.STRATEGIES["additive-late"], budget=60))
    history, _ = search.evaluate(search.Job("additive+brief", 8, 1, 0, "late"))
    long = [index for index, trial in enumerate(history) if trial.fidelity == "long"]
    references = search.known("additive+brief", 8, 0)[0].space.references()
    assert long[:4] == [36, 39, 42, 45]
    assert [history[index].choices for index in long[:4]] == references


def test_hypervolume_is_the_area_between_front_and_reference_point():
    # 0.1 from 20 to 50, 0.3 from 50 to 100; one point is dominated, one is below plain
    gains, costs = np.array([0.3, 0.1, -0.5, 0.05]), np.array([50.0, 20.0, 0.0, 60.0])
    assert search.hypervolume(gains, costs, 100) == pytest.approx(0.1 * 30 + 0.3 * 50)


@pytest.mark.parametrize("name", ["additive", "deceptive+brief"])
def test_no_recommendation_beats_the_best_front(name):
    job = search.Job(name, 8, 1, 0, "random")
    history, seconds = search.evaluate(job)
    assert [trial.choices for trial in history[:4]] == search.known(name, 8, 0)[0].space.references()
    assert len(history) == len(seconds) + 4 == 300
    for recommendation in search.RECOMMENDATIONS:
        rows = [
            dict(zip(search.COLUMNS, row, strict=True)) for row in search.judge(job, history, seconds, recommendation)
        ]
        assert [row["budget"] for row in rows] == list(search.BUDGETS)
        assert all(0 <= row["hypervolume"] <= 1 and row["regret"] >= 0 for row in rows)


def test_a_budget_counts_a_long_score_four_times():
    history, _ = search.evaluate(search.Job("additive+brief", 8, 1, 0, "random-long"))
    assert {trial.fidelity for trial in history} == {"long"}
    assert len(history) == 75


def test_a_strategy_of_our_own_may_mix_fidelities(monkeypatch):
    seen = []

    def start(space, seed):
        def ask(history):
            seen.append(len(history))
            return dict.fromkeys(space.sites, "none"), "long" if len(history) % 2 else "brief"

        return ask

    monkeypatch.setitem(search.STRATEGIES, "own", search.Plan(start, "brief"))
    history, seconds = search.evaluate(search.Job("additive+brief", 8, 1, 0, "own"))
    assert seen[:3] == [4, 5, 6]
    assert [trial.fidelity for trial in history[:6]] == ["brief"] * 5 + ["long"]
    units = {"brief": 1, "long": 4}
    assert 296 < sum(units[trial.fidelity] for trial in history) <= 300
    job = search.Job("additive+brief", 8, 1, 0, "own")
    assert all(row[search.COLUMNS.index("trained")] == 1 for row in search.judge(job, history, seconds, "observed"))


def test_smoothing_finds_effects_that_single_scores_hide():
    landscape = search.make_landscape("additive", 8, seed=0)
    random = np.random.default_rng(0)
    matrix = search.random_placements(200, 8, random)
    truth = landscape.expected(matrix, "long")
    scores = truth + 2 * search.SIGNAL * random.standard_normal(200)
    trials = [
        search.Trial(landscape.space.texts(row), "long", score) for row, score in zip(matrix, scores, strict=True)
    ]
    estimates = search.smoothed(trials, landscape.space)
    assert np.corrcoef(estimates.values, truth)[0, 1] > 0.75 > 0.6 > np.corrcoef(scores, truth)[0, 1]
    assert ((estimates.low < truth) & (truth < estimates.high)).mean() > 0.8


def test_medians_are_over_what_all_ran_on_and_who_ran_on_few_is_compared_there():
    """`gp` has one landscape of four, `random` three; ours is 0.2 better than either on each."""
    rows = [
        ["additive", 8, 1, seed, strategy, recommendation, 300, 0.1 * seed + 0.2 * (strategy == "additive")]
        for strategy, seeds in {"additive": 4, "random": 3, "gp": 1}.items()
        for seed in range(seeds)
        for recommendation in search.RECOMMENDATIONS
    ]
    table = pd.DataFrame(rows, columns=search.COLUMNS[:8])
    shared, few = search._common(table)
    assert few == ["gp"]
    assert shared.groupby("strategy").seed.unique().map(list).to_dict() == {"additive": [0, 1, 2], "random": [0, 1, 2]}
    assert "1 landscapes" in (line := search._where_it_ran(table, "gp"))
    assert "`gp` 0.000 observed, 0.000 smoothed; `additive` 0.200 observed, 0.200 smoothed" in line
