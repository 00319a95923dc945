"""Find the arrays that metrics need in the data, before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from onnxqat.choices import nearest
from onnxqat.data import DataSet
from onnxqat.data.beside import BOXES, SIZE, TARGETS, TARGETS_COUNT
from onnxqat.errors import DataError, OptionError
from onnxqat.evaluation.decoders import Detector, read_decoder
from onnxqat.evaluation.metrics.detection import require_pycocotools
from onnxqat.evaluation.metrics.named import Metric

__all__ = ["fitted"]


def fitted(
    data: DataSet,
    metrics: Sequence[Metric],
    outputs: Sequence[str],
    *,
    compared: bool = True,
    decode: str | None = None,
) -> tuple[DataSet, tuple[Metric, ...]]:
    """Return the data with the arrays that metrics need, and the metrics with the arrays' names.

    Parameters
    ----------
    data : DataSet
        Data as opened.
    metrics : sequence of Metric
        Metrics as `read_metric` returns them.
    outputs : sequence of str
        Names of the model's outputs.
    compared : bool
        Whether there is a reference model.
    decode : str, optional
        Name of the decoder of boxes (default: chosen by the shapes of the outputs).

    Raises
    ------
    DataError
        The data lack an array that a metric needs.
    OptionError
        A metric needs a reference model and there is none, or the decoder is unknown.
    """
    decoder = None if decode is None else read_decoder(decode)
    detector = Detector(decoder=decoder, preprocessing=data.said.preprocessing)
    found = tuple(
        replace(_fitted(data, metric, outputs, compared=compared), detector=detector)
        for metric in metrics
    )
    names = dict.fromkeys(name for metric in found for name in metric.arrays)
    arrays = {name: (name, str(data.array(name).dtype)) for name in names}
    return data.with_arrays(arrays) if arrays else data, found


def _fitted(data: DataSet, metric: Metric, outputs: Sequence[str], *, compared: bool) -> Metric:
    if metric.needs == "labels" and not data.has_labels:
        raise DataError(
            f"--metric {metric.name}: needs class labels, and '{data.name}' has none. Name them "
            "with --label, or give another metric."
        )
    if metric.needs == "reference" and not compared:
        raise OptionError(
            f"--metric {metric.name}: needs a model to compare with. Name it with --against."
        )
    if metric.needs == "truth":
        truth = _truth(data, outputs) or _found_truth(data, outputs, metric.name)
        return replace(metric, truth=truth, arrays=tuple(dict.fromkeys(truth.values())))
    if metric.needs == "boxes":
        return replace(metric, arrays=_boxes(data, metric.name))
    if metric.needs == "everything":
        return replace(metric, truth=_truth(data, outputs), arrays=data.other_arrays)
    return metric


def _boxes(data: DataSet, metric: str) -> tuple[str, ...]:
    """Return the names of the array of boxes and, if there is one, of the array of image sizes."""
    require_pycocotools()
    if BOXES not in data.array_names:
        raise DataError(
            f"--metric {metric}: '{data.name}' has no boxes. Give --boxes: a folder of YOLO's "
            ".txt files, COCO's .json, or an .npy of rows (image, class, cx, cy, w, h)."
        )
    return (BOXES, SIZE) if SIZE in data.array_names else (BOXES,)


def _truth(data: DataSet, outputs: Sequence[str]) -> dict[str, str]:
    """Return the arrays that the user gave with ``--truth``, by output; check that they exist."""
    said = dict(data.said.truth or {})
    for output, array in said.items():
        if output not in outputs:
            raise OptionError(
                f"--truth {output}={array}: no output '{output}'. {nearest(output, outputs)}"
            )
        data.array(array)
    return said


def _found_truth(data: DataSet, outputs: Sequence[str], metric: str) -> dict[str, str]:
    """Return the arrays named like outputs; else the only array, if there is only one output."""
    boxes = {BOXES, SIZE, TARGETS, TARGETS_COUNT} if TARGETS in data.moved_arrays else set()
    arrays = [
        name for name in data.other_arrays if name not in boxes
    ]  # boxes are never an output's truth
    named = {name: name for name in outputs if name in arrays}
    if named:
        return named
    if len(outputs) == len(arrays) == 1:
        return {outputs[0]: arrays[0]}
    have = ", ".join(f"'{name}'" for name in arrays) or "none"
    raise DataError(
        f"--metric {metric}: the array of true values in '{data.name}' is not known; besides "
        f"inputs and labels there are: {have}. Give --truth {outputs[0]}=ARRAY."
    )
