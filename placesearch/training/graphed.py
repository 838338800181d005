"""A training step as one CUDA graph: launched once instead of some hundred kernels one by one."""

from collections.abc import Callable

import torch
from torch import Tensor

Step = Callable[..., Tensor]
"""Takes the tensors of one batch, always of the same shapes; returns the loss."""

WARM_UP = 3
"""Steps that run eagerly first, so that libraries have made their choices and the optimizer its state."""


class GraphedStep:
    """Runs a training step on a GPU: the first steps eagerly, then, from one recording, as a CUDA graph.

    Every call is a real step. A step that cannot be recorded, because it asks the GPU for a value say, goes on eagerly.
    What changes from step to step has to be in tensors: the batch, and the learning rate in the optimizer.

    Args:
        step: The step; it leaves no gradients behind.
        device: The GPU.
    """

    def __init__(self, step: Step, device: torch.device) -> None:
        self._step, self._device = step, device
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: tuple[Tensor, ...] = ()
        self._loss = torch.empty(0)
        self._side = torch.cuda.Stream(device)

    def __call__(self, *batch: Tensor) -> Tensor:
        """Take a step; return its loss, which the next call overwrites."""
        self._calls += 1
        if self._calls <= WARM_UP:
            return self._beside(batch)
        if self._calls == WARM_UP + 1:
            self._record(batch)
        if self._graph is None:
            return self._step(*batch)
        for kept, given in zip(self._inputs, batch, strict=True):
            kept.copy_(given)
        self._graph.replay()
        return self._loss

    def _beside(self, batch: tuple[Tensor, ...]) -> Tensor:
        """Take a step on the stream on which the graph is recorded, as recording asks for."""
        current = torch.cuda.current_stream(self._device)
        self._side.wait_stream(current)
        with torch.cuda.stream(self._side):
            loss = self._step(*batch)
        current.wait_stream(self._side)
        return loss

    def _record(self, batch: tuple[Tensor, ...]) -> None:
        """Record the step without taking it."""
        self._inputs = tuple(tensor.clone() for tensor in batch)
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self._device)
        try:
            with torch.cuda.graph(graph, stream=self._side):
                self._loss = self._step(*self._inputs)
        except RuntimeError:
            torch.cuda.synchronize(self._device)
        else:
            self._graph = graph
