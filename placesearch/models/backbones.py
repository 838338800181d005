"""Backbones by name: torchvision's networks and the user's own, with the stem that was asked for."""

import importlib
import re
import warnings

import torchvision
from torch import nn
from torchvision.models import ResNet

from placesearch.errors import BackboneError, did_you_mean
from placesearch.models.code import import_named, names_code
from placesearch.models.copying import copy_of

LARGEST = 500_000_000
"""Parameters that a ResNet with other numbers of units may have, several times those of the largest one."""

_UNITS = re.compile(r"(?P<name>\w+)\[(?P<units>[0-9]{1,3}(?:,[0-9]{1,3}){3})\]")


def load_backbone(name: str, num_classes: int, stem: str = "original") -> nn.Module:
    """Build a backbone with fresh weights from torch's global random numbers.

    Args:
        name: A torchvision name, `timm:NAME` with the extra `timm` installed, or `package.module:function`. The
            function is called with `num_classes=` and returns a module from (batch, channels, height, width) to
            (batch, num_classes); the current directory is importable. A ResNet of torchvision may be given other
            numbers of residual units in its four stages: `resnet18[3,2,2,2]`.
        num_classes: Width of the classifier.
        stem: `original`, or `small` for small images: the first strided convolution gets stride 1 and the first max
            pooling goes.

    Raises:
        BackboneError: If the name is unknown, or its code cannot be called or returns what cannot be copied.
        InputError: If its code cannot be imported.
    """
    if names_code(name):
        model = _call(name, num_classes)
    elif name.startswith("timm:"):
        model = _from_timm(name.removeprefix("timm:"), num_classes)
    elif match := _UNITS.fullmatch(name):
        model = _resnet(match["name"], tuple(map(int, match["units"].split(","))), num_classes)
    else:
        known = torchvision.models.list_models(module=torchvision.models)
        if name not in known:
            raise BackboneError(
                f"unknown backbone '{name}'{did_you_mean(name, known)}; "
                "a backbone is a torchvision classification network, timm:NAME, or your own as package.module:function"
            )
        with warnings.catch_warnings():
            # GoogLeNet and Inception tell that their default initialisation will change; it is the one we want
            warnings.simplefilter("ignore", FutureWarning)
            model = torchvision.models.get_model(name, weights=None, num_classes=num_classes)
    if stem == "small":
        _shrink_stem(model)
    return model


def input_channels(model: nn.Module) -> int:
    """Return how many channels a network's first convolution takes; 3 if it has none.

    Args:
        model: A backbone.

    Example:
        >>> input_channels(nn.Sequential(nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3)))
        1
    """
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    return 3 if first is None or isinstance(first, nn.LazyConv2d) else first.in_channels


def stem_of(model: nn.Module) -> tuple[str | None, str | None]:
    """Return the names of what `stem: small` changes: the first strided convolution and the first max pooling.

    Args:
        model: A backbone with its original stem.

    Example:
        >>> stem_of(load_backbone("resnet18", 10))
        ('conv1', 'maxpool')
    """
    modules = list(model.named_modules())
    strided = next((name for name, m in modules if isinstance(m, nn.Conv2d) and max(m.stride) > 1), None)
    return strided, next((name for name, m in modules if isinstance(m, nn.MaxPool2d)), None)


def units_of(model: ResNet) -> tuple[int, ...]:
    """Return how many residual units each of the four stages has."""
    return tuple(len(stage) for stage in (model.layer1, model.layer2, model.layer3, model.layer4))


def with_units(name: str, units: tuple[int, ...]) -> str:
    """Return the name of a ResNet with other numbers of residual units.

    Example:
        >>> with_units("resnet18", (3, 2, 2, 2))
        'resnet18[3,2,2,2]'
    """
    return f"{name.partition('[')[0]}[{','.join(map(str, units))}]"


def _resnet(name: str, units: tuple[int, ...], num_classes: int) -> ResNet:
    model = load_backbone(name, 1)
    if not isinstance(model, ResNet) or min(units) < 1:
        raise BackboneError(
            f"'{name}' cannot have {','.join(map(str, units))} residual units a stage; a ResNet of torchvision can "
            "have any from 1, as in 'resnet18[3,2,2,2]'"
        )
    stages = (model.layer1, model.layer2, model.layer3, model.layer4)
    params = sum(
        count * sum(weight.numel() for weight in stage[-1].parameters())
        for count, stage in zip(units, stages, strict=True)
    )
    if params > LARGEST:
        raise BackboneError(f"'{with_units(name, units)}' would have {params:,} parameters; allowed are {LARGEST:,}")
    block = type(model.layer1[0])
    return ResNet(block, list(units), num_classes, groups=model.groups, width_per_group=model.base_width)


def _call(name: str, num_classes: int) -> nn.Module:
    function = import_named(name)
    try:
        model = function(num_classes=num_classes)
    except Exception as error:
        raise BackboneError(
            f"'{name}' called with num_classes={num_classes} raised {type(error).__name__}: {error}"
        ) from error
    if not isinstance(model, nn.Module):
        raise BackboneError(f"'{name}' returned {type(model).__name__}; expected a torch.nn.Module")
    return copy_of(model, share=True)  # without what torch.compile put around it, which a search does not train


def _from_timm(name: str, num_classes: int) -> nn.Module:
    try:
        timm = importlib.import_module("timm")
    except ImportError:
        raise BackboneError(f"'timm:{name}' needs timm: pip install 'placesearch[timm]'") from None
    known = timm.list_models()
    if name.split(".")[0] not in known:  # a tag of its pretrained weights may follow
        raise BackboneError(f"timm has no network '{name}'{did_you_mean(name, known)}")
    try:
        return timm.create_model(name, pretrained=False, num_classes=num_classes)  # type: ignore[no-any-return]
    except RuntimeError as error:
        raise BackboneError(f"timm cannot make '{name}': {error}") from None


def _shrink_stem(model: nn.Module) -> None:
    strided, pooling = stem_of(model)
    if strided is not None:
        model.get_submodule(strided).stride = (1, 1)  # type: ignore[assignment]
    if pooling is not None:
        model.set_submodule(pooling, nn.Identity())
