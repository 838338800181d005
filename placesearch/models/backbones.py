"""Backbones by name: torchvision's networks and the user's own, with the stem that was asked for."""

import importlib
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torchvision
from torch import nn

from placesearch.errors import BackboneError, did_you_mean


def names_code(backbone: str) -> bool:
    """Tell whether a backbone's name is `package.module:function`, which means importing that module.

    Example:
        >>> names_code("resnet18"), names_code("mine.networks:tiny")
        (False, True)
    """
    return ":" in backbone


def load_backbone(name: str, num_classes: int, stem: str = "original") -> nn.Module:
    """Build a backbone with fresh weights from torch's global random numbers.

    Args:
        name: A torchvision name, or `package.module:function`. The function is called with `num_classes=` and
            returns a module from (batch, channels, height, width) to (batch, num_classes); the current directory is
            importable.
        num_classes: Width of the classifier.
        stem: `original`, or `small` for small images: the first strided convolution gets stride 1 and the first max
            pooling goes.

    Raises:
        BackboneError: If the name is unknown, or its code cannot be imported or called.
    """
    if names_code(name):
        model = _call(name, num_classes)
    else:
        known = torchvision.models.list_models(module=torchvision.models)
        if name not in known:
            raise BackboneError(
                f"unknown backbone '{name}'{did_you_mean(name, known)}; "
                "it takes a torchvision classification network or your own as 'package.module:function'"
            )
        with warnings.catch_warnings():
            # GoogLeNet and Inception tell that their default initialisation will change; it is the one we want
            warnings.simplefilter("ignore", FutureWarning)
            model = torchvision.models.get_model(name, weights=None, num_classes=num_classes)
    if stem == "small":
        _shrink_stem(model)
    return model


def import_named(name: str) -> Callable[..., Any]:
    """Import what `package.module:function` names; the current directory is importable.

    Raises:
        BackboneError: If the module or the function cannot be found.
    """
    module_name, _, function_name = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise BackboneError(f"cannot import '{module_name}' for '{name}': {type(error).__name__}: {error}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise BackboneError(f"module '{module_name}' has no function '{function_name}'")
    return function  # type: ignore[no-any-return]


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
    return model


def _shrink_stem(model: nn.Module) -> None:
    strided = next((m for m in model.modules() if isinstance(m, nn.Conv2d) and max(m.stride) > 1), None)
    if strided is not None:
        strided.stride = (1, 1)
    pooling = next((name for name, m in model.named_modules() if isinstance(m, nn.MaxPool2d)), None)
    if pooling is not None:
        model.set_submodule(pooling, nn.Identity())
