"""Compare float, post-training, repaired, tuned and integer models on the same samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element

from onnxqat.evaluation import Evaluation
from onnxqat.quantized import Stage
from onnxqat.reporting.charts import bar
from onnxqat.reporting.elements import Child, element, table
from onnxqat.reporting.history import Figures, Kind, Run, repaired
from onnxqat.reporting.numbers import NONE, finite, in_order, is_share, named, primary, value_text

__all__ = ["Comparison", "Row", "comparison_of_run", "figures_of_evaluation", "shown_comparison"]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model of a comparison.

    Attributes
    ----------
    kind : str
        ``float``, ``post-training``, ``repaired``, ``tuned`` or ``integer``.
    file : str
        The model's file, or a description of the model.
    figures : Figures
        The figures by name; empty if the model was not measured.
    note : str
        Why the model was not measured.
    """

    kind: str
    file: str
    figures: Figures
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Models on the same samples.

    Attributes
    ----------
    data : str
        The samples, in words.
    samples : int
        The number of samples.
    rows : tuple of Row
        The models, from the float model to the integer model.
    asked : str or None
        The first figure that the user asked for.
    """

    data: str
    samples: int
    rows: tuple[Row, ...]
    asked: str | None = None

    @property
    def place(self) -> str:
        """The number and the description of the samples."""
        return f"{self.samples:,} {self.data}" if self.samples else self.data

    @property
    def primary(self) -> str | None:
        """The most important figure."""
        if self.asked is not None:
            return self.asked
        without_float = [r.figures for r in self.rows if r.figures and r.kind != "float"]
        return primary(r.figures for r in self.rows if r.figures) or primary(without_float)


def figures_of_evaluation(evaluation: Evaluation) -> Figures:
    """Return the figures of an evaluation: accuracy, agreement, or errors of the outputs."""
    found: Figures = {name: finite(value) for name, value in evaluation.metrics.items()}
    if evaluation.agreement is not None:
        found["agreement"] = finite(evaluation.agreement)
    for one in evaluation.outputs:
        if one.agreement is None and one.relative_error is not None:
            found[f"error of {one.output}"] = finite(one.relative_error)
    return found


def comparison_of_run(run: Run, before: Sequence[Stage]) -> Comparison:
    """Return the figures that a fine-tuning measured on its held-out samples.

    Parameters
    ----------
    before : sequence of Stage
        The stages before the fine-tuning.
    """
    tuned = any(stage.name == "finetune" for stage in before)
    start: Kind = "tuned" if tuned else "repaired" if repaired(before) else "post-training"
    rows = [Row(kind="float", file="the teacher", figures=run.floats)] if run.floats else []
    rows.append(Row(kind=start, file="the start", figures=_without_epoch(run.start)))
    kept = "the start, which was kept" if run.kept_name == "start" else run.kept_name
    rows.append(Row(kind="tuned", file=kept, figures=_without_epoch(run.kept)))
    return Comparison(data="held-out samples, which chose the epoch", samples=run.samples,
                      rows=tuple(rows))  # fmt: skip


def _without_epoch(figures: Figures) -> Figures:
    return {name: value for name, value in figures.items() if name != "epoch"}


def shown_comparison(found: Comparison) -> Element:
    """Return a table of the models, with bars for the most important figure."""
    names = in_order(name for row in found.rows for name in row.figures)
    main = found.primary
    largest = max(((row.figures.get(main or "") or 0.0) for row in found.rows), default=0.0)
    scale = 1.0 if is_share(main or "") else largest or 1.0

    def cells(row: Row) -> list[Child]:
        name = element("span", row.kind, element("small", row.file))
        if not row.figures:
            return [name, element("span", row.note, class_="text"), *([NONE] * len(names))]
        if row.note:
            name = element("span", name, element("small", row.note))
        value = row.figures.get(main or "")
        drawn = bar((value or 0.0) / scale, row.kind) if value is not None else None
        return [name, drawn, *(value_text(n, row.figures.get(n)) for n in names)]

    return table(
        f"On {found.place}",
        ["model", "", *map(named, names)],
        map(cells, found.rows),
        numbers=range(2, 2 + len(names)),
    )
