import xml.etree.ElementTree as ElementTree
from dataclasses import replace

from placesearch.reporting.front_picture import WIDTH, front_svg, range_of
from placesearch.reporting.picture_tables import picture_tables

from test_picture_tables import FINDINGS, RECORDS, SUBJECT, TABLES  # isort: skip

SVG = "{http://www.w3.org/2000/svg}"


def read(picture):
    return ElementTree.fromstring(picture)  # noqa: S314 - our own


def words(root):
    return [element.text for element in root.iter(f"{SVG}text")]


def test_the_picture_marks_the_front_the_references_and_the_pick():
    root = read(front_svg(SUBJECT, TABLES, best=2))
    classes = [element.get("class") for element in root.iter(f"{SVG}circle")]
    assert classes.count("front") == 3
    assert classes.count("other") == 1
    assert classes.count("ink-line") == 1  # the ring
    said = words(root)
    assert {"plain", "se-everywhere", "trial 2 (pick)", "parameters", "accuracy, %"} <= set(said)
    assert "below the range: cbam-after-every-block 30.00 %" in said


def test_each_cost_has_a_picture_of_its_own():
    subject = replace(SUBJECT, objectives=("accuracy", "macs", "params"))
    root = read(front_svg(subject, picture_tables(subject, RECORDS, FINDINGS)))
    assert float(root.get("width")) == 2 * WIDTH
    assert {"multiply-adds", "parameters"} <= set(words(root))


def test_the_range_holds_the_intervals_of_the_front_and_leaves_out_what_is_far_below():
    low, high = range_of(TABLES)
    assert 0.75 < low < 0.78  # the interval of plain ends at 0.78, another placement is at 0.79
    assert high > 0.89  # that of the best one


def test_few_trials_or_none_make_a_picture_all_the_same():
    for records in ([], RECORDS[3:4], RECORDS[:1], RECORDS[:2]):
        root = read(front_svg(SUBJECT, picture_tables(SUBJECT, records)))
        assert ("No trial succeeded." in words(root)) == (records in ([], RECORDS[3:4]))
