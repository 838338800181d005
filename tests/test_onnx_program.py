import sys

import pytest
import torch
from test_torch_program import SIZE, network

from placesearch.errors import InputError
from placesearch.exporting.onnx_program import onnx_program

WITHOUT = "needs the extra: pip install -e '.[onnx]'"


@pytest.fixture(scope="module")
def written():
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name, reason=WITHOUT)
    return network(), *onnx_program(network(), SIZE)


def test_the_program_computes_the_same_for_any_number_of_images(written):
    import onnxruntime

    model, content, differs = written
    assert differs <= 1e-5
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    assert [(node.name, node.shape) for node in session.get_inputs()] == [("image", ["batch", 3, 32, 32])]
    assert [(node.name, node.shape) for node in session.get_outputs()] == [("logits", ["batch", 10])]
    for number in (1, 2, 5):
        x = torch.randn(number, *SIZE)
        (logits,) = session.run(["logits"], {"image": x.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(logits), model(x))


def test_the_program_is_legal_and_tells_no_paths_of_the_machine_that_made_it(written):
    import onnx
    from networks import Tiny

    _, content, _ = written
    onnx.checker.check_model(onnx.load_from_string(content), full_check=True)
    assert Tiny.forward.__code__.co_filename.encode() not in content


@pytest.mark.parametrize("missing", ["onnx", "onnxscript", "onnxruntime"])
def test_without_the_extra_one_line_says_how_to_get_it(missing, monkeypatch):
    for name in ("onnx", "onnxscript"):
        monkeypatch.setitem(sys.modules, name, sys)  # there, whether or not it is installed
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(InputError, match=rf"ONNX needs {missing}: pip install 'placesearch\[onnx\]'"):
        onnx_program(network(), SIZE)


def test_weights_that_do_not_fit_into_one_file_are_refused(monkeypatch, written):
    monkeypatch.setattr("placesearch.exporting.onnx_program.MOST_BYTES", 1000)
    with pytest.raises(InputError, match="GiB of weights, an ONNX file holds 2; export pt2"):
        onnx_program(network(), SIZE)
