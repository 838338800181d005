from pathlib import Path

import pytest
import safetensors.torch
import torch

from placesearch.errors import InputError
from placesearch.exporting.building import backbone_without_memory, build_for_export, look_at
from placesearch.models.architecture import Architecture
from placesearch.placement import Placement

PLACEMENT = Placement.parse("unit1.bn2=se(r=4)")


def tiny(**others):
    given = {"num_classes": 10, "input_size": (3, 32, 32), "placement": PLACEMENT, **others}
    return Architecture(backbone="mine:tiny", **given)


def saved(tensors, path="weights.safetensors"):
    safetensors.torch.save_file(tensors, path)
    return path


def test_a_network_is_looked_at_without_memory_where_that_can_be():
    plain, sites = look_at(
        Architecture(
            backbone="resnet18",
            num_classes=10,
            input_size=(3, 64, 64),
            placement=Placement.parse("layer1.0.bn2=se(r=4)"),
        )
    )
    assert {parameter.device.type for parameter in plain.parameters()} == {"meta"}
    assert "layer1.0.bn2" in {site.name for site in sites}
    looks_at_numbers = Architecture(backbone="regnet_y_400mf", num_classes=10, input_size=(3, 64, 64))
    assert {parameter.device.type for parameter in backbone_without_memory(looks_at_numbers).parameters()} == {"cpu"}


def test_looking_leaves_the_global_random_numbers_alone(workplace):
    before = torch.get_rng_state()
    look_at(tiny())
    assert torch.equal(torch.get_rng_state(), before)


def test_fresh_weights_are_always_the_same_and_given_ones_are_all_loaded(workplace):
    fresh = build_for_export(tiny(), None)
    assert not fresh.training
    again = build_for_export(tiny(), None).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in fresh.state_dict().items())
    given = tiny().build(seed=7).state_dict()
    loaded = build_for_export(tiny(), saved(given)).state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in given.items())
    torch.save(given, "weights.pt")
    loaded = build_for_export(tiny(), "weights.pt").state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in given.items())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda tensors: tensors.pop("unit1.bn2.attention.reduce.bias"), "lacks 'unit1.bn2.attention.reduce.bias'"),
        (lambda tensors: tensors.update(other=torch.zeros(1)), "has the unknown 'other'"),
        (
            lambda tensors: tensors.update({"head.bias": torch.zeros(7)}),
            "has 'head.bias' of shape (7,) in place of (10,)",
        ),
        (lambda tensors: [tensors.pop("head.bias"), tensors.pop("head.weight")], "lacks 'head.weight' and 1 more"),
    ],
)
def test_weights_of_another_network_are_refused_in_one_line(workplace, change, says):
    tensors = tiny().build().state_dict()
    change(tensors)
    with pytest.raises(InputError, match="weights.safetensors .*are not those of this architecture") as caught:
        build_for_export(tiny(), saved(tensors))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("weights", "says"), [("DEFAULT", "know no blocks"), ("nothing.pt", "cannot read"), ("mine.py", "is damaged")]
)
def test_what_holds_no_weights_of_it_is_refused(workplace, weights, says):
    with pytest.raises(InputError, match=says):
        build_for_export(tiny(), Path(weights))


def test_enormous_numbers_are_refused_before_memory_is_asked_for(workplace):
    huge = tiny(placement=Placement.parse("unit1.bn2=spatial(k=100001)"))
    with pytest.raises(InputError, match=r"20,000,402,685 parameters; at most 1,000,000,000"):
        build_for_export(huge, None)
