"""The command ``search``: choose a width for each weight within a budget."""

from __future__ import annotations

import math
import shlex
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from onnxqat.arguments import take_settings, take_source
from onnxqat.commands.common import listener_of, print_result, print_table
from onnxqat.commands.outputs import check_apart, hold
from onnxqat.help_text import command, under
from onnxqat.options import (
    data_options,
    force_option,
    json_option,
    output_option,
    run_options,
    search_options,
    seed_option,
)
from onnxqat.terminal import say

if TYPE_CHECKING:
    from onnxqat.analysis import Found, Ranking, Search, Weight
    from onnxqat.verbs import Searched

__all__ = ["search"]


@command(example="onnxqat search model.qdq.onnx images/ --max-loss 1.0 -o mixed.toml")
@click.argument("model")
@click.argument("data")
@under("Search")(
    "--against", metavar="MODEL", help="Compare with this float model (default: the one in MODEL)."
)
@under("Search")(
    "--rules", metavar="FILE", help="Use this rule file (default: the bundled rule of MODEL)."
)
@search_options
@data_options
@run_options(32)
@seed_option
@output_option("Write the widths as an overrides file, for insert --overrides.")
@force_option
@json_option
def search(model: str, data: str, val_data: str | None, output: str | None, force: bool,
           as_json: bool, **options: Any) -> None:  # fmt: skip
    """Choose a width for each weight of a calibrated Q/DQ MODEL, within a budget."""
    import time
    from dataclasses import replace

    from onnxqat import verbs
    from onnxqat.files import check_writable, write_text
    from onnxqat.overrides import overrides_text, parse_override
    from onnxqat.parallel import Workers
    from onnxqat.verbs.models import quantized_model

    if (options["max_loss"] is None) == (options["bits"] is None):
        raise click.UsageError("Give either --max-loss or --bits.", click.get_current_context())
    if output is not None:
        check_apart({"output": output})
        check_writable(output, force=force)
        hold(output)
    loaded = quantized_model(model)
    if output is not None:  # raises early if a file cannot hold the overrides
        overrides_text([parse_override(text) for text in loaded.plan.overrides])
    source = take_source(data, options)
    started = time.monotonic()
    result = verbs.search(
        loaded,
        source,
        val_data=None if val_data is None else replace(source, source=val_data, split=None),
        settings=take_settings(options),
        listener=listener_of(Workers()),
        **options,
    )
    seconds = time.monotonic() - started
    if output is not None:
        write_text(output, overrides_text(result.search.overrides), force=force)
    _print(result, loaded.plan.rule, options["metric"], seconds, output, as_json)


def _print(result: Searched, rule: str, metric: str, seconds: float, output: str | None,
           as_json: bool) -> None:  # fmt: skip
    found = result.search
    document = {
        "schema": "onnxqat.search/1",
        "rule": rule,
        "metric": metric,
        "samples": result.samples,
        "val_samples": result.val_samples,
        "models": result.models,
        "seconds": round(seconds, 3),
        "bits": found.chosen.average,
        "points": _points(found.chosen),
        "uniform": [
            {"width": width, "bits": one.average, "points": _points(one)}
            for width, one in found.uniform.items()
        ],
        "ranking": result.ranking.metric,
        "weights": [
            {
                **asdict(weight),
                "bits": _bits_of(found, weight),
                "costs": {
                    str(bits): cost if math.isfinite(cost) else None
                    for bits, cost in result.ranking.costs.get(weight.tensor, {}).items()
                },
            }
            for weight in found.weights
        ],
        "overrides": [str(override) for override in found.overrides],
        "output": output,
    }
    rows = [
        ("samples", f"{result.samples} to rank weights, {result.val_samples} to measure models"),
        *((f"all {width} bits", _described(one, metric))
          for width, one in sorted(found.uniform.items())),
        ("found", _described(found.chosen, metric)),
        ("models", f"{result.models} in {seconds:.1f} s"),
    ]  # fmt: skip
    print_result(document, as_json, rows)
    if not as_json:
        _print_weights(found, result.ranking)
        _print_overrides(found, output)


def _points(found: Found) -> float | None:
    return 100 * found.cost if math.isfinite(found.cost) else None


def _described(found: Found, metric: str) -> str:
    return f"{found.average:.2f} bits on average, {100 * found.cost:.2f} points of {metric} lost"


def _bits_of(found: Search, weight: Weight) -> int:
    return found.chosen.bits.get(weight.tensor, weight.bits)


def _print_weights(found: Search, ranking: Ranking) -> None:
    """Print each weight, its width, and its cost at each width."""
    widths = sorted(found.uniform)[:-1]

    def row(weight: Weight) -> tuple[str, ...]:
        costs = ranking.costs.get(weight.tensor, {})
        bits = f"{_bits_of(found, weight)}{' fixed' if weight.fixed else ''}"
        shown = (f"{100 * costs[w]:.3g}" if w in costs else "-" for w in widths)
        return (weight.tensor, weight.op_type, f"{weight.elements:,}", bits, *shown)

    say("")
    say(f"the cost of each weight if it alone has fewer bits (points of {ranking.metric}):")
    heads = ("weight", "op", "elements", "bits", *(f"at {width}" for width in widths))
    print_table(heads, map(row, found.weights), 2)


def _print_overrides(found: Search, output: str | None) -> None:
    say("")
    if output is not None:
        say(f"next: insert --overrides {output}, which also has the overrides of MODEL")
        return
    say("next: insert with")
    for override in found.overrides:
        say(f"  --set {shlex.quote(str(override))}")
