"""Losses and gradients of given outputs, computed as in training, and finite differences."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from onnxqat.data.arrays import Header
from onnxqat.train.engine import StepSession
from onnxqat.train.form import TrainingForm
from onnxqat.train.losses import LABELS, Loss, array_of, teacher_input

Array = NDArray[Any]


class Stored:
    """Data arrays, by name."""

    def __init__(self, arrays: Mapping[str, Array]) -> None:
        self.arrays = arrays
        self.array_names = tuple(arrays)

    def array(self, name: str) -> Header:
        return Header(self.arrays[name].shape[1:], self.arrays[name].dtype)


def form_of(
    outputs: Mapping[str, Array], *, opset: int = 17, last: str = "Identity", **attributes: Any
) -> TrainingForm:
    """Return a training form that adds zero weights to ``outputs``, followed by ``last``."""
    value = helper.make_tensor_value_info
    inputs, nodes, made = [], [], []
    weights = {f"w/{name}": np.zeros_like(array) for name, array in outputs.items()}
    for name, array in outputs.items():
        inputs.append(value(f"x/{name}", TensorProto.FLOAT, ["N", *array.shape[1:]]))
        nodes.append(helper.make_node("Add", [f"x/{name}", f"w/{name}"], [f"h/{name}"]))
        nodes.append(helper.make_node(last, [f"h/{name}"], [name], **attributes))
        made.append(value(name, TensorProto.FLOAT, ["N", *array.shape[1:]]))
    inputs += [value(name, TensorProto.FLOAT, array.shape) for name, array in weights.items()]
    opsets = [helper.make_opsetid("", opset)]
    graph = helper.make_graph(nodes, "form", inputs, made)
    proto = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    onnx.checker.check_model(proto, full_check=True)
    return TrainingForm(
        proto=proto,
        weights=weights,
        scales={},
        zero_points={},
        learned=frozenset(weights),
        observed={},
    )


def loss_and_gradients(
    loss: Loss,
    outputs: Mapping[str, Array],
    *,
    teacher: Mapping[str, Array] | None = None,
    arrays: Mapping[str, Array] | None = None,
    labels: Array | None = None,
    opset: int = 17,
    last: str = "Identity",
    **attributes: Any,
) -> tuple[float, dict[str, Array]]:
    """Return the loss of float32 ``outputs``, and its gradient for each output that it reads."""
    stored = Stored(arrays or {})
    batch = len(next(iter(outputs.values())))
    form = form_of(outputs, opset=opset, last=last, **attributes)
    session = StepSession(form, loss, batch_size=batch, threads=1, arrays=stored)
    feeds = {f"x/{name}": array for name, array in outputs.items()}
    feeds |= {teacher_input(name): array for name, array in (teacher or {}).items()}
    feeds |= {} if labels is None else {LABELS: labels}
    for name in session.inputs:
        if source := array_of(name):
            feeds[name] = stored.arrays[source[0]].astype(source[1])
    value = session.run(feeds)
    found = {name.removeprefix("w/"): view for name, view in session.gradients.views.items()}
    return value, found


def differences(
    function: Callable[[dict[str, Array]], float], outputs: Mapping[str, Array], step: float = 1e-6
) -> dict[str, Array]:
    """Return central differences of a float64 function of all outputs."""
    doubles = {name: array.astype(np.float64) for name, array in outputs.items()}
    slopes = {name: np.zeros_like(array) for name, array in doubles.items()}
    for name, array in doubles.items():
        for index in np.ndindex(*array.shape):
            ends = []
            for sign in (1, -1):
                moved = array.copy()
                moved[index] += sign * step
                ends.append(function(doubles | {name: moved}))
            slopes[name][index] = (ends[0] - ends[1]) / (2 * step)
    return slopes


def check_loss(
    loss: Loss,
    function: Callable[[dict[str, Array]], float],
    outputs: Mapping[str, Array],
    **given: Any,
) -> None:
    """Compare the value and the gradients of a loss with a float64 function of the outputs."""
    value, found = loss_and_gradients(loss, outputs, **given)
    expected = function({name: array.astype(np.float64) for name, array in outputs.items()})
    assert abs(value - expected) <= 1e-5 * max(abs(expected), 1e-2), (value, expected)
    slopes = differences(function, outputs)
    for name in outputs:
        size = np.abs(slopes[name]).max()
        if size == 0:
            assert name not in found or not found[name].any()
            continue
        np.testing.assert_allclose(found[name], slopes[name], rtol=0, atol=1e-4 * size)
