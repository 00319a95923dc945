"""A quantized model with other weights, scales and zero points."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import numpy as np

from onnxqat.calibration import fit_bias_range
from onnxqat.model import Model
from onnxqat.pairs import scale_name, zero_point_name
from onnxqat.qparams import FloatArray, QuantParams, nearest_power_of_two
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
        Not changed.
    floats : Model
        A copy of its float model, which takes the weights: a later call with it changes them.
    values : mapping of str to float32 array
        By the names of a training form's inputs, see `onnxqat.train.form.TrainingForm`.
    weights : iterable of str
        Which initializers are taken from there.
    zero_points : collection of str
        The parameters whose zero_point is taken from there, and rounded.
    fit_biases : bool
        Whether biases are made to fit their integers, see `onnxqat.calibration.fit_bias_range`.
    """
    tensors = floats.graph.tensors()
    for name in weights:
        tensors[name].values = values[name].copy()
    powers = {p.parameters for p in model.plan.grid_points() if p.spec.power_of_two}

    def trained(name: str, before: QuantParams) -> QuantParams:
        scale, zero_point = values[scale_name(name)].copy(), before.zero_point
        if name in powers:  # a moving average of powers of two is none
            scale = nearest_power_of_two(scale)
        if name in zero_points:
            zero_point = np.rint(values[zero_point_name(name)]).astype(zero_point.dtype)
        return QuantParams(scale=scale, zero_point=zero_point)

    params = {name: trained(name, before) for name, before in model.params.items()}
    plan = fit_bias_range(model.plan, params, tensors) if fit_biases else model.plan
    return model.with_params(params, state="finetuned", plan=plan, floats=floats)
