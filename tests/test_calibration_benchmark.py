"""`benchmarks/calibration.py`: truths are drawn as it says, and a seeded sample of what it measures."""

import numpy as np
import pandas as pd
import pytest
from benchmarks import calibration
from benchmarks.calibration import WITHOUT
from benchmarks.search import Trial, estimated, make_space, model_of, random_placements, smoothed


def random_study(space, truth, number):
    rows = random_placements(number, len(space.sites), np.random.default_rng(3))
    chosen = [space.texts(row) for row in rows]
    return [Trial(one, "long", truth.score(one, "long", 0, index)) for index, one in enumerate(chosen)]


def test_scores_of_drawn_truths_have_about_the_stated_variance():
    space = make_space(8, brief=False)
    shares = []
    for seed in range(8):
        scores = [trial.score for trial in random_study(space, calibration.Drawn(space, seed), 200)]
        shares.append(np.var(scores) / (2 * calibration.SIGNAL) ** 2)
    assert 0.6 < np.mean(shares) < 1.3


def test_a_score_is_the_truth_with_what_its_seed_has_and_noise():
    space = make_space(8, brief=True)
    truth = calibration.Drawn(space, 0)
    truth.variances |= {"seed": 4.0, "noise": 0.0, "brief noise": 0.0}
    plain, everywhere = space.references()[:2]
    apart = truth.score(everywhere, "long", 1, 0) - truth.score(plain, "long", 1, 1)
    assert apart == pytest.approx(np.diff(truth.long([plain, everywhere]))[0])
    assert truth.score(plain, "long", 1, 0) == truth.score(plain, "long", 1, 1) != truth.score(plain, "long", 2, 0)
    assert truth.score(everywhere, "brief", 1, 0) - truth.score(plain, "brief", 1, 0) != pytest.approx(apart)


@pytest.mark.slow
def test_about_nine_of_ten_intervals_hold_what_placements_are_worth_where_the_model_holds():
    space, covered = make_space(8, brief=False), []
    for seed in range(20):
        truth = calibration.Drawn(space, seed)
        found = smoothed(random_study(space, truth, 60), space)
        true = truth.long(found.choices)
        covered.append(np.mean((found.low <= true) & (true <= found.high)))
    assert 0.84 < np.mean(covered) < 0.96


def test_a_model_that_allows_for_less_is_surer():
    space = make_space(8, brief=False)
    history = calibration.study(calibration.Landscape(8, 1, 0), space, 0, 40)
    model = model_of(history, space)
    widths = [
        np.mean(found.high - found.low)
        for found in (estimated(calibration.less(model, without), history, space) for without in WITHOUT.values())
    ]
    assert len(history) == 40
    assert widths[0] > widths[1] >= widths[2] > 0


def test_real_scores_of_one_seed_are_estimated_from_those_of_the_other():
    placements = ["none", "se-everywhere", "layer1.0.bn2=se(r=16)", "layer1.0.bn2=se(r=16) layer4.1.bn2=cbam(r=8,k=7)"]
    rows = [(p, "short", seed, 0.5 + 0.01 * n + 0.002 * seed) for n, p in enumerate(placements) for seed in (0, 1)]
    table = pd.DataFrame([*rows, ("none", "long", 0, 0.9)], columns=["placement", "protocol", "seed", "accuracy"])
    found = calibration.replay(table)
    assert list(found.protocol) == ["short", "short"]
    assert list(found.placements) == [4, 4]
    assert found["error observed"].tolist() == pytest.approx([0.2, 0.2])
    assert found["best observed"].tolist() == pytest.approx([-0.2, 0.2])
    assert (found["error estimated"] > 0).all()
    assert (found.held == 1).all()


def test_variance_between_seeds_is_found_again():
    random = np.random.default_rng(4)
    of_seed, of_network = 2 * random.standard_normal(60), random.standard_normal(60)
    rows = [
        (f"p{network}", "resnet18", seed, value + of_seed[seed] + random.standard_normal())
        for network, value in enumerate(of_network)
        for seed in range(60)
    ]
    table = pd.DataFrame(rows, columns=["placement", "backbone", "seed", "test_accuracy"])
    networks, seeds, share = calibration.between_seeds(table)
    assert (networks, seeds) == (60, 60)
    assert share == pytest.approx(of_seed.var() / (of_network.var() + 1), rel=0.05)
