"""The ``cali_table`` of Sophgo's compiler, tpu-mlir, in the layout of Sophgo's QAT tool.

::

    # work_mode:QAT_all_int8 #Automatically generated, ...
    # op_name    threshold    min    max
    input 2.5 -2.5 2.5                              activations: name threshold min max
    #int4_th
    125_Relu 1.5 0.0 1.5                            the same, for tensors of 4 bits
    #weight_scale
    125_Relu_weight 2 0.01 0.02 0 0                 name N, N scales, N zero_points
    #int4_op
    125_Relu                                        ops that compute with 4 bits

``#int4_op`` is written only if there are such ops; tpu-mlir (``lib/Dialect/Top/Transforms/
ImportCalibration.cpp``) reads ``#int4_th`` for these alone.

`onnxqat.formats.sophgo_grids` has the numbers of an activation. sophgo-mq writes ``128 * s`` with
seven decimals. This module does not: the compiler divides by 127, and with ``%.7f`` weight scales
196 of the 270,256 int8 weights of a ResNet-20 came out different. A float32 scale times any of
these factors is exact in float64, and numbers are written as the shortest decimal that reads back
to the same float64, so the scale survives bit for bit. The compiler aborts on an exponent, so
exponents are neither written nor accepted.

Proof: simulator of tpu-mlir 1.30.2. It compiled models with the tables written here, and its
simulator computed the integers of `onnxqat.evaluation.integer` (``scripts/check_tpu_mlir.py``).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

import numpy as np

from onnxqat.errors import FormatError
from onnxqat.formats import text_table
from onnxqat.formats.table import CalibrationTable, Threshold, WeightScales

__all__ = ["WORK_MODES", "misread", "read", "write", "write_qtable"]

WORK_MODES = ("QAT_all_int8", "int4_and_int8_mix", "int4_and_int8_mix_no_fc")

_WORK_MODE = "# work_mode:"
_WORK_MODE_NOTE = (
    f"#Automatically generated, do not modify, work_mode choice:[{', '.join(WORK_MODES)}]"
)
_COLUMNS = "# op_name    threshold    min    max"
_INT4 = "#int4_th"
_WEIGHTS = "#weight_scale"
_INT4_OPS = "#int4_op"
_SECTIONS = (_INT4, _WEIGHTS, _INT4_OPS)

_MAX_SIZE = 256 * 2**20  # characters; ten times what a billion-parameter network needs
_MAX_SCALES = 2**20  # for one weight; no network has as many output channels
_MAX_ZERO_POINT = 2**16 - 1
_DECIMAL = re.compile(r"-?[0-9]+(\.[0-9]+)?")
_INTEGER = re.compile(r"-?[0-9]{1,9}")
_EXPONENT = re.compile(r"-?[0-9.]+[eE][-+]?[0-9]+")

_Value = TypeVar("_Value")


def _threshold_problem(entry: Threshold) -> str | None:
    """Return what is wrong with the numbers of an activation, or None."""
    if not all(math.isfinite(x) for x in (entry.threshold, entry.low, entry.high)):
        return "threshold, min or max is not finite. Calibrate again."
    if entry.threshold <= 0:
        return f"threshold {entry.threshold} is not positive. Calibrate again."
    if entry.low > entry.high:
        return f"min {entry.low} lies above max {entry.high}. Calibrate again."
    return None


def _scales_problem(entry: WeightScales) -> str | None:
    """Return what is wrong with the numbers of a weight, or None."""
    n = len(entry.scales)
    if not 1 <= n <= _MAX_SCALES:
        return f"{n} scales, expected 1 to {_MAX_SCALES}. Check the weight's axis."
    if len(entry.zero_points) != n:
        return f"{n} scales but {len(entry.zero_points)} zero_points. Write as many of both."
    for scale in entry.scales:
        if not (math.isfinite(scale) and scale > 0):
            return f"weight scale {scale} is not positive and finite. Calibrate again."
    for zero_point in entry.zero_points:
        if abs(zero_point) > _MAX_ZERO_POINT:
            return f"zero_point {zero_point} is not a 16-bit integer. Calibrate again."
    return None


def misread(name: str) -> str | None:
    """Return why the compiler would not find ``name`` in a table, or None.

    Examples
    --------
    >>> misread("#1_Relu")
    "starts with '#', which starts a comment"
    """
    if name.startswith("#"):
        return "starts with '#', which starts a comment"
    return text_table.misread(name)


def _decimal(value: float) -> str:
    """Return the shortest plain decimal that reads back to the same float64."""
    return np.format_float_positional(np.float64(value), unique=True, trim="0")


def _threshold_fields(entry: Threshold) -> list[str]:
    return [_decimal(x) for x in (entry.threshold, entry.low, entry.high)]


def _scales_fields(entry: WeightScales) -> list[str]:
    scales = [_decimal(scale) for scale in entry.scales]
    return [str(len(scales)), *scales, *map(str, entry.zero_points)]


def _lines(
    section: dict[str, _Value],
    check: Callable[[_Value], str | None],
    fields: Callable[[_Value], list[str]],
) -> Iterator[str]:
    """Yield the lines of a section, or raise FormatError."""
    for name, entry in section.items():
        why = misread(name)
        if why:
            raise FormatError(f"{name!r} {why}. Rename it.")
        problem = check(entry)
        if problem:
            raise FormatError(f"{name}: {problem}")
        yield " ".join([name, *fields(entry)])


def write(table: CalibrationTable) -> str:
    """Return the text of a ``cali_table``, each line ended by a newline.

    Parameters
    ----------
    table : CalibrationTable
        The entries are written in the order of its dicts.

    Raises
    ------
    FormatError
        The compiler could not read a name or number, or the work mode is unknown.

    Examples
    --------
    >>> from onnxqat.formats.sophgo_grids import threshold
    >>> table = CalibrationTable(activations={"x": threshold(0.5, 8, signed=False)})
    >>> write(table).splitlines()[1:]
    ['# op_name    threshold    min    max', 'x 127.5 0.0 127.5', '#int4_th', '#weight_scale']
    """
    if table.work_mode not in WORK_MODES:
        raise FormatError(
            f"Work mode '{table.work_mode}' is unknown. Choose one of {', '.join(WORK_MODES)}."
        )
    lines = [
        f"{_WORK_MODE}{table.work_mode} {_WORK_MODE_NOTE}",
        _COLUMNS,
        *_lines(table.activations, _threshold_problem, _threshold_fields),
        _INT4,
        *_lines(table.int4, _threshold_problem, _threshold_fields),
        _WEIGHTS,
        *_lines(table.weights, _scales_problem, _scales_fields),
    ]
    if table.int4_ops:
        names = dict.fromkeys(table.int4_ops)
        lines += [_INT4_OPS, *_lines(names, lambda _: None, lambda _: [])]
    return "\n".join(lines) + "\n"


class _LineError(Exception):
    """What is wrong with a line; `read` adds the name of the file and the line number."""


def _parse_decimal(text: str) -> float:
    if _EXPONENT.fullmatch(text):
        raise _LineError(
            f"'{text[:40]}' has an exponent, which makes the compiler abort. Write a plain decimal."
        )
    if not _DECIMAL.fullmatch(text):
        raise _LineError(f"'{text[:40]}' is not a plain decimal number. Write it as 0.125.")
    return float(text)


def _parse_integer(text: str) -> int:
    if not _INTEGER.fullmatch(text):
        message = f"'{text[:40]}' is not an integer of at most 9 digits. Write it without a point."
        raise _LineError(message)
    return int(text)


def _parse_threshold(fields: list[str]) -> Threshold:
    if len(fields) != 3:
        raise _LineError(f"{len(fields) + 1} fields, expected 4. Write: name threshold min max.")
    th, low, high = map(_parse_decimal, fields)
    return Threshold(threshold=th, low=low, high=high)


def _parse_scales(fields: list[str]) -> WeightScales:
    if not fields:
        raise _LineError("a name without numbers. Write: name N, N scales, N zero_points.")
    n = _parse_integer(fields[0])
    if not 1 <= n <= _MAX_SCALES:
        raise _LineError(f"{n} scales, expected 1 to {_MAX_SCALES}. Check the weight's axis.")
    if len(fields) != 1 + 2 * n:
        raise _LineError(
            f"{len(fields) - 1} numbers after N = {n}, expected {2 * n}. "
            "Write N scales, then N zero_points."
        )
    return WeightScales(
        scales=tuple(map(_parse_decimal, fields[1 : 1 + n])),
        zero_points=tuple(map(_parse_integer, fields[1 + n :])),
    )


def _parse_nothing(fields: list[str]) -> None:
    if fields:
        raise _LineError(f"{len(fields) + 1} fields, expected 1. Write only the name of an op.")


def _add(
    section: dict[str, _Value],
    line: str,
    parse: Callable[[list[str]], _Value],
    check: Callable[[_Value], str | None],
) -> None:
    """Parse one line into ``section``."""
    name, *fields = line.split()
    if name in section:
        raise _LineError(f"'{name[:80]}' appears twice in this section. Remove one of the lines.")
    entry = parse(fields)
    why = misread(name)
    problem = f"name {name!r} {why}. Rename it." if why else check(entry)
    if problem:
        raise _LineError(problem)
    section[name] = entry


def _parse_head(number: int, line: str) -> str | None:
    """Check line 1 or 2; return the work mode from line 1."""
    if number == 2:
        if line.split() != _COLUMNS.split():
            raise _LineError(f"expected the column header. Write: {_COLUMNS}")
        return None
    if not line.startswith(_WORK_MODE):
        raise _LineError(
            f"expected the header '{_WORK_MODE}...'. Pass the table that quantization-aware "
            "training wrote."
        )
    mode = line[len(_WORK_MODE) :].partition("#")[0].strip()
    if mode not in WORK_MODES:
        raise _LineError(f"unknown work mode '{mode[:40]}'. Choose one of {', '.join(WORK_MODES)}.")
    return mode


class _Reader:
    """The sections read so far; `take` adds one line."""

    def __init__(self) -> None:
        self.work_mode = ""
        self.activations: dict[str, Threshold] = {}
        self.int4: dict[str, Threshold] = {}
        self.weights: dict[str, WeightScales] = {}
        self.int4_ops: dict[str, None] = {}
        self.left = list(_SECTIONS)

    def take(self, number: int, line: str) -> None:
        """Add line ``number``, counted from 1."""
        if number <= 2:
            self.work_mode = _parse_head(number, line) or self.work_mode
        elif line.startswith("#"):
            self._enter(line.strip())
        elif not line.strip():
            return
        elif len(self.left) == 3:
            _add(self.activations, line, _parse_threshold, _threshold_problem)
        elif len(self.left) == 2:
            _add(self.int4, line, _parse_threshold, _threshold_problem)
        elif len(self.left) == 1:
            _add(self.weights, line, _parse_scales, _scales_problem)
        else:
            _add(self.int4_ops, line, _parse_nothing, lambda _: None)

    @property
    def missing(self) -> str | None:
        """The next section that every table has, or None."""
        return next((name for name in self.left if name != _INT4_OPS), None)

    def _enter(self, header: str) -> None:
        if self.left[:1] != [header]:
            wanted = f"'{self.left[0]}'" if self.left else "no further section"
            raise _LineError(f"section '{header[:40]}', expected {wanted}. Restore the order.")
        del self.left[0]


def read(text: str, name: str) -> CalibrationTable:
    """Read a ``cali_table`` in the layout of `write`: inverse of `write`.

    Reading is strict, because the compiler silently skips lines that it does not understand. Blank
    lines are skipped, and any white space separates fields.

    Parameters
    ----------
    text : str
        The whole table, at most 256 MiB.
    name : str
        Name of the table for error messages, usually its path.

    Raises
    ------
    FormatError
        As ``name:line: what is wrong``: the number of fields is wrong, a number is not a plain
        decimal, a threshold or scale is not positive, a name appears twice, or a section is unknown
        or missing.
    """
    if len(text) > _MAX_SIZE:
        raise FormatError(f"{name}:1: larger than 256 MiB. This is not a calibration table.")
    reader = _Reader()
    lines = text.split("\n")
    for number, line in enumerate(lines, 1):
        try:
            reader.take(number, line)
        except _LineError as error:
            raise FormatError(f"{name}:{number}: {error}") from None
    if reader.missing is not None:
        raise FormatError(
            f"{name}:{len(lines)}: section '{reader.missing}' is missing. "
            "The file is cut off; write it again."
        )
    return CalibrationTable(
        activations=reader.activations,
        int4=reader.int4,
        weights=reader.weights,
        int4_ops=tuple(reader.int4_ops),
        work_mode=reader.work_mode,
    )


def write_qtable(modes: Mapping[str, str]) -> str:
    """Return the ``qtable``, the ops that run in another mode (sophgo-mq ``convert_deploy.py``).

    Parameters
    ----------
    modes : mapping of str to str
        Mode of each op (``F32``, ``F16``, ``BF16`` or ``INT8``), by the name that the compiler
        looks up.
    """
    lines = ["# qtable from onnxqat", "# op_name  quantize_mode"]
    return "\n".join([*lines, *(f"{name} {mode}" for name, mode in modes.items())]) + "\n"
