"""The blocks as source code that stands alone, for whatever is exported as source code."""

import inspect
from collections.abc import Collection

from jinja2 import Environment, PackageLoader, StrictUndefined

from placesearch.errors import PlacementError
from placesearch.models import attachment

CLASSES: dict[str, tuple[str, ...]] = {
    "se": ("SqueezeExcitation",),
    "cbam": ("CBAM", "ChannelAttention", "SpatialAttention"),
    "cbam_bn": ("NormedCBAM", "ChannelAttention", "NormedSpatialAttention"),
    "cbam_residual": ("ResidualCBAM", "ChannelAttention", "SpatialAttention"),
    "channel": ("ChannelAttention",),
    "spatial": ("SpatialAttention",),
    "eca": ("EfficientChannelAttention",),
}
"""For every block its class in the template, and the classes of its parts."""

WITHOUT_CHANNELS = ("spatial", "eca")
"""Blocks whose classes do not ask for the number of channels."""

_CBAM = "Woo et al. 2018, CBAM, eq. 1 (arXiv:1807.06521)"
_CBAMS = (
    ("CBAM", "SpatialAttention", "Channel attention, then spatial attention.", f"{_CBAM}."),
    ("NormedCBAM", "NormedSpatialAttention", "CBAM as in its authors' code, with a batch norm.", f"{_CBAM}, and code."),
    ("ResidualCBAM", "SpatialAttention", "CBAM with its input added, as in tutorials.", f"{_CBAM}, plus the input."),
)

TEMPLATES = Environment(
    loader=PackageLoader("placesearch", "exporting"),
    autoescape=False,  # noqa: S701 - it is Python; what comes from a file is checked or quoted before
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
"""The templates of source code."""


def block_source(blocks: Collection[str], *, factors: bool = False) -> str:
    """Return the classes of blocks, with the names of parameters that the blocks have here.

    Args:
        blocks: Names of blocks, as in a placement.
        factors: Whether gates may have factors; `needs_math` tells whether the classes then need the module `math`.

    Example:
        >>> [line for line in block_source(["eca"]).splitlines() if line.startswith("class")]
        ['class EfficientChannelAttention(nn.Module):']
    """
    classes = {name for block in blocks for name in CLASSES[block]}
    return TEMPLATES.get_template("blocks.py.jinja").render(classes=classes, cbams=_CBAMS, factors=factors).strip()


def attachment_source() -> str:
    """Return the code that makes blocks work in a network, as it is here.

    Example:
        >>> [line for line in attachment_source().splitlines() if line.startswith("class")]
        ['class Attended(nn.Module):', 'class Children(dict[str, nn.Module | None]):', 'class Alone:']
    """
    source = inspect.getsource(attachment)
    head, _, code = source.partition(f"\n\nfrom {PlacementError.__module__} import {PlacementError.__name__}\n\n")
    title, _, reasons = head.removeprefix('"""').partition('"""')[0].partition("\n\n")
    told = [title, "", *reasons.partition("\n\n")[2].strip().splitlines()]
    comment = "\n".join(f"# {line}".rstrip() for line in told)
    return f"{comment}\n\n{code.strip()}".replace(PlacementError.__name__, RuntimeError.__name__)


def needs_math(blocks: Collection[str], *, factors: bool) -> bool:
    """Tell whether the classes of blocks need the module `math`: where two gates share a factor."""
    return factors and not {"cbam", "cbam_bn"}.isdisjoint(blocks)
