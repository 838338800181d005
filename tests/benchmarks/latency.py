"""Latency: how well the sum of blocks measured alone predicts whole networks, and how well either repeats.

For each backbone two tables are measured, one after the other; then whole networks with placements that no table was
made from, interleaved with the plain one. Printed are the mean absolute percentage error and Kendall's rank correlation
of the prediction, the rank correlation of the two tables, and that of the two halves of the whole measurements. For
comparison: the rank correlation of the whole measurements with counted costs, and how much SE and CBAM everywhere add
to counted costs and to the stopwatch. Writes `reports/benchmarks/latency.md`, for a GPU `latency_gpu.md`. About 10
minutes on one core.

    python tests/benchmarks/latency.py [cpu|cuda]
"""

import platform
import sys
import time
from pathlib import Path

import numpy as np
import torch
from scipy.stats import kendalltau

from placesearch.costs import CostTable
from placesearch.costs.latency import Agreement, LatencyTable, agreement, latency_table, measure
from placesearch.models.backbones import load_backbone
from placesearch.models.insertion import insert
from placesearch.models.sites import every_site
from placesearch.placement import BlockSetting, Placement
from placesearch.plan import device_name
from placesearch.search.space import make_space, reference_placements
from placesearch.training.loop import pick_precision

CASES = [("resnet18", 97), ("resnet18", 224), ("resnet50", 224), ("mobilenet_v3_small", 224), ("vgg11_bn", 64)]
HELD_OUT = 24
REPORTS = Path(__file__).parents[2] / "reports" / "benchmarks"


def main() -> None:
    device = torch.device(sys.argv[1] if sys.argv[1:] else "cpu")
    precision, began = pick_precision(device), time.monotonic()
    lines: list[str] = []
    added: list[str] = []
    for name, side in CASES:
        torch.manual_seed(0)
        size = (3, side, side)
        plain = load_backbone(name, 10).eval()
        sites = every_site(plain, size)
        kind = "residual" if any("residual" in site.kinds for site in sites) else "block"
        space = make_space([site for site in sites if kind in site.kinds], ["se", "cbam"], [4, 8, 16], [3, 7])
        references = reference_placements(sites)
        settings = {site: [BlockSetting.parse(text) for text in texts[1:]] for site, texts in space.choices.items()}
        where = {"device": device, "precision": precision}
        tables = [latency_table(plain, size, sites, settings, **where) for _ in range(2)]
        random = np.random.default_rng(1)
        placements = []
        for share in np.linspace(0.1, 1, HELD_OUT):
            drawn = {s: of[random.integers(len(of))] for s, of in settings.items() if random.random() < share}
            placements.append(Placement(drawn))
        seen = agreement(tables[0], plain, size, sites, placements, **where)
        entries = list(tables[0].added_ms)
        repeat = kendalltau(*([table.added_ms[entry] for entry in entries] for table in tables)).statistic
        costs = CostTable(plain, size, sites=sites)
        counted = [
            kendalltau(seen.measured_ms, [getattr(costs.cost(placement), cost) for placement in placements]).statistic
            for cost in ("macs", "macs_full", "params")
        ]
        lines.append(row(name, side, tables[0], seen, repeat, counted))
        print(lines[-1], flush=True)
        wanted = ("se-everywhere", "cbam-everywhere")
        whole = {
            key: placement for name_of, placement in references.items() for key in wanted if key in name_of.split()
        }
        models = [plain, *(insert(plain, placement, sites=sites) for placement in whole.values())]
        for size_of_batch in (1, 32):
            measured = measure(models, size, batch_size=size_of_batch, seconds=30, **where)
            for (key, placement), latency in zip(whole.items(), measured[1:], strict=True):
                macs = costs.cost(placement).macs / costs.plain.macs - 1
                full = costs.cost(placement).macs_full / costs.plain.macs_full - 1
                times = f"{latency.ratio - 1:+.1%} ({latency.ratio_low - 1:+.1%} to {latency.ratio_high - 1:+.1%})"
                added.append(f"| {name} | {side} | {key} | {size_of_batch} | {macs:+.3%} | {full:+.3%} | {times} |")
                print(added[-1], flush=True)
    where_run = device_name(device) if device.type != "cpu" else f"{platform.machine()}, one thread on one core"
    text = [
        "# Latency",
        "",
        f"{where_run}, {precision}, torch {torch.__version__}, {time.monotonic() - began:.0f} s. "
        f"Made by `python tests/benchmarks/latency.py {device.type}`.",
        "",
        "## The sum of blocks measured alone, against whole networks",
        "",
        f"One image. {HELD_OUT} placements of SE and CBAM (r of 4, 8, 16; k of 3, 7) that no table was made from, "
        "from sparse to full. Error: mean absolute percentage error of the predicted latency. tau: Kendall's rank "
        "correlation of predicted and measured latencies. Tables: the same of the entries of two tables measured one "
        "after the other. Wholes: the same of the two halves of the rounds in which the whole networks were "
        "measured. The last three: the same of counted costs and measured latencies.",
        "",
        "| backbone | side | plain, ms | entries | error | tau | tables | wholes | macs | macs_full | params |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
        *lines,
        "",
        "## What blocks everywhere add",
        "",
        "Medians over rounds of the ratio to the plain network, with 95 % intervals.",
        "",
        "| backbone | side | placement | batch | macs | macs_full | latency |",
        "|---|---:|---|---:|---:|---:|---:|",
        *added,
    ]
    REPORTS.joinpath("latency.md" if device.type == "cpu" else "latency_gpu.md").write_text("\n".join(text) + "\n")


def row(name: str, side: int, table: LatencyTable, seen: Agreement, repeat: float, counted: list[float]) -> str:
    """Write a line of the first table."""
    by = " | ".join(f"{tau:.2f}" for tau in counted)
    return (
        f"| {name} | {side} | {table.plain_ms:.2f} | {len(table.added_ms)} | {seen.error:.1%} | {seen.tau:.2f} "
        f"| {repeat:.2f} | {seen.repeat:.2f} | {by} |"
    )


if __name__ == "__main__":
    main()
