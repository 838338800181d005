import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from placesearch.errors import BackboneError, InputError, PlacementError
from placesearch.exporting.block_source import CLASSES
from placesearch.exporting.checking import difference
from placesearch.exporting.python_source import python_source
from placesearch.models.architecture import Architecture, Found
from placesearch.models.blocks import BLOCKS
from placesearch.models.sites import every_site
from placesearch.placement import BlockSetting, Placement

PROJECT = Path(__file__).parents[1] / "pyproject.toml"
EVERY_BLOCK = (
    "layer1.0=se(r=4) layer1.0.bn2=cbam(r=8,k=7) layer2.0=channel(r=4) layer2.1=eca(k=3) layer3.1=spatial(k=3) "
    "layer4.0=cbam_residual(r=4,k=3) layer4.1.bn2=cbam_bn(r=8,k=3)"
)
FACTORS = {
    "layer1.0": 2.0,
    "layer1.0.bn2": 4.0,
    "layer2.0": 1.5,
    "layer2.1": 0.5,
    "layer3.1": 2.0,
    "layer4.0": 0.8,
    "layer4.1.bn2": 3.9999999999999996,
}


def architecture(placement=EVERY_BLOCK, backbone="resnet18", **others):
    given = {"num_classes": 10, "input_size": (3, 64, 64), "placement": Placement.parse(placement), **others}
    return Architecture(backbone=backbone, **given)


def run(source):
    names = {"__name__": "network"}
    exec(compile(source, "network.py", "exec"), names)  # noqa: S102 - it is what is tested
    return names


def assert_same(architecture):
    """Build the source's network, give it the weights of ours, and the other way round."""
    ours, theirs = architecture.build(seed=0), run(python_source(architecture))["build"]()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, *architecture.input_size)
    with torch.no_grad():
        assert difference(ours.eval()(x), theirs.eval()(x)) <= 1e-6
    ours.load_state_dict(run(python_source(architecture))["build"]().state_dict())


def ruff(source, tmp_path):
    """Check the source by the project's rules, and its format under the project's length of lines and ruff's own."""
    path = tmp_path / "network.py"
    path.write_text(source)
    command = [sys.executable, "-m", "ruff"]
    for arguments in (
        ["check", "--config", PROJECT],
        ["format", "--check", "--diff", "--config", PROJECT],
        ["check", "--isolated"],
        ["format", "--check", "--diff", "--isolated"],
    ):
        done = subprocess.run([*command, *arguments, path], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_every_block_has_its_classes_in_the_template():
    assert set(CLASSES) == set(BLOCKS)


def test_every_block_computes_the_same_with_copied_weights():
    assert_same(architecture())


def test_factors_of_gates_are_part_of_the_source():
    found = architecture(factors=FACTORS)
    assert_same(found)
    assert "factor" not in python_source(architecture())


@pytest.mark.parametrize(
    ("backbone", "placement", "stem"),
    [
        ("resnet18", "none", "original"),
        ("resnet18", "layer2=eca(k=3)", "small"),  # an alias; the site's own name is layer2.1
        ("resnext50_32x4d[1,2,1,1]", "layer2.1.bn3=se(r=16)", "original"),
        ("wide_resnet50_2[1,1,1,1]", "none", "original"),
        ("mobilenet_v3_small", "features.12=cbam(r=8,k=3)", "small"),  # an nn.Sequential
        pytest.param(
            "regnet_x_400mf", "trunk_output.block3.block3-5.f.c.1=cbam_bn(r=8,k=3)", "original", marks=pytest.mark.slow
        ),  # needs memory
        pytest.param(
            "googlenet", "inception5b=spatial(k=3)", "original", marks=pytest.mark.slow
        ),  # has to be told how to start its weights
        ("alexnet", "avgpool=channel(r=8)", "small"),
        pytest.param(
            "densenet121",
            "features.denseblock1=se(r=8) features.denseblock1.denselayer2.conv2=eca(k=3)",
            "original",
            marks=pytest.mark.slow,
        ),  # a ModuleDict that runs over its children
        ("timm:resnet10t.c3_in1k", "layer4.0.bn2=se(r=16)", "original"),
    ],
)
def test_stems_backbones_and_ways_to_carry_a_block(backbone, placement, stem):
    assert_same(architecture(placement, backbone, stem=stem))


@pytest.mark.slow
@settings(max_examples=8, deadline=None)
@given(st.randoms(use_true_random=False))
def test_any_placement_computes_the_same(random):
    sites = every_site("resnet18", (3, 64, 64))
    placement = {
        site.name: BlockSetting(
            block,
            **{
                name: random.choice([1, 2, 4] if name == "reduction" else [1, 3, 5, 9])
                for name in BLOCKS[block].settings
            },
        )
        for site in random.sample(sites, 4)
        for block in [random.choice(list(BLOCKS))]
    }
    assert_same(architecture("none").model_copy(update={"placement": Placement(placement)}))


@pytest.mark.parametrize(
    "found",
    [
        architecture("none"),
        architecture(),
        architecture(factors=FACTORS, stem="small"),
        architecture(found=Found(study="resnet18-digits", trial=12)),
        architecture("layer1.0.bn2=spatial(k=3)", factors={"layer1.0.bn2": 2.0}),
        architecture("trunk_output.block3.block3-5.f.c.1=cbam_bn(r=8,k=3)", "regnet_x_400mf"),
        architecture("layer4.0.bn2=se(r=16)", "timm:resnet10t"),
        architecture("layer2.1.bn3=se(r=16)", "resnext50_32x4d[1,2,1,1]"),
    ],
    ids=lambda found: f"{found.backbone}-{len(found.placement)}-{len(found.factors)}",
)
def test_the_source_passes_ruff(found, tmp_path):
    ruff(python_source(found), tmp_path)


@pytest.mark.slow
def test_each_block_alone_passes_ruff(tmp_path):
    for name, block in BLOCKS.items():
        setting = BlockSetting(name, **dict.fromkeys(block.settings, 3))
        for factors in ({}, {"layer4.0": 1.5}):
            ruff(python_source(architecture(f"layer4.0={setting}", factors=factors)), tmp_path)


def test_the_source_names_nothing_but_what_it_says_it_needs():
    source = python_source(architecture())
    imports = [
        line.split()[1].split(".")[0] for line in source.splitlines() if line.strip().startswith(("import ", "from "))
    ]
    assert set(imports) == {"collections", "pathlib", "typing", "torch", "torchvision", "safetensors"}
    assert "placesearch" not in source
    assert "Needs torch and torchvision;" in source


def test_a_study_that_bears_a_sentence_for_a_name_stays_out_of_the_source():
    found = Found(study='"""\nimport os\n"""', trial=1)
    assert "import os" not in python_source(architecture(found=found))
    assert "trial 1 of the study mine." in python_source(architecture(found=Found(study="mine", trial=1)))


def test_a_name_of_timm_that_is_more_than_a_name_is_refused():
    pytest.importorskip("timm", reason="needs timm: pip install -e '.[timm]'")
    with pytest.raises(BackboneError, match="timm cannot make"):
        python_source(architecture("none", 'timm:resnet10t.x", pretrained=True); import os; print("'))


def test_code_of_the_users_own_is_refused_and_not_imported(workplace):
    Path("trap.py").write_text("raise SystemExit('was imported')")
    with pytest.raises(InputError, match="the backbone 'trap:network' is code of your own.*onnx or pt2"):
        python_source(architecture("none", "trap:network"))
    with pytest.raises(InputError, match="the block 'trap:Gate' at 'layer1.0' is code of your own"):
        python_source(architecture("layer1.0=trap:Gate(r=4)"))
    assert "trap" not in sys.modules


@pytest.mark.parametrize(
    ("found", "error", "says"),
    [
        (architecture("none", "resnet19"), BackboneError, "did you mean 'resnet18'"),
        (architecture("layer9=se(r=4)"), PlacementError, "no site 'layer9'"),
        (architecture("layer1.0=se(r=65)"), PlacementError, "site 'layer1.0' with 64 channels: reduction 65"),
        (architecture("layer1.0=cbma(r=4)"), PlacementError, "did you mean 'cbam'"),
        (architecture("layer1.0=spatial(k=999999)"), InputError, "2,000,007,181,645 parameters"),
        (architecture("none", num_classes=1_000_000, backbone="vgg11"), InputError, "parameters; at most"),
    ],
)
def test_what_cannot_be_built_is_refused_in_one_line_and_takes_no_memory(found, error, says):
    with pytest.raises(error) as caught:
        python_source(found)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
