import copy
import pickle

import pytest
import timm.layers
import torch
from networks import Tiny, Unit
from torchvision.models.feature_extraction import create_feature_extractor

from placesearch.errors import PlacementError
from placesearch.models.attachment import Attended
from placesearch.models.backbones import load_backbone
from placesearch.models.insertion import factors_of, fold, insert, set_factors
from placesearch.models.sites import find_sites
from placesearch.placement import BlockSetting, Placement

SIZE = (3, 32, 32)
BOTH = Placement.parse("unit1.bn2=se(r=4) unit2.bn2=cbam(r=2,k=3)")

# Hu et al. 2018 and Woo et al. 2018, tables of ImageNet results, 1000 classes: exact, or millions as printed
PUBLISHED = {
    "resnet18": (11_778_592, "11.78"),
    "resnet34": ("21.96", "21.96"),
    "resnet50": (28_088_024, "28.09"),
    "resnet101": (49_326_872, "49.33"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_the_published_ones(name):
    with torch.device("meta"):
        plain = load_backbone(name, 1000)
    sites = [site for site in find_sites(plain, (3, 64, 64)) if "residual" in site.kinds]
    for setting, published in zip((BlockSetting("se", 16), BlockSetting("cbam", 16, 7)), PUBLISHED[name], strict=True):
        model = insert(plain, Placement({site.name: setting for site in sites}), sites=sites)
        count = sum(weight.numel() for weight in model.parameters())
        assert published in (count, f"{count / 1e6:.2f}")


def test_insert_leaves_the_given_model_unchanged():
    plain = Tiny(10).eval()
    x = torch.randn(2, *SIZE)
    before, names = plain(x), list(plain.state_dict())
    changed = insert(plain, BOTH, input_size=SIZE)(x)
    assert torch.equal(plain(x), before)
    assert list(plain.state_dict()) == names
    assert not torch.allclose(changed, before)


def test_the_block_works_on_the_residual_right_before_the_addition():
    plain = Tiny(10).eval()
    model = insert(plain, Placement.parse("unit1.bn2=se(r=4)"), input_size=SIZE).eval()
    x = torch.randn(2, 8, 4, 4)
    unit = plain.unit1
    residual = unit.bn2(unit.conv2(torch.relu(unit.bn1(unit.conv1(x)))))
    gated = model.unit1.bn2.attention(residual)
    torch.testing.assert_close(model.unit1(x), torch.relu(x + gated))


def test_a_copy_may_share_the_networks_own_tensors():
    plain = Tiny(10)
    shared = insert(plain, BOTH, input_size=SIZE, share=True)
    assert shared.unit1.conv1.weight is plain.unit1.conv1.weight
    assert shared.unit1.bn1.running_mean is plain.unit1.bn1.running_mean
    assert not hasattr(plain.unit1.bn2, "attention")
    assert insert(plain, BOTH, input_size=SIZE).unit1.conv1.weight is not plain.unit1.conv1.weight


def test_a_plain_checkpoint_loads_into_the_inserted_model():
    plain = Tiny(10)
    model = insert(Tiny(10), BOTH, input_size=SIZE)
    report = model.load_state_dict(plain.state_dict(), strict=False)
    assert report.unexpected_keys == []
    assert all(".attention." in key for key in report.missing_keys)
    assert torch.equal(model.unit2.conv1.weight, plain.unit2.conv1.weight)


def test_the_model_survives_deepcopy_pickle_and_a_state_dict_round_trip():
    model = insert(Tiny(10), BOTH, input_size=SIZE).eval()
    x = torch.randn(2, *SIZE)
    other = insert(Tiny(10), BOTH, input_size=SIZE).eval()
    other.load_state_dict(model.state_dict())
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), other):  # noqa: S301 - made right here
        assert torch.equal(copied(x), model(x))


class Looping(Unit):
    """A unit that a block needs a module around, because it runs over its children."""

    def forward(self, x):
        y = x
        for part in self.children():
            y = part(y)
        return torch.relu(x + y)


class Mixed(Tiny):
    """A network in which blocks hang in all ways: at a layer, at a unit with sites in it, wrapped, in a Sequential."""

    def __init__(self, num_classes):
        super().__init__(num_classes)
        self.unit2 = Looping(8)
        self.stem = torch.nn.Sequential(self.stem, torch.nn.BatchNorm2d(8))


EVERY_WAY = Placement.parse("unit1.bn2=se(r=4) unit1=eca(k=3) unit2=cbam(r=2,k=3) unit2.bn1=se(r=2) stem.1=se(r=4)")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of torch.jit
def test_the_model_survives_export_compilation_and_ddp(tmp_path):
    model = insert(Mixed(10), EVERY_WAY, input_size=SIZE).eval()
    assert [type(model.get_submodule(name)) for name in ("unit1", "unit2")] == [Unit, Attended]
    x = torch.randn(2, *SIZE)
    expected = model(x).detach()
    for strict in (False, True):
        exported = torch.export.export(model, (x,), strict=strict).module()
        torch.testing.assert_close(exported(x).detach(), expected)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x).detach(), expected)
    in_part = copy.deepcopy(model)
    in_part.unit1.bn2 = torch.compile(in_part.unit1.bn2, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(in_part(x), expected)
    torch.testing.assert_close(torch.jit.trace(model, x)(x).detach(), expected)
    traced = torch.fx.symbolic_trace(model)
    torch.testing.assert_close(traced(x).detach(), expected)
    features = create_feature_extractor(model, ["unit1.bn2", "head"])(x)
    torch.testing.assert_close(features["head"].detach(), expected)
    seen = []
    handle = model.unit1.bn2.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    model(x)
    handle.remove()
    torch.testing.assert_close(features["unit1.bn2"], seen[0])
    path = tmp_path / "model.pt"
    torch.save(model, path)
    torch.testing.assert_close(torch.load(path, weights_only=False)(x).detach(), expected)
    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(model.train())
        wrapped(x).sum().backward()
        assert all(weight.grad is not None for weight in model.parameters())
        torch.testing.assert_close(wrapped.eval()(x).detach(), model(x).detach())
    finally:
        torch.distributed.destroy_process_group()


def test_a_traced_network_still_trains_and_evaluates():
    model = insert(Mixed(10), EVERY_WAY, input_size=SIZE).train()
    before = copy.deepcopy(model.state_dict())
    traced = torch.fx.symbolic_trace(copy.deepcopy(model))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    x = torch.randn(4, *SIZE)
    for training in (True, False):
        torch.testing.assert_close(traced.train(training)(x), model.train(training)(x))
    assert {"unit1.bn2.weight", "unit1.bn2.attention.reduce.weight"} <= dict(traced.named_parameters()).keys()
    assert int(model.unit1.bn2.num_batches_tracked) == int(traced.unit1.bn2.plain.num_batches_tracked) == 1


def test_a_seed_makes_the_same_block_start_the_same_in_every_placement():
    alone = Placement.parse("unit2.bn2=cbam(r=2,k=3)")
    one = insert(Tiny(10), BOTH, input_size=SIZE, seed=3)
    two = insert(Tiny(10), alone, input_size=SIZE, seed=3)
    three = insert(Tiny(10), alone, input_size=SIZE, seed=4)
    weights = [model.unit2.bn2.attention.channel.reduce.weight for model in (one, two, three)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("unit1.bn3=se(r=4)", "did you mean 'unit1.bn2'"),
        ("unit1.bn2=se(r=9)", "site 'unit1.bn2' with 8 channels: reduction 9 is not allowed; allowed are 1..8"),
        ("unit1.bn2=se(k=3)", "needs the settings reduction (1..8) and no others"),
        ("unit1.bn2=cbma(r=4,k=3)", "did you mean 'cbam'"),
    ],
)
def test_what_a_network_cannot_take_is_refused(text, says):
    with pytest.raises(PlacementError) as caught:
        insert(Tiny(10), Placement.parse(text), input_size=SIZE)
    assert says in str(caught.value)


def test_a_site_takes_one_block():
    once = insert(Tiny(10), BOTH, input_size=SIZE)
    with pytest.raises(PlacementError, match="already has a block"):
        insert(once, BOTH, input_size=SIZE)


SETTINGS = [
    "se(r=4)",
    "cbam(r=2,k=3)",
    "cbam_bn(r=2,k=3)",
    "cbam_residual(r=2,k=3)",
    "channel(r=2)",
    "spatial(k=3)",
    "eca(k=3)",
]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("setting", SETTINGS)
def test_an_identity_block_changes_nothing_and_can_be_trained(setting, training):
    torch.manual_seed(0)
    plain = Tiny(10).train(training)
    placement = Placement.parse(f"unit1.bn2={setting} unit2={setting}")
    model = insert(plain, placement, input_size=SIZE, initial="identity").train(training)
    x = torch.randn(4, *SIZE)
    expected = plain(x).detach()
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    model(x).square().sum().backward()
    gradients = [weight.grad.norm() for name, weight in model.named_parameters() if "attention" in name]
    assert 0 < sum(gradients) < 1e3  # a zero convolution before a norm would give some 1e4


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("setting", SETTINGS)
def test_folding_gives_stock_blocks_with_equal_outputs(setting, training):
    torch.manual_seed(0)
    model = insert(Tiny(10), Placement.parse(f"unit1.bn2={setting}"), input_size=SIZE, initial="identity")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(5):  # away from the identity
        optimizer.zero_grad()
        model(torch.randn(8, *SIZE)).square().mean().backward()
        optimizer.step()
    model.train(training)
    folded = fold(model)
    stock = insert(Tiny(10), Placement.parse(f"unit1.bn2={setting}"), input_size=SIZE).train(training)
    stock.load_state_dict(folded.state_dict())  # nothing but weights tells it from a stock model
    x = torch.randn(4, *SIZE)
    expected = model(x).detach()
    torch.testing.assert_close(stock(x), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    untouched = insert(Tiny(10), Placement.parse(f"unit1.bn2={setting}"), input_size=SIZE).train(training)
    untouched.load_state_dict(model.state_dict())
    assert not torch.allclose(untouched(x), expected, rtol=1e-3)


def test_folding_leaves_a_block_alone_that_follows_on_no_affine_layer():
    model = insert(Tiny(10), Placement.parse("unit1=se(r=4)"), input_size=SIZE, initial="identity").eval()
    folded = fold(model)
    x = torch.randn(2, *SIZE)
    assert folded.unit1.attention.factor == 2.0
    assert torch.equal(folded(x), model(x))


def test_folding_finds_the_norm_within_the_module_that_names_the_site():
    norm = timm.layers.BatchNormAct2d(8, apply_act=False)  # its tensor's innermost module is an identity
    plain = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), norm, torch.nn.Conv2d(8, 8, 3))
    model = insert(plain, Placement.parse("1=cbam(r=4,k=3)"), input_size=SIZE, initial="identity").eval()
    folded, x = fold(model), torch.randn(2, *SIZE)
    assert (factors_of(model), factors_of(folded)) == ({"1.drop": 4.0}, {})
    torch.testing.assert_close(folded(x), model(x))


class Shared(torch.nn.Module):
    """One convolution that makes two maps, of which only one ends in a module of its own."""

    def __init__(self):
        super().__init__()
        self.conv, self.mark, self.end = torch.nn.Conv2d(3, 8, 3), torch.nn.Identity(), torch.nn.Conv2d(8, 8, 3)

    def forward(self, x):
        return self.end(self.mark(self.conv(x)) + self.conv(-x))


class Standardised(torch.nn.Conv2d):
    """A convolution with a weight made of its weight, which no scale changes."""

    def forward(self, x):
        return self._conv_forward(x, self.weight / self.weight.norm(), self.bias)


@pytest.mark.parametrize(
    ("plain", "site"),
    [
        (Shared(), "mark"),
        (torch.nn.Sequential(Standardised(3, 8, 3), torch.nn.Conv2d(8, 8, 3)), "0"),
        (torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8, affine=False)), "1"),
    ],
)
def test_folding_scales_no_layer_that_would_change_more_than_the_site(plain, site):
    torch.manual_seed(0)
    plain.append(torch.nn.Conv2d(8, 8, 3)) if isinstance(plain, torch.nn.Sequential) else None
    model = insert(plain, Placement.parse(f"{site}=se(r=4)"), input_size=SIZE, initial="identity").eval()
    x = torch.randn(2, *SIZE)
    assert torch.equal(fold(model)(x), model(x))
    assert factors_of(fold(model)) == {site: 2.0}


def test_a_factor_without_its_block_is_refused():
    with pytest.raises(PlacementError, match="'unit2' has no block"):
        set_factors(insert(Tiny(10), BOTH, input_size=SIZE), {"unit2": 2.0})


def test_folding_leaves_a_norm_alone_that_ends_in_an_activation():
    norm = timm.layers.BatchNormAct2d(8, act_layer=torch.nn.SiLU)
    plain = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), norm, torch.nn.Conv2d(8, 8, 3))
    model = insert(plain, Placement.parse("1=se(r=4)"), input_size=SIZE, initial="identity").eval()
    x = torch.randn(2, *SIZE)
    assert torch.equal(fold(model)(x), model(x))


def test_a_start_that_does_not_exist_is_refused():
    with pytest.raises(PlacementError, match="not 'zero'"):
        insert(Tiny(10), BOTH, input_size=SIZE, initial="zero")


def test_folding_leaves_the_given_model_unchanged():
    model = insert(Tiny(10), BOTH, input_size=SIZE, initial="identity").eval()
    before = copy.deepcopy(model.state_dict())
    fold(model)
    assert model.unit1.bn2.attention.factor == 2.0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_users_block_that_cannot_start_as_the_identity_is_refused(workplace):
    placement = Placement.parse("unit1.bn2=mine:Gate(r=4)")
    insert(Tiny(10), placement, input_size=SIZE)
    with pytest.raises(PlacementError, match="make_identity"):
        insert(Tiny(10), placement, input_size=SIZE, initial="identity")


def test_a_site_may_be_named_by_any_alias():
    plain = torch.nn.Sequential(
        torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU()), torch.nn.Conv2d(8, 8, 3)
    )
    names = [
        insert(plain, Placement.parse(f"{name}=se(r=4)"), input_size=SIZE).state_dict().keys() for name in ("0", "0.1")
    ]
    assert names[0] == names[1]
    with pytest.raises(PlacementError, match="already has a block"):
        insert(plain, Placement.parse("0=se(r=4) 0.1=se(r=4)"), input_size=SIZE)


def test_a_sequential_whose_last_module_is_shared_still_takes_a_block():
    shared = torch.nn.ReLU()
    plain = torch.nn.Sequential(
        torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), shared), torch.nn.Sequential(torch.nn.Conv2d(8, 8, 3), shared)
    ).eval()
    model = insert(plain, Placement.parse("0=se(r=4)"), input_size=SIZE).eval()
    x = torch.randn(2, *SIZE)
    torch.testing.assert_close(model(x), plain[1](model[0].attention(plain[0](x))))
