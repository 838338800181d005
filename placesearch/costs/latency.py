"""Latency: how long an inference takes on the device in use.

On a shared machine the clock drifts by more than a block costs. So networks are measured in rounds. A round runs each
of them, in an order of its own, and what counts is the ratio to the plain network of the same round; the interval of
its median comes from the order statistics of the rounds and supposes nothing about how the noise is distributed.

For a search, which asks for thousands of placements, there is a table: each block is measured alone, and the sum is
checked against whole networks that were not used to make it. Where it cannot rank them, it says so.
"""

import copy
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
from scipy.stats import kendalltau
from torch import Tensor, nn

from placesearch.models.blocks import make_block
from placesearch.models.copying import InputSize, copy_of, moved
from placesearch.models.insertion import insert
from placesearch.models.sites import Site
from placesearch.placement import BlockSetting, Placement

SHORTEST = 0.002
"""Seconds that a sample takes at least; what is faster is run several times in a row."""

FEWEST_ROUNDS = 7
MOST_ROUNDS = 51

ENOUGH = 0.5
"""Kendall's tau between predicted and measured latencies from which a table is good enough to rank by."""


@dataclass(frozen=True, slots=True)
class Latency:
    """Latency of a network.

    Args:
        median_ms: Median over the rounds, in milliseconds a batch.
        ratio: Median over the rounds of its time by that of the first network in the same round.
        ratio_low: Lower end of a 95 % interval of that ratio.
        ratio_high: Upper end.
        rounds: Number of rounds.
    """

    median_ms: float
    ratio: float
    ratio_low: float
    ratio_high: float
    rounds: int


def measure(
    models: Sequence[nn.Module],
    input_size: InputSize,
    *,
    device: torch.device,
    precision: str = "fp32",
    batch_size: int = 1,
    seconds: float = 20.0,
) -> list[Latency]:
    """Measure networks against the first of them, interleaved, in inference mode.

    On a GPU a CUDA graph of each network is replayed and timed by events. On a processor one thread runs, pinned to one
    core where the system allows it.

    Args:
        models: The networks, the plain one first; left as they are.
        input_size: Channels, height and width of an input.
        device: Where to.
        precision: `fp32`, or `bf16` for weights and input in that type.
        batch_size: Images at a time.
        seconds: How long it may take; this sets the number of rounds, within 7..51.

    Returns:
        One latency a network. The first one's ratio is 1.
    """
    with _one_thread(device):
        times = _sample([(model, input_size) for model in models], device, precision, batch_size, seconds)
    return [_latency(own, times[0]) for own in times]


def _latency(own: Sequence[float], first: Sequence[float]) -> Latency:
    ratios = sorted(a / b for a, b in zip(own, first, strict=True))
    low, high = median_interval(len(ratios))
    return Latency(1000 * median(own), median(ratios), ratios[low], ratios[high], len(ratios))


def median_interval(count: int) -> tuple[int, int]:
    """Return which of so many sorted values hold their distribution's median between them, with 95 % confidence.

    The number of values below the median is binomial with p = 1/2, however they are distributed. With fewer than six
    values not even the whole range is that sure.

    Example:
        >>> median_interval(20)
        (5, 14)
    """
    low, below = 0, 0.0
    for position in range(count // 2):
        below += math.comb(count, position) / 2**count
        if below > 0.025:
            break
        low = position
    return low, count - 1 - low


def _sample(
    modules: Sequence[tuple[nn.Module, tuple[int, int, int]]],
    device: torch.device,
    precision: str,
    batch_size: int,
    seconds: float,
) -> list[list[float]]:
    """Return for each module its seconds a call, one number a round."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    memo: dict[int, Any] = {}  # what networks share, their copies share too
    copies = []
    for module, shape in modules:
        plain = copy_of(module, shape, share=True)
        copied = moved(copy.deepcopy(plain, memo), device, dtype)
        copies.append(copied.to(memory_format=torch.channels_last))
    calls = [
        _timed(module.eval(), shape, device, dtype, batch_size)
        for module, (_, shape) in zip(copies, modules, strict=True)
    ]
    once = [call(1) for call in calls]
    repeats = [max(1, math.ceil(SHORTEST / max(taken, 1e-7))) for taken in once]
    a_round = sum(count * taken for count, taken in zip(repeats, once, strict=True))
    rounds = int(min(MOST_ROUNDS, max(FEWEST_ROUNDS, seconds / a_round)))
    random = np.random.default_rng(0)
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for index in random.permutation(len(calls)):
            times[index].append(calls[index](repeats[index]))
    return times


def _timed(
    module: nn.Module, shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype, batch_size: int
) -> Callable[[int], float]:
    """Return what runs a module so many times and says how many seconds one took; it is warm already."""
    random = torch.Generator().manual_seed(0)
    image = torch.randn(batch_size, *shape, generator=random).to(device, dtype, memory_format=torch.channels_last)
    if device.type == "cuda":
        return _timed_on_gpu(module, image)

    @torch.inference_mode()
    def run(times: int) -> float:
        began = time.perf_counter()
        for _ in range(times):
            module(image)
        return (time.perf_counter() - began) / times

    run(2)
    return run


def _timed_on_gpu(module: nn.Module, image: Tensor) -> Callable[[int], float]:
    with torch.inference_mode():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                module(image)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            module(image)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def run(times: int) -> float:
        start.record()
        for _ in range(times):
            graph.replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000 / times

    run(3)
    return run


@contextmanager
def _one_thread(device: torch.device) -> Iterator[None]:
    """Run on one thread, pinned to one core where the system allows it; nothing changes for a GPU."""
    if device.type != "cpu":
        yield
        return
    threads, cores = torch.get_num_threads(), None
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        cores = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {min(cores)})
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if cores is not None:
            os.sched_setaffinity(0, cores)


@dataclass(frozen=True, slots=True)
class Agreement:
    """How well a table predicts whole networks that it was not made from.

    Args:
        placements: How many there were.
        error: Mean absolute error of the predicted latency, as a share of the measured one.
        tau: Kendall's rank correlation of predicted and measured latencies.
        p_value: Probability of such a correlation if there were none.
        repeat: Kendall's rank correlation of the two halves of the rounds: what no prediction can be above for long.
        measured_ms: The measured latencies.
    """

    placements: int
    error: float
    tau: float
    p_value: float
    repeat: float
    measured_ms: tuple[float, ...] = ()

    @property
    def ranks(self) -> bool:
        """Whether the table is good enough to rank by."""
        return self.tau >= ENOUGH and self.p_value < 0.05


class LatencyTable:
    """Predicted latencies: the plain network's plus that of each block alone.

    Args:
        plain_ms: Latency of the plain network.
        added_ms: Latency of blocks by setting and shape, such as `se(r=16) 64x56x56`.
        sites: The network's sites.
    """

    def __init__(self, plain_ms: float, added_ms: Mapping[str, float], sites: Sequence[Site]) -> None:
        self.plain_ms, self.added_ms = plain_ms, dict(added_ms)
        self._sites = {name: site for site in sites for name in (site.name, *site.aliases)}

    def predicted(self, placement: Placement) -> float:
        """Return the latency of a placement in milliseconds.

        Raises:
            KeyError: If a block was not measured at such a site.
        """
        return self.plain_ms + math.fsum(self.added(site, setting) for site, setting in placement.items())

    def added(self, site: str, setting: BlockSetting) -> float:
        """Return what a block adds at a site, in milliseconds."""
        return self.added_ms[_entry(self._sites[site], setting)]


def _entry(site: Site, setting: BlockSetting) -> str:
    return f"{setting} {site.channels}x{site.height}x{site.width}"


def latency_table(
    plain: nn.Module,
    input_size: InputSize,
    sites: Sequence[Site],
    settings: Mapping[str, Sequence[BlockSetting]],
    *,
    device: torch.device,
    precision: str = "fp32",
    seconds: float = 30.0,
) -> LatencyTable:
    """Measure the plain network and each distinct pair of a block and a shape, alone, for one image.

    Args:
        plain: The backbone.
        input_size: Channels, height and width of its input.
        sites: Its sites.
        settings: The blocks to measure, by site.
        device: Where to.
        precision: `fp32` or `bf16`.
        seconds: How long it may take.
    """
    known = {name: site for site in sites for name in (site.name, *site.aliases)}
    entries = {_entry(known[site], setting): (known[site], setting) for site, of in settings.items() for setting in of}
    modules = [(plain, input_size)]
    for site, setting in entries.values():
        modules.append((make_block(setting, site.channels), (site.channels, site.height, site.width)))
    with torch.random.fork_rng(devices=[]), _one_thread(device):
        times = _sample(modules, device, precision, 1, seconds)
    own = [1000 * median(of) for of in times]
    return LatencyTable(own[0], dict(zip(entries, own[1:], strict=True)), sites)


def agreement(
    table: LatencyTable,
    plain: nn.Module,
    input_size: InputSize,
    sites: Sequence[Site],
    placements: Sequence[Placement],
    *,
    device: torch.device,
    precision: str = "fp32",
    seconds: float = 30.0,
) -> Agreement:
    """Compare a table with whole networks, measured interleaved with the plain one.

    Args:
        table: The table.
        plain: The backbone.
        input_size: Channels, height and width of its input.
        sites: Its sites.
        placements: What to compare, three at least.
        device: Where to.
        precision: `fp32` or `bf16`.
        seconds: How long it may take.
    """
    models = [plain, *(insert(plain, placement, sites=sites, seed=0, share=True) for placement in placements)]
    with _one_thread(device):
        times = np.array(_sample([(model, input_size) for model in models], device, precision, 1, seconds))
    ratios = times[1:] / times[0]
    measured = np.median(ratios, axis=1) * table.plain_ms
    predicted = np.array([table.predicted(placement) for placement in placements])
    found = kendalltau(predicted, measured)
    halves: Any = kendalltau(np.median(ratios[:, ::2], axis=1), np.median(ratios[:, 1::2], axis=1))
    error = float(np.mean(np.abs(predicted - measured) / measured))
    return Agreement(
        placements=len(placements),
        error=error,
        tau=float(found.statistic),
        p_value=float(found.pvalue),
        repeat=float(halves.statistic),
        measured_ms=tuple(map(float, measured)),
    )
