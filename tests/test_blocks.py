import inspect

import pytest
import timm.layers
import timm.layers.cbam
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st

from placesearch.errors import PlacementError
from placesearch.models.blocks import (
    BLOCKS,
    CBAM,
    EfficientChannelAttention,
    NormedCBAM,
    ResidualCBAM,
    SqueezeExcitation,
    make_block,
    sensible_settings,
)
from placesearch.placement import BlockSetting


def test_se_equals_torchvision_with_copied_weights():
    ours, theirs = SqueezeExcitation(32, reduction=4), torchvision.ops.SqueezeExcitation(32, 8)
    with torch.no_grad():
        for mine, other in ((ours.reduce, theirs.fc1), (ours.expand, theirs.fc2)):
            other.weight.copy_(mine.weight[:, :, None, None])
            other.bias.copy_(mine.bias)
    x = torch.randn(2, 32, 5, 7)
    torch.testing.assert_close(ours(x), theirs(x))


def copy_linear(ours, theirs):
    """Copy a linear layer into a 1x1 convolution."""
    with torch.no_grad():
        theirs.weight.copy_(ours.weight[:, :, None, None])
        if theirs.bias is not None:
            theirs.bias.copy_(ours.bias)


def test_se_equals_timm_with_copied_weights():
    ours, theirs = SqueezeExcitation(64, reduction=16), timm.layers.SEModule(64, rd_channels=4)
    copy_linear(ours.reduce, theirs.fc1)
    copy_linear(ours.expand, theirs.fc2)
    x = torch.randn(2, 64, 5, 7)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("training", [True, False])
def test_cbam_with_a_norm_equals_timm_with_copied_weights(training):
    ours = NormedCBAM(64, reduction=16, kernel_size=7)
    theirs = timm.layers.cbam.CbamModule(64, rd_channels=4, spatial_kernel_size=7, mlp_bias=True)
    copy_linear(ours.channel.reduce, theirs.channel.fc1)
    copy_linear(ours.channel.expand, theirs.channel.fc2)
    theirs.spatial.conv.conv.load_state_dict(ours.spatial.conv.state_dict())
    ours.spatial.norm.running_mean.fill_(0.2)
    ours.spatial.norm.weight.data.fill_(1.7)
    theirs.spatial.conv.bn.load_state_dict(ours.spatial.norm.state_dict())
    x = torch.randn(2, 64, 9, 8)
    torch.testing.assert_close(ours.train(training)(x), theirs.train(training)(x))


@pytest.mark.parametrize("kernel_size", [3, 5])
def test_eca_equals_timm_with_copied_weights(kernel_size):
    ours = EfficientChannelAttention(kernel_size)
    theirs = timm.layers.EcaModule(kernel_size=kernel_size)
    theirs.conv.load_state_dict(ours.conv.state_dict())
    x = torch.randn(2, 64, 5, 7)
    torch.testing.assert_close(ours(x), theirs(x))


def test_the_residual_form_of_cbam_adds_its_input():
    block = ResidualCBAM(16, reduction=4, kernel_size=3)
    plain = CBAM(16, reduction=4, kernel_size=3)
    plain.load_state_dict(block.state_dict())
    x = torch.randn(2, 16, 5, 7)
    torch.testing.assert_close(block(x), plain(x) + x)


def test_channel_and_spatial_attention_alone_are_the_halves_of_cbam():
    whole = CBAM(16, reduction=4, kernel_size=3)
    channel = make_block(BlockSetting("channel", 4), 16)
    spatial = make_block(BlockSetting("spatial", kernel_size=3), 16)
    channel.load_state_dict(whole.channel.state_dict())
    spatial.load_state_dict(whole.spatial.state_dict())
    x = torch.randn(2, 16, 5, 7)
    torch.testing.assert_close(spatial(channel(x)), whole(x))


@pytest.mark.parametrize("name", BLOCKS)
def test_every_block_keeps_the_shape_lets_gradients_through_and_names_its_source(name):
    settings = {"reduction": 4, "kernel_size": 3}
    given = {setting: settings[setting] for setting in BLOCKS[name].settings}
    block = make_block(BlockSetting(name, **given), 16)
    x = torch.randn(2, 16, 5, 7, requires_grad=True)
    y = block(x)
    assert y.shape == x.shape
    y.square().sum().backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in block.parameters())
    assert x.grad.abs().sum() > 0
    assert "arXiv" in inspect.getdoc(type(block)) or "Source" in inspect.getdoc(type(block))


def test_the_users_own_block_is_taken_by_name(workplace):
    setting = BlockSetting.parse("mine:Gate(r=4)")
    assert str(setting) == "mine:Gate(r=4)"
    block = make_block(setting, 16)
    assert block(torch.ones(1, 16, 2, 2)).shape == (1, 16, 2, 2)
    assert [str(s) for s in sensible_settings("mine:Gate", 16, 8, [4, 8], [3])] == ["mine:Gate(r=4)", "mine:Gate(r=8)"]
    with pytest.raises(PlacementError, match="needs the settings reduction"):
        make_block(BlockSetting.parse("mine:Gate(k=3)"), 16)
    with pytest.raises(PlacementError, match="does not take 'channels'"):
        make_block(BlockSetting.parse("mine:tiny"), 16)


def test_cbam_equals_the_paper_written_out_pixel_by_pixel():
    torch.manual_seed(0)
    block, x = CBAM(4, reduction=2, kernel_size=3), torch.randn(1, 4, 3, 3)
    mlp = torch.nn.Sequential(block.channel.reduce, torch.nn.ReLU(), block.channel.expand)
    mean = torch.tensor([[float(x[0, c].sum()) / 9 for c in range(4)]])
    peak = torch.tensor([[max(x[0, c].flatten().tolist()) for c in range(4)]])
    weighted = x * torch.sigmoid(mlp(mean) + mlp(peak)).view(1, 4, 1, 1)
    expected = torch.empty_like(x)
    kernel, bias = block.spatial.conv.weight[0], block.spatial.conv.bias[0]
    for row in range(3):
        for column in range(3):
            total = bias.clone()
            for dy in (-1, 0, 1):
                for dx in (-1, 0, 1):
                    r, c = row + dy, column + dx
                    if 0 <= r < 3 and 0 <= c < 3:
                        total = total + kernel[0, dy + 1, dx + 1] * weighted[0, :, r, c].mean()
                        total = total + kernel[1, dy + 1, dx + 1] * weighted[0, :, r, c].max()
            expected[0, :, row, column] = weighted[0, :, row, column] * torch.sigmoid(total)
    torch.testing.assert_close(block(x), expected)


@given(channels=st.integers(1, 300), reduction=st.integers(1, 300), half=st.integers(0, 4))
def test_parameter_counts_follow_the_closed_form(channels, reduction, half):
    if reduction > channels:
        with pytest.raises(PlacementError, match=f"1..{channels}"):
            SqueezeExcitation(channels, reduction)
        return
    hidden = channels // reduction
    mlp = 2 * channels * hidden + hidden + channels
    assert count(SqueezeExcitation(channels, reduction)) == mlp
    assert count(CBAM(channels, reduction, 2 * half + 1)) == mlp + 2 * (2 * half + 1) ** 2 + 1


def count(module):
    return sum(weight.numel() for weight in module.parameters())


@pytest.mark.parametrize(
    ("bad", "good"),
    [
        (BlockSetting("sx", 4), BlockSetting("se", 4)),
        (BlockSetting("se"), BlockSetting("se", 1)),
        (BlockSetting("se", 4, 3), BlockSetting("cbam", 4, 3)),
        (BlockSetting("cbam", 4), BlockSetting("cbam", 4, 1)),
        (BlockSetting("se", 9), BlockSetting("se", 8)),
    ],
)
def test_a_setting_that_a_block_cannot_take_is_refused(bad, good):
    make_block(good, channels=8)
    with pytest.raises(PlacementError):
        make_block(bad, channels=8)


def test_the_search_space_leaves_out_what_makes_no_sense():
    def texts(*arguments):
        return [str(setting) for setting in sensible_settings(*arguments)]

    assert texts("se", 64, 8, [4, 8, 16], []) == ["se(r=4)", "se(r=8)", "se(r=16)"]
    assert texts("se", 12, 8, [5, 6, 4], []) == ["se(r=5)", "se(r=4)"]  # 12 // 5 = 12 // 6
    assert texts("se", 8, 8, [4, 16], []) == ["se(r=4)"]  # more than there are channels
    assert texts("cbam", 8, 4, [4], [3, 7, 9]) == ["cbam(r=4,k=3)", "cbam(r=4,k=7)"]  # 9 > 2 * 4 - 1
    assert texts("cbam", 8, 1, [4], [3, 7]) == []
    assert texts("eca", 2, 8, [4], [3, 5]) == ["eca(k=3)"]  # 5 > 2 * 2 - 1 channels
    assert texts("spatial", 8, 4, [4], [3, 9]) == ["spatial(k=3)"]
