"""Hyper-parameters recommended by vendors, in a TOML file each, with the names of `Config`."""

from __future__ import annotations

import tomllib
from importlib import resources
from typing import Any

from onnxqat.errors import TrainingError

__all__ = ["preset", "preset_names"]


def preset_names() -> list[str]:
    """Return the names, sorted."""
    files = resources.files(__name__).iterdir()
    return sorted(f.name.removesuffix(".toml") for f in files if f.name.endswith(".toml"))


def preset(name: str) -> dict[str, Any]:
    """Return hyper-parameters for `onnxqat.train.Config`.

    Raises
    ------
    TrainingError
        There is no preset of this name.

    Examples
    --------
    >>> preset("horizon")["method"]
    'moving-average'
    """
    if name not in preset_names():
        raise TrainingError(f"No preset '{name}'. Use one of {', '.join(preset_names())}.")
    file = resources.files(__name__) / f"{name}.toml"
    return tomllib.loads(file.read_text(encoding="utf-8"))
