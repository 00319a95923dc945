"""Find the nodes that a chip runs as one."""

from __future__ import annotations

from collections.abc import Container

import onnx_graphsurgeon as gs

from onnxqat.plan.graph import GraphIndex
from onnxqat.plan.operators import is_kind

__all__ = ["find_chains"]


def find_chains(
    index: GraphIndex, patterns: tuple[tuple[str, ...], ...], allowed: Container[str]
) -> tuple[tuple[str, ...], ...]:
    """Return the names of the nodes in each chain, in order; longer patterns win.

    Parameters
    ----------
    patterns : tuple of tuple of str
        Op types as in `HardwareRule.fuse`.
    allowed : container of str
        Names of the nodes that may be part of one.
    """
    ordered = sorted(patterns, key=len, reverse=True)
    taken: set[str] = set()
    chains: list[tuple[str, ...]] = []
    for node in index.graph.nodes:
        if node.name in allowed and node.name not in taken:
            matches = (_match(index, node, pattern, allowed) for pattern in ordered)
            found = next((m for m in matches if m), None)
            if found:
                chains.append(found)
                taken.update(found)
    return tuple(chains)


def _match(
    index: GraphIndex, node: gs.Node, pattern: tuple[str, ...], allowed: Container[str]
) -> tuple[str, ...] | None:
    if not is_kind(node, pattern[0]):
        return None
    found = [node]
    for kind in pattern[1:]:
        readers = index.readers.get(found[-1].outputs[0].name, [])
        if len(readers) != 1 or not readers[0].node:  # an inner tensor has one reader, a node
            return None
        follower = index.nodes[readers[0].node]
        if follower.name not in allowed or not is_kind(follower, kind):
            return None
        found.append(follower)
    return tuple(n.name for n in found)
