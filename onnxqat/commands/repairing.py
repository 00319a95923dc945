"""The command that repairs a float model before quantization: equalize; and what advises it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from onnxqat.commands.common import load_float, note, open_for, print_result, renamed, take_settings
from onnxqat.commands.outputs import check_apart, hold
from onnxqat.options import (
    data_options,
    force_option,
    json_option,
    output_option,
    relu6_option,
    run_options,
)

if TYPE_CHECKING:
    from onnxqat.model import Model
    from onnxqat.plan import QuantPlan
    from onnxqat.repair import Difference, Equalized

__all__ = ["Equalization", "equalize", "repairs"]

NAMED = 3  # layers that advice names
COMPARED = 64  # samples of the data on which outputs are compared


@click.command()
@click.argument("model")
@click.option("--data", help="Compare the outputs on this; on random values without.")
@relu6_option
@data_options
@run_options(32)
@output_option("Float model; MODEL with .equalized before its suffix by default.")
@force_option
@json_option
def equalize(model: str, data: str | None, relu6: str, batch_size: int | None, threads: int,
             layout: Any, skip_broken: bool, output: str | None, force: bool, as_json: bool,
             **options: Any) -> None:  # fmt: skip
    """Let the channels of MODEL have ranges alike, with the same outputs, for quantization."""
    import numpy as np

    from onnxqat.files import check_writable
    from onnxqat.preparation import prepare
    from onnxqat.preparation.float16 import FLOAT16_KEY, narrow_to_float16
    from onnxqat.quantized import without_notes
    from onnxqat.repair import equalize as run

    target = output or renamed(model, "equalized")
    check_apart({"output": target})
    check_writable(target, force=force)
    hold(target)
    prepared = prepare(load_float(model))
    batches = None
    if data is not None:
        given = take_settings(options)
        reading = {"layout": layout, "skip_broken": skip_broken}
        with open_for(prepared, data, given, labels=False, **reading) as source:
            size = source.batch_size(batch_size, default=32)
            chosen = np.arange(min(len(source), COMPARED))
            batches = [batch.inputs for batch in source.batches(size, indices=chosen)]
    result = run(prepared, batches, relu6=relu6, threads=threads)  # type: ignore[arg-type]
    floats, narrow = result.model, result.model.metadata.get(FLOAT16_KEY)
    floats.metadata = without_notes(floats.metadata)
    floats = floats if narrow is None else narrow_to_float16(floats, narrow)
    floats.save(target, force=force)
    _print_equalized(result, target, as_json)


def _print_equalized(result: Equalized, target: str, as_json: bool) -> None:
    document = {
        "schema": "onnxqat.equalize/1",
        "layers": list(result.layers),
        "skips": [{"node": s.node, "op_type": s.op_type, "reason": s.reason} for s in result.skips],
        "spreads": [spread._asdict() for spread in result.spreads],
        "differences": _documents(result.differences),
        "relu6": list(result.relu6),
        "relu6_cost": _documents(result.relu6_cost),
        "output": target,
    }
    rows: list[tuple[str, Any]] = [("layers", f"{len(result.layers)} changed")]
    before, after = (
        max((getattr(one, when) for one in result.spreads), default=0.0)
        for when in ("before", "after")
    )
    rows += [("channels", f"at most {before:.1f}, now {after:.1f} octaves below the largest")]
    rows += [("difference", str(one)) for one in result.differences]
    rows += [("ReLU6", f"{len(result.relu6)} replaced by Relu")] if result.relu6 else []
    rows += [("its cost", str(one)) for one in result.relu6_cost]
    rows += [("left alone", f"{skip.node}: {skip.reason}") for skip in result.skips]
    print_result(document, as_json, [*rows, ("output", target)])


def _documents(found: Iterable[Difference]) -> list[dict[str, Any]]:
    """Return differences as JSON has them: null where a figure is not finite."""
    return [
        {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in entry.items()}
        for entry in map(asdict, found)
    ]


class Equalization:
    """Equalizes what is inserted into, and keeps what was done.

    Attributes
    ----------
    result : Equalized or None
        Of the last model; None before the first.
    source : str
        Hash of the weights of the model that may teach.
    """

    def __init__(self, relu6: str) -> None:
        self.relu6, self.source = relu6, ""
        self.result: Equalized | None = None

    def __call__(self, prepared: Model) -> Model:
        """Return the equalized model.

        It computes what the user's model does, and may teach in its place, unless a ReLU6 was
        replaced: then the user's own has to.
        """
        from onnxqat.quantized import weights_hash
        from onnxqat.repair import equalize as run

        self.result = run(prepared, relu6=self.relu6)  # type: ignore[arg-type]
        teacher = prepared if self.result.relu6 else self.result.model
        self.source = weights_hash(teacher.graph)
        return self.result.model

    def tell(self) -> None:
        """Say what was done."""
        if self.result is None:
            return
        note(f"Equalized {len(self.result.layers)} layers.")
        for one in self.result.differences:
            note(f"Output {one}, on random values.")
        if self.result.relu6:
            note(f"{len(self.result.relu6)} ReLU6 became Relu; fine-tuning needs --teacher.")
        for one in self.result.relu6_cost:
            note(f"Without ReLU6, output {one}, on random values.")


def repairs(prepared: Model, plan: QuantPlan, path: str) -> list[str]:
    """Return what to do to a model before it is quantized: a line with the command for each."""
    from onnxqat.repair import unevenness

    quantized = {edge.node for p in plan.points if p.role == "weight" for edge in p.consumers}
    uneven = [one for one in unevenness(prepared.graph) if one.node in quantized]
    if not uneven:
        return []
    worst = ", ".join(
        f"'{one.node}' ({one.before:.1f} octaves below the largest, {one.after:.1f} if equalized)"
        for one in uneven[:NAMED]
    )
    advice = (
        f"The channels of {len(uneven)} weights have very different ranges: {worst}. Equalize "
        f"them, which does not change the outputs: onnxqat insert {path} --equalize."
    )
    return [advice]
