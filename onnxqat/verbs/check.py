"""Find the nodes of a model that a chip cannot run, or runs in float, and why."""

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
    """The result of `check`.

    Attributes
    ----------
    plan : QuantPlan
        The quantized tensors, and the nodes that stay float.
    table : str or None
        The format of the rule's calibration table.
    names : tuple of str
        The names that the table cannot contain, and why.
    untrainable : tuple of Untrainable
        The nodes that prevent fine-tuning, if these were requested.
    advice : tuple of str
        Advised repairs of the model before it is quantized.
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
        """Whether the rule, its table and, if requested, training accept the model."""
        return not (self.unsupported or self.names or self.untrainable)

    def __repr__(self) -> str:
        found = f"{len(self.plan.grid_points())} tensors quantized"
        counts = {
            "nodes in float": len(self.plan.skips) - len(self.unsupported),
            "unsupported": len(self.unsupported),
            "names that the table cannot contain": len(self.names),
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
    """Return the nodes that a chip cannot run, or runs in float, like ``onnxqat check``.

    Parameters
    ----------
    model : str, Path, Model or QuantizedModel
        A float model, or a model with Q/DQ pairs of any tool, which are removed first.
    rules, overrides
        See `onnxqat.insert`.
    train : bool
        Whether to look for nodes that prevent fine-tuning, too.

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
    """Return a model with the Q/DQ pairs of its file."""
    if isinstance(model, QuantizedModel):
        return model.qdq()
    return model if isinstance(model, Model) else load_file(model)
