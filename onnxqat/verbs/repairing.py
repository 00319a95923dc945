"""What is repaired in a float model before it is quantized, and what says that it should be."""

from __future__ import annotations

from collections.abc import Mapping

from onnxqat.errors import ModelError
from onnxqat.foreign import ForeignParams
from onnxqat.model import Model
from onnxqat.plan import QuantPlan
from onnxqat.quantized import weights_hash
from onnxqat.repair import Equalized, unevenness
from onnxqat.repair import equalize as run
from onnxqat.rules import HardwareRule
from onnxqat.verbs.listener import Listener
from onnxqat.verbs.planning import Overrides, planned

__all__ = ["Equalization", "repaired", "repairs"]

NAMED = 3  # layers that advice names


class Equalization:
    """Equalizes what is inserted into, and keeps what was done.

    Attributes
    ----------
    result : Equalized or None
        The result for the last model; None before the first.
    source : str
        Hash of the weights of the model that may teach.
    """

    def __init__(self, relu6: str) -> None:
        self.relu6, self.source = relu6, ""
        self.result: Equalized | None = None

    def __call__(self, prepared: Model) -> Model:
        """Return the equalized model.

        It computes what the user's model does, and may teach in its place, unless a ReLU6 was
        replaced: then the user's own has to.
        """
        self.result = run(prepared, relu6=self.relu6)  # type: ignore[arg-type]
        teacher = prepared if self.result.relu6 else self.result.model
        self.source = weights_hash(teacher.graph)
        return self.result.model

    def tell(self, listener: Listener) -> None:
        """Say what was done."""
        if self.result is None:
            return
        listener.note(f"Equalized {len(self.result.layers)} layers.")
        for one in self.result.differences:
            listener.note(f"Output {one}, on random values.")
        if self.result.relu6:
            count = len(self.result.relu6)
            listener.note(f"{count} ReLU6 became Relu; fine-tuning needs --teacher.")
        for one in self.result.relu6_cost:
            listener.note(f"Without ReLU6, output {one}, on random values.")


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
        f"them, which does not change the outputs: onnxqat insert {path} --equalize."
    )
    return [advice]
