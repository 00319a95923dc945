"""MagicMind's build configuration for a Cambricon MLU.

``insert_bn_before_firstnode`` inserts ``(pixel - mean) / sqrt(var)`` before the first layer
(Cambricon/magicmind_cloud ``buildin/python_common/model_process.py``). CATCH has the same as
``mean`` and ``std`` of ``firstconv``, for pixels of 0 to 1: it multiplies both by 255
(Cambricon/catch ``torch_mlu/core/quantized/modules/conv.py``).
"""

from __future__ import annotations

import json

from onnxqat.handoff.facts import Facts, document

__all__ = ["magicmind"]


def magicmind(facts: Facts) -> dict[str, str]:
    """Return additions to the build configuration, and the purpose of each file."""
    steps = [
        f"MagicMind: parse {facts.model} as ONNX, and build it with {facts.files['config']}.",
        f"The ranges of the network are in {facts.files['ranges']}.",
        f"CATCH: {facts.files['table']} has the scales of each module.",
    ]
    if facts.images:
        steps.insert(1, "For images as bytes, add to the configuration:")
        steps.insert(2, json.dumps(_build(facts)))
        steps.append("CATCH, for images as bytes, as its quantization's configuration:")
        steps.append(json.dumps(_firstconv(facts)))
    return {"compile.txt": document(*steps)}


def _build(facts: Facts) -> dict[str, object]:
    variance = [value**2 for value in facts.std]
    first = {
        str(i): {"mean": list(facts.mean), "var": variance}
        for i, one in enumerate(facts.inputs)
        if one.layout is not None
    }
    return {"insert_bn_before_firstnode": first}


def _firstconv(facts: Facts) -> dict[str, object]:
    mean, std = ([value / 255 for value in values] for values in (facts.mean, facts.std))
    return {"mean": mean, "std": std, "firstconv": True}
