import itertools
import math
import os

import pytest
import torch
from networks import Tiny
from scipy.stats import binom
from torch import nn

from placesearch.costs import latency as module
from placesearch.costs.latency import LatencyTable, agreement, latency_table, measure, median_interval
from placesearch.models.blocks import SqueezeExcitation
from placesearch.models.sites import every_site
from placesearch.placement import BlockSetting, Placement

CPU = torch.device("cpu")
SIZE = (3, 32, 32)


class Clock:
    """A clock that stands still but for what modules add to it, on a machine whose speed drifts."""

    def __init__(self, drift=lambda _: 1.0):
        self.now, self.runs, self.drift = 0.0, 0, drift

    def perf_counter(self):
        return self.now

    def spend(self, seconds):
        self.now += seconds * self.drift(self.runs)
        self.runs += 1


CLOCK = Clock()


class Slow(nn.Module):
    """A network that takes so many seconds of the clock."""

    def __init__(self, seconds):
        super().__init__()
        self.seconds = seconds

    def forward(self, x):
        CLOCK.spend(self.seconds)
        return x


@pytest.fixture(autouse=True)
def _usual_measurements(monkeypatch, _brief_measurements):
    monkeypatch.setattr(module, "SHORTEST", 0.002)
    monkeypatch.setattr(module, "MOST_ROUNDS", 51)


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(module.time, "perf_counter", lambda: CLOCK.perf_counter())
    CLOCK.__init__()
    return CLOCK


def test_latencies_and_ratios_are_those_of_the_clock(clock):
    plain, slower = measure([Slow(0.010), Slow(0.012)], SIZE, device=CPU, seconds=0.5)
    assert (plain.median_ms, slower.median_ms) == pytest.approx((10, 12))
    assert (plain.ratio, slower.ratio) == pytest.approx((1, 1.2))
    assert slower.rounds == int(0.5 / 0.022)


def test_a_machine_that_slows_down_blurs_the_latency_but_not_the_ratio(clock):
    clock.drift = lambda runs: 1 + runs / 20  # several times slower in the end
    _, slower = measure([Slow(0.010), Slow(0.012)], SIZE, device=CPU, seconds=1)
    assert slower.median_ms > 15
    assert slower.ratio_low < 1.2 < slower.ratio_high
    assert slower.ratio == pytest.approx(1.2, rel=0.05)
    assert slower.ratio_high / slower.ratio_low < 1.2


def test_what_is_fast_is_run_several_times_in_a_row(clock):
    (only,) = measure([Slow(0.0001)], SIZE, device=CPU, seconds=0.01)
    assert only.rounds == module.FEWEST_ROUNDS
    assert clock.runs >= only.rounds * 20
    assert only.median_ms == pytest.approx(0.1)


@pytest.mark.parametrize("count", range(6, 60))
def test_the_interval_of_a_median_is_the_narrowest_that_is_sure_enough(count):
    low, high = median_interval(count)
    assert low + high == count - 1

    def coverage(position):
        return 1 - 2 * binom.cdf(position, count, 0.5)

    assert coverage(low) >= 0.95 > coverage(low + 1)


def test_measuring_leaves_networks_threads_and_cores_as_they_were():
    model, threads = Tiny(10).train(), torch.get_num_threads()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    cores = os.sched_getaffinity(0)
    plain, _ = measure([model, model], SIZE, device=CPU, seconds=0.01, batch_size=4)
    assert plain.ratio == 1.0
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert (torch.get_num_threads(), os.sched_getaffinity(0)) == (threads, cores)


def test_bf16_is_measured_in_bf16():
    seen = []

    class Look(nn.Module):
        def forward(self, x):
            seen.append((x.dtype, tuple(x.shape)))
            return x

    measure([Look()], SIZE, device=CPU, precision="bf16", batch_size=2, seconds=0.01)
    assert set(seen) == {(torch.bfloat16, (2, *SIZE))}


PLAIN = Tiny(10)
SITES = every_site(PLAIN, SIZE)
SE, LARGE_SE = BlockSetting("se", 4), BlockSetting("se", 2)


@pytest.fixture
def timed(clock, monkeypatch):
    """Tiny takes 10 ms; SE 1 ms with r=4 and 3 ms with r=2, wherever it is."""
    monkeypatch.setattr(Tiny, "forward", lambda self, x: (CLOCK.spend(0.010), original(self, x))[1])
    monkeypatch.setattr(
        SqueezeExcitation,
        "forward",
        lambda self, x: (CLOCK.spend(0.001 if self.reduce.out_features == 2 else 0.003), x)[1],
    )
    return clock


original = Tiny.forward


def test_a_table_adds_up_what_blocks_take_alone(timed):
    table = latency_table(PLAIN, SIZE, SITES, {"unit1.bn2": [SE, LARGE_SE]}, device=CPU, seconds=0.1)
    assert table.plain_ms == pytest.approx(10)
    assert table.added("unit2.bn2", SE) == pytest.approx(1)  # of the same shape as the site that was measured
    assert table.predicted(Placement.parse("unit1.bn2=se(r=2) unit2.bn2=se(r=4)")) == pytest.approx(14)
    with pytest.raises(KeyError):
        table.predicted(Placement.parse("unit1.bn2=se(r=8)"))


TEXTS = [
    " ".join(
        f"{site}={block}" for site, block in zip(("unit1.bn2", "unit2.bn2", "unit1"), blocks, strict=True) if block
    )
    for blocks in itertools.product(("", "se(r=4)", "se(r=2)"), repeat=3)
]
HELD_OUT = [Placement.parse(text or "none") for text in TEXTS]


def test_a_table_that_is_right_ranks(timed):
    table = LatencyTable(10, {"se(r=4) 8x4x4": 1, "se(r=2) 8x4x4": 3}, SITES)
    seen = agreement(table, PLAIN, SIZE, SITES, HELD_OUT, device=CPU, seconds=0.1)
    assert seen.ranks
    assert seen.placements == 27
    assert min(seen.tau, seen.repeat) > 0.99  # equal sums may be told apart by rounding
    assert seen.error == pytest.approx(0, abs=1e-6)


def test_a_table_that_is_upside_down_does_not_rank(timed):
    table = LatencyTable(10, {"se(r=4) 8x4x4": 3, "se(r=2) 8x4x4": 1}, SITES)
    seen = agreement(table, PLAIN, SIZE, SITES, HELD_OUT, device=CPU, seconds=0.1)
    assert not seen.ranks
    assert seen.error > 0.05


def test_where_all_take_the_same_time_nothing_can_be_ranked(clock):
    table = LatencyTable(10, {"se(r=4) 8x4x4": 1, "se(r=2) 8x4x4": 3}, SITES)
    seen = agreement(table, nn.Sequential(Slow(0.01), PLAIN), SIZE, [], [Placement()] * 3, device=CPU, seconds=0.1)
    assert not seen.ranks
    assert math.isnan(seen.tau)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_on_a_gpu_a_graph_of_the_network_is_timed(precision):
    device = torch.device("cuda")
    plain, same = measure([Tiny(10), Tiny(10)], SIZE, device=device, precision=precision, seconds=1)
    assert plain.median_ms > 0
    assert same.ratio_low <= same.ratio <= same.ratio_high
