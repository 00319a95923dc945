from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_static,
)

from onnxqat.calibration import calibrate
from onnxqat.cli import main
from onnxqat.errors import ModelError
from onnxqat.foreign import read_foreign_qdq, take_over
from onnxqat.model import from_proto
from onnxqat.overrides import parse_override
from onnxqat.plan import make_plan
from onnxqat.preparation import prepare
from onnxqat.quantized import insert_pairs, load_model
from onnxqat.rules import load_rule
from tests.networks import attention, convnet, samples
from tests.oracles import run_ort


class Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, batch: np.ndarray) -> None:
        self.rows = iter([{"input": row[None]} for row in batch])

    def get_next(self) -> Any:
        return next(self.rows, None)


def quantized_by_onnxruntime(
    network: onnx.ModelProto, folder: Path, *, keep_relu: bool = False, per_channel: bool = True
) -> onnx.ModelProto:
    source, target = folder / "float.onnx", folder / "theirs.onnx"
    onnx.save(network, source)
    quantize_static(
        str(source),
        str(target),
        Reader(samples(network, 32)),
        quant_format=QuantFormat.QDQ,
        per_channel=per_channel,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        extra_options={"QDQKeepRemovableActivations": keep_relu},
    )
    return onnx.load(target)


@pytest.mark.parametrize("keep_relu", [True, False], ids=["relu", "relu-left-out"])
def test_a_convnet_of_onnxruntime_computes_the_same_bit_for_bit(
    keep_relu: bool, tmp_path: Path
) -> None:
    network = convnet()
    theirs = quantized_by_onnxruntime(network, tmp_path, keep_relu=keep_relu)
    model = from_proto(theirs)
    before = model.to_proto()

    floats, foreign = read_foreign_qdq(model)

    assert model.to_proto() == before
    kinds = [node.op for node in floats.graph.nodes]
    assert not {"QuantizeLinear", "DequantizeLinear"} & set(kinds)
    assert [kinds.count(op) for op in ("Conv", "Gemm")] == [4, 1]
    assert [kinds.count(op) for op in ("Relu", "Clip")] == ([2, 1] if keep_relu else [3, 0])
    prepared = prepare(floats)
    plan = make_plan(prepared.graph, load_rule("onnxruntime-cpu"))
    taken, ignored = take_over(plan, prepared.graph, foreign)
    assert ignored == []
    assert taken.keys() == {p.parameters for p in plan.grid_points()}
    ours = insert_pairs(prepared, plan, taken, state="calibrated").to_proto()
    x = {"input": samples(network, 16, seed=5)}
    assert np.array_equal(run_ort(ours, x)[0], run_ort(theirs, x)[0])
    # and the float model is the one it was made from, up to the rounding of weights and biases
    expected, found = run_ort(network, x)[0], run_ort(floats.to_proto(), x)[0]
    assert np.abs(found - expected).max() < 0.02 * np.abs(expected).max()


def test_an_attention_block_takes_over_what_both_place(tmp_path: Path) -> None:
    network = attention()
    theirs = quantized_by_onnxruntime(network, tmp_path)
    floats, foreign = read_foreign_qdq(from_proto(theirs))
    prepared = prepare(floats)
    plan = make_plan(prepared.graph, load_rule("onnxruntime-cpu"))

    taken, _ = take_over(plan, prepared.graph, foreign)

    # what onnxruntime.quantization stored, read from its file by names
    stored = {t.name: numpy_helper.to_array(t) for t in theirs.graph.initializer}
    for node in theirs.graph.node:
        if node.op_type == "QuantizeLinear" and node.input[0] in taken:
            params = taken[node.input[0]]
            assert np.array_equal(params.scale, stored[node.input[1]])
            assert np.array_equal(params.zero_point, stored[node.input[2]])
    weights = {p.parameters for p in plan.points if p.role == "weight"}
    assert len(taken.keys() & weights) >= 4
    assert len(taken.keys() - weights) >= 10


def pytorch(bias: bool = True) -> onnx.ModelProto:
    """Pairs as PyTorch writes them: float weights behind a pair, int8 activations, no bias pair."""
    rng = np.random.default_rng(0)
    weights = {
        "w": rng.normal(size=(4, 3, 3, 3)).astype(np.float32),
        "b": rng.normal(size=4).astype(np.float32),
        "xs": np.float32(0.02),
        "xz": np.int8(3),
        "ws": rng.uniform(0.01, 0.02, 4).astype(np.float32),
        "wz": np.zeros(4, np.int8),
        "ys": np.float32([0.1]),
        "yz": np.int8([-128]),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "xs", "xz"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "xs", "xz"], ["xd"]),
        helper.make_node("QuantizeLinear", ["w", "ws", "wz"], ["wq"], axis=-4),
        helper.make_node("DequantizeLinear", ["wq", "ws", "wz"], ["wd"], axis=0),
        helper.make_node("Conv", ["xd", "wd", "b"], ["c"], name="conv"),
        helper.make_node("QuantizeLinear", ["c", "ys", "yz"], ["cq"]),
        helper.make_node("DequantizeLinear", ["cq", "ys", "yz"], ["y"], name="end"),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 4, 6, 6])],
        [numpy_helper.from_array(np.asarray(values), name) for name, values in weights.items()],
    )
    opsets = [helper.make_opsetid("", 17)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def test_pairs_of_pytorch() -> None:
    floats, foreign = read_foreign_qdq(from_proto(pytorch()))

    assert [(n.op, n.outputs[0].name) for n in floats.graph.nodes] == [
        ("Conv", "c/uncut"),
        ("Relu", "y"),
    ]
    assert {name: f.axis for name, f in foreign.items() if name in "xwy"} == {
        "x": None,
        "w": 0,
        "y": 1,
    }
    x = {"x": np.random.default_rng(1).normal(size=(2, 3, 8, 8)).astype(np.float32)}
    weights = {t.name: numpy_helper.to_array(t) for t in pytorch().graph.initializer}
    plain = helper.make_model(
        helper.make_graph(
            [
                helper.make_node("Conv", ["x", "w", "b"], ["c"]),
                helper.make_node("Relu", ["c"], ["y"]),
            ],
            "g",
            pytorch().graph.input,
            pytorch().graph.output,
            [numpy_helper.from_array(weights[n], n) for n in "wb"],
        ),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    assert np.array_equal(run_ort(floats.to_proto(), x)[0], run_ort(plain, x)[0])


def test_parameters_that_do_not_fit_the_rule_are_listed() -> None:
    floats, foreign = read_foreign_qdq(from_proto(pytorch()))
    prepared = prepare(floats)

    for rule, names, ignored in (
        ("onnxruntime-cpu", {"w"}, ["x", "y"]),  # wants uint8
        ("sophgo-bm1690", {"w"}, ["x", "y"]),  # wants zero_point 0
        ("tflite", {"w", "x", "y"}, []),  # int8, asymmetric
    ):
        plan = make_plan(prepared.graph, load_rule(rule))
        taken, left = take_over(plan, prepared.graph, foreign)
        assert (taken.keys(), sorted(left)) == (names, ignored)
        assert all(p.scale.shape == ((4,) if n == "w" else ()) for n, p in taken.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(
            lambda g: g.node[5].input.__setitem__(1, "xs"),
            "DequantizeLinear 'end' has other parameters than",
            id="differing-pair",
        ),
        pytest.param(
            lambda g: g.node[6].CopyFrom(helper.make_node("Cast", ["cq"], ["y"], to=1)),
            "QuantizeLinear 'cq' passes integers to other nodes",
            id="integers-elsewhere",
        ),
        pytest.param(
            lambda g: g.node[0].CopyFrom(helper.make_node("Cast", ["x"], ["xq"], to=3)),
            "DequantizeLinear 'xd' does not follow a QuantizeLinear",
            id="no-quantize",
        ),
        pytest.param(
            lambda g: g.node[5].input.__setitem__(1, "x"),
            "QuantizeLinear 'cq' has no positive float32 scale",
            id="computed-scale",
        ),
    ],
)
def test_what_is_not_a_pair_is_named(change: Any, message: str) -> None:
    proto = pytorch()
    change(proto.graph)

    with pytest.raises(ModelError, match=f"m: {message}"):
        read_foreign_qdq(from_proto(proto, name="m"))


def test_a_float_model_and_one_of_ours_are_left_alone() -> None:
    floats = from_proto(convnet())

    assert read_foreign_qdq(floats) == (floats, {})


# the command


def test_the_command_takes_over_everything(tmp_path: Path) -> None:
    network = convnet()
    theirs = quantized_by_onnxruntime(network, tmp_path)
    out = tmp_path / "ours.onnx"

    result = CliRunner().invoke(
        main, ["insert", str(tmp_path / "theirs.onnx"), "-o", str(out), "--json"]
    )

    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["state"] == "calibrated"
    assert "15 of 15 parameters were taken from the model's pairs." in result.stderr
    model = load_model(out)
    x = {"input": samples(network, 16, seed=5)}
    assert np.array_equal(run_ort(model.to_proto(), x)[0], run_ort(theirs, x)[0])
    assert model.state == "calibrated"
    assert "QuantizeLinear" not in [n.op for n in model.floats.graph.nodes]


def test_what_is_missing_is_measured_and_the_rest_stays(tmp_path: Path) -> None:
    from_proto(pytorch()).save(tmp_path / "m.onnx")
    out = tmp_path / "ours.onnx"

    result = CliRunner().invoke(
        main, ["insert", str(tmp_path / "m.onnx"), "--rules", "onnxruntime-cpu", "-o", str(out)]
    )

    assert result.exit_code == 0, result.output
    assert "1 of 3 parameters were taken from the model's pairs." in result.stderr
    assert "Calibration will measure the others: x, y." in result.stderr
    assert "Ignored pairs that do not fit the rule: x, y." in result.stderr
    model = load_model(out)
    assert model.state == "uncalibrated"
    batch = np.random.default_rng(1).normal(size=(4, 3, 8, 8)).astype(np.float32)
    calibrated = calibrate(model, [{"x": batch}], observer="minmax")
    params = calibrated.params
    stored = {t.name: numpy_helper.to_array(t) for t in pytorch().graph.initializer}
    assert np.array_equal(params["w"].scale, stored["ws"])
    assert float(params["x"].scale) == pytest.approx((batch.max() - batch.min()) / 255)
    assert calibrated.plan.rule == "onnxruntime-cpu"


# --- a Clip between the pair: PyTorch's 0 to 127, Brevitas' fewer bits ------------------------


def clipped(limits: tuple[int, int], dtype: Any, *, stored: bool = False) -> onnx.ModelProto:
    """Q, Clip, DQ around x, w and y; the weight may be stored as integers before its Clip."""
    rng = np.random.default_rng(0)
    low, high = limits
    zero_point = dtype(low if np.iinfo(dtype).min == 0 else 0)
    weights = {
        "w": rng.normal(size=(4, 3, 3, 3)).astype(np.float32),
        "q": rng.integers(-128, 127, (4, 3, 3, 3)).astype(np.int8),
        "low": dtype(low),
        "high": dtype(high),
        "wlow": np.int8(-high if low else -64),
        "whigh": np.int8(high if low else 63),
        "s": np.float32(0.03),
        "z": zero_point,
        "ws": rng.uniform(0.02, 0.05, 4).astype(np.float32),
        "wz": np.zeros(4, np.int8),
    }
    nodes = []

    def pair(name: str, target: str, source: str | None = None) -> None:
        weight = name == "w"
        scale, zero = ("ws", "wz") if weight else ("s", "z")
        attributes = {"axis": 0} if weight else {}
        # PyTorch leaves out the end that is that of the type
        ends = ["wlow", "whigh"] if weight else ["" if low == 0 else "low", "high"]
        if source is None:
            operands = [name, scale, zero]
            nodes.append(
                helper.make_node(
                    "QuantizeLinear", operands, [f"{name}_q"], f"{name}_Q", **attributes
                )
            )
        nodes.append(helper.make_node("Clip", [source or f"{name}_q", *ends], [f"{name}_c"]))
        operands = [f"{name}_c", scale, zero]
        nodes.append(helper.make_node("DequantizeLinear", operands, [target], **attributes))

    pair("x", "xd")
    pair("w", "wd", "q" if stored else None)
    nodes.append(helper.make_node("Conv", ["xd", "wd"], ["c"]))
    pair("c", "y")
    read = {name for node in nodes for name in node.input}
    graph = helper.make_graph(
        nodes,
        "clipped",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 4, 6, 6])],
        [numpy_helper.from_array(np.asarray(v), n) for n, v in weights.items() if n in read],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


RANGES = [
    ((0, 127), np.uint8, 7, {}),
    ((0, 3), np.uint8, 2, {}),
    ((0, 15), np.uint8, 4, {}),
    ((-127, 127), np.int8, 8, {"narrow_range": "true"}),
    ((-8, 7), np.int8, 4, {}),
    ((-7, 7), np.int8, 4, {"narrow_range": "true"}),
    ((-2, 1), np.int8, 2, {}),
]


@pytest.mark.parametrize("stored", [False, True], ids=["float weight", "integer weight"])
@pytest.mark.parametrize(("limits", "dtype", "bits", "fields"), RANGES)
def test_a_clip_between_a_pair_is_its_quantized_range(
    limits: tuple[int, int], dtype: Any, bits: int, fields: dict[str, str], stored: bool
) -> None:
    theirs = clipped(limits, dtype, stored=stored)
    floats, foreign = read_foreign_qdq(from_proto(theirs))
    assert not {"QuantizeLinear", "DequantizeLinear", "Clip"} & {n.op for n in floats.graph.nodes}
    assert foreign["x"].limits == foreign["y"].limits == limits
    signedness = "signed" if dtype is np.int8 else "unsigned"
    changes = {"bits": str(bits), "signedness": signedness} | fields
    weight = {"bits": "7" if limits[0] == 0 else str(bits)}
    weight |= {"narrow_range": "true"} if limits[0] else {}
    texts = [f"activation.{k}={v}" for k, v in changes.items()]
    texts += [f"weight.{k}={v}" for k, v in weight.items()]
    prepared = prepare(floats)
    parsed = [parse_override(text) for text in texts]
    plan = make_plan(prepared.graph, load_rule("onnxruntime-cpu"), parsed)
    taken, ignored = take_over(plan, prepared.graph, foreign)
    assert (ignored, len(taken)) == ([], 3)
    ours = insert_pairs(prepared, plan, taken, state="calibrated").to_proto()
    x = {"x": np.random.default_rng(1).normal(size=(2, 3, 8, 8)).astype(np.float32) * 3}
    assert np.array_equal(run_ort(ours, x)[0], run_ort(theirs, x)[0])


def test_a_range_that_the_rule_does_not_have_does_not_fit() -> None:
    floats, foreign = read_foreign_qdq(from_proto(clipped((0, 127), np.uint8)))
    prepared = prepare(floats)
    plan = make_plan(prepared.graph, load_rule("onnxruntime-cpu"))

    assert sorted(take_over(plan, prepared.graph, foreign)[1]) == ["w", "x", "y"]


@pytest.mark.parametrize(
    ("node", "index", "tensor", "message"),
    [
        ("x_q", 0, "", "x_Q' has no input, no scale"),
        ("x_q", 1, "", "x_Q' has no input, no scale"),
        ("xd", 1, "", "xd' has no input, no scale"),
        ("x_c", 1, "x_q", "xd' follows 'Clip_.*', whose limits are not constant"),
        ("x_c", 2, "low", "leaves no range"),
        ("xd", 1, "ws", "xd' has no positive float32 scale"),
        ("c", 0, "x_c", "passes integers to other nodes"),
        ("c", 0, "x_q", "passes integers to other nodes"),
    ],
)
def test_a_pair_that_is_none_is_named(node: str, index: int, tensor: str, message: str) -> None:
    proto = clipped((-127, 127), np.int8)
    for i, other in enumerate(proto.graph.node):
        other.name = other.name or f"{other.op_type}_{i}"
        if other.output[0] == "xd":
            other.name = "xd"
    edited = next(n for n in proto.graph.node if n.output[0] == node)
    edited.input[index] = tensor
    if not tensor:  # of ONNX's own domain, loading refuses it
        edited.domain = "com.microsoft"
        proto.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    with pytest.raises(ModelError, match=message):
        read_foreign_qdq(from_proto(proto))


def test_a_scale_that_is_no_power_of_two_does_not_fit_a_rule_of_shifts() -> None:
    floats, foreign = read_foreign_qdq(from_proto(pytorch()))
    prepared = prepare(floats)
    plan = make_plan(prepared.graph, load_rule("esp32-p4"))

    assert take_over(plan, prepared.graph, foreign)[0] == {}


@pytest.mark.parametrize("zero_point", [3, 0])
def test_a_zero_point_at_the_center_does_not_fit_a_rule_that_excludes_it(zero_point: int) -> None:
    proto = pytorch()
    (stored,) = (t for t in proto.graph.initializer if t.name == "xz")
    stored.CopyFrom(numpy_helper.from_array(np.int8(zero_point), "xz"))
    floats, foreign = read_foreign_qdq(from_proto(proto))
    prepared = prepare(floats)
    plan = make_plan(prepared.graph, load_rule("rockchip-rk3588"))
    taken = take_over(plan, prepared.graph, foreign)[0]

    assert ("x" in taken) == (zero_point != 0)


@pytest.mark.parametrize("ratio", [2, 1.01])
def test_scales_further_apart_than_a_rule_allows_do_not_fit(ratio: float) -> None:
    floats, foreign = read_foreign_qdq(from_proto(pytorch()))
    prepared = prepare(floats)
    overrides = [parse_override(f"weight.scale_ratio={ratio}")]
    plan = make_plan(prepared.graph, load_rule("tensorrt"), overrides)

    assert ("w" in take_over(plan, prepared.graph, foreign)[0]) == (ratio == 2)
