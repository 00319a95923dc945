"""Tables that give each activation one threshold: the value of the largest integer.

The targets of these tables divide a threshold by 127 and quantize symmetrically to int8. They
quantize weights themselves, by absmax / 127. A float32 scale times 127 is exact in float64, so the
scale survives bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from onnxqat.formats.format import Calibrated, Found, Key, refuse
from onnxqat.plan import QuantPlan, QuantPoint
from onnxqat.qparams import QuantParams

__all__ = [
    "LEFT_OUT",
    "activation_keys",
    "largest",
    "put_thresholds",
    "require_symmetric",
    "thresholds",
]

LEFT_OUT = ("weight scales", "biases")


def largest(bits: int) -> int:
    """Return the largest signed integer with this number of bits.

    Examples
    --------
    >>> largest(8)
    127
    """
    return int(2 ** (bits - 1) - 1)


def require_symmetric(
    source: Calibrated, title: str, *, bits: tuple[int, ...] = (8,), weight_bits: Any = (8,)
) -> None:
    """Refuse a model that a table of signed symmetric integers cannot hold.

    Parameters
    ----------
    title : str
        Name of the table for the message.
    bits, weight_bits : collection of int
        Widths that the table can hold, for activations and for weights.

    Raises
    ------
    FormatError
        Tensors have zero points other than 0, unsigned integers or other widths; the message
        names them.
    """
    widths = {"activation": bits, "weight": weight_bits}
    problems = [
        f"'{point.tensor}' has {wrong}"
        for role, held in widths.items()
        for point, params in source.points(role)
        if (wrong := _unsayable(point, params, held))
    ]
    refuse(problems, f"{title} holds signed symmetric integers of certain widths only")


def _unsayable(point: QuantPoint, params: QuantParams, widths: Any) -> str | None:
    if np.any(params.zero_point):
        return "a zero_point other than 0"
    if not params.signed:
        return "unsigned integers"
    return None if point.spec.bits in widths else f"{point.spec.bits} bits"


def activation_keys(_graph: gs.Graph, plan: QuantPlan) -> Iterator[Key]:
    """Yield the keys of a table in which activations have the names of their tensors."""
    return (Key(p.tensor, p.parameters) for p in plan.grid_points() if p.role == "activation")


def thresholds(source: Calibrated, title: str) -> dict[str, float]:
    """Return ``127 * s`` of each activation, by tensor, in units of the tensor.

    Raises
    ------
    FormatError
        As `require_symmetric`.
    """
    require_symmetric(source, title)
    return {p.tensor: 127 * float(params.scale) for p, params in source.points("activation")}


def put_thresholds(found: Found, plan: QuantPlan, table: Mapping[str, float]) -> None:
    """Add the parameters of a table of thresholds: inverse of `thresholds`."""
    tensors = [p for p in plan.grid_points() if p.role == "activation"]
    for point in tensors:
        if point.tensor in table:
            found.put(point, table[point.tensor] / 127, signed=True, name=point.tensor)
        else:
            found.missing.append(point.tensor)
    found.put_weights_by_absmax(plan)
    found.unused += sorted(table.keys() - {p.tensor for p in tensors})
