"""The command ``analyze``: measure which layers and tensors lose most."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from onnxqat.arguments import take_settings, take_source
from onnxqat.commands.common import (
    WORST,
    listener_of,
    output_rows,
    print_result,
    print_table,
)
from onnxqat.commands.outputs import check_apart, hold
from onnxqat.help_text import command, under
from onnxqat.options import (
    analysis_options,
    data_options,
    device_options,
    force_option,
    json_option,
    output_option,
    run_options,
    seed_option,
)
from onnxqat.terminal import say

if TYPE_CHECKING:
    from onnxqat.analysis import Analysis, LayerFigures, PointFigures
    from onnxqat.quantized import QuantizedModel

__all__ = ["analyze"]


@command(example="onnxqat analyze model.qdq.onnx images/ --against model.onnx -o advice.toml")
@click.argument("model")
@click.argument("data")
@under("Analysis")(
    "--against", metavar="MODEL", help="Compare with this float model (default: the one in MODEL)."
)
@under("Analysis")(
    "--rules", metavar="FILE", help="Use this rule file (default: the bundled rule of MODEL)."
)
@analysis_options
@data_options
@run_options(32)
@device_options("cpu")
@seed_option
@output_option("Write the advice as an overrides file, for insert --overrides.")
@force_option
@json_option
def analyze(model: str, data: str, output: str | None, force: bool, as_json: bool,
            **options: Any) -> None:  # fmt: skip
    """Show which tensors and layers of a Q/DQ MODEL differ most from the float model on DATA."""
    import time

    from onnxqat import verbs
    from onnxqat.analysis import overrides_file
    from onnxqat.files import check_writable, write_text
    from onnxqat.parallel import Workers
    from onnxqat.verbs.models import quantized_model

    if output is not None:
        check_apart({"output": output})
        check_writable(output, force=force)
        hold(output)
    loaded = quantized_model(model)
    started = time.monotonic()
    result = verbs.analyze(
        loaded,
        take_source(data, options),
        settings=take_settings(options),
        listener=listener_of(Workers()),
        **options,
    )
    seconds = time.monotonic() - started
    if output is not None:
        write_text(output, overrides_file(loaded, result.advice), force=force)
    _print_analysis(result, loaded, seconds, output, as_json)


def _print_analysis(
    result: Analysis, model: QuantizedModel, seconds: float, output: str | None, as_json: bool
) -> None:
    from onnxqat.analysis import analysis_document

    document = analysis_document(result, model) | {"seconds": round(seconds, 3)}
    document["advice"]["output"] = output
    cost = _cost_format(result)
    name, meaning = _meaning(result.metric)
    rows = [
        ("samples", result.evaluation.samples),
        *output_rows(result.evaluation),
        (name, f"{cost(result.cost)}  {meaning}"),
        ("sessions", f"{result.sessions} in {seconds:.1f} s"),
    ]
    if result.evaluation.note:
        rows.append(("note", result.evaluation.note))
    print_result(document, as_json, rows)
    if not as_json:
        _print_layers(result, cost)
        _print_points(result.points)
        _print_findings(result)
        _print_advice(result, cost, output)


# the printed name of a cost, and its meaning
MEANINGS = {
    "error": ("SQNR", "signal-to-noise ratio of the outputs; more is better"),
    "agreement": ("differing", "of the predicted classes differ from the float model's"),
}


def _meaning(metric: str) -> tuple[str, str]:
    return MEANINGS.get(metric, (f"{metric} lost", "less is better"))


def _cost_format(result: Analysis) -> Callable[[float], str]:
    """Return a function that formats a cost: the error in dB, others like their figure."""
    from onnxqat.evaluation.metrics import figure_text
    from onnxqat.evaluation.similarity import decibels

    if result.metric != "error":
        return partial(figure_text, result.evaluation.first[result.metric])
    return lambda cost: _decibels(-decibels(cost))


def _decibels(value: float) -> str:
    return "exact" if value == math.inf else f"{value:.1f} dB"


def _print_layers(result: Analysis, cost: Callable[[float], str]) -> None:
    """Print the layers that cost most, with the SQNR of their weights and inputs alone."""
    points = {point.tensor: point for point in result.points}

    def row(one: LayerFigures) -> tuple[str, ...]:
        parts = (one.layer.weights, one.layer.inputs)
        worst = (min((points[n].alone_sqnr for n in names), default=math.inf) for names in parts)
        costs = cost(one.alone), cost(one.left_float)
        return (one.layer.node, one.layer.op_type, *costs, *map(_decibels, worst))

    say("")
    shown = result.layers[:WORST]
    say(f"the {len(shown)} of {len(result.layers)} layers that cost most:")
    heads = ("node", "op", "alone", "left float", "weight", "input")
    print_table(heads, map(row, shown), 2)


def _print_points(points: Sequence[PointFigures]) -> None:
    """Print the points that differ most."""
    from onnxqat.analysis import worst_points

    rows = [
        (
            p.tensor, p.role, str(p.bits), _decibels(p.alone_sqnr), _decibels(p.sqnr),
            f"{p.cosine:.4f}", f"{100 * p.clipped:.2f} %", f"{p.outlier:.1f}",
        )
        for p in worst_points(points)
    ]  # fmt: skip
    heads = ("tensor", "role", "bits", "alone", "together", "cosine", "clipped", "max/rms")
    say("")
    say(f"the {len(rows)} of {len(points)} tensors with the largest error of their own:")
    print_table(heads, rows, 2)


def _print_findings(result: Analysis) -> None:
    """Print the tensors with dead channels, and the biases that saturate."""
    dead = {
        p.tensor: f"{p.dead_channels} of {p.channels}" for p in result.points if p.dead_channels
    }
    cut = {b.tensor: f"{b.saturated} of {b.values}" for b in result.biases if b.saturated}
    _print_counts("dead channels (same value in all samples)", dead)
    _print_counts("biases that saturate", cut)


def _print_counts(title: str, counts: Mapping[str, str]) -> None:
    if counts:
        say("")
        more = f", and {len(counts) - WORST} more" if len(counts) > WORST else ""
        listed = (f"{name} {count}" for name, count in list(counts.items())[:WORST])
        say(f"{title}: {', '.join(listed)}{more}")


def _print_advice(result: Analysis, cost: Callable[[float], str], output: str | None) -> None:
    advice = result.advice
    say("")
    if not advice.layers:
        say("advice: none; leaving the worst layers float does not help")
        return
    count = "1 layer" if len(advice.layers) == 1 else f"{len(advice.layers)} layers"
    name = _meaning(result.metric)[0]
    say(f"advice: with {count} float, {name} {cost(advice.cost)} (now {cost(result.cost)}):")
    for override in advice.overrides:
        say(f"  --set {shlex.quote(str(override))}")
    if output is not None:
        say(f"  or: insert --overrides {output}")
