"""Names of which a caller chooses one: a wrong one is refused, and the nearest right one named."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Literal, TypeAlias

from onnxqat.errors import OnnxQatError, OptionError

__all__ = ["ObserverName", "check_choice", "nearest"]

# How a clipping range is chosen, see `onnxqat.calibration.observers`. The names stand here, where
# the command line and the rules find them without importing numpy.
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
    """Return a sentence with the known names that are most like ``name``, or else with some."""
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
    """Refuse a value that is none of those there are.

    Parameters
    ----------
    what : str
        The parameter, for the message.
    value : object
        What the caller gave.
    known : iterable of str
        What may be given.
    error : type of OnnxQatError
        What is raised.

    Raises
    ------
    OnnxQatError
        An error of the type ``error``, which names the nearest right value.
    """
    names = tuple(known)
    if value not in names:
        raise error(f"{what} '{value}' is unknown. {nearest(str(value), names)}")
