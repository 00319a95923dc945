"""Pulsar2's command and build configuration for an Axera chip.

The configuration is that of AXERA-TECH/QAT.axera ``pulsar2/config.json``; its other fields are
documented in AXERA-TECH/pulsar2-docs-en ``source/user_guides_config/config.rst``. Pulsar2
normalizes by ``(pixel - mean) / std``. A node that reads a 16-bit tensor gets an entry in
``layer_configs``.
"""

from __future__ import annotations

import json
from typing import Any

from onnxqat.handoff.facts import Facts, command, document

__all__ = ["PULSAR2", "pulsar2"]

PULSAR2 = "model_pulsar2.json"


def pulsar2(facts: Facts) -> dict[str, str]:
    """Return the command and the configuration."""
    shapes = ";".join(f"{one.name}:{one.lengths('x')}" for one in facts.inputs)
    build = command(
        "pulsar2 build",
        f"--target_hardware={facts.target}",
        f"--input={facts.files['table']}",
        f"--config={PULSAR2}",
        f"--input_shapes={shapes}",
        "--output_dir=axera",
    )
    paragraphs = [
        "Compile the Q/DQ model; Pulsar2 uses its scales unchanged (QuantONNX):",
        build,
    ]
    if facts.images:
        paragraphs.append(
            "The compiled model takes the bytes of images. If it should take normalized floats, "
            f'remove "input_processors" from {PULSAR2}.'
        )
    config = json.dumps(_config(facts), indent=1)
    return {"compile.txt": document(*paragraphs), PULSAR2: config + "\n"}


def _config(facts: Facts) -> dict[str, Any]:
    model = facts.quantized
    wide = {
        edge.node
        for point in model.plan.grid_points()
        for edge in point.consumers
        if point.role == "activation" and point.spec.bits == 16
    }
    layers = [
        {"layer_name": node.name, "data_type": "U16"}
        for node in model.floats.graph.nodes
        if node.name in wide
    ]
    quant: dict[str, Any] = {
        "input_configs": [{"tensor_name": "DEFAULT"}],
        "conv_bias_data_type": "FP32",
        "calibration_method": "MinMax",
    }
    processors = {"input_processors": _processors(facts)} if facts.images else {}
    return {
        "model_type": "QuantONNX",
        "npu_mode": "NPU1",
        "quant": quant | ({"layer_configs": layers} if layers else {}),
        **processors,
        "compiler": {"check": 2},
    }


def _processors(facts: Facts) -> list[dict[str, Any]]:
    colours = facts.pixels.upper()
    return [
        {
            "tensor_name": one.name,
            "tensor_format": colours,
            "tensor_layout": str(one.layout).upper(),
            "src_format": colours,
            "src_layout": "NHWC",
            "src_dtype": "U8",
            "csc_mode": "NoCSC",
            "mean": list(facts.mean),
            "std": list(facts.std),
        }
        for one in facts.images
    ]
