"""What people do to a network with blocks: each time the blocks are still there and work, or it raises."""

import copy
import importlib
import pickle
import sys

import pytest
import timm.layers
import torch
import torch.nn.utils.prune
import torchvision
from networks import Tiny
from timm.utils.model import freeze_batch_norm_2d
from torch import nn
from torch.fx.experimental import optimization

from placesearch.errors import PlacementError
from placesearch.exporting.python_source import python_source
from placesearch.models.architecture import Architecture
from placesearch.models.attachment import attach
from placesearch.models.insertion import insert
from placesearch.placement import Placement

SIZE = (3, 32, 32)
RESNET = Architecture(
    backbone="resnet18[1,1,1,1]",
    num_classes=4,
    input_size=SIZE,
    placement=Placement.parse("layer1.0.bn2=se(r=4) layer4.0.bn2=cbam(r=4,k=3) layer2.0=eca(k=3)"),
)


def settled(model):
    """Give norms statistics and weights that matter, and take eval mode."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
    return model.eval()


@pytest.fixture(scope="module", params=["built", "exported"])
def model(request, tmp_path_factory):
    """The same network, as it is built here and as its exported source builds it."""
    built = settled(RESNET.build(seed=0))
    if request.param == "built":
        yield built
        return
    folder = tmp_path_factory.mktemp("exported")
    (folder / "exported_network.py").write_text(python_source(RESNET))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        theirs = importlib.import_module("exported_network").build()
        theirs.load_state_dict(built.state_dict())
        yield theirs.eval()
        del sys.modules["exported_network"]


def affine_norms(module):
    """Put other norms in the place of batch norms, by the usual recursion; they compute the same in eval mode."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, Affine(child))
        else:
            affine_norms(child)
    return module


class Affine(nn.Module):
    """What a batch norm is in eval mode."""

    def __init__(self, norm):
        super().__init__()
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        self.scale, self.shift = (nn.Parameter(w.detach()) for w in (scale, norm.bias - norm.running_mean * scale))

    def forward(self, x):
        return x * self.scale[:, None, None] + self.shift[:, None, None]


def fused_by_hand(model):
    for unit in (model.layer1[0], model.layer2[0], model.layer4[0]):
        unit.conv2 = nn.utils.fuse_conv_bn_eval(unit.conv2, unit.bn2)
        unit.bn2 = nn.Identity()
    return model


def fused_in_the_dictionary(model):
    """Do as mmcv does, which does not call setattr."""
    for unit in (model.layer1[0], model.layer2[0], model.layer4[0]):
        unit._modules["conv2"] = nn.utils.fuse_conv_bn_eval(unit.conv2, unit.bn2)
        unit._modules["bn2"] = nn.Identity()
    return model


def set_as_submodules(model):
    for name in ("layer1.0.bn2", "layer4.0.bn2"):
        model.set_submodule(name, Affine(model.get_submodule(name)))
    return model


def fused_for_quantization(model):
    pairs = [[f"layer{stage}.0.conv{number}", f"layer{stage}.0.bn{number}"] for stage in (1, 4) for number in (1, 2)]
    return torch.ao.quantization.fuse_modules(model, pairs)


def fused_for_training(model):
    fused = torch.ao.quantization.fuse_modules_qat(model.train(), [["layer1.0.conv2", "layer1.0.bn2"]])
    return fused.eval()


def wrapped_in_place(model):
    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, x):
            return self.module(x)

    model.layer1[0].bn2 = Wrapper(model.layer1[0].bn2)
    model.layer2[0] = Wrapper(model.layer2[0])
    return model


def moved(model):
    model.layer2.insert(0, nn.Identity())
    return model


def pruned(model):
    torch.nn.utils.prune.identity(model.layer1[0].bn2, "weight")
    return model


def parametrized(model):
    nn.utils.parametrize.register_parametrization(model.layer1[0].bn2, "weight", nn.Identity())
    return model


CONVERTERS = {
    "nothing": lambda m: m,
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),  # noqa: S301 - made right here
    "SyncBatchNorm": nn.SyncBatchNorm.convert_sync_batchnorm,
    "SyncBatchNorm of timm": timm.layers.convert_sync_batchnorm,
    "frozen norms of timm": freeze_batch_norm_2d,
    "other norms": affine_norms,
    "set_submodule": set_as_submodules,
    "SyncBatchNorm, frozen": lambda m: freeze_batch_norm_2d(nn.SyncBatchNorm.convert_sync_batchnorm(m)),
    "other norms, pickle, SyncBatchNorm": lambda m: nn.SyncBatchNorm.convert_sync_batchnorm(
        pickle.loads(pickle.dumps(affine_norms(m)))  # noqa: S301
    ),
    "fused by hand": fused_by_hand,
    "fused in the dictionary": fused_in_the_dictionary,
    "fused by hand in a copy": lambda m: fused_by_hand(copy.deepcopy(m)),
    "fx": torch.fx.symbolic_trace,
    "fx fuse": optimization.fuse,
    "fx fuse of a copy of a copy": lambda m: optimization.fuse(copy.deepcopy(torch.fx.symbolic_trace(m))),
    "ao fuse_modules": fused_for_quantization,
    "ao fuse_modules, fx fuse": lambda m: optimization.fuse(fused_for_quantization(m)),
    "ao fuse_modules_qat": fused_for_training,
    "fx fuse, other norms": lambda m: affine_norms(optimization.fuse(m)),
    "wrapped": wrapped_in_place,
    "moved": moved,
    "pruned": pruned,
    "pruned, fx": lambda m: torch.fx.symbolic_trace(pruned(m)),
    "parametrized": parametrized,
    "parametrized, fx": lambda m: torch.fx.symbolic_trace(parametrized(m)),
    "traced": lambda m: torch.jit.trace(m, torch.zeros(1, *SIZE)),
    "replica": lambda m: m._replicate_for_data_parallel(),
    "applied": lambda m: m.apply(lambda module: module.requires_grad_(True)),
    "channels last": lambda m: m.to(memory_format=torch.channels_last),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", CONVERTERS)
def test_blocks_survive_what_is_done_to_the_network(model, name):
    x = torch.randn(2, *SIZE)
    expected = model(x).detach()
    plain = RESNET.model_copy(update={"placement": Placement()}).build()
    plain.load_state_dict(model.state_dict(), strict=False)
    assert not torch.allclose(plain.eval()(x), expected, atol=1e-3)
    converted = CONVERTERS[name](copy.deepcopy(model))
    torch.testing.assert_close(converted(x).detach(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["nothing", "deepcopy", "SyncBatchNorm", "fused by hand", "fx"])
def test_each_block_runs_once(model, name):
    converted, ran = CONVERTERS[name](copy.deepcopy(model)), []
    for site in ("layer1.0.bn2", "layer4.0.bn2", "layer2.0"):
        block = converted.get_submodule(site).attention
        for part in (part for part in block.modules() if isinstance(part, nn.Conv1d | nn.Conv2d)):
            part.register_forward_hook(lambda *_, site=site: ran.append(site))
        if hasattr(block, "expand"):
            block.expand.register_forward_hook(lambda *_, site=site: ran.append(site))
    converted(torch.randn(2, *SIZE))
    assert sorted(ran) == ["layer1.0.bn2", "layer2.0", "layer4.0.bn2"]


def error_of(model):
    """Return the error of the package, or of exported source."""
    return RuntimeError if "exported" in type(block_of_site(model)).__module__ else PlacementError


def block_of_site(model):
    return model.layer1[0].bn2.attention


def test_what_would_lose_a_block_is_refused(model):
    changed, error = copy.deepcopy(model), error_of(model)
    unit = changed.layer1[0]
    for lose in (
        lambda: delattr(unit, "bn2"),
        lambda: unit._modules.pop("bn2"),
        lambda: setattr(unit, "bn2", None),
        lambda: delattr(changed.layer2, "0"),
    ):
        with pytest.raises(
            error, match="cannot be removed: it carries an attention block; delete '.*.attention'"
        ) as caught:
            lose()
        assert "\n" not in str(caught.value)
    del unit.bn2.attention
    del unit.bn2
    assert "bn2" not in dict(unit.named_children())


def test_a_layer_does_not_become_one_with_what_follows_past_its_block():
    plain = settled(torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=4))
    model = insert(
        plain, Placement.parse("layer1.0.conv2=se(r=4) layer2.0.bn1=se(r=4)"), input_size=SIZE, seed=0
    ).eval()
    x = torch.randn(2, *SIZE)
    unit = copy.deepcopy(model).layer1[0]
    with pytest.raises(PlacementError, match="'conv2' cannot become one with what follows"):
        unit.conv2 = nn.utils.fuse_conv_bn_eval(unit.conv2, unit.bn2)
    for names in (["layer1.0.conv2", "layer1.0.bn2"], ["layer2.0.conv1", "layer2.0.bn1", "layer2.0.relu"]):
        with pytest.raises(PlacementError, match="cannot become one with what follows"):
            torch.ao.quantization.fuse_modules(model, [names])
        with pytest.raises(PlacementError, match="cannot become one with what follows"):
            torch.ao.quantization.fuse_modules_qat(copy.deepcopy(model).train(), [names])
    torch.testing.assert_close(optimization.fuse(model)(x), model(x), rtol=1e-4, atol=1e-5)


class Choosy(nn.Module):
    """A block of the user's own that torch.fx cannot trace."""

    def forward(self, x):
        return 2 * x if x.sum() > 1 else x


def test_a_block_that_cannot_be_traced_is_one_operation():
    model = Tiny(4).eval()
    attach(model, "unit1.bn2", Choosy())
    x = torch.randn(2, *SIZE)
    for traced in (torch.fx.symbolic_trace(model), optimization.fuse(model)):
        torch.testing.assert_close(traced(x), model(x), rtol=1e-4, atol=1e-5)
        assert type(traced.unit1.bn2.attention) is Choosy
