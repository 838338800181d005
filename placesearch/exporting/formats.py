"""The one table of formats, and `export`, which writes a file in any of them.

Adding a format means a module with its function, a line in `FORMATS` and a test file.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
from torch import nn

from placesearch.errors import InputError, did_you_mean
from placesearch.exporting.building import build_for_export
from placesearch.exporting.mmdet_source import mmdet_source
from placesearch.exporting.onnx_program import needed, onnx_program
from placesearch.exporting.python_source import python_source
from placesearch.exporting.timm_source import timm_source
from placesearch.exporting.torch_program import torch_program
from placesearch.models.architecture import Architecture
from placesearch.models.graph import InputSize
from placesearch.models.outputs import put_out_logits
from placesearch.reporting.writing import replace_file


@dataclass(frozen=True, slots=True)
class Format:
    """A line of the table of formats: a text that tells how to build the network, or a program that holds its weights.

    Args:
        what: What it is, for the help.
        suffix: How the names of its files end.
        text: Returns the text; it gets the architecture. Given weights then go into a file of safetensors beside it.
        program: Returns the content and how much its logits differ; it gets the network and the size of an image.
        check: Raises an InputError if something that the format needs is missing.
    """

    what: str
    suffix: str
    text: Callable[[Architecture], str] | None = None
    program: Callable[[nn.Module, InputSize], tuple[bytes, float]] | None = None
    check: Callable[[], object] | None = None


FORMATS: dict[str, Format] = {
    "yaml": Format("the architecture file", ".yaml", text=Architecture.to_yaml),
    "py": Format("a module for torch and torchvision alone", ".py", text=python_source),
    "onnx": Format("a program for any runtime of ONNX", ".onnx", program=onnx_program, check=needed),
    "pt2": Format("a program for torch.export.load", ".pt2", program=torch_program),
    "timm": Format("a module that registers the network with timm", "_timm.py", text=timm_source),
    "mmdet": Format("blocks and settings as plugins of mmdet's ResNets", "_mmdet.py", text=mmdet_source),
}
"""Every format by the name it has on the command line."""


@dataclass(frozen=True, slots=True)
class Exported:
    """What an export wrote.

    Args:
        files: The file, and the one with the weights beside it, if there is one.
        replaced: Which of them were there before.
        difference: By how much the logits of a program differ from the network's, relative to the largest; None for a
            text.
    """

    files: tuple[Path, ...]
    replaced: tuple[Path, ...]
    difference: float | None = None


def format_named(name: str) -> Format:
    """Return the line of a format in the table, once everything that it needs is known to be there.

    Raises:
        InputError: If there is no such format, or a package is missing.
    """
    if name not in FORMATS:
        raise InputError(f"unknown format '{name}'{did_you_mean(name, FORMATS)}; known: {', '.join(FORMATS)}")
    found = FORMATS[name]
    if found.check is not None:
        found.check()
    return found


def export(architecture: Architecture, format: str, path: str | Path, *, weights: str | Path | None = None) -> Exported:
    """Write an architecture for other programs. A file appears whole or not at all.

    Args:
        architecture: What to write.
        format: `yaml`, the architecture file; `py`, a Python module for torch and torchvision alone; `onnx`, with the
            extra of this name; `pt2`, for `torch.export.load`; `timm` and `mmdet`, Python modules that these load.
            Programs (onnx, pt2) take any number of images, and are run and compared with the network before they are
            written.
        path: Where to; what is there is replaced.
        weights: A file with the weights of this very architecture, all of them: safetensors, or what `torch.save` wrote
            of its `state_dict`. A program holds them; beside a text they are written as safetensors under its name.
            None: a program has fresh ones.

    Returns:
        What was written.

    Raises:
        InputError: If there is no such format, a package is missing, the architecture cannot be expressed in it, the
            weights are others, a program computes something else than the network, or nothing can be written.

    Example:
        >>> architecture = Architecture(backbone="resnet18", num_classes=10, input_size=(3, 64, 64))
        >>> export(architecture, "py", getfixture("tmp_path") / "network.py").files[0].name
        'network.py'
    """
    found, path = format_named(format), Path(path)
    if path.is_dir() or not path.parent.is_dir():
        raise InputError(f"cannot write {path}: {'it is a folder' if path.is_dir() else f'no folder {path.parent}'}")
    size, contents, differs = architecture.input_size, {}, None
    if found.program is not None:
        model = build_for_export(architecture, weights)
        put_out_logits(model, size, architecture.num_classes)
        contents[path], differs = found.program(model, size)
    elif found.text is not None:
        contents[path] = found.text(architecture).encode()
        if weights is not None:
            tensors = build_for_export(architecture, weights).state_dict()
            name = path.name.removesuffix(found.suffix)
            beside = path.with_name((name if name != path.name else path.stem) + ".safetensors")
            if not (beside.exists() and beside.samefile(weights)):
                contents[beside] = safetensors.torch.save({name: t.contiguous().clone() for name, t in tensors.items()})
    return Exported(tuple(contents), _write(contents), differs)


def _write(contents: dict[Path, bytes]) -> tuple[Path, ...]:
    """Write files, each whole or not at all; return which of them were there before."""
    try:
        replaced = tuple(path for path in contents if path.exists())
        for path, content in contents.items():
            replace_file(path, content)
    except OSError as error:
        raise InputError(f"cannot write {next(iter(contents))}: {error.strerror or error}") from None
    return replaced
