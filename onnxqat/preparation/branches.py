"""Replace an If with a constant condition by the branch that it takes.

::

    y = If (true) <then_branch = { u = Neg(x) }, ...>     =>     u = Neg(x) ; y = Identity(u)

Values and initializers of the branch keep their names; a number is appended to names that are
taken. An If whose condition is computed from the input stays, as do all Ifs inside subgraphs.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from onnxqat.nodes import is_op
from onnxqat.preparation.editing import scalar, tensor_names, unique_name

__all__ = ["inline_branches"]


def inline_branches(graph: gs.Graph) -> int:
    """Replace Ifs by the branches that they take; return the number of Ifs."""
    decided = [node for node in graph.nodes if is_op(node, "If") and _branch(node) is not None]
    if not decided:
        return 0
    branches = {id(node): _branch(node) for node in decided}
    for node in decided:
        node.attrs.clear()  # so that the branch's names are free
    outer, taken = graph.tensors(), tensor_names(graph)
    nodes = []
    for node in graph.nodes:
        if id(node) in branches:
            nodes += _inlined(node, branches[id(node)], outer, taken)
        else:
            nodes.append(node)
    graph.nodes = nodes
    return len(decided)


def _branch(node: gs.Node) -> gs.Graph | None:
    condition = scalar(node.inputs[0])
    if condition is None:
        return None
    return node.attrs.get("then_branch" if condition else "else_branch")


def _inlined(
    node: gs.Node, branch: gs.Graph, outer: dict[str, gs.Tensor], taken: set[str]
) -> list[gs.Node]:
    """Return the branch's nodes, which now read the graph's tensors, and an Identity per output."""
    written = {tensor.name for inner in branch.nodes for tensor in inner.outputs}
    local = {n: t for n, t in branch.tensors().items() if n in written or n not in outer}
    for inner in branch.nodes:
        for index, tensor in enumerate(inner.inputs):
            if tensor.name not in local and tensor.name in outer:
                inner.inputs[index] = outer[tensor.name]
    results = [local.get(t.name, outer.get(t.name, t)) for t in branch.outputs]
    _rename(branch, {name: unique_name(name, taken) for name in local if name})
    identities = [
        gs.Node("Identity", f"{node.name}/{target.name}", {}, [source])
        for source, target in zip(results, node.outputs, strict=True)
    ]
    targets = list(node.outputs)
    node.inputs.clear()
    node.outputs.clear()
    for identity, target in zip(identities, targets, strict=True):
        identity.outputs = [target]
    return [*branch.nodes, *identities]


def _rename(branch: gs.Graph, names: dict[str, str]) -> None:
    """Rename tensors of the branch, including their readers in nested subgraphs."""
    found: dict[int, gs.Tensor] = {}
    for graph in (branch, *branch.subgraphs(recursive=True)):
        for tensors in (
            graph.inputs,
            graph.outputs,
            *((*n.inputs, *n.outputs) for n in graph.nodes),
        ):
            found.update((id(tensor), tensor) for tensor in tensors if tensor.name in names)
    for tensor in found.values():
        tensor.name = names[tensor.name]
