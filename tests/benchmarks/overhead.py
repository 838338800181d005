"""What a long study spends outside of training: seconds to suggest, store and read trials, by their number.

A study of 50 sites and 1,000 trials whose evaluation takes no time at all: what is left is ours. Every position is
asked for and completed through the storage that `placesearch run` uses, with seven others running, as eight workers
would have it. Writes `reports/benchmarks/overhead.md`. About two minutes on one core.

    python tests/benchmarks/overhead.py [TRIALS]
"""

import platform
import sys
import tempfile
import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import optuna

from placesearch.models.sites import Site
from placesearch.placement import Placement
from placesearch.records import TrialRecord
from placesearch.search.samplers import LAG
from placesearch.search.space import make_space, reference_placements
from placesearch.search.suggesting import Suggester
from placesearch.search.trials import Trials

SITES, TRIALS, TRIAL_SECONDS = 50, 1000, 3.0
REPORT = Path(__file__).parents[2] / "reports" / "benchmarks" / "overhead.md"


def main() -> None:
    count = int(sys.argv[1]) if sys.argv[1:] else TRIALS
    sites = [Site(f"layer{1 + i * 4 // SITES}.{i}.bn2", frozenset({"residual"}), 64, 8, 8) for i in range(SITES)]
    space = make_space(sites, ["se", "cbam"], [4, 8, 16], [3, 7])
    random = np.random.default_rng(0)
    worth = {(site, text): random.normal(0, 0.002) for site, texts in space.choices.items() for text in texts}
    lines, alone = [], timed_suggestions()
    for sampler in ("additive", "tpe"):
        with tempfile.TemporaryDirectory() as folder:
            spent = run(Path(folder), sampler, space, reference_placements(sites), worth, count)
        marks = [mark for mark in (100, 250, 500, 750, 1000) if mark <= count]
        cells = " | ".join(f"{1000 * np.mean(spent[mark - 50 : mark]):.0f}" for mark in marks)
        share = spent.sum() / (spent.sum() + TRIAL_SECONDS * count)
        lines.append(f"| {sampler} | {cells} | {1000 * spent.max():.0f} | {100 * share:.2f} % |")
        print(lines[-1], flush=True)
    heads = " | ".join(f"at {mark}" for mark in marks)
    last = [1000 * seconds for seconds in alone[-50:]]
    text = [
        "# What a long study spends outside of training",
        "",
        f"{SITES} sites with 10 choices each, {count:,} trials, journal file, eight trials at a time; one thread, one "
        f"run of each. {platform.machine()}, optuna {optuna.__version__}, numpy {np.__version__}. Milliseconds to "
        "suggest and to store a trial, mean of the last 50; the longest one, in which variances were estimated anew; "
        f"and the share of a study of one trial of {TRIAL_SECONDS:g} s after the other. Made by "
        "`python tests/benchmarks/overhead.py`.",
        "",
        f"| sampler | {heads} | longest | share |",
        "|---|" + "---:|" * (len(marks) + 2),
        *lines,
        "",
        f"What `additive` takes to suggest, without storage: {np.mean(last):.0f} ms, mean of the last {len(last)} "
        f"({min(last):.0f} to {max(last):.0f}).",
    ]
    REPORT.write_text("\n".join(text) + "\n", encoding="utf-8")


def timed_suggestions() -> list[float]:
    """Return a list to which every suggestion from now on adds the seconds that it took."""
    seconds: list[float] = []
    suggest = Suggester.suggest

    def timed(*given: Any) -> Placement:
        began = time.perf_counter()
        placement = suggest(*given)
        seconds.append(time.perf_counter() - began)
        return placement

    Suggester.suggest = timed  # type: ignore[assignment,method-assign]
    return seconds


def run(
    folder: Path,
    sampler: str,
    space: object,
    references: dict[str, Placement],
    worth: dict[tuple[str, str], float],
    count: int,
) -> np.ndarray:
    """Return the seconds that each trial took to be suggested and stored."""
    random = np.random.default_rng(1)
    trials = Trials(folder / "journal.log", "study", ("accuracy", "params"))
    trials.begin(space, references, sampler, 0, lambda _, setting: [float(len(str(setting)))])  # type: ignore[arg-type]
    running: deque[TrialRecord] = deque()
    spent = np.zeros(count)
    for index in range(count):
        began = time.perf_counter()
        task = trials.ask()
        asked = time.perf_counter()
        assert task is not None
        accuracy = (
            0.9 + sum(worth.get((site, str(s)), 0.0) for site, s in task.placement.items()) + random.normal(0, 0.003)
        )
        cost = sum(len(str(setting)) for setting in task.placement.values())
        running.append(
            TrialRecord(trial=task.trial, state="COMPLETE", placement=task.placement, val_accuracy=accuracy,
                        val_loss=0.3, params=cost, macs=cost, epochs=1, seconds=3.0, seed=0, reference=task.reference,
                        correct="A" * 1111)  # 5,000 validation images
        )  # fmt: skip
        ended = time.perf_counter()
        if len(running) > LAG:
            trials.complete(running.popleft())
        spent[index] = asked - began + time.perf_counter() - ended
    return spent


if __name__ == "__main__":
    main()
