import pytest
from benchmarks.costs import BACKBONES, check
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import Tiny

from placesearch.costs import CostTable, profile
from placesearch.costs import additive as module
from placesearch.errors import PlacementError
from placesearch.models.blocks import BLOCKS, sensible_settings
from placesearch.models.insertion import insert
from placesearch.models.sites import every_site
from placesearch.placement import BlockSetting, Placement
from placesearch.search.space import make_space, spread

SIZE = (3, 32, 32)
PLAIN = Tiny(10)
SITES = every_site(PLAIN, SIZE)
TABLE = CostTable(PLAIN, SIZE)


def choices(site):
    side = max(site.height, site.width)
    return st.sampled_from([s for name in BLOCKS for s in sensible_settings(name, site.channels, side, [1, 4], [1, 3])])


placements = st.fixed_dictionaries({}, optional={site.name: choices(site) for site in SITES}).map(Placement)


@settings(max_examples=30, deadline=None)
@given(placements)
def test_the_sum_of_inserts_is_what_fvcore_counts(placement):
    assert TABLE.cost(placement) == profile(insert(PLAIN, placement, sites=SITES), SIZE)


@settings(max_examples=20, deadline=None)
@given(placements)
def test_a_block_that_starts_as_the_identity_counts_what_its_folded_form_counts(placement):
    assert TABLE.cost(placement) == profile(insert(PLAIN, placement, sites=SITES, initial="identity"), SIZE)


def test_each_pair_of_setting_and_shape_is_counted_once_and_never_again_with_the_content_kept(monkeypatch):
    passes = []
    monkeypatch.setattr(module, "profile", lambda *arguments: passes.append(arguments) or profile(*arguments))
    texts = ["unit1.bn2=se(r=4) unit2.bn2=se(r=4)", "unit1.bn2=se(r=4) unit2=cbam(r=4,k=3)", "none"]
    table = CostTable(PLAIN, SIZE)
    costs = [table.cost(Placement.parse(text)) for text in texts * 2]
    assert len(passes) == 1 + 2  # the plain network, and two settings at maps of one shape
    again = CostTable(PLAIN, SIZE, counted=table.content())
    assert [again.cost(Placement.parse(text)) for text in texts * 2] == costs
    assert len(passes) == 3


def test_a_name_gives_the_table_of_a_fresh_backbone():
    assert CostTable("resnet18", (3, 64, 64)).plain.params == 11_689_512


def test_a_site_may_be_named_by_an_alias():
    table = CostTable("resnet18", (3, 64, 64))
    assert table.added("layer4", BlockSetting("se", 16)) == table.added("layer4.1", BlockSetting("se", 16))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("unit1.bn3=se(r=4)", "no site 'unit1.bn3'; did you mean 'unit1.bn2'"),
        ("unit1.bn2=se(r=9)", "site 'unit1.bn2' with 8 channels: reduction 9 is not allowed; allowed are 1..8"),
    ],
)
def test_what_the_network_cannot_take_has_no_cost(text, says):
    with pytest.raises(PlacementError) as caught:
        TABLE.cost(Placement.parse(text))
    assert says in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("name", BACKBONES)
def test_the_table_is_exact_for_a_sample_of_placements_in_real_networks(name):
    seen = check(name, count=4, seed=1)
    assert seen.equal == seen.placements == 4


@pytest.mark.parametrize(
    ("name", "printed"), [("resnet18", ["0.08", "0.33", "3.0"]), ("resnet50", ["0.5", "1.3", "39"])]
)
def test_costs_vary_over_the_usual_space_as_the_readme_says(name, printed):
    sites = [site for site in every_site(name) if "residual" in site.kinds]
    space = make_space(sites, ["se", "cbam"], [4, 8, 16], [3, 7])
    table = CostTable(name)
    for cost, percent in zip(("macs", "macs_full", "params"), printed, strict=True):
        grown = spread(space, lambda site, setting, cost=cost: getattr(table.added(site, setting), cost))
        digits = len(percent.partition(".")[2])
        assert f"{100 * grown / getattr(table.plain, cost):.{digits}f}" == percent
