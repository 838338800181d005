from pathlib import Path

import pytest
import torch

import placesearch as ps
from placesearch.errors import BackboneError, PlacementError
from placesearch.models import transfer as module
from placesearch.models.architecture import Found
from placesearch.models.transfer import transfer


def architecture(placement, backbone="resnet18", **changes):
    values = {"num_classes": 10, "input_size": (3, 64, 64), **changes}
    return ps.Architecture(backbone=backbone, placement=ps.Placement.parse(placement), **values)


def everywhere(backbone, kind, text="se(r=16)"):
    sites = [site.name for site in ps.find_sites(backbone, (3, 64, 64)) if kind in site.kinds]
    return " ".join(f"{site}={text}" for site in sites)


def test_blocks_go_to_the_same_kind_at_the_nearest_relative_depth():
    """ResNet-18 has 8 residuals, ResNet-50 has 16: the i-th goes to the one nearest to 15 i / 7."""
    moved = transfer(architecture(everywhere("resnet18", "residual")), "resnet50")
    names = [site.name for site in ps.find_sites("resnet50", (3, 64, 64)) if "residual" in site.kinds]
    wanted = [names[round(15 * index / 7)] for index in range(8)]
    assert [move.new_site for move in moved.moves] == wanted
    assert [move.depth for move in moved.moves] == pytest.approx([index / 7 for index in range(8)])
    assert not any(move.note for move in moved.moves)
    assert moved.architecture.build()(torch.zeros(1, 3, 64, 64)).shape == (1, 10)


def test_ends_of_stages_go_to_ends_of_stages_and_the_last_map_to_the_last_map():
    moved = transfer(architecture("layer2.1=se(r=16) layer4.1=cbam(r=16,k=3)"), "resnet50")
    assert str(moved.architecture.placement) == "layer2.3=se(r=16) layer4.2=cbam(r=16,k=3)"
    assert [move.kind for move in moved.moves] == ["stage", "last"]


@pytest.mark.slow
def test_to_the_same_backbone_nothing_changes():
    for kind in ("residual", "block", "stage", "last"):
        given = architecture(everywhere("resnet18", kind))
        assert transfer(given, "resnet18").architecture == given


def test_where_two_want_one_site_the_other_gets_a_free_neighbour_or_is_dropped():
    """ResNet-50's 16 residuals cannot all go to ResNet-18's 8."""
    moved = transfer(architecture(everywhere("resnet50", "residual"), "resnet50"), "resnet18")
    kept = [move for move in moved.moves if move.new_site]
    dropped = [move for move in moved.moves if not move.new_site]
    assert len(kept) == len({move.new_site for move in kept}) == len(moved.architecture.placement) == 8
    assert len(dropped) == 8
    assert all(move.note.startswith("dropped: layer") for move in dropped)
    assert kept[0].site == "layer1.0.bn3"
    assert kept[-1].site == "layer4.2.bn3"
    moved = transfer(architecture("layer1.0.bn3=se(r=4) layer1.1.bn3=se(r=8)", "resnet50"), "resnet18")
    assert str(moved.architecture.placement) == "layer1.0.bn2=se(r=4) layer1.1.bn2=se(r=8)"
    assert moved.moves[0].note == ""
    assert moved.moves[1].note == "layer1.0.bn2 was taken by layer1.0.bn3"


def place(index, depth):
    return module._Place(ps.Site(f"s{index}", frozenset(), 8, 4, 4), index, depth)


def test_of_two_equally_near_sites_the_earlier_is_taken():
    wish = module._Wish("a", ps.BlockSetting("eca", kernel_size=3), "", 0.5, [place(0, 0.0), place(1, 1.0)], "")
    module._settle([wish])
    assert wish.taken.site.name == "s0"


def test_settings_stay_except_where_they_would_make_no_sense():
    moved = transfer(architecture("layer4.1.bn2=cbam(r=512,k=3) layer1.0.bn2=cbam(r=64,k=31)"), "mobilenet_v2")
    first, last = moved.moves
    channels = {site.name: site.channels for site in ps.find_sites("mobilenet_v2", (3, 64, 64))}
    assert first.new_setting.reduction == channels[first.new_site] == 24
    assert first.new_setting.kernel_size == 31  # 2 * 16 - 1: as large as makes sense on a map of 16x16 pixels
    assert first.note == "r=64 became 24, the number of channels"
    assert last.new_setting.reduction == channels[last.new_site]
    assert last.new_setting.kernel_size == 3
    moved = transfer(architecture("layer1.0.bn2=spatial(k=7)"), "resnet18", input_size=8)
    assert moved.moves[0].new_setting == ps.BlockSetting("spatial", kernel_size=3)
    assert moved.moves[0].note == "k=7 became 3, the largest that meets the map"
    assert moved.architecture.input_size == (3, 8, 8)


@pytest.mark.slow
def test_a_network_without_residuals_gives_a_block_site_instead():
    moved = transfer(architecture("layer1.0.bn2=se(r=16) layer4.1.bn2=se(r=16)"), "vgg11")
    assert [move.note for move in moved.moves] == ["no residual sites there, a block one taken"] * 2
    blocks = [site.name for site in ps.find_sites("vgg11", (3, 64, 64)) if "block" in site.kinds]
    assert [move.new_site for move in moved.moves] == [blocks[0], blocks[-1]]


def test_a_tensor_of_no_kind_goes_by_its_place_among_all():
    moved = transfer(architecture("conv1=se(r=16)"), "resnet18")
    assert str(moved.architecture.placement) == "conv1=se(r=16)"
    assert moved.moves[0].kind == ""


def test_what_belongs_to_the_old_network_is_left_out():
    found = Found(study="s", trial=1, val_accuracy=0.9)
    given = architecture("layer1.0=se(r=16)", factors={"layer1.0": 2.0}, found=found, stem="small")
    moved = transfer(given, "resnet34")
    assert moved.architecture.found is None
    assert moved.architecture.factors == {}
    assert moved.architecture.stem == "small"
    assert len(moved.notes) == 2
    assert transfer(architecture("none"), "resnet34").architecture.placement == ps.Placement()


def test_what_cannot_be_carried_is_refused():
    with pytest.raises(BackboneError, match="did you mean 'resnet50'"):
        transfer(architecture("layer1.0.bn2=se(r=16)"), "resnet5")
    with pytest.raises(BackboneError, match="no feature maps"):
        transfer(architecture("layer1.0.bn2=se(r=16)", input_size=(3, 224, 224)), "vit_b_16")
    with pytest.raises(PlacementError, match="no site 'layer9'"):
        transfer(architecture("layer9=se(r=16)"), "resnet50")


def test_the_command_shows_where_blocks_went_and_writes_the_new_file(workplace, capsys, monkeypatch):
    from test_training_commands import invoke

    monkeypatch.setenv("COLUMNS", "200")
    architecture("layer1.0.bn2=se(r=16) layer4.1.bn2=se(r=8)").save("best.yaml")
    code, out, err = invoke(capsys, monkeypatch, "transfer", "best.yaml", "--backbone", "resnet50")
    assert (code, err) == (0, "")
    assert "layer4.2.bn3" in out
    assert "2 of 2 blocks carried to resnet50 at 3x64x64" in out
    moved = ps.Architecture.load("best-resnet50.yaml")
    assert str(moved.placement) == "layer1.0.bn3=se(r=16) layer4.2.bn3=se(r=8)"
    assert invoke(capsys, monkeypatch, "transfer", "best.yaml", "--backbone", "resnet50")[0] == 0
    Path("best-resnet50.yaml").write_text("mine")
    code, _, err = invoke(capsys, monkeypatch, "transfer", "best.yaml", "--backbone", "resnet50")
    assert (code, err.count("\n")) == (2, 1)
    assert "is there already" in err
    assert Path("best-resnet50.yaml").read_text() == "mine"
    options = ["--backbone", "mine:tiny", "--output", "other.yaml", "--input-size", "32"]
    assert invoke(capsys, monkeypatch, "transfer", "best.yaml", *options)[0] == 0
    assert ps.Architecture.load("other.yaml", ["mine:tiny"]).build()
