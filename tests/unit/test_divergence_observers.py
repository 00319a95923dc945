"""Thresholds of least Kullback-Leibler divergence, against loops over all of the data."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from onnxqat.calibration.observers.divergence import (
    TensorrtDivergenceObserver,
    TpuMlirDivergenceObserver,
)
from onnxqat.qparams import FloatArray, QuantSpec
from tests.unit.test_observers import gelu, heavy, normal, relu, seen


def spiked(n: int) -> FloatArray:
    """Return what is mostly close to zero, in the first bin."""
    return np.append(1e-6 * normal(n - n // 4), normal(n // 4)).astype(np.float32)


DATA = pytest.mark.parametrize("make", [normal, relu, heavy, gelu, spiked])


def entropy(p: NDArray[np.float64], q: NDArray[np.float64]) -> float:
    """Return KL(p || q) of two counts, as scipy.stats.entropy does."""
    p, q = p / p.sum(), q / q.sum() if q.sum() else q
    if np.any((p > 0) & (q == 0)):
        return np.inf
    return float(sum(a * np.log(a / b) for a, b in zip(p, q, strict=True) if a > 0))


def tensorrt_divergence(bins: NDArray[np.float64], i: int, levels: int) -> float:
    """Follow TensorRT's own steps, bin by bin."""
    level = np.digitize(range(i), np.linspace(0, i, num=levels + 1)) - 1
    level[bins[:i] == 0] = -1
    quantized = np.zeros(i)
    for key in set(level.tolist()) - {-1}:
        quantized[level == key] = bins[:i][level == key].sum() / np.count_nonzero(level == key)
    reference = bins[:i].copy()
    reference[-1] += bins[i:].sum()
    return entropy(reference, quantized)


def power_of_two_bins(x: FloatArray) -> tuple[float, NDArray[np.float64]]:
    """Return the width, and the counts of magnitudes without zeros."""
    values = x[x != 0].astype(np.float64)
    width = 2.0 ** (np.frexp(np.abs(values).max())[1] - 11)
    index = np.where(values > 0, np.floor(values / width), np.ceil(-values / width) - 1)
    return width, np.bincount(index.astype(int)).astype(np.float64)


@DATA
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("signedness", ["signed", "unsigned", "from_range"])
def test_tensorrt_threshold(make: Callable[[int], FloatArray], bits: int, signedness: str) -> None:
    """Equal to the last bit; a sample of the candidates is followed, as each takes long."""
    x = make(20_000)
    spec = QuantSpec(bits=bits, signedness=signedness)  # type: ignore[arg-type]
    low, high = seen(TensorrtDivergenceObserver(spec), *np.split(x, 4))
    width, bins = power_of_two_bins(x)
    bins[0] = bins[1]
    one_sided = x.min() >= 0 and signedness != "signed"
    levels = 2**bits if one_sided else 2 ** (bits - 1)
    threshold = max(-low, high)
    picked = round(threshold / width) if threshold < np.abs(x).max() else bins.size
    others = {*range(128, bins.size, 61), picked - 1, picked + 1} & set(range(128, bins.size + 1))
    least = tensorrt_divergence(bins, picked, levels)

    assert threshold in (picked * width, np.abs(x).max())
    for i in others:
        other = tensorrt_divergence(bins, i, levels)
        assert least <= other + 1e-9 if i < picked else least < other - 1e-12
    assert (low, high) == (max(x.min(), -threshold), min(x.max(), threshold))


def test_tensorrt_takes_all_where_nothing_is_lost() -> None:
    """With as many levels as bins every threshold without clipping is perfect: 16 bits."""
    assert seen(TensorrtDivergenceObserver(QuantSpec(bits=16)), heavy(5000))[1] == max(heavy(5000))


def test_tensorrt_takes_the_largest_of_equally_good_thresholds() -> None:
    """Two magnitudes: each alone has the distribution that it has with all else clipped to it."""
    x = np.repeat(np.float32([0.5, 1.5]), 100)
    assert seen(TensorrtDivergenceObserver(QuantSpec()), x) == (0.5, 1.5)


def tpu_mlir_divergences(x: FloatArray, levels: int) -> tuple[float, list[float]]:
    """Follow tpu-mlir's own steps over all magnitudes: the width, and what each candidate has."""
    magnitudes = np.abs(x[x != 0].astype(np.float64))
    width = magnitudes.max() / 2047
    hist = np.bincount(np.floor(magnitudes / width + 0.5).astype(int), minlength=2048)
    divergences = []
    for i in range(levels, 2049, levels):
        p = hist[:i].astype(np.float64)
        p[-1] += hist[i:].sum()
        p /= hist.sum()
        q = np.zeros(i)
        per = i // levels
        for level in range(levels):
            bins = slice(level * per, (level + 1) * per)
            occupied = max(np.count_nonzero(hist[bins]), 1)
            q[bins] = np.where(hist[bins] > 0, hist[bins].sum() / occupied, 0) / hist[:i].sum()
        divergences.append(float(sum(p * (np.log10(p + 1e-30) - np.log10(q + 1e-30)))))
    return float(width), divergences


@DATA
@pytest.mark.parametrize("bits", [4, 8])
def test_tpu_mlir_threshold(make: Callable[[int], FloatArray], bits: int) -> None:
    """That of all values at 8 bits; of 256 candidates at 4 bits one within 1 % of the least."""
    x, levels = make(200_000), 2 ** (bits - 1)
    low, high = seen(TpuMlirDivergenceObserver(QuantSpec(bits=bits)), *np.split(x, 4))
    width, divergences = tpu_mlir_divergences(x, levels)
    threshold = max(-low, high)
    picked = len(divergences) - 1
    if threshold < np.abs(x).max():
        picked = round(threshold / width / levels) - 1
        assert threshold == np.float32(width * levels * (picked + 1))

    assert (low, high) == (max(x.min(), -threshold), min(x.max(), threshold))
    assert divergences[picked] <= 1.01 * min(divergences)
    if bits == 8:
        assert picked == np.argmin(divergences)


def test_tpu_mlir_candidates_are_sixteenths_of_the_largest_magnitude() -> None:
    x = heavy(100_000)
    high = seen(TpuMlirDivergenceObserver(QuantSpec()), x)[1]
    steps = high / (np.abs(x).max() / 2047 * 128)
    assert abs(steps - round(steps)) < 1e-6
    assert round(steps) < 16
