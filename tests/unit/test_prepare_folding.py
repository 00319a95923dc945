from __future__ import annotations

import tracemalloc

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from onnxqat.errors import ModelError
from onnxqat.model import Model, from_proto
from onnxqat.preparation import budget, prepare
from onnxqat.preparation.folding import fold_constants
from tests.oracles import run_ort

RNG = np.random.default_rng(0)
WEIGHTS = RNG.normal(size=(6, 8)).astype(np.float32)
OTHERS = np.exp(RNG.uniform(-30, 30, (6, 8))).astype(np.float32)
HALVES = RNG.normal(scale=100, size=(4, 5)).astype(np.float16)
INTEGERS = RNG.integers(-50, 50, (4, 5))
DIVISORS = np.where(INTEGERS == 0, 7, INTEGERS)[::-1].copy()
LEVELS = RNG.integers(-128, 128, (3, 8)).astype(np.int8)
SCALES = RNG.uniform(0.01, 1, 8).astype(np.float32)
POINTS = RNG.integers(-128, 128, 8).astype(np.int8)
SPECIAL = np.float32([0, -0.0, np.inf, -np.inf, np.nan, 1e-42])


def ints(*values: int) -> np.ndarray:
    return np.int64(values)


# name -> operator, inputs, attributes
FOLDED = {
    "transpose": ("Transpose", [WEIGHTS], {}),
    "transpose-perm": ("Transpose", [WEIGHTS], {"perm": [0, 1]}),
    "reshape": ("Reshape", [WEIGHTS, ints(0, -1)], {}),
    "flatten": ("Flatten", [WEIGHTS[None]], {"axis": -1}),
    "flatten-0": ("Flatten", [WEIGHTS], {"axis": 0}),
    "squeeze": ("Squeeze", [WEIGHTS[:, None], ints(-2)], {}),
    "squeeze-all": ("Squeeze", [WEIGHTS[:, None]], {}),
    "unsqueeze": ("Unsqueeze", [WEIGHTS, ints(0, -1)], {}),
    "concat": ("Concat", [WEIGHTS, OTHERS[:2]], {"axis": -2}),
    "gather": ("Gather", [WEIGHTS, ints(5, -1, 0)[None]], {"axis": 1}),
    "gather-scalar": ("Gather", [ints(7, 8, 9), np.array(-1)], {}),
    "slice": ("Slice", [WEIGHTS, ints(1), ints(5)], {}),
    "slice-steps": ("Slice", [WEIGHTS, ints(-100, 6), ints(100, -7), ints(0, 1), ints(2, -3)], {}),
    "slice-back": ("Slice", [WEIGHTS, ints(2**62), ints(-(2**63)), ints(-1), ints(-1)], {}),
    "slice-to-0": ("Slice", [WEIGHTS, ints(-1), ints(0), ints(1), ints(-1)], {}),
    "slice-empty": ("Slice", [WEIGHTS, ints(5), ints(2), ints(0)], {}),
    "split": ("Split", [WEIGHTS, ints(2, 4)], {}),
    "expand": ("Expand", [WEIGHTS[:, :1], ints(2, 1, 8)], {}),
    "tile": ("Tile", [WEIGHTS, ints(2, 1)], {}),
    "constant-of-shape": ("ConstantOfShape", [ints(2, 3)], {}),
    "constant-of-shape-value": (
        "ConstantOfShape",
        [ints(2, 3)],
        {"value": numpy_helper.from_array(np.float32([0.1]))},
    ),
    "where": ("Where", [WEIGHTS > 0, WEIGHTS, OTHERS[:1]], {}),
    "add": ("Add", [WEIGHTS, OTHERS], {}),
    "subtract": ("Sub", [WEIGHTS, OTHERS[:1]], {}),
    "multiply": ("Mul", [WEIGHTS, OTHERS], {}),
    "divide": ("Div", [WEIGHTS, OTHERS], {}),
    "divide-special": ("Div", [SPECIAL, SPECIAL[:1]], {}),
    "square-root": ("Sqrt", [OTHERS], {}),
    "square-root-special": ("Sqrt", [SPECIAL], {}),
    "negate": ("Neg", [WEIGHTS], {}),
    "absolute": ("Abs", [WEIGHTS], {}),
    "floor": ("Floor", [WEIGHTS], {}),
    "ceil": ("Ceil", [WEIGHTS], {}),
    "power": ("Pow", [OTHERS, WEIGHTS[:1]], {}),
    "cosine": ("Cos", [OTHERS], {}),
    "maximum": ("Max", [WEIGHTS, OTHERS, WEIGHTS[:1]], {}),
    "minimum": ("Min", [WEIGHTS, OTHERS], {}),
    "add-integers": ("Add", [INTEGERS, ints(2**62)], {}),
    "divide-integers": ("Div", [INTEGERS, DIVISORS], {}),
    "modulo": ("Mod", [INTEGERS, DIVISORS], {}),
    "modulo-c": ("Mod", [INTEGERS, DIVISORS], {"fmod": 1}),
    "equal": ("Equal", [INTEGERS, ints(7)], {}),
    "greater": ("Greater", [WEIGHTS, OTHERS], {}),
    "less-or-equal": ("LessOrEqual", [INTEGERS, DIVISORS], {}),
    "and": ("And", [INTEGERS > 0, DIVISORS > 0], {}),
    "not": ("Not", [INTEGERS > 0], {}),
    "range": ("Range", [np.array(3), np.array(-9), np.array(-4)], {}),
    "shape": ("Shape", [WEIGHTS[None]], {"start": -2, "end": -1}),
    "size": ("Size", [WEIGHTS], {}),
    "reduce-product": ("ReduceProd", [INTEGERS], {"axes": [0], "keepdims": 0}),
    "reduce-sum": ("ReduceSum", [INTEGERS, ints(-1)], {}),
    "reduce-all": ("ReduceMax", [INTEGERS], {}),
    "cast": ("Cast", [ints(16777217, -3)], {"to": 1}),
    "cast-float16": ("Cast", [HALVES], {"to": 1}),
    "cast-to-float16": ("Cast", [OTHERS], {"to": 10}),
    "cast-to-integer": ("Cast", [WEIGHTS * 100], {"to": 7}),
    "cast-to-bool": ("Cast", [SPECIAL], {"to": 9}),
    "dequantize": ("DequantizeLinear", [LEVELS, SCALES[0], POINTS[0]], {}),
    "dequantize-axis": ("DequantizeLinear", [LEVELS, SCALES, POINTS], {"axis": -1}),
    "dequantize-bias": ("DequantizeLinear", [np.int32([2**24 + 1, -5]), SCALES[0]], {}),
}


def node_of(operator: str, arrays: list[np.ndarray], attributes: dict[str, object]) -> Model:
    names = [f"i{k}" for k in range(len(arrays))]
    outputs = ["c", "d"] if operator == "Split" else ["c"]
    nodes = [helper.make_node(operator, names, outputs, **attributes)]
    nodes += [helper.make_node("Identity", [o], [f"{o}_out"]) for o in outputs]
    graph = helper.make_graph(
        nodes,
        "g",
        [],
        [onnx.ValueInfoProto(name=f"{o}_out") for o in outputs],
        [numpy_helper.from_array(a, n) for a, n in zip(arrays, names, strict=True)],
    )
    typed = onnx.shape_inference.infer_shapes(
        helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])
    )
    return from_proto(typed)


@pytest.mark.parametrize(("operator", "arrays", "attributes"), FOLDED.values(), ids=FOLDED)
def test_folded_constants_are_what_onnxruntime_computes(operator, arrays, attributes) -> None:
    model = node_of(operator, arrays, attributes)
    before = model.to_proto()

    assert fold_constants(model.graph) == 1
    for expected, tensor in zip(run_ort(before, {}), model.graph.outputs, strict=True):
        found = tensor.inputs[0].inputs[0].values
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert found.tobytes() == expected.tobytes() or np.isnan(expected).any()
        assert np.array_equal(found, expected, equal_nan=expected.dtype.kind == "f")


@pytest.mark.parametrize("operator", ["Add", "Sub", "Mul", "Div"])
def test_float_arithmetic_agrees_on_a_million_values(operator: str) -> None:
    bits = RNG.integers(0, 2**32, (2, 10**6), dtype=np.uint32)
    model = node_of(operator, list(bits.view(np.float32)), {})
    expected = run_ort(model.to_proto(), {})[0]
    fold_constants(model.graph)

    found = model.graph.outputs[0].inputs[0].inputs[0].values
    assert np.array_equal(found, expected, equal_nan=True)


@pytest.mark.parametrize(
    "body",
    [
        pytest.param("c=Transpose(x) y=Neg(c)", id="variable"),
        pytest.param("y=Transpose(w)", id="graph-output"),
        pytest.param("c=Cast<to=6>(l) e=Cast<to=1>(c) y=Neg(e)", id="overflowing-cast"),
        pytest.param("c=Cast<to=8>(w) e=Cast<to=1>(c) y=Neg(e)", id="to-string"),
        pytest.param("c=Cast<to=10>(d) e=Cast<to=1>(c) y=Neg(e)", id="double-to-float16"),
        pytest.param("c=Reshape(w, s) y=Neg(c)", id="impossible"),
        pytest.param("c=Softmax(w) y=Neg(c)", id="rounded-as-one-likes"),
        pytest.param("c=ReduceSum(w) y=Neg(c)", id="order-of-a-sum"),
        pytest.param("c=Expand(w, h) y=Add(x, c)", id="too-large"),
        pytest.param("c=ConstantOfShape(h) y=Add(x, c)", id="too-large-constant"),
        pytest.param("c=Add(t, u) e=Cast<to=1>(c) y=Add(x, e)", id="too-large-sum"),
    ],
)
def test_not_folded(body: str) -> None:
    initializers = """<float[2,2] w = {1,2,3,4}, int64[1] s = {5}, double[1] d = {0.1},
        int64[1] z = {0}, float[1] l = {3e9}, int64[3] h = {30000000, 2, 2},
        int64[1,10000] t, int64[10000,1] u>"""
    text = f"g (float[2,2] x) => (float[2,2] y) {initializers} {{ {body} }}"
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]>{text}')
    for name, shape in (("t", (1, 10000)), ("u", (10000, 1))):
        proto.graph.initializer.append(numpy_helper.from_array(np.ones(shape, np.int64), name))

    assert fold_constants(from_proto(proto).graph) == 0


@pytest.mark.parametrize(("growth", "room", "left"), [(23, 2**28, 5), (24, 72, 3), (24, 2**28, 0)])
def test_results_grow_within_bounds(
    growth: int, room: int, left: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget, "MAX_GROWTH", growth)
    monkeypatch.setattr(budget, "LEAST_ROOM", room)
    monkeypatch.setattr(budget, "SMALL", 0)
    names = "abcde"
    nodes = " ".join(f"{n}=ConstantOfShape(s)" for n in names)  # 8 bytes become 32
    text = f"<int64[1] s = {{8}}> {{ {nodes} y=Sum(x, {', '.join(names)}) }}"
    model = parse(f"g (float[8] x) => (float[8] y) {text}")

    shared = budget.Budget(model.graph, "m")
    while fold_constants(model.graph, shared):  # in several rounds, as `prepare` does
        pass

    assert [node.op for node in model.graph.nodes] == [*["ConstantOfShape"] * left, "Sum"]


def test_a_division_by_a_computed_zero_is_left() -> None:
    model = parse(
        "g (float[1] x) => (float[1] y) <int64[1] s = {5}> "
        "{ z=Sub(s, s) c=Div(s, z) e=Cast<to=1>(c) y=Add(x, e) }"
    )

    assert [fold_constants(model.graph), fold_constants(model.graph)] == [1, 0]
    assert [node.op for node in model.graph.nodes] == ["Div", "Cast", "Add"]


def bomb(kind: str) -> Model:
    """Return a model of a few hundred bytes that computes gigabytes from its constants."""
    spreads = [f"e{i}=Expand(one, wide) f{i}=ReduceSum(e{i}) " for i in range(60)]
    body = {
        "expand": f"{''.join(spreads)} c=Sum({', '.join(f'f{i}' for i in range(60))})",
        "range": "r=Range(zero, far, step) k=Cast<to=1>(r) c=ReduceSum(k)",
        "constant": "k=ConstantOfShape(huge) c=ReduceSum(k)",
        "tile": "k=Tile(d0, times) c=ReduceSum(k)",
        "gather": "r=ConstantOfShape<value = int64[1] {0}>(many) q=Gather(rows, r) c=ReduceSum(q)",
        "where": "k=Where(flag, column, row) c=ReduceSum(k)",
        "add": "k=Add(column, row) c=ReduceSum(k)",
    }[kind]
    large = {"column": np.ones((2**17, 1), np.float32), "row": np.ones((1, 2**17), np.float32)}
    proto = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["": 17]> g (float[2] x) => (float[2] y)
        <float[8] d0 = {{1,1,1,1,1,1,1,1}}, float[1] one = {{1}}, int64[1] wide = {{16000000}},
        int64[1] many = {{4000000}}, int64 zero = {{0}}, int64 far = {{100000000000}},
        int64 step = {{1}}, bool[1] flag = {{1}},
        int64[2] huge = {{1000000, 1000000}}, int64[1] times = {{1000000000}},
        float[1,1024] rows, float[1] column, float[1] row> {{ {body} y=Add(x, c) }}"""
    )
    for name, values in (*large.items(), ("rows", np.ones((1, 1024), np.float32))):
        proto.graph.initializer.append(numpy_helper.from_array(values, name))
    del proto.graph.value_info[:]
    return from_proto(proto)


@pytest.mark.parametrize("kind", ["expand", "range", "constant", "tile", "gather", "where", "add"])
def test_a_graph_that_computes_gigabytes_from_constants_is_refused(kind: str) -> None:
    tracemalloc.start()
    with pytest.raises(ModelError, match=r"computes \d+ bytes from constants"):
        prepare(bomb(kind))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert peak < 2**29


def test_a_tensor_that_is_read_twice_counts_once() -> None:
    steps = [f"d{i + 1}=Concat<axis=0>({', '.join([f'd{i}'] * 16)})" for i in range(9)]
    model = parse(
        "g (float[2] x) => (float[2] y) <float[8] d0 = {1,1,1,1,1,1,1,1}> "
        f"{{ {' '.join(steps)} c=ReduceSum(d9) y=Add(x, c) }}"
    )
    shared = budget.Budget(model.graph, "m")
    tracemalloc.start()

    while fold_constants(model.graph, shared):
        pass

    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    sizes = [t.values.nbytes for t in model.graph.tensors().values() if hasattr(t, "values")]
    assert [node.op for node in model.graph.nodes] == ["Concat"] * 4 + ["ReduceSum", "Add"]
    assert sizes == [32 * 16**5]
    assert peak < 32 * 16**6  # what is too large is not made to be looked at


def parse(text: str) -> Model:
    return from_proto(onnx.parser.parse_model('<ir_version: 8, opset_import: ["": 17]>' + text))


def test_folding_a_shared_initializer_leaves_the_other_reader_alone() -> None:
    model = parse(
        "g (float[1,2] x) => (float[1,2] y) <float[2,2] w = {1,2,3,4}> "
        "{ c=Transpose(w) a=MatMul(x, w) y=MatMul(a, c) }"
    )
    before = model.to_proto()
    x = {"x": np.float32([[3, 5]])}

    assert fold_constants(model.graph) == 1
    assert np.array_equal(run_ort(model.to_proto(), x)[0], run_ort(before, x)[0])


# shapes


def test_static_shapes_are_folded() -> None:
    model = parse(
        "g (float[2,3,4] x) => (float[2,12] y) <int64[1] m = {-1}, int64 i = {0}, int64[1] a = {0}>"
        "{ s=Shape(x) n=Gather(s, i) u=Unsqueeze(n, a) k=Concat<axis=0>(u, m) y=Reshape(x, k) }"
    )

    graph = prepare(model).graph

    assert [node.op for node in graph.nodes] == ["Reshape"]
    assert graph.nodes[0].inputs[1].values.tolist() == [2, -1]


@pytest.mark.parametrize(
    ("body", "shapes"),
    [
        pytest.param("s=Shape(x) y=Gather(s, i)", 1, id="graph-output"),
        pytest.param("s=Shape(x) c=Gather(s, i) y=Neg(c)", 0, id="gather"),
        pytest.param("s=Shape(x) c=Gather(s, k) y=Unsqueeze(c, j)", 0, id="gather-scalar"),
        pytest.param("s=Shape(x) c=Slice(s, one, two) y=Neg(c)", 0, id="slice"),
        pytest.param("s=Shape<start=3>(x) y=Neg(s)", 0, id="start"),
        pytest.param("s=Shape<start=-3, end=2>(x) y=Neg(s)", 0, id="start-end"),
        pytest.param("s=Shape(x) c=Gather(s, j) y=Neg(c)", 1, id="dynamic"),
        pytest.param("s=Shape(x) c=Gather(s, i) d=Gather(s, j) y=Mul(c, d)", 1, id="one-of-two"),
    ],
)
def test_what_is_known_of_a_shape_is_folded(body: str, shapes: int) -> None:
    model = parse(
        "g (float[N,3,H,8] x) => (int64[m] y) <int64[2] i = {1,3}, int64[1] j = {0}, "
        f"int64 k = {{1}}, int64[1] one = {{1}}, int64[1] two = {{2}}> {{ {body} }}"
    )
    before = model.to_proto()

    after = prepare(model).to_proto()

    assert [node.op_type for node in after.graph.node].count("Shape") == shapes
    feeds = {"x": np.zeros((5, 3, 7, 8), np.float32)}
    assert np.array_equal(run_ort(after, feeds)[0], run_ort(before, feeds)[0])


def test_a_stale_shape_in_the_file_decides_nothing() -> None:
    # exported for one sample, the input made dynamic by hand afterwards
    model = parse(
        "g (float[N,4] x) => (float[M,4] y) <float[1,4] a, int64[2] s> "
        "{ a=Relu(x) s=Shape(a) b=Neg(x) y=Reshape(b, s) }"
    )
    before = model.to_proto()

    prepared = prepare(model).to_proto()

    feeds = {"x": np.ones((3, 4), np.float32)}
    assert np.array_equal(run_ort(prepared, feeds)[0], run_ort(before, feeds)[0])
