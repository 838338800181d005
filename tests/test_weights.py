import functools
import http.server
import threading

import pytest
import torch
import torchvision
from networks import Tiny
from safetensors.torch import save_file
from torchvision.models import Weights, WeightsEnum

from placesearch.errors import BackboneError, InputError
from placesearch.models.architecture import Architecture
from placesearch.models.weights import Checkpoint, load_weights, read_weights
from placesearch.placement import Placement

BOTH = Placement.parse("unit1.bn2=se(r=4) unit2=cbam(r=2,k=3)")


def save_as(form, state, path):
    match form:
        case "plain":
            torch.save(state, path)
        case "legacy":
            torch.save(state, path, _use_new_zipfile_serialization=False)
        case "wrapped":
            torch.save({"epoch": 3, "state_dict": state, "note": "mine"}, path)
        case "parallel":
            torch.save({"model": {f"module.{name}": tensor for name, tensor in state.items()}}, path)
        case "compiled and parallel":
            torch.save({f"module._orig_mod.{name}": tensor for name, tensor in state.items()}, path)
        case "safetensors":
            save_file(state, path)
    return path


FORMS = ["plain", "legacy", "wrapped", "parallel", "compiled and parallel", "safetensors"]


@pytest.mark.parametrize("form", FORMS)
def test_a_checkpoint_of_the_plain_backbone_starts_a_model_with_blocks(workplace, form):
    trained = Tiny(10).eval()
    path = save_as(form, trained.state_dict(), workplace / f"w.{'safetensors' if form == 'safetensors' else 'pt'}")
    architecture = Architecture(backbone="mine:tiny", num_classes=10, input_size=(3, 32, 32), placement=BOTH)
    model = architecture.build(weights=path, initial="identity").eval()
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model(x), trained(x))


def test_a_checkpoint_of_the_whole_model_gives_the_model_back_blocks_included(workplace):
    architecture = Architecture(backbone="mine:tiny", num_classes=10, input_size=(3, 32, 32), placement=BOTH)
    trained = architecture.build(initial="identity").eval()
    with torch.no_grad():
        for weight in trained.parameters():
            weight.add_(0.02 * torch.randn_like(weight))
    torch.save(trained.state_dict(), "trained.pt")
    architecture.with_factors_of(trained).save("trained.yaml")
    loaded = Architecture.load("trained.yaml", allow=["mine:tiny"])
    assert loaded.factors == {"unit1.bn2": 2.0, "unit2": 4.0}
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(loaded.build(weights="trained.pt").eval()(x), trained(x))
    assert not torch.allclose(architecture.build(weights="trained.pt").eval()(x), trained(x))


def test_a_site_that_goes_by_an_alias_keeps_the_factor_of_its_gate(tmp_path):
    architecture = Architecture(
        backbone="resnet18", num_classes=10, input_size=(3, 32, 32), placement=Placement.parse("layer1=se(r=16)")
    )
    model = architecture.build(initial="identity")
    architecture.with_factors_of(model).save(tmp_path / "a.yaml")
    loaded = Architecture.load(tmp_path / "a.yaml")
    assert loaded.factors == {"layer1.1": 2.0}
    assert str(loaded.placement) == "layer1.1=se(r=16)"
    assert loaded.build().state_dict().keys() == model.state_dict().keys()


def test_a_classifier_of_another_width_stays_fresh():
    trained, model = Tiny(1000), Tiny(10)
    fresh = model.head.weight.clone()
    load_weights(model, Checkpoint("c", trained.state_dict()))
    assert torch.equal(model.head.weight, fresh)
    assert torch.equal(model.unit1.conv1.weight, trained.unit1.conv1.weight)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda state: state.pop("unit1.conv1.weight"), "it lacks 'unit1.conv1.weight'"),
        (lambda state: state.update(extra=torch.zeros(1)), "it has the unknown 'extra'"),
        (lambda state: state.update({"stem.weight": torch.zeros(8, 1, 3, 3)}), "another shape of 'stem.weight'"),
        (lambda state: state.update({"stem.bias": torch.zeros(9), "head.bias": torch.zeros(7)}), "'stem.bias' and 1"),
        (lambda state: state.clear(), "it lacks 'stem.weight' and"),
    ],
)
def test_weights_of_another_network_are_refused_and_nothing_is_loaded(change, says):
    model, state = Tiny(10), Tiny(10).state_dict()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    change(state)
    with pytest.raises(BackboneError) as caught:
        load_weights(model, Checkpoint("c", state))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def prefixed(prefix, state):
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def without_classifier(state):
    return {name: tensor for name, tensor in state.items() if not name.startswith("head.")}


MLP = {"head.0.weight": torch.ones(8, 8), "head.2.weight": torch.ones(128, 8)}


@pytest.mark.parametrize(
    ("bring", "left", "fresh"),
    [
        (lambda own: prefixed("model.", own) | {"criterion.center": torch.ones(1, 4)}, "criterion.center", False),
        (lambda own: own | {"criterion.pos_weight": torch.ones(4)}, "criterion.pos_weight", False),
        (lambda own: own | {"total_ops": torch.ones(1), "unit1.bn2.total_params": torch.ones(1)}, "total_ops", False),
        (lambda own: own | prefixed("ema.", {name: 2 * t for name, t in own.items()}), "ema.stem.weight", False),
        (lambda own: prefixed("ema.", {n: 2 * t for n, t in own.items()}) | prefixed("model.", own), "ema.", False),
        (lambda own: {"n_averaged": torch.ones(())} | prefixed("module.", own), "n_averaged", False),
        (lambda own: prefixed("teacher.backbone.", own) | {"teacher.head.mlp.weight": torch.ones(9, 9)}, "mlp", False),
        (lambda own: prefixed("student.", {n: 2 * t for n, t in own.items()}) | prefixed("teacher.", own), "s", False),
        (
            lambda own: prefixed("module.encoder_q.", without_classifier(own) | MLP)
            | prefixed("module.encoder_k.", without_classifier({n: 2 * t for n, t in own.items()}) | MLP)
            | {"module.queue": torch.ones(128, 9)},
            "module.encoder_k.stem.weight",
            True,
        ),
        (lambda own: without_classifier(own), "", True),
        (lambda own: prefixed("backbone.", without_classifier(own)) | {"fc.weight": torch.ones(3, 3)}, "fc.w", True),
        (lambda own: prefixed("d.body.", without_classifier(own)) | {"rpn.w": torch.ones(3, 3, 1, 1)}, "rpn", True),
        (lambda own: {f"module.{n.replace('unit1.', 'unit1._orig_mod.')}": t for n, t in own.items()}, "", False),
    ],
)  # fmt: skip
def test_a_checkpoint_with_more_or_less_is_loaded_and_that_is_told(bring, left, fresh):
    trained, model = Tiny(10), Tiny(10)
    head = model.head.weight.detach().clone()
    told = load_weights(model, Checkpoint("c", bring(trained.state_dict())))
    for name, weight in model.named_parameters():
        expected = head if fresh and name == "head.weight" else trained.get_parameter(name)
        assert torch.equal(weight, expected) or (fresh and name == "head.bias")
    assert len(told) == bool(left) + bool(fresh)
    assert not left or (told[0].startswith("left out of c") and left in told[0])
    assert not fresh or (told[-1].startswith("with fresh weights") and "head.weight, head.bias" in told[-1])


def test_what_stays_fresh_for_another_number_of_classes_is_told():
    assert load_weights(Tiny(10), Checkpoint("c", Tiny(1000).state_dict())) == (
        "with fresh weights, as c has none of that shape: head.weight, head.bias",
    )
    assert load_weights(Tiny(10), Checkpoint("c", Tiny(10).state_dict())) == ()


@pytest.mark.parametrize(
    "state",
    [
        {"model.weight": torch.zeros(3)},
        {"model.model.weight": torch.zeros(3), "model.other": torch.zeros(3)},
        {".": torch.zeros(3), "": torch.zeros(3)},
        {"a..b": torch.zeros(3)},
        {"head.weight": torch.zeros(10, 8), "head.bias": torch.zeros(10)},
    ],
)
def test_names_of_which_none_or_few_fit_are_refused_at_once(state):
    with pytest.raises(BackboneError, match="do not fit the network: it lacks 'stem.weight'"):
        load_weights(Tiny(10), Checkpoint("c", state))


@pytest.mark.parametrize("prefix", ["", "module.encoder_q."])
@pytest.mark.parametrize(
    ("given", "into"),
    [("resnet34", "resnet18"), ("vgg13", "vgg11"), ("resnet18", "resnet34"), ("resnet50", "resnet18")],
)
def test_weights_of_a_sister_are_refused_under_any_prefix(given, into, prefix):
    with torch.device("meta"):
        one, other = (torchvision.models.get_model(name) for name in (given, into))
    with pytest.raises(BackboneError, match="do not fit the network"):
        load_weights(other, Checkpoint("c", prefixed(prefix, one.state_dict())))


def test_a_network_without_its_last_stage_does_not_take_the_weights_of_the_whole():
    part = torchvision.models.resnet18()
    del part.layer4
    with pytest.raises(BackboneError, match="it has the unknown 'layer4.0.conv1.weight' and"):
        load_weights(part, Checkpoint("c", torchvision.models.resnet18().state_dict()))


@pytest.mark.parametrize("name", ["vgg11", "mobilenet_v3_small", "convnext_tiny", "densenet121"])
def test_a_torchvision_network_takes_a_checkpoint_without_its_classifier(name):
    with torch.device("meta"):
        model = torchvision.models.get_model(name)
    state = {key: tensor for key, tensor in model.state_dict().items() if not key.startswith("classifier")}
    (told,) = load_weights(model, Checkpoint("c", state))
    assert "classifier" in told


class Trap:
    """Writes a file when it is unpickled by a loader that runs what it reads."""

    def __reduce__(self):
        return (open, ("sprung", "w"))


@pytest.mark.parametrize(
    ("write", "says"),
    [
        (lambda path: torch.save({"state_dict": Tiny(10).state_dict(), "trap": Trap()}, path), "holds more than"),
        (lambda path: path.write_bytes(b"no checkpoint at all"), "damaged"),
        (lambda path: path.write_bytes(b""), "damaged"),
        (lambda path: torch.save(torch.zeros(3), path), "no checkpoint"),
        (lambda path: torch.save({"epoch": 3}, path), "no checkpoint"),
        (lambda path: path.mkdir(), "Is a directory"),
        (lambda path: None, "No such file"),
    ],
)
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_a_file_that_is_no_checkpoint_gets_one_line_and_runs_nothing(workplace, write, says, suffix):
    path = workplace / f"w.{suffix}"
    write(path)
    with pytest.raises(InputError) as caught:
        read_weights(path, "resnet18")
    assert suffix == "safetensors" or says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (workplace / "sprung").exists()


@pytest.fixture
def published(tmp_path, monkeypatch):
    """Publish weights for resnet18 with 7 classes on a local server, where torchvision then downloads them from."""
    network = torchvision.models.resnet18(num_classes=7)
    file = tmp_path / "new.pth"
    torch.save(network.state_dict(), file)
    digest = read_weights(file, "resnet18").name.partition("sha256 ")[2][:8]
    name = file.rename(tmp_path / f"resnet18-{digest}.pth").name
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))

    class Published(WeightsEnum):
        V1 = Weights(f"http://127.0.0.1:{server.server_port}/{name}", transforms=None, meta={})
        DEFAULT = V1

    monkeypatch.setattr(torchvision.models, "get_model_weights", lambda _: Published)
    yield network, tmp_path / name
    server.shutdown()
    server.server_close()


def test_default_weights_are_downloaded_by_torchvision(published):
    network, _ = published
    checkpoint = read_weights("DEFAULT", "resnet18")
    assert checkpoint.name == "Published.V1"
    architecture = Architecture(backbone="resnet18", num_classes=10, input_size=(3, 64, 64))
    model = architecture.build(weights="DEFAULT")
    assert torch.equal(model.layer3[0].conv1.weight, network.layer3[0].conv1.weight)
    assert model.fc.out_features == 10


def test_a_damaged_download_gets_one_line(published):
    published[1].write_bytes(b"something else")
    with pytest.raises(InputError, match=r"could not be had \(invalid hash value .*--weights FILE"):
        read_weights("DEFAULT", "resnet18")


def test_a_download_that_fails_gets_one_line(published):
    published[1].unlink()
    with pytest.raises(InputError, match=r"could not be had \(HTTP Error 404.*--weights FILE"):
        read_weights("DEFAULT", "resnet18")


def test_a_users_own_backbone_has_no_default_weights():
    with pytest.raises(InputError, match="'mine:tiny' has no DEFAULT weights"):
        read_weights("DEFAULT", "mine:tiny")
