"""Values as JSON can hold them."""

from __future__ import annotations

import math
from dataclasses import asdict, is_dataclass
from typing import Any

__all__ = ["json_value"]


def json_value(value: Any) -> Any:
    """Return a value for JSON: dataclasses become objects, numbers that are not finite None.

    >>> json_value({"psnr": math.inf, "top1": 0.5, "range": (0, math.nan)})
    {'psnr': None, 'top1': 0.5, 'range': [0, None]}
    """
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, dict):
        return {name: json_value(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
