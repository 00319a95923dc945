from __future__ import annotations

import itertools

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxqat.model import from_proto
from onnxqat.preparation.padding import make_pads_explicit
from tests.oracles import run_ort

MODES = ["SAME_UPPER", "SAME_LOWER", "VALID"]
SIZES = [(5, 6), (7, 4), (6, 6)]
SHAPES = list(itertools.product([(2, 2), (3, 2), (1, 3)], [(1, 1), (2, 3), (2, 2)]))


def build(op: str, x: list[int | str], weight: tuple[int, ...] | None, **attributes: object):
    names = ["x"] if weight is None else ["x", "w"]
    arrays = {} if weight is None else {"w": np.random.default_rng(0).normal(size=weight)}
    graph = helper.make_graph(
        [helper.make_node(op, names, ["y"], **attributes)],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(a.astype(np.float32), name) for name, a in arrays.items()],
    )
    opsets = [helper.make_opsetid("", 19)]
    return helper.make_model(graph, ir_version=8, opset_imports=opsets)


def same_outputs(proto: onnx.ModelProto, size: tuple[int, ...]) -> bool:
    model = from_proto(proto)
    assert make_pads_explicit(model.graph) == 1
    assert make_pads_explicit(model.graph) == 0
    result = model.to_proto()
    assert {a.name for a in result.graph.node[0].attribute} >= {"pads"}
    assert "auto_pad" not in {a.name for a in result.graph.node[0].attribute}
    x = np.random.default_rng(1).normal(size=(2, 3, *size)).astype(np.float32)
    after = run_ort(result, {"x": x})[0]
    try:
        before = run_ort(proto, {"x": x})[0]
    except Exception as error:  # 1.32, of MaxPool with a window below its stride
        if "padding values must be non-negative" in str(error):
            pytest.skip("this onnxruntime refuses the pads that it computes itself")
        raise
    return before.shape == after.shape and np.array_equal(before, after)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("kernel", "strides"), SHAPES)
def test_conv(kernel: tuple[int, int], strides: tuple[int, int], mode: str) -> None:
    for size in SIZES:
        proto = build("Conv", ["N", 3, *size], (4, 3, *kernel), auto_pad=mode, strides=strides)
        assert same_outputs(proto, size)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("kernel", "strides"), SHAPES)
def test_conv_transpose(kernel: tuple[int, int], strides: tuple[int, int], mode: str) -> None:
    for extra in ([0, 0], [s - 1 for s in strides]):
        proto = build(
            "ConvTranspose",
            ["N", 3, "H", "W"],
            (3, 4, *kernel),
            auto_pad=mode,
            strides=strides,
            output_padding=extra,
        )
        assert same_outputs(proto, (5, 6))


@pytest.mark.parametrize("ceil_mode", [0, 1])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("kernel", "strides"), SHAPES)
@pytest.mark.parametrize(
    "pool", ["MaxPool", "LpPool", "AveragePool-excluding", "AveragePool-including"]
)
def test_pools(
    pool: str, kernel: tuple[int, int], strides: tuple[int, int], mode: str, ceil_mode: int
) -> None:
    op, _, counting = pool.partition("-")
    include = {"count_include_pad": int(counting == "including")} if counting else {}
    for size in SIZES:
        proto = build(
            op,
            ["N", 3, *size],
            None,
            auto_pad=mode,
            kernel_shape=kernel,
            strides=strides,
            ceil_mode=ceil_mode,
            **include,
        )
        assert same_outputs(proto, size)


def test_dilated_conv_follows_the_specification() -> None:
    # onnxruntime 1.19 refuses SAME with dilations, so the pads are those of the formula
    model = from_proto(
        build("Conv", ["N", 3, 9, 9], (4, 3, 3, 3), auto_pad="SAME_UPPER", dilations=[2, 3])
    )

    assert make_pads_explicit(model.graph) == 1
    assert model.graph.nodes[0].attrs["pads"] == [2, 3, 2, 3]


def test_a_kernel_that_skips_more_than_one_value_is_left() -> None:
    # 6 = 3 + 1 + 2: onnxruntime starts at the second value for SAME_UPPER, others at the first
    proto = build("Conv", ["N", 3, 6, 6], (4, 3, 1, 3), auto_pad="SAME_UPPER", strides=[3, 2])

    assert make_pads_explicit(from_proto(proto).graph) == 0


@pytest.mark.parametrize(
    ("strides", "changes"), [([1, 1], 1), ([2, 1], 0)], ids=["stride-1", "stride-2"]
)
def test_dynamic_sizes_matter_only_with_strides(strides: list[int], changes: int) -> None:
    proto = build("Conv", ["N", 3, "H", "W"], (4, 3, 3, 3), auto_pad="SAME_UPPER", strides=strides)

    assert make_pads_explicit(from_proto(proto).graph) == changes


def test_output_shape_overrides_pads_and_is_left() -> None:
    proto = build(
        "ConvTranspose",
        ["N", 3, 5, 5],
        (3, 4, 3, 3),
        auto_pad="SAME_UPPER",
        strides=[2, 2],
        output_shape=[10, 10],
    )

    assert make_pads_explicit(from_proto(proto).graph) == 0


def test_notset_is_no_auto_pad() -> None:
    proto = build("Conv", ["N", 3, 5, 5], (4, 3, 3, 3), auto_pad="NOTSET", pads=[1, 1, 1, 1])

    assert make_pads_explicit(from_proto(proto).graph) == 0
