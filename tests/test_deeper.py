from itertools import product

import pytest
import torch
import torchvision

from placesearch.errors import BackboneError
from placesearch.models.architecture import Architecture
from placesearch.models.backbones import load_backbone
from placesearch.models.deeper import _fewest, deeper


def params(model):
    return sum(weight.numel() for weight in model.parameters())


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2"])
def test_a_resnet_with_its_own_numbers_of_units_is_itself(name):
    with torch.device("meta"):  # shapes alone
        known = torchvision.models.get_model(name, weights=None, num_classes=10)
        units = [len(stage) for stage in (known.layer1, known.layer2, known.layer3, known.layer4)]
        given = load_backbone(f"{name}[{','.join(map(str, units))}]", 10)
    assert {key: value.shape for key, value in given.state_dict().items()} == {
        key: value.shape for key, value in known.state_dict().items()
    }


def test_resnet18_with_the_units_of_resnet34_is_resnet34():
    with torch.device("meta"):
        assert params(load_backbone("resnet18[3,4,6,3]", 1000)) == 21_797_672


@pytest.mark.parametrize("name", ["vgg11[1,1,1,1]", "resnet18[2,2,2]", "resnet18[2,0,2,2]", "resnet19[2,2,2,2]"])
def test_units_that_a_network_cannot_have_are_refused(name):
    with pytest.raises(BackboneError):
        load_backbone(name, 10)


def test_the_bigger_network_has_at_least_the_parameters_and_hardly_more():
    plain = Architecture(backbone="resnet18", num_classes=10, input_size=(3, 32, 32), stem="small")
    a_unit = 2 * 9 * 64 * 64 + 4 * 64  # two convolutions of the first stage and their norms
    least = params(plain.build()) + 89_080  # what SE everywhere adds with r=16
    bigger = deeper(plain, least)
    assert (bigger.backbone, bigger.stem) == ("resnet18[4,2,2,2]", "small")
    model = bigger.build(seed=0)
    assert least <= params(model) == params(plain.build()) + 2 * a_unit
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert Architecture(**bigger.model_dump()).build(seed=0).layer1[3].conv1.weight.equal(model.layer1[3].conv1.weight)
    assert deeper(plain, params(plain.build())) is None
    other = Architecture(backbone="mobilenet_v2", num_classes=10, input_size=(3, 32, 32))
    assert deeper(other, 10**7) is None


@pytest.mark.parametrize("least", [1, 73, 74, 75, 300, 1234])
def test_the_smallest_sum_is_the_one_that_brute_force_finds(least):
    sizes = [7, 30, 118, 470]
    sums = (
        sum(number * size for number, size in zip(numbers, sizes, strict=True))
        for numbers in product(range(least // 7 + 2), range(least // 30 + 2), range(12), range(4))
    )
    found = _fewest(sizes, least)
    assert sum(number * size for number, size in zip(found, sizes, strict=True)) == min(s for s in sums if s >= least)
