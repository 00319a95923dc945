"""The document of ``onnxqat analyze --json``, held to the model that a page is about."""

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

LARGEST = 2**28  # bytes of a document that is read
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
    """What `onnxqat.analysis.analysis_document` returns, as far as a page shows it."""

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
    """Read a document, and hold it to a model.

    Raises
    ------
    DataError
        There is no such file, it is not a document of this version, or it is of another model or
        of another state of this one.
    """
    check_readable(path, DataError)
    size = Path(path).stat().st_size
    if size > LARGEST:
        raise DataError(f"{path}: is larger than {LARGEST >> 20} MiB. {_advice(model)}")
    try:
        document = msgspec.json.decode(Path(path).read_bytes())
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"{path}: is no analysis ({error}). {_advice(model)}") from error
    return typed_analysis(document, model, str(path))


def typed_analysis(document: Any, model: QuantizedModel, name: str) -> AnalysisDocument:
    """Return a document with its types, and hold it to a model.

    Raises
    ------
    DataError
        See `read_analysis`.
    """
    try:
        found = msgspec.convert(document, AnalysisDocument)
    except msgspec.ValidationError as error:
        raise DataError(f"{name}: is no analysis ({error}). {_advice(model)}") from error
    expected = {
        point.tensor: clipping_range(model.params[point.parameters], point.spec)
        for point in model.plan.grid_points()
    }
    ranges = {point.tensor: point.clipping_range for point in found.points}
    names = sorted(expected.keys() | ranges)
    other = next((n for n in names if expected.get(n) != ranges.get(n)), None)
    if other is not None:
        raise DataError(
            f"{name}: is of another model than {model.name}: the clipping range of '{other}' is "
            f"{_ends(ranges.get(other))}, and {_ends(expected.get(other))} in the model. "
            f"{_advice(model)}"
        )
    return found


def _ends(ends: tuple[Number, Number] | None) -> str:
    return "none" if ends is None else f"[{ends[0]}, {ends[1]}]"


def _advice(model: QuantizedModel) -> str:
    return f"Give what 'onnxqat analyze {model.name} DATA --json' prints."
