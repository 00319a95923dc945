"""The JSON document of an analysis, as ``onnxqat analyze --json`` prints it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from onnxqat.analysis.points import PointFigures
from onnxqat.analysis.run import Analysis
from onnxqat.analysis.sensitivity import LayerFigures
from onnxqat.json_values import json_value
from onnxqat.quantized import QuantizedModel

__all__ = ["WORST", "analysis_document", "worst_points"]

WORST = 10  # tensors in a table, and tensors with a histogram in the document
DRAWN_LAYERS = 5  # layers whose weights and inputs get a histogram too


def worst_points(points: Sequence[PointFigures]) -> list[PointFigures]:
    """Return the points with the lowest SQNR on their own grid; NaN comes first."""
    return sorted(points, key=lambda p: (not math.isnan(p.alone_sqnr), p.alone_sqnr))[:WORST]


def analysis_document(result: Analysis, model: QuantizedModel) -> dict[str, Any]:
    """Return an analysis as a JSON document; numbers that are not finite become None.

    Only the worst tensors, and the weights and inputs of the worst layers, have histograms.

    Parameters
    ----------
    result : Analysis
        The analysis that `onnxqat.analysis.analyze` returned.
    model : QuantizedModel
        The analyzed model.
    """
    drawn = {point.tensor for point in worst_points(result.points)}
    for one in result.layers[:DRAWN_LAYERS]:
        drawn |= {*one.layer.weights, *one.layer.inputs}
    advice = result.advice
    return {
        "schema": "onnxqat.analyze/1",
        "model": model.name,
        "state": model.state,
        "rule": model.plan.rule,
        "data": result.data,
        "samples": result.evaluation.samples,
        "metric": result.metric,
        "figure": result.evaluation.first.get(result.metric, result.metric),
        "cost": json_value(result.cost),
        "sessions": result.sessions,
        "outputs": json_value(result.evaluation.outputs),
        "layers": [_layer(one) for one in result.layers],
        "points": [_point(point, drawn) for point in result.points],
        "biases": json_value(result.biases),
        "advice": {
            "layers": [layer.node for layer in advice.layers],
            "cost": json_value(advice.cost),
            "overrides": [str(override) for override in advice.overrides],
        },
        "note": result.evaluation.note,
    }


def _layer(one: LayerFigures) -> dict[str, Any]:
    costs = {"alone": json_value(one.alone), "left_float": json_value(one.left_float)}
    return {**json_value(one.layer), **costs}


def _point(point: PointFigures, drawn: set[str]) -> dict[str, Any]:
    """Return the figures of a point; with its histogram, if it is one of ``drawn``."""
    found: dict[str, Any] = json_value(point)
    return found if point.tensor in drawn else found | {"histogram": None}
