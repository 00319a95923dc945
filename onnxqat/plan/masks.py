"""Find attention masks, which an 8-bit grid cannot represent together with the scores.

A transformer adds a mask to the scores before Softmax: 0 at positions that it attends to, and -1e4,
-inf or the smallest float at the others. On a grid that includes the mask, all scores would be
rounded to 0 (measured: perplexity 4.2 with masks in float, 53 with quantized masks), and a mask
that is all zeros in the calibration data would be lost.

In this module, *data* are tensors computed from a float graph input, from an 8-bit input behind a
Cast, from a looked-up table, or from a weighted op; *learned* are those from the last two. A float
tensor that is not data was computed from shapes, indices, integer masks and constants. A tensor
added to learned values is a mask if it is not data; if it contains very negative constants; or if
it comes from other graph inputs than the values and the sum leads to a Softmax. All nodes that
compute a mask stay float, back to the graph inputs: if m is rounded, 1 - m is not exactly 0, and
multiplied by -1e38 it masks every position.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs

from onnxqat.nodes import is_constant, is_float, is_op, weight_index
from onnxqat.operators import ONNX_DOMAINS, RECURRENT, SUBGRAPHS, moving

__all__ = ["Masks", "find_masks"]

MASKING_OPS = ("Add", "Sub", "Where", "Max", "Min", "Concat", "Pad", "ScatterND", "ScatterElements")
MOVING_OPS = moving("axes", "blocks", "repeats", "picks")
# Ops that keep a very negative value very negative, in addition to the above.
PASSING_OPS = (*MASKING_OPS, *MOVING_OPS, "Mul", "Div", "Neg", "Clip")
# Ops on which a very negative value has no effect.
SELECTING_OPS = (
    *("Softmax", "LogSoftmax", "Exp", "ReduceLogSumExp", "ReduceMax", "ArgMax", "TopK"),
    *("MaxPool", "GlobalMaxPool"),
)
# Ops whose results depend on more than their float inputs.
OPAQUE_OPS = (*SUBGRAPHS, *RECURRENT)
SMALLEST_MASK = -50.0  # exp(-50) is 0 for any score
LARGE = 1e4  # weights and factors of networks are smaller


@dataclass(kw_only=True)
class Masks:
    """The nodes and tensors that stay float because of masks.

    Attributes
    ----------
    reasons : dict of str to str
        Why a node stays float, by its name.
    drowned : set of str
        Tensors that contain an added mask; they get no point.
    computing : set of str
        Names of the nodes that compute masks; they read their inputs in float.
    """

    reasons: dict[str, str] = field(default_factory=dict)
    drowned: set[str] = field(default_factory=set)
    computing: set[str] = field(default_factory=set)


def find_masks(graph: gs.Graph) -> Masks:
    """Find the nodes that compute or add masks, or process masked values, with reasons."""
    search = _Search(graph)
    for node in graph.nodes:
        search.visit(node)
    return search.found


class _Search:
    """Classifies the tensors, in the order of the graph."""

    def __init__(self, graph: gs.Graph) -> None:
        self.found = Masks()
        self.roots = {t.name: frozenset({t.name}) for t in graph.inputs if is_float(t)}
        self.bytes = {t.name for t in graph.inputs if _is_byte(t)}
        self.learned: set[str] = set()
        self.large: set[str] = set()  # tensors that contain very large constants
        self.selected = _selected(graph)
        self.walked: set[str] = set()  # nodes already followed back to the inputs

    def visit(self, node: gs.Node) -> None:
        reason, mask = self._reason(node)
        if reason is not None:
            self.found.reasons[node.name] = reason
            self.found.drowned.update(t.name for t in node.outputs)
            if mask is not None:
                conditions = node.inputs[:1] if node.op == "Where" else []
                self._keep_float(f"computes the mask '{mask.name}'", [mask, *conditions])
        if node.domain not in ONNX_DOMAINS:  # a fused attention op reads its mask as an input
            for tensor in (t for t in node.inputs if t.name in self.large - self.learned):
                self._keep_float(f"computes the mask '{tensor.name}'", [tensor])
        self._classify(node, mask)

    def _classify(self, node: gs.Node, mask: gs.Tensor | None) -> None:
        """Record which data the outputs of a node depend on."""
        outputs = {t.name for t in node.outputs if is_float(t)}
        roots = self._roots_of(node, mask)
        if roots is not None:
            self.roots.update(dict.fromkeys(outputs, roots))
        elif outputs:
            self.found.reasons.setdefault(node.name, "computes from integers and constants only")
            self.found.computing.add(node.name)
        if _is_learned(node) or any(t.name in self.learned for t in node.inputs):
            self.learned |= outputs
        if self._is_large(node):
            self.large |= outputs

    def _roots_of(self, node: gs.Node, mask: gs.Tensor | None) -> frozenset[str] | None:
        """Return the data, without masks, that a node's outputs depend on, or None."""
        if node.op == "Cast" and node.inputs[0].name in self.bytes:
            return frozenset({node.inputs[0].name})
        known = [self.roots[t.name] for t in node.inputs if t.name in self.roots and t is not mask]
        if not known:
            return frozenset({node.name}) if _is_learned(node) else None
        return frozenset().union(*known)

    def _reason(self, node: gs.Node) -> tuple[str | None, gs.Tensor | None]:
        """Return why a mask keeps a node float, and the mask that it adds, if it does."""
        if node.op in MASKING_OPS and any(t.name in self.roots for t in node.inputs):
            for i, tensor in enumerate(node.inputs):
                if is_float(tensor) and (kind := self._mask_kind(node, i)):
                    return kind.format(tensor.name), tensor
        drowned = next((t.name for t in node.inputs if t.name in self.found.drowned), None)
        if drowned is None or node.op not in PASSING_OPS:
            return None, None
        if node.op in MOVING_OPS or drowned in self.large or _any(node.outputs, self.selected):
            verb = "moves" if node.op in MOVING_OPS else "computes with"
            return f"{verb} '{drowned}', to which a mask was added", None
        return None, None

    def _mask_kind(self, node: gs.Node, index: int) -> str | None:
        tensor = node.inputs[index]
        if is_constant(tensor):
            return "adds the constant mask '{}'" if _is_mask(node, index) else None
        if node.op not in ("Add", "Sub", "Where"):
            return None
        if tensor.name not in self.roots:
            drowns = tensor.name in self.large or _any(node.outputs, self.selected)
            return f"adds {'the mask ' if drowns else ''}'{{}}', which is not computed from data"
        others = [t for t in node.inputs if t is not tensor and t.name in self.roots]
        if not others or tensor.name in self.found.drowned & self.learned:
            return None
        if tensor.name in self.large:
            return "adds the mask '{}', which contains very large constants"
        roots = self.roots[tensor.name]
        alone = all(t.name in self.learned and not self.roots[t.name] & roots for t in others)
        if alone and tensor.name not in self.learned and _any(node.outputs, self.selected):
            return "adds the mask '{}', which depends on other inputs than the scores"
        return None

    def _keep_float(self, reason: str, frontier: list[gs.Tensor]) -> None:
        """Keep float the nodes that compute a mask, going back until a weighted op is reached."""
        while frontier:
            for node in frontier.pop().inputs:
                if node.name not in self.walked and not self._is_score(node):
                    self.walked.add(node.name)
                    self.found.computing.add(node.name)
                    self.found.reasons[node.name] = reason
                    frontier += [] if node.op in ("Shape", "Size") else node.inputs

    def _is_score(self, node: gs.Node) -> bool:
        return _any(node.outputs, self.learned - self.large)

    def _is_large(self, node: gs.Node) -> bool:
        """Return whether the outputs of a node contain very large constants."""
        if node.op not in (*PASSING_OPS, "ConstantOfShape"):
            return False
        values = [t.values for t in node.inputs if is_constant(t) and is_float(t)]
        filled = node.attrs.get("value") if node.op == "ConstantOfShape" else None
        values += [] if filled is None else [filled.values]
        if node.op == "Div":
            values = [1 / v for v in values if np.all(v)]
        if node.op == "Clip":
            values = []
        biggest = (float(np.abs(v).max()) for v in values if v.size and v.dtype.kind == "f")
        return any(v >= LARGE for v in biggest) or _any(node.inputs, self.large)


def _any(tensors: Iterable[gs.Tensor], names: set[str]) -> bool:
    return any(t.name in names for t in tensors)


def _is_byte(tensor: gs.Tensor) -> bool:
    """Return whether a tensor holds 8-bit integers, such as pixels, and not booleans."""
    if tensor.dtype is None or isinstance(tensor.dtype, int):
        return False
    dtype = np.dtype(tensor.dtype)
    return dtype.itemsize == 1 and dtype.kind in "iu"


def _is_learned(node: gs.Node) -> bool:
    """Return whether a node's outputs are learned: a table look-up or a weighted op."""
    if is_op(node, "Gather") and is_constant(node.inputs[0]) and is_float(node.inputs[0]):
        return True
    return (
        node.domain not in ONNX_DOMAINS or node.op in OPAQUE_OPS or weight_index(node) is not None
    )


def _selected(graph: gs.Graph) -> set[str]:
    """Return the tensors that reach a Softmax (or similar op) over sums and moves only."""
    names: set[str] = set()
    for node in reversed(graph.nodes):
        if node.op in SELECTING_OPS:
            names.update(t.name for t in node.inputs[:1])
        elif node.op in PASSING_OPS and _any(node.outputs, names):
            names.update(t.name for t in node.inputs if is_float(t))
    return names


def _is_mask(node: gs.Node, index: int) -> bool:
    """Return whether a constant operand is a mask: it holds only 0 and one extreme value."""
    values = np.asarray(node.inputs[index].values)
    if values.size == 0:
        return False
    if node.op == "Sub":
        values = -values if index == 1 else values
    extreme = values.min() if values.min() <= SMALLEST_MASK else values.max()
    filled = bool(np.all(values == extreme))
    if node.op not in ("Add", "Sub", "Where"):
        return filled and abs(extreme) >= LARGE
    if SMALLEST_MASK < extreme < LARGE or (filled and node.op != "Where"):
        return False
    return bool(np.all((values == 0) | (values == extreme)))
