"""The script that puts a table's quantizers into a .tflite file: names, constants, types."""

from __future__ import annotations

import json

import numpy as np
import pytest
from onnx import helper

from onnxqat.handoff.to_tflite import (
    activations,
    by_values,
    channel_axis,
    key,
    points_of,
    quantized_type,
    with_batch_of_one,
)


def point(tensor, scale=(0.5,), zero_point=(0,), limits=(-128, 127), axis=None):
    return {
        "tensor": tensor, "scale": list(scale), "zero_point": list(zero_point), "axis": axis,
        "qmin": limits[0], "qmax": limits[1],
    }  # fmt: skip


def record(output, node, *chain):
    return {
        "onnx_output_name": output, "onnx_op_name": node,
        "resolved_tflite_tensor_name": chain[-1], "rewrite_name_chain": list(chain),
    }  # fmt: skip


RECORDS = [
    record("y", "conv", "y", "y_nhwc"),
    record("wa/r", "relu", "wa/r", "next_input_nhwc"),
    record("d", "depthwise", "d"),
]


def test_activations_are_found_by_what_became_of_them():
    points = [point("x"), point("y"), point("/r"), point("d")]
    names = {"x", "y_nhwc", "wa/r", "depthwise_output_nhwc", "other"}
    found = activations(points, RECORDS, names)

    assert {name: p["tensor"] for name, p in found.items()} == {
        "x": "x", "y_nhwc": "y", "wa/r": "/r", "depthwise_output_nhwc": "d",
    }  # fmt: skip


def test_an_activation_that_is_gone_is_named():
    with pytest.raises(SystemExit, match="'y' is quantized, but onnx2tf removed it"):
        activations([point("y")], RECORDS, {"x"})


def test_two_scales_of_one_tensor_are_refused():
    records = [record("y", "conv", "y", "z"), record("z", "relu", "z")]
    same = activations([point("y"), point("z")], records, {"z"})

    assert list(same) == ["z"]
    with pytest.raises(SystemExit, match="'z' and 'y' are one tensor for LiteRT"):
        activations([point("y"), point("z", scale=(0.25,))], records, {"z"})


@pytest.mark.parametrize("order", [(0, 2, 3, 1), (1, 2, 3, 0), (2, 3, 1, 0)])
def test_a_constant_is_known_by_its_values_and_its_channels(order):
    weight = np.random.default_rng(0).normal(size=(4, 3, 2, 5)).astype(np.float32)
    moved = np.transpose(weight, order)

    assert key(moved) == key(weight)
    assert channel_axis(moved, weight, 0) == order.index(0)
    other = moved.copy()
    other.flat[0] += 1
    assert key(other) != key(weight)
    assert channel_axis(other, weight, 0) is None


def test_equal_constants_need_one_scale():
    arrays = {"a": np.float32([1, 2]), "b": np.float32([2, 1]), "c": np.float32([3, 1])}
    found = by_values([point("a"), point("b"), point("c")], arrays)

    assert [[p["tensor"] for p in points] for points in found.values()] == [["a", "b"], ["c"]]
    with pytest.raises(SystemExit, match="'b' and 'a' have the same values, but different scales"):
        by_values([point("a"), point("b", scale=(0.1,))], arrays)


def test_a_free_batch_is_one_wherever_it_is_named():
    shapes = {"x": ["n", 3, "m"], "z": [2, "n"], "w": [None, 4], "y": ["n", "k"], "t": ["n", 7]}
    values = {k: helper.make_tensor_value_info(k, 1, shape) for k, shape in shapes.items()}
    inputs, outputs = [values[k] for k in "xzw"], [values["y"]]
    graph = helper.make_graph([], "g", inputs, outputs, value_info=[values["t"]])
    model = helper.make_model(graph)
    fixed = with_batch_of_one(model).graph

    found = {
        v.name: [d.dim_value or d.dim_param or None for d in v.type.tensor_type.shape.dim]
        for v in (*fixed.input, *fixed.output, *fixed.value_info)
    }
    assert found == {"x": [1, 3, "m"], "z": [2, 1], "w": [1, 4], "y": [1, "k"], "t": [1, 7]}
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "n"


def test_only_int8_is_taken(tmp_path):
    table = tmp_path / "table.json"
    table.write_text(json.dumps({"points": [point("x") | {"dtype": "int8"}]}))
    assert points_of(table)[0]["tensor"] == "x"

    table.write_text(json.dumps({"points": [point("y") | {"dtype": "int16"}]}))
    with pytest.raises(SystemExit, match="'y' is int16; this script makes int8 models"):
        points_of(table)


def test_types_hold_the_numbers_of_the_table():
    scales = [float(np.float32(0.1)), 1e-30]
    whole = quantized_type(point("x", zero_point=(-128,)), [None, 3])
    narrow = quantized_type(point("w", scales, (0, 0), (-127, 127), 0), [2, 3], 1)

    assert whole == "tensor<?x3x!quant.uniform<i8:f32, 0.5:-128>>"
    assert narrow == ("tensor<2x3x!quant.uniform<i8<-127:127>:f32:1, {0.10000000149011612,1e-30}>>")
