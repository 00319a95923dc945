"""Replace ``auto_pad`` by ``pads``.

For each spatial axis with input size n, stride s, dilation d and kernel k::

    VALID                    0 on both sides
    SAME_*, Conv and pools   (ceil(n / s) - 1) * s + (k - 1) * d + 1 - n in all
    SAME_*, ConvTranspose    max(0, (k - 1) * d + 1 + output_padding - s) in all

An odd total puts the larger half at the end for SAME_UPPER and at the beginning for SAME_LOWER
(https://onnx.ai/onnx/operators/onnx__Conv.html, ``onnx__ConvTranspose.html``). onnxruntime computes
``pads`` in this way before it runs a kernel, so ``count_include_pad`` keeps its meaning. With SAME
the output is ceil(n / s) long for either ``ceil_mode``, so ``ceil_mode`` is removed. A total of -1
(a 1x1 kernel with stride 2) means no padding.

SAME stays where a size it depends on is unknown (with stride 1 it does not depend on the input's),
and where the total is below -1 (onnxruntime 1.19 crops for SAME_UPPER; ONNX does not define it).
A ConvTranspose with ``output_shape`` stays, because that overrides ``pads``.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_graphsurgeon as gs

from onnxqat.nodes import is_op
from onnxqat.operators import WINDOWED

__all__ = ["make_pads_explicit"]


def make_pads_explicit(graph: gs.Graph) -> int:
    """Replace ``auto_pad`` by ``pads``; return the number of changed nodes."""
    changed = 0
    for node in graph.nodes:
        if not is_op(node, *WINDOWED):
            continue
        mode = node.attrs.get("auto_pad", "NOTSET")
        if mode == "NOTSET" or "output_shape" in node.attrs:
            continue
        totals = _total_pads(node, mode)
        if totals is not None:
            halves = [(total // 2, total - total // 2) for total in totals]
            if mode == "SAME_LOWER":
                halves = [(large, small) for small, large in halves]
            del node.attrs["auto_pad"]
            if mode != "VALID":
                node.attrs.pop("ceil_mode", None)
            node.attrs["pads"] = [begin for begin, _ in halves] + [end for _, end in halves]
            changed += 1
    return changed


def _total_pads(node: gs.Node, mode: str) -> list[int] | None:
    kernel = _kernel_shape(node)
    if kernel is None:
        return None
    if mode == "VALID":
        return [0] * len(kernel)
    ones = [1] * len(kernel)
    strides = node.attrs.get("strides", ones)
    dilations = node.attrs.get("dilations", ones)
    if len(strides) != len(kernel) or len(dilations) != len(kernel):
        return None
    spans = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    if node.op == "ConvTranspose":
        extra = node.attrs.get("output_padding", [0] * len(kernel))
        return [max(0, p + e - s) for p, e, s in zip(spans, extra, strides, strict=True)]
    sizes: Sequence[object] = node.inputs[0].shape or ()
    if len(sizes) != len(kernel) + 2:
        sizes = [None] * (len(kernel) + 2)
    totals = []
    for size, stride, span in zip(sizes[2:], strides, spans, strict=True):
        if stride == 1:
            totals.append(span - 1)
        elif isinstance(size, int) and size > 0:
            totals.append((-(-size // stride) - 1) * stride + span - size)
        else:
            return None
    return None if min(totals, default=0) < -1 else [max(0, total) for total in totals]


def _kernel_shape(node: gs.Node) -> list[int] | None:
    if "kernel_shape" in node.attrs:
        return list(node.attrs["kernel_shape"])
    weight = node.inputs[1].shape if len(node.inputs) > 1 else None
    if weight is None or not all(isinstance(size, int) for size in weight[2:]):
        return None
    return list(weight[2:])
