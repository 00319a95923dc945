"""The calibration files that onnxruntime's TensorRT and QNN tools exchange.

``write_calibration_table`` (microsoft/onnxruntime 1.19.2
``onnxruntime/python/tools/quantization/quant_utils.py``) writes two text files::

    {"input": [-1.0, 1.0]}              calibration.json: tensor, its range
    input 1.0                           calibration.cache: tensor, absmax

It also writes a FlatBuffers file with the content of the second, which onnxqat does not write:
that function makes it from the first. The reader divides absmax by 127; ranges are
``[-127 * s, 127 * s]``. The files have no weights. Proof: format only.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from onnxqat.errors import FormatError
from onnxqat.formats.format import Calibrated, Format, Found, Table, Written
from onnxqat.formats.json_table import read_json, write_json
from onnxqat.formats.text_table import misread, rows
from onnxqat.formats.thresholds import LEFT_OUT, activation_keys, put_thresholds, thresholds
from onnxqat.plan import QuantPlan

__all__ = ["ONNXRUNTIME_CALIBRATION"]

_TITLE = "A calibration table of onnxruntime"


def _write(source: Calibrated) -> Written:
    ranges = thresholds(source, _TITLE)
    lines = [f"{name} {value!r}\n" for name, value in sorted(ranges.items())]
    document = {name: [-value, value] for name, value in ranges.items()}
    return Written(
        files={"table": write_json(document), "cache": "".join(lines)},
        left_out=source.left_out(*LEFT_OUT),
    )


def _read(table: Table, graph: gs.Graph, plan: QuantPlan) -> Found:
    found = Found(table.name, graph)
    if table.text().lstrip().startswith("{"):
        document = read_json(table, dict[str, tuple[float, float]])
        for name, (low, high) in document.items():
            if low != -high:
                raise FormatError(
                    f"{table.name}: '{name}' has the range [{low}, {high}], which is not "
                    "symmetric. Calibrate with symmetric activations."
                )
        ranges = {name: high for name, (_, high) in document.items()}
    else:
        ranges = {name: numbers[0] for name, numbers in rows(table, (1,)).items()}
    put_thresholds(found, plan, ranges)
    return found


ONNXRUNTIME_CALIBRATION = Format(
    summary="calibration.json and .cache of onnxruntime's quantization tools",
    files={"table": "calibration.json", "cache": "ort_calibration.cache"},
    writer=_write,
    read=_read,
    keys=activation_keys,
    misread=misread,
)
