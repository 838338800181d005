"""The front as a small picture of characters: accuracy against a cost."""

from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, ROWS = 58, 7
"""Size of the field, in characters."""

ROOM = 1.0
"""References further below the others than these are apart would squeeze them; they are told, not drawn."""

MARKS = {"reference": ("×", "x"), "front": ("●", "o"), "plain": ("■", "#"), "pick": ("◆", "@")}
"""Kinds of points and their marks, the second one in ASCII. Of several in one place that of the last kind is drawn."""


@dataclass(frozen=True, slots=True)
class Point:
    """A network.

    Args:
        kind: A key of `MARKS`.
        cost: What it costs.
        accuracy: Its accuracy, 0..1.
        name: What it is called.
    """

    kind: str
    cost: float
    accuracy: float
    name: str


def front_plot(points: Sequence[Point], cost: str, accuracy: str, *, ascii_only: bool = False) -> list[str]:
    r"""Draw points, accuracy upwards and cost to the right; return lines of at most 70 characters.

    Args:
        points: Networks; fewer than two that differ are no picture.
        cost: What is written below.
        accuracy: What is written above.
        ascii_only: Whether to do with ASCII.

    Example:
        >>> points = [
        ...     Point("plain", 100, 0.9, "plain"),
        ...     Point("front", 110, 0.92, "trial 3"),
        ...     Point("pick", 104, 0.915, "trial 7"),
        ... ]
        >>> print("\n".join(front_plot(points, "params", "accuracy, %", ascii_only=True)))
        accuracy, %
         92.00 |                                                         o
               |
               |                       @
         91.00 |
               |
               |
         90.00 |#
               +----------------------------------------------------------
                100                       params                       110
                o front   # plain   @ best.yaml, trial 7
    """
    kept = [point.accuracy for point in points if point.kind != "reference"] or [0.0]
    floor = min(kept) - ROOM * (max(kept) - min(kept)) - 0.005
    drawn = [point for point in points if point.accuracy >= floor]
    if len({(point.cost, point.accuracy) for point in drawn}) < 2:
        return []
    left, right = min(point.cost for point in drawn), max(point.cost for point in drawn)
    bottom, top = min(point.accuracy for point in drawn), max(point.accuracy for point in drawn)
    field = [[" "] * WIDTH for _ in range(ROWS)]
    for kind, marks in MARKS.items():
        for point in drawn:
            if point.kind == kind:
                column = round(_share(point.cost, left, right) * (WIDTH - 1))
                row = round(_share(point.accuracy, top, bottom) * (ROWS - 1))
                field[row][column] = marks[ascii_only]
    labels = {0: top, ROWS - 1: bottom} if top > bottom else {}
    labels[ROWS // 2] = (top + bottom) / 2
    side, corner, line = ("|", "+", "-") if ascii_only else ("│", "└", "─")
    written = [f"{100 * labels[row]:6.2f}" if row in labels else "" for row in range(ROWS)]
    ends = (_number(left), _number(right)) if right > left else ("", "")
    middle = cost if right > left else f"{cost} {_number(left)}"
    below = [
        ends[0] + middle.center(WIDTH - len(ends[0]) - len(ends[1])) + ends[1],
        "   ".join(
            f"{marks[ascii_only]} {kind}" if kind != "pick" else f"{marks[ascii_only]} best.yaml, {named[0]}"
            for kind, marks in MARKS.items()
            if (named := [point.name for point in drawn if point.kind == kind])
        ),
        _below([point for point in points if point.accuracy < floor]),
    ]
    return [
        accuracy,
        *(f"{label:6} {side}{''.join(cells)}".rstrip() for label, cells in zip(written, field, strict=True)),
        f"{'':7}{corner}{WIDTH * line}",
        *(f"{'':8}{text}".rstrip() for text in below if text),
    ]


def _share(value: float, start: float, end: float) -> float:
    """Return where a value is between two others, as a share of the way; halfway where they are equal."""
    return 0.5 if start == end else (value - start) / (end - start)


def _below(points: Sequence[Point]) -> str:
    """Tell of points that are not drawn."""
    told = [f"{point.name} {100 * point.accuracy:.2f} %" for point in points]
    for shown in (2, 1):
        text = f"below: {', '.join(told[:shown])}" + (f" and {len(told) - shown} more" if len(told) > shown else "")
        if told and len(text) <= WIDTH + 2:
            return text
    return f"below: {len(told)} more" if told else ""


def _number(value: float) -> str:
    return f"{round(value):,}" if value == round(value) or value >= 1000 else f"{value:.4g}"
