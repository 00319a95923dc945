"""Check names that a caller chooses from a list; refuse a wrong one and suggest the nearest."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Literal, TypeAlias

from onnxqat.errors import OnnxQatError, OptionError

__all__ = ["ObserverName", "check_choice", "nearest"]

# The ways to choose a clipping range, see `onnxqat.calibration.observers`. The names are defined
# here so that the command line and the rules can read them without importing numpy.
ObserverName: TypeAlias = Literal[
    "mse",
    "minmax",
    "moving-average",
    "average",
    "percentile",
    "kl-tensorrt",
    "kl-tpu-mlir",
    "aciq-gauss",
    "aciq-laplace",
    "auto",
]

MAX_SHOWN = 8  # names in a message


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a sentence that lists the known names most similar to ``name``, or else some names."""
    names = list(known)
    if not names:
        return "There are none."
    found = difflib.get_close_matches(name, names, n=3)
    more = ", ..." if not found and len(names) > MAX_SHOWN else ""
    listed = ", ".join(f"'{n}'" for n in found or names[:MAX_SHOWN])
    return f"{'The nearest: ' if found else 'There are: '}{listed}{more}."


def check_choice(
    what: str, value: object, known: Iterable[str], error: type[OnnxQatError] = OptionError
) -> None:
    """Refuse a value that is not one of the known names.

    Parameters
    ----------
    what : str
        The name of the parameter, for the message.
    value : object
        The value that the caller gave.
    known : iterable of str
        The allowed values.
    error : type of OnnxQatError
        The type of the error.

    Raises
    ------
    OnnxQatError
        An error of the type ``error``, which suggests the nearest allowed value.
    """
    names = tuple(known)
    if value not in names:
        raise error(f"{what} '{value}' is unknown. {nearest(str(value), names)}")
