import random
import re
import subprocess
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from benchmarks.ports import BACKBONES, BLOCKS, compare_timm, everywhere, loaded, registered_name, relative, settled

from placesearch.config import KINDS
from placesearch.errors import BackboneError, PlacementError
from placesearch.exporting.timm_source import _FAMILIES, PORTS, timm_source
from placesearch.models.architecture import Architecture
from placesearch.placement import Placement

MIXED = (
    "layer1.0.bn2=se(r=16) layer1.0=cbam(r=8,k=3) layer2.0.bn2=cbam_bn(r=4,k=7) layer2.0=channel(r=8) "
    "layer3.0.bn2=spatial(k=7) layer4=eca(k=5) relu=se(r=4) layer3.0.conv1=se(r=3)"
)
"""Each block that timm has; sites of several kinds and of none, one by its alias."""


def architecture(backbone="resnet18[1,1,1,1]", placement=MIXED, **values):
    return Architecture(
        backbone=backbone, num_classes=7, input_size=(3, 64, 64), placement=Placement.parse(placement), **values
    )


def judge(outcome):
    assert outcome.difference <= 1e-4
    assert outcome.exact <= 1e-9
    assert outcome.effect >= 1e-3


def test_timm_builds_each_block_with_equal_logits_and_the_file_counts_the_parameters_that_its_variants_add(tmp_path):
    outcome = compare_timm(architecture(), tmp_path)
    judge(outcome)
    assert outcome.added == 2
    text = " ".join(timm_source(architecture()).split())
    assert "layer1.0=cbam(r=8,k=3) layer3.0.bn2=spatial(k=7). Each has 1 parameter more than here, together 2." in text


def test_blocks_that_timm_has_exactly_add_no_parameter_and_the_file_says_so(tmp_path):
    same = architecture(placement="layer1.0.bn2=se(r=16) layer2.0.bn2=cbam_bn(r=4,k=7) layer2.0=eca(k=3)")
    assert compare_timm(same, tmp_path).added == 0
    assert "Every block is the same in timm" in timm_source(same)


@pytest.mark.parametrize(
    "given",
    [
        architecture(placement="layer1.0.bn2=cbam(r=16,k=3) layer4.0=se(r=8)", stem="small"),
        architecture("resnet18", "layer2.1.bn2=se(r=16)"),
        architecture("timm:resnet10t.c3_in1k", "layer1.0.bn2=se(r=16) layer2.0=cbam(r=8,k=3)", stem="small"),
        pytest.param(architecture("timm:seresnet18", "layer1.0.se=eca(k=3)"), marks=pytest.mark.slow),
        architecture(
            "timm:densenet121", "features.denseblock1=se(r=8) features.denseblock1.denselayer2.conv2=eca(k=3)"
        ),
        architecture(placement="none"),
    ],
    ids=lambda given: f"{given.backbone}-{given.stem}",
)
@pytest.mark.slow
def test_stems_unit_numbers_and_networks_of_timm_are_built_as_here(given, tmp_path):
    assert compare_timm(given, tmp_path).difference <= 1e-4


@pytest.mark.slow
def test_a_factor_of_the_gates_goes_with_them(tmp_path):
    placement = "layer1.0=se(r=8) layer2.0=cbam(r=8,k=3) layer3.0=cbam_bn(r=8,k=3) layer4.0=eca(k=3) relu=spatial(k=3)"
    sites = Placement.parse(placement)
    given = architecture(placement=placement, factors={site: 1.5 + 0.5 * index for index, site in enumerate(sites)})
    judge(compare_timm(given, tmp_path))


def test_the_block_stands_where_timm_applies_its_own_attention(tmp_path):
    """What timm builds with SE in all its units is the network of SE at every residual."""
    given = architecture(placement=" ".join(f"layer{stage}.0.bn2=se(r=16)" for stage in range(1, 5)))
    source = timm_source(given)
    loaded(source, tmp_path, registered_name(source))
    ours = settled(timm.create_model(registered_name(source)))
    attention = partial(timm.layers.SEModule, rd_ratio=1 / 16, rd_divisor=1)
    theirs = timm.create_model("resnet18", num_classes=7, layers=(1, 1, 1, 1), block_args={"attn_layer": attention})
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert relative(theirs.eval()(x), ours(x)) == 0.0


def test_feature_maps_pass_through_the_blocks_and_tell_their_scale(tmp_path):
    given = architecture(placement="layer1.0.bn2=se(r=16) layer2.0=eca(k=3) layer4.0.bn2=se(r=4)", stem="small")
    source = timm_source(given)
    name = registered_name(source)
    loaded(source, tmp_path, name)
    whole = settled(timm.create_model(name))
    features = timm.create_model(name, features_only=True, out_indices=(1, 2))
    features.load_state_dict(whole.state_dict(), strict=False)
    assert features.feature_info.reduction() == [1, 2]
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        maps = features.eval()(x)
        expected = whole.layer1(whole.maxpool(whole.act1(whole.bn1(whole.conv1(x)))))
        assert [tuple(each.shape) for each in maps] == [(2, 64, 64, 64), (2, 128, 32, 32)]
        assert relative(expected, maps[0]) <= 1e-6
        assert relative(whole.layer2(expected), maps[1]) <= 1e-6


def test_a_checkpoint_of_the_plain_backbone_passes_as_it_is(tmp_path):
    source = timm_source(architecture("resnet18", "layer1.0.bn2=se(r=8) layer4.1=cbam(r=8,k=3)"))
    plain = torchvision.models.resnet18(num_classes=7).state_dict()
    module = loaded(source, tmp_path, registered_name(source))
    converted = module.from_placesearch(plain)
    assert converted.keys() == plain.keys()
    assert all(converted[key] is plain[key] for key in plain)


def test_the_name_tells_networks_apart_but_not_where_they_were_found():
    names = {registered_name(timm_source(architecture(placement=text))) for text in ("none", "layer1.0.bn2=se(r=4)")}
    assert len(names) == 2
    found = architecture(placement="none", found={"study": "digits", "trial": 3})
    assert registered_name(timm_source(found)) in names


@pytest.mark.parametrize(
    ("setting", "why", "closest"),
    [
        ("cbam_residual(r=8,k=3)", "no block of timm adds its input to what it puts out", "cbam(r=8,k=3)"),
        ("networks:Gate(r=4)", "timm has no such block", "se(r=4)"),
    ],
)
def test_a_block_that_timm_lacks_is_refused_with_its_site_and_the_closest(setting, why, closest):
    with pytest.raises(PlacementError) as refused:
        timm_source(architecture(placement=f"layer1.0.bn2=se(r=4) layer2.0.bn2={setting}"))
    assert str(refused.value) == (
        f"timm cannot build '{setting}' at site 'layer2.0.bn2': {why}; the closest that it can is '{closest}'"
    )
    assert timm_source(architecture(placement=f"layer1.0.bn2=se(r=4) layer2.0.bn2={closest}"))


def test_a_placement_that_the_backbone_cannot_take_is_refused():
    with pytest.raises(PlacementError, match="the network has no site 'layer9'"):
        timm_source(architecture(placement="layer9=se(r=4)"))
    with pytest.raises(PlacementError, match="reduction 65 is not allowed"):
        timm_source(architecture(placement="layer1.0.bn2=se(r=65)"))


def test_a_backbone_that_timm_lacks_is_refused_with_the_closest():
    with pytest.raises(BackboneError, match="the closest that it can is 'timm:vgg11_bn'"):
        timm_source(architecture("vgg11_bn", "none"))
    with pytest.raises(BackboneError, match="timm cannot build 'networks:tiny', which is code of your own"):
        timm_source(architecture("networks:tiny", "none"))


def test_each_backbone_named_as_the_closest_is_one_of_timm():
    known, resnets = set(timm.list_models()), 0
    for name in torchvision.models.list_models(module=torchvision.models):
        for pattern, nearest in _FAMILIES.items():
            if match := re.fullmatch(pattern, name):
                assert match.expand(nearest).removeprefix("timm:") in known, name
                break
        resnets += name.startswith(("resn", "wide_resn")) and name in known
    assert resnets == 10  # all of torchvision's


def test_each_block_here_is_ported_or_refused():
    assert set(BLOCKS) - set(PORTS) == {"cbam_residual"}


@pytest.mark.skipif(find_spec("ruff") is None, reason="ruff is not installed")
def test_the_file_passes_the_linter_and_the_formatter_of_this_project(tmp_path):
    (tmp_path / "pyproject.toml").write_text((Path(__file__).parents[1] / "pyproject.toml").read_text())
    long = "layer1.0=cbam(r=8,k=3) layer4.0=cbam(r=4,k=7)"
    cases = [
        architecture(),
        architecture(placement="none"),
        architecture(placement=long, stem="small", factors={"layer1.0": 2.0, "layer4.0": 3.0}),
    ]
    for index, given in enumerate(cases):
        (tmp_path / f"exported_{index}.py").write_text(timm_source(given))
    subprocess.run([sys.executable, "-m", "ruff", "check", "."], cwd=tmp_path, check=True)
    subprocess.run([sys.executable, "-m", "ruff", "format", "--check", "."], cwd=tmp_path, check=True)


CELLS = [
    (backbone, stem, block, kind)
    for backbone, stem in BACKBONES["timm"]
    for block in PORTS
    for kind in KINDS
    if backbone != "vgg11"
]


@pytest.mark.slow
@pytest.mark.parametrize("cell", random.Random(0).sample(CELLS, 8), ids=str)
def test_a_sample_of_all_backbones_blocks_and_kinds_has_equal_logits(cell, tmp_path):
    given = everywhere(*cell)
    if given.placement:
        outcome = compare_timm(given, tmp_path)
        assert outcome.exact <= 1e-9
        # more than 1e-4 only where a deep network with random weights blows rounding up, its own as well
        assert outcome.difference <= max(1e-4, 2 * outcome.rounding)
