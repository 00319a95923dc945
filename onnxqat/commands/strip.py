"""The command ``strip``: write the float model and the calibration table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from onnxqat.commands.common import print_result
from onnxqat.commands.outputs import check_apart
from onnxqat.help_text import command, under
from onnxqat.options import (
    camera_options,
    force_option,
    json_option,
    shape_options,
    table_option,
    weights_option,
)

__all__ = ["strip"]


@command(example="onnxqat strip model.qat.onnx -o chip")
@click.argument("model")
@under("Output")(
    "-o", "--output", required=True, metavar="DIR", help="Write the model and the table into DIR."
)
@table_option
@weights_option
@shape_options
@camera_options
@force_option
@json_option
def strip(model: str, output: str, force: bool, as_json: bool, **options: Any) -> None:
    """Write the float model.onnx of a Q/DQ MODEL, and the calibration table for the chip."""
    from onnxqat import verbs
    from onnxqat.deploy import MODEL_NAME, deployed_names

    check_apart({name: str(Path(output) / name) for name in (MODEL_NAME, *deployed_names())})
    result = verbs.strip(model, output, force=force, **options)
    files = {kind: str(path) for kind, path in result.files.items()}
    document = {
        "schema": "onnxqat.strip/1",
        "files": files,
        "left_out": {kind: list(names) for kind, names in result.left_out.items()},
        "regridded": dict(result.regridded),
    }
    rows: list[tuple[str, Any]] = list(files.items())
    if result.left_out:
        counts = (f"{len(names)} {kind}" for kind, names in result.left_out.items())
        rows.append(("left out", ", ".join(counts)))
    if result.regridded:
        rows.append(
            ("regridded", f"{len(result.regridded)} weights: the table does not hold their grid")
        )
    print_result(document, as_json, rows)
