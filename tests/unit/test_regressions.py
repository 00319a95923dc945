"""Forms in which real exporters write layers: each goes through prepare, insert and strip."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from onnxqat.calibration import placeholder_params
from onnxqat.model import from_proto
from onnxqat.plan import make_plan
from onnxqat.preparation import prepare
from onnxqat.quantized import insert_pairs, read_pairs
from onnxqat.rules import load_rule
from tests.oracles import run_ort

IMAGE = "float[N,4,9,7] x"
ROWS = "float[N,8] x"
POINTS = "float[N,5,8] x"

# inputs; body; random weights; names of those that become weight points
LAYERS = {
    "conv-1d": ("float[N,4,9] x", "y=Conv(x, w, b)", {"w": (6, 4, 3), "b": (6,)}, "w"),
    "conv-3d": (
        "float[N,2,5,4,3] x",
        "y=Conv<pads=[1,1,1,1,1,1]>(x, w)",
        {"w": (3, 2, 3, 3, 3)},
        "w",
    ),
    "depthwise": (IMAGE, "y=Conv<group=4>(x, w)", {"w": (8, 1, 3, 3)}, "w"),
    "grouped": (IMAGE, "y=Conv<group=2, dilations=[2,1]>(x, w)", {"w": (6, 2, 3, 3)}, "w"),
    "transposed": (IMAGE, "y=ConvTranspose<strides=[2,2]>(x, w)", {"w": (4, 3, 2, 2)}, "w"),
    "transposed-grouped": (
        IMAGE,
        "y=ConvTranspose<group=2, strides=[2,2], output_padding=[1,0]>(x, w, b)",
        {"w": (4, 3, 3, 3), "b": (6,)},
        "w",
    ),
    "auto-pad": (
        "float[N,4,9,7] x",
        (
            'a=Conv<auto_pad="SAME_UPPER", strides=[2,2]>(x, w) '
            'b=MaxPool<auto_pad="SAME_LOWER", kernel_shape=[2,2], strides=[2,2]>(a) '
            'y=ConvTranspose<auto_pad="SAME_UPPER", strides=[2,2]>(b, v)'
        ),
        {"w": (6, 4, 3, 3), "v": (6, 2, 3, 3)},
        "wv",
    ),
    "auto-pad-of-unknown-size": (
        "float[N,4,H,W] x",
        'y=Conv<auto_pad="SAME_LOWER", strides=[2,2]>(x, w)',
        {"w": (6, 4, 3, 3)},
        "w",
    ),
    "shared-weight-and-bias": (
        "float[N,4,H,W] x",
        "a=Conv<pads=[1,1,1,1]>(x, w, b) r=Relu(a) y=Conv<pads=[1,1,1,1]>(r, w, b)",
        {"w": (4, 4, 3, 3), "b": (4,)},
        "w",
    ),
    "gemm-transposed": (
        ROWS,
        "y=Gemm<transB=1, alpha=0.5, beta=2.0>(x, w, b)",
        {"w": (5, 8), "b": (5,)},
        "w",
    ),
    "gemm-transposed-input": (
        "float[8,N] x",
        "y=Gemm<transA=1>(x, w, b)",
        {"w": (8, 5), "b": (1, 5)},
        "w",
    ),
    "gemm-constant-left": ("float[8,N] x", "y=Gemm(w, x)", {"w": (5, 8)}, "w"),
    "matmul-right": (POINTS, "y=MatMul(x, w)", {"w": (8, 3)}, "w"),
    "matmul-left": (POINTS, "y=MatMul(w, x)", {"w": (3, 5)}, "w"),
    "matmul-vector": (POINTS, "y=MatMul(x, w)", {"w": (8,)}, "w"),
    "matmul-stack": (POINTS, "y=MatMul(x, w)", {"w": (1, 8, 3)}, "w"),
    "weight-through-nodes": (
        ROWS,
        "i=Identity(w) t=Transpose<perm=[1,0]>(i) q=Div(t, s) r=Sqrt(v) c=Mul(q, r) y=MatMul(x, c)",
        {"w": (3, 8), "s": (3,), "v": (3,)},
        "c",
    ),
    "weight-in-halves": (
        ROWS,
        "h=Cast<to=10>(w) f=Cast<to=1>(h) y=MatMul(x, f)",
        {"w": (8, 3)},
        "f",
    ),
    "computed-factor": (
        POINTS,
        "n=MatMul(x, w) z=Sqrt(v) y=Mul(n, z)",
        {"w": (8, 3), "v": (3,)},
        "wz",
    ),
}


def network(inputs: str, body: str, weights: dict[str, tuple[int, ...]]) -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    proto = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["": 17]> g ({inputs}) => (float y) {{ {body} }}'
    )
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    for name, shape in weights.items():
        array = np.abs(rng.normal(size=shape)).astype(np.float32)
        proto.graph.initializer.append(numpy_helper.from_array(array, name))
    return proto


@pytest.mark.parametrize(("inputs", "body", "weights", "points"), LAYERS.values(), ids=LAYERS)
def test_layers(inputs: str, body: str, weights: dict[str, tuple[int, ...]], points: str) -> None:
    proto = network(inputs, body, weights)
    prepared = prepare(from_proto(proto))
    floats = prepared.to_proto()
    plan = make_plan(prepared.graph, load_rule("sophgo-bm1690"))
    params = placeholder_params(prepared, plan)

    quantized = insert_pairs(prepared, plan, params, state="uncalibrated")

    onnx.checker.check_model(floats, full_check=True)
    onnx.checker.check_model(quantized.to_proto(), full_check=True)
    assert quantized.floats.to_proto() == floats
    assert sorted(p.tensor for p in plan.points if p.role == "weight") == sorted(points)
    dims = proto.graph.input[0].type.tensor_type.shape.dim
    sizes = {"N": 2, "H": 9, "W": 7}
    shape = [d.dim_value or sizes[d.dim_param] for d in dims]
    x = {"x": np.random.default_rng(1).integers(-4, 5, shape).astype(np.float32)}
    expected, found = run_ort(proto, x)[0], run_ort(floats, x)[0]
    assert expected.shape == found.shape == run_ort(quantized.to_proto(), x)[0].shape
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())
    again = read_pairs(from_proto(quantized.to_proto()))
    assert again.floats.to_proto() == floats
