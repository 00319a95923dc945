"""The command ``evaluate``: measure accuracy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from onnxqat.arguments import take_settings, take_source
from onnxqat.commands.common import (
    WORST,
    figure_rows,
    listener_of,
    output_rows,
    print_result,
)
from onnxqat.help_text import command, under
from onnxqat.json_values import json_value
from onnxqat.options import (
    data_options,
    device_options,
    json_option,
    metric_options,
    mode_options,
    run_options,
    samples_option,
)
from onnxqat.terminal import say

if TYPE_CHECKING:
    from onnxqat.evaluation import Evaluation, PointDifference

__all__ = ["evaluate"]


@command(example="onnxqat evaluate model.qat.onnx test.npz --against model.onnx --max-drop 0.01")
@click.argument("model")
@click.argument("data")
@mode_options("Measurement")
@under("Measurement")(
    "--against",
    metavar="MODEL",
    help="Compare with this model: agreement, errors and largest difference of the outputs.",
)
@under("Measurement")(
    "--max-drop",
    type=float,
    metavar="FRACTION",
    help="Exit with 1 if top-1 is lower than that of --against by more than this fraction.",
)
@metric_options
@samples_option
@data_options
@run_options(32)
@device_options("cpu")
@json_option
def evaluate(model: str, data: str, mode: Any, rules: str | None, against: str | None,
             max_drop: float | None, metrics: tuple[str, ...], decode: str | None, as_json: bool,
             batch_size: int | None, threads: int,
             **options: Any) -> None:  # fmt: skip
    """Measure the accuracy of MODEL on DATA."""
    from onnxqat import verbs
    from onnxqat.parallel import Workers

    if max_drop is not None and against is None:
        raise click.UsageError("--max-drop needs --against.")
    if rules is not None and mode != "integer":
        raise click.UsageError("--rules needs --mode integer.")
    result = verbs.evaluate(
        model,
        take_source(data, options),
        mode=mode,
        against=against,
        rules=rules,
        metrics=metrics,
        decode=decode,
        labelled=max_drop is not None,
        decides=None if max_drop is None else "--max-drop",
        settings=take_settings(options),
        batch_size=batch_size,
        threads=threads,
        listener=listener_of(Workers()),
        **options,
    )
    _print_evaluation(result, mode, against is not None or mode == "integer", as_json)
    if max_drop is not None:
        drop = result.reference["top1"] - result.metrics["top1"]
        if not drop <= max_drop:
            raise click.ClickException(f"top1 dropped by {drop:.4f}, more than {max_drop:g}.")


def _print_evaluation(result: Evaluation, mode: str, compared: bool, as_json: bool) -> None:
    document: dict[str, Any] = {
        "schema": "onnxqat.evaluate/1",
        "samples": result.samples,
        "mode": mode,
        "metrics": json_value(result.metrics),
    }
    rows = [("samples", result.samples), ("mode", mode), *figure_rows(result.metrics)]
    if compared:
        difference = math.nan if result.max_abs_diff is None else result.max_abs_diff
        document |= {
            "reference": json_value(result.reference),
            "agreement": result.agreement,
            "max_abs_diff": json_value(difference),
            "outputs": json_value(result.outputs),
        }
        rows += [(f"reference {k}", v) for k, v in figure_rows(result.reference)]
        rows += output_rows(result)
        rows.append(("max_abs_diff", f"{difference:.6g}  largest difference of any output value"))
    if mode == "integer":
        document["points"] = [asdict(point) for point in result.points]
        document["assumed"] = json_value(result.assumed)
        if result.assumption:
            rows.append(("assumed", result.assumption))
    if result.note:
        document["note"] = result.note
        rows.append(("note", result.note))
    print_result(document, as_json, rows)
    if mode == "integer" and not as_json:
        _print_points(result.points)


def _print_points(points: Sequence[PointDifference]) -> None:
    """Print the points that differ most, on identical inputs and in the whole program."""
    say("")
    ranked = sorted(points, key=lambda p: (-p.max_levels, -p.differing))[:WORST]
    shown = f"the worst {WORST} of {len(points)}" if len(points) > WORST else "all"
    say(f"differences from the fake-quantized model, {shown} tensors:")
    width = max((len(p.tensor) for p in ranked), default=0)
    heads = ("alone", "levels", "by bias", "at the end", "levels")
    say(f"{'':<{width}}  " + "  ".join(f"{head:>10}" for head in heads))
    for p in ranked:
        shares = (p.differing, p.bias_differing, p.end_differing)
        alone, bias, end = (f"{100 * share:.3f} %" for share in shares)
        cells = (alone, p.max_levels, bias, end, p.end_max_levels)
        say(f"{p.tensor:<{width}}  " + "  ".join(f"{cell:>10}" for cell in cells))
