"""Functions that several commands share: show progress, print results."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxqat.terminal import say, say_document

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from contextlib import AbstractContextManager

    from onnxqat.evaluation import Evaluation
    from onnxqat.parallel import Workers
    from onnxqat.plan import QuantPlan
    from onnxqat.verbs import Listener, TrainingListener

__all__ = [
    "WORST",
    "counted",
    "counts",
    "figure_rows",
    "join",
    "listener_of",
    "output_rows",
    "plan_document",
    "print_result",
    "print_table",
    "renamed",
]


WORST = 10  # rows of a table of the layers or tensors that differ most


def join() -> Workers:
    """Join the processes that work together; only the first one prints messages."""
    from onnxqat.parallel import join_workers

    workers = join_workers()
    if workers.rank > 0:
        logging.disable(logging.WARNING)
    return workers


def listener_of(workers: Workers) -> Listener:
    """Return a listener that shows the progress of a verb; only the first worker prints notes."""
    from onnxqat.progress import FinetuneReport, progress_bar
    from onnxqat.verbs import Listener

    class Terminal(Listener):
        def note(self, text: str) -> None:
            if workers.rank == 0:
                say(text, err=True)

        def batches(self, title: str, total: int) -> AbstractContextManager[Callable[[], None]]:
            return progress_bar(title, total)

        def training(self) -> AbstractContextManager[TrainingListener]:
            return FinetuneReport()

    return Terminal()


def counted(number: int, noun: str) -> str:
    """Return a number and its noun, such as ``1 node`` and ``2 nodes``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def counts(plan: QuantPlan) -> dict[str, int]:
    """Return the numbers of weights and activations that a plan quantizes."""
    roles = {"weights": "weight", "activations": "activation"}
    return {name: sum(p.role == role for p in plan.points) for name, role in roles.items()}


def plan_document(plan: QuantPlan) -> dict[str, Any]:
    """Return a plan as a JSON document."""
    document: dict[str, Any] = json.loads(plan.to_json())
    unsupported = [skip for skip in document["skips"] if skip["unsupported"]]
    return {"schema": "onnxqat.insert/1", **document, "unsupported": unsupported}


def print_result(document: dict[str, Any], as_json: bool, rows: list[tuple[str, Any]]) -> None:
    """Print the result: a JSON document, or a short table."""
    if as_json:
        say_document(document)
        return
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        say(f"{name:<{width}}  {value}")


def print_table(heads: Sequence[str], rows: Iterable[Sequence[str]], texts: int) -> None:
    """Print a table; the first ``texts`` columns are text and left-aligned, others are numbers."""
    table = [heads, *rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(heads))]
    for row in table:
        cells = [
            f"{cell:<{width}}" if i < texts else f"{cell:>{width}}"
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        say("  ".join(cells).rstrip())


def figure_rows(metrics: dict[str, float]) -> list[tuple[str, str]]:
    """Return a row (name, text) for each figure."""
    from onnxqat.evaluation.metrics import figure_text

    return [(name, figure_text(name, value)) for name, value in metrics.items()]


def output_rows(evaluation: Evaluation) -> list[tuple[str, str]]:
    """Return a row for each output that was compared: name of the figure, value and meaning."""
    rows = []
    for one in evaluation.outputs:
        if one.agreement is not None:
            rows.append(("agreement", f"{100 * one.agreement:.2f} %  {one.meaning}"))
        elif one.relative_error is not None:
            rows.append(("error", f"{100 * one.relative_error:.2f} %  {one.meaning}"))
        elif one.max_abs_diff is None:
            reason = "its size depends on the data, and differs between the models"
            rows.append(("agreement", f"not measured for '{one.output}': {reason}"))
    return rows


def renamed(path: str, word: str) -> str:
    """Return ``model.<word>.onnx`` for ``model.onnx``; replace the word of an earlier stage."""
    name = Path(path)
    stem = name.stem
    for earlier in (".qdq", ".calibrated"):
        stem = stem.removesuffix(earlier)
    return str(name.with_name(f"{stem}.{word}.onnx"))
