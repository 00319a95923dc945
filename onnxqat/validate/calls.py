"""Check the calls between a model's functions: no recursion, and inlining fits into memory.

onnxruntime follows calls without a limit: a function that calls itself ends its process.
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx

from onnxqat.errors import ModelError
from onnxqat.preserve import all_nodes

__all__ = ["FunctionKey", "called_key", "check_calls"]

FunctionKey = tuple[str, str, str]
MAX_DEPTH, MAX_NODES = 128, 10**5


def called_key(node: onnx.NodeProto) -> FunctionKey:
    """Return the key under which a node would call a function of the model."""
    return node.domain, node.op_type, node.overload


def check_calls(proto: onnx.ModelProto, where: str) -> None:
    """Refuse functions that call themselves, and calls that would inline to too many nodes.

    Raises
    ------
    ModelError
        Calls nest more than `MAX_DEPTH` levels deep, or inlining them would add more than
        `MAX_NODES` nodes.
    """
    bodies = {
        (f.domain, f.name, f.overload): [called_key(node) for node in all_nodes(f.node)]
        for f in proto.functions
    }
    sizes: dict[FunctionKey, int] = {}

    def size(keys: Iterable[FunctionKey]) -> int:
        return sum(sizes.get(key, 1) for key in keys)

    for _ in range(MAX_DEPTH):
        open_ = bodies.keys() - sizes.keys()
        leaves = [key for key in open_ if not open_.intersection(bodies[key])]
        sizes |= {key: size(bodies[key]) for key in leaves}
    stuck = next((key for key in bodies if key not in sizes), None)
    if stuck is not None:
        raise ModelError(
            f"{where}: function '{stuck[0]}.{stuck[1]}' calls itself, or others more than "
            f"{MAX_DEPTH} levels deep. Export without it."
        )
    keys = [called_key(node) for node in all_nodes(proto.graph.node)]
    if size(keys) > MAX_NODES + len(keys) + sum(map(len, bodies.values())):
        raise ModelError(
            f"{where}: inlining its functions would make {size(keys)} nodes. "
            "Export without functions."
        )
