"""Costs: whether macs are the published ones, whether the additive table is exact, and how fast it is.

Published: macs of every convolutional network of torchvision against the figure in its weights' metadata. Exact: for
each of six backbones, random placements of all blocks at sites of all kinds, table against an fvcore pass of the whole
network, both figures and parameters. Fast: placements a second once the table stands, against fvcore passes a second in
the same run. Writes `reports/benchmarks/costs.md`. About 25 minutes on one core.

    python tests/benchmarks/costs.py [PLACEMENTS]
"""

import platform
import random
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torchvision

from placesearch.costs import CostTable, profile
from placesearch.models.backbones import load_backbone
from placesearch.models.blocks import BLOCKS, sensible_settings
from placesearch.models.insertion import insert
from placesearch.models.sites import Site, every_site
from placesearch.placement import Placement

BACKBONES = ["resnet18", "resnet50", "mobilenet_v3_small", "efficientnet_b0", "densenet121", "vgg11_bn"]
SIZE = (3, 64, 64)
REPORT = Path(__file__).parents[2] / "reports" / "benchmarks" / "costs.md"


@dataclass
class Sums:
    """How the table of a backbone did."""

    sites: int
    entries: int
    equal: int
    placements: int
    seconds_to_build: float
    per_second: float
    passes_per_second: float


def placements(sites: list[Site], seed: int) -> Iterator[Placement]:
    """Yield random placements, from sparse ones to full ones."""
    draw = random.Random(seed)
    choices = {
        site.name: [
            setting
            for name in BLOCKS
            for setting in sensible_settings(name, site.channels, max(site.height, site.width), [2, 4, 16], [3, 7])
        ]
        for site in sites
    }
    while True:
        share = draw.random()
        yield Placement({name: draw.choice(of) for name, of in choices.items() if of and draw.random() < share})


def check(name: str, count: int, seed: int = 0) -> Sums:
    """Compare the table with fvcore on random placements."""
    plain = load_backbone(name, 10)
    sites = every_site(plain, SIZE)
    drawn = placements([site for site in sites if site.kinds], seed)
    compared = [next(drawn) for _ in range(count)]
    began = time.perf_counter()
    table = CostTable(plain, SIZE, sites=sites)
    sums = [table.cost(placement) for placement in compared]
    built = time.perf_counter() - began
    began = time.perf_counter()
    models = [profile(insert(plain, placement, sites=sites), SIZE) for placement in compared]
    passes = count / (time.perf_counter() - began)
    fresh = [next(drawn) for _ in range(2000)]
    for placement in fresh:
        table.cost(placement)
    began = time.perf_counter()
    for placement in fresh:
        table.cost(placement)
    per_second = len(fresh) / (time.perf_counter() - began)
    equal = sum(one == other for one, other in zip(sums, models, strict=True))
    return Sums(sum(bool(s.kinds) for s in sites), len(table.content()), equal, count, built, per_second, passes)


def published(name: str) -> tuple[int, int, int, float] | None:
    """Return side, macs, macs_full and the published macs in billions; None if nothing is published."""
    weights = torchvision.models.get_model_weights(name).DEFAULT
    if "_ops" not in weights.meta:
        return None
    side = weights.transforms().crop_size[0]
    cost = profile(load_backbone(name, 1000), (3, side, side))
    assert cost.uncounted == (), cost
    return side, cost.macs, cost.macs_full, weights.meta["_ops"]


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    count = int(sys.argv[1]) if sys.argv[1:] else 500
    lines = [
        "# Costs",
        "",
        f"{platform.processor() or platform.machine()}, one core, torch {torch.__version__}, torchvision "
        f"{torchvision.__version__}, seed 0. Made by `python tests/benchmarks/costs.py`.",
        "",
        "## The additive table against fvcore",
        "",
        f"{count} random placements of each backbone at {SIZE[1]}x{SIZE[2]}: all blocks, sites of all kinds, "
        "r of 2, 4, 16, k of 3, 7, densities from 0 to 1. Equal: macs, macs_full and params are.",
        "",
        "| backbone | sites | entries | equal | seconds to build | placements/s | fvcore passes/s | ratio |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name in BACKBONES:
        seen = check(name, count)
        ratio = seen.per_second / seen.passes_per_second
        lines.append(
            f"| {name} | {seen.sites} | {seen.entries} | {seen.equal} of {count} | {seen.seconds_to_build:.1f} "
            f"| {seen.per_second:,.0f} | {seen.passes_per_second:.1f} | {ratio:,.0f} |"
        )
        print(lines[-1], flush=True)
    lines += [
        "",
        "## macs against the published figures",
        "",
        "Published: billions with three digits, in the metadata of torchvision's default weights.",
        "",
        "| network | side | macs | published, G | difference | macs_full over macs |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    worst = 0.0
    for name in torchvision.models.list_models(module=torchvision.models):
        if name.startswith(("vit", "swin", "maxvit")) or (seen_of := published(name)) is None:
            continue
        side, macs, full, billions = seen_of
        worst = max(worst, abs(macs / 1e9 / billions - 1) if abs(macs / 1e9 - billions) > 0.0005 else 0.0)
        difference = f"{100 * (macs / 1e9 / billions - 1):+.2f} %"
        lines.append(f"| {name} | {side} | {macs:,} | {billions} | {difference} | {full / macs:.3f} |")
        print(lines[-1], flush=True)
    lines += ["", f"Largest difference beyond the rounding of the published figure: {100 * worst:.3f} %."]
    if len(sys.argv) == 1:
        REPORT.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
