"""What each observer picks, against brute force on the values themselves."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxqat.calibration.histogram import Histogram
from onnxqat.calibration.observers import (
    OBSERVERS,
    MinMaxObserver,
    MovingAverageObserver,
    MseObserver,
    Observer,
    PercentileObserver,
    weight_range,
)
from onnxqat.errors import DataError, PlanError
from onnxqat.qparams import FloatArray, QuantSpec, choose_qparams, fake_quantize

SPEC = QuantSpec(signedness="from_range")
EACH = pytest.mark.parametrize("observer", OBSERVERS.values(), ids=OBSERVERS)


def seen(observer: Observer, *batches: FloatArray) -> tuple[float, float]:
    for batch in batches:
        observer.update(batch)
    low, high = observer.range()
    return float(low), float(high)


def normal(n: int, seed: int = 0) -> FloatArray:
    return np.random.default_rng(seed).standard_normal(n).astype(np.float32)


def relu(n: int) -> FloatArray:
    return np.maximum(normal(n), 0)


def heavy(n: int) -> FloatArray:
    return np.random.default_rng(3).standard_t(2.5, n).astype(np.float32)


def gelu(n: int) -> FloatArray:
    x = 3 * normal(n)
    return (x / (1 + np.exp(-1.702 * x))).astype(np.float32)


def squared_error(x: FloatArray, low: float, high: float, spec: QuantSpec) -> float:
    params = choose_qparams(np.float32(low), np.float32(high), spec)
    return float(np.mean((fake_quantize(x, params, spec).astype(np.float64) - x) ** 2))


@EACH
def test_range_is_two_float32_of_rank_zero(observer: type[Observer]) -> None:
    one = observer(SPEC)
    one.update(normal(100).reshape(2, 5, 10))
    for end in one.range():
        assert isinstance(end, np.ndarray)
        assert (np.dtype(np.float32), ()) == (end.dtype, end.shape)


@EACH
def test_nothing_seen_is_an_error(observer: type[Observer]) -> None:
    one = observer(SPEC, name="conv1")
    one.update(np.zeros((0, 3), np.float32))
    with pytest.raises(DataError, match=r"^conv1: no value was seen\. Calibrate"):
        one.range()


@EACH
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_values_are_refused_and_leave_no_trace(
    observer: type[Observer], bad: float
) -> None:
    one, other = observer(SPEC, name="conv1"), observer(SPEC)
    expected = seen(other, normal(1000))
    one.update(normal(1000))
    with pytest.raises(DataError, match=r"^conv1: holds nan or infinity"):
        one.update(np.append(normal(100_000, seed=2), np.float32(bad)))
    assert expected == seen(one)


@EACH
def test_per_axis_is_refused(observer: type[Observer]) -> None:
    with pytest.raises(PlanError, match=r"^conv1: .* per-axis \(axis=1\)"):
        observer(QuantSpec(axis=1), name="conv1")


@EACH
def test_fixed_range_wins_over_the_data(observer: type[Observer]) -> None:
    spec = QuantSpec(fixed_range=(0.0, 1.0))
    assert seen(observer(spec)) == (0.0, 1.0)
    assert seen(observer(spec), normal(100)) == (0.0, 1.0)


@EACH
def test_batches_are_neither_changed_nor_kept(observer: type[Observer]) -> None:
    one = observer(SPEC)
    x = normal(1000)
    copy = x.copy()
    one.update(x)
    before = one.range()
    np.testing.assert_array_equal(x, copy)
    x[:] = 1e6
    assert before == one.range()


@EACH
def test_views_count_like_their_copies(observer: type[Observer]) -> None:
    x = normal(4000).reshape(40, 100)
    assert seen(observer(SPEC), x.T[::2].copy()) == seen(observer(SPEC), x.T[::2])


@EACH
@pytest.mark.parametrize("value", [0.0, -0.0, 1.5, -1.5, 1e-40, 3e38, -3e38])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_constant_tensor(observer: type[Observer], value: float, symmetric: bool) -> None:
    spec = QuantSpec(signedness="from_range", symmetric=symmetric)
    low, high = seen(observer(spec), np.full(10, value, np.float32))
    expected = np.float32(value)
    params = choose_qparams(np.float32(low), np.float32(high), spec)
    error = abs(float(fake_quantize(expected.reshape(1), params, spec)[0]) - float(expected))
    # one bin of the histogram, or the smallest clipping range
    assert error <= max(abs(float(expected)) / 4096, 1e-12)


@EACH
def test_values_in_single_elements(observer: type[Observer]) -> None:
    x = normal(50)
    whole = seen(observer(SPEC), x)
    single = seen(observer(SPEC), *(v.reshape(()) for v in x))
    if observer is not MovingAverageObserver:
        assert whole == single


def test_the_table_holds_every_observer() -> None:
    assert list(OBSERVERS) == ["minmax", "moving-average", "percentile", "mse"]
    assert set(OBSERVERS.values()) == set(Observer.__subclasses__())


def test_minmax() -> None:
    assert seen(MinMaxObserver(SPEC), np.float32([1, 2]), np.float32([-3, 0.5])) == (-3.0, 2.0)


def test_moving_average_follows_its_formula() -> None:
    batches = [normal(64, seed) * np.float32(seed + 1) for seed in range(20)]
    low, high = float(batches[0].min()), float(batches[0].max())
    for batch in batches[1:]:
        low = low + 0.01 * (float(batch.min()) - low)
        high = high + 0.01 * (float(batch.max()) - high)
    expected = float(np.float32(low)), float(np.float32(high))
    assert expected == seen(MovingAverageObserver(SPEC), *batches)


def test_moving_average_of_constant_one_is_the_last_batch() -> None:
    observer = MovingAverageObserver(SPEC, constant=1.0)
    assert seen(observer, np.float32([-5, 5]), np.float32([-2, 1])) == (-2.0, 1.0)


@pytest.mark.parametrize("constant", [0.0, -0.1, 1.1, float("nan")])
def test_moving_average_refuses_a_constant(constant: float) -> None:
    with pytest.raises(PlanError, match=r"averaging constant .* is not in \(0, 1\]"):
        MovingAverageObserver(SPEC, constant=constant)


@pytest.mark.parametrize("percentile", [50.0, 100.1, 0.0, float("nan")])
def test_percentile_refuses_a_percentile(percentile: float) -> None:
    with pytest.raises(PlanError, match=r"percentile .* is not in \(50, 100\]"):
        PercentileObserver(SPEC, percentile=percentile)


@pytest.mark.parametrize("make", [normal, relu, heavy, gelu])
@pytest.mark.parametrize("percentile", [90.0, 99.0, 99.9, 99.99, 100.0])
def test_percentile_equals_numpy_to_one_bin(
    make: Callable[[int], FloatArray], percentile: float
) -> None:
    x = make(200_000)
    bin_width = 2.0 ** (np.frexp(np.abs(x).max())[1] - 13)
    high = np.percentile(x.astype(np.float64), percentile, method="inverted_cdf")
    low = -np.percentile(-x.astype(np.float64), percentile, method="inverted_cdf")
    got_low, got_high = seen(PercentileObserver(SPEC, percentile=percentile), *np.split(x, 8))
    assert abs(got_low - low) <= bin_width
    assert abs(got_high - high) <= bin_width


def test_percentile_100_is_minmax() -> None:
    x = heavy(10_000)
    assert seen(MinMaxObserver(SPEC), x) == seen(PercentileObserver(SPEC, percentile=100.0), x)


def test_percentile_of_relu_starts_at_positive_zero() -> None:
    low, _ = seen(PercentileObserver(SPEC), relu(10_000))
    assert (low, np.copysign(1, low)) == (0.0, 1.0)


def test_percentile_does_not_wipe_out_a_sparse_tensor() -> None:
    x = np.zeros(1_000_000, np.float32)
    x[:10] = 2.0
    assert seen(PercentileObserver(SPEC), x) == (0.0, 2.0)


@settings(max_examples=60, deadline=None)
@given(
    exponents=st.lists(st.integers(-120, 120), min_size=1, max_size=6),
    seed=st.integers(0, 2**32 - 1),
    order=st.randoms(use_true_random=False),
)
@pytest.mark.parametrize("observer", [PercentileObserver, MseObserver])
def test_the_order_and_size_of_batches_do_not_matter(
    observer: type[Observer], exponents: list[int], seed: int, order: object
) -> None:
    """A growing histogram holds exactly what one of the final width would have counted."""
    rng = np.random.default_rng(seed)
    batches = [
        np.ldexp(rng.standard_normal(50).astype(np.float32), e).astype(np.float32)
        for e in exponents
    ] + [np.zeros(7, np.float32)]
    shuffled = list(batches)
    order.shuffle(shuffled)  # type: ignore[attr-defined]
    expected = seen(observer(SPEC), np.concatenate(batches))
    assert expected == seen(observer(SPEC), *batches)
    assert expected == seen(observer(SPEC), *shuffled)


@settings(max_examples=60, deadline=None)
@given(
    exponents=st.lists(st.integers(-149, 120), max_size=9),
    seed=st.integers(0, 2**32 - 1),
    workers=st.integers(1, 4),
)
@EACH
def test_observers_that_share_the_batches_pick_what_one_does(
    observer: type[Observer], exponents: list[int], seed: int, workers: int
) -> None:
    """Also where there are fewer batches than observers."""
    rng = np.random.default_rng(seed)
    batches = [np.zeros(7, np.float32)] + [
        np.ldexp(rng.standard_normal(50).astype(np.float32), e).astype(np.float32)
        for e in exponents
    ]
    parts = [observer(SPEC) for _ in range(workers)]
    for part, share in zip(parts, np.array_split(np.arange(len(batches)), workers), strict=True):
        for index in share:
            part.update(batches[index])
    first, *others = parts
    for other in others:
        first.merge(other)

    assert first.range() == seen(observer(SPEC), *batches)
    assert np.signbit(first.range()).tolist() == np.signbit(seen(observer(SPEC), *batches)).tolist()


def test_a_value_too_small_for_the_bins_of_a_large_one_is_counted_below_zero() -> None:
    """Also where it comes last: divided by the width of a bin it is no float32 any more."""
    tiny, huge = np.float32([-1e-45]), np.float32([3e38])
    counted = []
    for values in ((tiny, huge), (huge, tiny)):
        histogram = Histogram()
        for x in values:
            histogram.add(x, float(np.abs(x).max()))
        edges, counts = histogram.occupied()
        counted.append((edges[np.flatnonzero(counts)].tolist(), counts.sum(), histogram.zeros))

    assert counted[0] == counted[1]
    assert counted[0][0][0] < 0


def test_memory_does_not_grow_with_the_samples() -> None:
    observer = MseObserver(SPEC)
    sizes = set()
    for step in range(20):
        observer.update(normal(1000) * np.float32(2.0**step))
        edges, counts = observer._histogram.occupied()
        sizes.add(counts.size <= 2**14 and edges.size == counts.size + 1)
        assert int(counts.sum()) + observer._histogram.zeros == 1000 * (step + 1)
    assert sizes == {True}


MSE_SPECS = [
    QuantSpec(bits=bits, signedness=signedness, symmetric=symmetric, narrow_range=narrow)
    for bits in (2, 4, 8)
    for signedness in ("signed", "unsigned", "from_range")
    for symmetric in (True, False)
    for narrow in (False, True)
]


@pytest.mark.parametrize("make", [normal, relu, heavy, gelu])
@pytest.mark.parametrize("spec", MSE_SPECS, ids=str)
def test_mse_is_as_good_as_brute_force(make: Callable[[int], FloatArray], spec: QuantSpec) -> None:
    """Against 200 thresholds, each measured on the values themselves."""
    x = make(20_000)
    smallest, largest = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    thresholds = max(-smallest, largest) * np.arange(1, 201) / 200
    least = min(squared_error(x, max(smallest, -t), min(largest, t), spec) for t in thresholds)
    observer = MseObserver(spec)
    got = squared_error(x, *seen(observer, *np.split(x, 4)), spec)
    assert got <= 1.01 * least


def test_mse_clips_heavy_tails_and_keeps_a_uniform_range() -> None:
    spec = QuantSpec(bits=4)
    assert seen(MseObserver(spec), heavy(100_000))[1] < 0.1 * heavy(100_000).max()
    uniform = np.linspace(-1, 1, 100_001).astype(np.float32)
    assert seen(MseObserver(spec), uniform)[1] > 0.9


def test_mse_moves_each_end_of_an_asymmetric_range_alone() -> None:
    """One outlier below must not cost the dense upper side its levels, nor its reach."""
    spec = QuantSpec(bits=4, symmetric=False, signedness="unsigned")
    x = np.append(np.linspace(0, 1, 100_000), -8.0).astype(np.float32)
    low, high = seen(MseObserver(spec), x)
    assert -0.5 < low <= 0
    assert 0.9 < high <= 1.0


def test_mse_of_spikes_that_lie_on_a_grid_finds_the_grid() -> None:
    spec = QuantSpec(bits=4, signedness="unsigned")
    x = np.repeat(np.arange(16), 1000).astype(np.float32) / 4
    _, high = seen(MseObserver(spec), x)
    assert abs(high - 15 / 4) <= 0.004 * 15 / 4


def test_zeros_cost_nothing_however_many() -> None:
    spec = QuantSpec(bits=4, signedness="unsigned")
    x = np.abs(normal(5000))
    zeros = np.zeros(1_000_000, np.float32)
    assert seen(MseObserver(spec), x) == seen(MseObserver(spec), zeros, x, zeros)


def test_mse_never_leaves_the_observed_range() -> None:
    low, high = seen(MseObserver(QuantSpec()), gelu(5000))
    assert gelu(5000).min() <= low <= 0 <= high <= gelu(5000).max()


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
        with pytest.raises(DataError, match="holds nan or infinity"):
            weight_range(w, QuantSpec(axis=0), method)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["minmax", "mse"])
def test_weights_are_unchanged(method: str) -> None:
    w = normal(24).reshape(4, 6)
    copy = w.copy()
    weight_range(w, QuantSpec(axis=1), method)  # type: ignore[arg-type]
    np.testing.assert_array_equal(w, copy)
