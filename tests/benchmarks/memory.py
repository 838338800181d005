"""Does a long study grow? Memory and time outside of training over 1,000 trials.

A study of a tiny network of the user's own on the digits at 32x32, one epoch a trial, two workers (or one process, on a
GPU). After some trials, the resident memory of the main process and of each worker is noted, files that they map left
out, and the time that a trial takes outside of building, training and validation: suggestion, storage, pipes. Writes
`reports/benchmarks/memory.md`, for a GPU `memory_gpu.md`. About 5 minutes on two cores.

    python tests/benchmarks/memory.py [cpu|cuda] [TRIALS]
"""

import os
import platform
import sys
import tempfile
import time
import warnings
from pathlib import Path
from statistics import median

import torch

import placesearch as ps
from placesearch.plan import device_name
from placesearch.records import StudyBegan, TrialEnded

NOTED = (20, 50, 100, 250, 500, 1000)
SETTLED, GROWTH = 20, 0.05
REPORTS = Path(__file__).resolve().parents[2] / "reports" / "benchmarks"
NETWORK = """
from torch import nn

def tiny(num_classes):
    units = [nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()) for _ in range(6)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes)]
    return nn.Sequential(nn.Conv2d(3, 8, 8, stride=8), *units, *head)
"""


def resident(process: int) -> float:
    """Return the memory of a process, mapped files left out, in MiB."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "RssShmem"))) / 1024


def workers() -> list[int]:
    """Return the worker processes of this one."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return sorted(
        int(child)
        for child in children
        if b"placesearch.evaluation.worker" in Path(f"/proc/{child}/cmdline").read_bytes()
    )


def main() -> None:
    warnings.simplefilter("ignore")
    device = sys.argv[1] if sys.argv[1:] else "cpu"
    trials = int(sys.argv[2]) if sys.argv[2:] else NOTED[-1]
    rows, seen, outside = [], [], []
    ended, last, jobs = 0, time.perf_counter(), 1

    def watch(event: object) -> None:
        nonlocal ended, last, jobs
        if isinstance(event, StudyBegan):
            jobs, last = event.jobs, time.perf_counter()
        if not isinstance(event, TrialEnded):
            return
        assert event.record.state == "COMPLETE", event.record.error
        ended, now = ended + 1, time.perf_counter()
        outside.append(1000 * (jobs * (now - last) - (event.record.seconds or 0.0)))
        last = now
        if ended in NOTED or ended == trials:
            here = resident(os.getpid())
            each = [resident(worker) for worker in workers()]
            on_gpu = torch.cuda.memory_allocated() / 2**20 if device == "cuda" else 0.0
            seen.append((ended, [here, *each, *([on_gpu] if device == "cuda" else [])]))
            rows.append(
                f"| {ended} | {here:.0f} | {', '.join(f'{size:.0f}' for size in each) or '-'} | "
                f"{f'{on_gpu:.1f} | ' if device == 'cuda' else ''}{median(outside[-50:]):.1f} |"
            )
            print(rows[-1], flush=True)

    with tempfile.TemporaryDirectory() as made:
        os.chdir(made)
        Path("own.py").write_text(NETWORK)
        sys.path.insert(0, made)
        settings = {"input_size": 32, "epochs": 1, "batch_size": 512, "reductions": (1, 2, 4, 8), "device": device}
        parallel = 2 if device == "cpu" else 1
        study = ps.run(ps.StudyConfig(backbone="own:tiny", trials=trials, jobs=parallel, **settings), watch=watch)
        os.chdir("/")
    settled = next(sizes for count, sizes in seen if count >= min(SETTLED, trials))
    growth = max(end / max(start, 1.0) - 1 for start, end in zip(settled, seen[-1][1], strict=True))
    where = device_name(torch.device(device)) if device != "cpu" else f"{len(os.sched_getaffinity(0))} cores"
    text = [
        "# Memory over a long study",
        "",
        f"A tiny network of the user's own, digits at 32x32, one epoch a trial, {len(study.records):,} trials, "
        f"{parallel} at a time, one run; {platform.machine()}, {where}, torch {torch.__version__}. Memory of each "
        "process (RssAnon and RssShmem, MiB: mapped files and libraries left out), noted when a trial has ended, and "
        "milliseconds of a worker's time per trial outside of building, training and validation (suggestion, storage, "
        "pipes; median of the last 50 trials). Made by `python tests/benchmarks/memory.py`.",
        "",
        f"| trials | main process | workers | {'GPU memory in use | ' if device == 'cuda' else ''}ms outside a trial |",
        f"|---:|---:|---|{'---:|' if device == 'cuda' else ''}---:|",
        *rows,
        "",
        f"Largest growth of a process after trial {SETTLED}: {100 * growth:.1f} %; the limit is {100 * GROWTH:.0f} %. "
        f"The search took {study.seconds:.0f} s.",
    ]
    (REPORTS / ("memory.md" if device == "cpu" else "memory_gpu.md")).write_text(
        "\n".join(text) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
