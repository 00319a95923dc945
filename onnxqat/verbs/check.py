"""What of a model a chip cannot run, or runs in float, and why."""

from __future__ import annotations

from dataclasses import dataclass

from onnxqat.deploy import name_problems
from onnxqat.foreign import read_foreign_qdq
from onnxqat.model import Model
from onnxqat.model import load_model as load_file
from onnxqat.plan import QuantPlan, Skip
from onnxqat.quantized import QuantizedModel
from onnxqat.train import Untrainable, untrainable_nodes
from onnxqat.verbs.models import AnySource, name_of
from onnxqat.verbs.planning import AnyRule, Overrides, planned, rule_of
from onnxqat.verbs.repairing import repairs

__all__ = ["Check", "check"]


@dataclass(frozen=True, kw_only=True, repr=False)
class Check:
    """What was found.

    Attributes
    ----------
    plan : QuantPlan
        What is quantized, and what stays float.
    table : str or None
        The rule's calibration table.
    names : tuple of str
        The names that it could not hold, and why.
    untrainable : tuple of Untrainable
        The nodes that keep the model from being fine-tuned, where that was asked for.
    advice : tuple of str
        What to do to the model before it is quantized.
    """

    plan: QuantPlan
    table: str | None
    names: tuple[str, ...]
    untrainable: tuple[Untrainable, ...] = ()
    advice: tuple[str, ...] = ()

    @property
    def unsupported(self) -> tuple[Skip, ...]:
        """The nodes that the chip cannot run."""
        return tuple(skip for skip in self.plan.skips if skip.unsupported)

    @property
    def passed(self) -> bool:
        """Whether nothing stands against the rule, its table and, where asked for, training."""
        return not (self.unsupported or self.names or self.untrainable)

    def __repr__(self) -> str:
        found = f"{len(self.plan.grid_points())} tensors quantized"
        counts = {
            "nodes in float": len(self.plan.skips) - len(self.unsupported),
            "unsupported": len(self.unsupported),
            "names that the table cannot hold": len(self.names),
            "without gradient": len(self.untrainable),
        }
        rest = "".join(f", {count} {what}" for what, count in counts.items() if count)
        return f"Check(rule '{self.plan.rule}', {found}{rest})"


def check(
    model: AnySource,
    *,
    rules: AnyRule = "onnxruntime-cpu",
    overrides: Overrides = (),
    train: bool = False,
) -> Check:
    """Return what of a model a chip cannot run, or runs in float, as ``onnxqat check`` does.

    Parameters
    ----------
    model : str, Path, Model or QuantizedModel
        Float, or with Q/DQ pairs of any tool, which are taken out.
    rules, overrides
        See `onnxqat.insert`.
    train : bool
        Also look for nodes that keep it from being fine-tuned.

    Raises
    ------
    OnnxQatError
        A file cannot be read, or an argument is wrong.
    """
    floats, _ = read_foreign_qdq(_with_pairs(model))
    rule = rule_of(rules)
    prepared, found = planned(floats, rule, overrides)
    return Check(
        plan=found,
        table=rule.table,
        names=tuple(name_problems(prepared, found, rule.table)),
        untrainable=tuple(untrainable_nodes(prepared, found)) if train else (),
        advice=tuple(repairs(prepared, found, name_of(model))),
    )


def _with_pairs(model: AnySource) -> Model:
    """Return a model with the Q/DQ pairs that its file has."""
    if isinstance(model, QuantizedModel):
        return model.qdq()
    return model if isinstance(model, Model) else load_file(model)
