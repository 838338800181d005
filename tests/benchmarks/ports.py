"""Exports to timm and mmdet: the logits of the exported network with copied weights against those of the model here.

For each target, backbone, block and kind of site the block is put at every site of that kind. The model gets random
norms, scales and biases, a pass in train mode settles the statistics of its norms, and its weights go through the
file's own `from_placesearch`; the table shows the largest difference of logits over the largest logit, in eval mode, or
why the target refuses. Backbones are at 64x64. Writes `reports/benchmarks/ports.md`. About 15 minutes on one core.

    python tests/benchmarks/ports.py

Where mmdet can be imported, its registry builds the backbone from the exported config, as a detector would; else a
stand-in does that was written after its documentation, and the table says so. mmdet installs without a compiler by

    pip install --no-deps mmdet==3.3.0 mmengine==0.10.7 mmcv-lite==2.1.0
    pip install addict yapf termcolor terminaltables pycocotools shapely opencv-python-headless matplotlib

The operators of mmcv that need one are replaced by empty classes; no ResNet has any.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import platform
import runpy
import sys
import time
import types
import warnings
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory

import timm
import torch
import torchvision
from torch import nn

from placesearch.config import KINDS
from placesearch.errors import PlacesearchError
from placesearch.exporting.mmdet_source import mmdet_source
from placesearch.exporting.timm_source import timm_source
from placesearch.models.architecture import Architecture
from placesearch.models.backbones import load_backbone
from placesearch.models.sites import every_site
from placesearch.placement import BlockSetting, Placement

SIZE = (3, 64, 64)
BLOCKS = {
    "se": BlockSetting("se", 4),
    "cbam": BlockSetting("cbam", 4, 3),
    "cbam_bn": BlockSetting("cbam_bn", 4, 3),
    "cbam_residual": BlockSetting("cbam_residual", 4, 3),
    "channel": BlockSetting("channel", 4),
    "spatial": BlockSetting("spatial", None, 3),
    "eca": BlockSetting("eca", None, 3),
}
BACKBONES = {
    "timm": [
        ("resnet18", "original"),
        ("resnet18", "small"),
        ("resnet50", "original"),
        ("resnext50_32x4d", "original"),
        ("timm:resnet26t", "small"),
        ("timm:seresnet18", "original"),
        ("timm:regnetx_004", "original"),
        ("timm:mobilenetv3_small_100", "original"),
        ("timm:convnext_atto", "original"),
        ("vgg11", "original"),
    ],
    "mmdet": [
        ("resnet50", "original"),
        ("resnet101", "original"),
        ("resnet152", "original"),
        ("resnext50_32x4d", "original"),
        ("timm:resnet50", "original"),
        ("resnet50", "small"),
        ("resnet18", "original"),
        ("wide_resnet50_2", "original"),
    ],
}
REPORT = Path(__file__).parents[2] / "reports" / "benchmarks" / "ports.md"


@dataclass
class Outcome:
    """How an exported network compares to the model here.

    Args:
        difference: Largest difference of logits over the largest logit, in single precision.
        exact: The same in double precision.
        rounding: The same between the model here in single and in double precision.
        effect: The same between the model and its plain backbone with the same weights: what the blocks do.
        added: How many parameters the exported network has more.
    """

    difference: float
    exact: float
    rounding: float
    effect: float
    added: int


class Registry:
    """What the plug-in files need of mmengine's registry, as documented."""

    def __init__(self):
        self.known = {}

    def register_module(self, force=False):
        def keep(made):
            assert force or made.__name__ not in self.known
            self.known[made.__name__] = made
            return made

        return keep


class _Operators(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds an empty class for whatever is imported from mmcv's compiled operators."""

    def find_spec(self, name, *_):
        if name == "mmcv.ops" or name.startswith("mmcv.ops."):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, *_):
        return None

    def exec_module(self, module):
        def empty(name):
            if name.startswith("__"):
                raise AttributeError(name)
            return type(name, (), {})

        module.__getattr__ = empty


def loaded(source, folder, name):
    """Import a file with this source, under this name."""
    path = Path(folder) / f"{name}.py"
    path.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def registered_name(source):
    """Return the name by which timm knows the network of a file."""
    return source.split('timm.create_model("', 1)[1].split('"', 1)[0]


def settled(model):
    """Give a model random norms, scales and biases, and its norms the statistics of random images."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 1:
                weight.normal_(0, 0.1) if name.endswith("bias") else weight.uniform_(0.1, 0.5)
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.momentum = 1.0
        model.train()(torch.randn(8, *SIZE))
    return model.eval()


def relative(expected, given):
    return float((expected - given).abs().max() / expected.abs().max())


def compare(architecture, exported, convert, logits):
    """Compare a model with a network that was built from its export.

    Args:
        architecture: What was exported.
        exported: The network.
        convert: Makes its weights from those of the model.
        logits: Returns the logits of the network, which may need the model's classifier, for images.
    """
    torch.manual_seed(0)
    model = settled(architecture.build())
    images = torch.randn(2, *architecture.input_size)
    differences, own = [], []
    for precision in (torch.float32, torch.float64):
        x = images.to(precision)
        exported.to(precision).load_state_dict(convert(model.to(precision).state_dict()))
        exported.eval()
        with torch.no_grad():
            expected = model(x)
            own.append(expected.double())
            differences.append(relative(expected, logits(exported, model, x)))
    plain = load_backbone(architecture.backbone, architecture.num_classes, architecture.stem).to(x.dtype)
    weights = {key: weight for key, weight in model.state_dict().items() if ".attention." not in key}
    plain.load_state_dict({key.replace(".inner.", "."): weight for key, weight in weights.items()})
    with torch.no_grad():
        effect = relative(expected, plain.eval()(x))
    sizes = [
        sum(w.numel() for name, w in m.named_parameters() if not name.startswith("fc.")) for m in (model, exported)
    ]
    return Outcome(*differences, relative(own[1], own[0]), effect, sizes[1] - sizes[0])


def compare_timm(architecture, folder):
    """Export to timm, build from its registry, copy the weights, compare."""
    source = timm_source(architecture)
    name = registered_name(source)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Overwriting")  # the same network again
        module = loaded(source, folder, name)
    return compare(architecture, timm.create_model(name), module.from_placesearch, lambda net, _, x: net(x))


class Stages(torchvision.models.ResNet):
    """A ResNet that puts out the maps of its four stages, as the backbone of a detector does."""

    def forward(self, x):
        maps = [self.maxpool(self.relu(self.bn1(self.conv1(x))))]
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            maps.append(stage(maps[-1]))
        return tuple(maps[1:])


def documented_backbone(config, registry):
    """Build the backbone of a config as mmdet's documentation of ResNet and of plug-ins says."""
    config = dict(config)
    kind, depth, plugins = config.pop("type"), config.pop("depth"), config.pop("plugins")
    assert kind in ("ResNet", "ResNeXt")
    assert config.pop("num_stages") == 4
    assert config.pop("style") == "pytorch"  # the strides are in the 3x3 convolutions
    units = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}[depth]
    wide = {"groups": config.pop("groups"), "width_per_group": config.pop("base_width")} if kind == "ResNeXt" else {}
    assert not config, config
    model = Stages(torchvision.models.resnet.Bottleneck, list(units), 1, **wide)
    del model.fc
    for plugin in plugins:
        assert set(plugin) == {"cfg", "stages", "position"}
        assert plugin["position"] == "after_conv3"
        assert len(plugin["stages"]) == 4
        for index, wanted in enumerate(plugin["stages"]):
            for unit in getattr(model, f"layer{index + 1}") if wanted else ():
                arguments = dict(plugin["cfg"])
                made = registry.known[arguments.pop("type")]
                block = made(in_channels=unit.conv3.out_channels, **arguments)
                assert not hasattr(unit, made._abbr_)
                unit.add_module(made._abbr_, block)
                unit.bn3.register_forward_hook(lambda _, __, output, block=block: block(output))
    return model


def documented_mmdet(source, folder):
    """Return the module of a plug-in file and its backbone, built as documented, without mmdet or mmengine."""
    registry = Registry()
    stand_in = types.ModuleType("mmengine.registry")
    stand_in.MODELS = registry
    before = {name: sys.modules.get(name) for name in ("mmengine", "mmengine.registry")}
    sys.modules |= {"mmengine": types.ModuleType("mmengine"), "mmengine.registry": stand_in}
    try:
        module = loaded(source, folder, "placesearch_blocks")
    finally:
        for name, own in before.items():
            del sys.modules[name]
            if own is not None:
                sys.modules[name] = own
    written = Path(folder) / "config.py"
    written.write_text(module.CONFIG, encoding="utf-8")
    config = runpy.run_path(written)
    assert config["custom_imports"]["imports"] == ["placesearch_blocks"]
    return module, documented_backbone(config["model"]["backbone"], registry)


def real_mmdet(source, folder):
    """Return the module of a plug-in file and its backbone, built by mmdet from the config."""
    models = importlib.import_module("mmdet.registry").MODELS
    importlib.import_module("mmdet.models.backbones")
    module = loaded(source, folder, "placesearch_blocks")
    config = importlib.import_module("mmengine.config").Config.fromstring(module.CONFIG, ".py")
    return module, models.build(config.model.backbone)


def compare_mmdet(architecture, folder, make=documented_mmdet):
    """Export to mmdet, build the backbone, copy the weights, put the pooling and classifier here behind it, compare."""
    module, backbone = make(mmdet_source(architecture), folder)

    def logits(net, model, x):
        return model.fc(net(x)[-1].mean((2, 3)))

    return compare(architecture, backbone, module.from_placesearch, logits)


TARGETS = {"timm": compare_timm, "mmdet": compare_mmdet}


@cache
def sites_of(backbone, stem):
    return every_site(backbone, SIZE, stem)


def everywhere(backbone, stem, block, kind):
    """Put a block at every site of a kind."""
    sites = [site.name for site in sites_of(backbone, stem) if kind in site.kinds]
    placement = Placement(dict.fromkeys(sites, BLOCKS[block]))
    return Architecture(backbone=backbone, stem=stem, num_classes=10, input_size=SIZE, placement=placement)


def row(target, backbone, stem, block, reasons, measured):
    """Return a line of the table; notes why cells are refused, and what was measured."""
    cells, compared, known = [], [], {}
    for kind in KINDS:
        architecture = everywhere(backbone, stem, block, kind)
        placement = architecture.placement
        if not placement:
            cells.append("no site")
            continue
        if placement not in known:  # the last map, say, is mostly that of the head as well
            try:
                with TemporaryDirectory() as folder:
                    known[placement] = TARGETS[target](architecture, folder)
            except PlacesearchError as error:
                why = str(error)
                known[placement] = why.split(": ", 1)[1].split("; the closest")[0] if " at site " in why else why
            else:
                measured.append(known[placement])
        outcome = known[placement]
        if isinstance(outcome, Outcome):
            cells.append(f"{outcome.difference:.1e}")
            compared.append((outcome, len(placement)))
        else:
            if outcome not in reasons:
                reasons.append(outcome)
            cells.append(f"refused ({reasons.index(outcome) + 1})")
    if compared:
        exact, rounding = (max(getattr(seen, name) for seen, _ in compared) for name in ("exact", "rounding"))
        more = "/".join(f"{number:g}" for number in sorted({seen.added / blocks for seen, blocks in compared}))
        cells += [f"{exact:.1e}", f"{rounding:.1e}", more]
    else:
        cells += ["", "", ""]
    name = backbone if stem == "original" else f"{backbone}, small stem"
    return f"| {target} | {name} | {block} | {' | '.join(cells)} |"


def main():
    torch.set_num_threads(1)  # small networks, and the machine may be shared
    began = time.monotonic()
    warnings.simplefilter("ignore")
    real = importlib.util.find_spec("mmdet") is not None
    if real:
        sys.meta_path.insert(0, _Operators())
        TARGETS["mmdet"] = partial(compare_mmdet, make=real_mmdet)
    reasons, measured, lines = [], [], []
    for target, backbones in BACKBONES.items():
        for backbone, stem in backbones:
            for block in BLOCKS:
                lines.append(row(target, backbone, stem, block, reasons, measured))
                print(lines[-1], flush=True)
    names = ("mmdet", "mmengine", "mmcv-lite")
    versions = " ".join(f"{name} {importlib.metadata.version(name)}" for name in names) if real else ""
    head = [
        "# Exports to timm and mmdet",
        "",
        f"The block at every site of a kind (r=4, k=3), copied weights, eval mode, {SIZE[1]}x{SIZE[2]}, batch 2, "
        "seed 0, 10 classes, one network a cell: the largest difference of logits over the largest logit, in fp32. "
        f"{sum(seen.difference <= 1e-4 for seen in measured)} of {len(measured)} networks stay within 1e-4, all within "
        f"{max(seen.difference for seen in measured):.1e}; in fp64 all within "
        f"{max(seen.exact for seen in measured):.1e}. What lies above 1e-4 is the rounding of fp32, which deep "
        "networks with these random weights blow up: the last columns show the worst of a row in fp64, the worst "
        "difference of the model here between its own fp32 and fp64, and how many parameters a block has more in the "
        f"target. Without blocks the logits differ by at least {min(seen.effect for seen in measured):.1e}.",
        "",
        f"{platform.machine()}, {torch.get_num_threads()} thread, Python {platform.python_version()}, torch "
        f"{torch.__version__}, torchvision {torchvision.__version__}, timm {timm.__version__}, {versions}, "
        f"{time.monotonic() - began:.0f} s. Made by `python tests/benchmarks/ports.py`.",
        "",
        "timm: built from its registry by name. mmdet: "
        + (
            "built by its registry from the exported config, with mmcv's compiled operators, which no ResNet has, "
            "replaced by empty classes; pooling and classifier are those of the model here."
            if real
            else "not installed; built by a stand-in after its documentation, `documented_backbone`."
        ),
        "",
        f"| target | backbone | block | {' | '.join(KINDS)} | fp64 | own rounding | parameters more |",
        "|---|---|---|" + "---:|" * (len(KINDS) + 3),
    ]
    tail = ["", "Refused:", "", *(f"{index}. {reason}" for index, reason in enumerate(reasons, 1))]
    REPORT.write_text("\n".join([*head, *lines, *tail]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
