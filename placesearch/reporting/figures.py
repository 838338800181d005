"""The pictures of the page that move: figures for Plotly, as plain values.

Each is a mapping with `data` and `layout`, which `plotly.graph_objects.Figure` takes too. Texts that come from outside
are escaped, because Plotly reads a few HTML tags in texts.
"""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import pandas as pd

from placesearch.records import TrialRecord
from placesearch.reporting.drawing import LIGHT, percent, points
from placesearch.reporting.front_picture import range_of, title_of
from placesearch.reporting.map_picture import ordered_sites
from placesearch.reporting.picture_tables import PictureTables, costs_of
from placesearch.reporting.writing import Subject

Figure = dict[str, Any]

LONGEST_HOVER = 14
"""Blocks of a placement that are listed where the pointer rests; the others are counted."""

MOST_PAIRS = 10

NEAR = 0.06
"""Part of the width and of the height of the front within which two references share a label."""

_DASHES = ("solid", "dash", "dot", "dashdot")
_SYMBOLS = ("circle", "square", "diamond", "triangle-up")


def front_figures(
    subject: Subject, tables: PictureTables, best: int | None = None, colours: Mapping[str, str] = LIGHT
) -> list[Figure]:
    """Draw accuracy against each cost objective, one figure each.

    Args:
        subject: What the report is about.
        tables: What was found.
        best: The trial that is the pick.
        colours: As `placesearch.reporting.drawing.LIGHT`.
    """
    rows = tables.candidates
    costs = [cost for cost in costs_of(subject.objectives) if rows[cost].notna().any()]
    texts = [_hover(row, costs_of(subject.objectives)) for row in rows.itertuples()] if costs else []
    return [_front(tables, cost, best, texts, colours) for cost in costs]


def _front(tables: PictureTables, cost: str, best: int | None, texts: list[str], colours: Mapping[str, str]) -> Figure:
    rows, accuracy = tables.candidates, 100 * tables.accuracy
    hover = pd.Series(texts, index=rows.index, dtype=object)
    is_reference = rows.reference.notna()

    def marks(chosen: "pd.Series[bool]", name: str, **more: Any) -> dict[str, Any]:
        order = rows[chosen].sort_values([cost, "trial"]).index
        return {
            "type": "scatter",
            "mode": "markers",
            "name": name,
            "x": [float(value) for value in rows[cost][order]],
            "y": [float(value) for value in accuracy[order]],
            "text": list(hover[order]),
            "customdata": [int(trial) for trial in rows.trial[order]],
            "hoverinfo": "text",
            **more,
        }

    def intervals(chosen: "pd.Series[bool]", colour: str) -> dict[str, Any]:
        of = rows[chosen].sort_values([cost, "trial"])
        if of.estimate.isna().any() or not len(of):
            return {}
        above, below = 100 * (of.estimate_high - of.estimate), 100 * (of.estimate - of.estimate_low)
        bars = {"type": "data", "symmetric": False, "array": list(above), "arrayminus": list(below)}
        return {"error_y": {**bars, "color": colour, "thickness": 1, "width": 3}}

    is_plain = rows.placement == "none"
    others, alone = ~rows.on_front & ~is_reference & ~is_plain, is_reference & ~rows.on_front & ~is_plain
    dot = {"color": colours["front"], "size": 11}
    diamond = {"color": colours["reference"], "size": 9, "symbol": "diamond"}
    steps: list[tuple[float, float]] = []  # of several costs, a member may be beaten in one
    for price, negative in sorted(zip(rows[cost][rows.on_front], -accuracy[rows.on_front], strict=True)):
        if not steps or -negative > steps[-1][1]:
            steps.append((float(price), float(-negative)))
    joined = {
        "type": "scatter",
        "mode": "lines",
        "x": [price for price, _ in steps],
        "y": [value for _, value in steps],
        "line": {"color": colours["front"], "shape": "hv", "width": 1.5},
        "hoverinfo": "skip",
        "showlegend": False,
    }
    data = [
        marks(others, "other placements", marker={"color": colours["other"], "size": 6, "opacity": 0.65}),
        joined,
        marks(rows.on_front, "front", marker=dot, **intervals(rows.on_front, colours["front"])),
        marks(alone, "references", marker=diamond, **intervals(alone, colours["reference"])),
        marks(
            is_reference & rows.on_front & ~is_plain,
            "references",
            marker={**diamond, "size": 7},
            showlegend=not alone.any(),
        ),
        marks(is_plain, "plain network", marker={"color": colours["ink"], "size": 10, "symbol": "square"}),
    ]
    picked = rows.trial == best
    if picked.any():
        ring = {"color": "rgba(0,0,0,0)", "size": 20, "line": {"color": colours["ink"], "width": 2}}
        data.append(marks(picked, "the pick", marker=ring, hoverinfo="skip"))
    data = [trace for trace in data if trace["x"]]
    low, high = range_of(tables)
    named = rows[is_reference & (tables.accuracy >= low)]
    labels = _labels(
        named[cost], accuracy[named.index], named.reference, (rows[cost].min(), rows[cost].max()), low, high
    )
    notes = [
        {
            "x": x,
            "y": y,
            "text": escape(words),
            "showarrow": False,
            "xanchor": "left" if on_left else "right",
            "xshift": 8 if on_left else -8,
            "yshift": -9,  # below the line of the front
            "font": {"size": 11, "color": colours["ink"]},
        }
        for x, y, words, on_left in labels
    ]
    return {
        "data": data,
        "layout": {
            "height": 440,
            "xaxis": {"title": {"text": f"{title_of(cost)} (less is better)"}, "tickformat": "~s"},
            "yaxis": {"title": {"text": "accuracy, % (more is better)"}, "range": [100 * low, min(100 * high, 101)]},
            "annotations": notes if len(named) <= 6 else [],
            "hovermode": "closest",
        },
    }


def _labels(
    costs: "pd.Series[float]",
    accuracies: "pd.Series[float]",
    names: "pd.Series[str]",
    cost_range: tuple[float, float],
    low: float,
    high: float,
) -> list[tuple[float, float, str, bool]]:
    """Return where to name references: cost, accuracy, words, whether that is on the left. Neighbours share a label."""
    width, height = max(cost_range[1] - cost_range[0], 1e-300), 100 * max(high - low, 1e-9)
    labels: list[tuple[float, float, str, bool]] = []
    for cost, accuracy, name in zip(costs, accuracies, names, strict=True):
        word = str(name).split(" ")[0]
        for index, (x, y, words, on_left) in enumerate(labels):
            if abs(x - cost) < NEAR * width and abs(y - accuracy) < NEAR * height:
                labels[index] = (x, y, f"{words}, {word}", on_left)
                break
        else:
            labels.append((float(cost), float(accuracy), word, bool(cost <= sum(cost_range) / 2)))
    return labels


def _hover(row: Any, costs: Sequence[str]) -> str:
    named = f", {row.reference}" if isinstance(row.reference, str) else ""
    lines = [f"<b>trial {row.trial}{escape(named)}</b>"]
    if not pd.isna(row.estimate):
        lines.append(
            f"estimate {percent(row.estimate)} ({100 * row.estimate_low:.2f} to {100 * row.estimate_high:.2f})"
        )
    trained = f", trained {row.replicates} times" if row.replicates > 1 else ""
    lines.append(f"observed {percent(row.val_accuracy)}{trained}")
    values = {cost: getattr(row, cost) for cost in costs}
    lines += [f"{title_of(cost)}: {value:,}" for cost, value in values.items() if not pd.isna(value)]
    items = [] if row.placement == "none" else row.placement.split(" ")
    lines += [escape(item.replace("=", " = ", 1)) for item in items[:LONGEST_HOVER]] or ["no block"]
    if len(items) > LONGEST_HOVER:
        lines.append(f"and {len(items) - LONGEST_HOVER} more blocks")
    return "<br>".join(lines)


def effect_figures(subject: Subject, tables: PictureTables, colours: Mapping[str, str] = LIGHT) -> dict[str, Figure]:
    """Draw effects with their intervals: of sites, of blocks, of settings and of pairs; only those that there are.

    Args:
        subject: What the report is about.
        tables: What was found.
        colours: As `placesearch.reporting.drawing.LIGHT`.
    """
    averages = tables.averages
    figures: dict[str, Figure] = {}
    of_sites = averages[averages["of"] == "site"].set_index("value")
    order = ordered_sites(subject.sites, set(of_sites.index))
    figures["site"] = _intervals(order, of_sites.loc[order], colours)
    of_blocks = averages[averages["of"] == "block"]
    figures["block"] = _intervals(list(of_blocks.block), of_blocks, colours)
    settings = averages[averages["of"].isin(["reduction", "kernel_size"])]
    number = settings.value.astype(int)
    settings = settings.assign(number=number).sort_values(["block", "of", "number"], ascending=[True, False, True])
    letters = settings["of"].map({"reduction": "r", "kernel_size": "k"})
    names = [f"{b}, {letter} = {v}" for b, letter, v in zip(settings.block, letters, settings.value, strict=True)]
    figures["setting"] = _intervals(names, settings, colours)
    pairs = tables.effects[tables.effects.with_site.notna()].head(MOST_PAIRS)
    columns = pairs[["block", "site", "with_block", "with_site"]].to_numpy()
    figures["pair"] = _intervals([f"{a} at {b}\n{c} at {d}" for a, b, c, d in columns], pairs, colours, each=42)
    return {name: figure for name, figure in figures.items() if figure["data"]}


def _intervals(names: Sequence[str], rows: pd.DataFrame, colours: Mapping[str, str], each: int = 24) -> Figure:
    """Draw one interval a row, the first on top; what is not shown to differ from zero is hollow."""
    numbers = 100 * rows[["effect", "effect_low", "effect_high"]].to_numpy(dtype=float)
    if not len(numbers):
        return {"data": [], "layout": {}}
    clear = [low * high > 0 for _, low, high in numbers]
    tints = [colours["gain" if effect >= 0 else "loss"] for effect, _, _ in numbers]
    words = [f"{points(e / 100)} points ({points(a / 100)} to {points(b / 100)})" for e, a, b in numbers]
    trace = {
        "type": "scatter",
        "mode": "markers",
        "x": [float(effect) for effect, _, _ in numbers],
        "y": list(range(len(names))),
        "text": [f"{escape(name).replace(chr(10), '<br>')}<br>{told}" for name, told in zip(names, words, strict=True)],
        "hoverinfo": "text",
        "marker": {
            "size": 10,
            "color": tints,
            "symbol": ["circle" if is_clear else "circle-open" for is_clear in clear],
            "line": {"width": 2},
        },
        "error_x": {
            "type": "data",
            "symmetric": False,
            "array": [float(high - effect) for effect, _, high in numbers],
            "arrayminus": [float(effect - low) for effect, low, _ in numbers],
            "color": colours["muted"],
            "thickness": 1.2,
            "width": 3,
        },
    }
    return {
        "data": [trace],
        "layout": {
            "height": 84 + each * len(names),
            "showlegend": False,
            "xaxis": {"title": {"text": "points of accuracy"}, "zeroline": True},
            "yaxis": {
                "tickmode": "array",
                "tickvals": list(range(len(names))),
                "ticktext": [escape(name).replace("\n", "<br>") for name in names],
                "range": [len(names) - 0.4, -0.6],
                "showgrid": False,
                "zeroline": False,
            },
        },
    }


def history_figure(tables: PictureTables, colours: Mapping[str, str] = LIGHT) -> Figure | None:
    """Draw how the front improved with trials; None if no trial succeeded.

    Args:
        tables: What was found.
        colours: As `placesearch.reporting.drawing.LIGHT`.
    """
    data = [
        {
            "type": "scatter",
            "mode": "lines",
            "name": title_of(str(cost)),
            "x": [int(trial) for trial in rows.trial],
            "y": [100 * float(gain) for gain in rows.gain],
            "line": {"shape": "hv", "width": 2, "dash": _DASHES[number % 4], "color": colours[_tint(number)]},
            "hovertemplate": "after trial %{x}: %{y:.3f} points<extra></extra>",
        }
        for number, (cost, rows) in enumerate(tables.history.groupby("cost", sort=False))
    ]
    if not data:
        return None
    layout = {
        "height": 320,
        "showlegend": len(data) > 1,
        "xaxis": {"title": {"text": "trial"}},
        "yaxis": {"title": {"text": "gain over plain, points"}, "rangemode": "tozero"},
    }
    return {"data": data, "layout": layout}


def _tint(number: int) -> str:
    return ("front", "reference", "ink", "muted")[number % 4]


def curves_figure(
    records: Sequence[TrialRecord], tables: PictureTables, colours: Mapping[str, str] = LIGHT
) -> Figure | None:
    """Draw the accuracies on the way of trials that kept them, and at the end; None if there are none.

    Args:
        records: Finished trials.
        tables: What was found.
        colours: As `placesearch.reporting.drawing.LIGHT`.
    """
    members = set(tables.candidates.trial[tables.candidates.on_front])
    groups: dict[str, list[TrialRecord]] = {"other trials": [], "references": [], "front": []}
    for record in records:
        name = "front" if record.trial in members else "references" if record.reference else "other trials"
        groups[name] += [record] if record.curve else []
    data = []
    for (name, of), colour, width in zip(groups.items(), ("other", "reference", "front"), (1, 1.5, 2), strict=True):
        x: list[int | None] = []
        y: list[float | None] = []
        words: list[str] = []
        for record in of:
            curve = list(record.curve or ())
            if record.val_accuracy is not None and curve[-1] != record.val_accuracy:
                curve.append(record.val_accuracy)
            x += [*range(1, len(curve) + 1), None]  # a gap, so that one trace holds all lines
            y += [*(round(100 * value, 3) for value in curve), None]
            if name != "other trials":  # these are the background, and many
                words += [f"trial {record.trial}: {percent(value)}" for value in curve] + [""]
        if of:
            line = {"color": colours[colour], "width": width}
            data.append(
                {
                    "type": "scatter",
                    "mode": "lines+markers",
                    "name": name,
                    "x": x,
                    "y": y,
                    "text": words,
                    "hoverinfo": "text" if words else "skip",
                    "line": line,
                    "marker": {"size": 4, "color": colours[colour]},
                    "opacity": 0.45 if name == "other trials" else 1.0,
                }
            )
    if not data:
        return None
    layout = {
        "height": 320,
        "xaxis": {"title": {"text": "measurement in the course of a training"}, "dtick": 1},
        "yaxis": {"title": {"text": "validation accuracy, %"}},
        "hovermode": "closest",
    }
    longest = max(len(record.curve or ()) for of in groups.values() for record in of)
    if longest > 12:
        del layout["xaxis"]["dtick"]  # type: ignore[attr-defined]
    return {"data": data, "layout": layout}
