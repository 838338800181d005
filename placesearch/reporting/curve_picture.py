"""The course of a training as a picture: losses and the validation accuracy by epoch, as SVG."""

from collections.abc import Sequence

from placesearch.records import Epoch
from placesearch.reporting.drawing import circle, line, percent, polyline, svg, text, ticks

WIDTH, HEIGHT = 420.0, 280.0
LEFT, RIGHT, TOP, BOTTOM = 52.0, 24.0, 36.0, 44.0
"""Size of each of the two pictures and of its margins, in pixels."""


def best_of(log: Sequence[Epoch]) -> Epoch:
    """Return the best epoch: of the highest validation accuracy, then of the lowest loss, then the first.

    Example:
        >>> seen = [(0.5, 1.5), (0.9, 0.4), (0.9, 0.4)]
        >>> best_of([Epoch(index, 1.0, *one, 0.1, 1.0) for index, one in enumerate(seen, 1)]).epoch
        2
    """
    return min(log, key=lambda one: (-one.val_accuracy, one.val_loss, one.epoch))


def curve_svg(log: Sequence[Epoch], epochs: int, name: str) -> str:
    """Draw the losses and, beside them, the validation accuracy with the best epoch marked.

    Args:
        log: The epochs that ended, at least one.
        epochs: How many there are to be.
        name: What is trained.
    """
    best = best_of(log)
    losses = {
        "training (with label smoothing)": ("other", [one.train_loss for one in log]),
        "validation": ("front", [one.val_loss for one in log]),
    }
    accuracies = {"validation": ("front", [100 * one.val_accuracy for one in log])}
    parts = _panel(0.0, "loss, nats", losses, log, epochs)
    parts += _panel(WIDTH, "validation accuracy, %", accuracies, log, epochs, best)
    title = (
        f"{name}: losses and validation accuracy over {len(log)} of {epochs} epochs, best {percent(best.val_accuracy)}"
    )
    return svg(2 * WIDTH, HEIGHT, parts, title)


def _panel(
    left: float,
    title: str,
    curves: dict[str, tuple[str, list[float]]],
    log: Sequence[Epoch],
    epochs: int,
    best: Epoch | None = None,
) -> list[str]:
    values = [value for _, series in curves.values() for value in series]
    low, high = min(values), max(values)
    room = 0.08 * (high - low) or 0.05 * max(abs(high), 1.0)
    low, high = low - room, high + room
    last = max(epochs, 2)

    def across(epoch: float) -> float:
        return left + LEFT + (epoch - 1) / (last - 1) * (WIDTH - LEFT - RIGHT)

    def up(value: float) -> float:
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = [text(left + LEFT, 18, title)]
    for number in ticks(low, high):
        parts.append(line(left + LEFT, up(number), left + WIDTH - RIGHT, up(number)))
        parts.append(text(left + LEFT - 6, up(number) + 4, f"{number:g}", "muted small", "end"))
    whole = sorted({round(tick) for tick in ticks(1, last)})
    parts += [text(across(number), HEIGHT - BOTTOM + 16, f"{number}", "muted small", "middle") for number in whole]
    parts.append(text(left + (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 10, "epoch", "muted", "middle"))
    for place, (name, (colour, series)) in enumerate(curves.items()):
        points = [(across(one.epoch), up(value)) for one, value in zip(log, series, strict=True)]
        parts.append(polyline(points, f"{colour}-line", 2) if len(points) > 1 else circle(*points[0], 3, colour))
        if len(curves) > 1:
            x = left + LEFT + 90 + 180 * place
            parts += [line(x, 14, x + 18, 14, f"{colour}-line", 2), text(x + 23, 18, name, "muted small")]
    if best is not None:
        words = f"best: {percent(best.val_accuracy)}, epoch {best.epoch}"
        parts.append(circle(across(best.epoch), up(100 * best.val_accuracy), 4, "reference"))
        parts.append(text(left + WIDTH - RIGHT, 18, words, "reference small bold", "end"))
    return parts
