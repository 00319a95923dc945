"""Find the groups of tensors that share one set of parameters on the chip."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import msgspec

from onnxqat.plan.graph import Unit
from onnxqat.qparams import QuantSpec
from onnxqat.rules import OpRule

__all__ = ["Quantized", "find_groups", "merged_spec", "unobserved_tensors"]


class Quantized(NamedTuple):
    """A quantized unit, its table, the last unit of its chain (or itself), and its inputs.

    The outputs of the last unit are the outputs of the chip's op. ``inputs`` are names of tensors:
    of a requantized input, that of the requantized tensor.
    """

    op: OpRule
    end: Unit
    inputs: list[str]

    @property
    def outputs(self) -> list[str]:
        """Names of the chain's outputs."""
        return [tensor.name for tensor in self.end.outputs]


def find_groups(units: Iterable[Quantized], specs: Mapping[str, QuantSpec]) -> dict[str, str]:
    """Return the group of each tensor that shares its parameters, found by union-find.

    A tensor whose clipping range is fixed by the chip shares its parameters only with the tensors
    that it is passed through to. Where it meets other tensors, the chip rescales it.

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
    """Return the tensors that get the range of their reader's output.

    These are the inputs of ops with ``from_output`` or ``align_to_output``.
    """
    return frozenset(
        name
        for quantized in units
        if quantized.op.parameters in ("from_output", "align_to_output")
        for name in quantized.inputs
        if name in groups and any(groups.get(n) == groups[name] for n in quantized.outputs)
    )


def merged_spec(specs: list[QuantSpec]) -> QuantSpec:
    """Return one spec for a group: the most bits, and signed if any member may be signed.

    The first spec belongs to the tensor that names the group; if it has a fixed range, it is used
    unchanged. The observer, and a range factor other than 1, come from the first spec that has one.
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
