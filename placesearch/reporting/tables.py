"""Trials as pandas tables."""

from collections.abc import Callable, Collection, Mapping, Sequence
from statistics import mean
from typing import Any

import pandas as pd

from placesearch.config import KINDS
from placesearch.costs.latency import Latency
from placesearch.front import front
from placesearch.models.sites import Site
from placesearch.placement import BlockSetting, Placement
from placesearch.records import Cost, TrialRecord
from placesearch.search.findings import Findings
from placesearch.verdict.verdicts import BIGGER, Confirmed

TRIAL_COLUMNS = {
    "trial": "int64",
    "state": "str",
    "placement": "str",
    "val_accuracy": "float64",
    "val_loss": "float64",
    "macs": "Int64",
    "params": "Int64",
    "latency_ms": "float64",
    "epochs": "Int64",
    "seconds": "float64",
    "seed": "Int64",
    "reference": "object",
    "error": "object",
    "training_seconds": "float64",
    "macs_full": "Int64",
    "latency_predicted_ms": "float64",
    "latency_ratio": "float64",
    "latency_ratio_low": "float64",
    "latency_ratio_high": "float64",
    "latency_batch_ms": "float64",
    "latency_batch_ratio": "float64",
    "latency_batch_ratio_low": "float64",
    "latency_batch_ratio_high": "float64",
    "train_memory_mb": "float64",
    "inference_memory_mb": "float64",
    "curve": "object",
    "stopped_after": "Int64",
    "forecast": "float64",
}
"""Columns of trials.csv and their types."""

_NAMES = list(TRIAL_COLUMNS)
_OF_MEMBERS = _NAMES[_NAMES.index("macs_full") : _NAMES.index("curve")]

FRONT_COLUMNS = {
    "trial": "int64",
    "placement": "str",
    "val_accuracy": "float64",
    "estimate": "float64",
    "estimate_low": "float64",
    "estimate_high": "float64",
    "replicates": "Int64",
    "macs": "Int64",
    "params": "Int64",
    "latency_ms": "float64",
    **{name: kind for name, kind in TRIAL_COLUMNS.items() if name in _OF_MEMBERS},
    "epochs": "Int64",
}
"""Columns of front.csv and their types."""

EFFECT_COLUMNS = {
    "site": "str",
    "block": "str",
    "reduction": "Int64",
    "kernel_size": "Int64",
    "tried": "int64",
    "effect": "float64",
    "effect_low": "float64",
    "effect_high": "float64",
    "macs": "Int64",
    "params": "Int64",
    "with_site": "object",
    "with_block": "object",
}
"""Columns of sites.csv and their types."""

VERDICT_COLUMNS = {
    "placement": "str",
    "against": "str",
    "seeds": "int64",
    "difference": "float64",
    "difference_low": "float64",
    "difference_high": "float64",
    "p_value": "float64",
    "verdict": "str",
    "start": "str",
    "epochs": "int64",
    "failed": "int64",
    "standard_error": "float64",
    "p_value_single": "float64",
    "detectable": "float64",
    "search_observed": "float64",
    "search_estimate": "float64",
    "on_front": "bool",
}
"""Columns of verdict.csv and their types."""

CONFIRMED_COLUMNS = {
    "placement": "str",
    "backbone": "str",
    "reference": "object",
    "start": "str",
    "epochs": "int64",
    "seed": "int64",
    "state": "str",
    "test_accuracy": "float64",
    "test_loss": "float64",
    "params": "Int64",
    "macs": "Int64",
    "seconds": "float64",
    "error": "object",
}
"""Columns of confirmed.csv and their types."""


def trials_frame(records: Sequence[TrialRecord]) -> pd.DataFrame:
    """Return one row a trial, with the columns of trials.csv; what was not measured is missing, never zero.

    Args:
        records: Finished trials.
    """
    rows = {name: [getattr(record, name) for record in records] for name in TRIAL_COLUMNS}
    rows["placement"] = [str(record.placement) for record in records]
    rows["curve"] = [" ".join(map(str, record.curve)) if record.curve else None for record in records]
    return pd.DataFrame(rows).astype(TRIAL_COLUMNS)


def sites_frame(sites: Sequence[Site], costs: Mapping[str, Sequence[Cost]]) -> pd.DataFrame:
    """Return one row a site, with what a block adds there.

    Args:
        sites: The sites.
        costs: For each block one cost a site.
    """
    table = pd.DataFrame(
        {
            "site": [site.name for site in sites],
            "kinds": [" ".join(kind for kind in KINDS if kind in site.kinds) for site in sites],
            "channels": [site.channels for site in sites],
            "height": [site.height for site in sites],
            "width": [site.width for site in sites],
        }
    )
    for block, of_block in costs.items():
        table[f"{block}_macs"] = [cost.macs for cost in of_block]
        table[f"{block}_params"] = [cost.params for cost in of_block]
        table[f"{block}_macs_full"] = [cost.macs_full for cost in of_block]
    table["attention"] = [" ".join(site.gates) for site in sites]
    table["aliases"] = [" ".join(site.aliases) for site in sites]
    return table


def comparison_frame(costs: Sequence[Cost], latencies: Sequence[Latency]) -> pd.DataFrame:
    """Return one row a cost: the plain backbone's, the candidate's, and their ratio with its interval if it has one.

    Args:
        costs: Of the plain backbone and the candidate.
        latencies: Of the same.
    """
    counted = [(name, *(getattr(cost, name) for cost in costs)) for name in ("macs", "macs_full", "params")]
    rows: list[tuple[Any, ...]] = [(name, plain, own, own / plain, None, None) for name, plain, own in counted]
    plain, candidate = latencies
    measured = (candidate.ratio, candidate.ratio_low, candidate.ratio_high)
    rows.append(("latency_ms", plain.median_ms, candidate.median_ms, *measured))
    return pd.DataFrame(rows, columns=["cost", "plain", "candidate", "ratio", "ratio_low", "ratio_high"], dtype=object)


def front_frame(
    records: Sequence[TrialRecord], objectives: tuple[str, ...], findings: Findings | None = None
) -> pd.DataFrame:
    """Return the front, one row a member, ordered by cost, with the columns of front.csv.

    Args:
        records: Finished trials.
        objectives: Names of the objectives.
        findings: What the trials say; the front goes by it, or by what was observed if there is none.
    """
    members = front(records, objectives, accuracies(findings))
    table = trials_frame(members)
    table["replicates"] = [
        sum(other.state == "COMPLETE" and other.placement == member.placement for other in records)
        for member in members
    ]
    for name in ("estimate", "low", "high") if findings else ():
        column = name if name == "estimate" else f"estimate_{name}"
        table[column] = [getattr(findings.accuracy[member.placement], name) for member in members]  # type: ignore[union-attr]
    return table.reindex(columns=list(FRONT_COLUMNS)).astype(FRONT_COLUMNS)


def accuracies(findings: Findings | None) -> dict[Placement, float] | None:
    """Return what the accuracy of each placement is expected to be; None without findings."""
    return {placement: found.estimate for placement, found in findings.accuracy.items()} if findings else None


def effects_frame(
    findings: Findings | None, cost: Callable[[str, BlockSetting], tuple[int, int] | None]
) -> pd.DataFrame:
    """Return the effect of each setting at each site, then of the strongest pairs, with the columns of sites.csv.

    Args:
        findings: What the trials say; without any there are no rows.
        cost: Returns the macs and params that a block adds at a site, None where that was not counted.
    """
    rows: list[dict[str, Any]] = []
    for effect in findings.effects if findings else ():
        macs, params = (None if effect.with_site else cost(effect.site, effect.setting)) or (None, None)
        rows.append(
            {
                "site": effect.site,
                "block": effect.setting.block,
                "reduction": effect.setting.reduction,
                "kernel_size": effect.setting.kernel_size,
                "tried": effect.tried,
                "effect": effect.added.estimate,
                "effect_low": effect.added.low,
                "effect_high": effect.added.high,
                "macs": macs,
                "params": params,
                "with_site": effect.with_site,
                "with_block": effect.with_block,
            }
        )
    return pd.DataFrame(rows, columns=list(EFFECT_COLUMNS)).astype(EFFECT_COLUMNS)


def searched(records: Sequence[TrialRecord], findings: Findings | None) -> dict[Placement, tuple[float | None, float]]:
    """Return what the search estimated of each placement, if it did, and saw on average in its longest trainings.

    Args:
        records: Finished trials.
        findings: What they say.
    """
    complete = [record for record in records if record.state == "COMPLETE" and record.val_accuracy is not None]
    seen: dict[Placement, dict[int, list[float]]] = {}
    for record in complete:
        seen.setdefault(record.placement, {}).setdefault(record.epochs or 0, []).append(record.val_accuracy or 0.0)
    estimates = accuracies(findings) or {}
    return {placement: (estimates.get(placement), mean(of[max(of)])) for placement, of in seen.items()}


def verdict_frame(
    confirmed: Confirmed | None,
    records: Sequence[TrialRecord],
    findings: Findings | None,
    members: Collection[Placement],
) -> pd.DataFrame:
    """Return one row a comparison, with the columns of verdict.csv.

    Args:
        confirmed: What a confirmation says; without one there are no rows.
        records: The trials of the search.
        findings: What they say.
        members: Placements of the front as it is now.
    """
    promised = searched(records, findings)
    rows: list[dict[str, Any]] = []
    for one in confirmed.verdicts if confirmed else ():
        own, other = promised.get(one.placement), promised.get(one.against_placement)
        known = own is not None and other is not None and one.against != BIGGER
        estimates = (own[0], other[0]) if known else (None, None)  # type: ignore[index]
        rows.append(
            {
                "placement": str(one.placement),
                "against": one.against,
                "seeds": one.seeds,
                "difference": one.difference,
                "difference_low": one.low,
                "difference_high": one.high,
                "p_value": one.p_value,
                "verdict": one.verdict,
                "start": one.start,
                "epochs": confirmed.epochs if confirmed else 0,
                "failed": one.failed,
                "standard_error": one.error,
                "p_value_single": one.p_single,
                "detectable": one.detectable,
                "search_observed": own[1] - other[1] if known else None,  # type: ignore[index]
                "search_estimate": estimates[0] - estimates[1] if None not in estimates else None,  # type: ignore[operator]
                "on_front": one.placement in members,
            }
        )
    return pd.DataFrame(rows, columns=list(VERDICT_COLUMNS)).astype(VERDICT_COLUMNS)


def confirmed_frame(confirmed: Confirmed) -> pd.DataFrame:
    """Return one row a training behind the verdicts, with the columns of confirmed.csv.

    Args:
        confirmed: What a confirmation says.
    """
    trainings = [training for group in confirmed.networks.values() for training in group]
    rows = {
        name: [
            str(training.placement) if name == "placement" else getattr(training, name.removeprefix("test_"))
            for training in trainings
        ]
        for name in CONFIRMED_COLUMNS
    }
    return pd.DataFrame(rows).astype(CONFIRMED_COLUMNS)
