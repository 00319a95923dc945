"""Tensors whose parameters the chip shares."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec

from onnxqat.plan.graph import Unit
from onnxqat.qparams import QuantSpec
from onnxqat.rules import OpRule

__all__ = ["find_groups", "merged_spec", "unobserved_tensors"]


def find_groups(
    units: Iterable[tuple[Unit, OpRule]], specs: Mapping[str, QuantSpec]
) -> dict[str, str]:
    """Return tensor -> group for the points that share parameters, by union-find.

    A tensor whose clipping range the chip forces shares its parameters with what it is passed
    through to, and with nothing else: the chip rescales it where it meets others.

    Parameters
    ----------
    units : iterable of (Unit, OpRule)
        What is quantized, in the order of the graph.
    specs : mapping of str to QuantSpec
        Of the tensors that have a point. A group is named after its first tensor.
    """
    parent = {name: name for name in specs}
    forced = {name for name, spec in specs.items() if spec.fixed_range}

    def root(name: str) -> str:
        while parent[name] != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    for unit, op in units:
        if op.parameters == "own":
            continue
        inputs = [tensor for _, _, tensor in unit.inputs()]
        inputs = inputs[:1] if op.parameters == "passthrough" else inputs
        outputs = [] if op.parameters == "unify_inputs" else unit.outputs
        shared = [t.name for t in (*inputs, *outputs) if t.name in parent]
        if op.parameters == "passthrough" and inputs[0].name in forced:
            forced.update(shared)
        else:
            shared = [name for name in shared if name not in forced]
        for name in shared[1:]:
            parent[root(name)] = root(shared[0])
    members: dict[str, list[str]] = {}
    for name in parent:
        members.setdefault(root(name), []).append(name)
    return {n: names[0] for names in members.values() if len(names) > 1 for n in names}


def unobserved_tensors(
    units: Iterable[tuple[Unit, OpRule]], groups: Mapping[str, str]
) -> frozenset[str]:
    """Return the tensors that take the range of the output of the unit that reads them."""
    return frozenset(
        tensor.name
        for unit, op in units
        if op.parameters == "from_output"
        for _, _, tensor in unit.inputs()
        if tensor.name in groups
        and any(groups.get(t.name) == groups[tensor.name] for t in unit.outputs)
    )


def merged_spec(specs: list[QuantSpec]) -> QuantSpec:
    """Return one spec for a group: the highest precision, signed if any member may be.

    The first spec is that of the tensor the group is named after, whose range may be forced.
    """
    if specs[0].fixed_range:
        return specs[0]
    kinds = {s.signedness for s in specs}
    signedness = kinds.pop() if len(kinds) == 1 else "from_range"
    if signedness == "from_range" and not specs[0].symmetric:
        signedness = "signed"
    return msgspec.structs.replace(
        specs[0],
        bits=max(s.bits for s in specs),
        signedness=signedness,
        min_range=max(s.min_range for s in specs),
    )
