"""Code that users name as `package.module:function`."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from placesearch.errors import InputError


def names_code(name: str) -> bool:
    """Tell whether a name is `package.module:function`, which means importing that module.

    Example:
        >>> names_code("resnet18"), names_code("timm:resnet18"), names_code("mine.networks:tiny")
        (False, False, True)
    """
    return ":" in name and not name.startswith("timm:")


def import_named(name: str) -> Callable[..., Any]:
    """Import what `package.module:function` names; the current directory is importable.

    Raises:
        InputError: If the module or the function cannot be found.
    """
    module_name, _, function_name = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise InputError(f"cannot import '{module_name}' for '{name}': {type(error).__name__}: {error}") from error
    function: Any = module
    for part in function_name.split("."):
        function = getattr(function, part, None)
    if not callable(function):
        raise InputError(f"module '{module_name}' has no function '{function_name}'")
    return function  # type: ignore[no-any-return]
