import base64

import numpy as np
import pytest
from scipy import stats

from placesearch.placement import Placement
from placesearch.verdict.trainings import Training
from placesearch.verdict.verdicts import BETTER, NOT_SHOWN, WORSE, judge

NAMES = {"plain": "none", "se-everywhere": "a=se(r=16) b=se(r=16)", "cbam-everywhere": "a=cbam(r=16,k=7)"}
MEMBER = "a=se(r=4)"


def trainings(accuracies, *, name=None, text=None, backbone="resnet18", **changes):
    """One training a seed with these accuracies, of a reference by its name or of a placement."""
    values = {"backbone": backbone, "reference": name, "start": "scratch", "epochs": 3} | changes
    placement = Placement.parse(text or NAMES.get(name, "none"))
    return [
        Training(placement=placement, seed=seed, state="COMPLETE", accuracy=accuracy, **values)
        for seed, accuracy in enumerate(accuracies)
    ]


def table(confirmed):
    return {(str(one.placement), one.against, one.start): one for one in confirmed.verdicts}


PLAIN = trainings([0.80, 0.82, 0.81, 0.79, 0.80], name="plain")


def test_a_clear_difference_is_better_or_worse_and_an_unclear_one_not_shown():
    given = [0.90, 0.921, 0.909, 0.892, 0.90], [0.70, 0.722, 0.71, 0.69, 0.70], [0.85, 0.77, 0.83, 0.80, 0.79]
    placements = "a=se(r=1)", "a=se(r=2)", "a=se(r=3)"
    found = judge(
        [*PLAIN, *(one for text, of in zip(placements, given, strict=True) for one in trainings(of, text=text))]
    )
    assert [one.verdict for one in found.verdicts] == [BETTER, WORSE, NOT_SHOWN]
    for one, accuracies in zip(found.verdicts, given, strict=True):
        expected = stats.ttest_rel(accuracies, [training.accuracy for training in PLAIN])
        assert one.p_single == pytest.approx(expected.pvalue)
        assert one.difference == pytest.approx(np.mean(accuracies) - 0.804)
        assert one.p_value >= one.p_single
    assert found.comparisons == 3


def test_every_placement_is_compared_with_every_reference_and_each_pair_once():
    found = judge(
        [
            *PLAIN,
            *trainings([0.5, 0.6], name="se-everywhere"),
            *trainings([0.6, 0.5], name="cbam-everywhere"),
            *trainings([0.6, 0.4], name="bigger-plain", backbone="resnet18[3,2,2,2]", params=9),
            *trainings([0.7, 0.5], text=MEMBER),
        ]
    )
    references = ["plain", "se-everywhere", "cbam-everywhere", "bigger-plain"]
    assert [(str(one.placement), one.against) for one in found.verdicts] == [
        *((MEMBER, name) for name in references),
        *((NAMES["se-everywhere"], name) for name in ("plain", "bigger-plain")),
        *((NAMES["cbam-everywhere"], name) for name in ("plain", "se-everywhere", "bigger-plain")),
    ]
    assert {one.seeds for one in found.verdicts} == {2}
    assert found.bigger == ("resnet18[3,2,2,2]", 9)


def test_starts_are_compared_apart_and_corrected_together():
    warm = trainings([0.9, 0.8, 0.85, 0.9, 0.8], text=MEMBER, start="branch")
    found = judge(
        [*PLAIN, *trainings([0.9, 0.8, 0.8, 0.9, 0.8], text=MEMBER), *warm,
         *trainings([0.8, 0.82, 0.8, 0.79, 0.8], name="plain", start="branch")]
    )  # fmt: skip
    scratch, branch = (table(found)[MEMBER, "plain", start] for start in ("scratch", "branch"))
    assert found.comparisons == 2
    assert branch.p_single < scratch.p_single
    assert branch.p_value == pytest.approx(2 * branch.p_single)


def test_only_the_longest_trainings_and_the_largest_of_bigger_networks_count():
    found = judge(
        [
            *PLAIN,
            *trainings([0.1, 0.2], text=MEMBER),
            *trainings([0.1, 0.3], name="bigger-plain", backbone="resnet18[3,2,2,2]", params=9, epochs=4),
            *trainings([0.5, 0.6], name="bigger-plain", backbone="resnet18[4,2,2,2]", params=10, epochs=4),
            *trainings([0.7, 0.9], text=MEMBER, epochs=4),
        ]
    )
    assert (found.epochs, found.bigger) == (4, ("resnet18[4,2,2,2]", 10))
    (one,) = found.verdicts
    assert (one.against, one.seeds) == ("bigger-plain", 2)
    assert one.difference == pytest.approx(0.25)


def test_with_images_the_choice_of_images_adds_to_the_uncertainty():
    """Four seeds that agree on all images: sure by the seeds alone, but only four images tell the networks apart."""

    def packed(right):
        return base64.b64encode(np.packbits(np.array(right, np.uint8)).tobytes()).decode()

    bits = {"plain": [1] * 6 + [0] * 4, MEMBER: [1] * 9 + [0]}
    both = [
        Training(
            placement=Placement.parse("none" if name == "plain" else name), backbone="b", start="scratch", epochs=1,
            reference="plain" if name == "plain" else None, seed=seed, state="COMPLETE", accuracy=sum(right) / 10,
            images=10, correct=packed(right),
        )
        for name, right in bits.items() for seed in range(4)
    ]  # fmt: skip
    (one,) = judge(both).verdicts
    expected = stats.ttest_rel(bits[MEMBER], bits["plain"])
    assert (one.difference, one.p_value) == (pytest.approx(0.3), pytest.approx(expected.pvalue))
    assert one.verdict == NOT_SHOWN


def test_who_failed_more_often_is_not_called_better():
    good = trainings([0.90, 0.921, 0.909, 0.892, 0.90], text=MEMBER)
    failed = [Training(**{**{f: getattr(good[0], f) for f in good[0].__slots__}, "state": "FAIL", "accuracy": None})]
    (one,) = judge([*PLAIN, *failed, *good[1:]]).verdicts
    assert (one.seeds, one.failed, one.verdict) == (4, 1, NOT_SHOWN)
    assert one.p_value < 0.05
    (one,) = judge([*PLAIN, *good[:1], *good[1:]]).verdicts
    assert one.verdict == BETTER
    bad = [Training(**{**{f: getattr(PLAIN[0], f) for f in PLAIN[0].__slots__}, "state": "FAIL", "accuracy": None})]
    (one,) = judge([*bad, *PLAIN[1:], *good]).verdicts
    assert (one.failed, one.verdict) == (1, BETTER)


def test_nothing_is_claimed_from_one_seed_or_from_an_evaluation_without_chance():
    found = judge([*PLAIN[:1], *trainings([0.99], text=MEMBER)])
    assert [(one.seeds, one.p_value, one.verdict) for one in found.verdicts] == [(1, None, NOT_SHOWN)]
    found = judge([*trainings([0.5] * 5, name="plain"), *trainings([0.75] * 5, text=MEMBER)])
    assert [(one.seeds, one.p_value, one.verdict) for one in found.verdicts] == [(5, None, NOT_SHOWN)]
    assert found.comparisons == 0
    assert judge([]) is None


def test_the_same_placement_trained_twice_alike_shows_no_difference():
    again = trainings([training.accuracy for training in PLAIN], text=MEMBER)
    (one,) = judge([*PLAIN, *again]).verdicts
    assert (one.difference, one.high, one.p_value, one.verdict) == (0.0, 0.0, 1.0, NOT_SHOWN)


def test_the_order_in_which_trainings_ended_changes_nothing():
    """Not even the last digit."""
    random = np.random.default_rng(0)
    given = [*trainings(random.random(7), name="plain")]
    for text in ("a=se(r=1)", "a=se(r=2)", "a=se(r=3)"):
        given += trainings(random.random(7), text=text)
    expected = judge(given)
    for _ in range(5):
        assert judge([given[index] for index in random.permutation(len(given))]) == expected
