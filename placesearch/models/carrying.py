"""Which modules can carry a block, and how: found by trying it in a copy of the network."""

import copy
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from placesearch.models.attachment import attach, has_name, homes_of
from placesearch.models.copying import InputSize, copy_of, dtype_and_device, moved, plainly


@dataclass(frozen=True, slots=True)
class Carrying:
    """What was found out.

    Args:
        wrapped: Modules in which a block runs exactly once a forward; whether it needs a module around both for that.
        once: Names of the parameters that the network uses in one operation, which runs once, and that share no memory
            with others. What is no part of a forward, such as a regulariser of the user's own, is not seen.
    """

    wrapped: Mapping[str, bool]
    once: frozenset[str]


def try_carrying(model: nn.Module, names: Sequence[str], calls: Mapping[str, int], input_size: InputSize) -> Carrying:
    """Find out how each of some modules can carry a block, so that it runs once and all others run as often as before.

    Blocks that change nothing, but count, are put at all modules at once; only where that fails, at fewer of them.

    Args:
        model: The network; left as it is.
        names: The modules.
        calls: How often each module of the network runs.
        input_size: Channels, height and width of an input that the network takes.
    """
    trial = _Trial(model, calls, input_size)
    wrapped = trial.settle(list(names))
    first = {id(weight): name for name, weight in model.named_parameters()}
    owners = Counter(memory_of(weight) for weight in model.parameters())
    once = {
        name
        for name, weight in model.named_parameters(remove_duplicate=False)
        if trial.uses[first[id(weight)]] == 1 and owners[memory_of(weight)] == 1
    }
    return Carrying(wrapped, frozenset(once))


def memory_of(weight: Tensor) -> int:
    """Return what two tensors have in common that are the same one, or views of one."""
    try:
        return int(weight.untyped_storage()._cdata)
    except (RuntimeError, NotImplementedError, ValueError):  # it has none: not initialised yet, or a class of its own
        return id(weight)


class _Trial:
    """Runs copies of a network with blocks that change nothing.

    Args:
        model: The network.
        calls: How often each of its modules runs.
        input_size: Channels, height and width of an input that it takes.
    """

    def __init__(self, model: nn.Module, calls: Mapping[str, int], input_size: InputSize) -> None:
        self._model, self._calls, self._size = model, calls, input_size
        self._device: str | None = None
        self.uses: Counter[str] = Counter()
        """In how many operations each parameter was used, in the last run that succeeded."""

    def settle(self, names: list[str]) -> dict[str, bool]:
        """Return which of some modules can carry a block, and whether it has to be wrapped with them."""
        modules = {name: self._model.get_submodule(name) for name in names}
        ways = {name: has_name(module) or _is_collection(module) for name, module in modules.items()}
        blocks = self._run(ways)
        if blocks is not None or len(names) == 1:
            if blocks is not None and self._is_right(blocks, names):
                return ways
            ways = {name: ways[name] or blocks is None or len(names) == 1 or blocks[name] != 1 for name in names}
            blocks = self._run(ways)
            if blocks is not None and self._is_right(blocks, names):
                return ways
        half = len(names) // 2
        return self.settle(names[:half]) | self.settle(names[half:]) if half else {}

    def _is_right(self, blocks: Mapping[str, int], names: Sequence[str]) -> bool:
        return self._seen == self._calls and all(blocks[name] == 1 for name in names)

    def _run(self, ways: Mapping[str, bool]) -> Counter[str] | None:
        """Return how often each block ran, None if the network failed."""
        with torch.random.fork_rng(devices=[]):
            if self._device is not None:
                with suppress(Exception):  # whatever a block may break in a network of the user's own
                    return self._run_on(self._device, ways)
                return None
            for device in ("meta", "cpu"):  # some networks look at numbers, which need memory
                for blocks in (ways, {}):
                    with suppress(Exception):
                        counts = self._run_on(device, blocks)
                        self._device = device
                        return counts if blocks is ways else None
        return None

    def _run_on(self, device: str, ways: Mapping[str, bool]) -> Counter[str]:
        copied = _copied(self._model, device).eval()
        blocks: Counter[str] = Counter()
        self._seen: Counter[str] = Counter()
        uses = _Uses(copied)
        for name, module in copied.named_modules():
            module.register_forward_pre_hook(_counting(self._seen, name))
        homes = homes_of(copied)
        for name in sorted(ways, key=lambda name: name.count("."), reverse=True):
            attach(copied, name, _Counting(blocks, name), wrapped=ways[name], homes=homes)
        dtype, _ = dtype_and_device(copied)
        with torch.no_grad(), plainly(), uses:
            copied(torch.zeros(1, *self._size, device=device, dtype=dtype))
        self.uses = uses.counts
        return blocks


def _copied(model: nn.Module, device: str) -> nn.Module:
    """Return a copy on a device; one without memory is made without a copy of the weights that have some."""
    if device == "meta":
        with suppress(Exception):  # a class of tensors of its own, say
            memo: dict[int, Any] = {id(tensor): tensor.to("meta") for tensor in model.buffers()}
            memo |= {id(w): nn.Parameter(w.detach().to("meta"), w.requires_grad) for w in model.parameters()}
            return copy.deepcopy(model, memo)
    return moved(copy_of(model), device)


def _is_collection(module: nn.Module) -> bool:
    """Tell whether a module most likely is a program that consists of its children."""
    own_forward = isinstance(module, nn.Sequential) and type(module).forward is not nn.Sequential.forward
    return own_forward or isinstance(module, nn.ModuleDict | nn.ModuleList)


def _counting(counts: Counter[str], name: str) -> Callable[[nn.Module, Any], None]:
    def count(_module: nn.Module, _inputs: Any) -> None:
        counts[name] += 1

    return count


class _Counting(nn.Module):
    """A block that changes nothing and counts how often it runs, with whatever arguments."""

    def __init__(self, counts: Counter[str], name: str) -> None:
        super().__init__()
        self._counts, self._name = counts, name

    def forward(self, x: Any, *_others: Any, **_named: Any) -> Any:
        self._counts[self._name] += 1
        return x


class _Uses(TorchFunctionMode):
    """Counts in how many operations each parameter of a network is used."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self._names = {id(weight): name for name, weight in model.named_parameters()}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):  # else it asked for a shape or a type
            given = (*args, *(kwargs or {}).values())
            self.counts.update({self._names[id(value)] for value in given if id(value) in self._names})
        return result
