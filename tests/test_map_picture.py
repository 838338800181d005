import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest

from placesearch.reporting.map_picture import LARGEST, SMALLEST, ordered_sites, placement_map
from placesearch.reporting.picture_tables import picture_tables

from test_picture_tables import FINDINGS, RECORDS, SUBJECT, TABLES, record  # isort: skip

SVG = "{http://www.w3.org/2000/svg}"


def read(drawn):
    return ElementTree.fromstring(drawn.svg())  # noqa: S314 - our own


def marks(root):
    """What each disc is said to show, with its class, radius and depth."""
    found = {}
    for group in root.iter(f"{SVG}g"):
        title, disc = group.find(f"{SVG}title"), group.find(f"{SVG}circle")
        if title is not None and disc is not None:
            found.setdefault(title.text.partition(": ")[0], []).append(
                (disc.get("class"), float(disc.get("r")), float(disc.get("fill-opacity", 1)))
            )
    return found


def test_the_network_is_drawn_from_input_to_output_with_its_stages():
    root = read(placement_map(SUBJECT, TABLES, best=2))
    said = [element.text for element in root.iter(f"{SVG}text")]
    order = ["input 3×32×32", "16×16", "8×8", "10 classes"]
    assert set(order) <= set(said)
    names = [word for word in said if re.fullmatch(r"[ab]\.0(\.bn2)?", word)]
    assert names == ["a.0.bn2", "a.0", "b.0.bn2"]
    boxes = [float(box.get("height")) for box in root.iter(f"{SVG}rect") if box.get("class") == "panel"]
    assert len(boxes) == 2
    assert boxes[0] > boxes[1]


def test_colour_tells_the_effect_and_size_how_sure_it_is():
    found = marks(read(placement_map(SUBJECT, TABLES)))
    [(kind, sure, deep)] = found["any block at b.0.bn2"]
    assert kind == "gain"
    [(other_kind, unsure, light)] = found["any block at a.0.bn2"]
    assert other_kind == "loss"
    assert SMALLEST <= unsure < sure <= LARGEST
    assert light < deep < 1
    [(worst, _, deepest)] = found["any block at a.0"]
    assert (worst, deepest) == ("loss", 1.0)
    assert len(found["b.0.bn2=se(r=4)"]) == 2  # two members of the front have it


def test_each_member_of_the_front_is_a_row_that_can_be_copied():
    drawn = placement_map(SUBJECT, TABLES, best=2)
    rows = [group.get("data-copy") for group in read(drawn).iter(f"{SVG}g") if group.get("data-copy")]
    assert rows == ["0", "2", "1"] * 2  # by cost; once for the labels, once for the marks
    assert any("trial 2, the pick" in label for label in drawn.labels)
    beside = placement_map(SUBJECT, TABLES, best=4)  # a verdict can pick one that is not on the front
    assert any("trial 4, the pick" in label for label in beside.labels)


def test_sites_that_are_not_known_stand_where_their_names_would():
    tables = picture_tables(SUBJECT, RECORDS, FINDINGS)
    root = read(placement_map(replace(SUBJECT, sites={"a.0.bn2": (8, 16, 16), "b.0.bn2": (16, 8, 8)}), tables))
    said = [element.text for element in root.iter(f"{SVG}text")]
    assert [word for word in said if word in SUBJECT.sites] == ["a.0.bn2", "a.0", "b.0.bn2"]
    assert ordered_sites({}, {"layer2.10", "layer2.9"}) == ["layer2.9", "layer2.10"]


@pytest.mark.parametrize("records", [[], RECORDS[3:4], RECORDS[:1], RECORDS[:3]])
def test_a_map_without_findings_shows_what_there_is(records):
    drawn = placement_map(SUBJECT, picture_tables(SUBJECT, records))
    assert "Trials are too few to tell effects." in drawn.svg()
    read(drawn)


def test_names_of_any_kind_are_escaped():
    tables = picture_tables(SUBJECT, [record(0, "a<b>&'\"=mine:Gate(r=4)", 0.5, 10)])
    root = read(placement_map(SUBJECT, tables))
    assert "a<b>&'\"=mine:Gate(r=4)" in marks(root)
