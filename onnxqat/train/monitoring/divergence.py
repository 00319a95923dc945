"""The losses of a run, and whether they rise; and what is said of numbers that are not finite."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import msgspec
import numpy as np
import onnx

from onnxqat.pairs import parameters_of
from onnxqat.qparams import FloatArray

__all__ = ["RECENT_STEPS", "LossHistory", "explain_gradients", "explain_loss", "not_finite"]

# The mean loss of the last steps is compared with that of as many at the start.
RECENT_STEPS = 20
RISE, STANDARD_ERRORS = 1.5, 4.0  # a rise is one by this factor, and beyond the noise


class LossHistory(msgspec.Struct, kw_only=True):
    """The first and the last losses.

    Attributes
    ----------
    window : int
        How many losses are compared at each end; 0 compares nothing.
    count : int
        How many there were.
    first, recent : list of float
        The first ``window``, and the last `RECENT_STEPS`.
    """

    window: int
    count: int = 0
    first: list[float] = []
    recent: list[float] = []

    def add(self, loss: float) -> None:
        """Take the loss of one more step."""
        self.count += 1
        if len(self.first) < self.window:
            self.first.append(loss)
        self.recent = [*self.recent, loss][-RECENT_STEPS:]

    @property
    def mean(self) -> float:
        """The mean of the last losses."""
        return float(np.mean(self.recent))

    def rising(self) -> bool:
        """Whether the mean of the last losses lies clearly above that of the first."""
        window = self.window
        if not window or self.count % window or self.count < 2 * window:
            return False
        first, last = np.array(self.first), np.array(self.recent[-window:])
        noise = math.sqrt((first.var() + last.var()) / window)
        rise = last.mean() - first.mean()
        return bool(last.mean() > RISE * first.mean() and rise > STANDARD_ERRORS * noise)


def not_finite(arrays: Mapping[str, FloatArray], buffer: FloatArray) -> list[str]:
    """Return the names of the arrays that hold a number that is not finite.

    ``buffer`` holds all of them one behind the other: one product tells that all is well.
    """
    if math.isfinite(float(np.dot(buffer, buffer))):
        return []
    return [name for name, array in arrays.items() if not np.isfinite(array).all()]


def explain_gradients(graph: onnx.GraphProto, names: Iterable[str], *, moved: bool) -> str:
    """Return which gradients are not finite, and what can be done.

    Parameters
    ----------
    graph : onnx.GraphProto
        The training form's.
    names : iterable of str
        The parameters, by input name.
    moved : bool
        Whether training has changed anything yet.
    """
    wrong = set(names)
    # backwards from the loss the first one is where the numbers left the finite ones
    name = next(n for node in reversed(graph.node) for n in node.input if n in wrong)
    alone = {parameters_of(n) for n in wrong} == {name}
    if alone or len(wrong) == 1:
        return (
            f"the gradient of '{name}' is not finite, all others are. "
            f'Leave it as it is with --group "tensor:{name}.freeze=true"'
        )
    rate = "Try a smaller --lr, or l" if moved else "Nothing has moved yet, so no --lr helps: l"
    return (
        f"the gradients of {len(wrong)} tensors are not finite, from '{name}' on back to the "
        f"inputs. {rate}ook for values that are too large there with 'onnxqat evaluate'"
    )


def explain_loss(values: Mapping[str, FloatArray], buffer: FloatArray, *, moved: bool) -> str:
    """Return why a loss is not finite, as far as the parameters tell."""
    wrong = not_finite(values, buffer)
    if wrong:
        return f"the values of '{wrong[0]}' are not finite. Try a smaller --lr"
    if moved:
        return "all parameters are finite. Try a smaller --lr"
    return (
        "and nothing has moved yet, so no --lr helps: outputs of the model, or of the teacher, are "
        "not finite on these data. See what 'onnxqat evaluate' says"
    )
