"""Read the output of ``onnxqat analyze --json``, and check that it belongs to the model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from onnxqat.errors import DataError
from onnxqat.files import check_readable
from onnxqat.qparams import clipping_range
from onnxqat.quantized import QuantizedModel

__all__ = ["AnalysisDocument", "LayerEntry", "PointEntry", "read_analysis", "typed_analysis"]

LARGEST = 2**28  # bytes; larger documents are refused
Number = float | None
Natural = Annotated[int, Meta(ge=0, lt=2**53)]
Level = Annotated[int, Meta(ge=-(2**31), lt=2**31)]


class HistogramEntry(msgspec.Struct, frozen=True):
    """See `onnxqat.analysis.Histogram`."""

    first: Level
    width: Annotated[int, Meta(ge=1, lt=2**31)]
    counts: Annotated[tuple[Natural, ...], Meta(min_length=1, max_length=256)]
    qmin: Level
    qmax: Level


class PointEntry(msgspec.Struct, frozen=True):
    """See `onnxqat.analysis.PointFigures`."""

    tensor: str
    role: Literal["weight", "activation"]
    bits: Natural
    sqnr: Number
    cosine: Number
    alone_sqnr: Number
    alone_cosine: Number
    clipped: Number
    outlier: Number
    clipping_range: tuple[Number, Number]
    values: tuple[Number, Number]
    scales: Natural
    channels: Natural | None
    dead_channels: Natural | None
    histogram: HistogramEntry | None


class LayerEntry(msgspec.Struct, frozen=True):
    """See `onnxqat.analysis.LayerFigures`."""

    node: str
    op_type: str
    weights: tuple[str, ...]
    inputs: tuple[str, ...]
    alone: Number
    left_float: Number


class BiasEntry(msgspec.Struct, frozen=True):
    """See `onnxqat.analysis.BiasFigures`."""

    tensor: str
    values: Natural
    saturated: Natural


class AdviceEntry(msgspec.Struct, frozen=True):
    """See `onnxqat.analysis.Advice`."""

    layers: tuple[str, ...]
    cost: Number
    overrides: tuple[str, ...]


class AnalysisDocument(msgspec.Struct, frozen=True):
    """The fields of `onnxqat.analysis.analysis_document` that a report shows."""

    schema: Literal["onnxqat.analyze/1"]
    rule: str
    data: str
    samples: Natural
    metric: str
    figure: str
    cost: Number
    layers: tuple[LayerEntry, ...]
    points: tuple[PointEntry, ...]
    biases: tuple[BiasEntry, ...]
    advice: AdviceEntry


def read_analysis(path: str | Path, model: QuantizedModel) -> AnalysisDocument:
    """Read a document, and check that it belongs to a model.

    Raises
    ------
    DataError
        The file is missing, it is not a document of this version, or it belongs to another model
        or to another state of this model.
    """
    check_readable(path, DataError)
    size = Path(path).stat().st_size
    if size > LARGEST:
        raise DataError(f"{path}: is larger than {LARGEST >> 20} MiB. {_advice(model)}")
    try:
        document = msgspec.json.decode(Path(path).read_bytes())
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"{path}: is not an analysis ({error}). {_advice(model)}") from error
    return typed_analysis(document, model, str(path))


def typed_analysis(document: Any, model: QuantizedModel, name: str) -> AnalysisDocument:
    """Convert a document to its types, and check that it belongs to a model.

    Raises
    ------
    DataError
        See `read_analysis`.
    """
    try:
        found = msgspec.convert(document, AnalysisDocument)
    except msgspec.ValidationError as error:
        raise DataError(f"{name}: is not an analysis ({error}). {_advice(model)}") from error
    expected = {
        point.tensor: clipping_range(model.params[point.parameters], point.spec)
        for point in model.plan.grid_points()
    }
    ranges = {point.tensor: point.clipping_range for point in found.points}
    names = sorted(expected.keys() | ranges)
    other = next((n for n in names if expected.get(n) != ranges.get(n)), None)
    if other is not None:
        raise DataError(
            f"{name}: belongs to another model than {model.name}: the clipping range of '{other}' "
            f"is {_ends(ranges.get(other))}, but {_ends(expected.get(other))} in the model. "
            f"{_advice(model)}"
        )
    return found


def _ends(ends: tuple[Number, Number] | None) -> str:
    return "none" if ends is None else f"[{ends[0]}, {ends[1]}]"


def _advice(model: QuantizedModel) -> str:
    return f"Pass the output of 'onnxqat analyze {model.name} DATA --json'."
