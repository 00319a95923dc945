"""Plan the quantization of a model."""

from __future__ import annotations

from onnxqat.foreign import read_foreign_qdq
from onnxqat.plan import QuantPlan
from onnxqat.repair import Relu6
from onnxqat.settings import Settings, settle
from onnxqat.verbs.models import AnySource, float_model
from onnxqat.verbs.planning import AnyRule, Overrides, rule_of
from onnxqat.verbs.repairing import Equalization, repaired

__all__ = ["plan"]


def plan(
    model: AnySource,
    *,
    rules: AnyRule = "onnxruntime-cpu",
    overrides: Overrides = (),
    settings: Settings = Settings(),  # noqa: B008 (frozen)
    equalize: bool = False,
    relu6: Relu6 = "auto",
) -> QuantPlan:
    """Return the plan of `insert`, with reasons, like ``onnxqat insert --plan-only``.

    Parameters
    ----------
    model, rules, overrides, settings, equalize, relu6
        See `onnxqat.insert`.

    Raises
    ------
    OnnxQatError
        A file cannot be read, an argument is wrong, or the rule quantizes nothing in the model.
    """
    floats, foreign = read_foreign_qdq(float_model(model))
    settle(floats, settings)
    equalization = Equalization(relu6) if equalize else None
    return repaired(floats, equalization, foreign, rule_of(rules), overrides)[1]
