"""Tensors whose parameters the chip shares."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec
import onnx_graphsurgeon as gs

from onnxqat.qparams import QuantSpec
from onnxqat.rules import OpRule

__all__ = ["find_groups", "merged_spec"]


def find_groups(
    graph: gs.Graph, ops: Mapping[str, OpRule], tensors: Iterable[str]
) -> dict[str, str]:
    """Return tensor -> group for the points that share parameters, by union-find.

    Parameters
    ----------
    ops : mapping of str to OpRule
        By name of the node.
    tensors : iterable of str
        The tensors that have a point. A group is named after its first tensor.
    """
    parent = {name: name for name in tensors}

    def root(name: str) -> str:
        while parent[name] != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    for node in graph.nodes:
        op = ops.get(node.name)
        if op is None or op.parameters == "own":
            continue
        inputs = node.inputs[:1] if op.parameters == "passthrough" else node.inputs
        shared = [t.name for t in (*inputs, *node.outputs) if t.name in parent]
        for name in shared[1:]:
            parent[root(name)] = root(shared[0])
    members: dict[str, list[str]] = {}
    for name in parent:
        members.setdefault(root(name), []).append(name)
    return {n: names[0] for names in members.values() if len(names) > 1 for n in names}


def merged_spec(specs: list[QuantSpec]) -> QuantSpec:
    """Return one spec for a group: the highest precision, signed if any member may be."""
    kinds = {s.signedness for s in specs}
    signedness = kinds.pop() if len(kinds) == 1 else "from_range"
    if signedness == "from_range" and not specs[0].symmetric:
        signedness = "signed"
    ranges = {s.fixed_range for s in specs}
    return msgspec.structs.replace(
        specs[0],
        bits=max(s.bits for s in specs),
        signedness=signedness,
        fixed_range=ranges.pop() if len(ranges) == 1 else None,
        min_range=max(s.min_range for s in specs),
    )
