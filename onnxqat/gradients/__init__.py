"""Gradients as ONNX nodes for any onnxruntime: the builder, and a definition for each op.

====================  ============================================================================
`build`               the walk from the loss back through the graph, and the sums of gradients
`backward`            the interface through which a definition reads its node and adds nodes
`kernels`             the faster gradient ops of a training build that are used
the others            definitions by family, each with its formula and source
====================  ============================================================================
"""

from onnxqat.gradients.build import DEFINITIONS, add_gradients, drop_unread
from onnxqat.gradients.kernels import KERNELS, installed_kernels

__all__ = ["DEFINITIONS", "KERNELS", "add_gradients", "drop_unread", "installed_kernels"]
