from dataclasses import replace

import plotly.graph_objects as go
import pytest

from placesearch.reporting.figures import curves_figure, effect_figures, front_figures, history_figure
from placesearch.reporting.picture_tables import picture_tables

from test_picture_tables import FINDINGS, RECORDS, SUBJECT, TABLES, record  # isort: skip


def every_figure(subject, tables, records):
    figures = [*front_figures(subject, tables), *effect_figures(subject, tables).values()]
    figures += [history_figure(tables), curves_figure(records, tables)]
    return [figure for figure in figures if figure]


def traces(figure):
    return {trace["name"]: trace for trace in figure["data"] if "name" in trace}


def test_plotly_takes_every_figure():
    figures = every_figure(SUBJECT, TABLES, RECORDS)
    assert len(figures) == 7  # front; sites, blocks, settings, pairs; history; curves
    for figure in figures:
        go.Figure(figure)  # checks every name and value


def test_the_front_has_its_members_references_and_intervals():
    [figure] = front_figures(SUBJECT, TABLES, best=2)
    found = traces(figure)
    assert found["front"]["customdata"] == [0, 2, 1]  # by cost
    assert found["front"]["y"] == pytest.approx([80, 85, 87])
    assert found["front"]["error_y"]["array"] == pytest.approx([2, 2, 2])
    assert found["references"]["customdata"] in ([6], [1])
    assert found["plain network"]["customdata"] == [0]
    assert found["other placements"]["customdata"] == [4]
    assert found["the pick"]["customdata"] == [2]
    assert found["front"]["text"][1] == (
        "<b>trial 2</b><br>estimate 85.00 % (83.00 to 87.00)<br>observed 90.00 %, trained 2 times<br>"
        "parameters: 120<br>b.0.bn2 = se(r=4)"
    )


def test_the_line_joins_only_those_that_lead_at_their_cost():
    subject = replace(SUBJECT, objectives=("accuracy", "macs", "params"))
    records = [replace(RECORDS[0], macs=3), replace(RECORDS[1], macs=1), replace(RECORDS[2], macs=2)]
    macs, params = front_figures(subject, picture_tables(subject, records, FINDINGS))
    lines = [next(t for t in figure["data"] if t.get("mode") == "lines") for figure in (macs, params)]
    assert lines[0]["x"] == [1]  # the best one costs least
    assert lines[1]["x"] == [100, 120, 130]


def test_effects_that_are_shown_to_differ_from_zero_are_filled():
    figures = effect_figures(SUBJECT, TABLES)
    site = figures["site"]
    assert site["layout"]["yaxis"]["ticktext"] == ["a.0.bn2", "a.0", "b.0.bn2"]  # from input to output
    assert site["data"][0]["marker"]["symbol"] == ["circle-open", "circle", "circle"]
    assert site["data"][0]["x"] == pytest.approx([-0.5, -8, 5])
    assert figures["pair"]["layout"]["yaxis"]["ticktext"] == ["se at a.0.bn2<br>se at b.0.bn2"]
    assert figures["setting"]["layout"]["yaxis"]["ticktext"] == ["cbam, k = 3"]


def test_curves_end_with_the_accuracy_of_the_trial():
    figure = curves_figure(RECORDS, TABLES)
    [line] = figure["data"]
    assert line["name"] == "front"
    assert line["y"] == [50.0, 70.0, 84.0, None]


def test_without_trials_there_are_no_figures():
    assert every_figure(SUBJECT, picture_tables(SUBJECT, RECORDS[3:4]), RECORDS[3:4]) == []
    assert len(every_figure(SUBJECT, picture_tables(SUBJECT, RECORDS[:1]), RECORDS[:1])) == 2  # front and history


def test_names_cannot_bring_tags_into_a_figure():
    records = [record(0, "<b>a</b>=mine:Gate(r=4)", 0.5, 10, reference="<i>x")]
    [front, _] = every_figure(SUBJECT, picture_tables(SUBJECT, records), records)
    assert "&lt;b&gt;a&lt;/b&gt;" in front["data"][-1]["text"][0]
    assert "&lt;i&gt;x" in front["layout"]["annotations"][0]["text"]


def test_references_that_are_near_each_other_share_a_label():
    near = [record(7, "a.0.bn2=se(r=4) a.0=cbam(r=4,k=3)", 0.841, 131, reference="near other-name")]
    [figure] = front_figures(SUBJECT, picture_tables(SUBJECT, [*RECORDS, *near], None))
    words = [note["text"] for note in figure["layout"]["annotations"]]
    assert words == ["plain", "se-everywhere, near"]  # the last reference is too far below to be shown
