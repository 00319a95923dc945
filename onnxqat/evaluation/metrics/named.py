"""The metrics: built-in ones by name, functions of the user as ``module:function``.

A metric is a function ``metric(outputs, data)`` that returns numbers by name; more is better. The
first number ranks training states and layers.

- ``outputs`` iterates over batches; each is a mapping of arrays by the name of the output.
- ``data`` iterates over the same batches side by side; each is a
  `onnxqat.evaluation.metrics.MetricBatch`.

Both can be read only once, and must be read side by side. A function that needs earlier batches
must keep them itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from onnxqat.choices import nearest
from onnxqat.data.function import FUNCTION, import_function
from onnxqat.errors import OptionError
from onnxqat.evaluation.decoders import Detector
from onnxqat.evaluation.metrics.batch import MetricFunction

__all__ = ["BUILT_IN", "AnyMetric", "Metric", "Need", "read_metric"]

Need: TypeAlias = Literal["labels", "truth", "boxes", "reference", "everything"]
HERE = "onnxqat.evaluation.metrics"

# By name: where the function is, and what it reads besides the outputs.
BUILT_IN: dict[str, tuple[str, Need]] = {
    "top1": (f"{HERE}.accuracy:top1", "labels"),
    "top5": (f"{HERE}.accuracy:top5", "labels"),
    "agreement": (f"{HERE}.agreement:agreement", "reference"),
    "cosine": (f"{HERE}.signal:cosine", "reference"),
    "sqnr": (f"{HERE}.signal:sqnr", "reference"),
    "mean-iou": (f"{HERE}.segmentation:mean_iou", "truth"),
    "psnr": (f"{HERE}.images:psnr", "truth"),
    "exact-match": (f"{HERE}.spans:exact_match", "truth"),
    "f1": (f"{HERE}.spans:f1", "truth"),
    "map": (f"{HERE}.detection:mean_average_precision", "boxes"),
}


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A metric that the user named.

    Attributes
    ----------
    name : str
        Name as the user gave it.
    function : callable
        The metric function, see the module's docstring.
    needs : {"labels", "truth", "boxes", "reference", "everything"}
        What it reads besides the outputs; a function of the user gets everything.
    arrays : tuple of str
        Names of the data's arrays that its batches contain.
    truth : mapping of str to str
        Name of the array with an output's true values, by the name of the output.
    detector : Detector
        Decodes outputs to boxes.
    """

    name: str
    function: MetricFunction
    needs: Need
    arrays: tuple[str, ...] = ()
    truth: Mapping[str, str] = field(default_factory=dict)
    detector: Detector = field(default_factory=Detector)

    @property
    def compares(self) -> bool:
        """Whether it compares with the reference model, which then has no value of its own."""
        return self.needs == "reference"

    @property
    def built_in(self) -> bool:
        """Whether it is not a function of the user."""
        return self.needs != "everything"


AnyMetric: TypeAlias = str | MetricFunction | Metric


def read_metric(given: AnyMetric, more: Iterable[str] = ()) -> Metric:
    """Return a metric by name; import a function of the user, the current directory first.

    Parameters
    ----------
    given : str or callable
        A key of `BUILT_IN`, or ``module:function``, or the function itself.
    more : iterable of str
        Further names that the caller accepts, for the error message.

    Raises
    ------
    OptionError
        There is no metric with that name.
    DataError
        There is no such function, or importing it raised.
    """
    if isinstance(given, Metric):
        return given
    if callable(given):
        name = f"{given.__module__}:{getattr(given, '__qualname__', type(given).__qualname__)}"
        return Metric(name=name, function=given, needs="everything")
    if given in BUILT_IN:
        place, needs = BUILT_IN[given]
        return Metric(name=given, function=import_function(place), needs=needs)
    if FUNCTION.fullmatch(given):
        return Metric(name=given, function=import_function(given), needs="everything")
    raise OptionError(
        f"--metric '{given}' is unknown. {nearest(given, [*more, *BUILT_IN])} For a function of "
        "your own, give module:function."
    )
