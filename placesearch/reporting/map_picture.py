"""The placement map: the network from input to output, and what blocks do where, as SVG."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import pandas as pd

from placesearch.placement import BlockSetting, Placement, natural_key
from placesearch.reporting.drawing import certainty, circle, line, percent, points, polygon, short, shortened, svg, text
from placesearch.reporting.picture_tables import COLUMN_OF, PictureTables, costs_of
from placesearch.reporting.writing import Subject

LABELS = 156
"""Width of the column with the names of the rows, in pixels."""

HEAD, ROW, FOOT = 104, 40, 104
"""Heights of the drawn network, a row and the key, in pixels."""

LONGEST = 22
"""Characters of the name of a site; of longer ones the middle is left out."""

CELL = 54.0
"""Width of a site, enough for a setting of CBAM, in pixels."""

KEY = 390
"""Width of the key."""

SMALLEST, LARGEST = 3.0, 12.0
"""Radius of a mark whose sign is as likely as not, and of one whose sign is sure."""


@dataclass(frozen=True, slots=True)
class PlacementMap:
    """The parts of a placement map. The page keeps the labels in sight while the rest is scrolled.

    Args:
        labels: Elements of the column of labels.
        body: Elements of everything to the right of it.
        key: Elements that say what the marks mean, for below.
        width: Of the body, in pixels.
        height: Of labels and body.
        title: What the picture shows.
    """

    labels: tuple[str, ...]
    body: tuple[str, ...]
    key: tuple[str, ...]
    width: float
    height: float
    title: str

    def svg(self) -> str:
        """Return the whole map as a picture that stands by itself."""
        body = [
            *self.labels,
            f'<g transform="translate({LABELS} 0)">',
            *self.body,
            f'</g><g transform="translate(0 {self.height})">',
            *self.key,
            "</g>",
        ]
        return svg(max(LABELS + self.width, KEY), self.height + FOOT, body, self.title)


@dataclass(frozen=True, slots=True)
class _Effect:
    effect: float
    low: float
    high: float

    @property
    def certainty(self) -> float:
        return certainty(self.effect, self.low, self.high)

    def __str__(self) -> str:
        range_ = f"{points(self.low)} to {points(self.high)}"
        return f"{points(self.effect)} points ({range_}); sure of the sign to {100 * self.certainty:.0f} %"


def placement_map(subject: Subject, tables: PictureTables, best: int | None = None) -> PlacementMap:
    """Draw the placement map: one row for what any block does, and one for each member of the front and the pick.

    Args:
        subject: What the report is about.
        tables: What was found.
        best: The trial that is the pick.
    """
    members = tables.members(subject.objectives, best)
    placements = [Placement.parse(words) for words in members.placement]
    effects = {of: _Effect(*numbers) for of, numbers in tables.of_settings.items()}
    of_sites = tables.averages[tables.averages["of"] == "site"]
    of_any = {
        site: _Effect(*map(float, row))
        for site, row in zip(of_sites.value, of_sites[["effect", "effect_low", "effect_high"]].to_numpy(), strict=True)
    }
    used = {site for placement in placements for site in placement}
    sites = ordered_sites(subject.sites, {*used, *of_any, *subject.added})
    shown = [*of_any.values(), *(effects[item] for p in placements for item in p.items() if item in effects)]
    most = max((abs(one.effect) for one in shown), default=0.0) or 1.0
    width, top = CELL * len(sites) + 100, HEAD + 14 + 6 * max((min(len(site), LONGEST) for site in sites), default=0)
    body = [*_network(sites, subject), *_names(sites, top)]
    labels = [
        text(LABELS - 8, HEAD / 2 + 4, "input " + "×".join(map(str, subject.architecture.input_size)), "muted", "end"),
        text(8, top - 8, "what a block adds", "muted small"),
    ]
    height = float(top)
    if of_any:
        labels += [
            text(8, height + 18, "any block here", "ink bold"),
            text(8, height + 32, "on average", "muted small"),
        ]
        body += _ground([site not in of_any for site in sites], width, height)
        for index, site in enumerate(sites):
            if site in of_any:
                one = of_any[site]
                body.append(_mark(CELL * (index + 0.5), height + ROW / 2, one, most, f"any block at {site}: {one}"))
        height += ROW
    for (_, row), placement in zip(members.iterrows(), placements, strict=True):
        opened = f'<g data-copy="{row.trial}"><rect class="hit" y="{height:g}" height="{ROW}" fill-opacity="0" width='
        labels += [f'{opened}"{LABELS}"/>', *_row_labels(row, subject, height, is_best=row.trial == best), "</g>"]
        body += [f'{opened}"{width:g}"/>', *_ground([site not in placement for site in sites], width, height)]
        for index, site in enumerate(sites):
            if site in placement:
                setting = placement[site]
                found, x = effects.get((site, setting)), CELL * (index + 0.5)
                told = f"{site}={setting}" + (f": {found}" if found else "")
                body.append(_mark(x, height + 15, found, most, told))
                body.append(text(x, height + 36, setting_text(setting), "muted small", "middle"))
        body.append("</g>")
        height += ROW
    title = f"{subject.name}: which blocks the placements of the front have where, and what they add to the accuracy"
    return PlacementMap(tuple(labels), tuple(body), tuple(_key(most, bool(effects))), width, height + 6, title)


def ordered_sites(known: Mapping[str, object], wanted: set[str]) -> list[str]:
    """Return the wanted sites from input to output; a site that is not known stands where its name would.

    Args:
        known: Sites, in the order in which data pass them.
        wanted: Names of sites.

    Example:
        >>> ordered_sites({"stem": 0, "layer1.0.bn2": 0, "layer1.1.bn2": 0}, {"layer1.0", "layer1.1.bn2", "stem"})
        ['stem', 'layer1.0', 'layer1.1.bn2']
    """
    order = list(known)
    for site in sorted(wanted - set(order), key=natural_key):
        within = [index for index, other in enumerate(order) if other.startswith(f"{site}.")]
        before = [index for index, other in enumerate(order) if natural_key(other) < natural_key(site)]
        order.insert(max(within or before, default=-1) + 1, site)
    return [site for site in order if site in wanted]


def setting_text(setting: BlockSetting) -> str:
    """Return a setting as it stands in a cell of the map.

    Example:
        >>> setting_text(BlockSetting("cbam", 8, 7)), setting_text(BlockSetting("mine:WideGate", 4))
        ('cbam 8·7', 'Wid…ate 4')
    """
    numbers = "·".join(str(value) for value in (setting.reduction, setting.kernel_size) if value is not None)
    return f"{shortened(setting.block.rpartition(':')[2].replace('_', '-'), 7)} {numbers}".strip()


def _stages(sites: Sequence[str], shapes: Mapping[str, tuple[int, int, int]]) -> list[tuple[int, int]]:
    """Return where each run of sites with one resolution begins and ends."""
    stages: list[tuple[int, int]] = []
    before: tuple[int, ...] | None = None
    for index, site in enumerate(sites):
        side = shapes[site][1:] if site in shapes else before
        if stages and side == before:
            stages[-1] = (stages[-1][0], index + 1)
        else:
            stages.append((index, index + 1))
        before = side
    return stages


def _network(sites: Sequence[str], subject: Subject) -> list[str]:
    """Draw stages as boxes, as high as their maps are large, on the way from input to output."""
    middle, end = HEAD / 2, CELL * len(sites)
    parts = [line(-4, middle, end + 14, middle, "muted-line", 1.5)]
    parts.append(polygon([(end + 14, middle - 4), (end + 22, middle), (end + 14, middle + 4)], "muted"))
    parts.append(text(end + 26, middle + 4, f"{subject.architecture.num_classes} classes", "muted small"))
    heights = [subject.sites[site][1] for site in sites if site in subject.sites]
    for first, last in _stages(sites, subject.sites):
        shape = next((subject.sites[site] for site in sites[first:last] if site in subject.sites), None)
        share = math.sqrt(shape[1] / max(heights)) if shape else 0.5
        x, tall, wide = CELL * first + 2, 24 + 66 * share, CELL * (last - first) - 4
        box = f'x="{x:g}" y="{middle - tall / 2:.4g}" width="{wide:g}" height="{tall:.4g}" rx="4"/>'
        parts += [f'<rect class="panel" {box}', f'<rect class="line-line" {box}']
        parts.append(line(x, middle, x + wide, middle, "muted-line", 1.5))
        channels = sorted({subject.sites[site][0] for site in sites[first:last] if site in subject.sites})
        if shape:
            center = x + wide / 2
            parts.append(text(center, middle - 10, f"{shape[1]}×{shape[2]}", "ink small", "middle"))
            words = "–".join(map(str, dict.fromkeys((channels[0], channels[-1]))))
            parts.append(text(center, middle + 19, f"{words} ch" if wide > 40 else words, "muted small", "middle"))
    parts += [circle(CELL * (index + 0.5), middle, 3.2, "ink") for index in range(len(sites))]
    return parts


def _names(sites: Sequence[str], bottom: float) -> list[str]:
    """Write the names of sites upright under the network."""
    return [
        f"<g><title>{escape(site)}</title>"
        f"{text(CELL * (index + 0.5) + 4, bottom - 8, shortened(site, LONGEST), 'ink small', 'start', -90)}</g>"
        for index, site in enumerate(sites)
    ]


def _ground(empty: Sequence[bool], width: float, top: float) -> list[str]:
    """Draw what is behind a row: a line above it, and a dot at each site without a mark."""
    dots = [circle(CELL * (index + 0.5), top + 15, 1.1, "other") for index, one in enumerate(empty) if one]
    return [line(0, top, width, top), *dots]


def _mark(x: float, y: float, found: _Effect | None, most: float, told: str) -> str:
    if found is None:
        shape = circle(x, y, 6, "other")
    else:
        radius = SMALLEST + (LARGEST - SMALLEST) * (2 * found.certainty - 1)
        shape = _disc(x, y, radius, found.effect / most)
    return f"<g>{shape}<title>{escape(told)}</title></g>"


def _disc(x: float, y: float, radius: float, strength: float) -> str:
    """Draw a disc: a gain is filled, a loss is filled and crossed out, both the deeper the stronger."""
    name = "gain" if strength >= 0 else "loss"
    deep = f' fill-opacity="{0.12 + 0.88 * min(abs(strength), 1.0):.2f}"'
    disc = circle(x, y, radius, name, deep) + circle(x, y, radius, f"{name}-line")
    return disc + (line(x - 0.6 * radius, y, x + 0.6 * radius, y, "paper-line", 1.6) if name == "loss" else "")


def _row_labels(row: Any, subject: Subject, top: float, *, is_best: bool) -> list[str]:
    name = row["reference"].split(" ")[0] if isinstance(row["reference"], str) else f"trial {row['trial']}"
    words = shortened(name, 10) + ", the pick" if is_best else shortened(name, 20)
    accuracy = row["estimate"] if not pd.isna(row["estimate"]) else row["val_accuracy"]
    cost = costs_of(subject.objectives)[0]
    costs = "" if pd.isna(row[cost]) else f" · {_four_digits(float(row[cost]))} {_word(cost)}"
    return [
        line(0, top, LABELS, top),
        text(8, top + 17, words, "ink bold" if is_best else "ink"),
        text(8, top + 32, f"{percent(float(accuracy))}{costs}", "muted small"),
    ]


def _four_digits(number: float) -> str:
    return short(number, 10.0 ** (math.floor(math.log10(number)) - 3)) if number > 0 else "0"


def _word(column: str) -> str:
    return next((name for name, other in COLUMN_OF.items() if other == column), column)


def _key(most: float, known: bool) -> list[str]:
    """Say what colour and size mean."""
    if not known:
        return [text(8, 24, "Trials are too few to tell effects.", "muted small")]
    parts = [text(8, 24, "adds to the accuracy, points", "muted small")]
    for index, share in enumerate((-1, -0.5, 0.5, 1)):
        x = 180 + 54 * index
        parts += [_disc(x, 20, 8, share), text(x, 42, points(share * most), "muted small", "middle")]
    parts.append(text(8, 70, "how sure of gain or loss", "muted small"))
    for index, sure in enumerate((0.5, 0.75, 0.9, 0.99)):
        x, radius = 180 + 54 * index, SMALLEST + (LARGEST - SMALLEST) * (2 * sure - 1)
        parts += [circle(x, 66, radius, "muted-line"), text(x, 92, f"{100 * sure:.0f} %", "muted small", "middle")]
    return parts
