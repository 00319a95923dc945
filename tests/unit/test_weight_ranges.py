"""The clipping range of a weight, against brute force on its values."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from onnxqat.calibration.observers import weight_range
from onnxqat.calibration.observers.weights import WeightMethod
from onnxqat.errors import DataError, PlanError
from onnxqat.qparams import FloatArray, QuantSpec, choose_qparams, fake_quantize
from tests.unit.test_observers import heavy, normal, squared_error

WEIGHT_SPECS = [
    QuantSpec(bits=bits, symmetric=symmetric, narrow_range=narrow, axis=axis)
    for bits in (2, 4, 8)
    for symmetric in (True, False)
    for narrow in (False, True)
    for axis in (None, 0, 1, -1)
]


def channel_errors(w: FloatArray, spec: QuantSpec, method: str) -> FloatArray:
    low, high = weight_range(w, spec, method)  # type: ignore[arg-type]
    params = choose_qparams(low, high, spec)
    error = (fake_quantize(w, params, spec).astype(np.float64) - w) ** 2
    if spec.axis is None:
        return error.sum()
    return np.moveaxis(error, spec.axis, 0).reshape(w.shape[spec.axis], -1).sum(axis=1)


@pytest.mark.parametrize("spec", WEIGHT_SPECS, ids=str)
def test_weight_mse_is_never_worse_than_minmax(spec: QuantSpec) -> None:
    w = heavy(8 * 6 * 9).reshape(8, 6, 3, 3)
    w[3] = 0
    mse, minmax = channel_errors(w, spec, "mse"), channel_errors(w, spec, "minmax")
    assert np.all(mse <= minmax)
    if spec.bits < 8:  # at 8 bits there is next to nothing to gain
        assert np.sum(mse) < np.sum(minmax)


@pytest.mark.parametrize("axis", [None, 0, 2, -1])
def test_weight_range_shapes_and_minmax(axis: int | None) -> None:
    w = normal(4 * 5 * 6).reshape(4, 5, 6)
    others = None if axis is None else tuple(i for i in range(3) if i != axis % 3)
    low, high = weight_range(w, QuantSpec(axis=axis), "minmax")
    np.testing.assert_array_equal(low, w.min(axis=others))
    np.testing.assert_array_equal(high, w.max(axis=others))
    assert (np.dtype(np.float32), () if axis is None else (w.shape[axis],)) == (
        low.dtype,
        low.shape,
    )
    assert isinstance(low, np.ndarray)


def test_weight_mse_treats_each_channel_alone() -> None:
    w = np.stack([normal(500), heavy(500), np.zeros(500, np.float32)])
    spec = QuantSpec(bits=4, axis=0)
    low, high = weight_range(w, spec, "mse")
    for channel in range(3):
        one = weight_range(w[channel], msgspec.structs.replace(spec, axis=None), "mse")
        assert (low[channel], high[channel]) == one


def test_weight_mse_finds_the_best_of_its_factors() -> None:
    w, spec = heavy(3000), QuantSpec(bits=4)
    errors = {
        factor: squared_error(w, w.min() * np.float32(factor), w.max() * np.float32(factor), spec)
        for factor in np.arange(100, 19, -1) / 100
    }
    best = np.float32(min(errors, key=errors.__getitem__))
    assert (w.min() * best, w.max() * best) == weight_range(w, spec, "mse")


@pytest.mark.parametrize("method", ["minmax", "mse"])
def test_weight_errors(method: str) -> None:
    spec = QuantSpec(axis=4)
    with pytest.raises(PlanError, match=r"shape \(2, 2\) has no axis 4"):
        weight_range(np.ones((2, 2), np.float32), spec, method)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"shape \(0, 2\) is empty"):
        weight_range(np.ones((0, 2), np.float32), QuantSpec(), method)  # type: ignore[arg-type]
    for bad in (np.nan, np.inf):
        w = np.float32([[1, 2], [3, bad]])
        with pytest.raises(DataError, match="contains NaN or infinity"):
            weight_range(w, QuantSpec(axis=0), method)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["minmax", "mse"])
def test_weights_are_unchanged(method: str) -> None:
    w = normal(24).reshape(4, 6)
    copy = w.copy()
    weight_range(w, QuantSpec(axis=1), method)  # type: ignore[arg-type]
    np.testing.assert_array_equal(w, copy)


def test_weight_mse_takes_the_largest_of_equally_good_ranges() -> None:
    """A scale that is a power of two is the same for many factors."""
    w = np.float32([[0.75, -0.5, 0.25, 0.0]])
    spec = QuantSpec(bits=8, axis=0, power_of_two=True)
    low, high = weight_range(w, spec, "mse")
    np.testing.assert_array_equal([low[0], high[0]], [-0.5, 0.75])


@pytest.mark.parametrize("method", ["minmax", "mse"])
def test_range_factor_multiplies_the_range_of_a_weight(method: WeightMethod) -> None:
    w, spec = heavy(60).reshape(5, 12), QuantSpec(bits=4, axis=0)
    half = msgspec.structs.replace(spec, range_factor=0.5)
    for found, whole in zip(
        weight_range(w, half, method), weight_range(w, spec, method), strict=True
    ):
        np.testing.assert_array_equal(found, whole / 2)


def brute_force(w: FloatArray, spec: QuantSpec) -> tuple[FloatArray, FloatArray]:
    """Try every factor on every row."""
    low, high = w.min(axis=1), w.max(axis=1)
    best, factors = np.full(len(w), np.inf), np.ones(len(w), np.float32)
    for factor in (np.arange(100, 19, -1) / 100).astype(np.float32):
        difference = fake_quantize(w, choose_qparams(low * factor, high * factor, spec), spec) - w
        errors = np.einsum("cn,cn->c", difference, difference, dtype=np.float64)
        factors[errors < best] = factor
        best = np.minimum(best, errors)
    return low * factors, high * factors


@pytest.mark.parametrize("shape", [(12, 9), (5, 400), (3, 70_000)])
@pytest.mark.parametrize("bits", [2, 4, 8, 16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_rows_that_are_left_early_had_their_best_factor(
    shape: tuple[int, int], bits: int, symmetric: bool
) -> None:
    spec = QuantSpec(bits=bits, symmetric=symmetric, axis=0)
    w = heavy(int(np.prod(shape))).reshape(shape)
    w[1:] *= np.float32(1e-3)
    w[2] = np.abs(w[2])
    for found, expected in zip(weight_range(w, spec, "mse"), brute_force(w, spec), strict=True):
        np.testing.assert_array_equal(found, expected)
