"""Parse the text of a loss into terms.

::

    loss = part { "+" part }
    part = [ weight "*" ] ( KIND [ ":" NAME ] [ "=" ARRAY ] | FILE )

KIND is one of `KINDS`. NAME is an output of the model, or ``tensor/`` followed by the name of any
tensor. Without it, a kind that learns from labels reads the first output, and other kinds read all
outputs. ARRAY is an array of the data that replaces the labels or the teacher. FILE is an ONNX
model that computes a loss, see `onnxqat.train.losses.graph`. Names that contain ``+``, ``=`` or
``"``, and files that contain ``:`` or ``*``, are written between double quotes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from onnxqat.choices import nearest
from onnxqat.errors import TrainingError
from onnxqat.model import Model, load_model

__all__ = [
    "KINDS",
    "Balance",
    "Loss",
    "Term",
    "check_options",
    "parse_loss",
    "read_loss",
]

# The kinds, and the target of each if no array is named.
KINDS: dict[str, Literal["labels", "teacher", "array"]] = {
    "cross-entropy": "labels",
    "kl": "teacher",
    "mse": "teacher",
    "l1": "teacher",
    "smooth-l1": "teacher",
    "bce": "array",
}
MAX_LENGTH = 4096  # characters
NAME = r'"[^"]+"|[^+="\s]+(?:\s+[^+="\s]+)*'
PART = re.compile(
    r"\s*(?:(?P<weight>\d+(?:\.\d*)?(?:[eE][-+]?\d+)?|\.\d+)\s*\*\s*)?"
    r'(?P<kind>"[^"]+"|[^+:*="\s]+(?: +[^+:*="\s]+)*)\s*'
    rf"(?::\s*(?P<output>{NAME})\s*)?(?:=\s*(?P<array>{NAME})\s*)?(?:\+|$)"
)


@dataclass(frozen=True, kw_only=True)
class Balance:
    """Weights of the parts of an output, by which their squared differences are multiplied.

    Attributes
    ----------
    axis : int
        The axis along which the parts are joined.
    sizes : tuple of int
        The length of each part.
    weights : tuple of float
        The weight of each part.
    """

    axis: int
    sizes: tuple[int, ...]
    weights: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Term:
    """One part of a loss.

    Attributes
    ----------
    kind : str
        One of `KINDS`, or the path of an ONNX file.
    weight : float
        The factor of the term, above 0.
    output : str or None
        The output, or ``tensor/NAME``; None: the outputs that the kind reads by default.
    array : str or None
        The array of the data to learn from; None: labels or teacher.
    balance : Balance or None
        The weights of the output's parts for ``mse``; None for other losses.
    """

    kind: str
    weight: float = 1.0
    output: str | None = None
    array: str | None = None
    balance: Balance | None = None

    @property
    def is_file(self) -> bool:
        """Whether the term is an ONNX file."""
        return self.kind not in KINDS

    @property
    def reads_labels(self) -> bool:
        """Whether the term learns from the class labels of the data."""
        return self.array is None and KINDS.get(self.kind) == "labels"


@dataclass(frozen=True, kw_only=True)
class Loss:
    """A loss: the sum of its terms.

    Attributes
    ----------
    terms : tuple of Term
        The terms.
    graphs : mapping of str to Model
        The models of terms that are ONNX files, by path.
    label_smoothing : float or None
        Share of each label that cross-entropy spreads evenly over all classes (Szegedy et al.
        2016, section 7).
    ignore_index : int or None
        Label of the positions that cross-entropy ignores.
    """

    terms: tuple[Term, ...]
    graphs: Mapping[str, Model]
    label_smoothing: float | None = None
    ignore_index: int | None = None


def read_loss(
    text: str, *, label_smoothing: float | None = None, ignore_index: int | None = None
) -> Loss:
    """Parse the text of a loss, and read the files that it names.

    Raises
    ------
    TrainingError
        See `parse_loss`; or an option of cross-entropy is given, but the loss does not use it.
    ModelError
        A file is not an ONNX model, see `onnxqat.model.load_model`.
    """
    terms = parse_loss(text)
    loss = Loss(
        terms=terms,
        graphs={},
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
    )
    check_options(loss)
    return replace(
        loss, graphs={term.kind: load_model(term.kind) for term in terms if term.is_file}
    )


def check_options(loss: Loss) -> None:
    """Refuse options of cross-entropy if the loss does not contain cross-entropy.

    Raises
    ------
    TrainingError
        Such an option is given.
    """
    options = {"label-smoothing": loss.label_smoothing, "ignore-index": loss.ignore_index}
    for option, value in options.items():
        if value is not None and all(term.kind != "cross-entropy" for term in loss.terms):
            kinds = "+".join(term.kind for term in loss.terms)
            raise TrainingError(
                f"--{option} needs cross-entropy, which the loss '{kinds}' does not contain. "
                "Leave it out."
            )


def parse_loss(text: str) -> tuple[Term, ...]:
    """Read the text of a loss.

    Raises
    ------
    TrainingError
        The text does not follow the grammar, or a kind is unknown; the message shows the place.

    Examples
    --------
    >>> [term.kind for term in parse_loss("cross-entropy+kl")]
    ['cross-entropy', 'kl']
    >>> (term,) = parse_loss("0.5*mse:boxes=targets")
    >>> term.kind, term.weight, term.output, term.array
    ('mse', 0.5, 'boxes', 'targets')
    """
    if len(text) > MAX_LENGTH:
        raise TrainingError(f"--loss: has {len(text)} characters. Give at most {MAX_LENGTH}.")
    terms: list[Term] = []
    start, more = 0, True
    while more:
        match = PART.match(text, start)
        where = f"at character {start + 1} of '{text}'"
        if match is None:
            raise TrainingError(
                f"--loss: cannot read '{text[start:]}' {where}. Write parts such as kl, "
                "0.5*mse:OUTPUT, l1:OUTPUT=ARRAY or loss.onnx, joined by +."
            )
        terms.append(_term(match, where))
        start, more = match.end(), match.group().endswith("+")
    doubled = next((term for i, term in enumerate(terms) if term in terms[:i]), None)
    if doubled is not None:
        raise TrainingError(
            f"--loss: '{doubled.kind}' occurs twice in '{text}'. Give it a weight instead."
        )
    return tuple(terms)


def _term(match: re.Match[str], where: str) -> Term:
    groups = {name: value.strip('"') for name, value in match.groupdict("").items()}
    kind, output, array = groups["kind"], groups["output"] or None, groups["array"] or None
    weight = float(groups["weight"] or 1)
    if not 0 < weight < math.inf:
        raise TrainingError(
            f"--loss: the weight {weight} {where} must be finite and above 0. Change it."
        )
    if kind not in KINDS and not kind.lower().endswith(".onnx"):
        raise TrainingError(
            f"Unknown loss '{kind}' {where}. {nearest(kind, KINDS)} A file ends in .onnx."
        )
    if kind not in KINDS and (output or array):
        raise TrainingError(
            f"--loss: '{kind}' {where} is followed by an output or array. Leave these out: the "
            "inputs of the file name the values that they read."
        )
    if kind in KINDS and KINDS[kind] == "array" and array is None:
        raise TrainingError(
            f"--loss: {kind} {where} learns from an array of the data. Name it, as in "
            f"{kind}:OUTPUT=ARRAY."
        )
    return Term(kind=kind, weight=weight, output=output, array=array)
