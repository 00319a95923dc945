"""Find Reshapes with a constant batch size in a model whose input has a dynamic batch.

::

    x [N, 3, 6, 6] -> Conv -> [N, 4, 6, 6] -> Reshape [1, 144] -> y

The input accepts any batch size; the constant shape fits only the one the model was exported with.
The file is wrong, but the model works with that batch size, so a warning names the node and the
option that sets it.
"""

from __future__ import annotations

import logging
import math

import onnx_graphsurgeon as gs

from onnxqat.nodes import is_op
from onnxqat.preparation.editing import constant_values

__all__ = ["warn_of_fixed_batches"]

logger = logging.getLogger(__name__)


def warn_of_fixed_batches(graph: gs.Graph, where: str) -> None:
    """Warn of the first Reshape in a prepared graph whose shape fits one batch size only."""
    for node in graph.nodes:
        batch = _fixed_batch(node) if is_op(node, "Reshape") else None
        if batch is not None:
            logger.warning(
                "%s: node '%s' (Reshape) works only with batches of %d. Pass "
                "--batch-size %d to commands that read data, or export with a dynamic batch.",
                *(where, node.name, batch, batch),
            )
            return


def _fixed_batch(node: gs.Node) -> int | None:
    """Return the only batch size for which shape and data have the same number of elements."""
    wanted, given = constant_values(node.inputs[1]), node.inputs[0].shape
    if wanted is None or wanted.ndim != 1 or not given or isinstance(given[0], int):
        return None
    rest, sizes = given[1:], wanted.tolist()
    if not all(isinstance(size, int) and size > 0 for size in rest) or min(sizes, default=0) < 1:
        return None
    batch, remainder = divmod(math.prod(sizes), math.prod(rest))
    return batch if not remainder else None
