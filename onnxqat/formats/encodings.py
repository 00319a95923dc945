"""Quantization encodings, as AIMET writes them and SNPE's and QNN's converters read them.

The converters' option ``--quantization_overrides`` takes either of two versions (quic/aimet
``aimet_onnx/qc_quantize_op.py`` and ``Docs/api_docs/quantization_encoding_specification.rst``).
Version 0.6.1 maps a tensor to its encodings, one for each channel::

    {"bitwidth": 8, "dtype": "int", "is_symmetric": "False",
     "max": 6.0, "min": 0.0, "offset": 0, "scale": 0.0235}

Version 1.0.0 is a list of
``{"name", "enc_type", "dtype", "bw", "is_sym", "scale": [], "offset": []}``.

Encodings count unsigned integers: ``offset`` is minus the zero_point of the unsigned grid, thus
``-128`` for a signed symmetric tensor of 8 bits; ``min = s * offset``,
``max = s * (offset + 2**bits - 1)``. A narrow range cannot be expressed: a converter computes the
scale from min and max, so these are always the ends of the full grid. The converter quantizes
biases itself. Proof: format only.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec
import numpy as np
import onnx_graphsurgeon as gs

from onnxqat.errors import FormatError
from onnxqat.formats.format import Calibrated, Format, Found, Table, Written, refuse
from onnxqat.formats.json_table import read_json, write_json
from onnxqat.plan import QuantPlan, QuantPoint
from onnxqat.qparams import QuantParams

__all__ = ["ENCODINGS", "ENCODINGS_1"]

_WIDTHS = range(4, 33)
_ROLES = {"activation_encodings": "activation", "param_encodings": "weight"}


class _Encoding(msgspec.Struct):
    """A tensor, or one channel of a tensor, in version 0.6.1."""

    bitwidth: int
    offset: float
    scale: float
    is_symmetric: Literal["True", "False"]
    dtype: Literal["int"] = "int"


class _Encoding1(msgspec.Struct):
    """One tensor in version 1.0.0."""

    name: str
    enc_type: Literal["PER_TENSOR", "PER_CHANNEL"]
    dtype: Literal["INT"]
    bw: int
    is_sym: bool
    scale: list[float]
    offset: list[int]


class _Version(msgspec.Struct):
    version: str


class _Document(msgspec.Struct):
    activation_encodings: dict[str, list[_Encoding]]
    param_encodings: dict[str, list[_Encoding]]


class _Document1(msgspec.Struct):
    activation_encodings: list[_Encoding1]
    param_encodings: list[_Encoding1]


def _lowest(bits: int, *, signed: bool) -> int:
    """Return the lowest integer of the grid: the unsigned integers of the file count from it."""
    return -(2 ** (bits - 1)) if signed else 0


def _offsets(point: QuantPoint, params: QuantParams) -> list[int]:
    lowest = _lowest(point.spec.bits, signed=params.signed)
    return [lowest - int(z) for z in np.atleast_1d(params.zero_point)]


def _channels(point: QuantPoint, params: QuantParams) -> list[dict[str, Any]]:
    """Return the encodings of a tensor in version 0.6.1."""
    bits, scales = point.spec.bits, np.atleast_1d(params.scale).tolist()
    return [
        {
            "bitwidth": bits,
            "dtype": "int",
            "is_symmetric": str(point.spec.symmetric),
            "max": scale * (offset + 2**bits - 1),
            "min": scale * offset,
            "offset": offset,
            "scale": scale,
        }
        for scale, offset in zip(scales, _offsets(point, params), strict=True)
    ]


def _tensor(point: QuantPoint, params: QuantParams) -> dict[str, Any]:
    """Return the encoding of a tensor in version 1.0.0."""
    return {
        "name": point.tensor,
        "enc_type": "PER_TENSOR" if point.spec.axis is None else "PER_CHANNEL",
        "dtype": "INT",
        "bw": point.spec.bits,
        "is_sym": point.spec.symmetric,
        "scale": np.atleast_1d(params.scale).tolist(),
        "offset": _offsets(point, params),
    }


def _arguments(source: Calibrated) -> dict[str, Any]:
    """Return the model-wide section of version 0.6.1: the widest activation and weight."""
    points = source.plan.grid_points()
    widths = {r: [p.spec.bits for p in points if p.role == r] for r in _ROLES.values()}
    return {
        "activation_bitwidth": max(widths["activation"], default=8),
        "dtype": "int",
        "is_symmetric": all(p.spec.symmetric for p in points if p.role == "weight"),
        "param_bitwidth": max(widths["weight"], default=8),
        "per_channel_quantization": any(p.spec.axis is not None for p in points),
        "quant_scheme": "post_training_tf_enhanced",
    }


def _check(source: Calibrated) -> None:
    wrong = (p for p in source.plan.grid_points() if p.spec.bits not in _WIDTHS)
    refuse(
        (f"'{p.tensor}' has {p.spec.bits} bits" for p in wrong),
        "Encodings hold 4 bits or more; insert again with such widths",
    )


def _write(source: Calibrated) -> Written:
    _check(source)
    document: dict[str, Any] = {"version": "0.6.1"}
    for section, role in _ROLES.items():
        document[section] = {p.tensor: _channels(p, q) for p, q in source.points(role)}
    document["quantizer_args"] = _arguments(source)
    return Written(files={"table": write_json(document)}, left_out=source.left_out("biases"))


def _write_1(source: Calibrated) -> Written:
    _check(source)
    document: dict[str, Any] = {"version": "1.0.0"}
    for section, role in _ROLES.items():
        document[section] = [_tensor(p, q) for p, q in source.points(role)]
    return Written(files={"table": write_json(document)}, left_out=source.left_out("biases"))


_Entry = tuple[int, bool, list[float], list[float]]  # bits, symmetric, scales, offsets


def _entries(table: Table) -> dict[str, _Entry]:
    """Return the entries of a table by tensor, for either version."""
    version = read_json(table, _Version).version
    found: dict[str, _Entry] = {}
    if version.startswith("0."):
        old = read_json(table, _Document)
        for name, channels in (old.activation_encodings | old.param_encodings).items():
            if not channels or len({(c.bitwidth, c.is_symmetric) for c in channels}) > 1:
                raise FormatError(
                    f"{table.name}: '{name[:80]}' has no encoding, or its channels differ in "
                    "bitwidth or is_symmetric. Write the table again."
                )
            first = channels[0]
            scales, offsets = [c.scale for c in channels], [c.offset for c in channels]
            found[name] = (first.bitwidth, first.is_symmetric == "True", scales, offsets)
    elif version == "1.0.0":
        new = read_json(table, _Document1)
        for e in (*new.activation_encodings, *new.param_encodings):
            if e.name in found or len(e.scale) != len(e.offset):
                raise FormatError(
                    f"{table.name}: '{e.name[:80]}' appears twice, or its numbers of scales and "
                    "offsets differ. Write the table again."
                )
            found[e.name] = (e.bw, e.is_sym, e.scale, [float(o) for o in e.offset])
    else:
        message = f"{table.name}: version '{version[:40]}' is not 0.x or 1.0.0. Export one of them."
        raise FormatError(message)
    return found


def _read(table: Table, graph: gs.Graph, plan: QuantPlan) -> Found:
    found, entries = Found(table.name, graph), _entries(table)
    for point in plan.grid_points():
        if point.tensor in entries:
            _put(found, point, entries[point.tensor])
        else:
            found.missing.append(point.tensor)
    found.unused += sorted(entries.keys() - {p.tensor for p in plan.grid_points()})
    return found


def _put(found: Found, point: QuantPoint, entry: _Entry) -> None:
    bits, symmetric, scales, offsets = entry
    place = f"{found.source}: '{point.tensor}'"
    if (bits, symmetric) != (point.spec.bits, point.spec.symmetric):
        raise FormatError(
            f"{place} has {bits} bits, symmetric {symmetric}; the plan has {point.spec.bits}, "
            f"{point.spec.symmetric}. Are --rules and --set those that the table was made with?"
        )
    if any(o != int(o) or abs(o) > 2**16 for o in offsets):
        message = f"{place} has an offset that is not a 16-bit integer. Write the table again."
        raise FormatError(message)
    signed = found.signed(point, point.tensor, lowest=not any(offsets))
    zero_points = _lowest(bits, signed=signed) - np.asarray(offsets, np.int64)
    found.put(point, scales, zero_points, signed=signed, name=point.tensor)


ENCODINGS = Format(
    summary="encodings 0.6.1 of SNPE and QNN (AIMET)",
    files={"table": "encodings.json"},
    writer=_write,
    read=_read,
)
ENCODINGS_1 = Format(
    summary="encodings 1.0.0 of SNPE and QNN (AIMET)",
    files={"table": "encodings_1.json"},
    writer=_write_1,
    read=_read,
)
