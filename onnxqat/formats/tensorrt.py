"""The files that TensorRT reads for implicit quantization: calibration cache, dynamic ranges.

The cache::

    TRT-8501-EntropyCalibration2
    input: 3c010a14                     tensor, scale as big-endian float32 in hexadecimal

holds the scale, absmax / 127 (read by NVIDIA/TensorRT-Model-Optimizer
``modelopt/onnx/quantization/calib_utils.py``, written by meituan/YOLOv6
``tools/qat/onnx_utils.py``). The dynamic ranges are MQBench's ``clip_ranges.json``
(ModelTC/MQBench ``mqbench/deploy/deploy_linear.py``)::

    {"tensorrt": {"blob_range": {"input": 1.0}}}

A caller passes each to ``set_dynamic_range(-x, x)``. MQBench writes ``128 * s``; this module writes
``127 * s``, since TensorRT divides by 127.

TensorRT quantizes weights itself, per output channel by absmax / 127. A tensor without an entry
stays in higher precision. Proof: format only.
"""

from __future__ import annotations

import re
import struct

import msgspec
import numpy as np
import onnx_graphsurgeon as gs

from onnxqat.errors import FormatError
from onnxqat.formats.format import Calibrated, Format, Found, Table, Written
from onnxqat.formats.json_table import read_json, write_json
from onnxqat.formats.thresholds import LEFT_OUT, activation_keys, put_thresholds, thresholds
from onnxqat.plan import QuantPlan

__all__ = ["TENSORRT"]

_TITLE = "A TensorRT calibration cache"
_HEADER = "TRT-8501-EntropyCalibration2"
_HEADERS = re.compile(r"TRT-[0-9A-Z]{1,8}-\w{1,40}")
_SCALE = re.compile(r"[0-9a-f]{1,8}")


class _Ranges(msgspec.Struct):
    blob_range: dict[str, float]


class _Document(msgspec.Struct):
    tensorrt: _Ranges


def _misread(name: str) -> str | None:
    return "has ': ' or a line break" if re.search(r": |[\r\n]", name) else None


def _write(source: Calibrated) -> Written:
    ranges = thresholds(source, _TITLE)
    lines = [_HEADER]
    for point, params in source.points("activation"):
        lines.append(f"{point.tensor}: {struct.pack('>f', params.scale).hex()}")
    document = {"tensorrt": {"blob_range": ranges}}
    return Written(
        files={"table": "\n".join(lines) + "\n", "dynamic_range": write_json(document)},
        left_out=source.left_out(*LEFT_OUT),
    )


def _read(table: Table, graph: gs.Graph, plan: QuantPlan) -> Found:
    found = Found(table.name, graph)
    text = table.text()
    if text.lstrip().startswith("{"):
        ranges = read_json(table, _Document).tensorrt.blob_range
    else:
        ranges = {name: 127 * scale for name, scale in _scales(text, table.name).items()}
    put_thresholds(found, plan, ranges)
    return found


def _scales(text: str, name: str) -> dict[str, float]:
    """Return the scales in a cache, by tensor."""
    header, *lines = text.split("\n")
    if not _HEADERS.fullmatch(header.strip()):
        raise FormatError(f"{name}:1: expected a header such as '{_HEADER}'. Give a cache.")
    scales: dict[str, float] = {}
    for number, line in enumerate(lines, 2):
        tensor, separator, digits = line.rstrip("\r").rpartition(": ")
        if not line.strip():
            continue
        if not separator or not _SCALE.fullmatch(digits):
            raise FormatError(f"{name}:{number}: expected 'tensor: 3c010a14'. Write it again.")
        if tensor in scales:
            raise FormatError(f"{name}:{number}: '{tensor[:80]}' appears twice. Remove a line.")
        scale = struct.unpack(">f", bytes.fromhex(digits.zfill(8)))[0]
        if not (np.isfinite(scale) and scale > 0):
            raise FormatError(f"{name}:{number}: scale {scale} is not positive. Calibrate again.")
        scales[tensor] = scale
    return scales


TENSORRT = Format(
    summary="TensorRT calibration cache and dynamic ranges",
    files={"table": "calibration.cache", "dynamic_range": "dynamic_range.json"},
    writer=_write,
    read=_read,
    keys=activation_keys,
    misread=_misread,
)
