"""The command ``export``: write a model with integer weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from onnxqat.commands.common import print_result, renamed
from onnxqat.commands.outputs import check_apart, hold
from onnxqat.help_text import command
from onnxqat.options import (
    camera_options,
    export_options,
    force_option,
    json_option,
    output_option,
)

__all__ = ["export"]


@command(example="onnxqat export model.qat.onnx --format onnxruntime -o model.int8.onnx")
@click.argument("model")
@export_options
@camera_options
@output_option("Write the model here (default: MODEL with .int8 before its suffix).")
@force_option
@json_option
def export(model: str, format_name: str, int4: bool, output: str | None, force: bool,
           as_json: bool, **camera: Any) -> None:  # fmt: skip
    """Write a calibrated or fine-tuned Q/DQ MODEL with integer weights, for a runtime."""
    from onnxqat import verbs
    from onnxqat.files import check_writable

    if int4 and format_name == "qoperator":
        raise click.UsageError(
            "--int4 needs a format with Q/DQ; QLinear operators do not take 4 bits."
        )
    target = output or renamed(model, "int8")
    check_apart({"output": target})
    check_writable(target, force=force)
    hold(target)
    verbs.export(model, format_name=format_name, int4=int4, **camera).save(target, force=force)
    size = Path(target).stat().st_size
    document = {"format": format_name, "bytes": size, "output": target}
    print_result({"schema": "onnxqat.export/1", **document}, as_json, list(document.items()))
