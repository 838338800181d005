import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from placesearch.errors import InputError
from placesearch.models.sites import Site, find_sites
from placesearch.placement import Placement
from placesearch.search.space import make_space, reference_placements, spread, with_budget

SMALL = Site("a", frozenset({"residual", "block"}), 8, 1, 1)
LARGE = Site("b", frozenset({"residual"}), 64, 8, 8)


PRICES = {"a": {"se(r=2)": (3, 1), "se(r=4)": (2, 5)}, "b": {"se(r=2)": (4, 1), "se(r=4)": (1, 1)}}


def budgeted(*room):
    space = make_space([SMALL, LARGE], ["se"], [2, 4], [3])
    return with_budget(space, room, lambda site, setting: PRICES[site][str(setting)])


def spent(chosen):
    costs = [PRICES[site][text] for site, text in chosen.items() if text != "none"]
    return [sum(cost) for cost in zip((0, 0), *costs, strict=True)]


@given(st.integers(1, 8), st.integers(1, 7), st.randoms(use_true_random=False))
def test_what_fits_a_budget_equals_brute_force(first, second, random):
    try:
        space = budgeted(first, second)
    except InputError:
        assert first == 0 or second == 0
        return
    names = ("a", "b")
    every = itertools.product(*(("none", *PRICES[name]) for name in names))
    fitting = [dict(zip(names, texts, strict=True)) for texts in every]
    fitting = [c for c in fitting if spent(c)[0] <= first and spent(c)[1] <= second]
    found = [{name: chosen.get(name, "none") for name in names} for chosen in space.within_budget()]
    assert sorted(map(str, found)) == sorted(map(str, fitting))
    chosen = {site: random.choice(texts) for site, texts in space.choices.items()}
    trimmed = space.trimmed(chosen, np.random.default_rng(0))
    assert trimmed in list(space.within_budget())
    if chosen in list(space.within_budget()):
        assert trimmed == chosen


def test_a_budget_that_no_block_fits_is_refused():
    budgeted(1, 1)
    with pytest.raises(InputError, match="no block fits"):
        budgeted(0, 1)


def test_the_spread_of_a_cost_is_the_dearest_choice_everywhere():
    space = make_space([SMALL, LARGE], ["se"], [2, 4], [3])
    assert spread(space, lambda site, setting: PRICES[site][str(setting)][0]) == 3 + 4


def test_each_site_has_one_flat_choice():
    space = make_space([LARGE], ["se", "cbam"], [4, 16], [3, 7])
    assert space.choices["b"] == (
        "none", "se(r=4)", "se(r=16)", "cbam(r=4,k=3)", "cbam(r=4,k=7)", "cbam(r=16,k=3)", "cbam(r=16,k=7)"
    )  # fmt: skip
    assert space.size == 7


def test_a_site_that_can_take_nothing_is_left_out():
    assert set(make_space([SMALL, LARGE], ["cbam"], [4], [3]).choices) == {"b"}


@given(st.data())
def test_choices_and_placements_stand_for_each_other(data):
    space = make_space([SMALL, LARGE], ["se", "cbam"], [2, 4], [3])
    chosen = {site: data.draw(st.sampled_from(texts)) for site, texts in space.choices.items()}
    assert space.chosen(space.placement(chosen)) == chosen


def test_a_placement_outside_of_the_space_has_no_choices():
    space = make_space([LARGE], ["se"], [4], [3])
    assert space.chosen(Placement.parse("b=se(r=8)")) is None
    assert space.chosen(Placement.parse("c=se(r=4)")) is None


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((["se"], [65], [3]), "no site can take reduction 65; the sites have up to 64 channels"),
        ((["se", "sbam"], [4], [3]), "did you mean 'cbam'"),
        ((["se", "cbam"], [4], [17]), "no site can take block 'cbam' with kernel sizes 17"),
    ],
)
def test_a_space_that_makes_no_sense_is_refused(arguments, says):
    make_space([LARGE], ["se", "cbam"], [64], [15])
    with pytest.raises(InputError) as caught:
        make_space([LARGE], *arguments)
    assert says in str(caught.value)


def test_the_references_of_resnet18_are_those_of_the_papers_and_the_rules_of_thumb():
    references = reference_placements(find_sites("resnet18", (3, 97, 97)))
    units = [f"layer{i}.{j}" for i in range(1, 5) for j in range(2)]

    def everywhere(sites, setting):
        return " ".join(f"{site}={setting}" for site in sites)

    assert {name: str(placement) for name, placement in references.items()} == {
        "plain": "none",
        "se-everywhere": everywhere([f"{unit}.bn2" for unit in units], "se(r=16)"),
        "cbam-everywhere": everywhere([f"{unit}.bn2" for unit in units], "cbam(r=16,k=7)"),
        "cbam-last-stage": everywhere([f"{unit}.bn2" for unit in units[-2:]], "cbam(r=16,k=7)"),
        "cbam-after-last-convolution cbam-before-head": "layer4.1=cbam(r=16,k=7)",
        "cbam-after-every-block": everywhere(units, "cbam(r=16,k=7)"),
    }


def test_without_residual_sites_the_blocks_take_their_place():
    references = reference_placements(find_sites("vgg11", (3, 64, 64)))
    assert len(references["se-everywhere"]) == 8
    assert str(references["cbam-before-head"]) == "avgpool=cbam(r=16,k=7)"


def test_a_reference_takes_the_nearest_legal_setting():
    assert str(reference_placements([SMALL])["se-everywhere"]) == "a=se(r=8)"


def test_equal_references_appear_once_under_both_names():
    names = list(reference_placements([SMALL]))
    assert names[2:] == ["cbam-everywhere cbam-last-stage cbam-after-every-block"]
    assert names[:2] == ["plain", "se-everywhere"]
    assert len(names) == 3
