"""What is repaired in a float model before it is quantized, and what says that it should be."""

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

NAMED = 3  # layers that advice names
COMPARED = 64  # samples of the data on which outputs are compared

Feeds = Mapping[str, NDArray[Any]]


class Equalization:
    """Equalizes what is inserted into, and keeps what was done.

    Parameters
    ----------
    relu6 : {"auto", "keep", "replace"}
        See `onnxqat.repair.equalize`.
    open_samples : callable, optional
        Opens the data for the prepared model; without, random values stand for them.

    Attributes
    ----------
    samples : DataSet or None
        The data, once they are open.
    result : Equalized or None
        The result for the last model; None before the first.
    source : str
        Hash of the weights of the model that may teach.
    """

    def __init__(
        self, relu6: Relu6, open_samples: Callable[[Model], DataSet] | None = None
    ) -> None:
        self.relu6, self.source = relu6, ""
        self.samples: DataSet | None = None
        self.result: Equalized | None = None
        self._open_samples = open_samples

    def __call__(self, prepared: Model) -> Model:
        """Return the equalized model.

        With the biases that it had before repair it computes what the user's model does, and may
        teach in its place, unless a ReLU6 was replaced: then the user's own has to.
        """
        if self._open_samples is not None and self.samples is None:
            self.samples = self._open_samples(prepared)
        batches = None if self.samples is None else compared_batches(self.samples)
        self.result = run(prepared, batches, relu6=self.relu6)
        model = self.result.model
        teacher = prepared if self.result.relu6.nodes else original(model)
        self.source = weights_hash(teacher.graph)
        return model

    def tell(self, listener: Listener) -> None:
        """Say what was done."""
        if self.result is None:
            return
        on = "random values" if self.samples is None else f"{COMPARED} samples at most"
        for line in told(self.result):
            listener.note(f"{line}.")
        listener.note(f"Outputs were compared on {on}.")
        if self.result.relu6.nodes:
            listener.note("Fine-tuning needs your model as --teacher, for its ReLU6.")


def compared_batches(data: DataSet, batch_size: int | None = None) -> list[Feeds]:
    """Return the first samples of the data, on which outputs are compared."""
    size = data.batch_size(batch_size, default=32)
    chosen = np.arange(min(len(data), COMPARED))
    return [batch.inputs for batch in data.batches(size, indices=chosen)]


def told(result: Equalized) -> list[str]:
    """Return what was done, in lines for people."""
    relus, lines = result.relu6, [f"Equalized {len(result.layers)} layers"]
    if result.migrations:
        count = len(result.migrations)
        lines.append(f"Moved the ranges of {count} normalizations into the MatMuls behind them")
    lines += [f"Output {one}" for one in result.differences]
    if relus.nodes:
        lines.append(f"{len(relus.nodes)} ReLU6 became Relu")
    elif relus.cost:
        lines.append(
            f"{len(relus.kept)} ReLU6 stay: without them an output falls below {SMALL_DB:g} dB. "
            "--relu6 replace replaces them all the same"
        )
    elif relus.kept:
        lines.append(
            f"{len(relus.kept)} ReLU6 stay, which no scale passes. Give data to see what a Relu "
            "in their place costs, or --relu6 replace"
        )
    lines += [f"Without ReLU6, output {one}" for one in relus.cost]
    if result.absorbed:
        lines.append(f"Absorbed high biases of {len(result.absorbed)} layers")
    lines += [f"By absorption, output {one}" for one in result.absorption_cost]
    return lines


def repaired(
    floats: Model,
    equalization: Equalization | None,
    foreign: Mapping[str, ForeignParams],
    rule: HardwareRule,
    overrides: Overrides,
) -> tuple[Model, QuantPlan]:
    """Prepare, equalize where it is asked for, and plan."""
    if equalization is None:
        return planned(floats, rule, overrides)
    if foreign:
        raise ModelError(
            f"{floats.name}: holds Q/DQ pairs of another tool, whose scales would not fit the "
            "equalized weights. Leave --equalize out, or give the float model."
        )
    return planned(floats, rule, overrides, repair=equalization)


def repairs(prepared: Model, plan: QuantPlan, path: str) -> list[str]:
    """Return what to do to a model before it is quantized: a line with the command for each."""
    quantized = {edge.node for p in plan.points if p.role == "weight" for edge in p.consumers}
    uneven = [one for one in unevenness(prepared.graph) if one.node in quantized]
    if not uneven:
        return []
    worst = ", ".join(
        f"'{one.node}' ({one.before:.1f} octaves below the largest, {one.after:.1f} if equalized)"
        for one in uneven[:NAMED]
    )
    advice = (
        f"The channels of {len(uneven)} weights have very different ranges: {worst}. Equalize "
        f"them, which prints what it does to the outputs: onnxqat insert {path} --equalize."
    )
    return [advice]
