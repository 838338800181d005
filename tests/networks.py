"""Small networks for tests; also copied into folders in which the command line runs, as a user's own module."""

import hashlib
import os
import subprocess
import time
from pathlib import Path

import torch
from torch import Tensor, nn


class Unit(nn.Module):
    """A residual unit as in ResNet-18: two convolutions, the skip added before the last activation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


class Tiny(nn.Module):
    """Two residual units of 8 channels on an eighth of the input's side."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=8, padding=1)
        self.unit1, self.unit2 = Unit(8), Unit(8)
        self.head = nn.Linear(8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.unit2(self.unit1(self.stem(x))).mean((2, 3)))


class Fragile(Tiny):
    """A network whose training breaks as soon as its first unit carries a block."""

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        return logits * float("nan") if self.training and hasattr(self.unit1.bn2, "attention") else logits


class Broken(Tiny):
    """A network that cannot be trained at all."""

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        return logits * float("inf") if self.training else logits


class Large(Tiny):
    """A network whose training needs more memory than there is."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            raise torch.OutOfMemoryError("out of memory")
        return super().forward(x)


class Late(Tiny):
    """A network with random numbers in training and validation, without finite logits in its first eight steps."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.steps += self.training
        logits = super().forward(x) + 0.01 * torch.randn(1)
        return logits if self.training or self.steps > 8 else logits * float("inf")


class Heavy(Tiny):
    """A network of 4 MiB, so that one that is forgotten anywhere is noticed."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.register_buffer("ballast", torch.ones(2**20))


class Dropping(Tiny):
    """A network that draws random numbers in training."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(nn.functional.dropout(self.unit1(self.stem(x)).mean((2, 3)), 0.3, self.training))


class Normless(Tiny):
    """A network without batch norms, so that what it makes of an image does not depend on the others in the batch."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        for unit in (self.unit1, self.unit2):
            unit.bn1, unit.bn2 = nn.Identity(), nn.Identity()


class Gate(nn.Module):
    """A block of the user's own: one learned number a group of channels."""

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, channels // reduction, 1, 1))
        self.reduction = reduction

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.weight).repeat_interleave(self.reduction, 1)


class Odd(Tiny):
    """A network with an operator that no rule counts."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + torch.cumprod(x, 1))


def heavy(num_classes: int) -> nn.Module:
    return Heavy(num_classes)


def dropping(num_classes: int) -> nn.Module:
    return Dropping(num_classes)


def normless(num_classes: int) -> nn.Module:
    return Normless(num_classes)


def late(num_classes: int) -> nn.Module:
    return Late(num_classes)


def odd(num_classes: int) -> nn.Module:
    return Odd(num_classes)


def tiny(num_classes: int) -> nn.Module:
    return Tiny(num_classes)


def fragile(num_classes: int) -> nn.Module:
    return Fragile(num_classes)


def broken(num_classes: int) -> nn.Module:
    return Broken(num_classes)


def large(num_classes: int) -> nn.Module:
    return Large(num_classes)


def no_network(num_classes: int) -> str:
    return "no network"


def environment(candidate) -> float:
    """An evaluation of the user's own: fails, and its reason says what surrounds it."""
    raise ValueError(" ".join(f"{name}={value}" for name, value in os.environ.items() if name.startswith("MALLOC_")))


def evaluate(candidate) -> dict[str, float]:
    """An evaluation of the user's own: says how many blocks there are, and what the weights started as."""
    model = candidate.build()
    start = float(model.stem.weight.detach().abs().mean())
    return {"accuracy": (1 + len(candidate.placement)) / 10, "loss": start * candidate.epochs + candidate.seed}


def hangs(candidate) -> float:
    """An evaluation of the user's own that ends for the plain network only; it has a process of its own."""
    with Path("evaluated").open("a") as file:
        file.write(f"{candidate.placement}\n")
    if candidate.placement:
        subprocess.run(["sleep", "1000"])
    return 0.5


def hangs_once(candidate) -> float:
    """An evaluation of the user's own: the first one never ends, and its child has all files and pipes that it has."""
    if not Path("child").exists():
        child = os.fork()
        if child == 0:
            time.sleep(1000)
        Path("child.new").write_text(str(child))
        Path("child.new").rename("child")
        time.sleep(1000)
    return 0.5


def hungry(candidate) -> dict[str, float]:
    """An evaluation of the user's own: the memory of the GPU suffices for one at a time."""
    mine = Path(f"running-{os.getpid()}")
    mine.touch()
    try:
        for _ in range(10):
            time.sleep(0.1)
            if len(list(Path().glob("running-*"))) > 1:
                time.sleep(0.3)  # so that the other one notices as well
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")
    finally:
        mine.unlink()
    return evaluate(candidate)


def starving(candidate) -> float:
    """An evaluation of the user's own: the memory of the GPU does not suffice."""
    with Path("evaluated").open("a") as file:
        file.write(f"{candidate.placement}\n")
    raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 1.00 GiB.")


def huge(candidate) -> float:
    """An evaluation of the user's own: asks for a pebibyte of the device's memory."""
    return float(torch.empty(2**50, dtype=torch.uint8, device=candidate.device)[0])


class Still(nn.Module):
    """A block of the user's own that changes nothing, whatever it learns."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return x + 0 * self.weight[:, None, None]


def scored(candidate):
    """Need no training: always the same score for a placement and seed; write down what is scored if asked to."""
    if "EVALUATED" in os.environ:
        with open(os.environ["EVALUATED"], "a") as log:  # noqa: PTH123
            log.write(f"{candidate.placement}/{candidate.seed}\n".replace(" ", "+"))
    time.sleep(float(os.environ.get("PAUSE", "0")))
    luck = int(hashlib.sha256(f"{candidate.placement} {candidate.seed}".encode()).hexdigest()[:8], 16) / 2**32
    return 0.5 + 0.02 * len(candidate.placement) + 0.05 * luck
