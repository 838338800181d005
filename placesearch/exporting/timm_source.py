"""Architectures as Python files that timm can build from its registry, with timm's own blocks."""

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from hashlib import sha256
from string import Template
from textwrap import fill

from torch import nn

from placesearch.errors import BackboneError, PlacementError
from placesearch.exporting.block_source import attachment_source
from placesearch.models.architecture import Architecture
from placesearch.models.backbones import load_backbone
from placesearch.models.blocks import hidden_channels
from placesearch.models.code import names_code
from placesearch.models.insertion import insert, plain_names
from placesearch.models.sites import every_site
from placesearch.placement import BlockSetting

_WIDTH = 120
"""Columns of a line, in this project and in what is written here."""


@dataclass(frozen=True, slots=True)
class Port:
    """A line of the table of timm's blocks.

    Args:
        layer: The class in timm.
        module: Where timm has it.
        arguments: Writes its arguments for a number of channels and a setting.
        gates: How many gates share the factor of our block.
        added: Parameters that timm's block has and ours does not.
    """

    layer: str
    module: str
    arguments: Callable[[int, BlockSetting], list[str]]
    gates: int = 1
    added: int = 0


def _hidden(channels: int, setting: BlockSetting) -> str:
    return f"rd_channels={hidden_channels(channels, setting.reduction or 1)}"


def _squeeze(channels: int, setting: BlockSetting) -> list[str]:
    return [str(channels), _hidden(channels, setting)]


def _both(channels: int, setting: BlockSetting) -> list[str]:
    return [*_squeeze(channels, setting), f"spatial_kernel_size={setting.kernel_size}", "mlp_bias=True"]


def _window(_: int, setting: BlockSetting) -> list[str]:
    return [f"kernel_size={setting.kernel_size}"]


PORTS: dict[str, Port] = {
    "se": Port("SEModule", "timm.layers", _squeeze),
    "cbam": Port("CbamModule", "timm.layers.cbam", _both, gates=2, added=1),
    "cbam_bn": Port("CbamModule", "timm.layers.cbam", _both, gates=2),
    "channel": Port("ChannelAttn", "timm.layers.cbam", lambda *given: [*_squeeze(*given), "mlp_bias=True"]),
    "spatial": Port("SpatialAttn", "timm.layers.cbam", _window, added=1),
    "eca": Port("EcaModule", "timm.layers", _window),
}
"""timm's block for each of ours that it has, by the name in a placement."""

_FAMILIES = {
    r"convnext_(\w+)": r"timm:convnext_\1",
    r"densenet(\d+)": r"timm:densenet\1",
    r"efficientnet_(b\d)": r"timm:efficientnet_\1",
    r"efficientnet_v2_(\w)": r"timm:efficientnetv2_\1",
    r"googlenet|inception_v3": "timm:inception_v3",
    r"mnasnet1_0": "timm:mnasnet_100",
    r"mobilenet_v2": "timm:mobilenetv2_100",
    r"mobilenet_v3_(\w+)": r"timm:mobilenetv3_\1_100",
    r"regnet_([xy])_400mf": r"timm:regnet\g<1>_004",
    r"regnet_([xy])_800mf": r"timm:regnet\g<1>_008",
    r"regnet_([xy])_1_6gf": r"timm:regnet\g<1>_016",
    r"regnet_([xy])_3_2gf": r"timm:regnet\g<1>_032",
    r"regnet_([xy])_8gf": r"timm:regnet\g<1>_080",
    r"regnet_([xy])_16gf": r"timm:regnet\g<1>_160",
    r"regnet_([xy])_32gf": r"timm:regnet\g<1>_320",
    r"vgg(\d+(?:_bn)?)": r"timm:vgg\1",
}
"""torchvision's other families and the nearest network of timm."""

_FILE = Template('''"""$summary

$description

Once this file is imported, timm knows the network, and trained weights of the model that placesearch built fit in:

    model = timm.create_model("$name")
    model.load_state_dict(from_placesearch(state_dict))

With pretrained=True it has timm's weights of the plain backbone and fresh blocks; with features_only=True it gives
feature maps.

$variants
"""

$imports

PLACES$places
"""The sites of the placement, and what the block there is called in this network."""


def _blocks() -> dict[str, nn.Module]:
    return $blocks


@register_model
def $name(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build the network; the arguments are those of timm's $base."""
    defaults = {$defaults}
    model = create_model("$base", pretrained=pretrained, **(defaults | kwargs))
$stem    modules = dict(model.named_modules())
    for name, block in _blocks().items():
        ${owner} = name.rpartition(".")
        if owner not in modules and kwargs.get("features_only", False):
            continue  # it is behind the last feature map that was asked for
        ${placing}
    return model


def from_placesearch(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give the weights of the model that placesearch built the names and shapes that they have here.

    A batch norm that only timm's block has gets what makes it change nothing in eval mode but add the bias of ours.
    Weights of the plain backbone pass as they are.
    """
    converted = {}
    for key, given in state_dict.items():
        site = next((site for site in PLACES if key.startswith(f"{site}.attention.")), None)
        if site is None:
            converted[key] = given
            continue
        own = key.removeprefix(f"{site}.attention.")
        weight = given[:, :, None, None] if given.dim() == 2 else given
        own = own.replace("reduce.", "fc1.").replace("expand.", "fc2.")
        if weight.dim() != 3:  # of ECA's convolution
            own = own.replace("conv.", "conv.conv.").replace("norm.", "conv.bn.")
        name = f"{PLACES[site]}.{own}"
        if not name.endswith("conv.conv.bias"):
            converted[name] = weight
            continue
        norm = name.removesuffix("conv.bias") + "bn."
        converted[norm + "weight"] = torch.full_like(weight, (1 + 1e-5) ** 0.5)
        converted[norm + "bias"] = weight
        converted[norm + "running_mean"] = torch.zeros_like(weight)
        converted[norm + "running_var"] = torch.ones_like(weight)
        converted[norm + "num_batches_tracked"] = torch.tensor(0)
    return converted
$attaching''')

_IN_UNIT = 'setattr(modules[owner], place, block)  # timm\'s residual units apply what they have as "se" themselves'
_ATTACHED = "attach(model, owner, block{wrapped})"
_EITHER = f"""if place == "attention":
            {_ATTACHED}
        else:
            {_IN_UNIT}"""

_GATE = '''

class Gate(nn.Module):
    """A sigmoid times a factor, for blocks that started as the identity."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        """Return `factor` * sigmoid(x)."""
        return self.factor * torch.sigmoid(x)
'''


def timm_source(architecture: Architecture) -> str:
    """Return a Python file that registers the architecture with timm and builds it with timm's own blocks.

    Once the file is imported, `timm.create_model` knows the network by the name in its first lines. At a residual of a
    ResNet a block is what timm's units hold as `se`; at any other site it works on the output of the module that has
    the site's name. The file's function `from_placesearch` gives weights that were trained here timm's names.

    Backbones are torchvision's ResNets, which timm has with the same layers, and all of timm's own. timm's CBAM always
    has a batch norm after the spatial convolution: `cbam` and `spatial` become that variant. It has one parameter more
    and gives, with converted weights, the same logits in eval mode; the file says so.

    Args:
        architecture: What to write.

    Raises:
        BackboneError: If timm does not have the backbone with these layers; the message names the closest.
        PlacementError: If timm does not have a block (`cbam_residual`, a user's own); the message names the site and
            the closest block. Also if the backbone cannot take the placement.

    Example:
        >>> from placesearch.placement import Placement
        >>> architecture = Architecture(
        ...     backbone="resnet18", num_classes=10, input_size=(3, 64, 64),
        ...     placement=Placement.parse("layer4.1.bn2=se(r=16)"),
        ... )
        >>> [line.strip() for line in timm_source(architecture).splitlines() if "SEModule(" in line]
        ['"layer4.1.se": SEModule(512, rd_channels=32),']
    """
    name = architecture.backbone
    for given, setting in architecture.placement.items():
        _check_block(given, setting)
    if names_code(name):
        raise BackboneError(
            f"timm cannot build '{name}', which is code of your own; the closest that it can is 'resnet18'"
        )
    plain = load_backbone(name, architecture.num_classes, architecture.stem)
    if not name.startswith("timm:") and not _is_torchvision_resnet(plain):
        raise BackboneError(
            f"timm cannot stand in for torchvision's '{name}', of which it has no copy with the same layers, "
            f"only for its ResNets; the closest that it can is '{_closest_backbone(name)}'"
        )
    sites = every_site(plain, architecture.input_size) if architecture.placement else []
    model = insert(plain, architecture.placement, sites=sites, share=True)  # refuses what the backbone cannot take
    own_names = {own: name for name, own in reversed(plain_names(model).items())}
    named = {alias: site for site in sites for alias in (site.name, *site.aliases)}
    residuals = _residuals(plain)
    places, blocks, wrapped = {}, {}, []
    placed = [(given, named[given], setting) for given, setting in architecture.placement.items()]
    for given, site, setting in sorted(placed, key=lambda each: each[1].name.count("."), reverse=True):
        own, in_timm = own_names[site.name], _in_timm(site.name, plain)
        place = residuals.get(site.name) or f"{in_timm}.attention"
        places[own] = place if own == site.name else f"{own}.attention"
        wrapped += [f'"{in_timm}"'] if site.wrapped else []
        blocks[place] = _written(setting, site.channels, architecture.factors.get(given, 1.0))
    base, defaults = _base(name)
    defaults = {"num_classes": architecture.num_classes, **defaults}
    height_and_width = "x".join(map(str, architecture.input_size[1:]))
    return _FILE.substitute(
        summary=f"{name} with attention blocks, for timm's registry.",
        description=_wrapped(
            f"Stem {architecture.stem}, images of {height_and_width}, placement: {architecture.placement}"
        ),
        name=_registered_name(architecture),
        variants=_wrapped(_variants(architecture)),
        imports=_imports(architecture, attaches=_attaches(blocks)),
        places=": dict[str, str] = " + _table({site: f'"{place}"' for site, place in places.items()}, ""),
        blocks=_table(blocks, "    "),
        base=base,
        owner="owner, _, _" if blocks and all(place.endswith(".attention") for place in blocks) else "owner, _, place",
        placing=_placing(blocks, wrapped),
        attaching=f"\n\n{attachment_source()}\n" if _attaches(blocks) else "",
        defaults=", ".join(f'"{key}": {value}' for key, value in defaults.items()),
        stem=_small_stem(load_backbone(name, 1)) if architecture.stem == "small" else "",
    )


def _check_block(site: str, setting: BlockSetting) -> None:
    if setting.block in PORTS:
        return
    if setting.block == "cbam_residual":
        closest = BlockSetting("cbam", setting.reduction, setting.kernel_size)
        why = "no block of timm adds its input to what it puts out"
    else:
        closest, why = BlockSetting("se", setting.reduction or 16), "timm has no such block"
    raise PlacementError(
        f"timm cannot build '{setting}' at site '{site}': {why}; the closest that it can is '{closest}'"
    )


def _closest_backbone(name: str) -> str:
    for pattern, nearest in _FAMILIES.items():
        if match := re.fullmatch(pattern, name):
            return match.expand(nearest)
    return "resnet18"


def _is_torchvision_resnet(model: nn.Module) -> bool:
    return (type(model).__module__, type(model).__name__) == ("torchvision.models.resnet", "ResNet")


def _residuals(model: nn.Module) -> dict[str, str]:
    """Return the sites at which timm's residual units take a block themselves, and what it is called there."""
    last = {"BasicBlock": "bn2", "Bottleneck": "bn3"}
    modules = {"torchvision.models.resnet", "timm.models.resnet"}
    return {
        f"{name}.{last[type(unit).__name__]}": f"{name}.se"
        for name, unit in model.named_modules()
        if type(unit).__module__ in modules and type(unit).__name__ in last and getattr(unit, "se", None) is None
    }


def _in_timm(site: str, model: nn.Module) -> str:
    """Return what timm calls a module; in a ResNet only the stem's activation has another name."""
    return "act1" if site == "relu" and _is_torchvision_resnet(model) else site


def _written(setting: BlockSetting, channels: int, factor: float) -> str:
    """Write the call that makes a block."""
    port = PORTS[setting.block]
    gate = [] if factor == 1.0 else [f"gate_layer=partial(Gate, {factor ** (1 / port.gates)!r})"]
    return f"{port.layer}({', '.join([*port.arguments(channels, setting), *gate])})"


def _table(entries: dict[str, str], indent: str) -> str:
    """Write a dictionary whose values are code, with lines broken where a formatter would."""
    if not entries:
        return "{}"
    lines = []
    for key, value in entries.items():
        line = f'{indent}    "{key}": {value},'
        if len(line) > _WIDTH:
            function, _, arguments = value.removesuffix(")").partition("(")
            line = f'{indent}    "{key}": {function}(\n{indent}        {arguments}\n{indent}    ),'
        lines.append(line)
    return "\n".join(["{", *lines, f"{indent}}}"])


def _base(name: str) -> tuple[str, dict[str, object]]:
    """Return the name of the plain network in timm and the arguments with which it is built as here."""
    if name.startswith("timm:"):
        return name.removeprefix("timm:"), {}
    base, _, units = name.partition("[")
    layers = {"layers": f"({', '.join(units.removesuffix(']').split(','))})"} if units else {}
    return base, {**layers, "zero_init_last": False}


def _registered_name(architecture: Architecture) -> str:
    """Return a name that no other network has: the backbone's and a digest of the architecture."""
    identity = architecture.model_copy(update={"found": None}).to_yaml()
    return f"{re.sub(r'[^a-zA-Z0-9]+', '_', architecture.backbone)}_{sha256(identity.encode()).hexdigest()[:8]}"


def _variants(architecture: Architecture) -> str:
    normed = [f"{s}={b}" for s, b in architecture.placement.items() if PORTS[b.block].added]
    if not normed:
        return "Every block is the same in timm, parameter by parameter."
    added = sum(PORTS[setting.block].added for setting in architecture.placement.values())
    return (
        "Not the same in timm, because there a batch norm follows the spatial convolution, instead of a bias: "
        f"{' '.join(normed)}. Each has 1 parameter more than here, together {added}. With weights from "
        "`from_placesearch` the logits are equal in eval mode; training differs."
    )


def _attaches(places: Collection[str]) -> bool:
    return any(place.endswith(".attention") for place in places)


def _placing(places: Collection[str], wrapped: Collection[str]) -> str:
    """Write how a block gets to its place."""
    if not _attaches(places):
        return _IN_UNIT
    way = _ATTACHED if all(place.endswith(".attention") for place in places) else _EITHER
    return way.format(wrapped=f", wrapped=owner in ({', '.join(wrapped)},)" if wrapped else "")


def _imports(architecture: Architecture, *, attaches: bool) -> str:
    layers: dict[str, set[str]] = {}
    for setting in architecture.placement.values():
        port = PORTS[setting.block]
        layers.setdefault(port.module, set()).add(port.layer)
    return "\n".join(
        [
            *(["from collections import OrderedDict"] if attaches else []),
            "from collections.abc import Mapping",
            *(["from functools import partial"] if architecture.factors else []),
            "from typing import Any",
            "",
            "import torch",
            "from timm import create_model",
            *(f"from {module} import {', '.join(sorted(names))}" for module, names in sorted(layers.items())),
            "from timm.models import register_model",
            f"from torch import Tensor, {'fx, ' if attaches else ''}nn",
            *([_GATE] if architecture.factors else []),
        ]
    )


def _small_stem(model: nn.Module) -> str:
    """Write how the stem is made small: the lines for the first strided convolution and the first max pooling."""
    lines, smaller = [], 1
    for path, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and max(module.stride) > 1:
            lines.append(f'    model.get_submodule("{path}").stride = (1, 1)\n')
            smaller *= max(module.stride)
            break
    for path, module in model.named_modules():
        if isinstance(module, nn.MaxPool2d):
            lines.append(f'    model.set_submodule("{path}", nn.Identity())\n')
            smaller *= module.stride if isinstance(module.stride, int) else max(module.stride)
            break
    if smaller > 1:
        lines += [
            '    for feature in getattr(model.feature_info, "info", model.feature_info):\n',
            f'        feature["reduction"] = max(1, feature["reduction"] // {smaller})\n',
        ]
    return "".join(lines)


def _wrapped(text: str) -> str:
    return fill(text, _WIDTH, break_long_words=False, break_on_hyphens=False)
