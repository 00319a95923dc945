"""What each observer picks, against brute force on the values themselves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import get_args

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxqat.calibration.observers import OBSERVERS, Observer
from onnxqat.calibration.observers.extremes import (
    AverageObserver,
    MinMaxObserver,
    MovingAverageObserver,
)
from onnxqat.calibration.observers.histogram import Histogram
from onnxqat.calibration.observers.percentile import PercentileObserver
from onnxqat.calibration.observers.squared_error import (
    MseObserver,
    SquaredError,
    _search,
    _search_ends,
)
from onnxqat.choices import ObserverName
from onnxqat.errors import DataError, PlanError
from onnxqat.qparams import FloatArray, QuantSpec, choose_qparams, fake_quantize

SPEC = QuantSpec(signedness="from_range")
OF_BATCHES = ("moving-average", "average", "auto")  # for which it counts what is one batch
OF_ALL = [kind for name, kind in OBSERVERS.items() if name not in OF_BATCHES]
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
    with pytest.raises(DataError, match=r"^conv1: contains NaN or infinity"):
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
    if observer in OF_ALL:
        assert whole == single


def test_the_table_holds_every_observer() -> None:
    assert tuple(OBSERVERS) == get_args(ObserverName)
    assert len(set(OBSERVERS.values())) == len(OBSERVERS)


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


def test_average_is_the_mean_with_the_first_batch_twice() -> None:
    """Which is what the running mean that starts at two comes to."""
    batches = [normal(64, seed) * np.float32(seed + 1) for seed in range(20)]
    ends = np.array([[b.min(), b.max()] for b in [batches[0], *batches]], np.float64)
    np.testing.assert_allclose(seen(AverageObserver(SPEC), *batches), ends.mean(axis=0), rtol=1e-7)


@EACH
def test_range_factor_multiplies_what_was_picked(observer: type[Observer]) -> None:
    half = msgspec.structs.replace(SPEC, range_factor=0.5)
    low, high = seen(observer(SPEC), heavy(5000))
    assert seen(observer(half), heavy(5000)) == (low / 2, high / 2)
    forced = msgspec.structs.replace(half, fixed_range=(0.0, 1.0))
    assert seen(observer(forced), heavy(5000)) == (0.0, 1.0)


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


@settings(max_examples=20, deadline=None)
@given(
    exponents=st.lists(st.integers(-120, 120), min_size=1, max_size=6),
    seed=st.integers(0, 2**32 - 1),
    order=st.randoms(use_true_random=False),
)
@pytest.mark.parametrize("observer", OF_ALL)
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


@settings(max_examples=20, deadline=None)
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


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), exponent=st.integers(-149, 127), size=st.integers(1, 300))
def test_bins_hold_what_numpy_counts(seed: int, exponent: int, size: int) -> None:
    """Against the definition in float64, which holds every float32 and its quotient."""
    rng = np.random.default_rng(seed)
    x = np.ldexp(rng.choice([-1.0, -0.5, -0.25, 0.0, 1e-3, 0.75, 1.0], size), exponent)
    x = np.append(x, np.ldexp(rng.uniform(-1, 1, size), exponent)).astype(np.float32)
    histogram = Histogram()
    histogram.add(x, float(np.abs(x).max()))
    edges, counts = histogram.occupied()
    nonzero = x[x != 0].astype(np.float64)
    expected = Counter(np.floor(nonzero / histogram.width).tolist())

    assert (
        Counter(dict(zip(edges[:-1] / histogram.width, counts.tolist(), strict=True))) + Counter()
        == expected
    )
    assert histogram.zeros == x.size - nonzero.size


def test_chunks_of_a_large_batch_are_all_counted() -> None:
    x = normal(200_001)
    whole, parts = Histogram(), Histogram()
    whole.add(x, float(np.abs(x).max()))
    for part in np.array_split(x, 50):
        parts.add(part, float(np.abs(part).max()))
    np.testing.assert_array_equal(whole.occupied()[1], parts.occupied()[1])
    assert whole.occupied()[1].sum() == np.count_nonzero(x)


def test_memory_does_not_grow_with_the_samples() -> None:
    observer = MseObserver(SPEC)
    sizes = set()
    for step in range(20):
        observer.update(normal(1000) * np.float32(2.0**step))
        edges, counts = observer._seen.histogram.occupied()
        sizes.add(counts.size <= 2**14 and edges.size == counts.size + 1)
        assert int(counts.sum()) + observer._seen.histogram.zeros == 1000 * (step + 1)
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


def plain_squared_error(x: FloatArray, low: float, high: float, spec: QuantSpec) -> float:
    return squared_error(x, low, high, spec) * x.size


@pytest.mark.parametrize("make", [normal, relu, heavy, gelu])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_squared_error_is_that_of_the_values(
    make: Callable[[int], FloatArray], bits: int, symmetric: bool
) -> None:
    """To what a bin's width may change: values spread in it, whose rounding error is known."""
    spec = QuantSpec(bits=bits, symmetric=symmetric)
    x = make(100_000)
    histogram = Histogram()
    histogram.add(x, float(np.abs(x).max()))
    error = SquaredError(histogram, spec)
    for factor in (1.0, 0.7, 0.3, 0.02):
        low, high = float(x.min()) * factor, float(x.max()) * factor
        np.testing.assert_allclose(
            error.of(low, high), plain_squared_error(x, low, high, spec), rtol=0.02
        )


def test_the_least_squared_error_is_found_without_looking_at_each() -> None:
    """A bound from what is clipped leaves out ranges, and never the best."""
    spec = QuantSpec(bits=6)
    x = heavy(20_000)
    histogram = Histogram()
    histogram.add(x, float(np.abs(x).max()))
    error = SquaredError(histogram, spec)
    looked = []
    error._error = lambda *grid: looked.append(grid) or SquaredError._error(error, *grid)  # type: ignore[method-assign,func-returns-value]
    highs = np.abs(x).max() * np.random.default_rng(0).permutation(np.arange(1, 200) / 200)
    found = error.least(-highs, highs)

    assert 0 < len(looked) < 190
    errors = [error.of(-high, high) for high in highs.tolist()]
    assert found == int(np.argmin(errors))


def test_of_equal_errors_the_first_range_is_taken() -> None:
    spec = QuantSpec(bits=4, power_of_two=True)
    x = normal(1000)
    histogram = Histogram()
    histogram.add(x, float(np.abs(x).max()))
    highs = np.array([3.0, 2.9, 2.8, 3.0])  # all of scale 0.5
    assert SquaredError(histogram, spec).least(-highs, highs) == 0


def test_mse_moves_the_ends_of_an_asymmetric_range_twice() -> None:
    """The best place of one end depends on the other, so that a second pass still gains."""
    spec = QuantSpec(bits=2, symmetric=False, signedness="unsigned")
    rng = np.random.default_rng(1)
    tail, hump = rng.standard_t(2.5, 3000), rng.uniform(0, 6)
    x = np.append(tail, hump + 0.3 * rng.standard_normal(rng.integers(100, 1500)))
    x = x.astype(np.float32)
    observer = MseObserver(spec)
    low, high = seen(observer, x)
    error = SquaredError(observer._seen.histogram, spec)
    magnitude = float(np.abs(x).max())
    start = _search(
        lambda f: (
            np.maximum(float(x.min()), -magnitude * f),
            np.minimum(float(x.max()), magnitude * f),
        ),
        error,
    )
    once = _search_ends(start, error)
    twice = _search_ends(once, error)

    assert error.of(*twice) < 0.8 * error.of(*once)
    assert (low, high) == tuple(np.float32(twice))


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
