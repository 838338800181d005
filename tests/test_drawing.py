import itertools
import xml.etree.ElementTree as ElementTree

import pytest

from placesearch.reporting.drawing import DARK, LIGHT, certainty, circle, short, style, svg, text, ticks


def luminance(colour):
    """Relative luminance of sRGB as WCAG 2 defines it."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one, other):
    lighter, darker = sorted((luminance(one), luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


@pytest.mark.parametrize("colours", [LIGHT, DARK], ids=["light", "dark"])
def test_colours_stand_out_from_the_paper_as_wcag_asks(colours):
    for name in ("ink", "muted", "front", "reference"):
        assert contrast(colours[name], colours["paper"]) >= 4.5, name  # text
    for name in ("gain", "loss"):
        assert contrast(colours[name], colours["paper"]) >= 3, name  # marks
    assert contrast(colours["ink"], colours["panel"]) >= 4.5
    assert colours.keys() == LIGHT.keys()


def test_a_picture_is_well_formed_whatever_its_texts_say():
    picture = svg(10, 20, [text(1, 2, "<&>\"'"), circle(1, 1, 2, "ink")], "a < b & c")
    root = ElementTree.fromstring(picture)  # noqa: S314 - our own
    name = "{http://www.w3.org/2000/svg}"
    assert [child.tag.removeprefix(name) for child in root] == ["title", "style", "rect", "text", "circle"]
    assert root.find(f"{name}text").text == "<&>\"'"
    assert root.find(f"{name}title").text == "a < b & c"
    assert root.get("viewBox") == "0 0 10 20"


@pytest.mark.parametrize(("low", "high"), [(0, 1), (93.217, 97.9), (11_181_642, 11_270_722), (-0.004, 0.0031), (5, 5)])
def test_ticks_are_round_within_the_range_and_evenly_apart(low, high):
    marks = ticks(low, high)
    assert all(low - 1e-9 <= mark <= high + 1e-9 for mark in marks)
    if high > low:
        assert 2 <= len(marks) <= 11
        steps = [after - before for before, after in itertools.pairwise(marks)]
        assert max(steps) == pytest.approx(min(steps))


def test_the_style_can_be_kept_to_one_part_of_a_page():
    assert all(rule.startswith(".drawn ") for rule in style(LIGHT, ".drawn ").splitlines())


def test_certainty_is_that_of_a_normal_distribution():
    assert certainty(1.6449, 0.0, 3.2898) == pytest.approx(0.95, abs=1e-4)  # an interval that ends at zero
    assert certainty(-1.6449, -3.2898, 0.0) == pytest.approx(0.95, abs=1e-4)
    assert (certainty(1.0, 1.0, 1.0), certainty(0.0, 0.0, 0.0)) == (1.0, 0.5)


def test_numbers_that_differ_are_written_differently():
    assert [short(value, 20_000) for value in (11_180_000, 11_200_000)] == ["11.18M", "11.20M"]
    assert short(2_500_000_000) == "2.5G"
