"""The command ``equalize``: equalize the ranges of channels."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from onnxqat.arguments import take_settings, take_source
from onnxqat.commands.common import (
    listener_of,
    print_result,
    renamed,
)
from onnxqat.commands.outputs import check_apart, hold
from onnxqat.help_text import command, under
from onnxqat.json_values import json_value
from onnxqat.options import (
    data_options,
    force_option,
    json_option,
    output_option,
    relu6_option,
    run_options,
    samples_option,
)

if TYPE_CHECKING:
    from onnxqat.repair import Equalized

__all__ = ["equalize"]


@command(example="onnxqat equalize model.onnx --data images/ -o model.equalized.onnx")
@click.argument("model")
@under("Data")(
    "--data", metavar="DATA", help="Compare the outputs on DATA (default: on random values)."
)
@relu6_option
@samples_option
@data_options
@run_options(32)
@output_option("Write the float model here (default: MODEL with .equalized before its suffix).")
@force_option
@json_option
def equalize(model: str, data: str | None, relu6: Any, batch_size: int | None, threads: int,
             output: str | None, force: bool, as_json: bool, **options: Any) -> None:  # fmt: skip
    """Equalize the channel ranges of MODEL for quantization, and compare its outputs."""
    from onnxqat import verbs
    from onnxqat.files import check_writable
    from onnxqat.parallel import Workers

    target = output or renamed(model, "equalized")
    check_apart({"output": target})
    check_writable(target, force=force)
    hold(target)
    result = verbs.equalize(
        model,
        take_source(data, options),
        relu6=relu6,
        settings=take_settings(options),
        batch_size=batch_size,
        threads=threads,
        listener=listener_of(Workers()),
    )
    result.model.save(target, force=force)
    _print_equalized(result, target, as_json)


def _print_equalized(result: Equalized, target: str, as_json: bool) -> None:
    from onnxqat.verbs.repairing import told

    document = {
        "schema": "onnxqat.equalize/1",
        "layers": list(result.layers),
        "skips": [{"node": s.node, "op_type": s.op_type, "reason": s.reason} for s in result.skips],
        "spreads": [spread._asdict() for spread in result.spreads],
        "differences": json_value(result.differences),
        "migrations": [asdict(one) for one in result.migrations],
        "relu6": list(result.relu6.nodes),
        "relu6_kept": list(result.relu6.kept),
        "relu6_cost": json_value(result.relu6.cost),
        "absorbed": list(result.absorbed),
        "absorption_cost": json_value(result.absorption_cost),
        "output": target,
    }
    before, after = (
        max((getattr(one, when) for one in result.spreads), default=0.0)
        for when in ("before", "after")
    )
    rows = [("channels", f"before up to {before:.1f}, now {after:.1f} octaves below the largest")]
    rows += [("done", line) for line in told(result)]
    rows += [("left alone", f"{skip.node}: {skip.reason}") for skip in result.skips]
    print_result(document, as_json, [*rows, ("output", target)])
