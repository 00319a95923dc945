"""The table of operators against ONNX's schemas and its reference evaluator."""

from __future__ import annotations

import itertools

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from onnx import TensorProto, defs, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from onnxqat.model import from_proto
from onnxqat.nodes import (
    bias_channels,
    bias_index,
    channel_axis,
    data_inputs,
    keeps_grid,
    output_channels,
    weight_index,
)
from onnxqat.operators import (
    CONVOLUTIONS,
    MATRIX_PRODUCTS,
    NONNEGATIVE,
    OPERATORS,
    PATTERN_NAMES,
    RECURRENT,
    SUBGRAPHS,
    WEIGHTED,
    WINDOWED,
    homogeneous,
    moving,
    role_of,
)
from onnxqat.plan import make_plan
from onnxqat.plan.patterns import PATTERNS
from onnxqat.rules import HardwareRule, OpRule, RuleSpec
from onnxqat.versions import MAX_OPSET
from tests.oracles import run_ort

SCHEMAS = {
    s.name: defs.get_schema(s.name, MAX_OPSET)
    for s in defs.get_all_schemas()
    if s.domain == "" and defs.has(s.name, max_inclusive_version=MAX_OPSET)
}
FLOAT = "tensor(float)"
ROWS = pytest.mark.parametrize("op", OPERATORS)


def formal_inputs(op):
    return [(p.name, FLOAT in p.types) for p in SCHEMAS[op].inputs]


@ROWS
def test_no_row_has_more_inputs_than_the_schema(op):
    assert len(OPERATORS[op].inputs) <= len(formal_inputs(op))


@ROWS
def test_a_float_input_is_a_setting_only_where_it_limits_or_fills(op):
    floats = [n for i, (n, is_float) in enumerate(formal_inputs(op))
              if is_float and role_of(op, i) == "setting"]  # fmt: skip
    expected = {"Clip": ["min", "max"], "Pad": ["constant_value"], "Resize": ["roi", "scales"]}

    assert floats == expected.get(op, [])


@ROWS
def test_an_input_that_cannot_be_float_is_a_setting(op):
    if op in SUBGRAPHS:
        return  # what a subgraph reads is its own
    others = [i for i, (_, is_float) in enumerate(formal_inputs(op)) if not is_float]

    assert {role_of(op, i) for i in others} <= {"setting"}


@ROWS
def test_parameters_bear_the_names_of_the_schema(op):
    names = {"weight": {"W"}, "bias": {"B", "C", "bias"}, "scale": {"scale", "Scale"},
             "slope": {"slope"}, "statistic": {"input_mean", "input_var"},
             "factor": {"A", "B"}, "gate": {"W", "R"}, "peephole": {"P"},
             "state": {"initial_h", "initial_c"}}  # fmt: skip
    for index, (name, _) in enumerate(formal_inputs(op)):
        assert name in names.get(role_of(op, index), {name})


def test_every_operator_with_scale_and_bias_is_a_normalization():
    found = {op for op in SCHEMAS
             if {"scale", "Scale"} & {n for n, _ in formal_inputs(op)}
             and {"B", "bias"} & {n for n, _ in formal_inputs(op)}}  # fmt: skip

    assert found == {op for op, facts in OPERATORS.items() if "scale" in facts.inputs}


def test_every_operator_with_auto_pad_has_a_window():
    integer = {"ConvInteger", "QLinearConv"}  # no part of a float graph

    assert {op for op, s in SCHEMAS.items() if "auto_pad" in s.attributes} - integer == {*WINDOWED}
    assert all({"kernel_shape", "pads"} <= SCHEMAS[op].attributes.keys() for op in WINDOWED)


def test_every_operator_with_a_graph_is_listed():
    graph = defs.OpSchema.AttrType.GRAPH
    found = {op for op, s in SCHEMAS.items() if any(a.type == graph for a in s.attributes.values())}

    assert found == {*SUBGRAPHS}


def test_every_recurrent_layer_is_listed_with_its_gates():
    assert {op for op, s in SCHEMAS.items() if "hidden_size" in s.attributes} == {*RECURRENT}
    for op in RECURRENT:
        gates = OPERATORS[op].gates
        rows = "hidden_size" if gates == 1 else f"{gates}*hidden_size"
        assert f"[num_directions, {rows}, input_size]" in SCHEMAS[op].inputs[1].description


def test_patterns_are_those_that_rules_can_name():
    assert set(PATTERN_NAMES) == PATTERNS.keys()


def model_of(op, inputs, *, outputs=1, **attributes):
    kinds = [helper.np_dtype_to_tensor_dtype(array.dtype) for array in inputs]
    names = [f"i{i}" for i in range(len(inputs))]
    graph = helper.make_graph(
        [helper.make_node(op, names, [f"o{i}" for i in range(outputs)], **attributes)],
        "g",
        [helper.make_tensor_value_info(n, k, None) for n, k in zip(names, kinds, strict=True)],
        [helper.make_tensor_value_info(f"o{i}", TensorProto.FLOAT, None) for i in range(outputs)],
    )
    opsets = [helper.make_opsetid("", 20)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    return model, dict(zip(names, inputs, strict=True))


def computed(op, inputs, **attributes):
    """Return what ONNX's reference evaluator makes of a node."""
    model, feeds = model_of(op, inputs, **attributes)
    return ReferenceEvaluator(model).run(None, feeds)


# all different, of both signs, none zero
X = np.float32(np.random.default_rng(0).permutation(np.arange(-41, 87, 2)).reshape(1, 4, 4, 4))


def ints(*values):
    return np.int64(values)


PADS = ints(0, 0, 1, 1, 0, 0, 1, 1)
# A use of each operator that moves or chooses values.
MOVED = {
    "Concat": ([X, X + 100], {"axis": 1}),
    "DepthToSpace": ([X], {"blocksize": 2}),
    "Expand": ([X, ints(3, 4, 4, 4)], {}),
    "Flatten": ([X], {"axis": 2}),
    "Gather": ([X, ints(3, 0)], {"axis": 1}),
    "GatherElements": ([X, np.zeros((1, 4, 4, 4), np.int64)], {"axis": 2}),
    "GatherND": ([X, ints([0, 2], [0, 1])], {}),
    "GlobalMaxPool": ([X], {}),
    "Identity": ([X], {}),
    "Max": ([X, X[..., ::-1].copy()], {}),
    "MaxPool": ([X], {"kernel_shape": [2, 2], "pads": [1, 1, 1, 1], "strides": [2, 2]}),
    "Min": ([X, X[..., ::-1].copy()], {}),
    "Pad": ([X, PADS], {"mode": "reflect"}),
    "ReduceMax": ([X, ints(1)], {}),
    "ReduceMin": ([X, ints(1)], {}),
    "Relu": ([X], {}),
    "Reshape": ([X, ints(16, 4)], {}),
    "Resize": ([X, np.float32([]), np.float32([1, 1, 2, 2])], {"mode": "nearest"}),
    "Slice": ([X, ints(1), ints(3), ints(1)], {}),
    "SpaceToDepth": ([X], {"blocksize": 2}),
    "Split": ([X, ints(1, 3)], {"axis": 1, "outputs": 2}),
    "Squeeze": ([X, ints(0)], {}),
    "Tile": ([X, ints(1, 1, 2, 1)], {}),
    "Transpose": ([X], {"perm": [0, 2, 3, 1]}),
    "Unsqueeze": ([X, ints(0)], {}),
}  # fmt: skip


def test_every_operator_that_moves_is_tried():
    movements = ("axes", "blocks", "repeats", "picks", "joins", "extremes", "fills")

    assert {*moving(*movements)} == MOVED.keys()


@pytest.mark.parametrize("op", MOVED)
def test_movements_are_as_the_reference_evaluator_does_them(op):
    inputs, attributes = MOVED[op]
    written = computed(op, inputs, **attributes)
    there, movement = {*X.ravel().tolist()}, OPERATORS[op].movement
    flat = written[0].ravel()
    once = sorted(flat.tolist()) == sorted(X.ravel().tolist())
    permuted = any(
        np.array_equal(np.transpose(X, order).ravel(), flat)
        for order in itertools.permutations(range(4))
    )
    assert movement == {
        (True, True): "axes",
        (True, False): "blocks",
    }.get((once, permuted), movement)  # fmt: skip
    if movement in ("axes", "blocks"):
        assert once
    elif movement == "repeats":
        assert {*flat.tolist()} == there
        assert flat.size > X.size
    elif movement == "joins":
        assert sorted(flat.tolist()) == sorted([*X.ravel().tolist(), *(X + 100).ravel().tolist()])
    else:
        assert {*flat.tolist()} <= {*there, 0.0}


KERNEL = {"kernel_shape": [2, 2], "pads": [1, 1, 0, 0]}
HOMOGENEOUS = {
    "values": {
        "Abs": ([X], {}),
        "LeakyRelu": ([X], {"alpha": 0.3}),
        "Neg": ([X], {}),
        "PRelu": ([X, np.float32([[[0.1]], [[0.2]], [[-0.5]], [[2]]])], {}),
        "Relu": ([X], {}),
    },
    "windows": {
        "AveragePool": ([X], {**KERNEL, "count_include_pad": 1}),
        "GlobalAveragePool": ([X], {}),
        "GlobalMaxPool": ([X], {}),
        "MaxPool": ([X], KERNEL),
    },
    "axes": {
        "ReduceMax": ([X, ints(2)], {"keepdims": 0}),
        "ReduceMean": ([X, ints(2)], {"keepdims": 0}),
        "ReduceMin": ([X, ints(2)], {"keepdims": 0}),
        "ReduceSum": ([X, ints(2)], {"keepdims": 0}),
    },
    "operands": {op: ([X, X[..., ::-1].copy()], {}) for op in ("Add", "Max", "Min", "Sub", "Sum")},
}  # fmt: skip


@pytest.mark.parametrize("kind", HOMOGENEOUS)
def test_what_is_homogeneous_scales_with_its_channels(kind):
    scales = np.float32([0.5, 1, 2, 4]).reshape(4, 1, 1)  # powers of two: exact
    assert {*homogeneous(kind)} == HOMOGENEOUS[kind].keys()

    for op, (inputs, attributes) in HOMOGENEOUS[kind].items():
        scaled = inputs if kind == "operands" else inputs[:1]
        rest = inputs[len(scaled) :]
        before = computed(op, inputs, **attributes)[0]
        after = computed(op, [*(scales * one for one in scaled), *rest], **attributes)[0]
        factors = scales[:, 0] if before.ndim == 3 else scales
        np.testing.assert_array_equal(after, factors * before, err_msg=op)


def surgeon(op, inputs, **attributes):
    """Return a graphsurgeon node that reads constants behind the first input."""
    attributes.pop("outputs", None)
    first = gs.Variable("x", np.float32, inputs[0].shape)
    rest = [gs.Constant(f"c{i}", array) for i, array in enumerate(inputs[1:])]
    return gs.Node(op, "n", attributes, [first, *rest], [gs.Variable("y", np.float32)])


GRID = np.float32(0.25)
TWICE = [np.float32([]), np.float32([1, 1, 2, 2])]
OFF = {
    "a linear Resize": ("Resize", [X, *TWICE], {"mode": "linear"}),
    "a Resize that extrapolates": (
        "Resize",
        [X, np.float32([0, 0, -1, -1, 1, 1, 2, 2]), np.float32([]), ints(1, 4, 8, 8)],
        {
            "mode": "nearest",
            "coordinate_transformation_mode": "tf_crop_and_resize",
            "extrapolation_value": 0.1,
        },
    ),
    "a Pad with a number": ("Pad", [X, PADS, np.array(0.1, np.float32)], {}),
    "an average": ("AveragePool", [X], {"kernel_shape": [3, 3]}),
}


def on_grid(arrays):
    return all(np.array_equal(np.rint(array / GRID), array / GRID) for array in arrays)


@pytest.mark.parametrize("op", MOVED)
def test_what_moves_values_keeps_their_grid(op):
    inputs, attributes = MOVED[op]
    scaled = [array * GRID if array.shape == X.shape and array.dtype == X.dtype else array
              for array in inputs]  # fmt: skip

    assert on_grid(computed(op, scaled, **attributes))
    assert keeps_grid(surgeon(op, inputs, **attributes))


@pytest.mark.parametrize("case", OFF)
def test_what_computes_values_leaves_their_grid(case):
    op, inputs, attributes = OFF[case]

    assert not on_grid(computed(op, [inputs[0] * GRID, *inputs[1:]], **attributes))
    assert not keeps_grid(surgeon(op, inputs, **attributes))


def test_a_pad_with_zero_and_one_whose_value_is_left_out_keep_a_grid():
    axes = gs.Constant("axes", ints(2, 3))
    left_out = surgeon("Pad", [X, ints(1, 1, 1, 1)])
    left_out.inputs += [gs.Variable.empty(), axes]

    assert keeps_grid(surgeon("Pad", [X, PADS, np.array(0, np.float32)]))
    assert keeps_grid(left_out)
    left_out.inputs[2] = gs.Variable("computed", np.float32, ())
    assert not keeps_grid(left_out)


def test_an_op_of_another_domain_is_not_onnx_s():
    node = surgeon("Relu", [X])
    node.domain = "com.microsoft"

    assert not keeps_grid(node)


@pytest.mark.parametrize("op", NONNEGATIVE)
def test_what_counts_as_nonnegative_is(op):
    extremes = np.float32([[-80, -1, -1e-38, 0, 1e-38, 1, 80]])
    (found,) = computed(op, [extremes])

    assert found.min() >= 0


# What multiplies x, the index of the weight, and where in the result one of its channels is.
PRODUCTS = {
    "Conv": ("Conv", (1, 4, 5, 5), (6, 2, 3, 3), {"group": 2}, 1, lambda y: [y[:, 2]]),
    "ConvTranspose": (
        "ConvTranspose", (1, 4, 5, 5), (4, 3, 3, 3), {"group": 2}, 1,
        lambda y: [y[:, 2], y[:, 5]],
    ),
    "Gemm": ("Gemm", (2, 4), (4, 5), {}, 1, lambda y: [y[:, 2]]),
    "Gemm transB": ("Gemm", (2, 4), (5, 4), {"transB": 1}, 1, lambda y: [y[:, 2]]),
    "Gemm on the left": ("Gemm", (5, 4), (4, 2), {}, 0, lambda y: [y[2]]),
    "Gemm transA": ("Gemm", (4, 5), (4, 2), {"transA": 1}, 0, lambda y: [y[2]]),
    "MatMul": ("MatMul", (2, 3, 4), (4, 5), {}, 1, lambda y: [y[..., 2]]),
    "MatMul on the left": ("MatMul", (5, 4), (2, 4, 3), {}, 0, lambda y: [y[:, 2]]),
}  # fmt: skip


@pytest.mark.parametrize("case", PRODUCTS)
def test_a_channel_of_the_weight_is_a_channel_of_the_output(case):
    op, left, right, attributes, index, channel = PRODUCTS[case]
    rng = np.random.default_rng(0)
    operands = [rng.normal(size=shape).astype(np.float32) for shape in (left, right)]
    node = surgeon(op, operands, **attributes)
    other = gs.Variable("x", np.float32, operands[1 - index].shape)
    weight = gs.Constant("w", operands[index])
    node.inputs = [other, weight] if index else [weight, other]
    axis = channel_axis(node, index, operands[index].ndim)
    before = run_ort(*model_of(op, operands, **attributes))[0]
    np.moveaxis(operands[index], axis, 0)[2] *= 2
    after = run_ort(*model_of(op, operands, **attributes))[0]

    assert weight_index(node) == index
    for one in channel(before):
        one *= 2
    np.testing.assert_allclose(after, before, rtol=1e-6, atol=1e-6)
    if index:
        assert output_channels(node, right) == before.shape[1 if op in CONVOLUTIONS else -1]


def test_the_weight_of_a_convolution_is_its_kernel_alone():
    node = surgeon("Conv", [np.zeros((1, 2, 5, 5), np.float32), np.zeros((3, 2, 3, 3), np.float32)])
    kernel = node.inputs[1]
    node.inputs = [gs.Constant("image", np.ones((1, 2, 5, 5), np.float32)), kernel]
    assert weight_index(node) == 1
    assert channel_axis(node, 0, 4) is None

    node.inputs = [node.inputs[0], gs.Variable("computed", np.float32, (3, 2, 3, 3))]
    assert weight_index(node) is None


def test_of_two_constant_factors_the_right_one_is_the_weight():
    node = surgeon("MatMul", [np.ones((2, 2), np.float32)] * 3)
    node.inputs = node.inputs[1:]

    assert weight_index(node) == 1


def test_a_gemm_that_multiplies_its_bias_has_no_integers_for_it():
    shapes = [np.zeros((2, 4), np.float32), np.zeros((4, 5), np.float32)]

    assert bias_channels(surgeon("Gemm", shapes), (4, 5)) == 5
    assert bias_channels(surgeon("Gemm", shapes, beta=0.5), (4, 5)) is None
    assert bias_channels(surgeon("Gemm", shapes, alpha=2.0), (4, 5)) is None
    assert bias_channels(surgeon("MatMul", shapes), (4,)) is None


def test_inputs_by_role():
    shapes = [np.zeros((1, 2), np.float32)] * 3

    assert [t.name for t in data_inputs(surgeon("LayerNormalization", shapes))] == ["x"]
    assert [t.name for t in data_inputs(surgeon("Concat", shapes, axis=0))] == ["x", "c0", "c1"]
    assert [bias_index(surgeon(op, shapes)) for op in ("Conv", "MatMul", "Tanh")] == [2, None, None]
    assert {*WEIGHTED} == {"Conv", "ConvTranspose", "Gemm", "MatMul"}
    assert {*MATRIX_PRODUCTS} == {"Gemm", "MatMul"}


@pytest.mark.parametrize("op", ["LayerNormalization", "InstanceNormalization"])
def test_the_scale_of_a_normalization_has_a_point_its_bias_has_none(op):
    weights = {name: np.ones(4, np.float32) for name in ("scale", "bias")}
    graph = helper.make_graph(
        [helper.make_node(op, ["x", "scale", "bias"], ["y"], name="n")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4, 4])],
        [numpy_helper.from_array(values, name) for name, values in weights.items()],
    )
    opsets = [helper.make_opsetid("", 17)]
    model = from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=8))
    table = OpRule(inputs="a", outputs="a", weight="a")
    rule = HardwareRule(
        name="test", vendor="v", summary="s", sources=("s",), weight_bits=(8,),
        activation_bits=(8,), specs={"a": RuleSpec(bits=8)}, ops={op: table},
    )  # fmt: skip
    roles = {point.tensor: point.role for point in make_plan(model.graph, rule).points}

    assert roles == {"x": "activation", "y": "activation", "scale": "weight"}
