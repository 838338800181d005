import random
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from benchmarks.ports import BLOCKS, compare_mmdet, documented_mmdet, everywhere

from placesearch.errors import BackboneError, PlacementError
from placesearch.exporting.block_source import CLASSES
from placesearch.exporting.mmdet_source import BACKBONES, mmdet_source
from placesearch.models.architecture import Architecture
from placesearch.models.blocks import BLOCKS as KNOWN
from placesearch.placement import Placement

UNITS = (3, 4, 6, 3)


def in_stages(blocks):
    """Write a placement of ResNet-50 with the same block in all units of a stage."""
    return " ".join(
        f"layer{stage}.{unit}.bn3={block}" for stage, block in blocks.items() for unit in range(UNITS[stage - 1])
    )


def architecture(placement, backbone="resnet50", **values):
    return Architecture(
        backbone=backbone, num_classes=7, input_size=(3, 64, 64), placement=Placement.parse(placement), **values
    )


def judge(outcome):
    assert outcome.difference <= 1e-4
    assert outcome.exact <= 1e-9
    assert outcome.effect >= 1e-3
    assert outcome.added == 0


@pytest.mark.slow
def test_a_backbone_built_as_mmdet_documents_it_has_equal_logits(tmp_path):
    placement = in_stages({1: "se(r=16)", 2: "cbam(r=16,k=7)", 3: "se(r=16)", 4: "cbam_residual(r=8,k=3)"})
    factors = {site: 1.5 if site.startswith("layer4") else 2.0 for site in Placement.parse(placement)}
    judge(compare_mmdet(architecture(placement, factors=factors), tmp_path))


@pytest.mark.slow
def test_the_other_blocks_have_equal_logits_too(tmp_path):
    judge(
        compare_mmdet(architecture(in_stages({1: "cbam_bn(r=8,k=3)", 2: "spatial(k=3)", 4: "channel(r=4)"})), tmp_path)
    )
    judge(compare_mmdet(architecture(in_stages({1: "eca(k=3)", 2: "cbam_residual(r=8,k=3)"})), tmp_path))


def test_the_config_has_one_entry_for_each_setting_and_says_in_which_stages(tmp_path):
    module, _ = documented_mmdet(
        mmdet_source(architecture(in_stages({1: "se(r=16)", 2: "eca(k=3)", 4: "se(r=16)"}))), tmp_path
    )
    assert module.CONFIG.count('type="PlacesearchSqueezeExcitation", reduction=16') == 1
    assert "stages=(True, False, False, True)" in module.CONFIG
    assert "stages=(False, True, False, False)" in module.CONFIG


def test_the_file_holds_the_code_of_its_own_blocks_and_no_other():
    source = mmdet_source(architecture(in_stages({4: "se(r=16)"})))
    assert "class PlacesearchSqueezeExcitation(" in source
    assert "SpatialAttention" not in source
    assert "placesearch." not in source  # stands alone
    assert "import mmengine" not in mmdet_source(architecture("none"))


def test_every_block_here_is_a_plug_in():
    assert CLASSES.keys() == KNOWN.keys() == BLOCKS.keys()


@pytest.mark.parametrize(
    ("placement", "site", "why", "closest"),
    [
        (
            "layer4.0.bn3=se(r=16) layer4.2.bn3=se(r=16)",
            "layer4.0.bn3",
            "goes to all residual units of a stage, and site 'layer4.1.bn3' has no block",
            in_stages({4: "se(r=16)"}),
        ),
        (
            in_stages({2: "se(r=16)"}).replace("layer2.1.bn3=se(r=16)", "layer2.1.bn3=eca(k=3)"),
            "layer2.0.bn3",
            "goes to all residual units of a stage, and site 'layer2.1.bn3' has 'eca(k=3)'",
            in_stages({2: "se(r=16)"}),
        ),
        (
            in_stages({1: "se(r=16)"}) + " layer3.2.bn3=se(r=8)",
            "layer3.2.bn3",
            "goes to all residual units of a stage, and site 'layer3.0.bn3' has no block",
            in_stages({1: "se(r=16)"}),
        ),
        ("layer4.1=se(r=8)", "layer4.1", "only goes right before the addition", in_stages({4: "se(r=8)"})),
        (
            "layer1=se(r=8) layer1.0=se(r=8) layer1.1.bn3=se(r=4)",
            "layer1.0",
            "only goes right before the addition",
            in_stages({1: "se(r=8)"}),
        ),
        ("relu=se(r=8)", "relu", "only goes right before the addition", "none"),
    ],
)
def test_what_differs_within_a_stage_or_is_no_residual_is_refused_with_the_closest(placement, site, why, closest):
    with pytest.raises(PlacementError) as refused:
        mmdet_source(architecture(placement))
    message = str(refused.value)
    assert f"at site '{site}': a plug-in of mmdet {why}; the closest that it can is '{closest}'" in message
    assert mmdet_source(architecture(closest))


def test_gates_of_a_stage_with_other_factors_are_refused():
    with pytest.raises(PlacementError, match=r"site 'layer4.1.bn3' has a gate with another factor"):
        mmdet_source(architecture(in_stages({4: "se(r=16)"}), factors={"layer4.1.bn3": 2.0}))


def test_a_block_of_ones_own_is_refused():
    with pytest.raises(PlacementError, match="at site 'layer1.0.bn3': the file would have to hold your own code"):
        mmdet_source(architecture("layer1.0.bn3=networks:Gate(r=4)"))


@pytest.mark.parametrize(
    ("backbone", "closest"),
    [
        ("resnet18", "resnet50"),
        ("wide_resnet101_2", "resnet101"),
        ("resnext50_32x4d[3,4,6,4]", "resnext50_32x4d"),
        ("timm:resnet152d", "resnet152"),
        ("vgg11", "resnet50"),
    ],
)
def test_a_backbone_in_which_mmdet_takes_no_plug_ins_is_refused_with_the_closest(backbone, closest):
    with pytest.raises(BackboneError, match=f"the closest that it can is '{closest}'"):
        mmdet_source(architecture("none", backbone))
    assert closest in BACKBONES


def test_a_small_stem_is_refused():
    with pytest.raises(BackboneError, match="the closest that it can is stem 'original'"):
        mmdet_source(architecture("none", stem="small"))


@pytest.mark.skipif(find_spec("ruff") is None, reason="ruff is not installed")
def test_the_file_passes_the_linter_and_the_formatter_of_this_project(tmp_path):
    (tmp_path / "pyproject.toml").write_text((Path(__file__).parents[1] / "pyproject.toml").read_text())
    cases = [
        "none",
        in_stages({2: "spatial(k=3)"}),
        in_stages({1: "eca(k=3)", 2: "se(r=16)", 3: "channel(r=4)", 4: "cbam_residual(r=8,k=3)"}),
        in_stages({1: "cbam(r=4,k=3)", 2: "cbam_bn(r=4,k=3)"}),
    ]
    for index, placement in enumerate(cases):
        (tmp_path / f"exported_{index}.py").write_text(mmdet_source(architecture(placement)))
    subprocess.run([sys.executable, "-m", "ruff", "check", "."], cwd=tmp_path, check=True)
    subprocess.run([sys.executable, "-m", "ruff", "format", "--check", "."], cwd=tmp_path, check=True)


CELLS = [(backbone, "original", block, "residual") for backbone in (*BACKBONES, "timm:resnet50") for block in CLASSES]


@pytest.mark.slow
@pytest.mark.parametrize("cell", random.Random(0).sample(CELLS, 4), ids=str)
def test_a_sample_of_all_backbones_and_blocks_has_equal_logits(cell, tmp_path):
    judge(compare_mmdet(everywhere(*cell), tmp_path))
