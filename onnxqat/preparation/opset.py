"""Upgrade a model to the required opset: 13 (the first with per-axis QuantizeLinear) or above.

If every node is the same in both opsets, only the version number changes. Otherwise onnx's version
converter upgrades the model, and `onnxqat.preparation.conversion` corrects its mistakes. The result
is verified: both models run on the same random input, and an upgrade that changes an output by
more than float32 rounding is refused.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

from onnxqat import native
from onnxqat.ends import open_ends, prune
from onnxqat.errors import ModelError
from onnxqat.model import Model, from_proto
from onnxqat.operators import ONNX_DOMAINS
from onnxqat.preparation.conversion import convert
from onnxqat.preparation.examples import run_example
from onnxqat.runtime import open_session
from onnxqat.versions import MAX_OPSET, changed_node

__all__ = ["upgrade_opset"]

MIN_TARGET = 13
# The tolerance relative to the largest output value: some tens of float32 roundings, because other
# kernels sum in another order.
TOLERANCE = 1e-5


def upgrade_opset(model: Model, minimum: int = MIN_TARGET) -> Model:
    """Return the model at opset ``minimum`` or above; the same object if no upgrade is needed.

    Raises
    ------
    ModelError
        onnxruntime-training does not read the opset, the converter fails, or the outputs of the
        converted model differ.
    """
    target = max(minimum, MIN_TARGET)
    if target > MAX_OPSET:
        raise ModelError(
            f"{model.name}: opset {target} is required, but onnxqat reads at most {MAX_OPSET}."
        )
    if model.graph.opset >= target:
        return model
    source = model.to_proto()
    where = f"{model.name}: opset {model.graph.opset}"
    changed = changed_node(source.graph.node, model.graph.opset, target)
    if changed is None:
        converted = onnx.ModelProto()
        converted.CopyFrom(source)
        for entry in converted.opset_import:
            if entry.domain in ONNX_DOMAINS:
                entry.version = target
    else:
        try:
            converted = convert(source, model.graph.opset, target)
        except native.NativeError as error:
            name = changed.name or changed.output[0]
            raise ModelError(
                f"{where} cannot be upgraded to {target} ({error}); the first node that has to "
                f"change is '{name}' ({changed.op_type}). Export again with opset {target}."
            ) from error
    # IR versions that know these opsets: https://onnx.ai/onnx/repo-docs/Versioning.html
    converted.ir_version = max(source.ir_version, 7 if target < 19 else 9 if target < 21 else 10)
    _compare(source, converted, where, target)
    upgraded = from_proto(converted, name=model.name)
    upgraded.metadata |= model.metadata
    return upgraded


def _compare(source: onnx.ModelProto, converted: onnx.ModelProto, where: str, target: int) -> None:
    ends = open_ends(lambda: source, optimization="none", threads=0, name=where)
    feeds, expected = run_example(
        ends.session,
        source.graph,
        f"{where}: must be upgraded, but",
        f"Export again with opset {MIN_TARGET} or above.",
    )
    if ends.lost:  # both models are run up to the last node that onnxruntime can run
        whole, converted = converted, onnx.ModelProto()
        converted.CopyFrom(whole)
        prune(converted, ends.names)
    try:
        actual = open_session(converted, optimization="none", name=where).run(None, feeds)
    except ModelError as error:
        raise ModelError(
            f"{where} cannot be upgraded to {target}: the upgraded model does not run ({error}). "
            f"Export again with opset {target}."
        ) from error
    for output, old, new in zip(ends.names, expected, actual, strict=True):
        size, difference = _distance(old, new)
        if not difference <= TOLERANCE * size:
            raise ModelError(
                f"{where}: upgrading to {target} changes output '{output}' by {difference:.3g} "
                f"(largest value {size:.3g}). Export again with opset {target} or above."
            )


def _distance(old: Any, new: Any) -> tuple[float, float]:
    """Return the largest value and the largest difference (infinite if not comparable)."""
    if isinstance(old, list):  # a sequence of tensors
        pairs = list(zip(old, new, strict=False)) if len(old) == len(new) else [(0, None)]
        found = [_distance(*pair) for pair in pairs]
        return max((s for s, _ in found), default=1.0), max((d for _, d in found), default=0.0)
    old, new = np.asarray(old), np.asarray(new)
    if np.array_equal(old, new, equal_nan=old.dtype.kind == "f"):
        return 1.0, 0.0
    if old.shape != new.shape or old.dtype != new.dtype or old.dtype.kind not in "fiub":
        return 1.0, np.inf
    size = float(np.max(np.abs(old.astype(np.float64)), initial=0)) or 1.0
    return size, float(np.max(np.abs(old.astype(np.float64) - new.astype(np.float64)), initial=0))
