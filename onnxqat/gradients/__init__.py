"""Gradients as ONNX nodes that any onnxruntime runs: the builder, and a definition for each op.

====================  ============================================================================
`build`               from the loss back through the graph; sums, what needs no gradient
`backward`            what a definition is told, and how it adds nodes
`kernels`             the faster ops of a training build, and which of them are used
the others            definitions by family, each with its formula and source
====================  ============================================================================
"""

from onnxqat.gradients.build import DEFINITIONS, add_gradients, drop_unread
from onnxqat.gradients.kernels import KERNELS, installed_kernels

__all__ = ["DEFINITIONS", "KERNELS", "add_gradients", "drop_unread", "installed_kernels"]
