"""The sites of a network as a tree of its modules."""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from placesearch.cli.terminal import aligned

GUIDES, ASCII = ("└─ ", "├─ ", "   ", "│  "), ("`- ", "|- ", "   ", "|  ")
"""What leads to the last part of a module and to the others, and what stands below each of these."""


@dataclass(slots=True)
class Module:
    """A module, or several in a row of which each holds nothing but the next.

    Args:
        label: Its name, from the module that holds it.
        site: Which of the sites it is; None if it is none.
        parts: What it holds, in the order of the sites.
    """

    label: str
    site: int | None = None
    parts: dict[str, "Module"] = field(default_factory=dict)


def modules_of(names: Sequence[str]) -> Module:
    """Return the tree of modules with these names, without label.

    Args:
        names: Sites, from input to output.

    Example:
        >>> [part.label for part in modules_of(["stem", "layer1.0.bn2", "layer1.0"]).parts.values()]
        ['stem', 'layer1.0']
    """
    root = Module("")
    for index, name in enumerate(names):
        module = root
        for label in name.split("."):
            module = module.parts.setdefault(label, Module(label))
        module.site = index
    return Module("", None, {label: _joined(part) for label, part in root.parts.items()})


def _joined(module: Module) -> Module:
    """Join a module that is no site with what it holds, if that is only one."""
    parts = [_joined(part) for part in module.parts.values()]
    if module.site is None and len(parts) == 1:
        return Module(f"{module.label}.{parts[0].label}", parts[0].site, parts[0].parts)
    return Module(module.label, module.site, {part.label: part for part in parts})


def tree_lines(frame: pd.DataFrame, width: int, *, ascii_only: bool = False) -> list[str]:
    """Draw sites as a tree, each with its kinds, its map and what a block costs there.

    Args:
        frame: What `sites_frame` returns.
        width: How long a line may be; if exact costs take more, they are rounded.
        ascii_only: Whether to do with ASCII.

    Returns:
        Two lines of header, then the tree.
    """
    rows = frame.to_dict("records")
    drawn = list(_drawn(modules_of(list(frame["site"])), "", ASCII if ascii_only else GUIDES))
    blocks = [name.removesuffix("_macs") for name in frame.columns if name.endswith("_macs")]
    lines: list[str] = []
    for count in ("{:,}".format, short_count):
        columns = {"": ["site", *(text for text, _ in drawn)], " ": ["kinds"], "  ": ["map"]}
        columns |= {block: ["macs/params"] for block in blocks}
        for _, site in drawn:
            cells = [""] * (len(columns) - 1) if site is None else _cells(rows[site], blocks, count)
            for column, cell in zip(list(columns)[1:], cells, strict=True):
                columns[column].append(cell)
        lines = [line.rstrip() for line in aligned(columns, ("", " "))]
        if max(map(len, lines)) <= width:
            break
    return lines


def _cells(row: Mapping[Hashable, Any], blocks: Sequence[str], count: Callable[[int], str]) -> list[str]:
    costs = [f"{count(row[f'{block}_macs'])}/{count(row[f'{block}_params'])}" for block in blocks]
    return [row["kinds"], f"{row['channels']}x{row['height']}x{row['width']}", *costs]


def _drawn(module: Module, indent: str, guides: tuple[str, str, str, str]) -> Iterator[tuple[str, int | None]]:
    """Yield what a module holds, line by line, and which site each line is; what the root holds has no guides."""
    last_branch, branch, last_space, space = guides if module.label else ("", "", "", "")
    parts = list(module.parts.values())
    for part in parts:
        is_last = part is parts[-1]
        yield f"{indent}{last_branch if is_last else branch}{part.label}", part.site
        yield from _drawn(part, indent + (last_space if is_last else space), guides)


def short_count(count: int) -> str:
    """Return a number with about three digits.

    Example:
        >>> [short_count(count) for count in (679, 8_563, 32_768, 308_352, 1_230_336)]
        ['679', '8.56K', '32.8K', '308K', '1.23M']
    """
    if count < 1000:
        return str(count)
    mantissa, exponent = f"{count:.2e}".split("e")
    thousands, shift = divmod(int(exponent), 3)
    return f"{float(mantissa) * 10**shift:.{2 - shift}f}{' KMGTP'[thousands]}"
