import pytest
import torch
from networks import Tiny, Unit
from torch import nn

from placesearch.errors import BackboneError
from placesearch.models.backbones import load_backbone
from placesearch.models.sites import find_sites, last_map


@pytest.mark.parametrize(
    ("name", "last_norm", "units"),
    [("resnet18", "bn2", [2, 2, 2, 2]), ("resnet50", "bn3", [3, 4, 6, 3]), ("resnext50_32x4d", "bn3", [3, 4, 6, 3])],
)
def test_residual_sites_of_resnets_are_the_last_norms_of_their_units(name, last_norm, units):
    expected = [f"layer{i + 1}.{j}.{last_norm}" for i, count in enumerate(units) for j in range(count)]
    assert [site.name for site in find_sites(name)] == expected


def test_a_site_knows_its_shape():
    sites = find_sites("resnet18", (3, 97, 97))
    assert [(site.channels, site.height, site.width) for site in sites] == [
        (64, 25, 25), (64, 25, 25), (128, 13, 13), (128, 13, 13), (256, 7, 7), (256, 7, 7), (512, 4, 4), (512, 4, 4)
    ]  # fmt: skip


def test_shapes_are_those_that_a_running_network_shows():
    model = load_backbone("mobilenet_v2", 10).eval()
    seen = {}

    def note(module, _inputs, output):
        seen[names[module]] = tuple(output.shape[1:])

    names = {module: name for name, module in model.named_modules()}
    for module in names:
        module.register_forward_hook(note)
    model(torch.zeros(1, 3, 64, 64))
    sites = find_sites("mobilenet_v2", (3, 64, 64))
    assert len(sites) == 10  # Sandler et al. 2018, table 2: 10 units with stride 1 and equal width
    assert all((site.channels, site.height, site.width) == seen[site.name] for site in sites)


def test_looking_leaves_the_network_as_it_was():
    model = Tiny(10)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    find_sites(model, (3, 32, 32))
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_the_order_of_the_operands_does_not_matter():
    class Swapped(Unit):
        def forward(self, x):
            return torch.add(self.bn2(self.conv2(self.bn1(self.conv1(x)))), x)

    for unit in (Unit(8), Swapped(8)):
        assert [site.name for site in find_sites(nn.Sequential(unit), (8, 8, 8))] == ["0.bn2"]


def test_a_residual_is_found_before_a_scale_or_a_dropout():
    class Scaled(Unit):
        def __init__(self, channels):
            super().__init__(channels)
            self.scale = nn.Parameter(torch.ones(channels, 1, 1))
            self.drop = nn.Dropout(0.1)

        def forward(self, x):
            x = x + self.drop(self.scale * self.bn2(self.conv2(x)))
            return x + 0.5

    assert [site.name for site in find_sites(nn.Sequential(Scaled(8)), (8, 8, 8))] == ["0.bn2"]


def test_networks_that_cannot_be_looked_at_get_one_line():
    class Fickle(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(BackboneError, match="cannot trace Fickle"):
        find_sites(Fickle())
    with pytest.raises(BackboneError, match="does not take an input of 3x2x2"):
        find_sites("alexnet", (3, 2, 2))


def test_the_last_map_of_a_resnet_is_a_32nd_of_the_input_rounded_up():
    for side in (32, 64, 96, 97, 224):
        assert last_map("resnet18", (3, side, side)) == (-(-side // 32),) * 2
    assert last_map("efficientnet_b0", (3, 224, 224)) == (7, 7)
    assert last_map("mobilenet_v3_small", (3, 224, 224)) == (7, 7)
    assert last_map(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), (3, 2, 2)) is None
