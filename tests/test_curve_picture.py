import xml.etree.ElementTree as ElementTree

from placesearch.records import Epoch
from placesearch.reporting.curve_picture import best_of, curve_svg


def log(*accuracies):
    return [Epoch(number, 2 / number, value, 1.5 / number, 0.1, 3.0) for number, value in enumerate(accuracies, 1)]


def test_the_curves_are_drawn_as_far_as_the_training_is_with_the_best_epoch_marked():
    picture = curve_svg(log(0.5, 0.9, 0.8), epochs=6, name="a <network>")
    root = ElementTree.fromstring(picture)  # noqa: S314 - our own
    space = "{http://www.w3.org/2000/svg}"
    lines = [element.get("points").split() for element in root.iter(f"{space}polyline")]
    assert [len(points) for points in lines] == [3, 3, 3]
    words = [element.text for element in root.iter(f"{space}text")]
    assert "best: 90.00 %, epoch 2" in words
    assert {"loss, nats", "validation accuracy, %", "epoch", "6"} <= set(words)
    assert root.find(f"{space}title").text.startswith("a <network>: losses")
    for points in lines:
        for x, y in (map(float, point.split(",")) for point in points):
            assert 0 < x < 840
            assert 0 < y < 280


def test_one_epoch_and_equal_values_can_be_drawn():
    for rows in (log(0.5), log(0.5, 0.5, 0.5), log(0.0)):
        ElementTree.fromstring(curve_svg(rows, epochs=len(rows), name="x"))  # noqa: S314 - our own


def test_of_equally_accurate_epochs_the_one_with_the_lower_loss_is_best():
    assert best_of(log(0.5, 0.9, 0.9)).epoch == 3
