"""Architectures as plug-ins for the backbones of mmdetection (mmdet 3)."""

from collections import Counter
from collections.abc import Sequence
from itertools import product
from string import Template
from textwrap import fill

from placesearch.errors import BackboneError, PlacementError
from placesearch.exporting.block_source import CLASSES, WITHOUT_CHANNELS, block_source, needs_math
from placesearch.models.architecture import Architecture
from placesearch.models.backbones import load_backbone
from placesearch.models.insertion import insert
from placesearch.models.sites import every_site
from placesearch.placement import BlockSetting, Placement

_STAGES = ("layer1", "layer2", "layer3", "layer4")
_WIDTH = 120
"""Columns of a line, in this project and in what is written here."""

BACKBONES = {
    "resnet50": 'type="ResNet", depth=50',
    "resnet101": 'type="ResNet", depth=101',
    "resnet152": 'type="ResNet", depth=152',
    "resnext50_32x4d": 'type="ResNeXt", depth=50, groups=32, base_width=4',
    "resnext101_32x8d": 'type="ResNeXt", depth=101, groups=32, base_width=8',
    "resnext101_64x4d": 'type="ResNeXt", depth=101, groups=64, base_width=4',
}
"""The backbones in which mmdet takes plug-ins, torchvision's name first, and how its config says it."""

_PLUG_IN = Template('''@MODELS.register_module(force=True)
class Placesearch$name($name):
    """$name as a plug-in."""

    _abbr_ = "attention"

    def __init__(self, **settings: Any) -> None:
        $channels
        super().__init__($arguments)''')

_PLUGIN = """\
            dict(
                cfg=dict({call}),
                stages={stages},
                position="after_conv3",
            ),
"""

_FILE = Template('''"""Attention blocks in the backbone $backbone of a detector of mmdet 3, as plug-ins.

$placement

Save this file as placesearch_blocks.py where Python finds it, and add to the detector's config what CONFIG says. A
plug-in goes to all residual units of a stage, after the last norm and before the addition. Trained weights of the model
that placesearch built fit the backbone after from_placesearch: save them, and name the file in the backbone's
init_cfg=dict(type="Pretrained", checkpoint=...).
"""

$imports

CONFIG = """
custom_imports = dict(imports=["placesearch_blocks"], allow_failed_imports=False)
model = dict(
    backbone=dict(
        $type,
        num_stages=4,
        style="pytorch",
        plugins=[$plugins],
    ),
)
"""


${classes}def from_placesearch(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give the weights of the model that placesearch built the names in mmdet's backbone, which has no classifier."""
    return {
        key.replace(".bn3.attention.", ".attention."): weight
        for key, weight in state_dict.items()
        if not key.startswith("fc.")
    }
''')


def mmdet_source(architecture: Architecture) -> str:
    """Return a Python file with the placement's blocks as plug-ins of mmdetection, and the config that places them.

    The file needs torch and mmengine. Its `CONFIG` is the part of a detector's config that says which plug-in goes to
    which stages; its function `from_placesearch` gives weights that were trained here mmdet's names. The backbone of a
    detector has no classifier, so that number of classes and input size play no part.

    mmdet takes plug-ins in bottleneck ResNets only. Of its three positions, the one after the third convolution and its
    norm is that of a residual; a plug-in goes to all residual units of a stage.

    Args:
        architecture: What to write.

    Raises:
        BackboneError: If mmdet takes no plug-ins in the backbone, or does not have its stem; the message names the
            closest that it has.
        PlacementError: If a block is a user's own, a site is no residual, or the residuals of a stage differ. The
            message names the site, the reason and the closest placement that mmdet can build: where the units of a
            stage differ, what most of them have. Also if the backbone cannot take the placement.

    Example:
        >>> architecture = Architecture(
        ...     backbone="resnet50", num_classes=10, input_size=(3, 64, 64),
        ...     placement=Placement.parse("layer4.0.bn3=se(r=8) layer4.1.bn3=se(r=8) layer4.2.bn3=se(r=8)"),
        ... )
        >>> lines = [line.strip() for line in mmdet_source(architecture).splitlines()]
        >>> [line for line in lines if line.startswith(("cfg", "stages"))]
        ['cfg=dict(type="PlacesearchSqueezeExcitation", reduction=8),', 'stages=(False, False, False, True),']
    """
    backbone = _backbone(architecture)
    for site, setting in architecture.placement.items():
        if setting.block not in CLASSES:
            raise PlacementError(
                f"mmdet cannot build '{setting}' at site '{site}': the file would have to hold your own code; "
                f"the closest that it can is '{BlockSetting('se', setting.reduction or 16)}'"
            )
    plain = load_backbone(architecture.backbone, 1)
    sites = every_site(plain, architecture.input_size) if architecture.placement else []
    insert(plain, architecture.placement, sites=sites, share=True)  # refuses what the backbone cannot take
    named = {alias: site.name for site in sites for alias in (site.name, *site.aliases)}
    placement = Placement({named[given]: setting for given, setting in architecture.placement.items()})
    factors = {named[given]: factor for given, factor in architecture.factors.items()}
    residuals = [[f"{name}.{unit}.bn3" for unit, _ in plain.get_submodule(name).named_children()] for name in _STAGES]
    _check_sites(placement, factors, residuals)
    stages: dict[str, list[bool]] = {}
    for index, (first, *_) in enumerate(residuals):
        if first in placement:
            stages.setdefault(_call(placement[first], factors.get(first, 1.0)), [False] * len(_STAGES))[index] = True
    plugins = [_PLUGIN.format(call=call, stages=tuple(which)) for call, which in stages.items()]
    used = sorted({setting.block for setting in placement.values()})
    has_factors = bool(factors)
    parts = [block_source(used, factors=has_factors)] if used else []
    parts += [_plug_in(block) for block in used]
    return _FILE.substitute(
        backbone=architecture.backbone,
        placement=fill(f"Placement: {architecture.placement}", _WIDTH, break_long_words=False, break_on_hyphens=False),
        imports=_imports(used, factors=has_factors),
        type=backbone.replace(", ", ",\n        "),
        plugins="\n" + "".join(plugins) + "        " if plugins else "",
        classes="".join(f"{part}\n\n\n" for part in parts),
    )


def _plug_in(block: str) -> str:
    """Write the class that mmdet knows: that of the block, told the channels where it asks for them."""
    channels, arguments = 'in_channels = settings.pop("in_channels")', "in_channels, **settings"
    if block in WITHOUT_CHANNELS:
        channels, arguments = 'settings.pop("in_channels")', "**settings"
    return _PLUG_IN.substitute(name=CLASSES[block][0], channels=channels, arguments=arguments)


def _imports(blocks: Sequence[str], *, factors: bool) -> str:
    if not blocks:
        return "from collections.abc import Mapping\n\nfrom torch import Tensor"
    lines = ["import math"] if needs_math(blocks, factors=factors) else []
    lines += ["from collections.abc import Mapping", "from typing import Any", "", "import torch"]
    return "\n".join([*lines, "from mmengine.registry import MODELS", "from torch import Tensor, nn"])


def _backbone(architecture: Architecture) -> str:
    """Return how a config names the backbone; refuse what mmdet does not have."""
    name = architecture.backbone
    same = name.removeprefix("timm:").partition(".")[0]  # timm's tags tell pretrained weights apart, not networks
    if same not in BACKBONES:
        depth = next((depth for depth in ("101", "152") if depth in name), "50")
        closest = [f"resnext{depth}_32x4d", f"resnext{depth}_32x8d"] if "resnext" in name else []
        closest = [known for known in (*closest, f"resnet{depth}") if known in BACKBONES]
        raise BackboneError(
            f"mmdet takes no plug-ins in '{name}', only in the bottleneck ResNets {', '.join(BACKBONES)}; "
            f"the closest that it can is '{closest[0]}'"
        )
    if architecture.stem != "original":
        raise BackboneError(
            f"mmdet cannot build '{name}' with stem '{architecture.stem}': the strides of its stem are fixed; "
            "the closest that it can is stem 'original'"
        )
    return BACKBONES[same]


def _check_sites(placement: Placement, factors: dict[str, float], residuals: list[list[str]]) -> None:
    """Refuse sites that are no residuals, and stages whose residuals differ."""
    for site in placement:
        if not any(site in stage for stage in residuals):
            raise _refused(site, "a plug-in of mmdet only goes right before the addition", placement, residuals)
    for stage in residuals:
        for site, other in product(stage, stage):
            here, there = (placement.get(name) for name in (site, other))
            if here is None or (here, factors.get(site)) == (there, factors.get(other)):
                continue
            has = (
                "no block"
                if there is None
                else f"'{there}'"
                if there != here
                else "a gate with another factor, which ps.fold makes 1"
            )
            why = f"a plug-in of mmdet goes to all residual units of a stage, and site '{other}' has {has}"
            raise _refused(site, why, placement, residuals)


def _refused(site: str, why: str, placement: Placement, residuals: list[list[str]]) -> PlacementError:
    closest = _closest(placement, residuals)
    return PlacementError(
        f"mmdet cannot build '{placement[site]}' at site '{site}': {why}; the closest that it can is '{closest}'"
    )


def _closest(placement: Placement, residuals: list[list[str]]) -> Placement:
    """Move each block to the residual of its unit, then give each stage what most of its units have.

    If all stages lost their blocks that way, the one in which most units have one gets it everywhere.
    """
    counts = []
    for stage in residuals:
        settings = []
        for site in stage:
            unit = site.removesuffix(".bn3")
            moved = [setting for name, setting in placement.items() if f"{name}.".startswith(f"{unit}.")]
            settings.append(placement.get(site) or next(iter(moved), None))
        counts.append(Counter(settings).most_common())
    most = [max(count, key=lambda pair: (pair[1], pair[0] is not None))[0] for count in counts]
    if not any(most):
        shares = [
            (number / len(stage), index, setting)
            for index, (stage, count) in enumerate(zip(residuals, counts, strict=True))
            for setting, number in count
            if setting is not None
        ]
        for _, index, setting in sorted(shares, key=lambda share: share[:2])[-1:]:
            most[index] = setting
    return Placement(
        {site: setting for stage, setting in zip(residuals, most, strict=True) if setting for site in stage}
    )


def _call(setting: BlockSetting, factor: float) -> str:
    """Write the arguments of a plug-in in the config."""
    numbers = {"reduction": setting.reduction, "kernel_size": setting.kernel_size}
    arguments = [f"{name}={value}" for name, value in numbers.items() if value is not None]
    return ", ".join(
        [f'type="Placesearch{CLASSES[setting.block][0]}"', *arguments, *([f"factor={factor!r}"] * (factor != 1.0))]
    )
