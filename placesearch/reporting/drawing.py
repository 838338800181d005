"""What pictures are made of: colours, marks, texts and ticks, as SVG.

Colours are those of Okabe and Ito, which people with any of the common colour blindnesses tell apart; nothing is said
by colour alone.
"""

import math
from collections.abc import Mapping, Sequence
from html import escape

from placesearch.search.findings import REACH

LIGHT: Mapping[str, str] = {
    "paper": "#ffffff",
    "panel": "#f4f6f8",
    "ink": "#1a1f24",
    "muted": "#57616b",
    "line": "#d3d9df",
    "front": "#0072b2",
    "reference": "#c24e00",
    "other": "#98a2ac",
    "gain": "#0072b2",
    "loss": "#d55e00",
}
"""Colours on white paper, by what they are for."""

DARK: Mapping[str, str] = {
    "paper": "#13171b",
    "panel": "#1c2228",
    "ink": "#e9edf1",
    "muted": "#a5afb9",
    "line": "#363f48",
    "front": "#56b4e9",
    "reference": "#f0a04b",
    "other": "#75808b",
    "gain": "#56b4e9",
    "loss": "#e8833a",
}
"""The same on a dark screen."""


def style(colours: Mapping[str, str], within: str = "") -> str:
    """Return the style sheet of pictures: for each name of a colour a class to fill with it, and one to draw lines.

    Args:
        colours: Values of the colours by name.
        within: A selector of what the pictures are in, with a blank behind it.
    """
    font = "system-ui,-apple-system,'Segoe UI',Roboto,'DejaVu Sans',sans-serif"
    rules = [f"text{{font-family:{font};font-size:12px}}", "text.small{font-size:10px}", "text.bold{font-weight:600}"]
    rules.append(f"text.label{{paint-order:stroke;stroke:{colours['paper']};stroke-width:3px}}")
    for name, colour in colours.items():
        rules += [f".{name}{{fill:{colour}}}", f".{name}-line{{stroke:{colour};fill:none}}"]
    return "\n".join(within + rule for rule in rules)


def svg(width: float, height: float, body: Sequence[str], title: str) -> str:
    """Return a picture that stands by itself, on white paper.

    Args:
        width: In pixels.
        height: In pixels.
        body: Its elements.
        title: What it shows, in a sentence.
    """
    size = f'width="{width:g}" height="{height:g}" viewBox="0 0 {width:g} {height:g}"'
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">',
        f"<title>{escape(title)}</title>",
        f"<style>{style(LIGHT)}</style>",
        f'<rect class="paper" width="{width:g}" height="{height:g}"/>',
        *body,
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def text(x: float, y: float, words: str, classes: str = "ink", anchor: str = "start", turned: float = 0) -> str:
    """Return a line of text; special characters are escaped.

    Args:
        x: Where it is anchored.
        y: Its base line.
        words: What it says.
        classes: Colour and form.
        anchor: `start`, `middle` or `end`.
        turned: By so many degrees, clockwise.

    Example:
        >>> text(1, 2, "a<b")
        '<text class="ink" x="1" y="2">a&lt;b</text>'
    """
    more = "" if anchor == "start" else f' text-anchor="{anchor}"'
    more += f' transform="rotate({turned:g} {x:.5g} {y:.5g})"' if turned else ""
    return f'<text class="{classes}" x="{x:.5g}" y="{y:.5g}"{more}>{escape(words)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, classes: str = "line-line", width: float = 1) -> str:
    """Return a straight line."""
    return f'<line class="{classes}" x1="{x1:.5g}" y1="{y1:.5g}" x2="{x2:.5g}" y2="{y2:.5g}" stroke-width="{width:g}"/>'


def polygon(points: Sequence[tuple[float, float]], classes: str) -> str:
    """Return a filled shape."""
    corners = " ".join(f"{x:.5g},{y:.5g}" for x, y in points)
    return f'<polygon class="{classes}" points="{corners}"/>'


def polyline(points: Sequence[tuple[float, float]], classes: str, width: float = 1.5) -> str:
    """Return an open line through points."""
    corners = " ".join(f"{x:.5g},{y:.5g}" for x, y in points)
    return f'<polyline class="{classes}" points="{corners}" stroke-width="{width:g}"/>'


def circle(x: float, y: float, radius: float, classes: str, more: str = "") -> str:
    """Return a filled circle."""
    return f'<circle class="{classes}" cx="{x:.5g}" cy="{y:.5g}" r="{radius:.4g}"{more}/>'


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return round numbers that divide a range, about so many.

    Example:
        >>> ticks(0.0, 1.0), ticks(93.2, 97.9)
        ([0.0, 0.2, 0.4, 0.6, 0.8, 1.0], [94.0, 95.0, 96.0, 97.0])
    """
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(factor for factor in (1, 2, 5, 10) if factor * power >= 0.999 * rough)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def short(number: float, step: float = 0.0) -> str:
    """Return a number with k, M or G, with as many decimals as tell apart numbers that differ by a step.

    Example:
        >>> short(11_181_642, 20_000), short(440_336_576), short(0.5), short(-1500, 500)
        ('11.18M', '440M', '0.5', '-1.5k')
    """
    unit, name = next(((u, n) for u, n in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if abs(number) >= u), (1.0, ""))
    if not step:
        return f"{number / unit:.3g}{name}"
    decimals = max(0, -math.floor(math.log10(step / unit) + 1e-9))
    return f"{number / unit:.{decimals}f}{name}"


def shortened(words: str, most: int) -> str:
    """Return a text with its middle left out if it is longer than so many characters.

    Example:
        >>> shortened("layer1.0.conv2.bn", 12)
        'layer1…v2.bn'
    """
    if len(words) <= most:
        return words
    return f"{words[: most // 2]}…{words[len(words) - (most - most // 2 - 1) :]}"


def percent(share: float) -> str:
    """Return a share as a percentage.

    Example:
        >>> percent(0.9512)
        '95.12 %'
    """
    return f"{100 * share:.2f} %"


def points(share: float) -> str:
    """Return a difference of accuracies in points.

    Example:
        >>> points(0.0053)
        '+0.53'
    """
    return f"{100 * share:+.2f}"


def certainty(effect: float, low: float, high: float) -> float:
    """Return how probable it is that an effect has the sign that is expected of it, from its 90 % interval.

    Example:
        >>> certainty(1.0, -0.6449, 2.6449)  # one standard deviation from zero
        0.8413...
        >>> certainty(0.0, -1.0, 1.0)
        0.5
    """
    deviation = (high - low) / 2 / REACH
    if deviation <= 0:
        return 1.0 if effect else 0.5
    return 0.5 * (1 + math.erf(abs(effect) / deviation / math.sqrt(2)))
