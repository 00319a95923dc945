"""A misspelt choice is refused at the door, and the nearest right one named."""

from __future__ import annotations

import pytest

from onnxqat.calibration import calibrate
from onnxqat.data import Preprocessing
from onnxqat.deploy import deployed_model, write_deployment
from onnxqat.errors import OnnxQatError
from onnxqat.evaluation import evaluate
from onnxqat.quantized import insert_pairs
from tests.networks import convnet, quantized

MISSPELT = {
    "mode": (
        lambda q: evaluate(q, [], mode="Integer"),
        "mode 'Integer' is unknown. The nearest: 'integer'",
    ),
    "snapped": (lambda q: deployed_model(q, weights="snaped"), "The nearest: 'snapped'"),
    "written": (lambda q: write_deployment(q, "x", weights="tune"), "The nearest: 'tuned'"),
    "table": (lambda q: write_deployment(q, "x", table="sofgo"), "The nearest: 'sophgo'"),
    "state": (
        lambda q: insert_pairs(q.floats, q.plan, q.params, state="calibrate"),
        "The nearest: 'calibrated'",
    ),
    "observer": (lambda q: calibrate(q, [], observer="mean"), "There are: 'mse'"),
    "pixels": (lambda _: Preprocessing(pixel_format="RGB"), "There are: 'rgb', 'bgr', 'gray'"),
    "layout": (lambda _: Preprocessing(layout="nhcw"), "The nearest: 'nhwc', 'nchw'"),
}


@pytest.fixture(scope="module")
def model():
    return quantized(convnet())[1]


@pytest.mark.parametrize("name", MISSPELT)
def test_a_misspelt_choice_is_refused(name, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call, message = MISSPELT[name]
    with pytest.raises(OnnxQatError) as raised:
        call(model)

    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.iterdir())
