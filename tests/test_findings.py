import numpy as np
import pytest

from placesearch.placement import BlockSetting, Placement
from placesearch.records import TrialRecord
from placesearch.search.findings import find, scores_of

SE, CBAM = BlockSetting("se", 4), BlockSetting("cbam", 4, 3)


def record(trial, text, accuracy, **changes):
    fields = {"state": "COMPLETE", "val_accuracy": accuracy, "epochs": 1, "seed": 0, **changes}
    return TrialRecord(trial=trial, placement=Placement.parse(text), **fields)


def study(count=60, noise=0.01):
    """SE at a adds 0.05, CBAM at b takes 0.05 away, and SE at a with SE at b adds 0.05 more."""
    random, records = np.random.default_rng(0), []
    for trial in range(count):
        chosen = {s: random.choice(["se(r=4)", "cbam(r=4,k=3)", ""]) for s in "ab"}
        text = " ".join(f"{site}={setting}" for site, setting in chosen.items() if setting) or "none"
        value = 0.8 + 0.05 * (chosen["a"] == "se(r=4)") - 0.05 * (chosen["b"] == "cbam(r=4,k=3)")
        value += 0.05 * (chosen["a"] == chosen["b"] == "se(r=4)")
        records.append(record(trial, text, value + random.normal(0, noise)))
    return records


def test_effects_and_pairs_are_told_with_intervals():
    found = find(study(), {"a": [SE, CBAM], "b": [SE, CBAM], "c": [SE]})
    effects = {(e.site, str(e.setting)): e for e in found.effects if e.with_site is None}
    assert effects["a", "se(r=4)"].added.low > 0
    assert effects["b", "cbam(r=4,k=3)"].added.high < 0
    untried = effects["c", "se(r=4)"]
    assert untried.tried == 0
    assert untried.added.low < 0 < untried.added.high
    assert effects["a", "se(r=4)"].tried == sum(r.placement.get("a") == SE for r in study())
    pair = next(e for e in found.effects if e.with_site)
    assert (pair.site, str(pair.setting), pair.with_site, pair.with_block) == ("a", "se", "b", "se")
    assert pair.added.estimate > 0
    assert set(found.accuracy) == {r.placement for r in study()}
    best = found.accuracy[Placement.parse("a=se(r=4) b=se(r=4)")]
    assert best.estimate == pytest.approx(0.9, abs=0.015)
    assert best.low < best.estimate < best.high


def test_averages_of_choices_are_the_means_of_what_each_setting_adds():
    settings = [BlockSetting("cbam", r, k) for r in (4, 8) for k in (3, 7)] + [SE, BlockSetting("se", 8)]
    found = find(study(), {"a": settings, "b": settings})
    effects = {(e.site, e.setting): e.added.estimate for e in found.effects if e.with_site is None}
    averages = {(average.of, average.value, average.block): average.added for average in found.averages}
    for site in "ab":  # first over the settings of each block, then over blocks
        of_blocks = [np.mean([effects[site, s] for s in settings if s.block == block]) for block in ("se", "cbam")]
        assert averages["site", site, ""].estimate == pytest.approx(np.mean(of_blocks))
    of_se = [effects[site, s] for site in "ab" for s in settings if s.block == "se"]
    assert averages["block", "", "se"].estimate == pytest.approx(np.mean(of_se))
    four, eight = (averages["reduction", value, "cbam"] for value in ("4", "8"))
    assert four.estimate == pytest.approx(-eight.estimate)
    assert four.high - four.low == pytest.approx(eight.high - eight.low)
    means = [np.mean([effects[site, s] for site in "ab" for s in settings if s.kernel_size == k]) for k in (3, 7)]
    assert averages["kernel_size", "7", "cbam"].estimate == pytest.approx((means[1] - means[0]) / 2)
    assert averages["site", "a", ""].low > 0 > averages["site", "b", ""].estimate
    assert ("kernel_size", "3", "se") not in averages


def test_too_few_scores_or_equal_ones_say_nothing():
    assert find(study(3), {}) is None
    assert find([record(trial, "none", 0.5) for trial in range(9)], {}) is None
    assert find([record(trial, "none", 0.1 * trial, state="FAIL") for trial in range(9)], {}) is None


def test_the_longest_trainings_are_what_estimates_speak_of():
    brief = [record(trial, "none", 0.5, epochs=1) for trial in range(3)]
    scores, epochs = scores_of([*brief, record(3, "none", 0.8, epochs=4)])
    assert epochs == 4
    assert [score.brief for score in scores] == [True, True, True, False]
    records = [record(i, t, 0.5 + 0.01 * i, epochs=1) for i, t in enumerate(["none", "a=se(r=4)", "b=se(r=4)"] * 3)]
    records += [record(9 + i, t, 0.8 + 0.001 * i, epochs=4) for i, t in enumerate(["none", "a=se(r=4)", "b=se(r=4)"])]
    found = find(records, {"a": [SE], "b": [SE]})
    assert found.epochs == 4
    assert found.accuracy[Placement()].estimate == pytest.approx(0.8, abs=0.01)


def test_a_training_that_went_wrong_does_not_drown_the_others():
    """One placement scores 0.1, the others as before: it keeps its score, they keep their intervals."""
    settings = {"a": [SE, CBAM], "b": [SE, CBAM], "c": [SE]}
    before = find(study(), settings)
    after = find([*study(), record(60, "c=se(r=4)", 0.1)], settings)
    assert after.accuracy[Placement.parse("c=se(r=4)")].estimate == pytest.approx(0.1)
    assert after.noise < 1.5 * before.noise
    for placement, found in before.accuracy.items():
        assert after.accuracy[placement].estimate == pytest.approx(found.estimate, abs=0.01)
    assert all(0 <= found.low <= found.high <= 1 for found in after.accuracy.values())
    alone = {(e.site, str(e.setting)): e.added for e in after.effects if e.with_site is None}
    assert alone["c", "se(r=4)"].estimate < 0


def test_a_trial_that_was_stopped_counts_with_its_forecast():
    stopped = record(4, "a=se(r=4)", None, state="PRUNED", forecast=0.3, curve=(0.1,), epochs=9)
    failed = record(5, "b=se(r=4)", None, state="FAIL")
    scores, longest = scores_of([*(record(trial, "none", 0.5) for trial in range(4)), stopped, failed])
    assert [score.accuracy for score in scores] == [0.5] * 4 + [0.3]
    assert longest == 1
