"""Random parameters for a plan, without calibration."""

from __future__ import annotations

import numpy as np
import onnx

from onnxqat.calibration import placeholder_params, resolved_plan
from onnxqat.model import Model
from onnxqat.plan import QuantPlan
from onnxqat.qparams import QuantParams, QuantSpec, quantized_range, raised_scales, storage_dtype
from onnxqat.quantized import insert_pairs
from tests.networks import planned

Found = tuple[Model, QuantPlan, Model]


def random_params(
    floats: Model, plan: QuantPlan, *, seed: int, distinct: int | None = None
) -> dict[str, QuantParams]:
    """Return parameters by `QuantPoint.parameters`, with scales of ``distinct`` values."""
    rng = np.random.default_rng(seed)
    pool = np.exp(rng.normal(-4, 2, size=distinct or 4096)).astype(np.float32)
    empty, found = placeholder_params(floats, plan), {}
    for point in plan.grid_points():
        if point.parameters not in found:
            shape = empty[point.parameters].scale.shape
            scale = rng.choice(pool, size=shape)
            found[point.parameters] = _drawn(point.spec, np.asarray(scale, np.float32), rng)
    return found


def _drawn(
    spec: QuantSpec, scale: np.ndarray[tuple[int, ...], np.dtype[np.float32]],
    rng: np.random.Generator,
) -> QuantParams:  # fmt: skip
    if spec.power_of_two:
        scale = np.exp2(np.rint(np.log2(scale)))
    scale = raised_scales(scale, spec)
    signed = spec.signedness == "signed" or (
        spec.signedness == "from_range" and bool(rng.integers(2))
    )
    low, high = quantized_range(spec, signed=signed)
    if spec.symmetric:
        low = high = 0
    elif spec.signedness == "from_range" and not signed:  # a range that starts at 0
        high = low
    zero_point = rng.integers(low, high + 1, size=scale.shape)
    if spec.off_center:
        zero_point = zero_point + (zero_point == (0 if signed else 128))
    dtype = storage_dtype(spec, signed=signed)
    return QuantParams(
        scale=np.asarray(scale, np.float32), zero_point=np.asarray(zero_point, dtype)
    )


def with_random_params(
    network: onnx.ModelProto, rule: str, overrides: tuple[str, ...] = (), *, seed: int = 0,
    distinct: int | None = None,
) -> Found:  # fmt: skip
    """Return the float model, its plan as the rule makes it, and a calibrated Q/DQ model."""
    floats, plan = planned(network, rule, overrides)
    params = random_params(floats, plan, seed=seed, distinct=distinct)
    return (
        floats,
        plan,
        insert_pairs(floats, resolved_plan(plan, params), params, state="calibrated"),
    )
