import pytest
import torch
import torch.nn.functional as F
from networks import Tiny, Unit
from torch import nn
from torchvision.ops import SqueezeExcitation

from placesearch.errors import BackboneError
from placesearch.models.backbones import load_backbone
from placesearch.models.insertion import insert
from placesearch.models.sites import find_sites, last_map, unplaced_additions
from placesearch.placement import Placement


def of_kind(sites, kind):
    return [site.name for site in sites if kind in site.kinds]


@pytest.mark.parametrize(
    ("name", "last_norm", "units"),
    [("resnet18", "bn2", [2, 2, 2, 2]), ("resnet50", "bn3", [3, 4, 6, 3]), ("resnext50_32x4d", "bn3", [3, 4, 6, 3])],
)
def test_kinds_of_sites_of_resnets_are_those_of_the_papers(name, last_norm, units):
    every = [f"layer{i + 1}.{j}" for i, count in enumerate(units) for j in range(count)]
    sites = find_sites(name)
    assert of_kind(sites, "residual") == [f"{unit}.{last_norm}" for unit in every]
    assert of_kind(sites, "block") == every
    assert of_kind(sites, "stage") == [f"layer{i + 1}.{count - 1}" for i, count in enumerate(units)]
    assert of_kind(sites, "last") == of_kind(sites, "head") == every[-1:]
    assert sites[-1].aliases == ("layer4",)


def test_a_site_knows_its_shape():
    sites = [site for site in find_sites("resnet18", (3, 97, 97)) if "residual" in site.kinds]
    assert [(site.channels, site.height, site.width) for site in sites] == [
        (64, 25, 25), (64, 25, 25), (128, 13, 13), (128, 13, 13), (256, 7, 7), (256, 7, 7), (512, 4, 4), (512, 4, 4)
    ]  # fmt: skip


# Residual units from the papers' tables (units with stride 1 and equal width where the skip needs that), or, where
# nothing is added, convolutions of the trunk.
COUNTS = {
    "alexnet": ("block", 5),  # Krizhevsky 2014
    "vgg11": ("block", 8),  # Simonyan and Zisserman 2015, table 1
    "vgg16_bn": ("block", 13),
    "densenet121": ("block", 1 + 2 * (6 + 12 + 24 + 16) + 3),  # Huang et al. 2017, table 1
    "squeezenet1_0": ("block", 1 + 8 * 3 + 1),  # Iandola et al. 2016, table 1
    "googlenet": ("block", 3 + 9 * 6),  # Szegedy et al. 2015, table 1; torchvision has 3x3 for 5x5
    "inception_v3": ("block", 94),  # as many convolutions as its reference implementation
    "shufflenet_v2_x1_0": ("block", 1 + 3 * 5 + (3 + 7 + 3) * 3 + 1),  # Ma et al. 2018, table 5
    "mobilenet_v2": ("residual", 10),  # Sandler et al. 2018, table 2
    "mobilenet_v3_small": ("residual", 6),  # Howard et al. 2019, table 2
    "mobilenet_v3_large": ("residual", 10),  # the same, table 1
    "mnasnet1_0": ("residual", 10),  # Tan et al. 2019, figure 7
    "efficientnet_b0": ("residual", 9),  # Tan and Le 2019, table 1
    "regnet_y_400mf": ("residual", 1 + 3 + 6 + 6),  # Radosavovic et al. 2020, figure 17
    "convnext_tiny": ("residual", 3 + 3 + 9 + 3),  # Liu et al. 2022, table 9
    "wide_resnet50_2": ("residual", 16),
}


@pytest.mark.parametrize("name", COUNTS)
def test_the_number_of_sites_is_that_of_the_papers_units(name):
    kind, count = COUNTS[name]
    size = (3, 299, 299) if name == "inception_v3" else (3, 224, 224)
    sites = find_sites(name, size)
    assert len(of_kind(sites, kind)) == count
    assert len(of_kind(sites, "last")) == len(of_kind(sites, "head")) == 1
    if kind == "block":
        assert of_kind(sites, "residual") == []


# Residual units of networks of timm, from the same papers: depths of the stages, or blocks that add their input
TIMM = {
    "resnet26": 8,
    "seresnet18": 8,
    "ecaresnet26t": 8,
    "skresnet18": 8,
    "resnest14d": 4,
    "res2net50_26w_4s": 16,
    "resnetv2_50": 16,
    "efficientnet_b0": 9,
    "mobilenetv3_small_100": 6,
    "mnasnet_100": 10,
    "regnetx_004": 22,
    "convnext_atto": 2 + 2 + 6 + 2,
    "convnextv2_atto": 2 + 2 + 6 + 2,
    "ghostnet_100": None,
    "dla34": None,
    "hrnet_w18_small": None,
    "repvgg_a0": None,
    "cspresnet50": None,
    "darknet53": None,
    "xception41": None,
    "densenet121": None,
    "vgg11": None,
    "inception_v4": None,
    "vovnet39a": None,
    "dpn68": None,
}


@pytest.mark.parametrize("name", TIMM)
def test_networks_of_timm_are_looked_at_like_any_other(name):
    sites = find_sites(f"timm:{name}", (3, 128, 128))
    if TIMM[name] is not None:
        assert len(of_kind(sites, "residual")) == TIMM[name]
    assert of_kind(sites, "block")
    assert len(of_kind(sites, "last")) == 1
    assert all(site.channels > 1 for site in sites)


def test_the_map_that_is_flattened_is_told_from_the_last_one():
    sites = find_sites("vgg11")
    assert of_kind(sites, "last") == ["features.20"]
    assert of_kind(sites, "head") == ["avgpool"]
    assert of_kind(sites, "stage") == ["features.1", "features.4", "features.9", "features.14", "features.19"]


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "regnet_y_400mf", "squeezenet1_1", "convnext_tiny"])
def test_shapes_are_those_that_a_running_network_shows(name):
    model = load_backbone(name, 10).eval()
    seen = {}

    def note(module, _inputs, output):
        seen[names[module]] = tuple(output.shape[1:])

    names = {module: name for name, module in model.named_modules()}
    for module in names:
        module.register_forward_hook(note)
    with torch.no_grad():
        model(torch.zeros(1, 3, 64, 64))
    sites = find_sites(name, (3, 64, 64))
    assert sites
    for site in sites:
        for alias in (site.name, *site.aliases):
            assert (site.channels, site.height, site.width) == seen[alias]


def test_looking_leaves_the_network_as_it_was():
    model = Tiny(10)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    find_sites(model, (3, 32, 32))
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


class Scaled(Unit):
    """A scale by a parameter and a dropout between the last norm and the addition."""

    def __init__(self, channels):
        super().__init__(channels)
        self.scale = nn.Parameter(torch.ones(channels, 1, 1))
        self.drop = nn.Dropout(0.1)

    def forward(self, x):
        x = x + self.drop(self.scale * self.bn2(self.conv2(x)))
        return x + 0.5


class InPlace(Unit):
    """An addition in place, as in torchvision's ResNet, and one shared module for both activations."""

    def __init__(self, channels):
        super().__init__(channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += x
        return self.relu(out)


class Swapped(Unit):
    """The skip path on the left of the addition, and a convolution in it."""

    def __init__(self, channels):
        super().__init__(channels)
        self.projection = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        return torch.add(self.projection(x), self.bn2(self.conv2(self.bn1(self.conv1(x)))))


class Fickle(Unit):
    """What it does depends on numbers, which tracers do not like."""

    def forward(self, x):
        return super().forward(x if x.sum() > 1e9 else x + 1.0)


class Tupled(Unit):
    """Parts that hand tuples and dictionaries to each other."""

    class Part(nn.Module):
        def __init__(self, unit):
            super().__init__()
            self.conv, self.bn = unit.conv1, unit.bn1

        def forward(self, pair):
            x, extra = pair
            return {"residual": self.bn(self.conv(x)), "extra": [extra]}

    def __init__(self, channels):
        super().__init__(channels)
        self.part = self.Part(Unit(channels))

    def forward(self, x):
        parts = self.part((x, x))
        return parts["residual"].add_(parts["extra"][0])


@pytest.mark.parametrize(
    ("unit", "residual", "block"),
    [
        (Unit, "0.bn2", "0"),
        (Scaled, "0.bn2", "0"),
        (InPlace, "0.bn2", "0"),
        (Swapped, "0.bn2", "0"),
        (Fickle, "0.bn2", "0"),
        (Tupled, "0.part.bn", "0"),
    ],
)
def test_the_residual_is_found_however_the_addition_is_written(unit, residual, block):
    model = nn.Sequential(unit(8), nn.Conv2d(8, 8, 3))
    sites = find_sites(model, (8, 8, 8))
    assert of_kind(sites, "residual") == [residual]
    assert block in of_kind(sites, "block")


class Written(nn.Module):
    """A residual unit whose addition is written in a way of its own, `add(unit, x, y)`."""

    def __init__(self, add):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.scale, self.bias = nn.Parameter(torch.ones(1)), nn.Parameter(torch.zeros(8, 1, 1))
        self.register_buffer("mean", torch.zeros(8, 1, 1))
        self.drop, self.add = nn.Dropout(0.1), add

    def forward(self, x):
        return torch.relu(self.add(self, x, self.conv2(torch.relu(self.conv1(x)))))


def residuals_of(add):
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), Written(add), nn.MaxPool2d(2), Written(add))
    return of_kind(find_sites(model, (3, 8, 8)), "residual"), unplaced_additions(model, (3, 8, 8))


SAME_MEANING = {
    "Fixup": lambda unit, x, y: (y * unit.scale + unit.bias) + x,
    "gate by a parameter": lambda unit, x, y: x + y * torch.tanh(unit.bias),
    "half": lambda unit, x, y: x + y / 2,
    "div": lambda unit, x, y: x + y.div(2),
    "multiply": lambda unit, x, y: torch.multiply(y, unit.scale) + x,
    "without a mean": lambda unit, x, y: x + (y - unit.mean),
    "from a constant": lambda _, x, y: x + (1 - y),
    "negative": lambda unit, x, y: x + (-y),
    "difference": lambda unit, x, y: x - y,
    "rsub": lambda unit, x, y: torch.rsub(y, x),
    "sum": lambda unit, x, y: sum([x, y]),
    "sum, residual first": lambda unit, x, y: sum([y, x]),
    "sum of three": lambda unit, x, y: x + y + x * unit.scale,
    "sum of a stack": lambda unit, x, y: torch.stack([x, y]).sum(0),
    "mean of a stack": lambda unit, x, y: torch.stack((y, x), dim=-1).mean(-1),
    "alpha": lambda unit, x, y: torch.add(x, y, alpha=0.3),
    "addcmul": lambda unit, x, y: torch.addcmul(x, y, unit.scale),
    "lerp": lambda unit, x, y: torch.lerp(x, y, 0.3),
    "lerp by a parameter": lambda unit, x, y: x.lerp(end=y, weight=unit.scale),
    "another type": lambda unit, x, y: (x.double() + y.double()).float(),
    "the whole of it": lambda unit, x, y: x + y[:, :8].reshape(x.shape),
    "all of that": lambda unit, x, y: x.add_(unit.drop(y.clone()).mul(unit.scale) / 2 - unit.bias),
}


@pytest.mark.parametrize("form", SAME_MEANING)
def test_a_residual_is_looked_at_before_scales_shifts_and_copies(form):
    assert residuals_of(SAME_MEANING[form]) == (["1.conv2", "3.conv2"], [])


OTHER_MEANING = {
    "operation 'relu'": lambda unit, x, y: x + F.relu(y),
    "operation 'getitem'": lambda unit, x, y: x[:, :, 1:-1, 1:-1] + y[:, :, 1:-1, 1:-1],
    "operation 'rdiv'": lambda unit, x, y: x + 2 / y,
    "operation 'div of a constant'": lambda unit, x, y: x + torch.div(unit.scale, y),
    "product of two maps": lambda unit, x, y: x * (1 - x) + y * x,
    "a product of two maps": lambda unit, x, y: torch.lerp(x, y, torch.sigmoid(x)),
    "called 3 times": lambda unit, x, y: x + unit.conv1(unit.conv1(y)),
    "operation 'roll'": lambda unit, x, y: sum([x, y.roll(1, 2)]),
    "operation 'tanh'": lambda unit, x, y: torch.stack([x, torch.tanh(y)]).sum(0),
}


@pytest.mark.parametrize("reason", OTHER_MEANING)
def test_residual_additions_without_a_site_are_told(reason):
    sites, told = residuals_of(OTHER_MEANING[reason])
    assert sites == []
    assert len(told) == 1
    assert told[0].startswith("2 residual additions have no site, in '1', '3': what is added ")
    assert reason in told[0]


@pytest.mark.parametrize(
    "add",
    [
        lambda _, x, y: y,
        lambda _, x, y: y + 1,
        lambda _, x, y: y + F.avg_pool2d(y, 3, 1, 1),  # no convolution makes it
        lambda _, x, y: F.avg_pool2d(y, 3, 1, 1) - y,
        lambda _, x, y: y * torch.sigmoid(y.mean((2, 3), keepdim=True) + y.amax((2, 3), keepdim=True)),
        lambda unit, x, y: torch.cat([y[:, :4], y[:, 4:] + unit.conv1(y)[:, 4:]], 1),  # a part of it
    ],
)
def test_other_additions_are_not_told(add):
    assert residuals_of(add)[1] == []


def test_additions_without_a_site_are_told_where_others_have_theirs():
    model = nn.Sequential(Unit(8), Written(OTHER_MEANING["operation 'relu'"]))
    assert of_kind(find_sites(model, (8, 8, 8)), "residual") == ["0.bn2"]
    assert unplaced_additions(model, (8, 8, 8)) == [
        "1 residual addition has no site, in '1': what is added comes out of the operation 'relu', "
        "which no module puts out"
    ]
    assert unplaced_additions("resnet18", (3, 32, 32)) == []


def test_a_unit_that_is_called_twice_names_no_site():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.unit, self.end = Unit(8), nn.Conv2d(8, 8, 3)

        def forward(self, x):
            return self.end(self.unit(self.unit(x)))

    sites = find_sites(Twice(), (8, 8, 8))
    assert [site.name for site in sites] == ["end"]


def test_gates_of_built_in_attention_are_no_sites():
    names = [site.name for site in find_sites("mobilenet_v3_small", (3, 64, 64))]
    assert not [name for name in names if "fc1" in name or "fc2" in name]
    sites = find_sites(nn.Sequential(nn.Conv2d(3, 32, 3), SqueezeExcitation(32, 8), nn.Conv2d(32, 8, 3)), (3, 8, 8))
    assert of_kind(sites, "block") == ["0", "2"]


def gates(sites):
    return [gate for site in sites for gate in site.gates]


# Units with squeeze-and-excitation (or the like) by the papers' tables
@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("mobilenet_v3_small", 9),  # Howard et al. 2019, table 2
        ("mobilenet_v3_large", 8),  # the same, table 1
        ("efficientnet_b0", 16),  # Tan and Le 2019, table 1: all
        ("regnet_y_400mf", 1 + 3 + 6 + 6),  # Radosavovic et al. 2020, figure 17: all
        ("regnet_x_400mf", 0),
        ("resnet18", 0),
        ("timm:seresnet18", 8),
        ("timm:ecaresnet26t", 8),
        ("timm:skresnet18", 8),
        ("timm:resnest14d", 4),
    ],
)
def test_attention_that_a_network_has_already_is_seen(name, count):
    seen = gates(find_sites(name, (3, 128, 128)))
    assert len(seen) == len(set(seen)) == count


def test_attention_over_channels_and_pixels_is_seen_whatever_it_is_made_of():
    plain = nn.Sequential(Unit(8), nn.Conv2d(8, 8, 3))
    text = "0.bn2=cbam(r=2,k=3) 1=eca(k=3)"
    model = insert(plain, Placement.parse(text), input_size=(8, 8, 8))
    assert gates(find_sites(model, (8, 8, 8))) == [
        "0.bn2.attention.channel", "0.bn2.attention.spatial", "1.attention"
    ]  # fmt: skip


class WithAuxiliaryHead(nn.Module):
    """Two units; in training a second classifier looks at the map between them, and a tuple comes out."""

    def __init__(self):
        super().__init__()
        self.stem, self.unit1, self.unit2 = nn.Conv2d(3, 8, 3, stride=2), Unit(8), Unit(8)
        self.auxiliary = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        x = self.unit1(self.stem(x))
        auxiliary = self.auxiliary(x) if self.training else None
        x = self.head(self.unit2(x).mean((2, 3)))
        return (x, auxiliary) if self.training else x


def test_a_network_with_an_auxiliary_head_is_looked_at_as_it_is_used():
    model = WithAuxiliaryHead()
    sites = find_sites(model, (3, 16, 16))
    assert of_kind(sites, "residual") == ["unit1.bn2", "unit2.bn2"]
    assert of_kind(sites, "stage") == of_kind(sites, "last") == ["unit2"]
    inserted = insert(model, Placement.parse("unit1.bn2=se(r=2) unit2=se(r=2)"), input_size=(3, 16, 16))
    logits, auxiliary = inserted.train()(torch.randn(4, 3, 16, 16))
    (logits.sum() + auxiliary.sum()).backward()
    assert inserted.unit2.attention.expand.weight.grad.abs().sum() > 0


def plain_convolutions(*, norm):
    layers = []
    for before, after in ((3, 8), (8, 8), (8, 16)):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1)]
        layers += [nn.BatchNorm2d(after)] if norm else []
        layers += [nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * 4, 10))


@pytest.mark.parametrize(("norm", "blocks"), [(True, ["2", "5", "8"]), (False, ["1", "3", "5"])])
def test_a_plain_sequential_has_a_block_after_each_activation(norm, blocks):
    model = plain_convolutions(norm=norm)
    sites = find_sites(model, (3, 16, 16))
    assert of_kind(sites, "residual") == []
    assert of_kind(sites, "block") == of_kind(sites, "stage") == blocks
    assert of_kind(sites, "last") == of_kind(sites, "head") == blocks[-1:]
    inserted = insert(model, Placement.parse(f"{blocks[1]}=cbam(r=2,k=3)"), input_size=(3, 16, 16))
    assert inserted(torch.randn(2, 3, 16, 16)).shape == (2, 10)


class Functional(nn.Module):
    """Functional activations after two convolutions of which one is used twice."""

    def __init__(self):
        super().__init__()
        self.first, self.again, self.end = (nn.Conv2d(*width, 3, padding=1) for width in ((3, 8), (8, 8), (8, 8)))

    def forward(self, x):
        x = F.relu(self.first(x))
        for _ in range(2):
            x = F.relu(self.again(x), inplace=True)
        return F.silu(self.end(x)).mean((2, 3))


def test_before_functional_activations_the_convolutions_are_the_sites():
    sites = find_sites(Functional(), (3, 8, 8))
    assert of_kind(sites, "block") == ["first", "end"]  # `again` puts out two tensors


@pytest.mark.slow
def test_networks_without_feature_maps_get_one_line():
    with pytest.raises(BackboneError, match="VisionTransformer has no feature maps"):
        find_sites("vit_b_16")
    with pytest.raises(BackboneError, match="SwinTransformer has no feature maps"):
        find_sites("swin_t")
    with pytest.raises(BackboneError, match="does not take an input of 3x2x2"):
        find_sites("alexnet", (3, 2, 2))


def test_the_last_map_of_a_resnet_is_a_32nd_of_the_input_rounded_up():
    for side in (32, 64, 96, 97, 224):
        assert last_map("resnet18", (3, side, side)) == (-(-side // 32),) * 2
    assert last_map("efficientnet_b0", (3, 224, 224)) == (7, 7)
    assert last_map("mobilenet_v3_small", (3, 224, 224)) == (7, 7)
    assert last_map(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), (3, 2, 2)) is None
