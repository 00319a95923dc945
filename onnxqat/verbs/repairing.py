"""Equalize a float model before it is quantized, and advise when to do so."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxqat.data import DataSet
from onnxqat.errors import ModelError
from onnxqat.foreign import ForeignParams
from onnxqat.model import Model
from onnxqat.plan import QuantPlan
from onnxqat.quantized import weights_hash
from onnxqat.repair import SMALL_DB, Equalized, Relu6, original, unevenness
from onnxqat.repair import equalize as run
from onnxqat.rules import HardwareRule
from onnxqat.verbs.listener import Listener
from onnxqat.verbs.planning import Overrides, planned

__all__ = ["Equalization", "compared_batches", "repaired", "repairs", "told"]

NAMED = 3  # the most layers that advice names
COMPARED = 64  # the most samples on which outputs are compared

Feeds = Mapping[str, NDArray[Any]]


class Equalization:
    """Equalizes a prepared model before insertion, and keeps the result.

    Parameters
    ----------
    relu6 : {"auto", "keep", "replace"}
        See `onnxqat.repair.equalize`.
    open_samples : callable, optional
        Opens the data for the prepared model. Without it, random values are used.

    Attributes
    ----------
    samples : DataSet or None
        The opened data.
    result : Equalized or None
        The result for the last model; None before the first.
    source : str
        Hash of the weights of the model that can be the teacher.
    per_channel : int
        The number of equalized layers whose weights have a scale per channel.
    """

    def __init__(
        self, relu6: Relu6, open_samples: Callable[[Model], DataSet] | None = None
    ) -> None:
        self.relu6, self.source = relu6, ""
        self.per_channel = 0
        self.samples: DataSet | None = None
        self.result: Equalized | None = None
        self._open_samples = open_samples

    def __call__(self, prepared: Model, plan: QuantPlan) -> Model:
        """Return the equalized model; ``plan`` is that of the prepared one.

        With its biases before the repair, the model computes the same as the user's model and can
        be the teacher. If a ReLU6 was replaced, only the user's model can be the teacher.
        """
        if self._open_samples is not None and self.samples is None:
            self.samples = self._open_samples(prepared)
        batches = None if self.samples is None else compared_batches(self.samples)
        specs = {point.tensor: point.spec for point in plan.points if point.role == "activation"}
        self.result = run(prepared, batches, relu6=self.relu6, activations=specs)
        self.per_channel = _per_channel(self.result, plan)
        model = self.result.model
        teacher = prepared if self.result.relu6.nodes else original(model)
        self.source = weights_hash(teacher.graph)
        return model

    def tell(self, listener: Listener) -> None:
        """Report the result to the listener."""
        if self.result is None:
            return
        on = "random values" if self.samples is None else f"at most {COMPARED} samples"
        for line in told(self.result):
            listener.note(f"{line}.")
        listener.note(f"Outputs were compared on {on}.")
        if self.per_channel:
            listener.note(
                f"{self.per_channel} of these layers have a scale per channel. There, "
                "equalization can also make the quantized model less accurate. Compare with "
                "'insert --bias-correction' without --equalize: onnxqat evaluate."
            )
        if self.result.relu6.nodes:
            listener.note(
                "Pass your float model as --teacher to finetune, because a ReLU6 was replaced."
            )


def _per_channel(result: Equalized, plan: QuantPlan) -> int:
    """Return the number of equalized layers whose weights have a scale per channel.

    Ranges that differ between their output channels cost nothing. Making them equal changes the
    ranges of input channels and activations, which share scales. So some networks lose accuracy
    (measured in docs/accuracy.md).
    """
    weights = [p for p in plan.points if p.role == "weight" and p.spec.axis is not None]
    return len({edge.node for p in weights for edge in p.consumers} & set(result.layers))


def compared_batches(data: DataSet, batch_size: int | None = None) -> list[Feeds]:
    """Return batches of samples on which outputs are compared, spread evenly over the data.

    The first samples of a folder are often of one class.
    """
    size = data.batch_size(batch_size, default=32)
    count = min(len(data), COMPARED)
    chosen = np.arange(count) * len(data) // count
    return [batch.inputs for batch in data.batches(size, indices=chosen)]


def told(result: Equalized) -> list[str]:
    """Return the results of an equalization as lines of text."""
    relus, lines = result.relu6, [f"Equalized {len(result.layers)} layers"]
    if result.migrations:
        count = len(result.migrations)
        lines.append(f"Moved the ranges of {count} normalizations into the MatMuls behind them")
    lines += [f"Output {one}" for one in result.differences]
    if relus.nodes:
        lines.append(f"{len(relus.nodes)} ReLU6 became Relu")
    elif relus.cost:
        lines.append(
            f"{len(relus.kept)} ReLU6 were kept: without them, an output has an SQNR below "
            f"{SMALL_DB:g} dB. To replace them all the same, pass --relu6 replace"
        )
    elif relus.kept:
        lines.append(
            f"{len(relus.kept)} ReLU6 were kept, so the layers before and after each one were not "
            "equalized with each other. Give data to measure the cost of replacing them by Relu, "
            "or pass --relu6 replace"
        )
    lines += [f"Without ReLU6, output {one}" for one in relus.cost]
    if result.absorbed:
        lines.append(f"Absorbed high biases of {len(result.absorbed)} layers")
    lines += [f"Absorption changed output {one}" for one in result.absorption_cost]
    if result.fitted:
        lines.append(f"Fitted {len(result.fitted)} activations to scales that are powers of two")
    return lines


def repaired(
    floats: Model,
    equalization: Equalization | None,
    foreign: Mapping[str, ForeignParams],
    rule: HardwareRule,
    overrides: Overrides,
) -> tuple[Model, QuantPlan]:
    """Prepare a model, equalize it if requested, and plan."""
    if equalization is None:
        return planned(floats, rule, overrides)
    if foreign:
        raise ModelError(
            f"{floats.name}: contains Q/DQ pairs of another tool, whose scales would not fit the "
            "equalized weights. Leave --equalize out, or give the float model."
        )
    return planned(floats, rule, overrides, repair=equalization)


def repairs(prepared: Model, plan: QuantPlan, path: str) -> list[str]:
    """Return the advised repairs of a model before quantization, each a line with a command."""
    quantized = {edge.node for p in plan.points if p.role == "weight" for edge in p.consumers}
    uneven = [one for one in unevenness(prepared.graph) if one.node in quantized]
    if not uneven:
        return []
    worst = ", ".join(
        f"'{one.node}' ({one.before:.1f} octaves below the largest, {one.after:.1f} if equalized)"
        for one in uneven[:NAMED]
    )
    counted = "1 weight" if len(uneven) == 1 else f"{len(uneven)} weights"
    advice = (
        f"The channels of {counted} have very different ranges: {worst}. Equalize "
        f"them; this prints the change of the outputs: onnxqat insert {path} --equalize."
    )
    return [advice]
