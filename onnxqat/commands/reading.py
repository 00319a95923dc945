"""The commands that read a Q/DQ model: evaluate, strip."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onnxqat.commands.common import (
    load_quantized,
    open_for,
    output_documents,
    output_rows,
    percentages,
    print_result,
    take_settings,
    warn_if_unlike_training,
)
from onnxqat.commands.outputs import check_apart
from onnxqat.options import data_options, force_option, json_option, run_options, table_option
from onnxqat.terminal import say

if TYPE_CHECKING:
    from onnxqat.evaluation import Evaluation, PointDifference
    from onnxqat.quantized import AnyModel

__all__ = ["evaluate", "strip"]

logger = logging.getLogger(__name__)


@click.command()
@click.argument("model")
@click.argument("data")
@click.option(
    "--mode",
    type=click.Choice(["float", "qdq", "integer"]),
    default="qdq",
    show_default=True,
    help="float: without Q/DQ; qdq: the file's arithmetic, unfused; integer: the chip's.",
)
@click.option("--rules", help="With --mode integer: a rule of yours; the model's own by default.")
@click.option("--against", help="Reference model; adds agreement and largest difference.")
@click.option(
    "--max-drop",
    type=float,
    help="With --against: exit 1 if top-1 falls by more than this fraction.",
)
@data_options
@run_options(32)
@json_option
def evaluate(model: str, data: str, mode: Any, rules: str | None, against: str | None,
             max_drop: float | None, as_json: bool, batch_size: int | None, threads: int,
             layout: Any, skip_broken: bool, **options: Any) -> None:  # fmt: skip
    """Measure the accuracy of MODEL on DATA."""
    from onnxqat.evaluation import evaluate as run
    from onnxqat.progress import progress_bar
    from onnxqat.quantized import load_model
    from onnxqat.rules import load_rule
    from onnxqat.settings import adopt, settle

    if max_drop is not None and against is None:
        raise click.UsageError("--max-drop needs --against.")
    if rules is not None and mode != "integer":
        raise click.UsageError("--rules needs --mode integer.")
    loaded, given = load_model(model), take_settings(options)
    reference = load_model(against) if against else None
    if reference is not None:  # a float model has nothing stored; both read the same data
        settle(loaded, given)
        adopt(loaded, reference)
    with open_for(
        loaded, data, given, layout=layout, skip_broken=skip_broken, beside=reference
    ) as samples:
        if max_drop is not None and not samples.has_labels:
            raise click.ClickException("--max-drop needs labels, and the data have none.")
        size = samples.batch_size(batch_size)
        warn_if_unlike_training(loaded, samples, data, batch_size=size, threads=threads)
        with progress_bar("evaluating", -(-len(samples) // size)) as advance:
            result = run(loaded, samples.batches(size), mode=mode, against=reference,
                         rule=load_rule(rules) if rules else None, threads=threads,
                         progress=advance)  # fmt: skip
    if result.doubt is not None:
        _warn_of_labels(loaded, result, mode)
    _print_evaluation(result, mode, reference is not None or mode == "integer", as_json)
    if max_drop is not None:
        drop = result.reference["top1"] - result.metrics["top1"]
        if not drop <= max_drop:
            raise click.ClickException(f"top1 dropped by {drop:.4f}, more than {max_drop:g}.")


def _warn_of_labels(model: AnyModel, result: Evaluation, mode: str) -> None:
    """Say that the labels can hardly be the model's own."""
    from onnxqat.evaluation.labels import CAUSES
    from onnxqat.quantized import QuantizedModel

    judged = "the reference" if result.reference else model.name
    rounded = isinstance(model, QuantizedModel) and mode != "float" and not result.reference
    other = " Or the quantization costs it: --mode float leaves that out." if rounded else ""
    logger.warning("%s %s. %s%s", judged, result.doubt, CAUSES, other)


def _print_evaluation(result: Evaluation, mode: str, compared: bool, as_json: bool) -> None:
    document: dict[str, Any] = {
        "schema": "onnxqat.evaluate/1",
        "samples": result.samples,
        "mode": mode,
        "metrics": result.metrics,
    }
    rows = [("samples", result.samples), ("mode", mode), *percentages(result.metrics)]
    if compared:
        difference = math.nan if result.max_abs_diff is None else result.max_abs_diff
        document |= {
            "reference": result.reference,
            "agreement": result.agreement,
            "max_abs_diff": difference if math.isfinite(difference) else None,
            "outputs": output_documents(result),
        }
        rows += [(f"reference {k}", v) for k, v in percentages(result.reference)]
        rows += output_rows(result)
        rows.append(("max_abs_diff", f"{difference:.6g}  largest difference of any output value"))
    if mode == "integer":
        document["points"] = [asdict(point) for point in result.points]
    if result.note:
        document["note"] = result.note
        rows.append(("note", result.note))
    print_result(document, as_json, rows)
    if mode == "integer" and not as_json:
        _print_points(result.points)


WORST = 10


def _print_points(points: Sequence[PointDifference]) -> None:
    """Print the points that differ most, on identical inputs and at the end."""
    say("")
    say(f"against the fake-quantized model, the worst {WORST} of {len(points)} tensors:")
    ranked = sorted(points, key=lambda p: (-p.max_levels, -p.differing))[:WORST]
    width = max((len(p.tensor) for p in ranked), default=0)
    heads = ("alone", "levels", "by bias", "at the end", "levels")
    say(f"{'':<{width}}  " + "  ".join(f"{head:>10}" for head in heads))
    for p in ranked:
        shares = (p.differing, p.bias_differing, p.end_differing)
        alone, bias, end = (f"{100 * share:.3f} %" for share in shares)
        cells = (alone, p.max_levels, bias, end, p.end_max_levels)
        say(f"{p.tensor:<{width}}  " + "  ".join(f"{cell:>10}" for cell in cells))


@click.command()
@click.argument("model")
@click.option("-o", "--output", required=True, help="Directory to write into.")
@table_option
@click.option(
    "--weights",
    type=click.Choice(["snapped", "tuned"]),
    default="snapped",
    show_default=True,
    help="snapped: on the grid, as training computed with them.",
)
@force_option
@json_option
def strip(model: str, output: str, format_name: str | None, weights: Any, force: bool,
          as_json: bool) -> None:  # fmt: skip
    """Write the float model.onnx and the chip's calibration table of a Q/DQ MODEL."""
    from onnxqat.deploy import MODEL_NAME, table_names, write_deployment

    check_apart({name: str(Path(output) / name) for name in (MODEL_NAME, *table_names())})
    result = write_deployment(
        load_quantized(model), output, table=format_name, weights=weights, force=force
    )
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
            ("regridded", f"{len(result.regridded)} weights: the table does not say their grid")
        )
    print_result(document, as_json, rows)
