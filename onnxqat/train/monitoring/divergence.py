"""Detect rising losses, and explain losses and gradients that are not finite."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import msgspec
import numpy as np
import onnx

from onnxqat.pairs import parameters_of
from onnxqat.qparams import FloatArray

__all__ = ["RECENT_STEPS", "LossHistory", "explain_gradients", "explain_loss", "not_finite"]

# The mean loss of the last steps is compared with that of the same number of steps at the start.
RECENT_STEPS = 20
RISE, STANDARD_ERRORS = 1.5, 4.0  # a rise exceeds this factor, and the noise


class LossHistory(msgspec.Struct, kw_only=True):
    """The first and the last losses.

    Attributes
    ----------
    window : int
        The number of losses that are compared at each end; 0: no comparison.
    count : int
        The number of losses so far.
    first, recent : list of float
        The first ``window``, and the last `RECENT_STEPS`.
    """

    window: int
    count: int = 0
    first: list[float] = []
    recent: list[float] = []

    def add(self, loss: float) -> None:
        """Add the loss of one step."""
        self.count += 1
        if len(self.first) < self.window:
            self.first.append(loss)
        self.recent = [*self.recent, loss][-RECENT_STEPS:]

    @property
    def mean(self) -> float:
        """The mean of the last losses."""
        return float(np.mean(self.recent))

    def rising(self) -> bool:
        """Whether the mean of the last losses is clearly above that of the first."""
        window = self.window
        if not window or self.count % window or self.count < 2 * window:
            return False
        first, last = np.array(self.first), np.array(self.recent[-window:])
        noise = math.sqrt((first.var() + last.var()) / window)
        rise = last.mean() - first.mean()
        return bool(last.mean() > RISE * first.mean() and rise > STANDARD_ERRORS * noise)


def not_finite(arrays: Mapping[str, FloatArray], buffer: FloatArray) -> list[str]:
    """Return the names of the arrays that contain a value that is not finite.

    ``buffer`` contains all arrays, so that a single product shows whether all values are finite.
    """
    if math.isfinite(float(np.dot(buffer, buffer))):
        return []
    return [name for name, array in arrays.items() if not np.isfinite(array).all()]


def explain_gradients(graph: onnx.GraphProto, names: Iterable[str], *, moved: bool) -> str:
    """Return a text that names the gradients that are not finite, and the next step.

    Parameters
    ----------
    graph : onnx.GraphProto
        The graph of the training form.
    names : iterable of str
        The parameters, by input name.
    moved : bool
        Whether training has changed any parameter yet.
    """
    wrong = set(names)
    # going back from the loss, the first of them is the cause
    name = next(n for node in reversed(graph.node) for n in node.input if n in wrong)
    alone = {parameters_of(n) for n in wrong} == {name}
    if alone or len(wrong) == 1:
        return (
            f"only the gradient of '{name}' is not finite. "
            f'Freeze this tensor with --group "tensor:{name}.freeze=true"'
        )
    rate = (
        "Try a smaller --lr, or l"
        if moved
        else "Nothing was trained yet, so --lr is not the cause: l"
    )
    return (
        f"the gradients of {len(wrong)} tensors are not finite, from '{name}' back to the "
        f"inputs. {rate}ook for too large values there with 'onnxqat evaluate'"
    )


def explain_loss(values: Mapping[str, FloatArray], buffer: FloatArray, *, moved: bool) -> str:
    """Return why a loss is not finite, judged by the parameters."""
    wrong = not_finite(values, buffer)
    if wrong:
        return f"the values of '{wrong[0]}' are not finite. Try a smaller --lr"
    if moved:
        return "all parameters are finite. Try a smaller --lr"
    return (
        "nothing was trained yet, so --lr is not the cause: outputs of the model or of the teacher "
        "are not finite on these data. Check them with 'onnxqat evaluate'"
    )
