"""The integer grid against two independent implementations of QuantizeLinear, and its laws."""

from __future__ import annotations

import msgspec
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator

from onnxqat.errors import PlanError
from onnxqat.qparams import (
    FloatArray,
    QuantParams,
    QuantSpec,
    choose_qparams,
    dequantize,
    fake_quantize,
    quantize,
    quantized_range,
    storage_dtype,
)

SPECS = [
    QuantSpec(bits=bits, signedness=signedness, symmetric=symmetric, narrow_range=narrow, axis=axis)
    for bits in (2, 4, 7, 8)
    for signedness in ("signed", "unsigned")
    for symmetric in (True, False)
    for narrow in (False, True)
    for axis in (None, 1)
]


def name_of(spec: QuantSpec) -> str:
    kind = "int" if spec.signedness == "signed" else "uint"
    flags = ["asymmetric"] * (not spec.symmetric) + ["narrow"] * spec.narrow_range
    return "-".join([f"{kind}{spec.bits}", *flags, *([f"axis{spec.axis}"] if spec.axis else [])])


def qdq_model(
    params: QuantParams, spec: QuantSpec, shape: tuple[int, ...], opset: int
) -> onnx.ModelProto:
    """Build QuantizeLinear, Clip, DequantizeLinear as a file holds them."""
    qmin, qmax = quantized_range(spec, signed=params.signed)
    dtype = params.zero_point.dtype
    constants = {
        "s": params.scale,
        "z": params.zero_point,
        "qmin": np.asarray(qmin, dtype),
        "qmax": np.asarray(qmax, dtype),
    }
    axis = {} if spec.axis is None else {"axis": spec.axis}
    nodes = [
        onnx.helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], **axis),
        onnx.helper.make_node("Clip", ["q", "qmin", "qmax"], ["c"]),
        onnx.helper.make_node("DequantizeLinear", ["c", "s", "z"], ["y"], **axis),
    ]
    graph = onnx.helper.make_graph(
        nodes,
        "qdq",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, shape)],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, shape)],
        [onnx.numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()],
    )
    imports = [onnx.helper.make_opsetid("", opset)]
    return onnx.helper.make_model(graph, opset_imports=imports, ir_version=9)


def samples(params: QuantParams, spec: QuantSpec) -> FloatArray:
    """Return shape (n, 3, 1): ties, levels, values just beside them, far outside, tiny ones."""
    steps = np.arange(-300, 301, dtype=np.float32) / np.float32(2)
    ties = steps[:, None] * np.broadcast_to(params.scale, (3,))
    noise = np.random.default_rng(7).standard_normal((400, 3)).astype(np.float32)
    special = np.float32([0.0, -0.0, 1e-30, -1e-30, 1e30, -1e30, 3.4e38, -3.4e38])
    rows = [ties, np.nextafter(ties, np.float32(np.inf)), np.nextafter(ties, np.float32(-np.inf))]
    rows += [noise, 100 * noise, np.repeat(special[:, None], 3, axis=1)]
    return np.concatenate(rows).astype(np.float32)[..., None]


def make_params(spec: QuantSpec) -> QuantParams:
    low, high = np.float32([-1.3, -0.07, -2.0]), np.float32([0.9, 3.3, 0.0])
    if spec.axis is None:
        low, high = low[0].reshape(()), high[1].reshape(())
    return choose_qparams(low, high, spec)


@pytest.mark.parametrize("spec", SPECS, ids=name_of)
def test_equals_both_onnx_implementations(spec: QuantSpec) -> None:
    params = make_params(spec)
    x = samples(params, spec)
    model = qdq_model(params, spec, x.shape, opset=13)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    newer = qdq_model(params, spec, x.shape, opset=19)  # the oldest that the evaluator runs
    limit = np.float32(1e6) * params.scale.reshape(-1, 1)
    near = np.clip(x, -limit, limit)  # the evaluator casts to int32 before it saturates
    reference = ReferenceEvaluator(newer).run(None, {"x": near})[0]

    actual = fake_quantize(x, params, spec)

    assert actual.dtype == np.float32
    np.testing.assert_array_equal(actual, session.run(None, {"x": x})[0])
    np.testing.assert_array_equal(actual, reference)


@pytest.mark.parametrize("bits", [9, 12, 16])
@pytest.mark.parametrize("signedness", ["signed", "unsigned"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_wide_integers_match_exact_arithmetic(bits: int, signedness: str, symmetric: bool) -> None:
    spec = QuantSpec(bits=bits, signedness=signedness, symmetric=symmetric)  # type: ignore[arg-type]
    params = choose_qparams(np.float32(-1.3), np.float32(0.9), spec)
    x = np.random.default_rng(1).uniform(-3, 3, 5000).astype(np.float32)
    qmin, qmax = quantized_range(spec, signed=params.signed)
    levels = np.rint((x / params.scale).astype(np.float64)) + int(params.zero_point)

    q = quantize(x, params, spec)

    assert q.dtype == np.dtype("int16" if signedness == "signed" else "uint16")
    np.testing.assert_array_equal(q, np.clip(levels, qmin, qmax))


@pytest.mark.parametrize(
    ("bits", "signed", "narrow", "expected"),
    [
        (8, True, False, (-128, 127)),
        (8, True, True, (-127, 127)),
        (8, False, False, (0, 255)),
        (4, True, False, (-8, 7)),
        (4, True, True, (-7, 7)),
        (4, False, False, (0, 15)),
        (2, True, False, (-2, 1)),
        (16, True, False, (-32768, 32767)),
        (16, False, False, (0, 65535)),
    ],
)
def test_quantized_range(bits: int, signed: bool, narrow: bool, expected: tuple[int, int]) -> None:
    spec = QuantSpec(bits=bits, narrow_range=narrow)
    assert expected == quantized_range(spec, signed=signed)


@pytest.mark.parametrize(
    ("bits", "signed", "expected"),
    [(2, True, "int8"), (8, False, "uint8"), (9, True, "int16"), (16, False, "uint16")],
)
def test_storage_dtype(bits: int, signed: bool, expected: str) -> None:
    assert np.dtype(expected) == storage_dtype(QuantSpec(bits=bits), signed=signed)


LAWFUL_SPECS = st.builds(
    QuantSpec,
    bits=st.integers(2, 16),
    signedness=st.sampled_from(["signed", "unsigned", "from_range"]),
    symmetric=st.booleans(),
    narrow_range=st.booleans(),
)
ENDS = st.floats(2**-20, 2**20, width=32)


@settings(max_examples=200, deadline=None)
@given(spec=LAWFUL_SPECS, low=ENDS, high=ENDS, seed=st.integers(0, 2**32 - 1))
def test_laws(spec: QuantSpec, low: float, high: float, seed: int) -> None:
    params = choose_qparams(np.float32(-low), np.float32(high), spec)
    qmin, qmax = quantized_range(spec, signed=params.signed)
    zero_point, scale = int(params.zero_point), float(params.scale)
    x = np.random.default_rng(seed).uniform(-2 * low, 2 * high, 200).astype(np.float32)

    y = fake_quantize(x, params, spec)

    assert qmin <= zero_point <= qmax
    assert fake_quantize(np.float32([0.0, -0.0]), params, spec).tolist() == [0.0, 0.0]
    np.testing.assert_array_equal(y, fake_quantize(y, params, spec))
    inside = (x >= (qmin - zero_point) * scale) & (x <= (qmax - zero_point) * scale)
    # x / s and q * s are each rounded once: half an ulp of a value below 2 * max(low, high)
    slack = np.spacing(np.float32(2 * max(low, high)))
    error = np.abs(y.astype(np.float64) - x)[inside]
    assert np.all(error <= scale / 2 + slack)


@settings(max_examples=200, deadline=None)
@given(spec=LAWFUL_SPECS, low=ENDS, high=ENDS)
def test_every_level_survives_a_round_trip(spec: QuantSpec, low: float, high: float) -> None:
    params = choose_qparams(np.float32(-low), np.float32(high), spec)
    qmin, qmax = quantized_range(spec, signed=params.signed)
    q = np.arange(qmin, qmax + 1).astype(params.zero_point.dtype)
    np.testing.assert_array_equal(q, quantize(dequantize(q, params, spec), params, spec))


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_range_is_covered(symmetric: bool) -> None:
    spec = QuantSpec(symmetric=symmetric)
    ends = np.float32([-0.7, 2.1])
    params = choose_qparams(ends[0], ends[1], spec)
    error = np.abs(fake_quantize(ends, params, spec) - ends)
    # an asymmetric zero_point is rounded, which may cost one end half a level more
    assert np.all(error <= params.scale * (0.5 if symmetric else 1.0) * (1 + 1e-5))


def test_narrow_range_leaves_out_the_most_negative_level() -> None:
    wide, narrow = QuantSpec(bits=4), QuantSpec(bits=4, narrow_range=True)
    x = np.float32([-8.0, -7.0, 7.0, 8.0])
    params = choose_qparams(np.float32(-7), np.float32(7), wide)
    assert fake_quantize(x, params, wide).tolist() == [-8.0, -7.0, 7.0, 7.0]
    assert fake_quantize(x, params, narrow).tolist() == [-7.0, -7.0, 7.0, 7.0]


@pytest.mark.parametrize(
    ("low", "dtype"), [(0.0, "uint8"), (0.5, "uint8"), (-1e-6, "int8"), (-1.0, "int8")]
)
def test_from_range_is_unsigned_without_negatives(low: float, dtype: str) -> None:
    spec = QuantSpec(signedness="from_range")
    params = choose_qparams(np.float32(low), np.float32(1.0), spec)
    largest = 255 if dtype == "uint8" else 127
    assert np.dtype(dtype) == params.zero_point.dtype
    assert np.float32(1.0) / np.float32(largest) == params.scale


def test_from_range_takes_one_dtype_for_all_channels() -> None:
    spec = QuantSpec(signedness="from_range", axis=0)
    params = choose_qparams(np.float32([0.0, -1.0]), np.float32([1.0, 1.0]), spec)
    assert params.signed
    assert (2,) == params.scale.shape == params.zero_point.shape


def test_a_range_is_widened_to_hold_zero() -> None:
    spec = QuantSpec(signedness="unsigned", symmetric=False)
    positive = choose_qparams(np.float32(2.0), np.float32(2.55), spec)
    negative = choose_qparams(np.float32(-2.55), np.float32(-2.0), spec)
    assert (int(positive.zero_point), int(negative.zero_point)) == (0, 255)
    assert np.float32(2.55 / 255) == positive.scale == negative.scale


def test_fixed_range_wins_over_the_data() -> None:
    spec = QuantSpec(signedness="unsigned", fixed_range=(0.0, 1.0))
    params = choose_qparams(np.float32(-9), np.float32(9), spec)
    assert np.float32(1) / np.float32(255) == params.scale


@pytest.mark.parametrize("symmetric", [True, False])
def test_all_zero_channels_get_a_positive_scale(symmetric: bool) -> None:
    spec = QuantSpec(symmetric=symmetric, axis=0, min_range=1e-6)
    params = choose_qparams(np.float32([0, -1]), np.float32([0, 1]), spec)
    levels = 127 if symmetric else 255
    assert np.float32(1e-6 / levels) == pytest.approx(params.scale[0], rel=2**-22)
    assert fake_quantize(np.zeros((2, 1), np.float32), params, spec).tolist() == [[0.0], [0.0]]


def test_a_scale_is_raised_to_the_largest_over_the_ratio() -> None:
    spec = QuantSpec(axis=0, scale_ratio=16)
    ends = np.float32([127, 127 / 8, 0.5, 0])
    params = choose_qparams(-ends, ends, spec)

    assert params.scale.tolist() == [1, 1 / 8, 1 / 16, 1 / 16]
    rows = fake_quantize(np.float32([[127], [1], [0.5], [0.01]]), params, spec)
    assert rows.tolist() == [[127], [1], [0.5], [0]]


def test_the_widest_range_has_a_finite_scale() -> None:
    largest = np.finfo(np.float32).max
    params = choose_qparams(-largest, largest, QuantSpec(symmetric=False))
    assert np.isfinite(params.scale)


@pytest.mark.parametrize(
    ("low", "high"), [(np.nan, 1), (0, np.inf), (-np.inf, 0), (1, -1), ([0, 1], [1, 0])]
)
def test_a_range_that_is_no_interval_is_refused(low: object, high: object) -> None:
    with pytest.raises(PlanError, match="is not a finite interval"):
        choose_qparams(np.float32(low), np.float32(high), QuantSpec())


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_scale_of_zero_is_refused(symmetric: bool) -> None:
    spec = QuantSpec(symmetric=symmetric, min_range=0.0)
    with pytest.raises(PlanError, match=r"too narrow for a float32 scale\. Raise min_range"):
        choose_qparams(np.float32(0), np.float32(0), spec)


def test_of_many_ranges_the_one_without_a_scale_is_named() -> None:
    low, high = np.float32([-1, 0, -2]), np.float32([1, 1e-45, 2])
    with pytest.raises(PlanError, match=r"Clipping range \[0\.0, 1\.\d*e-45\] is too narrow"):
        choose_qparams(low, high, QuantSpec(axis=0, min_range=0.0))


def test_inputs_are_unchanged() -> None:
    spec = QuantSpec(axis=0)
    low, high = np.float32([1, -1]), np.float32([2, 1])
    x = np.float32([[5, -5], [0.3, 0.1]])
    copies = [a.copy() for a in (low, high, x)]
    fake_quantize(x, choose_qparams(low, high, spec), spec)
    for array, copy in zip((low, high, x), copies, strict=True):
        np.testing.assert_array_equal(array, copy)


def test_same_as_compares_every_bit() -> None:
    spec = QuantSpec(symmetric=False)
    params = choose_qparams(np.float32(-1), np.float32(1), spec)
    unsigned = msgspec.structs.replace(spec, signedness="unsigned")
    nudged = QuantParams(
        scale=np.nextafter(params.scale, np.float32(1)), zero_point=params.zero_point
    )
    assert params.same_as(choose_qparams(np.float32(-1), np.float32(1), spec))
    assert not params.same_as(nudged)
    assert not params.same_as(choose_qparams(np.float32(-1), np.float32(1), unsigned))


@settings(max_examples=200, deadline=None)
@given(
    low=ENDS, ratio=st.floats(0.97, 1.03), bits=st.sampled_from([3, 4, 8]), unsigned=st.booleans()
)
def test_a_zero_point_off_the_center_costs_at_most_two_levels(
    low: float, ratio: float, bits: int, unsigned: bool
) -> None:
    kind = "unsigned" if unsigned else "signed"
    plain = QuantSpec(bits=bits, signedness=kind, symmetric=False)
    spec = msgspec.structs.replace(plain, off_center=True)
    ends = np.float32([-low, low * ratio])
    params, before = (choose_qparams(*ends, s) for s in (spec, plain))
    qmin, qmax = quantized_range(spec, signed=not unsigned)
    levels = [(end - int(params.zero_point)) * float(params.scale) for end in (qmin, qmax)]

    assert int(params.zero_point) != (128 if unsigned else 0)
    if int(before.zero_point) != (128 if unsigned else 0):
        assert params.same_as(before)
        return
    assert levels[0] <= ends[0] * (1 - 1e-6)  # nothing of the range is clipped
    assert levels[1] >= ends[1] * (1 - 1e-6)
    fewest = 2 ** (bits - 1) - 2  # levels that the shorter side has left
    assert params.scale <= max(low, low * ratio) / fewest * (1 + 1e-6)


def test_zero_points_off_the_center_per_axis() -> None:
    spec = QuantSpec(symmetric=False, off_center=True, axis=0)
    low, high = np.float32([-1, -1, -127.6]), np.float32([0.999, 3, 126.4])
    params = choose_qparams(low, high, spec)

    assert params.zero_point.tolist() == [-1, -64, 1]
    np.testing.assert_allclose(params.scale, [1 / 127, 4 / 255, 126.4 / 126], rtol=1e-6)
