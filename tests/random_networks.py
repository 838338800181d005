"""Small networks put together at random from parts that real networks are made of, for tests and benchmarks."""

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations

SIDE = 16
CLASSES = 4

NORMS = {
    "batch": nn.BatchNorm2d,
    "group": lambda channels: nn.GroupNorm(2, channels),
    "instance": lambda channels: nn.InstanceNorm2d(channels, affine=True),
    "none": lambda _: nn.Identity(),
}
ACTIVATIONS = {
    "relu": nn.ReLU,
    "relu in place": lambda: nn.ReLU(inplace=True),
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "hardswish": nn.Hardswish,
    "prelu": nn.PReLU,
}
FUNCTIONS = {"torch.relu": torch.relu, "relu": F.relu, "silu": F.silu, "relu6": F.relu6}
CONVOLUTIONS = {
    "3x3": lambda c: nn.Conv2d(c, c, 3, padding=1),
    "3x3 without bias": lambda c: nn.Conv2d(c, c, 3, padding=1, bias=False),
    "1x1": lambda c: nn.Conv2d(c, c, 1),
    "depthwise": lambda c: nn.Conv2d(c, c, 3, padding=1, groups=c),
    "dilated": lambda c: nn.Conv2d(c, c, 3, padding=2, dilation=2),
    "circular": lambda c: nn.Conv2d(c, c, 3, padding=1, padding_mode="circular"),
    "transposed": lambda c: nn.ConvTranspose2d(c, c, 3, padding=1),
    "weight norm": lambda c: parametrizations.weight_norm(nn.Conv2d(c, c, 3, padding=1)),
}
WAYS = ("attributes", "sequential", "list", "children", "named children")
TAKEN = ("nothing", "none", "flag", "module", "method")
NAMES = ("conv", "bn", "act", "body", "block", "unit", "norm", "module", "layer", "main", "branch", "gate", "net")


class DropPath(nn.Module):
    """Leave out a branch for some images of a batch."""

    def forward(self, x):
        if not self.training:
            return x
        return x * (torch.rand(len(x), 1, 1, 1) > 0.2)


class ChannelsLast(nn.Module):
    """A layer norm over channels, as in ConvNeXt."""

    def __init__(self, channels):
        super().__init__()
        self.norm = nn.LayerNorm(channels)

    def forward(self, x):
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Adding(nn.Module):
    """How a residual unit adds its branch to its input."""

    FORMS = ("none", "x + y", "y + x", "y += x", "add", "sum", "scaled", "scaled and shifted", "halved", "minus",
             "dropped", "path dropped", "copied", "stacked", "activated first", "subtracted")  # fmt: skip

    def __init__(self, form, channels):
        super().__init__()
        self.form = form
        if form.startswith("scaled"):
            self.scale = nn.Parameter(torch.full((channels, 1, 1), 0.7))
        if form in ("scaled and shifted", "minus"):
            self.bias = nn.Parameter(torch.full((1,), 0.1))
        self.drop = {"dropped": nn.Dropout(0.2), "path dropped": DropPath()}.get(form, nn.Identity())

    def forward(self, x, y):
        match self.form:
            case "none":
                return y
            case "x + y" | "subtracted":
                return x + y if self.form == "x + y" else x - y
            case "y += x":
                y += x
                return y
            case "add":
                return torch.add(x, y)
            case "sum":
                return sum([x, y])
            case "scaled":
                return x + y * self.scale
            case "scaled and shifted":
                return (y * self.scale + self.bias) + x
            case "halved":
                return x + y / 2
            case "minus":
                return x + (y - self.bias)
            case "copied":
                return x + y.contiguous().to(x.dtype)
            case "stacked":
                return torch.stack([x, y]).sum(0)
            case "activated first":
                return x + F.silu(y)
            case "dropped" | "path dropped":
                return x + self.drop(y)
            case _:
                return y + x


class Unit(nn.Module):
    """Convolutions, norms and activations in one of the ways in which people write a residual unit."""

    def __init__(self, channels, parts, way, form, after, taken, skip):
        super().__init__()
        self.way = way
        self.parts = [name for name, _ in parts]
        if taken in ("none", "flag"):
            self.attention = None if taken == "none" else False
        if way == "sequential":
            self.inner = nn.Sequential(*(part for _, part in parts))
        elif way == "list":
            self.inner = nn.ModuleList([part for _, part in parts])
        else:
            for name, part in parts:
                self.add_module(name, part)
        if way in ("children", "named children"):  # which would run whatever else is a child
            self.__dict__["add"] = Adding(
                form if form in ("none", "x + y", "y += x", "sum", "halved") else "y + x", channels
            )
            return
        if taken == "module":
            self.attention = nn.Conv2d(channels, channels, 1)
        self.add = Adding(form, channels)
        self.skip = nn.Conv2d(channels, channels, 1) if skip else nn.Identity()
        self.after = FUNCTIONS.get(after)
        if after in ACTIVATIONS:
            self.act_after = ACTIVATIONS[after]()

    def forward(self, x):
        y = x
        if self.way == "children":
            for part in self.children():
                y = part(y)
            return self.add(x, y)
        if self.way == "named children":
            for part in self._modules.values():
                y = part(y)
            return self.add(x, y)
        if self.way == "sequential":
            y = self.inner(y)
        elif self.way == "list":
            for part in self.inner:
                y = part(y)
        else:
            for name in self.parts:
                y = getattr(self, name)(y)
        if isinstance(getattr(self, "attention", None), nn.Module) and type(self.attention) is nn.Conv2d:
            y = self.attention(y)
        y = self.add(self.skip(x), y)
        if hasattr(self, "act_after"):
            return self.act_after(y)
        return y if self.after is None else self.after(y)


class WithMethod(Unit):
    """A unit that has a method `attention`."""

    def attention(self, x):
        return x


class ResidualSequential(nn.Sequential):
    """A Sequential that adds its input, as many write it."""

    def forward(self, x):
        return x + super().forward(x)


class Network(nn.Module):
    """A stem, stages of units with pooling between them, and a classifier.

    Args:
        parts: The units and poolings.
        channels: Their channels.
        head: How maps become numbers: `pool`, `mean`, `flatten` or `convolution`.
        side: Side of the last map.
        twice: Position of a unit that runs twice; None for none.
    """

    def __init__(self, parts, channels, head, side, twice):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU())
        self.parts, self.head, self.twice = nn.ModuleList(parts), head, twice
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classify = nn.Conv2d(channels, CLASSES, 1) if head == "convolution" else nn.Linear(
            channels * (side**2 if head == "flatten" else 1), CLASSES
        )  # fmt: skip

    def forward(self, x):
        x = self.stem(x)
        for position, part in enumerate(self.parts):
            x = part(x)
            if position == self.twice:
                x = part(x)
        if self.head == "convolution":
            return self.classify(x).mean((2, 3))
        x = {"pool": self.pool, "mean": lambda x: x.mean((2, 3)), "flatten": lambda x: x}[self.head](x)
        return self.classify(x.flatten(1))


@st.composite
def units(draw, channels):
    """Draw a unit."""
    parts = []
    for _ in range(draw(st.integers(1, 3))):
        parts.append(CONVOLUTIONS[draw(st.sampled_from(sorted(CONVOLUTIONS)))](channels))
        norm = draw(st.sampled_from([*sorted(NORMS), "channels last"]))
        if norm != "none":
            parts.append(ChannelsLast(channels) if norm == "channels last" else NORMS[norm](channels))
        if draw(st.booleans()):
            parts.append(ACTIVATIONS[draw(st.sampled_from(sorted(ACTIVATIONS)))]())
    names = [f"{draw(st.sampled_from(NAMES))}{index}" for index in range(len(parts))]
    if draw(st.integers(0, 9)) == 0:
        return ResidualSequential(*parts)
    way, form = draw(st.sampled_from(WAYS)), draw(st.sampled_from(Adding.FORMS))
    after = draw(st.sampled_from(["none", *sorted(FUNCTIONS), *sorted(ACTIVATIONS)]))
    taken = draw(st.sampled_from(TAKEN))
    kind = WithMethod if taken == "method" else Unit
    return kind(channels, list(zip(names, parts, strict=True)), way, form, after, taken, draw(st.booleans()))


@st.composite
def networks(draw):
    """Draw a network with weights and statistics of norms from a seed."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    channels, side, parts = draw(st.sampled_from([4, 8])), SIDE, []
    for _ in range(draw(st.integers(1, 4))):
        parts.append(draw(units(channels)))
        pooling = draw(st.sampled_from(["none", "max", "average", "strided"]))
        if pooling != "none" and side > 2:
            side //= 2
            parts.append({"max": nn.MaxPool2d(2), "average": nn.AvgPool2d(2),
                          "strided": nn.Conv2d(channels, channels, 3, stride=2, padding=1)}[pooling])  # fmt: skip
    twice = draw(st.none() | st.integers(0, len(parts) - 1))
    if twice is not None and not isinstance(parts[twice], Unit | ResidualSequential):
        twice = None
    head = draw(st.sampled_from(["pool", "mean", "flatten", "convolution"]))
    model = Network(parts, channels, head, side, twice)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model
