import pytest
import torch

from placesearch.errors import InputError
from placesearch.models.backbones import load_backbone
from placesearch.models.code import names_code


def test_the_small_stem_keeps_the_resolution_of_small_images():
    model = load_backbone("resnet18", 10, "small").eval()
    seen = []
    model.layer1.register_forward_hook(lambda _m, _i, output: seen.append(tuple(output.shape[2:])))
    model(torch.zeros(1, 3, 32, 32))
    assert seen == [(32, 32)]


def test_the_original_stem_is_left_as_it_is():
    model = load_backbone("resnet18", 10)
    assert model.conv1.stride == (2, 2)
    assert isinstance(model.maxpool, torch.nn.MaxPool2d)


def test_the_users_own_function_is_a_backbone(workplace):
    assert load_backbone("mine:tiny", 7)(torch.zeros(2, 3, 32, 32)).shape == (2, 7)
    assert names_code("mine:tiny")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("resnet19", "did you mean 'resnet18'"),
        ("nowhere:tiny", "cannot import 'nowhere'"),
        ("mine:nothing", "no function 'nothing'"),
        ("mine:Unit", "num_classes"),
        ("mine:no_network", "returned str"),
    ],
)
def test_an_unusable_backbone_gets_one_line(workplace, name, says):
    with pytest.raises(InputError) as caught:
        load_backbone(name, 10)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
