import pytest
import timm.layers
import torch
import torch.nn.functional as F
import torchvision
from networks import Tiny
from torch import nn

from placesearch.costs import profile
from placesearch.costs.counting import FlopCountAnalysis
from placesearch.models.backbones import load_backbone
from placesearch.models.blocks import CBAM, SqueezeExcitation
from placesearch.models.insertion import insert
from placesearch.models.sites import find_sites
from placesearch.placement import BlockSetting, Placement


def test_a_tiny_network_costs_what_the_closed_forms_say():
    stem = 4 * 4 * 8 * 3 * 9  # 32 pixels a side, stride 8
    unit = 2 * 4 * 4 * 8 * 8 * 9
    cost = profile(Tiny(10), (3, 32, 32))
    assert cost.macs == stem + 2 * unit + 8 * 10
    assert cost.params == (8 * 27 + 8) + 2 * (2 * 8 * 8 * 9 + 4 * 8) + (8 * 10 + 10)
    elements = 8 * 4 * 4  # of each map; a unit has two norms, two activations and an addition; then the mean
    assert cost.macs_full == cost.macs + 2 * 5 * elements + elements
    assert cost.uncounted == ()


@pytest.mark.parametrize(
    ("setting", "macs", "others"),
    [
        (BlockSetting("se", 4), 2 * 8 * 2, 128 + 2 + 8 + 128),  # mean, relu, sigmoid, product
        (
            BlockSetting("cbam", 2, 3),
            4 * 8 * 4 + 2 * 9 * 16,
            (128 + 4) * 2 + 8 + 8 + 128 + 2 * 128 + 16 + 128,  # twice pooled and relu, sum, sigmoid, product; spatial
        ),
        (BlockSetting("eca", None, 3), 3 * 8, 128 + 8 + 128),
    ],
)
def test_a_block_adds_what_its_docstring_and_the_rule_say(setting, macs, others):
    plain = Tiny(10)
    model = insert(plain, Placement({"unit1.bn2": setting}), input_size=(3, 32, 32))
    with_block, without = profile(model, (3, 32, 32)), profile(plain, (3, 32, 32))
    assert with_block.macs - without.macs == macs
    assert with_block.macs_full - without.macs_full == macs + others


class Spelled(nn.Module):
    """SE, its pooling, layers and product written in different ways."""

    def __init__(self, pooling, layers, product):
        super().__init__()
        self.pooling, self.product = pooling, product
        kind = nn.Linear if layers == "linear" else lambda a, b: nn.Conv2d(a, b, 1)
        self.reduce, self.expand, self.flat = kind(64, 4), kind(4, 64), layers == "linear"

    def forward(self, x):
        pooled = {
            "mean": lambda: x.mean((2, 3), keepdim=True),
            "flat mean": lambda: x.flatten(2).mean(-1)[:, :, None, None],
            "module": lambda: nn.AdaptiveAvgPool2d(1)(x),
            "function": lambda: F.adaptive_avg_pool2d(x, 1),
            "window": lambda: F.avg_pool2d(x, x.shape[2:]),
        }[self.pooling]()
        pooled = pooled.flatten(1) if self.flat else pooled
        gate = torch.sigmoid(self.expand(F.relu(self.reduce(pooled), inplace=True))).view(-1, 64, 1, 1)
        return x * gate if self.product == "broadcast" else torch.mul(x, gate.expand_as(x))


@pytest.mark.parametrize("product", ["broadcast", "expanded"])
@pytest.mark.parametrize("layers", ["linear", "convolution"])
@pytest.mark.parametrize("pooling", ["mean", "flat mean", "module", "function", "window"])
def test_se_costs_the_same_however_it_is_spelled(pooling, layers, product):
    cost = profile(Spelled(pooling, layers, product), (64, 8, 8))
    assert cost == profile(SqueezeExcitation(64, 16), (64, 8, 8))
    assert cost.macs == 512
    assert cost.macs_full == 512 + 4096 + 4 + 64 + 4096


def test_blocks_of_other_libraries_cost_the_same():
    ours = profile(SqueezeExcitation(64, 16), (64, 8, 8))
    assert profile(torchvision.ops.SqueezeExcitation(64, 4), (64, 8, 8)) == ours
    assert profile(timm.layers.SEModule(64, rd_channels=4), (64, 8, 8)) == ours
    theirs = timm.layers.cbam.CbamModule(64, rd_channels=4, spatial_kernel_size=7, mlp_bias=True)
    theirs.spatial.conv.bn = nn.Identity()
    cost = profile(CBAM(64, 16, 7), (64, 8, 8))
    assert (profile(theirs, (64, 8, 8)).macs, profile(theirs, (64, 8, 8)).macs_full) == (cost.macs, cost.macs_full)


ELEMENTS = 8 * 6 * 6


@pytest.mark.parametrize(
    ("layer", "others"),
    [
        (nn.BatchNorm2d(8), ELEMENTS),
        (nn.LayerNorm((6, 6)), 4 * ELEMENTS),
        (nn.GroupNorm(2, 8), 4 * ELEMENTS),
        (nn.GroupNorm(2, 8, affine=False), 3 * ELEMENTS),
        (nn.InstanceNorm2d(8, affine=True), 4 * ELEMENTS),
        (nn.Hardswish(), ELEMENTS),
        (nn.ReLU6(inplace=True), ELEMENTS),
        (nn.GELU(), ELEMENTS),
        (nn.PReLU(), ELEMENTS),
        (nn.MaxPool2d(3, stride=2, padding=1), 9 * 8 * 3 * 3),
        (nn.AvgPool2d(2), 4 * 8 * 3 * 3),
        (nn.AdaptiveMaxPool2d(1), ELEMENTS),
        (nn.AdaptiveAvgPool2d(12), 4 * ELEMENTS),  # more come out than go in
        (nn.Softmax(1), 3 * ELEMENTS),
        (nn.Upsample(scale_factor=2), 4 * ELEMENTS),
        (nn.Dropout(), 0),
        (nn.ZeroPad2d(1), 0),
        (nn.Flatten(), 0),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_each_kind_of_operator_costs_what_the_rule_says(layer, others):
    cost = profile(nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), layer), (8, 6, 6))
    assert (cost.macs, cost.macs_full, cost.uncounted) == (8 * ELEMENTS, 8 * ELEMENTS + others, ())


def test_matrix_products_by_any_name_are_macs():
    class Products(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(5, 8))

        def forward(self, x):
            flat = x.mean((2, 3))
            return flat @ self.weight.T + F.linear(flat, self.weight) + torch.einsum("nc,dc->nd", flat, self.weight)

    cost = profile(Products(), (8, 6, 6))
    assert (cost.macs, cost.macs_full) == (3 * 5 * 8, 3 * 5 * 8 + ELEMENTS + 2 * 5)


def test_an_operator_that_nobody_counts_is_named():
    class Odd(nn.Module):
        def forward(self, x):
            return torch.fft.rfft2(x).real

    assert "fft_rfft2" in profile(Odd(), (8, 6, 6)).uncounted


def test_the_full_count_of_resnet18_is_that_of_its_table_of_layers():
    """He et al. 2016, table 1: a stem of 64 channels at 112 pixels, two units a stage, projections in three of them."""
    stem, pool = 64 * 112**2, 9 * 64 * 56**2
    maps = [channels * side**2 for channels, side in ((64, 56), (128, 28), (256, 14), (512, 7))]
    norms = 4 * maps[0] + 5 * sum(maps[1:])  # one each; as many activations as plain convolutions, one addition a unit
    others = 2 * stem + pool + norms + 4 * sum(maps) + 2 * sum(maps) + maps[-1]
    cost = profile(load_backbone("resnet18", 1000), (3, 224, 224))
    assert cost.macs_full - cost.macs == others


def test_resnet18_costs_what_fvcore_counts_without_the_norms():
    """1,819,065,856 with fvcore's default handlers, of which 2 per element are its eval-mode batch norms."""
    model = load_backbone("resnet18", 1000).eval()
    elements = []

    def note(_module, _inputs, output):
        elements.append(output.numel())

    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(note)
    with torch.no_grad():
        model(torch.zeros(1, 3, 224, 224))
    norms, pooled = 2 * sum(elements), 512 * 7 * 7  # fvcore counts the inputs of the adaptive average pooling
    assert profile(model, (3, 224, 224)).macs == 1_819_065_856 - norms - pooled


@pytest.mark.parametrize(
    ("name", "printed"), [("resnet18", ["1.814", "1.814", "1.815"]), ("resnet34", ["3.664", "3.664", "3.665"])]
)
def test_the_papers_gflops_are_met_to_the_printed_digit(name, printed):
    sites = [site for site in find_sites(name) if "residual" in site.kinds]
    plain = load_backbone(name, 1000)
    seen = []
    for setting in (None, BlockSetting("se", 16), BlockSetting("cbam", 16, 7)):
        placement = Placement({site.name: setting for site in sites}) if setting else Placement()
        seen.append(f"{profile(insert(plain, placement, sites=sites), (3, 224, 224)).macs / 1e9:.3f}")
    assert seen == printed


def test_resnet50_with_the_papers_stride_costs_what_the_papers_say():
    """Torchvision strides in the 3x3 convolution, 4.09 G; the papers in the first 1x1, 3.858 G (table 4)."""
    model = load_backbone("resnet50", 1000)
    assert f"{profile(model, (3, 224, 224)).macs / 1e9:.2f}" == "4.09"
    for unit in model.modules():
        if isinstance(unit, torchvision.models.resnet.Bottleneck):
            unit.conv1.stride, unit.conv2.stride = unit.conv2.stride, (1, 1)
    assert f"{profile(model, (3, 224, 224)).macs / 1e9:.3f}" == "3.858"


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "squeezenet1_1", "regnet_y_400mf", "googlenet"])
def test_macs_are_those_that_torchvision_publishes(name):
    weights = torchvision.models.get_model_weights(name).DEFAULT
    side = weights.transforms().crop_size[0]
    published = weights.meta["_ops"]  # in billions, rounded to a thousandth
    cost = profile(load_backbone(name, 1000), (3, side, side))
    assert abs(cost.macs / 1e9 - published) <= max(0.0005, 0.001 * published)
    assert cost.uncounted == ()


def test_profiling_leaves_the_network_as_it_was():
    model = Tiny(10)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    profile(model, (3, 32, 32))
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_the_count_does_not_depend_on_the_mode():
    model = insert(Tiny(10), Placement.parse("unit1.bn2=cbam(r=2,k=3)"), input_size=(3, 32, 32))
    assert profile(model.train(), (3, 32, 32)) == profile(model.eval(), (3, 32, 32))


@pytest.mark.filterwarnings("ignore")  # torch deprecates what fvcore does; this test calls fvcore itself
def test_macs_are_nothing_but_convolutions_and_linear_layers():
    counts = FlopCountAnalysis(Tiny(10).eval(), torch.zeros(1, 3, 32, 32)).unsupported_ops_warnings(False).by_operator()
    assert counts["batch_norm"] > 0
    assert profile(Tiny(10), (3, 32, 32)).macs == counts["conv"] + counts["linear"]
