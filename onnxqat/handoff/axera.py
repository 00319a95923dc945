"""Pulsar2's command and build configuration for an Axera chip.

The fields of the configuration are documented in AXERA-TECH/pulsar2-docs-en
``source/user_guides_config/config.rst``. It normalizes by ``(pixel - mean) / std``.
"""

from __future__ import annotations

import json
from typing import Any

from onnxqat.handoff.facts import Facts, command, document

__all__ = ["pulsar2"]


def pulsar2(facts: Facts) -> dict[str, str]:
    """Return the command, and the input processors to add to its configuration."""
    shapes = ";".join(f"{one.name}:{one.lengths('x')}" for one in facts.inputs)
    build = command(
        "pulsar2 build",
        f"--target_hardware={facts.target}",
        f"--input={facts.files['table']}",
        f"--config={facts.files['config']}",
        f"--input_shapes={shapes}",
        "--output_dir=axera",
    )
    paragraphs = [
        "Compile the Q/DQ model; Pulsar2 uses its scales unchanged (QuantONNX):",
        build,
    ]
    if facts.images:
        processors = json.dumps({"input_processors": _processors(facts)}, indent=2)
        paragraphs += [
            f'For images as bytes, add this to {facts.files["config"]}, beside "quant":',
            processors,
        ]
    return {"compile.txt": document(*paragraphs)}


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
