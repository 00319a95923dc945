"""Tensors whose parameters the chip shares."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import msgspec

from onnxqat.plan.graph import Unit
from onnxqat.qparams import QuantSpec
from onnxqat.rules import OpRule

__all__ = ["Quantized", "find_groups", "merged_spec", "unobserved_tensors"]


class Quantized(NamedTuple):
    """A unit that is quantized, its table, and the last unit of the chain it is in, or itself.

    What leaves the chip's op is what that last one writes.
    """

    unit: Unit
    op: OpRule
    end: Unit

    @property
    def inputs(self) -> list[str]:
        """Names of what enters the unit."""
        return [tensor.name for _, _, tensor in self.unit.inputs()]

    @property
    def outputs(self) -> list[str]:
        """Names of what leaves the chain."""
        return [tensor.name for tensor in self.end.outputs]


def find_groups(units: Iterable[Quantized], specs: Mapping[str, QuantSpec]) -> dict[str, str]:
    """Return tensor -> group for the points that share parameters, by union-find.

    A tensor whose clipping range the chip forces shares its parameters with what it is passed
    through to, and with nothing else: the chip rescales it where it meets others.

    Parameters
    ----------
    units : iterable of Quantized
        In the order of the graph.
    specs : mapping of str to QuantSpec
        The spec of each tensor that has a point. A group is named after its first tensor.
    """
    parent = {name: name for name in specs}
    forced = {name for name, spec in specs.items() if spec.fixed_range}

    def root(name: str) -> str:
        while parent[name] != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    for quantized in units:
        kind, inputs, outputs = quantized.op.parameters, quantized.inputs, quantized.outputs
        if kind == "own":
            continue
        inputs = inputs[:1] if kind == "passthrough" else inputs
        outputs = [] if kind == "unify_inputs" else outputs
        shared = [name for name in (*inputs, *outputs) if name in parent]
        if kind == "passthrough" and forced.intersection(inputs):
            forced.update(shared)
        else:
            shared = [name for name in shared if name not in forced]
        for name in shared[1:]:
            parent[root(name)] = root(shared[0])
    members: dict[str, list[str]] = {}
    for name in parent:
        members.setdefault(root(name), []).append(name)
    return {n: names[0] for names in members.values() if len(names) > 1 for n in names}


def unobserved_tensors(units: Iterable[Quantized], groups: Mapping[str, str]) -> frozenset[str]:
    """Return the tensors that take the range of the output of the unit that reads them."""
    return frozenset(
        name
        for quantized in units
        if quantized.op.parameters == "from_output"
        for name in quantized.inputs
        if name in groups and any(groups.get(n) == groups[name] for n in quantized.outputs)
    )


def merged_spec(specs: list[QuantSpec]) -> QuantSpec:
    """Return one spec for a group: the highest precision, signed if any member may be.

    The first spec is that of the tensor the group is named after, whose range may be forced. The
    group is calibrated as the first says that names an observer, or a factor other than 1.
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
        min_scale=max(s.min_scale for s in specs),
        observer=next((s.observer for s in specs if s.observer), None),
        range_factor=next((s.range_factor for s in specs if s.range_factor != 1), 1.0),
    )
