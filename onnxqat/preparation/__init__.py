"""Turn a float graph into a canonical float graph with the same outputs; nothing is quantized.

Each pass changes the graph in place and returns the number of its changes. The passes run in the
order of `PASSES`, repeatedly, until none changes anything; preparing a prepared model therefore
changes nothing. Subgraphs (If or Loop bodies), and the values that they read from the graph around
them, are not changed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

import onnx
import onnx_graphsurgeon as gs

from onnxqat.errors import ModelError
from onnxqat.model import Model
from onnxqat.preparation.batches import warn_of_fixed_batches
from onnxqat.preparation.batchnorm import fold_batchnorms
from onnxqat.preparation.branches import inline_branches
from onnxqat.preparation.budget import Budget
from onnxqat.preparation.constants import lift_constants, read_typed_weights, refuse_sparse
from onnxqat.preparation.distributions import (
    distributions_of,
    find_distributions,
    note_distributions,
)
from onnxqat.preparation.float16 import note_float16, widen_float16
from onnxqat.preparation.folding import fold_constants, fold_shapes
from onnxqat.preparation.functions import inline_functions
from onnxqat.preparation.names import name_nodes
from onnxqat.preparation.opset import MIN_TARGET, upgrade_opset
from onnxqat.preparation.order import sort_nodes
from onnxqat.preparation.padding import make_pads_explicit
from onnxqat.preparation.passthrough import remove_passthroughs
from onnxqat.preparation.runtime_types import read_runtime_types
from onnxqat.preparation.shapes import infer_shapes
from onnxqat.preparation.statistics import note_statistics, statistics_of
from onnxqat.preparation.unused import remove_unused

__all__ = ["PASSES", "prepare"]

logger = logging.getLogger(__name__)

# Initializers may be absent from the graph's inputs since this IR version.
MIN_IR_VERSION = 4

_QUICK: tuple[Callable[[gs.Graph], int], ...] = (
    name_nodes,  # first: later passes derive unique tensor names from node names
    sort_nodes,  # later passes see a producer before its consumers
    remove_unused,  # an unused consumer must not prevent folding
    lift_constants,
    remove_passthroughs,
    fold_constants,
    inline_branches,
    fold_batchnorms,
)
# These export the graph; they run when the others have nothing left to do.
_COSTLY: tuple[Callable[[gs.Graph], int], ...] = (
    fold_shapes,
    infer_shapes,
    read_runtime_types,
    make_pads_explicit,
)
PASSES = (*_QUICK, *_COSTLY)


def prepare(model: Model, *, opset: int = MIN_TARGET) -> Model:
    """Return the canonical form of a float model.

    In the result, nodes are sorted and have unique names, and every node is needed. Weights are
    initializers and not listed as inputs. There are no functions, no Identity or inactive Dropout,
    no nodes whose result depends on constants and known shapes only, no If with a constant
    condition, no ``auto_pad`` where the shapes are known, and no BatchNormalization behind a layer
    that can absorb it. Values have a type and a shape where these can be inferred. Inputs, outputs
    and the remaining values keep their names; dynamic dimensions stay dynamic. A float16 model
    becomes float32, including its inputs and outputs.

    Parameters
    ----------
    model : Model
        A float model; it is not changed.
    opset : int
        The lowest opset that the result may have, 13 to 21 (int16 QuantizeLinear needs 21).

    Returns
    -------
    Model
        It computes the same as ``model``, except for the rounding of folded BatchNormalizations
        and the order of summation that a runtime chooses once it knows that a weight is constant.

    Raises
    ------
    ModelError
        The graph has a cycle, its types contradict each other, its weights are sparse, a function
        cannot be inlined, or the opset cannot be upgraded without changing the outputs.
    """
    prepared = upgrade_opset(inline_functions(model), opset).copy()
    rest = prepared.rest
    refuse_sparse(prepared.graph, model.name)
    names = widen_float16(prepared.graph, model.name)
    seen = statistics_of(prepared, in_place=True)  # sorts the nodes and lifts the constants
    known = distributions_of(prepared) | find_distributions(prepared.graph)
    try:
        _settle(prepared.graph, model.name)
    except ModelError as error:
        if str(error).startswith(f"{model.name}:"):
            raise
        raise ModelError(f"{model.name}: {error}") from error  # passes do not know the file name
    warn_of_fixed_batches(prepared.graph, model.name)
    note_float16(prepared, names)
    note_statistics(prepared, seen)
    note_distributions(prepared, known)
    read_typed_weights(prepared.graph)
    prepared.graph.ir_version = max(prepared.graph.ir_version, MIN_IR_VERSION)
    prepared.rest = _without_unread(rest, {tensor.name for tensor in prepared.graph.inputs})
    return prepared


def _settle(graph: gs.Graph, where: str) -> None:
    """Run the passes until none changes anything.

    A costly pass runs again only if another pass has changed something since.
    """
    budget = Budget(graph, where)  # for all rounds together
    quick = [partial(fold_constants, budget=budget) if p is fold_constants else p for p in _QUICK]
    changes = 0  # made by all passes so far
    seen: dict[str, int] = {}  # the value of ``changes`` after each costly pass
    while True:
        found = sum(apply(graph) for apply in quick)
        changes += found
        for apply in _COSTLY:
            if not found and seen.get(apply.__name__) != changes:
                found = apply(graph)
                changes += found
                seen[apply.__name__] = changes
        logger.debug("changes: %d", changes)
        if not found:
            return


def _without_unread(rest: onnx.ModelProto, inputs: set[str]) -> onnx.ModelProto:
    """Return ``rest`` without unread initializers, and with no initializer listed as input."""
    kept = onnx.ModelProto()
    kept.CopyFrom(rest)
    del kept.graph.input[:]
    kept.graph.input.extend(v for v in rest.graph.input if v.name in inputs)
    annotated = {
        entry.value
        for annotation in rest.graph.quantization_annotation
        for entry in annotation.quant_parameter_tensor_names
    }
    del kept.graph.initializer[:], kept.graph.sparse_initializer[:]
    kept.graph.initializer.extend(
        t for t in rest.graph.initializer if not t.data_type or t.name in annotated
    )
    return kept
