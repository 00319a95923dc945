"""Show the layers by cost, and the tensors with their histograms and clipping ranges."""

from __future__ import annotations

import math
from collections.abc import Sequence
from xml.etree.ElementTree import Element

from onnxqat.analysis.document import WORST
from onnxqat.evaluation.metrics import figure_text
from onnxqat.evaluation.similarity import decibels
from onnxqat.reporting.analysis import AnalysisDocument, LayerEntry, PointEntry
from onnxqat.reporting.charts import bar, chart_of_levels
from onnxqat.reporting.elements import Child, details, element, section, table
from onnxqat.reporting.numbers import NONE, decibels_of

__all__ = ["cost_name", "cost_text", "shown_layers"]

DRAWN = 8  # histograms that are drawn
MOST = 1000  # the most rows of a table


def cost_text(found: AnalysisDocument, cost: float | None) -> str:
    """Return a cost as ``analyze`` prints it: errors as an SQNR in decibels, others as figures."""
    if cost is None:
        return "not a number"
    if found.metric != "error":
        return figure_text(found.figure, cost)
    ratio = -decibels(cost)
    return "exact" if ratio == math.inf else f"{ratio:.1f} dB"


def cost_name(metric: str) -> str:
    """Return the name of a metric's cost."""
    return "SQNR of the outputs" if metric == "error" else f"{metric} lost"


def shown_layers(found: AnalysisDocument) -> Element:
    """Return the section on layers and tensors."""
    said = (
        f"Measured by analyze on {found.samples} samples of {found.data or 'arrays'}. "
        f"The whole model: {cost_text(found, found.cost)} ({cost_name(found.metric)})."
    )
    worst = sorted(found.points, key=_fit)
    charts = [_histogram(point) for point in _drawn(found, worst)]
    parts: list[Child] = [element("p", said), element("p", COLUMNS)]
    parts += [_layers(found), _tensors(worst)]
    if charts:
        parts += [element("h3", "Histograms and clipping ranges"), element("p", LEGEND)]
        parts.append(element("div", *charts, class_="charts"))
    return section("Layers and tensors", *parts, *_findings(found))


COLUMNS = (
    "For a layer, 'alone' is the figure of a model in which only this layer is quantized, and "
    "'left float' that of a model in which all other layers are; 'weight' and 'input' say how well "
    "these tensors fit their grids. For a tensor, 'alone' is its SQNR if only its own values are "
    "rounded, and 'together' its SQNR in the quantized model, with the errors of earlier layers."
)
LEGEND = (
    "The number of values of the float model for each integer. The lines are the ends of the "
    "clipping range; values in the grey areas are clipped."
)


def _drawn(found: AnalysisDocument, worst: Sequence[PointEntry]) -> list[PointEntry]:
    """Return the tensors to draw: first those of the worst layers, then those with low SQNR."""
    points = {point.tensor: point for point in found.points}
    names = [n for layer in found.layers[: DRAWN // 2] for n in (*layer.weights, *layer.inputs)]
    names += [point.tensor for point in worst]
    chosen = [points[n] for n in dict.fromkeys(names) if n in points and points[n].histogram]
    return chosen[:DRAWN]


def _layers(found: AnalysisDocument) -> Element:
    points = {point.tensor: point for point in found.points}
    shown = found.layers[:WORST]
    costs = [layer.alone for layer in shown if layer.alone is not None]
    largest = max(costs, default=0.0) or 1.0

    def row(layer: LayerEntry) -> list[Child]:
        fits = [_worst(points, names) for names in (layer.weights, layer.inputs)]
        share = (layer.alone or 0.0) / largest
        alone, left = (cost_text(found, c) for c in (layer.alone, layer.left_float))
        name = element("span", layer.node, element("small", layer.op_type), class_="name")
        return [name, bar(share), alone, left, *fits]

    return table(
        f"The {len(shown)} of {len(found.layers)} layers that cost most",
        ["layer", "", "alone", "left float", "weight", "input"],
        map(row, shown),
        numbers=range(2, 6),
    )


def _fit(point: PointEntry) -> float:
    """Return a sort key: how well a tensor fits its own grid; NaN comes first."""
    if point.alone_sqnr is None:
        return math.inf if point.alone_cosine == 1 else -math.inf
    return point.alone_sqnr


def _alone(point: PointEntry) -> str:
    return decibels_of(point.alone_sqnr, point.alone_cosine)


def _worst(points: dict[str, PointEntry], names: Sequence[str]) -> str:
    known = [points[name] for name in names if name in points]
    return _alone(min(known, key=_fit)) if known else NONE


def _tensors(worst: Sequence[PointEntry]) -> Element:
    heads = [
        "tensor",
        "bits",
        "alone",
        "together",
        "clipped",
        "max/rms",
        "clipping range",
        "values",
    ]
    rows: list[list[Child]] = [
        [
            element("span", p.tensor, element("small", p.role), class_="name"),
            str(p.bits),
            _alone(p),
            decibels_of(p.sqnr, p.cosine),
            _percent(p.clipped),
            f"{p.outlier:.1f}" if p.outlier is not None else NONE,
            _range(p.clipping_range),
            _range(p.values),
        ]
        for p in worst[:MOST]
    ]
    numbers = range(1, len(heads))
    made = table(f"The {min(WORST, len(rows))} of {len(worst)} tensors that fit their grids worst",
                 heads, rows[:WORST], numbers=numbers)  # fmt: skip
    if len(rows) <= WORST:
        return made
    rest = table("The other tensors", heads, rows[WORST:], numbers=numbers)
    return element("div", made, details(f"The other {len(worst) - WORST} tensors", rest))


def _percent(share: float | None) -> str:
    return NONE if share is None else f"{100 * share:.2f} %"


def _range(ends: tuple[float | None, float | None]) -> str:
    return " to ".join(NONE if end is None else f"{end:.4g}" for end in ends)


def _histogram(point: PointEntry) -> Element:
    histogram = point.histogram
    assert histogram is not None
    several = f", {point.scales} scales" if point.scales > 1 else ""
    low, high = (f"{end:.3g}" if end is not None else "" for end in point.clipping_range)
    figures = f"{point.bits} bits{several}, {_alone(point)}"
    clipped = f"{_percent(point.clipped)} clipped"
    drawn = chart_of_levels(
        point.tensor,
        f"{point.role}, {figures}, {clipped}, clipping range {low} to {high}",
        first=histogram.first,
        width=histogram.width,
        counts=histogram.counts,
        inside=(histogram.qmin, histogram.qmax),
        ends=(low, high) if point.scales == 1 else ("", ""),
    )
    drawn.append(element("p", f"{point.role}, {figures}, {clipped}"))
    return drawn


def _findings(found: AnalysisDocument) -> list[Child]:
    """Return dead channels, and biases that are cut off by their integer width."""
    dead = [f"{p.tensor} ({p.dead_channels} of {p.channels})" for p in found.points
            if p.dead_channels]  # fmt: skip
    cut = [f"{b.tensor} ({b.saturated} of {b.values})" for b in found.biases if b.saturated]
    return [
        element("p", f"{title}: {', '.join(names[:WORST])}{_more(names)}.")
        for title, names in (
            ("Dead channels, with one value in all samples", dead),
            ("Biases that are clipped to the range of their integers", cut),
        )
        if names
    ]


def _more(names: Sequence[str]) -> str:
    return f", and {len(names) - WORST} more" if len(names) > WORST else ""
