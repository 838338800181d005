import pytest

from placesearch.cli.plot import ROWS, WIDTH, Point, front_plot

PLAIN, BEST = Point("plain", 100.0, 0.9, "plain"), Point("pick", 200.0, 0.96, "trial 7")
MIDDLE = Point("front", 150.0, 0.93, "trial 3")


def plot(*points, ascii_only=True):
    return front_plot(points, "params", "accuracy, %", ascii_only=ascii_only)


def at(lines, mark):
    """Row and column of a mark in the field."""
    field = [line[8:] for line in lines[1 : 1 + ROWS]]
    return next((row, cells.index(mark)) for row, cells in enumerate(field) if mark in cells)


def test_points_stand_where_their_cost_and_accuracy_are():
    lines = plot(PLAIN, MIDDLE, BEST)
    assert at(lines, "#") == (ROWS - 1, 0)
    assert at(lines, "@") == (0, WIDTH - 1)
    assert at(lines, "o") == (ROWS // 2, round((WIDTH - 1) / 2))
    labels = [line[:6].strip() for line in lines[1 : 1 + ROWS]]
    assert [label for label in labels if label] == ["96.00", "93.00", "90.00"]
    assert lines[0] == "accuracy, %"
    assert lines[2 + ROWS].split() == ["100", "params", "200"]
    assert lines[3 + ROWS].strip() == "o front   # plain   @ best.yaml, trial 7"
    assert len(lines) <= 12
    assert max(map(len, lines)) <= 70


@pytest.mark.parametrize("points", [(), (PLAIN,), (PLAIN, PLAIN), (Point("reference", 100.0, 0.9, "se-everywhere"),)])
def test_fewer_than_two_points_are_no_picture(points):
    assert plot(*points) == []


def test_ascii_is_enough_and_characters_are_used_where_there_are_more():
    assert "\n".join(plot(PLAIN, MIDDLE, BEST)).isascii()
    fine = plot(PLAIN, MIDDLE, BEST, Point("reference", 190.0, 0.91, "se-everywhere"), ascii_only=False)
    assert "× reference   ● front   ■ plain   ◆ best.yaml, trial 7" in fine[-1]


def test_a_reference_far_below_is_told_instead_of_squeezing_the_others():
    far = [Point("reference", 180.0, 0.5, "cbam-everywhere"), Point("reference", 190.0, 0.4, "se-everywhere")]
    far.append(Point("reference", 110.0, 0.3, "cbam-after-last-convolution"))
    lines = plot(PLAIN, MIDDLE, BEST, *far)
    assert lines[-1].strip() == "below: cbam-everywhere 50.00 % and 2 more"
    assert plot(PLAIN, BEST, *far[:2])[-1].strip() == "below: cbam-everywhere 50.00 %, se-everywhere 40.00 %"
    assert lines[1 : 1 + ROWS] == plot(PLAIN, MIDDLE, BEST)[1 : 1 + ROWS]
    assert max(map(len, lines)) <= 70


def test_equal_costs_and_equal_accuracies_are_drawn_in_the_middle():
    up = plot(PLAIN, Point("front", 100.0, 0.95, "trial 1"))
    assert (at(up, "#"), at(up, "o")) == ((ROWS - 1, (WIDTH - 1) // 2), (0, (WIDTH - 1) // 2))
    assert "params 100" in up[-2]
    across = plot(PLAIN, Point("reference", 200.0, 0.9, "se-everywhere"))
    assert (at(across, "#"), at(across, "x")) == ((ROWS // 2, 0), (ROWS // 2, WIDTH - 1))
    assert sum(line[:6].strip() != "" for line in across[1 : 1 + ROWS]) == 1


def test_of_points_in_one_place_the_most_important_is_seen():
    lines = plot(PLAIN, BEST, Point("reference", 200.0, 0.96, "se-everywhere"))
    assert at(lines, "@") == (0, WIDTH - 1)
    assert "x" not in "".join(lines[1 : 1 + ROWS])
