"""Ranges that follow observed extremes: the graph against numpy's arithmetic."""

from __future__ import annotations

import numpy as np
import pytest

from onnxqat.calibration import weight_range
from onnxqat.qparams import QuantSpec, choose_qparams
from onnxqat.train.resident.range_graphs import Followed, ranges_graph, seen_graph
from tests.oracles import run_ort

ULP = 4
SPECS = {
    "signed": QuantSpec(),
    "narrow": QuantSpec(bits=4, narrow_range=True, min_scale=0.25),
    "unsigned": QuantSpec(signedness="unsigned"),
    "power": QuantSpec(power_of_two=True),
    "asymmetric": QuantSpec(symmetric=False, signedness="unsigned"),
    "off_center": QuantSpec(symmetric=False, signedness="unsigned", off_center=True),
    "two_bits": QuantSpec(bits=2, symmetric=False, off_center=True),
}
# of activations, two of each spec, among them empty ones, of one side, and around the center
RANGES = np.float32(
    [[-1, 2], [0, 0], [-3, -1], [-0.5, 0.25], [0.5, 3], [0, 0.7], [-2, 2.2], [-4, 4.5],
     [-3, 4], [0, 5], [-1, 1], [-2, 1.984], [-1, 0.9], [-3, 0]]
)  # fmt: skip


@pytest.fixture(scope="module")
def moved():
    """Return ranges, weights, what the graph computes from them, and what it follows."""
    rng = np.random.default_rng(2)
    count, constant = 2 * len(SPECS) + 1, 0.3
    low, high = (np.append(RANGES[:, i], (-9, 9)[i]).astype(np.float32) for i in range(2))
    seen_low, seen_high = low - np.float32(0.1), (high * np.float32(1.1)).astype(np.float32)
    shapes = {"dense": (6, 5), "conv": (3, 4, 2, 2), "vector": (7,), "shared": (5,),
              "small": (2, 3), "large": (2, 3)}  # fmt: skip
    weights = {n: rng.normal(size=s, scale=5).astype(np.float32) for n, s in shapes.items()}
    for name, factor in (("small", 0.01), ("large", 100)):  # the ratio counts within each
        weights[name] *= np.float32([[factor], [factor / 100]])
    followed = [
        Followed(
            name=f"{name}{i}",
            spec=spec,
            row=2 * number + i,
            weights={"shared": shapes["shared"]} if (name, i) == ("signed", 1) else {},
            moves_zero_point=not spec.symmetric,
        )
        for number, (name, spec) in enumerate(SPECS.items())
        for i in range(2)
    ]
    of_weights = {
        "dense": QuantSpec(axis=1), "conv": QuantSpec(axis=0, symmetric=False),
        "vector": QuantSpec(axis=0), "small": QuantSpec(axis=0, scale_ratio=16),
        "large": QuantSpec(axis=0, scale_ratio=16),
    }  # fmt: skip
    followed += [
        Followed(name=name, spec=spec, row=None, weights={name: shapes[name]},
                 moves_zero_point=not spec.symmetric)
        for name, spec in of_weights.items()
    ]  # fmt: skip
    followed.append(
        Followed(name="whole", spec=QuantSpec(), row=None, weights={"conv": shapes["conv"]},
                 moves_zero_point=False)
    )  # fmt: skip
    graph = ranges_graph(followed, count, constant)
    feeds = {"low": low, "high": high, "seen_low": seen_low, "seen_high": seen_high}
    feeds |= {name: value.reshape(-1) for name, value in weights.items()}
    names = [value.name for value in graph.graph.output]
    found = dict(zip(names, run_ort(graph, feeds), strict=True))
    shared = weights["shared"]
    seen_low[1], seen_high[1] = min(seen_low[1], shared.min()), max(seen_high[1], shared.max())
    low = low + np.float32(constant) * (seen_low - low)
    high = high + np.float32(constant) * (seen_high - high)
    return followed, weights, low, high, found


def test_ranges_move_as_numpys(moved):
    followed, weights, low, high, found = moved
    np.testing.assert_array_equal(found["low_out"][:-1], low[:-1])
    np.testing.assert_array_equal(found["high_out"][:-1], high[:-1])
    assert (found["low_out"][-1], found["high_out"][-1]) == (-9, 9)  # of no moving parameters
    for one in followed:
        if one.row is not None:
            ends = (low[one.row], high[one.row])
        else:
            ends = weight_range(weights[next(iter(one.weights))], one.spec, "minmax")
        expected = choose_qparams(*map(np.asarray, ends), one.spec)
        scale = found[f"{one.name}/scale"]
        assert scale.shape == (one.length,)
        np.testing.assert_array_max_ulp(scale, expected.scale.reshape(-1), ULP)
        if one.moves_zero_point:
            zero_point = found[f"{one.name}/zero_point"]
            np.testing.assert_array_equal(zero_point, expected.zero_point.reshape(-1), one.name)
    assert sum(name.endswith("zero_point") for name in found) == 7
    smallest = min(found[f"{one.name}/scale"].min() for one in followed)
    assert found["numbers"].tolist() == [0, smallest]


def test_extremes_of_several_tensors_widen_a_range():
    places = [np.array([[0, 2], [4, -1], [-1, -1]]), np.array([[1, 3], [5, -1], [-1, -1]])]
    graph = seen_graph(6, places)
    found = np.float32([-1, 2, -3, 1, 0.5, 4])
    feeds = {"found": found, "low": np.float32([0, 0, 0]), "high": np.float32([5, 5, 5])}
    low, high = run_ort(graph, feeds)

    assert low.tolist() == [-3, 0, 0]
    assert high.tolist() == [5, 5, 5]
