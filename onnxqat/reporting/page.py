"""Put together the report: results, advice, training, layers and plan in one HTML file."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

from onnxqat.files import write_text
from onnxqat.quantized import QuantizedModel
from onnxqat.reporting.advice import Step, steps_of
from onnxqat.reporting.analysis import AnalysisDocument
from onnxqat.reporting.comparison import Comparison, comparison_of_run, shown_comparison
from onnxqat.reporting.elements import Child, command_line, element, section, table, written
from onnxqat.reporting.history import commands_of, repaired, runs_of, source_of
from onnxqat.reporting.layers import shown_layers
from onnxqat.reporting.numbers import named, value_text
from onnxqat.reporting.plan import shown_plan
from onnxqat.reporting.training import Log, shown_training

__all__ = ["Report", "make_report"]

# The page loads nothing and runs no script, even if a name from a file tries to.
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


@dataclass(frozen=True, kw_only=True, repr=False)
class Report:
    """A page about a quantized model.

    Attributes
    ----------
    html : str
        The page; it is self-contained.
    comparisons : tuple of Comparison
        The models side by side, for each set of samples.
    steps : tuple of Step
        The advice, and the commands that add missing parts.
    """

    html: str
    comparisons: tuple[Comparison, ...]
    steps: tuple[Step, ...]

    def __repr__(self) -> str:
        rows = sum(len(one.rows) for one in self.comparisons)
        return f"Report({rows} models compared, {len(self.steps)} steps advised)"

    def save(self, path: str | Path, *, force: bool = False) -> None:
        """Write the page; an interrupted write leaves no partial file.

        Raises
        ------
        OnnxQatError
            The file exists and ``force`` is not set, or it cannot be written.
        """
        write_text(path, self.html, force=force)

    def document(self) -> dict[str, Any]:
        """Return the figures as a JSON document for scripts."""
        return {
            "figures": [
                {
                    "data": one.data,
                    "samples": one.samples,
                    "models": [
                        {"kind": r.kind, "file": r.file, "figures": r.figures, "note": r.note}
                        for r in one.rows
                    ],
                }
                for one in self.comparisons
            ],
            "advice": [{"text": step.text, "commands": list(step.commands)} for step in self.steps],
        }


def make_report(
    model: QuantizedModel,
    *,
    measured: Comparison | None = None,
    log: Log | None = None,
    analysis: AnalysisDocument | None = None,
    repairs: Sequence[str] = (),
) -> Report:
    """Return the report on a model.

    Parameters
    ----------
    model : QuantizedModel
        The model; its history contains the figures of its fine-tunings.
    measured : Comparison, optional
        The models evaluated on given data.
    log : Log, optional
        The log of the last fine-tuning.
    analysis : AnalysisDocument, optional
        The analysis of the model.
    repairs : sequence of str
        Advised repairs of the float model, one line each.
    """
    runs = runs_of(model)
    places = [i for i, stage in enumerate(model.history) if stage.name == "finetune"]
    held_out = [
        comparison_of_run(run, model.history[:place])
        for run, place in zip(runs, places, strict=True)
    ]
    comparisons = (*([measured] if measured else []), *reversed(held_out))
    steps = steps_of(model, measured, log, analysis, repairs)
    body = element(
        "body",
        _head(model),
        _tiles(comparisons),
        _advice(steps),
        section("Figures", *map(shown_comparison, comparisons)) if comparisons else None,
        shown_training(runs, log),
        shown_layers(analysis) if analysis else None,
        shown_plan(model.plan),
        _done(model),
    )
    page = element("html", _metadata(model), body, lang="en")
    return Report(html=written(page), comparisons=comparisons, steps=tuple(steps))


def _metadata(model: QuantizedModel) -> Element:
    style = element("style")
    style.text = files("onnxqat.reporting").joinpath("style.css").read_text(encoding="utf-8")
    return element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", f"{model.name}: quantization report"),
        style,
    )


def _head(model: QuantizedModel) -> Element:
    weights, activations = (
        "/".join(sorted({str(p.spec.bits) for p in model.plan.points if p.role == role}))
        for role in ("weight", "activation")
    )
    said = [
        f"{source_of(model)} for {model.plan.rule}",
        f"weights of {weights} bits, activations of {activations}" if weights else None,
        model.state,
        *repaired(model.history),
    ]
    line = element("p", " · ".join(text for text in said if text), class_="under")
    return element("header", element("h1", model.name), line)


def _tiles(comparisons: Sequence[Comparison]) -> Element | None:
    """Return the most important figure of each model as tiles."""
    if not comparisons or not comparisons[0].primary:
        return None
    main, first = comparisons[0].primary, comparisons[0]
    tiles = [
        element(
            "div",
            element("span", f"{row.kind}, {named(main)}"),
            element("b", value_text(main, row.figures.get(main))),
            element("span", row.file),
            class_=f"tile {row.kind}",
        )
        for row in first.rows
        if row.figures.get(main) is not None
    ]
    under = element("p", f"On {first.place}.", class_="under")
    return element("div", element("div", *tiles, class_="tiles"), under)


def _advice(steps: Sequence[Step]) -> Element:
    if not steps:
        return section(
            "Advice", element("p", "None: no problem was found, and no part is missing.")
        )
    items = [element("li", step.text, *map(command_line, step.commands)) for step in steps]
    return section("Advice", element("ul", *items))


def _done(model: QuantizedModel) -> Element:
    """Return the commands that reproduce the file, with their input files and versions."""
    if not model.history:
        return section("What was done", element("p", "The file has no history."))
    rows: list[list[Child]] = []
    for stages, words in commands_of(model):
        read = ", ".join(f"{name} {file}" for name, file in stages[0].inputs.items())
        computed = [f"{name} {version}" for name, version in stages[0].versions.items()]
        versions = ", ".join([*computed, *([stages[0].device] if stages[0].device else [])])
        rows.append(
            [
                ", ".join(stage.name for stage in stages),
                element("span", element("code", shlex.join(words)), class_="text"),
                element("span", read, class_="name"),
                element("span", versions, class_="name"),
            ]
        )
    said = element("p", "The commands that reproduce the file; folders are left out.")
    heads = ["stage", "command", "read", "versions"]
    return section("What was done", said, table("Stages", heads, rows))
