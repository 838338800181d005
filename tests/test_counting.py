import pytest
import torch
from networks import Tiny
from torch import nn

from placesearch.costs import profile
from placesearch.costs.counting import FlopCountAnalysis
from placesearch.models.backbones import load_backbone
from placesearch.models.insertion import insert
from placesearch.models.sites import find_sites
from placesearch.placement import BlockSetting, Placement


def test_macs_of_a_tiny_network_follow_the_closed_form():
    stem = 4 * 4 * 8 * 3 * 9  # 32 pixels a side, stride 8
    unit = 2 * 4 * 4 * 8 * 8 * 9
    cost = profile(Tiny(10), (3, 32, 32))
    assert cost.macs == stem + 2 * unit + 8 * 10
    assert cost.params == (8 * 27 + 8) + 2 * (2 * 8 * 8 * 9 + 4 * 8) + (8 * 10 + 10)


@pytest.mark.parametrize(
    ("setting", "macs"),
    [
        (BlockSetting("se", 4), 2 * 8 * 2),
        (BlockSetting("cbam", 2, 3), 4 * 8 * 4 + 2 * 9 * 4 * 4),
    ],
)
def test_a_block_adds_what_its_docstring_says(setting, macs):
    plain = Tiny(10)
    model = insert(plain, Placement({"unit1.bn2": setting}), input_size=(3, 32, 32))
    assert profile(model, (3, 32, 32)).macs - profile(plain, (3, 32, 32)).macs == macs


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


def test_the_papers_gflops_are_met_to_the_printed_digit():
    """Woo et al. 2018, table 4: ResNet-18 1.814, with SE 1.814, with CBAM 1.815 GFLOPs."""
    sites = [site for site in find_sites("resnet18") if "residual" in site.kinds]
    plain = load_backbone("resnet18", 1000)
    printed = {None: "1.814", BlockSetting("se", 16): "1.814", BlockSetting("cbam", 16, 7): "1.815"}
    for setting, expected in printed.items():
        placement = Placement({site.name: setting for site in sites}) if setting else Placement()
        cost = profile(insert(plain, placement, sites=sites), (3, 224, 224))
        assert f"{cost.macs / 1e9:.3f}" == expected


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
def test_nothing_but_convolutions_and_linear_layers_is_counted():
    counts = FlopCountAnalysis(Tiny(10).eval(), torch.zeros(1, 3, 32, 32)).unsupported_ops_warnings(False).by_operator()
    assert counts["batch_norm"] > 0
    assert profile(Tiny(10), (3, 32, 32)).macs == counts["conv"] + counts["linear"]
