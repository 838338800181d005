import plotly.graph_objects as go
import pytest

from placesearch.reporting.map_figure import map_figure
from placesearch.reporting.picture_tables import picture_tables

from test_picture_tables import RECORDS, SUBJECT, TABLES, record  # isort: skip


def test_plotly_takes_it():
    go.Figure(map_figure(SUBJECT, TABLES, 2))


def test_the_small_map_has_a_column_for_each_member_and_a_mark_for_each_block():
    figure = map_figure(SUBJECT, TABLES, best=2)
    [trace], layout = figure["data"], figure["layout"]
    assert layout["yaxis"]["ticktext"] == ["a.0.bn2", "b.0.bn2"]  # from input to output; no member uses a.0
    assert layout["xaxis"]["ticktext"] == ["any<br>block", "plain", "trial 2<br><b>the pick</b>", "trial 1"]  # by cost
    assert list(zip(trace["x"], trace["y"], strict=True)) == [(0, 0), (0, 1), (2, 1), (3, 0), (3, 1)]
    assert trace["text"][2:] == ["se 4", "se 4", "se 4"]
    assert trace["hovertext"][2] == "b.0.bn2 = se 4: +5.00 points (+3.00 to +7.00)"
    assert trace["marker"]["symbol"] == ["circle-x", "circle", "circle", "circle-x", "circle"]
    sizes, depths = trace["marker"]["size"], trace["marker"]["opacity"]
    assert sizes[3] < sizes[2]  # less sure of its sign
    assert max(depths) == pytest.approx(1.0)  # the strongest


def test_a_study_without_a_member_has_no_map():
    assert map_figure(SUBJECT, picture_tables(SUBJECT, [RECORDS[3]], None)) is None


def test_names_cannot_bring_tags_into_it():
    records = [record(0, "<b>a</b>=mine:Gate(r=4)", 0.5, 10)]
    figure = map_figure(SUBJECT, picture_tables(SUBJECT, records))
    assert figure["layout"]["yaxis"]["ticktext"] == ["&lt;b&gt;a&lt;/b&gt;", "a.0.bn2", "b.0.bn2"]
    assert figure["data"][0]["hovertext"][0] == "&lt;b&gt;a&lt;/b&gt; = Gate 4"
