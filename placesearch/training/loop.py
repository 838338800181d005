"""The brief training of one candidate: a plain loop from a fresh model to its scores.

Every candidate of a study sees the same batches with the same augmentations in the same order, and starts from the
same backbone weights; only the blocks differ.
"""

import copy
import math
import warnings
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from placesearch.errors import TrainingError
from placesearch.models.copying import dtype_and_device
from placesearch.models.outputs import logits_of
from placesearch.training.branch import Branch
from placesearch.training.datasets import Data, FileSplit, Split
from placesearch.training.graphed import GraphedStep, Step
from placesearch.training.team import ALONE, Team

AHEAD = 2
"""Batches that are read ahead where images are in files."""

VALIDATION_PIXELS = 2**18
"""Pixels of a validation batch, at least: small images go faster in larger batches."""


@dataclass(frozen=True, slots=True)
class Protocol:
    """Everything that a score depends on besides the architecture and the data.

    Args:
        epochs: Passes over the training split.
        batch_size: Images a step; the last, smaller batch of an epoch is left out.
        learning_rate: Peak of the one-cycle schedule.
        seed: Seed of initialisation, data order and augmentation.
        precision: `fp32` or `bf16` (autocast).
        threads: Processor threads a trial on a CPU.
        start: `scratch`; `branch`, from the plain network in the middle of its training; or `pretrained`, from given
            weights. But for the first, blocks start as the identity.
        block_rate: Learning rate of the blocks by that of the network.
        momentum: Nesterov momentum of SGD.
        weight_decay: L2 penalty on all parameters.
        label_smoothing: Share of the target that is spread over all classes.
        warmup: Share of the steps over which the learning rate rises; the branch point is where it ends.
        shift: Images are moved by up to this share of their side in each direction.
    """

    epochs: int
    batch_size: int
    learning_rate: float
    seed: int
    precision: str
    threads: int = 1
    start: str = "scratch"
    block_rate: float = 1.0
    momentum: float = 0.9
    weight_decay: float = 5e-4
    label_smoothing: float = 0.1
    warmup: float = 0.3
    shift: float = 1 / 16


@dataclass(frozen=True, slots=True)
class Validation:
    """How a model did on the validation split.

    Args:
        accuracy: Share of images classified correctly, 0..1.
        loss: Mean cross-entropy in nats.
        correct: For each image whether it was, bool (n,).
    """

    accuracy: float
    loss: float
    correct: Tensor


def pick_device(name: str) -> torch.device:
    """Return the device of that name; `auto` takes a GPU where there is one.

    Raises:
        ValueError: If there is no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError):
        raise ValueError(f"there is no device '{name}' here; 'auto' and 'cpu' always work") from None
    return device


def pick_precision(device: torch.device) -> str:
    """Return `bf16` on a device that has instructions for it, else `fp32`; no stopwatch decides."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return "bf16" if native else "fp32"


class Trainer:
    """Trains candidates on data that stay on the device.

    Args:
        data: The data set. Of its splits test is not touched unless asked for by name.
        protocol: How to train.
        device: Where to.
        team: The processes that train one model together, each on its share of every batch.
    """

    def __init__(self, data: Data, protocol: Protocol, device: torch.device, team: Team = ALONE) -> None:
        self.device, self.flip, self._team = device, data.flip, team
        self.train_split = data.splits["train"].on(device)
        self._splits, self._classes = data.splits, len(data.classes)
        count = len(self.train_split.labels)
        sample = self.train_split.take(torch.arange(0, count, max(1, count // 5000)))
        pixels = sample.to(device).reshape(-1, sample.shape[-1]).float() / 255
        self.mean, self.scale = pixels.mean(0), 1 / pixels.std(0).clamp_min(1e-3)
        self._follow(protocol)

    def _follow(self, protocol: Protocol) -> None:
        self.protocol = protocol
        self.batch_size = min(protocol.batch_size, len(self.train_split.labels))
        self.epoch_steps = len(self.train_split.labels) // self.batch_size
        self.steps = protocol.epochs * self.epoch_steps
        self.branch_step = max(1, round(protocol.warmup * self.steps))

    def under(self, protocol: Protocol) -> "Trainer":
        """Return a trainer by another protocol on the same data, which stay where they are."""
        other = copy.copy(self)
        other._follow(protocol)
        return other

    def train(self, model: nn.Module, branch: Branch | None = None, blocks: Collection[str] = ()) -> Iterator[int]:
        """Train a model in place, yielding the number of finished steps after each one.

        Args:
            model: The model; with a branch, it has its weights already.
            branch: Where the training was stopped before; it goes on from there, with the rest of the same schedule
                and the same batches.
            blocks: Names of the parameters that are the blocks', and so have a learning rate of their own.

        Raises:
            TrainingError: If the loss is no longer finite.
        """
        optimizer = self.optimizer(model, blocks, branch)
        yield from self.steps_between(model, optimizer, self.branch_step if branch else 0, self.steps)

    def train_branch(self, model: nn.Module) -> Branch:
        """Train a model in place up to the branch point and return what is needed to go on from there.

        Raises:
            TrainingError: If the loss is no longer finite.
        """
        optimizer = self.optimizer(model)
        for _ in self.steps_between(model, optimizer, 0, self.branch_step):
            pass
        return branch_of(model, optimizer)

    def optimizer(
        self, model: nn.Module, blocks: Collection[str] = (), branch: Branch | None = None
    ) -> torch.optim.Optimizer:
        """Bring a model to the device and return an optimizer for it.

        Args:
            model: The model; with a branch, it has its weights already.
            blocks: Names of the parameters that are the blocks', and so have a learning rate of their own.
            branch: Where its training was stopped before; it gives the momentum.
        """
        model.to(self.device).to(memory_format=torch.channels_last).train()
        parts: dict[bool, list[nn.Parameter]] = {False: [], True: []}
        for name, weight in model.named_parameters():
            parts[name in blocks].append(weight)
        groups: list[dict[str, Any]] = []
        for of_blocks, part in parts.items():
            rate: float | Tensor = self.protocol.learning_rate * (self.protocol.block_rate if of_blocks else 1.0)
            if self.device.type == "cuda":
                rate = torch.tensor(rate, device=self.device)  # where a recorded step reads it anew each time
            if part:
                groups.append({"params": part, "lr": rate})
        optimizer = torch.optim.SGD(
            groups,
            momentum=self.protocol.momentum,
            nesterov=True,
            weight_decay=self.protocol.weight_decay,
            fused=self.device.type in ("cpu", "cuda"),
        )
        for name, weight in model.named_parameters() if branch else ():
            momentum = torch.zeros_like(weight)  # a new block has none yet, as at the start of a training
            if name in branch.momentum:  # type: ignore[union-attr]
                momentum.copy_(branch.momentum[name])  # type: ignore[union-attr]
            optimizer.state[weight]["momentum_buffer"] = momentum
        return optimizer

    def steps_between(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        begin: int,
        end: int,
        dice: Tensor | None = None,
        ended: Callable[[int, float], None] | None = None,
    ) -> Iterator[int]:
        """Take the steps of the schedule from one to another, yielding the number of finished steps after each one.

        Those before are passed over, with what was drawn for them: the order of the images and their augmentation
        depend on the seed and the epoch alone.

        Args:
            model: The model.
            optimizer: What `optimizer` returned for it.
            begin: Steps that are done already.
            end: Steps that are to be done then.
            dice: The state of the device's random numbers at `begin`, which dropout and drop-path draw on; those of
                the seed if not given.
            ended: Is told at the end of each epoch its number, from 1, and the mean loss of its steps.

        Raises:
            TrainingError: If the loss is no longer finite.
        """
        protocol, split = self.protocol, self.train_split
        random = torch.Generator().manual_seed(protocol.seed)
        torch.manual_seed(protocol.seed + self._team.rank)
        if dice is not None:
            _set_dice(self.device, dice)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            [float(group["lr"]) for group in optimizer.param_groups],
            total_steps=self.steps,
            pct_start=protocol.warmup,
            cycle_momentum=False,  # a number that a recorded step could not change
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the schedule begins in its middle is meant
            for _ in range(min(begin, self.steps - 1)):
                schedule.step()
        step = self._step(model, optimizer)
        an_epoch = self.epoch_steps
        for epoch in range(protocol.epochs):
            order, shifts, mirrored = self._draws(random)
            first, last = (min(max(0, at - epoch * an_epoch), an_epoch) for at in (begin, end))
            if first == last:
                continue
            parts = [self._team.share(index * self.batch_size, self.batch_size) for index in range(first, last)]
            labels, shifts, mirrored = (
                tensor.to(self.device) for tensor in (split.labels[order.to(split.labels.device)], shifts, mirrored)
            )
            losses = torch.zeros((), device=self.device)
            images = self._read(split, [order[part] for part in parts])
            for index, (part, batch) in enumerate(zip(parts, images, strict=True), epoch * an_epoch + first + 1):
                losses += step(batch, labels[part], shifts[part], mirrored[part])
                if index < self.steps:
                    schedule.step()
                yield index
            loss = self._team.mean(losses / (last - first))
            if not math.isfinite(loss):
                raise TrainingError(f"the training loss became {loss} in epoch {epoch + 1} of {protocol.epochs}")
            if ended is not None:
                ended(epoch + 1, loss)

    def _step(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
        """Return what takes one step: images, labels and what is drawn for each image in, the loss out."""
        forward, (dtype, _) = self._team.joined(model), dtype_and_device(model)

        def step(images: Tensor, labels: Tensor, shifts: Tensor, mirrored: Tensor) -> Tensor:
            pixels = self._augmented(images, shifts, mirrored).to(dtype)
            with self._autocast():
                logits = logits_of(forward(pixels), len(labels), self._classes)
                loss = F.cross_entropy(logits, labels, label_smoothing=self.protocol.label_smoothing)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss.detach()

        return GraphedStep(step, self.device) if self.device.type == "cuda" and self._team.size == 1 else step

    @torch.inference_mode()
    def validate(self, model: nn.Module, name: str = "validation") -> Validation:
        """Return how a model does on the whole validation split.

        Done in the midst of a training, it changes nothing of what follows.

        Args:
            model: The model.
            name: `validation`, or another split.

        Raises:
            TrainingError: If the loss is not finite.
        """
        was_training, (dtype, _) = model.training, dtype_and_device(model)
        model.eval()
        split, right = self._splits[name].on(self.device), []
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        pixels = split.size[1] * split.size[2]
        batches = torch.arange(len(split.labels)).split(max(self.batch_size, VALIDATION_PIXELS // pixels, 128))
        for batch, images in zip(batches, self._read(split, batches), strict=True):
            labels = split.labels[batch.to(self.device)]
            with self._autocast():
                logits = logits_of(model(self._normalised(images).to(dtype)), len(labels), self._classes).float()
            loss += F.cross_entropy(logits, labels, reduction="sum")
            right.append(logits.argmax(1) == labels)
        model.train(was_training)
        mean_loss = float(loss) / len(split.labels)
        if not math.isfinite(mean_loss):
            raise TrainingError(f"the {name} loss is {mean_loss}")
        correct = torch.cat(right).cpu()
        return Validation(float(correct.double().mean()), mean_loss, correct)

    def _read(self, split: Split | FileSplit, batches: Sequence[Tensor]) -> Iterator[Tensor]:
        """Yield the images of one batch after the other; from files the next is read while one is worked on."""
        if isinstance(split, Split):
            yield from (split.take(batch) for batch in batches)
            return
        with ThreadPoolExecutor(1) as reader:
            ahead = deque(reader.submit(split.take, batch) for batch in batches[:AHEAD])
            for batch in [*batches[AHEAD:], *[None] * min(AHEAD, len(batches))]:
                images = ahead.popleft().result()
                if batch is not None:
                    ahead.append(reader.submit(split.take, batch))
                yield images.to(self.device, non_blocking=True)

    def _draws(self, random: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Draw the order of the images in an epoch, and for each place in it the shift and whether to mirror."""
        count, (_, height, width) = len(self.train_split.labels), self.train_split.size
        order = torch.randperm(count, generator=random)
        reach, across = (max(1, round(side * self.protocol.shift)) for side in (height, width))
        if reach == across:
            shifts = torch.randint(-reach, reach + 1, (count, 2), generator=random)
        else:
            each = [torch.randint(-most, most + 1, (count, 1), generator=random) for most in (reach, across)]
            shifts = torch.cat(each, dim=1)
        return order, shifts, torch.rand(count, generator=random) < 0.5

    def _augmented(self, images: Tensor, shifts: Tensor, mirrored: Tensor) -> Tensor:
        """Shift each image of a batch (its border repeated) and mirror it where classes allow, as drawn."""
        each, down, across = (torch.arange(number, device=self.device) for number in images.shape[:3])
        rows = (down + shifts[:, :1]).clamp(0, len(down) - 1)
        columns = torch.where(mirrored[:, None] & self.flip, len(across) - 1 - across, across) + shifts[:, 1:]
        columns = columns.clamp(0, len(across) - 1)
        return self._normalised(images[each[:, None, None], rows[:, :, None], columns[:, None, :]])

    def _normalised(self, images: Tensor) -> Tensor:
        """Turn bytes (n, height, width, channels) into floats (n, channels, height, width), channels last in memory."""
        return ((images.float() / 255 - self.mean) * self.scale).permute(0, 3, 1, 2)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.protocol.precision == "bf16")


def branch_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> Branch:
    """Return what is needed to go on with a training from where it is, as copies on the processor.

    Args:
        model: The model.
        optimizer: Its optimizer.
    """
    kept = {name: optimizer.state[weight].get("momentum_buffer") for name, weight in model.named_parameters()}
    return Branch(weights_of(model), {name: _copy(tensor) for name, tensor in kept.items() if tensor is not None})


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by name, as copies on the processor."""
    return {name: _copy(tensor) for name, tensor in model.state_dict().items()}


def dice_of(device: torch.device) -> Tensor:
    """Return the state of the random numbers that a training on a device draws on."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_dice(device: torch.device, state: Tensor) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
