"""How long does it take to write the reports of a long study, and how large is its page?

A study of 50 sites and 1,000 trials whose evaluation takes no time: a sum of effects with noise, in one length, and in
two with every tenth trial long. Timed are what the trials say (the model), tables and texts, and pictures and page.
Writes `reports/benchmarks/page.md`. About three minutes on one core.

    python tests/benchmarks/page.py [TRIALS]
"""

import platform
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import plotly

from placesearch.models.architecture import Architecture
from placesearch.models.sites import Site
from placesearch.placement import BlockSetting
from placesearch.records import TrialRecord
from placesearch.reporting.page import write_page
from placesearch.reporting.writing import Subject, found_architecture, pick, write_report
from placesearch.search.space import NONE, make_space, reference_placements

SITES, TRIALS, REPEATS = 50, 1000, 5
REPORT = Path(__file__).parents[2] / "reports" / "benchmarks" / "page.md"


def study(trials: int, long_every: int | None) -> tuple[Subject, list[TrialRecord]]:
    """Return a study and its trials; references first, then random placements."""
    sites = [Site(f"layer{1 + i * 4 // SITES}.{i}.bn2", frozenset({"residual"}), 64, 8, 8) for i in range(SITES)]
    space, references = make_space(sites, ["se", "cbam"], [4, 8, 16], [3, 7]), reference_placements(sites)
    random = np.random.default_rng(0)
    worth = {(site, text): random.normal(0, 0.002) for site, texts in space.choices.items() for text in texts}
    records = []
    for number in range(trials):
        chosen = {
            site: str(random.choice(texts)) if random.random() < 0.4 else NONE for site, texts in space.choices.items()
        }
        placement = list(references.values())[number] if number < len(references) else space.placement(chosen)
        accuracy = 0.8 + sum(worth.get((site, str(setting)), 0.0) for site, setting in placement.items())
        params = 11_000_000 + 4096 * len(placement) + sum(setting.reduction or 0 for setting in placement.values())
        records.append(
            TrialRecord(
                trial=number,
                state="COMPLETE",
                placement=placement,
                reference=list(references)[number] if number < len(references) else None,
                val_accuracy=float(accuracy + random.normal(0, 0.005)),
                val_loss=0.5,
                macs=37_000_000,
                params=params,
                epochs=20 if long_every and number % long_every == 0 else 5,
                seconds=10.0,
                seed=0,
                curve=(0.5, 0.6, 0.7),
            )
        )
    added = {
        site: {BlockSetting.parse(text): (1000, 4096) for text in texts if text != NONE}
        for site, texts in space.choices.items()
    }
    subject = Subject(
        name="long",
        objectives=("accuracy", "params"),
        architecture=Architecture(backbone="resnet18", num_classes=10, input_size=(3, 32, 32)),
        facts=(("backbone", "resnet18"),),
        validation_images=1000,
        added=added,
        sites={site.name: (64, 8, 8) for site in sites},
    )
    return subject, records


def main() -> None:
    trials = int(sys.argv[1]) if sys.argv[1:] else TRIALS
    lines = []
    for name, long_every in (("one length", None), ("two lengths", 10)):
        subject, records = study(trials, long_every)
        taken: list[list[float]] = []
        with tempfile.TemporaryDirectory() as made:
            folder = Path(made)
            for _ in range(REPEATS):
                marks = [time.perf_counter()]
                findings = subject.find(records)
                marks.append(time.perf_counter())
                write_report(folder, subject, records, findings)
                marks.append(time.perf_counter())
                best = found_architecture(subject, pick(subject.objectives, records, findings)[0])
                write_page(folder, subject, records, findings, best)
                marks.append(time.perf_counter())
                taken.append([*np.diff(marks), marks[-1] - marks[0]])
            size = (folder / "report.html").stat().st_size
        cells = " | ".join(
            f"{np.median(part):.1f} ({min(part):.1f} to {max(part):.1f})" for part in np.transpose(taken)
        )
        lines.append(f"| {name} | {cells} | {size / 1e6:.1f} |")
        print(lines[-1], flush=True)
    text = [
        "# Reports of a long study",
        "",
        f"{SITES} sites with 10 choices each, {trials:,} trials, simulated; seconds, median of {REPEATS}, range; "
        f"{platform.machine()}, numpy {np.__version__}, plotly {plotly.__version__}. The goal: below 10 s and 8 MB. "
        "Made by `python tests/benchmarks/page.py`.",
        "",
        "| study | what the trials say | tables, summary, configs | pictures and page | all | page, MB |",
        "|---|---|---|---|---|---:|",
        *lines,
    ]
    REPORT.write_text("\n".join(text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
