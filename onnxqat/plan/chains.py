"""Find the units that a chip runs as one."""

from __future__ import annotations

from collections.abc import Container

from onnxqat.nodes import clips_from_zero, is_bias_add
from onnxqat.plan.graph import GraphIndex, Unit

__all__ = ["find_chains"]


def find_chains(
    index: GraphIndex, patterns: tuple[tuple[str, ...], ...], allowed: Container[str]
) -> list[tuple[Unit, ...]]:
    """Return the units of each chain, in order; the longest matching pattern is used.

    Parameters
    ----------
    patterns : tuple of tuple of str
        Op types as in `HardwareRule.fuse`.
    allowed : container of str
        Names of the units that may be part of a chain.
    """
    ordered = sorted(patterns, key=len, reverse=True)
    taken: set[str] = set()
    chains: list[tuple[Unit, ...]] = []
    for unit in index.units:
        if unit.name in allowed and unit.name not in taken:
            matches = (_match(index, unit, pattern, allowed) for pattern in ordered)
            found = next((m for m in matches if m and not taken & {u.name for u in m}), None)
            if found:
                chains.append(found)
                taken.update(u.name for u in found)
    return chains


def _match(
    index: GraphIndex, unit: Unit, pattern: tuple[str, ...], allowed: Container[str]
) -> tuple[Unit, ...] | None:
    if not _is_kind(unit, pattern[0]):
        return None
    found = [unit]
    for kind in pattern[1:]:
        readers = index.readers.get(found[-1].outputs[0].name, [])
        names = {index.unit_of[e.node].name if e.node else "" for e in readers}
        # an inner tensor must have one reader and not be an output
        if len(names) != 1 or "" in names:
            return None
        follower = index.unit_of[readers[0].node]
        if follower.name not in allowed or not _is_kind(follower, kind):
            return None
        found.append(follower)
    return tuple(found)


def _is_kind(unit: Unit, kind: str) -> bool:
    """Return whether a unit matches the name ``kind`` in a rule's chain."""
    if kind == "BiasAdd":
        return is_bias_add(unit.nodes[-1])
    return unit.kind == kind and (kind != "Clip" or clips_from_zero(unit.nodes[-1]))
