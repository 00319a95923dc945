"""Replace the weights, scales and zero points of a quantized model."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import numpy as np

from onnxqat.calibration import fit_bias_range, weight_range
from onnxqat.model import Model
from onnxqat.pairs import scale_name, zero_point_name
from onnxqat.qparams import (
    FloatArray,
    QuantParams,
    choose_qparams,
    nearest_power_of_two,
    raised_scales,
)
from onnxqat.quantized import QuantizedModel

__all__ = ["with_values"]


def with_values(
    model: QuantizedModel,
    floats: Model,
    values: Mapping[str, FloatArray],
    *,
    weights: Iterable[str],
    zero_points: Collection[str],
    fit_biases: bool = True,
) -> QuantizedModel:
    """Return the model with trained values.

    Parameters
    ----------
    model : QuantizedModel
        The model; it is not changed.
    floats : Model
        A copy of its float model, into which the weights are written; a later call with the same
        copy overwrites them.
    values : mapping of str to float32 array
        The trained values, by the input names of `onnxqat.train.form.TrainingForm`.
    weights : iterable of str
        The initializers to replace.
    zero_points : collection of str
        The parameters whose zero_point is replaced by the rounded value.
    fit_biases : bool
        Whether scales are widened so that biases fit their integers, see
        `onnxqat.calibration.fit_bias_range`.
    """
    tensors = floats.graph.tensors()
    for name in weights:
        tensors[name].values = values[name].copy()
    specs = {p.parameters: p.spec for p in model.plan.grid_points()}
    powers = {p.parameters for p in model.plan.grid_points() if p.spec.power_of_two}
    per_head = {p.parameters: p for p in model.plan.grid_points() if p.spec.heads is not None}

    def trained(name: str, before: QuantParams) -> QuantParams:
        if name in per_head:  # also if scales are frozen, or averaged over the steps
            spec = per_head[name].spec
            return choose_qparams(*weight_range(tensors[name].values, spec, "minmax"), spec)
        scale, zero_point = values[scale_name(name)].copy(), before.zero_point
        if name in powers:  # the moving average of powers of two is not a power of two
            scale = nearest_power_of_two(scale)
        scale = raised_scales(scale, specs[name])
        if name in zero_points:
            zero_point = np.rint(values[zero_point_name(name)]).astype(zero_point.dtype)
        return QuantParams(scale=scale, zero_point=zero_point)

    params = {name: trained(name, before) for name, before in model.params.items()}
    plan = fit_bias_range(model.plan, params, tensors) if fit_biases else model.plan
    return model.with_params(params, state="finetuned", plan=plan, floats=floats)
