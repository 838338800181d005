"""The report to look at: one HTML file that opens without a network, and two pictures for papers and READMEs."""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from placesearch.models.architecture import Architecture
from placesearch.placement import Placement
from placesearch.records import TrialRecord
from placesearch.reporting.drawing import DARK, LIGHT, percent, points, style
from placesearch.reporting.figures import curves_figure, effect_figures, front_figures, history_figure
from placesearch.reporting.front_picture import front_svg, title_of
from placesearch.reporting.map_picture import KEY, LABELS, PlacementMap, placement_map
from placesearch.reporting.picture_tables import PictureTables, costs_of, picture_tables
from placesearch.reporting.writing import Subject, caution, duration_text, found_architecture, replace_file
from placesearch.search.findings import Findings

_VERDICT = (
    "placement",
    "against",
    "seeds",
    "difference",
    "difference_low",
    "difference_high",
    "p_value",
    "verdict",
    "start",
    "detectable",
)
"""Columns of verdict.csv that the page shows."""

SHORTEST_FOLDED = 4
"""A placement of more blocks is folded away in the table, so that the table stays one."""


def write_page(
    folder: Path,
    subject: Subject,
    records: Sequence[TrialRecord],
    findings: Findings | None = None,
    best: Architecture | None = None,
) -> None:
    """Write `report.html`, `front.svg`, `map.svg` and the tables that only they need; each appears whole or not at all.

    The verdict is read from `verdict.csv` in the same folder, if it is there.

    Args:
        folder: The report folder.
        subject: What the report is about.
        records: Finished trials.
        findings: What they say.
        best: The pick, as in best.yaml.

    Raises:
        OSError: If the folder cannot be read or written to.
    """
    tables = picture_tables(subject, records, findings)
    picked = best.found.trial if best and best.found else None
    for name, table in (
        ("candidates", tables.candidates),
        ("effects", tables.averages),
        ("hypervolume", tables.history),
    ):
        replace_file(folder / f"{name}.csv", table.to_csv(index=False))
    replace_file(folder / "front.svg", front_svg(subject, tables, picked))
    drawn = placement_map(subject, tables, picked)
    replace_file(folder / "map.svg", drawn.svg())
    verdict = folder / "verdict.csv"
    judged = pd.read_csv(verdict) if verdict.exists() else None
    replace_file(folder / "report.html", page(subject, records, findings, tables, drawn, picked, judged))


def page(
    subject: Subject,
    records: Sequence[TrialRecord],
    findings: Findings | None,
    tables: PictureTables,
    drawn: PlacementMap,
    best: int | None = None,
    verdict: pd.DataFrame | None = None,
) -> str:
    """Return the page as HTML. It asks for nothing from elsewhere: styles, scripts, pictures and data are in it.

    Args:
        subject: What the report is about.
        records: Finished trials.
        findings: What they say.
        tables: What the pictures show.
        drawn: The placement map.
        best: The trial that is the pick.
        verdict: The columns of verdict.csv.
    """
    rows = tables.candidates
    of_trial = {record.trial: record for record in records}
    named = rows[rows.on_front | rows.reference.notna() | (rows.trial == best)]
    figures: dict[str, Any] = {f"front-{i}": one for i, one in enumerate(front_figures(subject, tables, best, _TINTS))}
    figures |= {f"effect-{name}": one for name, one in effect_figures(subject, tables, _TINTS).items()}
    figures |= {"history": history_figure(tables, _TINTS), "curves": curves_figure(records, tables, _TINTS)}
    figures = {name: figure for name, figure in figures.items() if figure}
    texts: dict[int, str] = {}  # each once, however many figures show it
    for name, figure in figures.items():
        for trace in figure["data"] if name.startswith("front-") else ():
            texts |= dict(zip(trace.get("customdata", ()), trace.pop("text", ()), strict=True))
    data = {
        "figures": figures,
        "texts": texts,
        "configs": {int(trial): found_architecture(subject, of_trial[trial]).to_yaml() for trial in named.trial},
        "placements": {int(trial): words for trial, words in zip(rows.trial, rows.placement, strict=True)},
        "light": dict(LIGHT),
        "dark": dict(DARK),
    }
    failed: dict[str, list[int]] = {}
    for record in records:
        if record.state == "FAIL":
            failed.setdefault(record.error or "no reason given", []).append(record.trial)
    return _TEMPLATE.render(
        subject=subject,
        headline=headline(subject, tables, best),
        counts=_counts(records),
        seconds=sum(record.seconds or 0.0 for record in records),
        facts=subject.facts,
        caution=caution(subject, records, findings),
        table=_table(subject, tables, best),
        costs=[title_of(cost) for cost in costs_of(subject.objectives)],
        drawn=drawn,
        parts={name: Markup("\n".join(getattr(drawn, name))) for name in ("labels", "body", "key")},  # noqa: S704 - escaped where drawn
        labels_width=LABELS,
        key_width=KEY,
        figures=figures,
        verdict=_verdict(verdict, rows),
        failed=failed,
        estimated=findings is not None,
        style=Markup(style(_TINTS, ".drawn ")),  # noqa: S704 - our own
        light=LIGHT,
        dark=DARK,
        data=Markup(in_script(data)),  # noqa: S704 - cannot end the script
        plotly=Markup(get_plotlyjs()),  # noqa: S704 - the library itself
    )


def in_script(value: Any) -> str:
    r"""Return a value as JSON that may stand in a script: no text in it can end the script; what is no number is null.

    Example:
        >>> in_script({"</script>": float("nan")})
        '{"\\u003c/script\\u003e":null}'
    """
    written = json.dumps(_finite(value), allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        written = written.replace(character, f"\\u{ord(character):04x}")
    return written


def headline(subject: Subject, tables: PictureTables, best: int | None) -> str:
    """Say in a sentence or two what was found.

    Args:
        subject: What the report is about.
        tables: What was found.
        best: The trial that is the pick.
    """
    rows = tables.candidates
    picked = rows[rows.trial == best]
    if not len(picked):
        return "No trial succeeded."
    row = picked.iloc[0]
    blocks = 0 if row.placement == "none" else len(row.placement.split(" "))
    what = f"{blocks} block{'' if blocks == 1 else 's'}" if blocks else "the plain network"
    said = f"The pick is trial {row.trial}, {what}: {_accuracy(row)}"
    plain = rows[rows.placement == "none"]
    if not blocks or not len(plain):
        return said + "."
    other = plain.iloc[0]
    said += f", where the plain network has {_accuracy(other)}"
    more = [
        f"{100 * (row[cost] / other[cost] - 1):+.2g} % {title_of(cost)}"
        for cost in costs_of(subject.objectives)
        if not pd.isna(row[cost]) and other[cost]
    ]
    said += f"; it costs {' and '.join(more)}." if more else "."
    if not pd.isna(row.estimate) and row.estimate_low <= other.estimate_high:
        said += " The intervals overlap: no difference is shown yet."
    return said


def _accuracy(row: Any) -> str:
    if pd.isna(row.estimate):
        return f"{percent(row.val_accuracy)} observed"
    return f"{percent(row.estimate)} estimated ({100 * row.estimate_low:.2f} to {100 * row.estimate_high:.2f})"


def _counts(records: Sequence[TrialRecord]) -> str:
    words = {"COMPLETE": "complete", "PRUNED": "stopped early", "FAIL": "failed"}
    counted = {word: sum(record.state == state for record in records) for state, word in words.items()}
    return ", ".join(f"{count:,} {word}" for word, count in counted.items() if count or word == "complete")


def _table(subject: Subject, tables: PictureTables, best: int | None) -> list[dict[str, Any]]:
    """Return the rows of the table of front and references, in the order of the first cost."""
    rows, costs = tables.candidates, costs_of(subject.objectives)
    plain = rows[rows.placement == "none"]
    lines = []
    for _, row in (
        rows[rows.on_front | rows.reference.notna() | (rows.trial == best)].sort_values([*costs, "trial"]).iterrows()
    ):
        shown = []
        for cost in costs:
            value = (
                "" if pd.isna(row[cost]) else f"{row[cost]:,}" if cost != "latency_predicted_ms" else f"{row[cost]:.3f}"
            )
            base = plain[cost].iloc[0] if len(plain) else None
            more = "" if not value or not base or pd.isna(base) else f"{100 * (row[cost] / base - 1):+.2f} %"
            shown.append((value, more))
        estimated = not pd.isna(row.estimate)
        lines.append(
            {
                "trial": int(row.trial),
                "reference": row.reference if isinstance(row.reference, str) else "",
                "on_front": bool(row.on_front),
                "is_best": row.trial == best,
                "estimate": percent(row.estimate) if estimated else "",
                "interval": f"{100 * row.estimate_low:.2f} to {100 * row.estimate_high:.2f}" if estimated else "",
                "observed": percent(row.val_accuracy),
                "replicates": int(row.replicates),
                "costs": shown,
                "placement": row.placement,
                "blocks": _blocks(row.placement),
            }
        )
    return lines


def _blocks(words: str) -> str:
    """Say how many blocks of each kind a placement has, if they are more than a few.

    Example:
        >>> _blocks("a=se(r=4) b=se(r=4)"), _blocks("a=se(r=4) b=se(r=4) c=eca(k=3) d=se(r=8) e=se(r=8)")
        ('', '5 blocks: 4 se, 1 eca')
    """
    counts = Counter(setting.block for setting in Placement.parse(words).values())
    if counts.total() <= SHORTEST_FOLDED:
        return ""
    return f"{counts.total()} blocks: " + ", ".join(f"{count} {name}" for name, count in counts.most_common())


def _verdict(frame: pd.DataFrame | None, candidates: pd.DataFrame) -> list[dict[str, str]]:
    """Return the rows of the verdict as texts; columns that are missing stay empty."""
    if frame is None:
        return []
    names = {
        words: reference.split(" ")[0] if isinstance(reference, str) else f"trial {trial}"
        for words, reference, trial in zip(candidates.placement, candidates.reference, candidates.trial, strict=True)
    }
    lines = []
    for _, row in frame.reindex(columns=list(_VERDICT)).iterrows():
        given = {name: "" if pd.isna(row[name]) else row[name] for name in _VERDICT}
        ends = [given["difference_low"], given["difference_high"]]
        given["interval"] = "" if "" in ends else f"{points(float(ends[0]))} to {points(float(ends[1]))}"
        given["difference"] = "" if given["difference"] == "" else points(float(given["difference"]))
        given["p_value"] = "" if given["p_value"] == "" else f"{float(given['p_value']):.2g}"
        given["detectable"] = "" if given["detectable"] == "" else f"{100 * float(given['detectable']):.2f}"
        given["name"] = names.get(given["placement"], "") if given["start"] in ("", "scratch") else given["start"]
        given["blocks"] = _blocks(given["placement"])
        lines.append({name: str(value) for name, value in given.items()})
    return lines


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


_TINTS = {name: f"var(--{name})" for name in LIGHT}
"""In the page colours are names that its script looks up, because they change with the screen's."""

_ENVIRONMENT = Environment(
    loader=PackageLoader("placesearch", "reporting"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_ENVIRONMENT.filters["duration"] = duration_text
_TEMPLATE = _ENVIRONMENT.get_template("page.html")
