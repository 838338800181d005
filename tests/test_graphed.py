import pytest
import torch
from networks import Tiny
from test_loop import digits, protocol, tiny

from placesearch.training import graphed
from placesearch.training.loop import Trainer, pick_device

__all__ = ["digits"]  # a fixture
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_on_a_gpu_a_recorded_step_does_what_the_steps_do_one_by_one(digits, monkeypatch):
    device, scores = pick_device("cuda"), []
    for warm_up in (graphed.WARM_UP, 10**9):
        monkeypatch.setattr(graphed, "WARM_UP", warm_up)
        trainer = Trainer(digits, protocol(epochs=4), device)
        model = tiny()
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
            list(trainer.train(model))
        scores.append(trainer.validate(model))
    assert scores[0].loss == pytest.approx(scores[1].loss, rel=1e-3)


def test_on_a_gpu_a_step_that_cannot_be_recorded_goes_on_eagerly(digits):
    class Asking(Tiny):
        def forward(self, x):
            return super().forward(x if x.mean().item() < 1e9 else -x)

    torch.manual_seed(0)
    trainer, model = Trainer(digits, protocol(epochs=4), pick_device("cuda")), Asking(10)
    assert list(trainer.train(model)) == list(range(1, trainer.steps + 1))
    assert trainer.validate(model).accuracy > 0.5
