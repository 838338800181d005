"""Multiply-adds and parameters: what counts, and how much.

fvcore traces a network; `RULE` below says what each operator costs. Two figures come out of it:

- `macs`: the multiply-adds of matrix products, that is, of convolutions, linear layers and matrix multiplications. This
  is what papers print.
- `macs_full`: these, and one for each element that any other operator works on, by the rule.

What is not well defined, and how it is decided here:

1. A bias is free: a sum of products starts from it.
2. An operator counts one for each element it puts out (an addition, an activation, however it is computed) or, where it
   brings many elements into few (a mean, a maximum, global and adaptive pooling), one for each element it takes in.
   Pooling with a window counts the window's area for each element it puts out; a window made from the map's own size
   is taken for a global one.
3. A batch norm in eval mode is one multiply-add an element. Layer, group and instance norms are four: mean, variance,
   division, scale and shift; three without the last. A softmax is three: exponential, sum, division.
4. Moving, copying and padding are free.
5. The factor of a gate that started as the identity is free, so that such a block counts what its folded form counts.
6. Nothing is said about time: SE adds 0.05 % to the macs of ResNet-50 and far more to its latency.

An operator that the rule does not know is named in `Cost.uncounted`.
"""

import logging
import math
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from placesearch.errors import BackboneError, reason_of
from placesearch.models.copying import InputSize, copy_of, dtype_and_device, moved, plainly
from placesearch.models.graph import record, tensors_in
from placesearch.models.insertion import factors_of, set_factors
from placesearch.records import Cost

with warnings.catch_warnings():
    # on import fvcore 0.1.5 uses torch.jit.script, which torch deprecates; no newer fvcore exists
    warnings.simplefilter("ignore", FutureWarning)
    warnings.simplefilter("ignore", DeprecationWarning)
    from fvcore.nn import FlopCountAnalysis
    from fvcore.nn.jit_handles import (
        addmm_flop_jit,
        bmm_flop_jit,
        conv_flop_jit,
        einsum_flop_jit,
        get_shape,
        linear_flop_jit,
        matmul_flop_jit,
    )

_Values = list[Any]
_Count = Callable[[_Values, _Values], "Counter[str] | float"]


def _size(value: Any) -> int:
    """Return the number of elements of a tensor; 0 for a number, which costs nothing."""
    shape = get_shape(value)
    return math.prod(shape) if shape else 0


def _products(count: _Count) -> _Count:
    """Count matrix products as fvcore does."""

    def counted(inputs: _Values, outputs: _Values) -> "Counter[str]":
        given = count(inputs, outputs)
        return Counter(products=int(sum(given.values()) if isinstance(given, Counter) else given))

    return counted


def _each_output(times: int) -> _Count:
    return lambda _, outputs: Counter(others=times * _size(outputs[0]))


def _each_input(times: int) -> _Count:
    return lambda inputs, outputs: Counter(others=times * max(_size(inputs[0]), _size(outputs[0])))


def _each_window(inputs: _Values, outputs: _Values) -> "Counter[str]":
    kernel = [value.toIValue() for value in inputs[1].node().inputs()]
    if None in kernel:  # computed from the map's size, as in a global pooling
        return Counter(others=max(_size(inputs[0]), _size(outputs[0])))
    area = math.prod(kernel) if len(kernel) > 1 else kernel[0] ** 2
    return Counter(others=area * _size(outputs[0]))


def _norm(affine: int) -> _Count:
    """Count a norm with statistics of its own, whose argument of this position is its weight."""
    return lambda inputs, _: Counter(others=(4 if get_shape(inputs[affine]) else 3) * _size(inputs[0]))


def _maximum(inputs: _Values, outputs: _Values) -> "Counter[str]":
    """Count `max` and `min`: of two tensors one for each result, over a dimension one for each element."""
    of_two = len(inputs) == 2 and get_shape(inputs[1]) is not None
    return Counter(others=_size(outputs[0] if of_two else inputs[0]))


_ELEMENTWISE = """
    add sub rsub mul div addcmul addcdiv lerp neg abs reciprocal square pow sqrt rsqrt exp log sin cos floor
    remainder sign maximum minimum where masked_fill eq ne lt le gt ge logical_and logical_or logical_not
    batch_norm relu relu6 sigmoid tanh hardsigmoid hardswish hardtanh silu gelu mish elu celu selu leaky_relu
    prelu rrelu softplus log_sigmoid hardshrink softshrink softsign threshold clamp clamp_min clamp_max
    upsample_nearest2d upsample_bilinear2d upsample_bicubic2d
""".split()  # noqa: SIM905 - a list of a hundred strings would fill three pages

_REDUCING = """
    mean sum prod amax amin norm linalg_vector_norm frobenius_norm var std cumsum adaptive_avg_pool1d
    adaptive_avg_pool2d adaptive_max_pool1d adaptive_max_pool2d
""".split()  # noqa: SIM905

_FREE = """
    alias arange broadcast_tensors cat channel_shuffle chunk clone constant_pad_nd contiguous copy detach
    dropout dropout2d feature_dropout empty expand expand_as flatten flip floor_divide full full_like gather
    im2col index index_select Int item lift_fresh movedim narrow new_empty new_full new_ones new_zeros numpy_T
    ones ones_like pad permute pixel_shuffle pixel_unshuffle reflection_pad2d repeat repeat_interleave
    replication_pad2d reshape reshape_as resolve_conj roll ScalarImplicit select size slice split
    split_with_sizes squeeze stack swapaxes swapdims t tile to transpose type_as unbind unflatten unsafe_chunk
    unsafe_split unsqueeze view view_as zeros zeros_like
""".split()  # noqa: SIM905

RULE: dict[str, _Count | None] = {
    **dict.fromkeys(_FREE),
    **dict.fromkeys(_ELEMENTWISE, _each_output(1)),
    **dict.fromkeys(_REDUCING, _each_input(1)),
    **dict.fromkeys(("softmax", "log_softmax", "_softmax", "_log_softmax"), _each_output(3)),
    **dict.fromkeys(("max", "min"), _maximum),
    **dict.fromkeys(("avg_pool2d", "max_pool2d", "max_pool2d_with_indices"), _each_window),
    "layer_norm": _norm(2),
    "group_norm": _norm(2),
    "instance_norm": _norm(1),
    "_convolution": _products(conv_flop_jit),
    "linear": _products(linear_flop_jit),
    "addmm": _products(addmm_flop_jit),
    "mm": _products(matmul_flop_jit),
    "matmul": _products(matmul_flop_jit),
    "bmm": _products(bmm_flop_jit),
    "einsum": _products(einsum_flop_jit),
}
"""What each operator of torch costs; None for what is free. The in-place form of an operator costs the same."""


def profile(model: nn.Module, input_size: InputSize) -> Cost:
    """Count what a network costs for one image.

    fvcore traces an eval copy, in single precision where that is possible; the argument is left as it is.

    Args:
        model: The network.
        input_size: Channels, height and width of its input.

    Raises:
        BackboneError: If the network cannot be copied, run or traced.

    Example:
        >>> import torchvision
        >>> cost = profile(torchvision.models.resnet18(), (3, 224, 224))
        >>> f"{cost.macs:,} {cost.macs_full:,} {cost.params:,}"
        '1,814,073,344 1,821,449,216 11,689,512'
    """
    with torch.random.fork_rng(devices=[]):
        plain = copy_of(model, input_size, share=True)
    set_factors(plain, dict.fromkeys(factors_of(plain), 1.0))
    own, here = dtype_and_device(model), (torch.float32, torch.device("cpu"))
    own = (own[0], here[1] if own[1].type == "meta" else own[1])
    try:
        counts, uncounted = _counted(plain, input_size, *here)
    except Exception as error:  # noqa: BLE001 - a network may raise anything, some only in another dtype than their own
        try:
            if own == here:
                raise error
            counts, uncounted = _counted(plain, input_size, *own)
        except Exception as last:
            record(plain, input_size)  # says why a network cannot be run at all
            raise BackboneError(
                f"the costs of {type(model).__name__} cannot be counted, as torch.jit.trace cannot follow it: "
                f"{reason_of(last)}"
            ) from last
    return Cost(
        macs=counts["products"],
        macs_full=counts["products"] + counts["others"],
        params=sum(weight.numel() for weight in plain.parameters()),
        uncounted=tuple(sorted(name.removeprefix("aten::").rstrip("_") for name in uncounted)),
    )


def _counted(
    plain: nn.Module, input_size: InputSize, dtype: torch.dtype, device: torch.device
) -> tuple["Counter[str]", "Counter[str]"]:
    """Return what fvcore counts in a network, and how often it met operators without a rule."""
    copied = moved(copy_of(plain), device, dtype).eval()
    quiet = logging.getLogger("fvcore")
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), plainly():
            # torch deprecates torch.jit.trace, with which fvcore 0.1.5 looks at the network; no newer fvcore exists
            warnings.simplefilter("ignore")
            image = torch.zeros(1, *input_size, dtype=dtype, device=device)
            analysis = FlopCountAnalysis(_TensorsOf(copied), image)
            handles = {f"aten::{name}{end}": count for name, count in RULE.items() for end in ("", "_")}
            analysis.clear_op_handles().set_op_handle(**handles)
            analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
            return analysis.by_operator(), analysis.unsupported_ops()
    finally:
        quiet.setLevel(level)


class _TensorsOf(nn.Module):
    """A network whose output is its tensors alone; what else a network may put out cannot be traced."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor for _, tensor in tensors_in(self.model(image)))
