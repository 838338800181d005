import pytest
from hypothesis import given
from hypothesis import strategies as st

from placesearch.errors import PlacementError
from placesearch.placement import BlockSetting, Placement, natural_key

settings = st.builds(
    BlockSetting,
    block=st.sampled_from(["se", "cbam", "own_block"]),
    reduction=st.none() | st.integers(1, 512),
    kernel_size=st.none() | st.integers(0, 20).map(lambda n: 2 * n + 1),
)
names = st.from_regex(r"[a-z_-]{1,6}[0-9]{0,3}(\.[a-z0-9_-]{1,6}){0,3}", fullmatch=True)
placements = st.dictionaries(names, settings, max_size=6).map(Placement)


@given(placements)
def test_a_text_parses_back_to_the_same_placement(placement):
    again = Placement.parse(str(placement))
    assert again == placement
    assert hash(again) == hash(placement)
    assert str(again) == str(placement)


@given(st.dictionaries(names, settings, min_size=2, max_size=6), st.randoms())
def test_the_text_does_not_depend_on_the_order_in_which_sites_are_given(blocks, random):
    pairs = list(blocks.items())
    random.shuffle(pairs)
    assert str(Placement(pairs)) == str(Placement(blocks))


def test_sites_are_in_natural_order():
    placement = Placement.parse("layer2.10.bn2=se(r=4) layer2.9.bn2=se(r=4) layer10.0=se(r=4) layer2=se(r=4)")
    assert list(placement) == ["layer2", "layer2.9.bn2", "layer2.10.bn2", "layer10.0"]
    assert natural_key("a2") < natural_key("a10") < natural_key("b1")


def test_the_empty_placement_is_none():
    assert str(Placement()) == "none"
    assert Placement.parse("none") == Placement()


@pytest.mark.parametrize(
    ("bad", "good"),
    [
        ("layer1.0.bn2", "layer1.0.bn2=se(r=16)"),
        ("a=se(r=0)", "a=se(r=1)"),
        ("a=se(r=-1)", "a=se(r=1)"),
        ("a=cbam(r=4,k=6)", "a=cbam(r=4,k=7)"),
        ("a=cbam(r=4,k=-1)", "a=cbam(r=4,k=1)"),
        ("a=se(q=4)", "a=se(r=4)"),
        ("a=se(r=4,r=8)", "a=se(r=4,k=3)"),
        ("a=se(r=4.5)", "a=se(r=4)"),
        ("a=se(r=)", "a=se"),
        ("a=se()", "a=se"),
        ("a=SE(r=4)", "a=se(r=4)"),
        ("=se(r=4)", "a=se(r=4)"),
        ("a=se(r=4) a=se(r=8)", "a=se(r=4) b=se(r=8)"),
        ("", "none"),
    ],
)
def test_a_text_that_is_slightly_wrong_is_refused(bad, good):
    Placement.parse(good)
    with pytest.raises(PlacementError) as caught:
        Placement.parse(bad)
    assert "\n" not in str(caught.value)
