import pytest
import torch
from networks import tiny

from placesearch.errors import InputError
from placesearch.exporting.checking import check_program, difference, images

SIZE = (3, 32, 32)


def test_images_are_always_the_same_and_those_of_two_batches_differ():
    assert torch.equal(images(2, SIZE), images(2, SIZE))
    assert not torch.equal(images(1, SIZE), images(2, SIZE)[:1])


def test_images_that_would_fill_a_memory_are_refused():
    assert images(1, (3, 64, 64)).shape == (1, 3, 64, 64)
    with pytest.raises(InputError, match="3x8192x8192 is too large"):
        images(1, (3, 8192, 8192))


def test_the_difference_is_relative_to_the_largest_number():
    assert difference(torch.tensor([2.0, -8.0]), torch.tensor([3.0, -8.0])) == 1 / 8
    assert difference(torch.zeros(2), torch.zeros(2)) == 0.0
    assert difference(torch.zeros(2), torch.ones(2)) == float("inf")
    assert difference(torch.zeros(2), torch.zeros(3)) == float("inf")


def test_a_program_that_computes_the_same_passes_with_its_difference():
    model = tiny(num_classes=10).eval()
    assert check_program(model, model, SIZE, "it") == 0.0
    assert 1e-6 < check_program(model, lambda x: model(x) * (1 + 1e-5), SIZE, "it") < 1e-4


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda logits: logits * (1 + 2e-4), "differs from the network by 2.0e-04 of the largest logit on 1 images"),
        (lambda logits: logits * float("nan"), "differs from the network by nan"),
        (lambda logits: logits[:1], "inf of the largest logit on 3 images"),
        (lambda logits: logits.reshape(1, 10), "does not run on 3 images: shape"),
    ],
)
def test_a_program_that_computes_something_else_is_refused(spoil, says):
    model = tiny(num_classes=10).eval()
    with pytest.raises(InputError) as caught:
        check_program(model, lambda x: spoil(model(x)), SIZE, "it")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
