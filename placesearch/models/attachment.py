"""How a block hangs on a module so that it stays there, whatever is done to a network.

Source code that is exported holds what is below word for word: it needs torch alone.

- `attend`, a forward hook: a block is a child of a module and works on its output,
  so that all other parameters keep their names.
- `Attended`, a module around a module: for one that runs its children in a loop, or
  has something of the block's name already.
- `Children`, a dictionary of child modules: tools that convert or fuse layers put
  others in their place; it hands blocks on, or raises where that would be wrong.
- `trace_alone`, a hook: torch.fx takes a layer of torch for one operation and does
  not see its hooks, so that its `fuse` would take a block away with a norm.
- `is_attached`, a mark: a network may have children called `attention` of its own.
"""

from collections import OrderedDict
from typing import Any

import torch
from torch import fx, nn

from placesearch.errors import PlacementError

Homes = dict[nn.Module, list[tuple[nn.Module, str]]]
NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


def attach(
    model: nn.Module,
    site: str,
    block: nn.Module,
    *,
    wrapped: bool = False,
    homes: Homes | None = None,
) -> None:
    """Make a block work on what the module named `site` puts out.

    It becomes that module's child `attention`, so that the names of all other
    parameters stay as they are without blocks. If `wrapped`, or if the module has
    something of that name, both become children of an `Attended` in its place.

    Args:
        model: The network; of several blocks in it, deeper ones come first.
        site: The name of a module.
        block: Takes and returns a feature map.
        wrapped: Whether a child would change what the module does.
        homes: What `homes_of` returned for the network, if that is known.
    """
    module = model.get_submodule(site)
    homes = homes_of(model) if homes is None else homes
    vars(block)["is_attached"] = True
    carrier = Attended(module, block) if wrapped else carry(module, block)
    for parent, name in homes[module]:
        around = homes.get(parent, []) if isinstance(parent, NORMS) else []
        for owner in (parent, *(outer for outer, _ in around)):
            if not isinstance(owner._modules, Children):
                owner._modules = Children(owner._modules)
        dict.__setitem__(parent._modules, name, carrier)


def homes_of(model: nn.Module) -> Homes:
    """Return for each module in a network whose child it is, and by which name."""
    homes: Homes = {}
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is not None:
                homes.setdefault(child, []).append((parent, name))
    return homes


def carry(module: nn.Module, block: nn.Module) -> nn.Module:
    """Give a module a block; return it, or what has to take its place."""
    if has_name(module):
        return Attended(module, block)
    if can_be_traced_alone(module):
        module.__module__ = __name__  # so that torch.fx calls it, with its hooks
        if trace_alone not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(trace_alone)
    module.add_module("attention", block)
    if not runs_block(module):
        module.register_forward_hook(attend)
    return module


def has_name(module: nn.Module) -> bool:
    """Tell whether a module has something by the name of a block already."""
    return hasattr(type(module), "attention") or hasattr(module, "attention")


def block_of(module: nn.Module | None) -> nn.Module | None:
    """Return the block that a module carries."""
    block = None if module is None else module._modules.get("attention")
    return block if getattr(block, "is_attached", False) else None


def runs_block(module: nn.Module) -> bool:
    """Tell whether a module applies a child `attention`, by its hook or by itself."""
    if isinstance(module, Attended) or attend in module._forward_hooks.values():
        return True
    forward = vars(module).get("forward", type(module).forward)
    return isinstance(module, nn.Sequential) and forward is nn.Sequential.forward


def attend(module: nn.Module, _inputs: Any, output: Any) -> Any:
    """Apply a module's block, if it has one: tools move hooks to other modules."""
    block = getattr(module, "attention", None)
    if isinstance(output, Alone):
        return output.end(module, block)
    return output if block is None else block(output)


class Attended(nn.Module):
    """A module and a block that works on its output, in the module's place.

    It passes for the module: attributes that it lacks are the module's, and weights
    load under the names that they have without it.
    """

    def __init__(self, inner: nn.Module, block: nn.Module) -> None:
        super().__init__()
        self.inner, self.attention = inner, block
        self.training = inner.training

    def forward(self, *inputs: Any, **settings: Any) -> Any:
        """Return what the block makes of the module's output."""
        return self.attention(self.inner(*inputs, **settings))

    def __getattr__(self, name: str) -> Any:
        """Return a child, or what the module has by this name."""
        inner = self.__dict__.get("_modules", {}).get("inner")
        if inner is None or name in ("inner", "attention") or name.startswith("_"):
            return super().__getattr__(name)
        return getattr(inner, name)

    def rename(self, weights: dict[str, Any], prefix: str) -> None:
        """Give the module's weights their names here, where they have those without."""
        keys = [key for key in weights if key.startswith(prefix)]
        if not any(key.startswith(f"{prefix}inner.") for key in keys):
            own = {key.partition(".")[0] for key in self.inner.state_dict()}
            for key in keys:
                name = key.removeprefix(prefix)
                if name.partition(".")[0] in own:
                    weights[f"{prefix}inner.{name}"] = weights.pop(key)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        *others: Any,
    ) -> None:
        """Take weights under their names without blocks, too."""
        self.rename(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *others)


class Children(dict[str, nn.Module | None]):
    """The children of a module; what takes the place of one takes over its block."""

    latest: nn.Module | None = None
    """What took a place last."""

    def __setitem__(self, name: str, module: nn.Module | None) -> None:
        """Set a child; if it takes the place of one with a block, it gets the block."""
        if self.get(name) not in (None, module):
            module = self.latest = self._take_over(name, module)
        super().__setitem__(name, module)

    def __delitem__(self, name: str) -> None:
        """Remove a child that has no block."""
        self._take_over(name, None)
        super().__delitem__(name)

    def pop(self, name: str, *default: Any) -> Any:
        """Remove a child that has no block, and return it."""
        self._take_over(name, None)
        return super().pop(name, *default)

    def _take_over(self, name: str, new: nn.Module | None) -> nn.Module | None:
        """Return what to put in the place of a child: the new one, with its block."""
        old, others = self.get(name), [self[key] for key in self if key != name]
        if any(child is old for child in others):
            return new  # the old one only moved, as in nn.Sequential.insert
        for carrier in carriers(old):
            if new is None:
                raise PlacementError(
                    f"'{name}' cannot be removed: it carries an attention block; "
                    f"delete '{name}.attention' first, if that is to go, too"
                )
            if is_past_block(new, self.latest, carrier):
                raise PlacementError(
                    f"'{name}' cannot become one with what follows: it carries an "
                    "attention block, which comes in between"
                )
            new = take_over(new, carrier, others)
        return new


def carriers(layer: nn.Module | None) -> list[nn.Module]:
    """Return what carries a block of a layer: itself, or parts of one of timm's norms."""
    parts = layer.modules() if isinstance(layer, NORMS) else [layer]
    return [part for part in parts if part is not None and block_of(part) is not None]


def take_over(
    new: nn.Module,
    old: nn.Module,
    others: list[nn.Module | None],
) -> nn.Module:
    """Return what has to stand in the place of a module that carried a block.

    Args:
        new: What took its place; it may come with the block, or hold the module.
        old: The module.
        others: The other children of the same parent; one may have become the holder.
    """
    block: Any = old.attention
    if any(block_of(part) is not None for part in new.modules()):
        if block_of(new) is None or runs_block(new):
            return new
        block = new._modules.pop("attention")  # converted with its module, but no hook
        return carry(new, block)
    inside = {id(weight) for weight in new.parameters()}
    if any(id(weight) in inside for weight in block.parameters()):
        return new
    if any(child is not None and old in child.modules() for child in others):
        if runs_block(old):
            return new
        del old.attention
    return carry(new, block)


def is_past_block(new: nn.Module, latest: nn.Module | None, old: nn.Module) -> bool:
    """Tell whether layers before and after the block of a replaced module became one.

    Args:
        new: What takes the module's place.
        latest: What took the place of another one just before.
        old: The module.
    """
    for one in (new, latest if isinstance(new, nn.Identity) else None):
        if isinstance(one, nn.Sequential) and "ao.nn.intrinsic" in type(one).__module__:
            return one[-1] is not old
    if block_of(new) is None or not isinstance(new, nn.modules.conv._ConvNd):
        return False
    then, now = old.state_dict(), new.state_dict()
    same = {key for key in then.keys() & now.keys() if equal(then[key], now[key])}
    blocks = {key for key in now if key.startswith("attention.")}
    return new.attention is not old.attention and blocks <= same < now.keys()


def equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Tell whether two tensors are equal; what has no memory is."""
    return one.is_meta or other.is_meta or torch.equal(one.to(other.device), other)


class Alone:
    """Stands for the output of a layer that torch.fx traces, on its way to the block.

    Args:
        output: What torch.fx has for it.
        training: Whether the layer is in training mode, which it leaves meanwhile.
    """

    def __init__(self, output: Any, *, training: bool) -> None:
        self.output, self.training = output, training

    @classmethod
    def __torch_function__(
        cls,
        _func: Any,
        _types: Any,
        args: Any = (),
        kwargs: Any = None,
    ) -> Any:
        """Pass through whatever the layer does."""
        given = (*args, *(kwargs or {}).values())
        return next(value for value in given if isinstance(value, cls))

    def dim(self) -> int:
        """Return the number of dimensions of a feature map."""
        return 4

    def end(self, layer: nn.Module, block: nn.Module | None) -> Any:
        """Leave the layer; a block that cannot be traced is one more operation."""
        layer.training = self.training
        if block is None:
            return self.output
        tracer: Any = self.output.tracer
        depth = len(tracer.module_stack)
        try:
            return block(self.output)
        except fx.proxy.TraceError:
            while len(tracer.module_stack) > depth:
                tracer.module_stack.popitem()
            name = tracer.path_of_module(block)
            return tracer.create_proxy("call_module", name, (self.output,), {})


def trace_alone(layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Alone] | None:
    """Make a layer one operation of torch.fx, without its block, where that traces."""
    if not inputs or not isinstance(inputs[0], fx.Proxy):
        return None
    layer.__dict__["plain"] = without_block(layer)
    tracer: Any = inputs[0].tracer
    name = f"{tracer.path_of_module(layer)}.plain"
    output = tracer.create_proxy("call_module", name, inputs, {})
    training, layer.training = layer.training, False
    return (Alone(output, training=training),)


def can_be_traced_alone(layer: nn.Module) -> bool:
    """Tell whether a layer is one operation for torch.fx, and passes an `Alone`."""
    if not type(layer).__module__.startswith("torch.nn") or layer._forward_hooks:
        return False
    plain = without_block(layer)
    plain.training = False
    try:
        return isinstance(plain.forward(Alone(None, training=False)), Alone)
    except Exception:  # noqa: BLE001 - layers that need numbers or sizes: any error
        return False


def without_block(layer: nn.Module) -> nn.Module:
    """Return a layer that has the tensors of another, but not its block."""
    plain = object.__new__(type(layer))
    plain.__dict__ |= vars(layer)
    for own in ("__module__", "plain"):
        plain.__dict__.pop(own, None)
    hooks, children = layer._forward_pre_hooks.items(), layer._modules.items()
    others = [(key, hook) for key, hook in hooks if hook is not trace_alone]
    plain._forward_pre_hooks, plain._forward_hooks = OrderedDict(others), OrderedDict()
    plain._modules = {key: child for key, child in children if key != "attention"}
    return plain
