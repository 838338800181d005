"""The placement map as a figure for Plotly, for where there is little room: the dashboard."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from placesearch.placement import Placement
from placesearch.reporting.drawing import LIGHT, certainty, points
from placesearch.reporting.figures import Figure
from placesearch.reporting.map_picture import ordered_sites, setting_text
from placesearch.reporting.picture_tables import PictureTables
from placesearch.reporting.writing import Subject

MOST_TOLD = 14
"""Sites up to which the settings fit in."""


def map_figure(
    subject: Subject, tables: PictureTables, best: int | None = None, colours: Mapping[str, str] = LIGHT
) -> Figure | None:
    """Draw the placement map where there is little room: sites downwards from input to output, the front across.

    Sites are those searched and those that a member uses. The deeper the colour, the stronger the effect of a block
    there; the larger the mark, the surer its sign; a loss is crossed out. None if there is no member.

    Args:
        subject: What the report is about.
        tables: What was found.
        best: The trial that is the pick.
        colours: As `placesearch.reporting.drawing.LIGHT`.
    """
    members, effects = tables.members(subject.objectives, best), tables.of_settings
    if not len(members):
        return None
    of_sites = tables.averages[tables.averages["of"] == "site"]
    names: list[str] = []
    cells: list[tuple[int, str, str, tuple[float, float, float]]] = []
    if len(of_sites):
        names.append("any<br>block")
        ends = of_sites[["effect", "effect_low", "effect_high"]].to_numpy(dtype=float).tolist()
        cells += [(0, site, "", (one[0], one[1], one[2])) for site, one in zip(of_sites.value, ends, strict=True)]
    for words, trial in zip(members.placement, members.trial, strict=True):
        for site, setting in Placement.parse(words).items():
            cells.append((len(names), site, setting_text(setting), effects.get((site, setting), (0.0, 0.0, 0.0))))
        names.append(
            "plain" if words == "none" else f"trial {trial}" + ("<br><b>the pick</b>" if trial == best else "")
        )
    used = {site for words in members.placement for site in Placement.parse(words)}
    sites = ordered_sites(subject.sites, used | set(subject.added))
    cells = [cell for cell in cells if cell[1] in sites]
    most = max((abs(effect) for *_, (effect, _, _) in cells), default=0.0) or 1.0
    listed = ("x", "y", "text", "hovertext", "size", "color", "opacity", "symbol")
    marks: dict[str, list[Any]] = {name: [] for name in listed}
    for column, site, told, (effect, low, high) in cells:
        what = escape(f"{site}{' = ' + told if told else ''}")
        values = (
            column,
            sites.index(site),
            escape(told) if len(sites) <= MOST_TOLD else "",
            f"{what}: {points(effect)} points ({points(low)} to {points(high)})" if low < high else what,
            6 + 28 * (certainty(effect, low, high) - 0.5),
            colours["gain" if effect >= 0 else "loss"],
            0.15 + 0.85 * abs(effect) / most,
            "circle" if effect >= 0 else "circle-x",
        )
        for name, value in zip(listed, values, strict=True):
            marks[name].append(value)
    trace = {
        "type": "scatter",
        "mode": "markers+text",
        **{name: marks[name] for name in ("x", "y", "text", "hovertext")},
        "hoverinfo": "text",
        "textposition": "bottom center",
        "textfont": {"size": 9, "color": colours["muted"]},
        "marker": {name: marks[name] for name in ("size", "color", "opacity", "symbol")},
    }
    layout = {
        "height": 440,
        "showlegend": False,
        "hovermode": "closest",
        "xaxis": {**_ticks(names), "range": [-0.5, len(names) - 0.4], "side": "top", "zeroline": False},
        "yaxis": {
            **_ticks([escape(site) for site in sites]),
            "range": [len(sites) - 0.2, -0.6],
            "zeroline": False,
            "automargin": True,
        },
    }
    return {"data": [trace], "layout": layout}


def _ticks(names: Sequence[str]) -> dict[str, Any]:
    return {"tickmode": "array", "tickvals": list(range(len(names))), "ticktext": list(names)}
