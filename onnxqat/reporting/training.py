"""Show the training: curves of the figures and the loss, from the history and from a log."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element

from onnxqat.errors import DataError
from onnxqat.reporting.charts import Curve, Mark, bar, chart_of_curves
from onnxqat.reporting.elements import Child, details, element, section, table
from onnxqat.reporting.history import Figures, Run
from onnxqat.reporting.numbers import NONE, finite, in_order, is_share, named, value_text
from onnxqat.train.monitoring.events import Epoch, Event, Note, Start, Step

__all__ = ["Log", "check_log", "log_of", "shown_training"]

CLOSE = 1e-6  # relative tolerance between the figures of a run and of its log
DRAWN = 4  # figures that are drawn: accuracy, agreement, loss and one of the user's
SELDOM = ("top5", "max_abs_diff")  # not drawn, because they add little to the others
MOST_EPOCHS = 500  # the most rows of a table
MOST_POINTS = 10


@dataclass(frozen=True, kw_only=True)
class Log:
    """The events in the log of a fine-tuning, by kind.

    Attributes
    ----------
    start : Figures
        The figures of the start; empty in logs of earlier versions.
    steps, epochs : tuple
        The events, in order and without repetitions.
    notes : tuple of Note
        The measures taken when the loss diverged.
    """

    start: Figures
    steps: tuple[Step, ...]
    epochs: tuple[Epoch, ...]
    notes: tuple[Note, ...]

    def entries(self) -> list[Figures]:
        """Return the figures of the start and of each epoch, including ``epoch``."""
        start: list[Figures] = [{"epoch": 0.0, **self.start}] if self.start else []
        others = [{"epoch": float(e.epoch), **_finite(e.metrics)} for e in self.epochs]
        return [*start, *others]


def log_of(events: Sequence[Event]) -> Log:
    """Return the `Log` of events from `onnxqat.train.read_log`, with each epoch once."""
    starts = [e for e in events if isinstance(e, Start)]
    # a run that resumes from the last step of an epoch logs the end of the epoch again
    epochs = {e.step: e for e in events if isinstance(e, Epoch)}
    return Log(
        start=_finite(starts[-1].metrics) if starts else {},
        steps=tuple(e for e in events if isinstance(e, Step)),
        epochs=tuple(epochs.values()),
        notes=tuple(e for e in events if isinstance(e, Note)),
    )


def _finite(figures: Figures) -> Figures:
    return {name: finite(value) for name, value in figures.items()}


def check_log(log: Log, run: Run, path: str, model: str) -> None:
    """Refuse a log that belongs to another run than the last one in the history.

    Raises
    ------
    DataError
        An epoch has other figures, or the log has more epochs.
    """
    last = {entry.get("epoch"): entry for entry in run.attempts[-1]}
    if len(last) < 2:  # the history contains no epoch
        return
    for entry in log.entries():
        known = last.get(entry["epoch"])
        for name, value in entry.items() if known else ():
            ours = (known or {}).get(name, value)
            if (ours is None) != (value is None) or not math.isclose(
                ours or 0.0, value or 0.0, rel_tol=CLOSE
            ):
                raise DataError(
                    f"{path}: belongs to another run than {model}: {name} after epoch "
                    f"{entry['epoch']:g} is {value} here, but {ours} in the model's history. "
                    "Give the --log of its last fine-tuning."
                )
        if known is None:
            raise DataError(
                f"{path}: contains epoch {entry['epoch']:g}, which the history of {model} lacks. "
                "Give the --log of its last fine-tuning."
            )


def shown_training(runs: Sequence[Run], log: Log | None) -> Element | None:
    """Return the section on training; None without a run or a log."""
    if not runs and log is None:
        return None
    parts: list[Child] = []
    for number, run in enumerate(runs, start=1):
        parts += [element("h3", f"Fine-tuning {number}")] if len(runs) > 1 else []
        parts += _shown_run(run, log if number == len(runs) else None)
    if not runs and log is not None:
        parts += _shown_log_alone(log)
    return section("Training", *parts)


def _shown_run(run: Run, log: Log | None) -> list[Child]:
    drawn = (_chart_of_figure(name, run) for name in _drawn_figures(run.start))
    charts = [chart for chart in drawn if chart is not None]
    charts += _charts_of_steps(log) if log else []
    notes = [element("li", note) for note in run.stage.notes]
    parts: list[Child] = [element("div", *charts, class_="charts")]
    parts += [element("ul", *notes)] if notes else []
    entries = [entry for attempt in run.attempts for entry in attempt]
    entries = [e for i, e in enumerate(entries) if e.get("epoch") or i == 0]
    kept = entries.index(run.kept) if run.kept in entries else None
    parts.append(_table_of_epochs(entries, kept))
    return [*parts, *(_points(log) if log else [])]


def _shown_log_alone(log: Log) -> list[Child]:
    """Return the curves of a log whose run did not produce the model."""
    run_entries = log.entries()
    said = element("p", "From the log only: the model does not contain the result of this run.")
    charts = []
    for name in _drawn_figures(run_entries[0] if run_entries else {}):
        points = _points_of(name, run_entries)
        if len(points) > 1:
            charts.append(_drawn(name, [Curve(points=points)], [], None))
    charts += _charts_of_steps(log)
    parts: list[Child] = [said, element("div", *charts, class_="charts")]
    notes = [element("li", f"step {note.step}: {note.note}") for note in log.notes]
    parts += [element("ul", *notes)] if notes else []
    parts += [_table_of_epochs(run_entries, None)] if run_entries else []
    return [*parts, *_points(log)]


def _drawn_figures(entry: Figures) -> list[str]:
    return [n for n in in_order(entry) if n != "epoch" and n not in SELDOM][:DRAWN]


def _points_of(name: str, entries: Sequence[Figures]) -> list[tuple[float, float]]:
    return [
        (epoch, value)
        for entry in entries
        if (value := entry.get(name)) is not None and (epoch := entry.get("epoch")) is not None
    ]


def _chart_of_figure(name: str, run: Run) -> Element | None:
    """Return the chart of a figure over the epochs; None if there are no values."""
    curves = [
        Curve(points=points, kind="main" if last else "earlier")
        for number, attempt in enumerate(run.attempts, start=1)
        for last in [number == len(run.attempts)]
        if len(points := _points_of(name, attempt)) > 1
    ]
    start, kept = run.start.get(name), run.kept.get(name)
    if not curves or start is None or kept is None:
        return None
    epoch = run.kept.get("epoch") or 0.0
    text = value_text(name, start)
    marks = [Mark(point=(0.0, start), text=f"start {text}", kind="start")]
    if run.kept_name != "start":
        said = f"{'blocks, ' if not epoch else ''}kept: {value_text(name, kept)}"
        marks.append(Mark(point=(epoch, kept), text=said, kind="kept"))
    else:
        marks = [Mark(point=(0.0, start), text=f"start {text}, kept", kind="kept")]
    level = run.floats.get(name)
    return _drawn(name, curves, marks, level)


def _drawn(
    name: str, curves: Sequence[Curve], marks: Sequence[Mark], level: float | None
) -> Element:
    share = is_share(name)
    points = curves[-1].points
    said = ", ".join(mark.text for mark in marks) or f"from {value_text(name, points[0][1])}"
    return chart_of_curves(
        f"{named(name)} on the held-out samples",
        f"{said}, {value_text(name, points[-1][1])} after epoch {points[-1][0]:g}",
        curves,
        axis="epoch",
        text=(lambda v: f"{100 * v:.4g} %") if share else (lambda v: f"{v:.4g}"),
        marks=marks,
        level=None if level is None else (level, f"float {value_text(name, level)}"),
        ends=(0.0, 1.0) if share else (-math.inf, math.inf),
    )


def _charts_of_steps(log: Log) -> list[Element]:
    """Return the charts of the training loss and the learning rate over the steps."""
    losses = [(float(e.step), e.loss) for e in log.steps if finite(e.loss) is not None]
    rates = [(float(e.step), e.lr) for e in log.steps if finite(e.lr) is not None]
    found = []
    if len(losses) > 1:
        said = f"from {losses[0][1]:.4g} to {losses[-1][1]:.4g}"
        found.append(
            chart_of_curves(
                "training loss, mean of 20 steps",
                said,
                [Curve(points=losses, dots=False)],
                axis="step",
                text=lambda v: f"{v:.4g}",
            )
        )
    if len(rates) > 1:
        scales = max(e.scale_lr for e in log.steps)
        largest = max(rate for _, rate in rates)
        said = f"at most {largest:.3g} for weights, {scales:.3g} for scales"
        drawn = chart_of_curves(
            "learning rate",
            said,
            [Curve(points=rates, kind="other", dots=False)],
            axis="step",
            text=lambda v: f"{v:.3g}",
        )
        drawn.append(element("p", said))
        found.append(drawn)
    return found


def _table_of_epochs(entries: Sequence[Figures], kept: int | None) -> Element:
    names = in_order(n for entry in entries for n in entry if n != "epoch")
    rows = []
    for index, entry in enumerate(entries[:MOST_EPOCHS]):
        epoch = entry.get("epoch") or 0
        title = f"{epoch:g}" if epoch else "start"
        title += " (kept)" if index == kept else ""
        rows.append([title, *(value_text(name, entry.get(name)) for name in names)])
    made = table(
        "Figures on the held-out samples",
        ["epoch", *map(named, names)],
        rows,
        numbers=range(1, 1 + len(names)),
        marked=() if kept is None else (kept,),
    )
    more = len(entries) - MOST_EPOCHS
    last = [element("p", f"{more} more epochs are in the file's history.")] if more > 0 else []
    return details(f"Every epoch ({len(entries) - 1})", made, *last) if len(rows) > 8 else made


def _points(log: Log) -> list[Child]:
    """Return the tensors whose scale changed most in training."""
    if not log.epochs:
        return []
    drift, clipped = _finite({**log.epochs[-1].scale_drift}), log.epochs[-1].clipped
    moved = {name: value for name, value in drift.items() if value}
    names = sorted(moved, key=lambda n: (-abs(moved[n] or 0.0), n))[:MOST_POINTS]
    if not names:
        return []
    most = abs(moved[names[0]] or 0.0)
    rows: list[list[Child]] = [
        [
            element("span", name, class_="name"),
            bar(abs(moved[name] or 0.0) / most),
            f"{2 ** min(moved[name] or 0.0, 99.0):.3g}",
            f"{100 * clipped[name]:.3g} %" if name in clipped else NONE,
        ]
        for name in names
    ]
    heads = ["tensor", "", "scale / start", "clipped"]
    title = f"Scales that changed most in training, {len(names)} of {len(drift)}"
    return [table(title, heads, rows, numbers=(2, 3))]
