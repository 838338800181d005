import json
from pathlib import Path

import jsonschema
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from test_placement import placements

import placesearch.models.architecture
from placesearch.costs import CostTable, profile
from placesearch.costs.latency import measure
from placesearch.errors import BackboneError, InputError, PlacementError
from placesearch.exporting.formats import export
from placesearch.models.architecture import Architecture, Found
from placesearch.models.sites import find_sites
from placesearch.placement import Placement

TEXT = """\
placesearch: 1
backbone: resnet18
num_classes: 10
input_size: [3, 32, 32]
placement:
  - {site: layer4.0.bn2, block: se, reduction: 16}
  - {site: layer3.1.bn2, block: cbam, reduction: 8, kernel_size: 7}
found:
  study: resnet18-digits
  trial: 12
  val_accuracy: 0.981
  macs: 37212345
  params: 11190000
"""


def write(tmp_path, text):
    path = tmp_path / "architecture.yaml"
    path.write_text(text)
    return path


def test_the_file_of_the_documentation_is_read(tmp_path):
    architecture = Architecture.load(write(tmp_path, TEXT))
    assert str(architecture.placement) == "layer3.1.bn2=cbam(r=8,k=7) layer4.0.bn2=se(r=16)"
    assert (architecture.stem, architecture.input_size) == ("original", (3, 32, 32))
    assert architecture.found == Found(
        study="resnet18-digits", trial=12, val_accuracy=0.981, macs=37212345, params=11190000
    )
    assert architecture.build(num_classes=100)(torch.zeros(2, 3, 32, 32)).shape == (2, 100)


@given(placements, st.integers(1, 1000), st.sampled_from(["original", "small"]), st.integers(1, 512))
def test_a_file_reads_back_to_the_same_architecture(tmp_path_factory, placement, classes, stem, side):
    architecture = Architecture(
        backbone="resnet18", stem=stem, num_classes=classes, input_size=(3, side, side), placement=placement
    )
    path = tmp_path_factory.getbasetemp() / "round_trip.yaml"
    architecture.save(path)
    assert Architecture.load(path) == architecture


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("num_classes: 10", "num_classes: 10\ncolour: red", "unknown key 'colour'"),
        ("num_classes: 10", "num_classes: 0", "num-classes"),
        ("num_classes: 10", "num_classes: 99999999999999999999", "num-classes"),
        ("num_classes: 10\n", "", "num-classes"),
        ("[3, 32, 32]", "[3, 32]", "input-size"),
        ("[3, 32, 32]", "[3, 32, 99999999]", "input-size"),
        ("reduction: 16", "reduction: 0", "reduction 0"),
        ("reduction: 16", "reduction: '16'", "reduction '16'"),
        ("reduction: 16", "reductions: 16", "the keys site, block"),
        ("kernel_size: 7", "kernel_size: 6", "site 'layer3.1.bn2': kernel size 6"),
        ("kernel_size: 7", "kernel_size: 16385", "kernel_size 16385"),
        ("layer4.0.bn2", "layer3.1.bn2", "named twice"),
        ("num_classes: 10", "num_classes: 10\nfactors: {layer4.0: 2.0}", "no block at 'layer4.0'"),
        ("num_classes: 10", "num_classes: 10\nfactors: {layer4.0.bn2: .nan}", "factors"),
        ("num_classes: 10", "num_classes: 10\nfactors: {layer4.0.bn2: 0}", "factors"),
        ("placesearch: 1", "placesearch: 2", "newer"),
        ("placesearch: 1\n", "", "no architecture file"),
        ("backbone: resnet18", "backbone: !!python/name:os.system ''", "damaged"),
        ("backbone: resnet18", "backbone: [", "damaged"),
        ("backbone: resnet18", "backbone: os:getcwd", "allow"),
    ],
)
def test_a_file_that_is_slightly_wrong_is_refused_in_one_line(tmp_path, old, new, says):
    with pytest.raises(InputError, match="architecture.yaml") as caught:
        Architecture.load(write(tmp_path, TEXT.replace(old, new)))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_code_that_a_file_names_is_imported_only_if_allowed(workplace):
    text = "placesearch: 1\nbackbone: mine:tiny\nnum_classes: 10\ninput_size: [3, 32, 32]\n"
    path = write(workplace, text)
    with pytest.raises(InputError, match="mine:tiny"):
        Architecture.load(path)
    assert Architecture.load(path, allow=["mine:tiny"]).build()(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


def test_a_block_that_is_code_is_imported_only_if_allowed(workplace):
    text = TEXT.replace("block: se,", "block: 'mine:Gate',")
    path = write(workplace, text)
    with pytest.raises(InputError, match="mine:Gate"):
        Architecture.load(path)
    loaded = Architecture.load(path, allow=["mine:Gate"])
    assert loaded.placement["layer4.0.bn2"].block == "mine:Gate"
    assert Architecture.load(write(workplace, loaded.to_yaml()), allow=["mine:Gate"]) == loaded


def test_a_seed_gives_every_placement_the_same_backbone_weights():
    def built(text, seed):
        placement = Placement.parse(text)
        architecture = Architecture(backbone="resnet18", num_classes=10, input_size=(3, 64, 64), placement=placement)
        return architecture.build(seed=seed).state_dict()

    plain, blocks, other = built("none", 0), built("layer4.1.bn2=se(r=16)", 0), built("none", 1)
    assert all(torch.equal(value, blocks[name]) for name, value in plain.items())
    assert not torch.equal(plain["conv1.weight"], other["conv1.weight"])


def test_a_seed_leaves_the_global_random_numbers_alone():
    architecture = Architecture(
        backbone="resnet18", num_classes=10, input_size=(3, 64, 64), placement=Placement.parse("layer4.1.bn2=se(r=16)")
    )
    before = torch.get_rng_state()
    architecture.build(seed=5)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_placement_that_the_backbone_cannot_take_is_refused():
    architecture = Architecture(
        backbone="resnet18", num_classes=10, input_size=(3, 64, 64), placement=Placement.parse("layer1.0.bn2=se(r=65)")
    )
    with pytest.raises(PlacementError, match="resnet18: site 'layer1.0.bn2' with 64 channels: reduction 65"):
        architecture.build()


PUBLISHED = Path(placesearch.models.architecture.__file__).with_name("architecture.schema.json")


def test_the_published_schema_is_that_of_the_code():
    assert json.loads(PUBLISHED.read_text()) == Architecture.model_json_schema(), (
        "write it again: json.dumps(Architecture.model_json_schema(), indent=2)"
    )


@given(placements, st.integers(1, 1000), st.sampled_from(["original", "small"]), st.integers(1, 512))
def test_files_that_are_written_fulfil_the_published_schema(placement, classes, stem, side):
    architecture = Architecture(
        backbone="resnet18", stem=stem, num_classes=classes, input_size=(3, side, side), placement=placement
    )
    jsonschema.validate(yaml.safe_load(architecture.to_yaml()), json.loads(PUBLISHED.read_text()))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("placesearch: 1\n", ""),
        ("placesearch: 1", "placesearch: 2"),
        ("num_classes: 10", "num_classes: 10\ncolour: red"),
        ("num_classes: 10", "num_classes: 99999999999999999999"),
        ("[3, 32, 32]", "[3, 32]"),
        ("[3, 32, 32]", "[3, 32, 99999999]"),
        ("reduction: 16", "reduction: 0"),
        ("reduction: 16", "reductions: 16"),
        ("kernel_size: 7", "kernel_size: 6"),
        ("kernel_size: 7", "kernel_size: 16385"),
        ("site: layer4.0.bn2, ", ""),
        ("trial: 12", "trial: -1"),
    ],
)
def test_what_the_published_schema_refuses_is_refused_in_loading(tmp_path, old, new):
    schema = json.loads(PUBLISHED.read_text())
    jsonschema.validate(yaml.safe_load(TEXT), schema)
    text = TEXT.replace(old, new)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(yaml.safe_load(text), schema)
    with pytest.raises(InputError):
        Architecture.load(write(tmp_path, text))


GREY = """
import torch
from networks import Unit
from torch import nn


def grey(num_classes):
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), Unit(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes)
    )


def lazy(num_classes):
    return nn.Sequential(
        nn.LazyConv2d(8, 3, padding=1), Unit(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(num_classes)
    )


def compiled(num_classes):
    return torch.compile(grey(num_classes))
"""


@pytest.mark.parametrize("name", ["grey", "lazy", "compiled"])
def test_an_input_of_one_channel_that_is_no_square_works_everywhere(workplace, name):
    (workplace / f"own_{name}.py").write_text(GREY)
    size, backbone = (1, 28, 40), f"own_{name}:{name}"
    site = next(site for site in find_sites(backbone, size) if "residual" in site.kinds)
    assert (site.name, site.channels, site.height, site.width) == ("1.bn2", 8, 28, 40)
    architecture = Architecture(
        backbone=backbone, num_classes=3, input_size=size, placement=Placement.parse("1.bn2=cbam(r=2,k=3)")
    )
    architecture.save("a.yaml")
    assert Architecture.load("a.yaml", allow=[backbone]) == architecture
    model, again = architecture.build(seed=1), architecture.build(seed=1)
    assert all(torch.equal(weight, other) for weight, other in zip(model.parameters(), again.parameters(), strict=True))
    assert model(torch.zeros(2, *size)).shape == (2, 3)
    plain = architecture.model_copy(update={"placement": Placement()}).build()
    cost = profile(model, size)
    assert cost == CostTable(plain, size).cost(architecture.placement)
    assert profile(plain, size).macs == 28 * 40 * 9 * (8 + 2 * 64) + 3 * 8
    assert measure([plain, model], size, device=torch.device("cpu"), seconds=0.01)[1].median_ms > 0
    assert export(architecture, "pt2", "a.pt2").difference < 1e-5


def test_torchvisions_networks_say_how_many_channels_they_want():
    for name in ("resnet18", "googlenet"):
        with pytest.raises(BackboneError, match=r"does not take an input of 1x64x64: .* wants 3 channels, not 1"):
            find_sites(name, (1, 64, 64))
    wide = [(site.height, site.width) for site in find_sites("resnet18", (3, 64, 128)) if "stage" in site.kinds]
    assert wide == [(16, 32), (8, 16), (4, 8), (2, 4)]
