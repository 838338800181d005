import threading
import warnings
from dataclasses import dataclass

import pytest
import torch
from networks import Tiny, Unit
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from placesearch.costs import CostTable, profile
from placesearch.errors import BackboneError
from placesearch.models.copying import copy_of, dtype_and_device, initialise, moved
from placesearch.models.graph import record
from placesearch.models.sites import find_sites

SIZE = (3, 16, 16)


def net(norm=lambda layer: layer):
    unit = Unit(8)
    unit.conv1, unit.conv2 = norm(unit.conv1), norm(unit.conv2)
    return nn.Sequential(
        norm(nn.Conv2d(3, 8, 3, padding=1)), unit, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    )


class LazyUnit(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.LazyConv2d(8, 3, padding=1, bias=False), nn.LazyConv2d(8, 3, padding=1, bias=False)
        self.bn1, self.bn2 = nn.LazyBatchNorm2d(), nn.LazyBatchNorm2d()

    forward = Unit.forward


def lazy_net():
    return nn.Sequential(
        nn.LazyConv2d(8, 3, padding=1), LazyUnit(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(4)
    )


def kinds(model):
    return [(site.name, site.kinds, site.channels, site.height) for site in find_sites(model, SIZE)]


def same_as(model, plain):
    """Sites and costs are those of the network written plainly."""
    assert kinds(model) == kinds(plain)
    assert profile(model, SIZE) == CostTable(model, SIZE).plain == profile(plain, SIZE)


@pytest.mark.parametrize("ran", [False, True])
@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.spectral_norm])
def test_weights_that_a_hook_makes_of_others_are_copied_and_made_again(norm, ran):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates them, which is why they are met
        model = net(norm)
    if ran:
        model(torch.randn(2, *SIZE)).sum().backward()
    assert kinds(model) == kinds(net())
    copied, x = copy_of(model.eval()), torch.randn(2, *SIZE)
    assert torch.equal(copied(x), model(x))
    copied(x).sum().backward()
    trained = next(weight for name, weight in copied.named_parameters() if name.startswith("0.weight"))
    assert trained.grad is not None
    assert profile(model, SIZE).macs == profile(net(), SIZE).macs
    with torch.no_grad():
        trained.mul_(1.5).add_(0.1)
    assert not torch.equal(copied(x), model(x))  # the copy has parameters of its own


@pytest.mark.parametrize("norm", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_parametrized_weights_are_copied(norm):
    assert kinds(net(norm)) == kinds(net())


def test_a_lazy_network_is_looked_at_as_if_it_had_its_shapes_and_stays_lazy():
    model, plain = lazy_net(), net()
    state = torch.get_rng_state()
    same_as(model, plain)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(isinstance(weight, nn.parameter.UninitializedParameter) for weight in model.parameters())


def test_a_lazy_copy_is_initialised_once_and_keeps_its_mode_and_statistics():
    copied = copy_of(lazy_net().train(), SIZE)
    assert all(module.training for module in copied.modules())
    assert torch.equal(copied[1].bn1.running_mean, torch.zeros(8))
    before = copied[0].weight.clone()
    initialise(copied, SIZE)
    assert torch.equal(copied[0].weight, before)


def test_a_lazy_network_in_another_dtype_gets_its_shapes_in_that():
    copied = copy_of(lazy_net().half(), SIZE)
    assert {weight.dtype for weight in copied.parameters()} == {torch.float16}
    assert kinds(lazy_net().half()) == kinds(net())


class Auxiliary(Tiny):
    """A network with a lazy head that is run in training only, and a norm whose statistics must not move."""

    def __init__(self):
        super().__init__(4)
        self.auxiliary = nn.LazyLinear(4)

    def forward(self, x):
        logits = super().forward(x)
        return logits + self.auxiliary(logits) if self.training else logits


def test_a_lazy_head_of_training_is_initialised_as_well():
    copied = copy_of(Auxiliary(), SIZE)
    assert copied.auxiliary.weight.shape == (4, 4)
    assert copied.unit1.bn1.num_batches_tracked == 0


def test_a_lazy_module_that_no_run_reaches_is_named():
    model = net()
    model[1].unused = nn.LazyLinear(4)
    with pytest.raises(BackboneError, match=r"'1.unused.weight' of Sequential is lazy, and no run gives it a shape"):
        find_sites(model, SIZE)


def test_compiled_networks_and_parts_are_looked_at_without_their_wrapper():
    model = net()
    part = net()
    part[1] = torch.compile(part[1])
    twice = net()
    twice[1].conv1 = torch.compile(twice[1].conv1)
    for one in (torch.compile(model), part, torch.compile(twice)):
        same_as(one, net())
    copied = copy_of(torch.compile(model), share=True)
    assert type(copied) is nn.Sequential
    assert [id(weight) for weight in copied.parameters()] == [id(weight) for weight in model.parameters()]


@pytest.mark.parametrize("part", ["", "1"])
def test_what_torch_jit_made_is_named(part):
    model = net()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates it
        if part:
            model[1] = torch.jit.script(model[1])
        else:
            model = torch.jit.trace(model.eval(), torch.zeros(1, *SIZE))
    for look in (find_sites, profile, CostTable):
        with pytest.raises(BackboneError, match=rf"{f'part .{part}. of' if part else 'network was'} .*torch.jit"):
            look(model, SIZE)


class Checkpointed(Unit):
    """A unit that is computed again in the backward pass."""

    def __init__(self, reentrant):
        super().__init__(8)
        self.reentrant = reentrant

    def forward(self, x):
        def residual(x):
            return self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))

        return torch.relu(x + checkpoint(residual, x, use_reentrant=self.reentrant))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_parts_are_seen_and_counted(reentrant):
    model = net()
    model[1] = Checkpointed(reentrant)
    same_as(model, net())


@pytest.mark.parametrize(
    ("hold", "says"),
    [
        (threading.Lock, r"'1.held' .*lock"),
        (lambda: open("/dev/null"), r"'1.held' .*TextIOWrapper"),  # noqa: PTH123, SIM115
        (lambda: (number for number in range(3)), r"'1.held' .*generator"),
        (lambda: [{"deep": threading.Lock()}], r"'1.held' .*lock"),
    ],
)
def test_what_cannot_be_copied_is_named(hold, says):
    model = net()
    model[1].held = held = hold()
    for look in (find_sites, profile, CostTable):
        with pytest.raises(BackboneError, match=says) as caught:
            look(model, SIZE)
        assert "input" not in str(caught.value)
        assert "\n" not in str(caught.value)
    if hasattr(held, "close"):
        held.close()


def test_functions_can_be_held():
    model = net()
    model[1].held = lambda x: x
    same_as(model, net())


@dataclass
class Output:
    logits: torch.Tensor
    features: list[torch.Tensor]


class Plain:
    """An output that is no container."""

    def __init__(self, logits):
        self.logits, self.self = logits, self


@pytest.mark.parametrize(
    "wrap",
    [
        lambda y: Output(y, [y]),
        lambda y: {"out": (y, {"more": y})},
        Plain,
        lambda y: torch.return_types.max((y, y)),
    ],
)
def test_outputs_of_any_kind_are_looked_into(wrap):
    class Wrapped(nn.Sequential):
        def forward(self, x):
            return wrap(super().forward(x))

    plain = net()
    same_as(Wrapped(*plain), plain)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_the_trial_input_has_the_networks_dtype(dtype):
    class Strict(nn.Sequential):
        def forward(self, x):
            assert x.dtype == self[0].weight.dtype
            return super().forward(x)

    same_as(Strict(*net()).to(dtype), net())


def test_a_network_that_works_in_its_own_dtype_alone_is_counted_in_that():
    class Half(nn.Sequential):
        def forward(self, x):
            return super().forward(x.to(torch.bfloat16))

    same_as(Half(*net()).bfloat16(), net())


def test_a_network_without_memory_is_looked_at_and_counted():
    same_as(net().to("meta"), net())
    numbers = moved(net().to("meta"), "cpu", torch.float64)
    assert dtype_and_device(numbers) == (torch.float64, torch.device("cpu"))
    assert not numbers[0].weight.any()


def test_the_first_floating_tensor_says_the_dtype():
    model = nn.Sequential(nn.ReLU())
    assert dtype_and_device(model) == (torch.float32, torch.device("cpu"))
    model.register_buffer("steps", torch.zeros(3, dtype=torch.long))
    model.register_buffer("mean", torch.zeros(3, dtype=torch.float64, device="meta"))
    assert dtype_and_device(model) == (torch.float64, torch.device("meta"))


@pytest.mark.parametrize(
    ("model", "size", "says"),
    [
        (
            net(),
            (1, 16, 16),
            "does not take an input of 1x16x16: its first convolution '0' wants 3 channels, not 1",
        ),
        (
            nn.Sequential(net(), nn.Linear(5, 2)),
            SIZE,
            "does not take an input of 3x16x16: in '1': mat1 and mat2",
        ),
    ],
)
def test_an_input_is_blamed_where_it_does_not_fit(model, size, says):
    with pytest.raises(BackboneError, match=says):
        find_sites(model, size)


def test_a_network_that_leaves_torch_is_told_so():
    class Leaving(nn.Sequential):
        def forward(self, x):
            return super().forward(torch.from_numpy(x.numpy()))

    with pytest.raises(BackboneError, match="Leaving puts out nothing that operations of torch make of its input"):
        find_sites(Leaving(*net()), SIZE)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_is_what_it_was_afterwards(reentrant):
    given = torch.utils.checkpoint.CheckpointFunction
    model = net()
    model[1] = Checkpointed(reentrant)
    with pytest.raises(BackboneError):
        find_sites(model, (1, 16, 16))
    assert torch.utils.checkpoint.CheckpointFunction is given


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (TypeError("no such option"), "Failing cannot be run: in '1': TypeError: no such option"),
        (ZeroDivisionError(), "Failing cannot be run: in '1': ZeroDivisionError$"),
        (RuntimeError("the moon\nis full"), "Failing cannot be run: in '1': RuntimeError: the moon$"),
    ],
)
def test_other_errors_are_not_blamed_on_the_input(error, says):
    class Part(nn.Module):
        def forward(self, _):
            raise error

    class Failing(nn.Sequential):
        pass

    for look in (record, profile):
        with pytest.raises(BackboneError, match=says):
            look(Failing(nn.Conv2d(3, 8, 3), Part()), SIZE)
