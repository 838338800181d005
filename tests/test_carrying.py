"""Networks that run over their children, or have something called `attention`: a block runs once at each site."""

import copy

import pytest
import torch
from networks import Tiny
from torch import nn

from placesearch.models.attachment import Attended
from placesearch.models.insertion import blocks_of, factors_of, fold, insert, own_names, set_factors, weights_of_blocks
from placesearch.models.sites import every_site
from placesearch.models.weights import Checkpoint, has_blocks, load_weights
from placesearch.placement import Placement

SIZE = (3, 16, 16)


def parts(channels):
    return [
        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels),
    ]


class Looping(nn.Module):
    """A residual unit that runs its children one after the other."""

    def __init__(self, run):
        super().__init__()
        self._run = run
        for index, part in enumerate(parts(8)):
            self.add_module(str(index), part)

    def forward(self, x):
        y = x
        for part in self._run(self):
            y = part(y)
        return x + y


class Subclass(nn.Sequential):
    """A Sequential with a forward of its own."""

    def forward(self, x):
        return x + super().forward(x)


class Indexed(nn.Sequential):
    def forward(self, x):
        y = x
        for index in range(len(self)):
            y = self[index](y)
        return x + y


class Listed(nn.ModuleList):
    def forward(self, x):
        y = x
        for part in self:
            y = part(y)
        return x + y


class Named(nn.ModuleDict):
    def forward(self, x):
        y = x
        for part in self.values():
            y = part(y)
        return x + y


class Dense(nn.Module):
    """A block whose children take the list of all maps before, as in DenseNet."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(16, 8, 3, padding=1)

    def forward(self, x):
        maps = [x]
        for part in self.children():
            maps.append(part(torch.cat(maps, 1)))
        return maps[-1]


class ButTheLast(nn.Module):
    """A unit that runs all of its children but the last, whatever that is."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.unused = nn.Identity()

    def forward(self, x):
        y = x
        for part in list(self.children())[:-1]:
            y = part(y)
        return x + y


def looping(run):
    return lambda: Looping(run)


LOOPS = {
    "children": looping(lambda unit: unit.children()),
    "named_children": looping(lambda unit: (part for _, part in unit.named_children())),
    "the dictionary": looping(lambda unit: unit._modules.values()),
    "items of the dictionary": looping(lambda unit: [part for _, part in unit._modules.items()]),
    "modules": looping(lambda unit: list(unit.modules())[1:6]),
    "a Sequential with its own forward": lambda: Subclass(*parts(8)),
    "a Sequential run by index": lambda: Indexed(*parts(8)),
    "a ModuleList": lambda: Listed(parts(8)),
    "a ModuleDict": lambda: Named({f"part{index}": part for index, part in enumerate(parts(8))}),
    "lists of maps": Dense,
    "all but the last": ButTheLast,
}


class Gate(nn.Module):
    """Attention of the network's own, with the names of parameters that our `se` has."""

    def __init__(self):
        super().__init__()
        self.reduce, self.expand = nn.Linear(8, 4), nn.Linear(4, 8)

    def forward(self, x):
        return x * torch.sigmoid(self.expand(torch.relu(self.reduce(x.mean((2, 3))))))[:, :, None, None]


class Unit(nn.Module):
    """A residual unit that applies its `attention`, if that is a module."""

    def __init__(self, *values):
        super().__init__()
        self.conv1, self.bn1, _, self.conv2, self.bn2 = parts(8)
        for value in values:
            self.attention = value

    def forward(self, x):
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        if isinstance(getattr(self, "attention", None), nn.Module):
            y = self.attention(y)
        return torch.relu(x + y)


class WithMethod(Unit):
    def attention(self, x):
        return 2 * x


class WithProperty(Unit):
    @property
    def attention(self):
        raise RuntimeError("not now")

    def forward(self, x):
        return torch.relu(x + self.bn2(self.conv2(x)))


class WithClassFlag(Unit):
    attention = False


class WithParameter(Unit):
    def __init__(self):
        super().__init__()
        self.attention = nn.Parameter(torch.ones(8, 1, 1))

    def forward(self, x):
        return super().forward(x) * self.attention


class WithBuffer(WithParameter):
    def __init__(self):
        Unit.__init__(self)
        self.register_buffer("attention", torch.ones(8, 1, 1))


class Norm(nn.BatchNorm2d):
    """A norm that has the name."""

    attention = None


class WithNorm(Unit):
    def __init__(self):
        super().__init__()
        self.bn2 = Norm(8)


def unregistered():
    unit = Unit()
    unit.register_module("attention", None)
    return unit


COLLISIONS = {
    "a module": lambda: Unit(Gate()),
    "None": lambda: Unit(None),
    "a flag": lambda: Unit(False),
    "a name": lambda: Unit("se"),
    "a module that is None": unregistered,
    "a method": WithMethod,
    "a property": WithProperty,
    "a class attribute": WithClassFlag,
    "a parameter": WithParameter,
    "a buffer": WithBuffer,
    "a norm": WithNorm,
    "nothing": Unit,
}
UNITS = LOOPS | COLLISIONS


def network(name):
    torch.manual_seed(0)
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)]
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), UNITS[name](), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3), *head)


def shifted(model):
    """Take the blocks away from the identity."""
    with torch.no_grad():
        for block in blocks_of(model).values():
            for weight in block.parameters():
                weight.add_(0.3 * torch.randn_like(weight))
    return model


@pytest.mark.parametrize("name", UNITS)
def test_a_block_runs_once_at_every_site_and_changes_nothing_as_the_identity(name):
    plain = network(name)
    sites, x = every_site(plain, SIZE), torch.randn(4, *SIZE)
    assert "1" in {alias for site in sites for alias in (site.name, *site.aliases)}
    for site in sites:
        placement = Placement.parse(f"{site.name}=cbam(r=2,k=3)")
        same = insert(plain, placement, sites=sites, initial="identity", seed=0)
        for training in (True, False):
            pair = [copy.deepcopy(network).train(training) for network in (plain, same)]
            assert torch.equal(pair[0](x), pair[1](x)), site
        ran = []
        same.get_submodule(site.name).attention.register_forward_hook(lambda *_, ran=ran: ran.append(1))
        same(x)
        assert ran == [1]
        assert list(blocks_of(same)) == [site.name]
        assert factors_of(same) == {site.name: 4.0}
        report = same.load_state_dict(plain.state_dict(), strict=False)
        assert report.unexpected_keys == []
        assert set(report.missing_keys) == weights_of_blocks(same)
        same.load_state_dict(same.state_dict())
        shifted(same).eval()
        torch.testing.assert_close(fold(same)(x), same(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", UNITS)
def test_blocks_at_all_sites_are_trained_converted_and_given_weights(name):
    plain = network(name)
    sites, x = every_site(plain, SIZE), torch.randn(4, *SIZE)
    placement = Placement.parse(" ".join(f"{site.name}=se(r=2)" for site in sites))
    model = insert(plain, placement, sites=sites, seed=0)
    assert set(blocks_of(model)) == {site.name for site in sites}
    model(x).square().sum().backward()
    weights = dict(model.named_parameters())
    assert all(weights[key].grad is not None for key in weights_of_blocks(model))
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model)).eval()
    torch.testing.assert_close(converted(x), model.eval()(x))
    other = network(name)
    with torch.no_grad():
        for weight in other.parameters():
            weight.add_(1)
    checkpoints = [Checkpoint("plain", other.state_dict()), Checkpoint("with blocks", model.state_dict())]
    assert [has_blocks(model, checkpoint) for checkpoint in checkpoints] == [False, True]
    blocks = {key: model.state_dict()[key].clone() for key in weights_of_blocks(model)}
    load_weights(model, checkpoints[0])
    got = model.state_dict()
    for key, value in own_names(model, other.state_dict()).items():
        assert torch.equal(got[key], value)
    assert all(torch.equal(got[key], value) for key, value in blocks.items())
    factors = {site.name: 2.0 for site in sites}
    set_factors(model, factors)
    assert factors_of(model) == factors


def test_only_what_needs_it_is_wrapped():
    assert {site.name for site in every_site(network("children"), SIZE) if site.wrapped} == {"1"}
    assert {site.name for site in every_site(network("a norm"), SIZE) if site.wrapped} == {"1", "1.bn2"}
    assert not any(site.wrapped for site in every_site(Tiny(4), SIZE))


class Counting(nn.Module):
    """A unit that fails with any further module in it or around it."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        assert type(self.conv) is nn.Conv2d
        assert not list(self.conv.children())
        return torch.relu(self.conv(x))


def test_a_module_that_can_carry_no_block_is_no_site():
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), Counting(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.LazyLinear(4))
    plain[-1] = nn.Linear(8 * 12 * 12, 4)
    names = [site.name for site in every_site(plain, SIZE)]
    assert "1.conv" not in names
    assert {"0", "1", "2"} <= set(names)


def test_parameters_that_are_tied_after_insertion_are_not_scaled():
    torch.manual_seed(0)
    plain = Tied(lambda net: None)
    model = insert(plain, Placement.parse("c2=se(r=2)"), input_size=SIZE, initial="identity", seed=0).eval()
    model.c1.weight = model.c2.weight
    x = torch.randn(2, *SIZE)
    torch.testing.assert_close(fold(model)(x), model(x), rtol=0, atol=1e-5)
    assert factors_of(fold(insert(plain, Placement.parse("c2=se(r=2)"), input_size=SIZE, initial="identity"))) == {}


def test_an_attended_module_passes_for_the_one_in_it():
    inner = nn.Conv2d(3, 8, 3)
    attended = Attended(inner, nn.Identity())
    assert attended.out_channels == 8
    assert attended.weight is inner.weight
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        attended.nothing  # noqa: B018
    assert type(copy.deepcopy(attended)) is Attended


class Tied(nn.Module):
    """Two convolutions with residuals; `tie` makes one depend on the other."""

    def __init__(self, tie):
        super().__init__()
        self.c0, self.c1, self.c2 = nn.Conv2d(3, 8, 3, padding=1), *(nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))
        self.fc = nn.Linear(8, 4)
        tie(self)

    def forward(self, x):
        x = torch.relu(self.c0(x))
        x = torch.relu(x + self.c1(x))
        return self.fc(torch.relu(x + self.c2(x)).mean((2, 3)))


def same(net):
    net.c2.weight = net.c1.weight


def bias(net):
    net.c2.bias = net.c1.bias


def view(net):
    net.c2.weight = nn.Parameter(net.c1.weight.data.view(8, 8, 3, 3))


def flat(net):
    both = torch.randn(2 * 8 * 8 * 9) / 10
    net.c1.weight = nn.Parameter(both[: 8 * 8 * 9].view(8, 8, 3, 3))
    net.c2.weight = nn.Parameter(both[8 * 8 * 5 : 8 * 8 * 14].view(8, 8, 3, 3))


class Of(nn.Module):
    """Makes a weight of another module's."""

    def __init__(self, other):
        super().__init__()
        self.other = [other]

    def forward(self, weight):
        return weight + self.other[0].weight


def parametrized(net):
    nn.utils.parametrize.register_parametrization(net.c2, "weight", Of(net.c1))


TIES = {
    "a parametrization": parametrized,
    "the same weight": same,
    "the same bias": bias,
    "a view": view,
    "memory in common": flat,
}


@pytest.mark.parametrize("name", TIES)
def test_a_parameter_that_is_used_twice_is_not_scaled(name):
    torch.manual_seed(0)
    plain = Tied(TIES[name]).eval()
    x, sites = torch.randn(2, *SIZE), every_site(plain, SIZE)
    assert {site.name: bool(site.scaled_by) for site in sites if site.name in ("c0", "c1", "c2")} == {
        "c0": True,
        "c1": False,
        "c2": False,
    }
    for site in ("c0", "c1", "c2"):
        for setting in ("se(r=2)", "cbam(r=2,k=3)", "eca(k=3)"):
            placement = Placement.parse(f"{site}={setting}")
            model = shifted(insert(plain, placement, sites=sites, initial="identity", seed=0)).eval()
            torch.testing.assert_close(fold(model)(x), model(x), rtol=0, atol=1e-5)
            assert (site in factors_of(fold(model))) == (site != "c0")
