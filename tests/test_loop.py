from pathlib import Path

import numpy as np
import pytest
import torch
from networks import Broken, Tiny
from PIL import Image
from torch import nn

from placesearch.errors import BackboneError, TrainingError
from placesearch.models.insertion import insert
from placesearch.placement import Placement
from placesearch.training import datasets, loop
from placesearch.training.datasets import Data, Split, load_data
from placesearch.training.loop import Protocol, Trainer, pick_device, pick_precision

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def digits():
    return load_data("digits", 32)


def protocol(**changes):
    return Protocol(**{"epochs": 1, "batch_size": 64, "learning_rate": 0.05, "seed": 0, "precision": "fp32", **changes})


def trained(digits, model, **changes):
    trainer = Trainer(digits, protocol(**changes), CPU)
    for _ in trainer.train(model):
        pass
    seen = trainer.validate(model)
    return seen.accuracy, seen.loss


def tiny(seed=0):
    torch.manual_seed(seed)
    return Tiny(10)


def test_training_learns_the_digits(digits):
    assert trained(digits, tiny(), epochs=4)[0] > 0.5  # chance is 0.1


def test_the_same_seed_gives_the_same_score_to_the_last_bit(digits):
    first = trained(digits, tiny())
    torch.randn(100)  # what ran before does not matter
    second = trained(digits, tiny())
    assert first == second
    assert trained(digits, tiny(), seed=1) != first


def test_every_candidate_sees_the_same_batches_and_augmentations(digits):
    class Watching(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.seen = inner, []

        def forward(self, x):
            if self.training:
                self.seen.append(x.clone())
            return self.inner(x)

    plain = Watching(tiny())
    other = Watching(insert(tiny(), Placement.parse("unit1.bn2=cbam(r=2,k=3)"), input_size=(3, 32, 32)))
    trained(digits, plain)
    trained(digits, other)
    assert len(plain.seen) == 1079 // 64
    assert all(torch.equal(a, b) for a, b in zip(plain.seen, other.seen, strict=True))


def test_an_epoch_shows_every_image_at_most_once(digits):
    images = torch.arange(200, dtype=torch.uint8)[:, None, None, None].expand(-1, 32, 32, 3).contiguous()
    split = Split(images, torch.arange(200) % 2)
    trainer = Trainer(Data({"train": split, "validation": split}, ("a", "b"), False), protocol(epochs=2), CPU)
    shown = []

    class Watching(Tiny):
        def forward(self, x):
            pixels = (x[:, 0, 0, 0] / trainer.scale[0] + trainer.mean[0]) * 255
            shown.append(pixels.round().int())
            return super().forward(x)

    list(trainer.train(Watching(2)))
    for epoch in (torch.cat(shown[:3]), torch.cat(shown[3:])):
        assert len(epoch) == len(epoch.unique()) == 200 // 64 * 64
    assert not torch.equal(torch.cat(shown[:3]), torch.cat(shown[3:]))


def ramp(flip):
    """A data set in which each pixel says where it came from."""
    pixels = (torch.arange(32)[:, None] * 5 + torch.arange(32)[None, :]).to(torch.uint8)
    images = pixels[None, :, :, None].repeat(256, 1, 1, 3)
    split = Split(images, torch.arange(256) % 2)
    return Data({"train": split, "validation": split, "test": split}, ("a", "b"), flip)


@pytest.mark.parametrize("flip", [False, True])
def test_augmentation_shifts_by_two_pixels_and_mirrors_only_where_classes_allow(flip):
    trainer = Trainer(ramp(flip), protocol(), CPU)
    _, shifts, mirrored = trainer._draws(torch.Generator().manual_seed(0))
    images = trainer._augmented(trainer.train_split.images, shifts, mirrored)
    bytes_ = (images / trainer.scale[:, None, None] + trainer.mean[:, None, None]) * 255
    middle = bytes_[:, 0, 4:-4, 4:-4].round()
    across = (middle[:, :, 1:] - middle[:, :, :-1]).flatten(1)
    assert ((across == 1).all(1) | (across == -1).all(1)).all()
    mirrored = (across == -1).all(1).float().mean()
    assert (0.35 < mirrored < 0.65) if flip else mirrored == 0
    straight = middle[(across == 1).all(1)]
    shifts = straight[:, 0, 0] - (4 * 5 + 4)
    assert set(shifts.int().tolist()) == {5 * dy + dx for dy in range(-2, 3) for dx in range(-2, 3)}


@pytest.mark.parametrize("ahead", [1, 2, 50])
def test_images_from_files_give_the_same_scores_as_images_in_memory(tmp_path, monkeypatch, ahead):
    monkeypatch.setattr(loop, "AHEAD", ahead)
    random = np.random.default_rng(0)
    for name, level in (("dark", 60), ("light", 200)):
        (tmp_path / name).mkdir()
        for index in range(60):
            pixels = random.normal(level, 50, (32, 32, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{index}.png")
    scores = []
    for share in (1.0, 0.0):
        monkeypatch.setattr(datasets, "MEMORY_SHARE", share)
        torch.manual_seed(0)
        scores.append(trained(load_data(str(tmp_path), 32), Tiny(2), epochs=3, batch_size=16))
    assert scores[0] == scores[1]
    assert scores[0][0] > 0.7


def test_from_files_too_a_branch_goes_on_where_it_was_stopped(digits, tmp_path):
    """The batches before the branch point are not even read."""
    read = []

    class Counting:
        labels, size = digits.splits["train"].labels, (3, 32, 32)

        def on(self, _):
            return self

        def take(self, indices):
            read.append(len(indices))
            return digits.splits["train"].take(indices)

    trainer = Trainer(
        Data({**digits.splits, "train": Counting()}, digits.classes, digits.flip), protocol(epochs=3), CPU
    )
    whole = trainer.train_branch(tiny())
    del read[:]
    list(trainer.train(tiny(), whole))
    assert read == [64] * (trainer.steps - trainer.branch_step)


def test_validation_is_over_every_image_without_augmentation(digits):
    model = tiny().eval()
    trainer = Trainer(digits, protocol(), CPU)
    seen = trainer.validate(model)
    split = digits.splits["validation"]
    with torch.no_grad():
        logits = model(trainer._normalised(split.images))
    assert torch.equal(seen.correct, logits.argmax(1) == split.labels)
    assert seen.accuracy == pytest.approx(seen.correct.sum().item() / 359)
    assert seen.loss == pytest.approx(nn.functional.cross_entropy(logits, split.labels).item(), rel=1e-5)


def test_the_test_split_is_never_touched(digits):
    class Untouchable(dict):
        def __getitem__(self, name):
            assert name != "test"
            return super().__getitem__(name)

    guarded = Data(Untouchable(digits.splits), digits.classes, digits.flip)
    trained(guarded, tiny())


def test_validation_leaves_a_training_as_it_was(digits):
    def dropping():
        model = tiny()
        model.head = nn.Sequential(nn.Dropout(0.5), model.head)
        return model

    straight = trained(digits, dropping())
    model, trainer = dropping(), Trainer(digits, protocol(), CPU)
    for step in trainer.train(model):
        assert model.training
        if step % 5 == 0:
            trainer.validate(model)
    seen = trainer.validate(model.eval())
    assert not model.training
    assert (seen.accuracy, seen.loss) == straight


def test_a_loss_that_is_not_finite_is_an_error_that_says_when(digits):
    with pytest.raises(TrainingError, match="epoch 1 of 3"):
        trained(digits, Broken(10), epochs=3)


def test_a_validation_loss_that_is_not_finite_is_an_error(digits):
    model = tiny()
    model.head.bias.data[0] = float("nan")
    with pytest.raises(TrainingError, match="validation loss is nan"):
        Trainer(digits, protocol(), CPU).validate(model)


def test_of_several_outputs_the_first_is_the_logits(digits):
    class WithAuxiliary(Tiny):
        def forward(self, x):
            logits = super().forward(x)
            return (logits, logits * float("nan")) if self.training else logits

    torch.manual_seed(0)
    assert trained(digits, WithAuxiliary(10)) == trained(digits, tiny())


@pytest.mark.parametrize("wrap", [lambda y: {"features": y[:, :4], "logits": y}, lambda y: y[:, :, None, None]])
def test_logits_that_come_in_another_form_are_trained_alike(digits, wrap):
    class Wrapped(Tiny):
        def forward(self, x):
            return wrap(super().forward(x))

    torch.manual_seed(0)
    assert trained(digits, Wrapped(10)) == trained(digits, tiny())


def test_a_network_of_another_width_than_the_data_is_refused(digits):
    with pytest.raises(BackboneError, match="puts out 7 values for 10 classes"):
        trained(digits, Tiny(7))


def test_images_have_the_dtype_of_the_network(digits):
    expected, _ = trained(digits, tiny())
    assert trained(digits, tiny().double())[0] == pytest.approx(expected, abs=0.02)
    assert trained(digits, tiny().bfloat16())[0] == pytest.approx(expected, abs=0.15)  # 8 bits of mantissa


def test_a_train_split_smaller_than_a_batch_is_one_batch(digits):
    assert Trainer(digits, protocol(batch_size=5000, epochs=3), CPU).steps == 3


def test_devices_are_checked():
    assert pick_device("cpu") == CPU
    with pytest.raises(ValueError, match="no device 'quantum'"):
        pick_device("quantum")


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="needs a list of the processor's instructions")
def test_the_precision_follows_the_instructions_that_a_processor_has():
    has = "avx512_bf16" in Path("/proc/cpuinfo").read_text()
    assert pick_precision(CPU) == ("bf16" if has else "fp32")


def test_bf16_learns_as_fp32_does(digits):
    scores = [trained(digits, tiny(), epochs=4, precision=precision) for precision in ("fp32", "bf16")]
    assert scores[0] != scores[1]
    assert scores[1][1] == pytest.approx(scores[0][1], rel=0.05)


def test_blocks_can_have_a_learning_rate_of_their_own(digits):
    """With a rate of zero a block keeps its weights, and the network is trained all the same."""
    placement = Placement.parse("unit1.bn2=se(r=2)")
    for rate in (0.0, 1.0):
        model = insert(tiny(), placement, input_size=(3, 32, 32), seed=0)
        before = {name: weight.clone() for name, weight in model.named_parameters()}
        blocks = {name for name in before if name.startswith("unit1.bn2.attention.")}
        assert len(blocks) == 4
        list(Trainer(digits, protocol(block_rate=rate), CPU).train(model, blocks=blocks))
        kept = {name for name, weight in model.named_parameters() if torch.equal(weight, before[name])}
        assert kept == (blocks if rate == 0 else set())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_same_score_twice(digits):
    device = pick_device("cuda")
    scores = []
    for _ in range(2):
        trainer = Trainer(digits, protocol(precision=pick_precision(device), epochs=4), device)
        model = tiny()
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
            for _ in trainer.train(model):
                pass
            scores.append(trainer.validate(model))
    assert scores[0].loss == scores[1].loss
    assert torch.equal(scores[0].correct, scores[1].correct)
    assert scores[0].accuracy > 0.5


def test_a_trainer_under_another_protocol_shares_the_data_and_trains_as_a_new_one(digits):
    first = Trainer(digits, protocol(), CPU)
    other = first.under(protocol(seed=3, epochs=2, batch_size=128))
    assert other.train_split is first.train_split  # a study of many seeds does not hold the data many times
    assert (other.steps, first.steps, first.protocol.seed) == (2 * (1078 // 128), 1078 // 64, 0)
    model = tiny()
    for _ in other.train(model):
        pass
    seen = other.validate(model)
    assert (seen.accuracy, seen.loss) == trained(digits, tiny(), seed=3, epochs=2, batch_size=128)
