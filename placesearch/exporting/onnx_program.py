"""A network as an ONNX file, which runs wherever there is a runtime for ONNX. Needs the extra `onnx`."""

import importlib
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from placesearch.errors import InputError, reason_of
from placesearch.exporting.checking import check_program
from placesearch.exporting.torch_program import exported_program
from placesearch.models.graph import InputSize

MOST_BYTES = 2**31 - 1
"""Of weights in one file: protobuf, in which ONNX is written, holds no more."""


def onnx_program(model: nn.Module, input_size: InputSize) -> tuple[bytes, float]:
    """Return a network as an ONNX file with input `image` and output `logits`, for any number of images.

    It is checked by running it with onnxruntime.

    Args:
        model: The network, in eval mode.
        input_size: Channels, height and width of an image.

    Returns:
        The file's content, and by how much its logits differ from the network's, relative to the largest.

    Raises:
        InputError: If a package is missing, the network cannot be exported, or the program computes something else.
    """
    runtime = needed()
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    if size > MOST_BYTES:
        raise InputError(f"the network has {size / 2**30:.1f} GiB of weights, an ONNX file holds 2; export pt2")
    seen = exported_program(model, input_size)
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # it tells on stderr which devices it looked for
    try:
        content = _written(seen)
        session = runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # noqa: BLE001 - an operator without a counterpart, each in its own way
        raise InputError(f"{type(model).__name__} cannot be written as ONNX: {reason_of(error)}") from None

    def run(x: Tensor) -> Tensor:
        return torch.from_numpy(session.run(["logits"], {"image": x.numpy()})[0])

    return content, check_program(model, run, input_size, "the ONNX program")


def _written(seen: torch.export.ExportedProgram) -> bytes:
    program: Any = torch.onnx.export(
        seen,
        dynamo=True,
        input_names=["image"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),  # for the name alone; the program is dynamic already
        verbose=False,
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.onnx"
        program.save(path, external_data=False)
        return path.read_bytes()


def needed() -> ModuleType:
    """Return onnxruntime, once all packages of the extra are known to be there.

    Raises:
        InputError: If one is missing.
    """
    try:
        for name in ("onnx", "onnxscript"):
            importlib.import_module(name)
        return importlib.import_module("onnxruntime")
    except ImportError as error:
        raise InputError(f"ONNX needs {error.name}: pip install 'placesearch[onnx]'") from None
