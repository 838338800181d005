"""How many candidates a GPU trains at a time: measured before a search, not guessed."""

from collections.abc import Callable

WORTH = 1.1
"""Another worker stays if all of them together take more than so many times the steps that they took without it."""

ROOM = 1.5
"""Another worker is tried only if so many times the memory that each took so far is free: blocks need more."""


def fit(pace: Callable[[int], float], free: Callable[[], float], most: int) -> tuple[int, list[float]]:
    """Add workers as long as that pays.

    Args:
        pace: Measures steps a second over so many workers; 0.0 if they cannot train together.
        free: Tells the free memory of the GPU, in any unit; first called before any worker has taken some.
        most: Number of workers that is not exceeded.

    Returns:
        The number of workers, and what was measured for 1, 2, ... of them.

    Example:
        >>> fit({1: 20.0, 2: 31.0, 3: 33.0}.__getitem__, lambda: 1.0, most=8)
        (2, [20.0, 31.0, 33.0])
    """
    at_first = free()
    paces = [pace(1)]
    while (count := len(paces)) < most:
        left = free()
        if left < ROOM * (at_first - left) / count:
            break
        paces.append(pace(count + 1))
        if paces[-1] <= WORTH * paces[-2]:
            return count, paces
    return count, paces
