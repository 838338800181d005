import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from filelock import FileLock
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import placesearch as ps
from placesearch import earnest
from placesearch.errors import InputError, TrainingError
from placesearch.records import Epoch, StepEnded, Told
from placesearch.training import checkpoint
from placesearch.training.checkpoint import load_snapshot
from placesearch.training.datasets import load_data
from placesearch.training.loop import Protocol, Trainer

SE = ps.Placement.parse("unit1.bn2=se(r=2)")
STEPS = 1079 // 256


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def architecture(name="tiny", placement=SE, classes=10, side=32):
    return ps.Architecture(
        backbone=f"mine:{name}", num_classes=classes, input_size=(3, side, side), placement=placement
    )


def train(output="out", name="tiny", placement=SE, **changes):
    options = {"data": "digits", "epochs": 4, "batch_size": 256, "output": output, **changes}
    return ps.train(architecture(name, placement), **options)


def interrupted(*arguments, **options):
    with pytest.raises(KeyboardInterrupt):
        train(*arguments, **options)


def interrupt(*_):
    raise KeyboardInterrupt


def interrupt_before_the_end(monkeypatch, *arguments, **options):
    with monkeypatch.context() as patch:
        patch.setattr(earnest._Training, "_finish", interrupt)
        interrupted(*arguments, **options)


def in_epoch_3(event):
    if isinstance(event, StepEnded) and event.step == 2 * STEPS + 2:
        raise KeyboardInterrupt


def course(log):
    return [(one.epoch, one.train_loss, one.val_accuracy, one.val_loss, one.learning_rate) for one in log]


def test_a_training_leaves_weights_log_curve_and_its_test_accuracy(workplace):
    told = []
    trained = train(watch=told.append)
    assert {path.name for path in Path("out").iterdir()} == {
        "best.safetensors",
        "last.safetensors",
        "architecture.yaml",
        "log.csv",
        "curve.svg",
        "result.yaml",
        "run.lock",
    }
    with Path("out/log.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["epoch", "train_loss", "val_accuracy", "val_loss", "learning_rate", "seconds"]
    assert [float(row["val_loss"]) for row in rows] == [one.val_loss for one in trained.log]
    result = yaml.safe_load(Path("out/result.yaml").read_text())
    assert result["test_accuracy"] == trained.test_accuracy
    assert result["settings"]["learning_rate"] == pytest.approx(0.02 * 32**0.5)
    assert trained.fresh
    assert trained.test_images == 359
    assert [one.step for one in told if isinstance(one, StepEnded)] == list(range(1, 4 * STEPS + 1))
    assert tuple(one for one in told if isinstance(one, Epoch)) == trained.log
    assert any("1,079 train, 359 validation, 359 test images" in one.line for one in told if isinstance(one, Told))


def test_an_architecture_with_its_weights_is_what_was_measured(workplace):
    trained = train()
    model = ps.Architecture.load("out/architecture.yaml", ["mine:tiny"]).build(weights="out/best.safetensors")
    result = yaml.safe_load(Path("out/result.yaml").read_text())
    protocol = Protocol(1, 256, 0.1, 0, result["conditions"]["precision"])
    trainer = Trainer(load_data("digits", 32), protocol, torch.device("cpu"))
    assert trainer.mean.tolist() == pytest.approx(result["mean"])
    assert (1 / trainer.scale).tolist() == pytest.approx(result["std"])
    model = model.to(memory_format=torch.channels_last)
    assert trainer.validate(model).accuracy == trained.best.val_accuracy
    assert trainer.validate(model, "test").accuracy == trained.test_accuracy
    weights = trained.build().state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    assert max(one.val_accuracy for one in trained.log) == trained.best.val_accuracy


@pytest.mark.parametrize("ema", [pytest.param(None, marks=pytest.mark.slow), 0.9])
@pytest.mark.parametrize("when", ["in an epoch", "before its files are written", "before the end"])
def test_an_interrupted_training_goes_on_to_the_same_numbers_to_the_last_bit(workplace, monkeypatch, ema, when):
    """With dropout, so that the state of the random numbers counts, too."""
    whole = train("whole", "dropping", ema=ema)

    writing = earnest._Training._write

    def write(self, judged):
        if len(self._log) == 3:
            raise KeyboardInterrupt
        writing(self, judged)

    if when == "in an epoch":
        interrupted("cut", "dropping", ema=ema, watch=in_epoch_3)
    elif when == "before the end":
        interrupt_before_the_end(monkeypatch, "cut", "dropping", ema=ema)
    else:
        with monkeypatch.context() as patch:
            patch.setattr(earnest._Training, "_write", write)
            interrupted("cut", "dropping", ema=ema)
    torch.randn(7)  # what the process did before does not matter
    told = []
    cut = train("cut", "dropping", ema=ema, watch=told.append)
    done = {"in an epoch": 2, "before its files are written": 3, "before the end": 4}[when]
    assert [one.epoch for one in told if isinstance(one, Epoch)] == list(range(done + 1, 5))
    assert course(cut.log) == course(whole.log)
    assert (cut.test_accuracy, cut.test_loss) == (whole.test_accuracy, whole.test_loss)
    for name in ("best", "last"):
        was, now = (load_file(f"{folder}/{name}.safetensors") for folder in ("whole", "cut"))
        assert was.keys() == now.keys()
        assert all(torch.equal(was[key], now[key]) for key in was)


def test_the_test_split_is_looked_at_once_at_the_end(workplace, monkeypatch):
    looked, validate = [], Trainer.validate

    def watched(self, model, name="validation"):
        looked.append(name)
        return validate(self, model, name)

    monkeypatch.setattr(Trainer, "validate", watched)
    train(epochs=3)
    assert looked == ["validation"] * 3 + ["test"]
    assert not train(epochs=3).fresh
    assert len(looked) == 4  # it is done already: nothing is measured again


def test_other_settings_in_the_same_folder_are_refused_with_the_difference(workplace, monkeypatch):
    interrupt_before_the_end(monkeypatch, epochs=2)
    with pytest.raises(InputError, match="other settings, epochs: 2 then, 3 now; give another --output"):
        train(epochs=3)
    train(epochs=2)
    with pytest.raises(InputError, match="other settings, placement: unit1.bn2=se"):
        train(epochs=2, placement=ps.Placement())
    with pytest.raises(InputError, match="seed: 0 then, 1 now"):
        train(epochs=2, seed=1)


def test_damaged_files_of_a_training_are_refused_in_one_line(workplace, monkeypatch):
    interrupt_before_the_end(monkeypatch, epochs=2)
    kept = Path("out/checkpoint.safetensors").read_bytes()
    Path("out/checkpoint.safetensors").write_bytes(kept[:-100])
    with pytest.raises(InputError, match="checkpoint.safetensors is damaged"):
        train(epochs=2)
    save_file({"weights.x": torch.zeros(1)}, "out/checkpoint.safetensors", {"told": "[]", "crc32": "1"})
    with pytest.raises(InputError, match="checkpoint.safetensors is damaged"):
        train(epochs=2)
    Path("out/checkpoint.safetensors").write_bytes(kept)
    train(epochs=2)
    for text in ("[]", "settings: 1", "{unclosed", "settings: {}\nimages: {}\nconditions: {}\nlog: [{epoch: 1}]\n"):
        Path("out/result.yaml").write_text(text)
        with pytest.raises(InputError, match="result.yaml is damaged"):
            train(epochs=2)


def test_a_full_disk_ends_a_training_in_one_line_and_it_goes_on_later(workplace, monkeypatch):
    writing = checkpoint.safetensors.torch.save_file

    def full(tensors, path, told):
        if "told" in told and len(json.loads(told["told"])["log"]) == 3:
            raise checkpoint.SafetensorError("No space left on device")
        writing(tensors, path, told)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.safetensors.torch, "save_file", full)
        with pytest.raises(
            InputError, match="cannot write to .*; every finished epoch is kept, the same command goes on"
        ):
            train("cut")
    assert course(train("cut").log) == course(train("whole").log)


def test_a_checkpoint_of_another_network_or_kind_of_device_is_told_from_ones_own(workplace, monkeypatch):
    interrupt_before_the_end(monkeypatch, epochs=2)
    path = Path("out/checkpoint.safetensors")
    mine = load_snapshot(path)
    told = {**mine.told, "log": mine.told["log"][:1]}
    replace(mine, told=told, momentum={"head.weight": torch.zeros(3)}).save(path)
    with pytest.raises(InputError, match="that of another network"):
        train(epochs=2)
    replace(mine, told=told, weights={"head.weight": torch.zeros(3)}).save(path)
    with pytest.raises(InputError, match="that of another network"):
        train(epochs=2)
    replace(mine, told={**told, "conditions": {"precision": "fp8", "threads": 1}}).save(path)
    with pytest.raises(InputError, match="its precision or number of threads is none"):
        train(epochs=2)
    replace(mine, told=told, dice={"state": torch.zeros(16, dtype=torch.uint8)}).save(path)  # as a GPU has it
    assert train(epochs=2).fresh


def test_best_weights_that_were_lost_are_not_passed_over(workplace, monkeypatch):
    interrupted(epochs=3, watch=in_epoch_3)
    Path("out/best.safetensors").unlink()
    monkeypatch.setattr(earnest, "best_of", lambda log: log[0])
    with pytest.raises(InputError, match="best.safetensors is not that of epoch 1, the best"):
        train(epochs=3)


def test_a_folder_in_use_is_refused(workplace):
    Path("out").mkdir()
    with FileLock("out/run.lock"), pytest.raises(InputError, match="out/ is in use by another training"):
        train()
    Path("file").write_text("in the way")
    with pytest.raises(InputError, match="cannot write to file"):
        train("file")


def test_a_loss_that_is_not_finite_ends_the_training(workplace):
    with pytest.raises(TrainingError, match="epoch 1 of 4"):
        train(name="broken")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"epochs": 0}, "epochs 0 is not allowed"),
        ({"batch_size": 1}, "batch size 1 is not allowed"),
        ({"learning_rate": float("nan")}, "learning rate nan is not allowed"),
        ({"learning_rate": -1.0}, "learning rate -1.0 is not allowed"),
        ({"ema": 1.0}, "ema 1.0 is not allowed"),
        ({"seed": -1}, "seed -1 is not allowed"),
        ({"data": "digitz"}, "did you mean 'digits'"),
        ({"device": "quantum"}, "no device 'quantum'"),
        ({"weights": "nothing.pt"}, "cannot read weights nothing.pt"),
    ],
)
def test_what_cannot_be_used_is_refused_before_anything_is_written(workplace, changes, says):
    with pytest.raises(InputError, match=says):
        train(**changes)
    assert not Path("out").exists()


def test_input_need_not_be_square(workplace):
    wide = architecture().model_copy(update={"input_size": (3, 32, 64)})
    ps.train(wide, "digits", epochs=1, batch_size=256, output="out")
    assert ps.Architecture.load("out/architecture.yaml", allow=["mine:tiny"]).input_size == (3, 32, 64)


def test_input_that_no_data_set_has_is_refused(workplace):
    two = architecture().model_copy(update={"input_size": (2, 32, 32)})
    with pytest.raises(InputError, match="images have 1 channel or 3, not 2"):
        ps.train(two, "digits", output="out")


def test_the_classifier_follows_the_data(workplace):
    told = []
    trained = ps.train(architecture(classes=7), "digits", epochs=1, batch_size=256, output="out", watch=told.append)
    assert "the file says 7 classes, digits has 10: so has the classifier" in [getattr(o, "line", "") for o in told]
    assert trained.architecture.num_classes == 10
    assert load_file("out/best.safetensors")["head.weight"].shape == (10, 8)


@pytest.mark.slow
def test_an_average_that_keeps_nothing_is_the_network_itself(workplace):
    plain, averaged = train("plain"), train("averaged", ema=0.0)
    assert course(plain.log) == course(averaged.log)
    assert course(train("slow", ema=0.9).log) != course(plain.log)


def starting_weights(monkeypatch, **changes):
    """Return the weights that a training begins with, as outputs for some images."""
    began = {}

    def taken(self, model, *_, **__):
        model.eval()
        with torch.no_grad():
            began["outputs"] = model(torch.ones(1, 3, 32, 32) * torch.linspace(0, 1, 32))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "optimizer", taken)
        interrupted(**changes)
    return began["outputs"]


def test_blocks_start_as_the_identity_on_plain_weights_and_as_trained_on_their_own(workplace, monkeypatch):
    train("plain", placement=ps.Placement())
    plain = starting_weights(monkeypatch, placement=ps.Placement(), weights="plain/best.safetensors", output="a")
    same = starting_weights(monkeypatch, weights="plain/best.safetensors", output="b")
    assert torch.equal(plain, same)
    trained = train("with", weights="plain/best.safetensors")
    assert yaml.safe_load(Path("with/result.yaml").read_text())["settings"]["learning_rate"] < 0.012
    again = starting_weights(monkeypatch, weights="with/best.safetensors", output="c")
    model = trained.build().eval()
    with torch.no_grad():
        outputs = model(torch.ones(1, 3, 32, 32) * torch.linspace(0, 1, 32))
    assert torch.equal(again, outputs)


def test_what_a_gate_is_multiplied_by_is_in_the_architecture_file(workplace):
    """A block after an activation that started as the identity cannot be folded; its factor is no weight."""
    trained = ps.train(
        architecture(placement=ps.Placement.parse("unit1=se(r=2)")),
        "digits",
        epochs=1,
        batch_size=256,
        weights=plain_weights(),
        output="out",
    )
    assert trained.architecture.factors == {"unit1": 2.0}
    with safe_open("out/best.safetensors", "pt") as file:
        assert file.metadata()["epoch"] == "1"


def plain_weights():
    model = architecture(placement=ps.Placement()).build(seed=0)
    save_file(model.state_dict(), "plain.safetensors")
    return "plain.safetensors"


def test_files_go_to_a_folder_named_after_study_and_file():
    assert earnest._default_folder("x/mine.yaml") == Path("reports/mine-train")
    assert earnest._default_folder("reports/s/architectures/best.yaml") == Path("reports/s-best-train")
    assert earnest._default_folder(architecture()) == Path("reports/mine-tiny-train")
