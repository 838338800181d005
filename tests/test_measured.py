import pandas as pd
import pytest
import torch
from test_study import config

import placesearch as ps
from placesearch import measured
from placesearch.costs.latency import Latency
from placesearch.errors import StudyError
from placesearch.records import Told
from placesearch.training.loop import pick_precision

PRECISION = pick_precision(torch.device("cpu"))


@pytest.fixture
def stopwatch(monkeypatch):
    """Networks take as many milliseconds as they have parameters, an image; notes what was measured."""
    seen = []

    def measure(models, input_size, *, device, precision, batch_size, seconds):
        sizes = [sum(weight.numel() for weight in model.parameters()) for model in models]
        seen.append((batch_size, sizes))
        ratios = [size / sizes[0] for size in sizes]
        return [
            Latency(size * batch_size, ratio, ratio - 0.1, ratio + 0.1, 9)
            for size, ratio in zip(sizes, ratios, strict=True)
        ]

    monkeypatch.setattr(measured, "measure", measure)
    monkeypatch.setattr(measured, "TOO_LONG", 1e9)
    return seen


def test_the_front_is_measured_whole_for_one_image_and_a_training_batch(workplace, stopwatch):
    told = []
    study = ps.run(config(name="s"), watch=told.append)
    members = [record.params for record in study.front]
    assert stopwatch == [(1, [2682, *members]), (128, [2682, *members])]
    front = pd.read_csv(study.folder / "front.csv")
    assert front.latency_ms.tolist() == front.params.tolist()
    assert front.latency_ratio.tolist() == pytest.approx((front.params / 2682).tolist())
    assert front.latency_batch_ms.tolist() == (128 * front.params).tolist()
    trials = pd.read_csv(study.folder / "trials.csv")
    assert trials.latency_ms.notna().sum() == len(members)  # the others were not measured
    assert (
        f"one thread of the processor, {PRECISION}, inference, batches of 1 and 128"
        in (study.folder / "summary.md").read_text()
    )
    lines = [event.line for event in told if isinstance(event, Told)]
    networks = f"{len(members)} network{'s' if len(members) > 1 else ''}"
    assert lines == [f"measuring the latency of the front, {networks}, against the plain one ..."]


def test_what_was_measured_is_kept_and_not_measured_again(workplace, stopwatch):
    before = ps.run(config(name="s"))
    stopwatch.clear()
    assert ps.run(config(name="s")).front == before.front
    assert stopwatch == []
    assert ps.load_study("s").front == before.front


def test_under_other_conditions_all_is_measured_again(workplace, stopwatch, monkeypatch):
    before = ps.run(config(name="s"))
    stopwatch.clear()
    monkeypatch.setattr(measured, "device_name", lambda _: "another machine")
    ps.run(config(name="s"))
    assert len(stopwatch[0][1]) == 1 + len(before.front)


def test_a_training_batch_that_takes_too_long_is_left_out(workplace, stopwatch, monkeypatch):
    monkeypatch.setattr(measured, "TOO_LONG", 1.0)
    study = ps.run(config(name="s"))
    assert [size for size, _ in stopwatch] == [1]
    assert study.front_frame().latency_batch_ms.isna().all()


def test_a_network_that_cannot_be_measured_costs_no_report(workplace, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no inference\nwithout me")

    monkeypatch.setattr(measured, "measure", fail)
    told = []
    study = ps.run(config(name="s"), watch=told.append)
    assert study.front_frame().latency_ms.isna().all()
    assert [event.line for event in told if isinstance(event, Told)][-1] == "no latency: RuntimeError: no inference"


@pytest.mark.parametrize("text", ["placements: 3\n", "placements: {none: {seconds: x, wrong: 1}}\n", "[]\n"])
def test_damaged_latencies_get_one_line(workplace, stopwatch, text):
    ps.run(config(name="s"))
    (workplace / "studies" / "s" / "latency.yaml").write_text(text)
    with pytest.raises((StudyError, ps.InputError), match=r"latency.yaml is damaged"):
        ps.load_study("s")


def test_an_interrupt_while_measuring_loses_no_trial(workplace, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(measured, "measure", stop)
    with pytest.raises(KeyboardInterrupt, match="reports are in"):
        ps.run(config(name="s"))
    assert len(pd.read_csv("reports/s/trials.csv")) == 6


def test_latency_can_be_an_objective_and_have_a_limit_where_it_ranks(workplace, monkeypatch):
    """One table, kept with the study; a limit of nothing but the plain network and one block."""
    import placesearch.plan as plan
    from placesearch.costs.latency import Agreement, LatencyTable

    made = []

    def table(backbone, input_size, sites, settings, *, device, precision):
        made.append(device)
        entries = {f"{s} 8x4x4": 1.0 + s.reduction / 100 for of in settings.values() for s in of}
        return LatencyTable(10.0, entries, sites)

    monkeypatch.setattr(plan, "latency_table", table)
    monkeypatch.setattr(plan, "agreement", lambda *_, **__: Agreement(16, 0.01, 0.9, 1e-6, 0.95))
    values = {"name": "s", "objectives": "accuracy,latency_ms", "max_latency": "+15%", "trials": 5}
    told = []
    study = ps.run(config(**values), watch=told.append)
    frame = study.trials_frame()
    assert frame.latency_predicted_ms.max() <= 11.5
    assert all(len(record.placement) <= 1 for record in study.records)
    assert any("rank correlation 0.90 (of two measurements 0.95), mean error 1.0 %" in line for line in told[0].lines)
    ps.run(config(**{**values, "trials": 6}))
    assert made == [torch.device("cpu")]

    monkeypatch.setattr(plan, "agreement", lambda *_, **__: Agreement(16, 0.1, 0.2, 0.3, 0.1))
    with pytest.raises(ps.InputError, match=r"latency cannot rank placements here.*rank correlation 0.20"):
        ps.run(config(name="t", objectives="accuracy,latency_ms"))
    assert not (workplace / "studies" / "t").exists()
