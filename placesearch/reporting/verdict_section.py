"""The part of `summary.md` that tells the verdict, in words that need no statistics to be read."""

from collections.abc import Collection, Sequence
from statistics import mean, stdev

from placesearch.placement import Placement
from placesearch.records import TrialRecord
from placesearch.reporting.tables import searched
from placesearch.search.findings import Findings
from placesearch.verdict.paired import LEVEL, POWER
from placesearch.verdict.trainings import Training
from placesearch.verdict.verdicts import BIGGER, NOT_SHOWN, PLAIN, REFERENCES, Confirmed, Network, Verdict


def verdict_section(
    confirmed: Confirmed,
    records: Sequence[TrialRecord],
    findings: Findings | None,
    front: Collection[Placement],
) -> list[str]:
    """Return the lines of the section.

    Args:
        confirmed: What the confirmation says.
        records: The trials of the search.
        findings: What they say.
        front: Placements of the front as it is now.
    """
    trainings = [one for group in confirmed.networks.values() for one in group]
    seeds, images = {one.seed for one in trainings}, {one.images for one in trainings if one.images}
    where = f"{max(images):,} images of the test split" if images else "test split of the study's own evaluation"
    lines = [
        "## Verdict",
        "",
        f"{len(confirmed.placements)} placements, references included, were trained again on {len(seeds)} fresh seeds, "
        f"{confirmed.epochs} epoch{'s'[: confirmed.epochs > 1]} each, and measured on the {where}, which the search "
        f"has not seen. {_bigger(confirmed)}",
        "",
        "| placement | against | difference in points | verdict | p | would have shown |",
        "|---|---|---:|---|---:|---:|",
        *(_row(one) for one in confirmed.verdicts),
        "",
        f"Between equals, a study claims a difference in at most {100 * LEVEL:.0f} % of cases, all "
        f"{confirmed.comparisons} comparisons taken together (Holm's correction, also in p). An interval leaves zero "
        f"out exactly if a difference is claimed. Chance is measured between seeds"
        f"{' and between images' if images else ' alone, on whatever the evaluation tests on'}. The last column is the "
        f"true difference that so many seeds would have shown with a probability of {100 * POWER:.0f} %: where it is "
        f"large, `{NOT_SHOWN}` says little, and more seeds would say more.",
        "",
    ]
    members = {one.placement for one in confirmed.verdicts if one.reference is None}
    left = sorted(str(placement) for placement in members - set(front))
    new = sorted(str(placement) for placement in set(front) - confirmed.placements)
    if left:
        lines += [f"No longer on the front: {', '.join(f'`{text}`' for text in left)}.", ""]
    if new:
        lines += [f"On the front, but not confirmed yet: {', '.join(f'`{text}`' for text in new)}.", ""]
    return lines + _curse(confirmed, records, findings) + _accuracies(confirmed)


def verdict_text(verdict: Verdict) -> str:
    """Return a verdict in words; without one, the largest gain that is still possible.

    Example:
        >>> one = Verdict(placement=Placement(), against="plain", against_placement=Placement(), start="scratch",
        ...               seeds=5, failed=0, difference=0.001, low=-0.004, high=0.006, p_value=0.4)
        >>> verdict_text(one)
        'no difference shown; at most +0.60 points'
    """
    failed = f"; {verdict.failed} seeds left out, a training failed" if verdict.failed else ""
    if verdict.p_value is None or verdict.high is None:
        why = "fewer than two seeds" if verdict.seeds < 2 else "the same difference under every seed, nothing to test"
        return f"{NOT_SHOWN}: {why}{failed}"
    if verdict.verdict == NOT_SHOWN:
        return f"{NOT_SHOWN}; at most {100 * verdict.high:+.2f} points{failed}"
    return f"**{verdict.verdict}**{failed}"


def difference_text(verdict: Verdict) -> str:
    """Return a difference in points with its interval; empty without one."""
    if verdict.difference is None:
        return ""
    interval = "" if verdict.low is None or verdict.high is None else _range(100 * verdict.low, 100 * verdict.high)
    return f"{100 * verdict.difference:+.2f}{interval}"


def _range(low: float, high: float) -> str:
    return f" ({low:+.2f} to {high:+.2f})"


def _row(verdict: Verdict) -> str:
    start = f" (from {verdict.start})" if verdict.start != "scratch" else ""
    p_value = "" if verdict.p_value is None else f"{verdict.p_value:.2g}"
    shown = "" if verdict.detectable is None else f"{100 * verdict.detectable:.2f}"
    return (
        f"| {_called(verdict)}{start} | {verdict.against} | {difference_text(verdict)} | {verdict_text(verdict)} "
        f"| {p_value} | {shown} |"
    )


def _called(verdict: Verdict) -> str:
    return verdict.reference or f"`{verdict.placement}`"


def _bigger(confirmed: Confirmed) -> str:
    if confirmed.bigger is None:
        return "There is no bigger plain network to compare with: this backbone's family has no recipe here to grow by."
    name, params = confirmed.bigger
    return f"{BIGGER} is `{name}`, a plain network of the same family with more residual units, {params:,} params."


def _curse(confirmed: Confirmed, records: Sequence[TrialRecord], findings: Findings | None) -> list[str]:
    """Show how much of what the search promised over plain was left."""
    promised = searched(records, findings)
    rows = []
    for one in confirmed.verdicts:
        estimates = [promised.get(placement) for placement in (one.placement, one.against_placement)]
        if one.against == PLAIN and one.difference is not None and None not in estimates:
            (own, seen), (plain, plain_seen) = estimates  # type: ignore[misc]
            estimate = "" if own is None or plain is None else f"{100 * (own - plain):+.2f}"
            rows.append(
                f"| {_called(one)}{f' (from {one.start})' if one.start != 'scratch' else ''} | "
                f"{100 * (seen - plain_seen):+.2f} | {estimate} | {difference_text(one)} |"
            )
    if not rows:
        return []
    return [
        "What the search saw and estimated over plain, in points, and what fresh seeds confirm. The best of many looks "
        "better than it is:",
        "",
        "| placement | seen | estimated | confirmed |",
        "|---|---:|---:|---:|",
        *rows,
        "",
    ]


def _accuracies(confirmed: Confirmed) -> list[str]:
    lines = ["| network | params | test accuracy | sd over seeds | seeds |", "|---|---:|---:|---:|---:|"]
    for network, trainings in confirmed.networks.items():
        values = [one.accuracy for one in trainings if one.accuracy is not None]
        middle = f"{100 * mean(values):.2f} %" if values else "failed"
        spread = f"{100 * stdev(values):.2f}" if len(values) > 1 else ""
        params = next((f"{one.params:,}" for one in trainings if one.params is not None), "")
        lines.append(f"| {_name(network, trainings[0])} | {params} | {middle} | {spread} | {len(values)} |")
    return [*lines, ""]


def _name(network: Network, training: Training) -> str:
    names = (training.reference or "").split()
    name = next((name for name in REFERENCES if name in names), f"`{network.placement}`")
    return f"{name} (from {network.start})" if network.start != "scratch" else name
