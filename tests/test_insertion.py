import copy
import pickle

import pytest
import torch
from networks import Tiny

from placesearch.errors import PlacementError
from placesearch.models.backbones import load_backbone
from placesearch.models.insertion import insert
from placesearch.models.sites import find_sites
from placesearch.placement import BlockSetting, Placement

SIZE = (3, 32, 32)
BOTH = Placement.parse("unit1.bn2=se(r=4) unit2.bn2=cbam(r=2,k=3)")

# Hu et al. 2018 and Woo et al. 2018, tables of ImageNet results, 1000 classes: exact, or millions as printed
PUBLISHED = {
    "resnet18": (11_778_592, "11.78"),
    "resnet34": ("21.96", "21.96"),
    "resnet50": (28_088_024, "28.09"),
    "resnet101": (49_326_872, "49.33"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_the_published_ones(name):
    with torch.device("meta"):
        plain = load_backbone(name, 1000)
    sites = [site for site in find_sites(plain, (3, 64, 64)) if "residual" in site.kinds]
    for setting, published in zip((BlockSetting("se", 16), BlockSetting("cbam", 16, 7)), PUBLISHED[name], strict=True):
        model = insert(plain, Placement({site.name: setting for site in sites}), sites=sites)
        count = sum(weight.numel() for weight in model.parameters())
        assert published in (count, f"{count / 1e6:.2f}")


def test_insert_leaves_the_given_model_unchanged():
    plain = Tiny(10).eval()
    x = torch.randn(2, *SIZE)
    before, names = plain(x), list(plain.state_dict())
    changed = insert(plain, BOTH, input_size=SIZE)(x)
    assert torch.equal(plain(x), before)
    assert list(plain.state_dict()) == names
    assert not torch.allclose(changed, before)


def test_the_block_works_on_the_residual_right_before_the_addition():
    plain = Tiny(10).eval()
    model = insert(plain, Placement.parse("unit1.bn2=se(r=4)"), input_size=SIZE).eval()
    x = torch.randn(2, 8, 4, 4)
    unit = plain.unit1
    residual = unit.bn2(unit.conv2(torch.relu(unit.bn1(unit.conv1(x)))))
    gated = model.unit1.bn2.attention(residual)
    torch.testing.assert_close(model.unit1(x), torch.relu(x + gated))


def test_a_plain_checkpoint_loads_into_the_inserted_model():
    plain = Tiny(10)
    model = insert(Tiny(10), BOTH, input_size=SIZE)
    report = model.load_state_dict(plain.state_dict(), strict=False)
    assert report.unexpected_keys == []
    assert all(".attention." in key for key in report.missing_keys)
    assert torch.equal(model.unit2.conv1.weight, plain.unit2.conv1.weight)


def test_the_model_survives_deepcopy_pickle_and_a_state_dict_round_trip():
    model = insert(Tiny(10), BOTH, input_size=SIZE).eval()
    x = torch.randn(2, *SIZE)
    other = insert(Tiny(10), BOTH, input_size=SIZE).eval()
    other.load_state_dict(model.state_dict())
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), other):  # noqa: S301 - made right here
        assert torch.equal(copied(x), model(x))


def test_a_seed_makes_the_same_block_start_the_same_in_every_placement():
    alone = Placement.parse("unit2.bn2=cbam(r=2,k=3)")
    one = insert(Tiny(10), BOTH, input_size=SIZE, seed=3)
    two = insert(Tiny(10), alone, input_size=SIZE, seed=3)
    three = insert(Tiny(10), alone, input_size=SIZE, seed=4)
    weights = [model.unit2.bn2.attention.channel.reduce.weight for model in (one, two, three)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("unit1.bn3=se(r=4)", "did you mean 'unit1.bn2'"),
        ("unit1.bn2=se(r=9)", "site 'unit1.bn2' with 8 channels: reduction 9"),
        ("unit1.bn2=cbma(r=4,k=3)", "did you mean 'cbam'"),
    ],
)
def test_what_a_network_cannot_take_is_refused(text, says):
    with pytest.raises(PlacementError) as caught:
        insert(Tiny(10), Placement.parse(text), input_size=SIZE)
    assert says in str(caught.value)


def test_a_site_takes_one_block():
    once = insert(Tiny(10), BOTH, input_size=SIZE)
    with pytest.raises(PlacementError, match="already has a block"):
        insert(once, BOTH, input_size=SIZE)
