"""The evaluation of `faults.py`: takes 0.2 s; its score follows from placement and seed. FAULT says what goes wrong."""

import hashlib
import os
import time
from pathlib import Path

import torch


def judge(text: str, seed: int) -> float:
    """Return the score of a placement under a seed."""
    return int(hashlib.sha256(f"{text} {seed}".encode()).hexdigest()[:8], 16) / 2**32


def evaluate(candidate):
    text, fault = str(candidate.placement), os.environ["FAULT"]
    accuracy = judge(text, candidate.seed)
    with Path("notes").open("ab", buffering=0) as file:
        file.write(f"{os.getpid()} {candidate.seed} {text}\n".encode())
    fails = accuracy < float(os.environ["FAILING"])
    if fault == "hang" and fails:
        time.sleep(1000)
    time.sleep(0.2)
    if fault == "memory":
        ask_for_memory()
    return {"accuracy": accuracy, "loss": float("nan") if fault == "nan" and fails else 1 - accuracy}


def ask_for_memory() -> None:
    """Raise what torch does when the memory of a GPU does not suffice, if another process asks at the same time."""
    mine = Path(f"running-{os.getpid()}")
    mine.touch()
    try:
        time.sleep(0.2)
        if len(list(Path().glob("running-*"))) > 1:
            time.sleep(0.1)  # so that the other one notices, too
            raise torch.OutOfMemoryError("CUDA out of memory.")
    finally:
        mine.unlink()
