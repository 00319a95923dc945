"""Advise the next steps, and the commands that add missing parts to a report."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from onnxqat.quantized import QuantizedModel
from onnxqat.reporting.analysis import AnalysisDocument
from onnxqat.reporting.comparison import Comparison
from onnxqat.reporting.history import (
    Run,
    commands_of,
    floats_of,
    given,
    repaired,
    runs_of,
    source_of,
)
from onnxqat.reporting.layers import cost_name, cost_text
from onnxqat.reporting.training import Log

__all__ = ["Step", "steps_of"]


@dataclass(frozen=True, kw_only=True)
class Step:
    """One piece of advice.

    Attributes
    ----------
    text : str
        The observation, and what to do.
    commands : tuple of str
        The commands that do it.
    """

    text: str
    commands: tuple[str, ...] = ()


def steps_of(
    model: QuantizedModel,
    measured: Comparison | None,
    log: Log | None,
    analysis: AnalysisDocument | None,
    repairs: Sequence[str],
) -> list[Step]:
    """Return the advice; steps that can raise the accuracy come first.

    Parameters
    ----------
    repairs : sequence of str
        Advised repairs of the float model, one line each.
    """
    runs = runs_of(model)
    return [
        *(Step(text=line) for line in repairs if not repaired(model.history)),
        *_of_state(model),
        *(_of_run(runs[-1]) if runs else ()),
        *(_of_analysis(analysis, model) if analysis else ()),
        *_of_missing(model, measured, log, analysis),
    ]


def _of_state(model: QuantizedModel) -> Iterator[Step]:
    if model.state == "uncalibrated":
        yield Step(
            text="The scales are placeholders. Calibrate the model.",
            commands=(shlex.join(["onnxqat", "calibrate", model.name, "DATA"]),),
        )
    elif model.state == "calibrated" and not runs_of(model):
        data = given(model, "data") or "DATA"
        teacher = [] if floats_of(model) else ["--teacher", source_of(model)]
        yield Step(
            text="The model was not fine-tuned. Fine-tuning usually lowers the loss of accuracy.",
            commands=(shlex.join(["onnxqat", "finetune", model.name, data, *teacher]),),
        )


def _of_run(run: Run) -> Iterator[Step]:
    epochs = int(run.attempts[-1][-1].get("epoch") or 0)
    if run.kept_name == "start":
        yield Step(
            text="The start was kept, because no epoch was better. Try a smaller --lr, more data, "
            "or 'onnxqat analyze', which shows where accuracy is lost."
        )
    elif run.kept_name == f"epoch {epochs}":
        yield Step(text=f"The last epoch, {epochs}, was the best. More --epochs may improve it.")


def _of_analysis(found: AnalysisDocument, model: QuantizedModel) -> Iterator[Step]:
    advice = found.advice
    if advice.layers and advice.overrides:
        now, then = (cost_text(found, cost) for cost in (found.cost, advice.cost))
        yield Step(
            text=f"These layers cost most: {', '.join(advice.layers)}. With them in float, "
            f"{cost_name(found.metric)} {then} (now {now}). If the chip has 16 bits, this "
            "command gives them 16 bits instead.",
            commands=(_with_overrides(advice.overrides, model),),
        )


def _with_overrides(overrides: Sequence[str], model: QuantizedModel) -> str:
    """Return the command that repeats the insertion with additional overrides."""
    made = commands_of(model)
    usual = ["onnxqat", "insert", source_of(model)]
    words = made[0][1][:-2] if made and made[0][0][0].name == "insert" else usual
    return shlex.join(
        [*words, *(w for one in overrides for w in ("--set", one)), "-o", "mixed.onnx"]
    )


def _of_missing(
    model: QuantizedModel,
    measured: Comparison | None,
    log: Log | None,
    analysis: AnalysisDocument | None,
) -> Iterator[Step]:
    data, name = given(model, "val_data") or "DATA", model.name
    if model.state != "uncalibrated" and measured is None:
        yield Step(
            text="Not in this report: float, tuned and integer models on test data. Add models "
            "from earlier files with --beside FILE.",
            commands=(
                shlex.join(["onnxqat", "report", name, data, "--against", source_of(model)]),
            ),
        )
    if model.state == "finetuned" and log is None:
        yield Step(
            text="Not in this report: training loss and learning rate by step. Fine-tune with "
            "--log run.jsonl, and pass the log to report.",
            commands=(shlex.join(["onnxqat", "report", name, "--log", "run.jsonl"]),),
        )
    if model.state != "uncalibrated" and analysis is None:
        analyze = shlex.join(["onnxqat", "analyze", name, data, "--json"])
        report = shlex.join(["onnxqat", "report", name, "--analysis", "analysis.json"])
        yield Step(
            text="Not in this report: the layers and tensors that cost most, with histograms.",
            commands=(f"{analyze} > analysis.json", report),
        )
