"""Several processes that train one model together, as torchrun starts them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

PATIENCE = timedelta(hours=1)
"""So long processes wait for one another; the first one validates alone."""


@dataclass(frozen=True, slots=True)
class Team:
    """Processes that hold the same model. Each takes its share of every batch; gradients are averaged over all.

    So a step is that of one process on the whole batch, except that a batch norm sees only its own share. What it has
    learned of means and variances is that of the first process.

    Args:
        rank: This process's place among them, from 0.
        size: How many they are.

    Example:
        >>> Team(rank=1, size=4).share(128, 64)
        slice(144, 160, None)
    """

    rank: int = 0
    size: int = 1

    def share(self, first: int, count: int) -> slice:
        """Return which of the `count` places of a batch that begins at `first` are this process's."""
        own = count // self.size
        return slice(first + self.rank * own, first + (self.rank + 1) * own)

    def joined(self, model: nn.Module) -> nn.Module:
        """Return what to call instead of a model, so that its gradients become the average over all processes."""
        if self.size == 1:
            return model
        return DistributedDataParallel(model, static_graph=True)  # some outputs may be left unused, always the same

    def mean(self, value: Tensor) -> float:
        """Return the average of a number over all processes."""
        if self.size > 1:
            dist.all_reduce(value)
        return float(value) / self.size

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.size > 1:
            dist.barrier()


ALONE = Team()
"""A process by itself."""


@contextmanager
def gathered() -> Iterator[Team]:
    """Give the team that torchrun made this process a member of; without torchrun, it is alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
    try:
        yield Team(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


def own_device(name: str) -> str:
    """Return the name of the device of this process: of several on a machine with GPUs, each has its own.

    Args:
        name: What was asked for: `auto`, `cuda`, or a device that is taken as it is.
    """
    local = os.environ.get("LOCAL_RANK") if int(os.environ.get("WORLD_SIZE", "1")) > 1 else None
    several = local is not None and name in ("auto", "cuda") and torch.cuda.is_available()
    return f"cuda:{local}" if several else name
