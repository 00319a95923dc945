"""Resize, Pad and CumSum: linear maps, whose gradient is exact up to float32 rounding."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper

from onnxqat.train.lowering.gradient import Refusal
from tests.derivatives import check_node, gradients, one_node
from tests.oracles import run_ort


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def check_linear(op_type, x, constants, **node):
    """Compare the gradient with the adjoint: <g, A v> = <dx, v> for every unit vector v."""
    model = one_node(op_type, {"x": x}, constants, **node)
    y = run_ort(model, {"x": x})[0]
    upstream = normal(*y.shape, seed=1)
    found = gradients(model, {"x": x}, ["x"], [upstream])["x"]
    zero = run_ort(model, {"x": np.zeros_like(x)})[0]
    expected = np.zeros(x.shape)
    for i in range(x.size):
        unit = np.zeros_like(x)
        unit.flat[i] = 1
        column = run_ort(model, {"x": unit})[0].astype(np.float64) - zero
        expected.flat[i] = (upstream * column).sum()

    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * np.abs(upstream).max())
    check_node(op_type, {"x": x}, constants, oracle=lambda f: ort_oracle(model, f), step=0.5,
               tolerance=1e-3, **node)  # fmt: skip


def ort_oracle(model, feeds):
    return run_ort(model, {"x": feeds["x"].astype(np.float32)})


MODES = ["half_pixel", "pytorch_half_pixel", "asymmetric", "align_corners"]
ROUNDINGS = ["round_prefer_floor", "round_prefer_ceil", "floor", "ceil"]


@pytest.mark.parametrize("coordinates", MODES)
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("size", [(6, 10), (4, 3), (1, 7)], ids=str)
def test_nearest_resize(coordinates, rounding, size):
    constants = {"roi": None, "scales": None, "sizes": np.array([1, 2, *size], np.int64)}
    check_linear(
        "Resize",
        normal(1, 2, 3, 5),
        constants,
        mode="nearest",
        coordinate_transformation_mode=coordinates,
        nearest_mode=rounding,
    )


@pytest.mark.parametrize("coordinates", MODES)
@pytest.mark.parametrize("mode", ["linear", "cubic"])
@pytest.mark.parametrize("size", [(6, 10), (2, 3), (3, 7)], ids=str)
def test_interpolating_resize(coordinates, mode, size):
    constants = {"roi": None, "scales": None, "sizes": np.array([1, 2, *size], np.int64)}
    check_linear(
        "Resize",
        normal(1, 2, 3, 5),
        constants,
        mode=mode,
        coordinate_transformation_mode=coordinates,
    )


@pytest.mark.parametrize("mode", ["nearest", "linear"])
@pytest.mark.parametrize("scales", [(2.0, 2.0), (1.3, 0.7), (1.0, 2.5)], ids=str)
@pytest.mark.parametrize("coordinates", ["half_pixel", "asymmetric"])
def test_resize_by_scales(mode, scales, coordinates):
    constants = {"roi": None, "scales": np.array([1, 1, *scales], np.float32)}
    check_linear(
        "Resize",
        normal(1, 2, 4, 5),
        constants,
        mode=mode,
        coordinate_transformation_mode=coordinates,
    )


@pytest.mark.parametrize("opset", [18, 21])
def test_resize_of_some_axes(opset):
    constants = {"roi": None, "scales": None, "sizes": np.array([9, 4], np.int64)}
    check_linear("Resize", normal(1, 2, 4, 5), constants, mode="linear", axes=[3, 2], opset=opset)


def test_antialiased_resize():
    constants = {"roi": None, "scales": None, "sizes": np.array([1, 2, 3, 4], np.int64)}
    check_linear("Resize", normal(1, 2, 7, 9), constants, mode="linear", antialias=1, opset=18)


@pytest.mark.parametrize(
    ("shape", "size"), [((2, 3, 5), [2, 3, 8]), ((1, 2, 3, 2, 2), [1, 2, 4, 3, 5])]
)
def test_nearest_resize_of_other_ranks(shape, size):
    constants = {"roi": None, "scales": None, "sizes": np.array(size, np.int64)}
    check_linear("Resize", normal(*shape), constants, mode="nearest")


def test_resize_with_computed_scales_is_refused():
    x = {"x": normal(1, 2, 3, 5)}
    model = one_node("Resize", x, {"roi": None, "scales": np.ones(4, np.float32)})
    del model.graph.initializer[:]
    model.graph.input.append(helper.make_tensor_value_info("scales", TensorProto.FLOAT, [4]))
    with pytest.raises(Refusal, match=r"not fixed|its scales are computed"):
        gradients(model, x, ["x"], [x["x"]])


@pytest.mark.parametrize("mode", ["constant", "reflect", "edge", "wrap"])
@pytest.mark.parametrize(
    "pads", [[0, 0, 1, 2, 0, 0, 2, 1], [0, 0, 0, 3, 0, 0, 0, 0], [0, 1, 0, 0, 0, 1, 2, 0]], ids=str
)
def test_pad(mode, pads):
    opset = 19 if mode == "wrap" else 17
    check_linear(
        "Pad", normal(2, 2, 4, 5), {"pads": np.array(pads, np.int64)}, mode=mode, opset=opset
    )


@pytest.mark.parametrize("mode", ["constant", "reflect", "edge"])
@pytest.mark.parametrize("opset", [18, 21])
def test_pad_of_some_axes(mode, opset):
    constants = {
        "pads": np.array([2, 1, 0, 2], np.int64),
        "value": np.array(1.5, np.float32),
        "axes": np.array([3, -2], np.int64),
    }
    check_linear("Pad", normal(2, 2, 4, 5), constants, mode=mode, opset=opset)


@pytest.mark.parametrize("mode", ["constant", "edge"])
def test_pad_that_crops(mode):
    pads = np.array([0, 0, -1, 1, 0, 0, 0, -2], np.int64)
    check_linear("Pad", normal(2, 2, 4, 5), {"pads": pads}, mode=mode)


@pytest.mark.parametrize("exclusive", [0, 1])
@pytest.mark.parametrize("reverse", [0, 1])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_cumsum(axis, reverse, exclusive):
    constants = {"axis": np.array(axis, np.int64)}
    check_linear("CumSum", normal(3, 4, 2), constants, reverse=reverse, exclusive=exclusive)
