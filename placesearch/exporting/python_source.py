"""An architecture as one readable Python module that a person can paste into a project; it does without placesearch."""

import json
import re
from collections.abc import Sequence

from torch import nn
from torchvision.models import ResNet

from placesearch.errors import InputError
from placesearch.exporting.block_source import (
    CLASSES,
    TEMPLATES,
    WITHOUT_CHANNELS,
    attachment_source,
    block_source,
    needs_math,
)
from placesearch.exporting.building import backbone_without_memory, build_without_memory, look_at
from placesearch.models.architecture import Architecture
from placesearch.models.backbones import stem_of, units_of
from placesearch.models.blocks import BLOCKS
from placesearch.models.code import names_code
from placesearch.models.insertion import factors_of
from placesearch.placement import BlockSetting

_WIDTH = 88
"""Ruff's own line length; lines that are broken by it stay as they are under a longer one."""


def python_source(architecture: Architecture) -> str:
    """Return a Python module with `build(num_classes, weights=None)`, for torch and torchvision alone.

    Its network has the names of parameters and buffers that `architecture.build()` has, so that weights go both ways.
    A backbone of timm needs timm there, too.

    Args:
        architecture: What to write down.

    Raises:
        InputError: If the backbone or a block is code of the user's own, which has no place in it.
        BackboneError: If the backbone cannot be built.
        PlacementError: If the backbone cannot take the placement.
    """
    _refuse_own_code(architecture)
    plain, sites = look_at(architecture)
    factors = factors_of(build_without_memory(architecture, sites))  # refuses what the backbone cannot take
    body, resnet = _backbone(architecture, plain)
    timm = architecture.backbone.startswith("timm:")
    named = {alias: site for site in sites for alias in (site.name, *site.aliases)}
    placed = [(named[name], setting) for name, setting in architecture.placement.items()]
    for site, setting in sorted(placed, key=lambda each: each[0].name.count("."), reverse=True):
        block = _block(setting, site.channels, factors.get(site.name))
        body += _call("attach(", ["model", json.dumps(site.name), block, *(["wrapped=True"] if site.wrapped else [])])
    blocks = {setting.block for setting in architecture.placement.values()}
    channels, height, width = architecture.input_size
    found = architecture.found
    if found and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,39}", found.study):
        found = None
    return TEMPLATES.get_template("module.py.jinja").render(
        title=f"{_plain_backbone(architecture)} with{'' if blocks else 'out'} attention",
        input=f"{channels}x{height}x{width}",
        found=found,
        needs="torch, torchvision and timm" if timm else "torch and torchvision",
        timm=timm,
        resnet=resnet,
        num_classes=architecture.num_classes,
        body=body,
        blocks=sorted(blocks),
        attachment_source=attachment_source(),
        block_source=block_source(blocks, factors=bool(factors)),
        uses_math=needs_math(blocks, factors=bool(factors)),
    )


def _refuse_own_code(architecture: Architecture) -> None:
    end = "of your own, which source code for others cannot hold; export yaml, onnx or pt2"
    if names_code(architecture.backbone):
        raise InputError(f"the backbone '{architecture.backbone}' is code {end}")
    for site, setting in architecture.placement.items():
        if names_code(setting.block):
            raise InputError(f"the block '{setting.block}' at '{site}' is code {end}")


def _plain_backbone(architecture: Architecture) -> str:
    """Return the backbone's name without anything that does not belong into a text."""
    return re.sub(r"[^\w.,\[\]-]", "", architecture.backbone.removeprefix("timm:").partition(".")[0])


def _backbone(architecture: Architecture, plain: nn.Module) -> tuple[list[str], str]:
    """Return the lines that build the backbone, and the class of its residual units if they name it.

    Args:
        architecture: The architecture.
        plain: Its backbone.
    """
    name, resnet = architecture.backbone, ""
    if name.startswith("timm:"):
        arguments = [json.dumps(name.removeprefix("timm:")), "pretrained=False", "num_classes=num_classes"]
        lines = _call("model = timm.create_model(", arguments)
    elif "[" in name and isinstance(plain, ResNet):
        resnet = type(plain.layer1[0]).__name__
        arguments = [resnet, str(list(units_of(plain))), "num_classes=num_classes"]
        arguments += [f"groups={plain.groups}"] if plain.groups != 1 else []
        arguments += [f"width_per_group={plain.base_width}"] if plain.base_width != 64 else []
        lines = _call("model = ResNet(", arguments)
    else:
        arguments = ["weights=None", "num_classes=num_classes"]
        arguments += ["init_weights=True"] if name in ("googlenet", "inception_v3") else []  # else they warn
        lines = _call(f"model = torchvision.models.{name}(", arguments)
    if architecture.stem == "small":
        strided, pooling = stem_of(backbone_without_memory(architecture.model_copy(update={"stem": "original"})))
        if strided is not None:
            lines.append(f"model.get_submodule({json.dumps(strided)}).stride = (1, 1)")
        if pooling is not None:
            lines.append(f"model.set_submodule({json.dumps(pooling)}, nn.Identity())")
    return lines, resnet


def _block(setting: BlockSetting, channels: int, factor: float | None) -> str:
    arguments = [] if setting.block in WITHOUT_CHANNELS else [str(channels)]
    arguments += [f"{name}={getattr(setting, name)}" for name in BLOCKS[setting.block].settings]
    arguments += [f"factor={factor!r}"] if factor is not None else []
    return f"{CLASSES[setting.block][0]}({', '.join(arguments)})"


def _call(head: str, arguments: Sequence[str]) -> list[str]:
    """Return a call in one line, or with one line an argument where it is too long, as ruff writes it."""
    line = f"{head}{', '.join(arguments)})"
    return [line] if len(line) + 4 <= _WIDTH else [head, *(f"    {argument}," for argument in arguments), ")"]
