"""The front as a picture for papers and READMEs: accuracy against each cost, as SVG."""

from collections.abc import Sequence

import pandas as pd

from placesearch.reporting.drawing import circle, line, percent, polygon, polyline, short, svg, text, ticks
from placesearch.reporting.picture_tables import COLUMN_OF, PictureTables, costs_of
from placesearch.reporting.writing import Subject

WIDTH, HEIGHT = 520.0, 360.0
LEFT, RIGHT, TOP, BOTTOM = 52.0, 18.0, 34.0, 62.0
"""Size of the picture of one cost and of its margins, in pixels."""

FENCE = 1.5
"""A candidate so many interquartile ranges below the lower quartile would squeeze all others; it is told, not shown."""


def front_svg(subject: Subject, tables: PictureTables, best: int | None = None) -> str:
    """Draw accuracy against each cost objective, one picture beside the other.

    Args:
        subject: What the report is about.
        tables: What was found.
        best: The trial that is the pick.
    """
    costs = [cost for cost in costs_of(subject.objectives) if tables.candidates[cost].notna().any()]
    parts = [part for index, cost in enumerate(costs) for part in _panel(tables, cost, best, WIDTH * index)]
    if not costs:
        parts = [text(WIDTH / 2, HEIGHT / 2, "No trial succeeded.", "muted", "middle")]
    title = f"{subject.name}: accuracy against {' and '.join(map(title_of, costs)) or 'cost'}, the front marked"
    return svg(WIDTH * max(len(costs), 1), HEIGHT, parts, title)


def title_of(cost: str) -> str:
    """Return what a column of costs is called on an axis.

    Example:
        >>> title_of("latency_predicted_ms"), title_of("macs")
        ('predicted latency, ms', 'multiply-adds')
    """
    names = {
        "macs": "multiply-adds",
        "macs_full": "multiply-adds, all operators",
        "params": "parameters",
        "latency_predicted_ms": "predicted latency, ms",
    }
    return names.get(cost, next((name for name, column in COLUMN_OF.items() if column == cost), cost))


def range_of(tables: PictureTables) -> tuple[float, float]:
    """Return the lowest and highest accuracy to show: all but those that would squeeze the others."""
    accuracy, rows = tables.accuracy, tables.candidates
    low, high = accuracy.quantile(0.25), accuracy.quantile(0.75)
    near = accuracy[(accuracy >= low - FENCE * (high - low)) | rows.on_front]
    bottom = min(near.min(), rows[rows.on_front].estimate_low.min(skipna=True), near.min())
    top = max(near.max(), rows[rows.on_front].estimate_high.max(skipna=True), near.max())
    bottom = near.min() if pd.isna(bottom) else bottom
    top = near.max() if pd.isna(top) else top
    room = 0.06 * (top - bottom) or 0.01
    return float(bottom - room), float(top + room)


def _panel(tables: PictureTables, cost: str, best: int | None, left: float) -> list[str]:
    rows, accuracy = tables.candidates, tables.accuracy
    prices = rows[cost].astype(float)
    low, high = range_of(tables)
    cheapest, dearest = float(prices.min()), float(prices.max())
    room = 0.05 * (dearest - cheapest) or 0.05 * max(abs(dearest), 1.0)
    cheapest, dearest = cheapest - room, dearest + room

    def across(price: float) -> float:
        return left + LEFT + (price - cheapest) / (dearest - cheapest) * (WIDTH - LEFT - RIGHT)

    def up(share: float) -> float:
        return HEIGHT - BOTTOM - (share - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = [text(left + LEFT, 20, "accuracy, %", "ink")]
    for number in ticks(100 * low, 100 * high, 7):
        y = up(number / 100)
        parts += [
            line(left + LEFT, y, left + WIDTH - RIGHT, y),
            text(left + LEFT - 6, y + 4, f"{number:g}", "muted", "end"),
        ]
    marks = ticks(cheapest, dearest)
    step = marks[1] - marks[0] if len(marks) > 1 else 0.0
    for number in marks:
        x = across(number)
        parts += [
            line(x, HEIGHT - BOTTOM, x, HEIGHT - BOTTOM + 4),
            text(x, HEIGHT - BOTTOM + 17, short(number, step), "muted", "middle"),
        ]
    parts.append(text(left + (LEFT + WIDTH - RIGHT) / 2, HEIGHT - BOTTOM + 34, title_of(cost), "ink", "middle"))
    shown = accuracy >= low
    others = rows[shown & ~rows.on_front & rows.reference.isna()]
    parts += [circle(across(prices[i]), up(accuracy[i]), 2.5, "other") for i in others.index]
    members = rows[rows.on_front].assign(price=prices, worse=-accuracy).sort_values(["price", "worse"])
    steps: list[tuple[float, float]] = []
    for index in members.index:
        x, y = across(prices[index]), up(accuracy[index])
        if not steps or y < steps[-1][1]:  # of several costs, a member may be beaten in one
            steps += [(x, steps[-1][1]), (x, y)] if steps else [(x, y)]
        if not pd.isna(members.estimate_low[index]):
            ends = [up(max(members.estimate_low[index], low)), up(min(members.estimate_high[index], high))]
            parts.append(line(x, ends[0], x, ends[1], "front-line", 1))
    if len(steps) > 1:
        parts.append(polyline(steps, "front-line", 1.2))
    marked = rows[shown & (rows.on_front | rows.reference.notna())]
    taken = [(across(prices[i]) - 6, across(prices[i]) + 6, up(accuracy[i]) + 4) for i in marked.index]
    important = marked.assign(last=(marked.trial != best) & marked.reference.isna()).sort_values(["last", "trial"])
    for index in important.index:
        row, x, y = rows.loc[index], across(prices[index]), up(accuracy[index])
        if row.on_front:
            parts.append(circle(x, y, 4.5, "front"))
        if row.placement == "none":
            parts.append(polygon([(x - 4, y - 4), (x + 4, y - 4), (x + 4, y + 4), (x - 4, y + 4)], "ink"))
        elif isinstance(row.reference, str):
            parts.append(polygon([(x, y - 5), (x + 5, y), (x, y + 5), (x - 5, y)], "reference"))
        if row.trial == best:
            parts.append(circle(x, y, 8, "ink-line"))
        words = row.reference if isinstance(row.reference, str) else (f"trial {row.trial}" if row.on_front else "")
        if row.trial == best:
            words += " (pick)"
        parts += _label(x, y, words, taken, (left + LEFT, left + WIDTH - RIGHT))
    below = rows[~shown]
    if len(below):
        named = [
            f"{name if isinstance(name, str) else 'trial ' + str(trial)} {percent(value)}"
            for name, trial, value in zip(below.reference, below.trial, accuracy[~shown], strict=True)
        ]
        told = ", ".join(named[:2]) + (f" and {len(named) - 2} more" if len(named) > 2 else "")
        parts.append(text(left + LEFT, HEIGHT - 8, f"below the range: {told}", "muted small"))
    return parts


def _label(
    x: float, y: float, words: str, taken: list[tuple[float, float, float]], sides: tuple[float, float]
) -> Sequence[str]:
    """Write a name beside a mark where no other name stands; where there is no room, leave it out."""
    wide = 6.0 * len(words)
    for right, down in (
        (True, 4),
        (False, 4),
        (True, -9),
        (False, -9),
        (True, 17),
        (False, 17),
        (True, 30),
        (False, 30),
    ):
        start = x + 9 if right else x - 9 - wide
        free = all(abs(y + down - other) > 12 or start + wide < begin or start > end for begin, end, other in taken)
        if words and free and sides[0] <= start and start + wide <= sides[1]:
            taken.append((start, start + wide, y + down))
            return [
                text(start if right else start + wide, y + down, words, "ink small label", "start" if right else "end")
            ]
    return []
