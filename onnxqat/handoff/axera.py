"""Pulsar2's command and build configuration for an Axera chip.

Fields of the configuration: AXERA-TECH/pulsar2-docs-en ``source/user_guides_config/config.rst``.
Its ``mean`` and ``std`` mean ``(pixel - mean) / std``.
"""

from __future__ import annotations

import json
from typing import Any

from onnxqat.handoff.facts import Facts, command, document

__all__ = ["pulsar2"]


def pulsar2(facts: Facts) -> dict[str, str]:
    """Return the command, and the input processors that belong into its configuration."""
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
        "Compiles the Q/DQ model, whose scales Pulsar2 takes as they are (QuantONNX):",
        build,
    ]
    if facts.images:
        processors = json.dumps({"input_processors": _processors(facts)}, indent=2)
        paragraphs += [
            f'For images as bytes, put this beside "quant" into {facts.files["config"]}:',
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
