"""A page about a fine-tuning, from its log: curves of its numbers, and a table of its points.

One HTML file that refers to nothing outside of itself. matplotlib, the optional extra ``report``,
draws the curves as SVG.
"""

from __future__ import annotations

import importlib.util
import io
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import chdir
from html import escape
from pathlib import Path
from typing import TypeAlias

from onnxqat.errors import OnnxQatError
from onnxqat.files import write_text
from onnxqat.train.monitoring.events import Epoch, Event, Note, Step

__all__ = ["check_plotting", "write_report"]

Curve: TypeAlias = list[tuple[int, float]]  # step and value

DRAWN = 8  # points of the curves by point: those that end furthest from zero
SHARES = ("top1", "top5", "agreement")  # figures that are fractions
NAME = 48  # characters of a tensor's name beside a curve
STYLE = """
body { font: 15px/1.5 sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; }
figure { margin: 1em 0; } svg { max-width: 100%; height: auto; }
table { border-collapse: collapse; } td, th { padding: .1em 1em .1em 0; text-align: left; }
td.n { text-align: right; font-variant-numeric: tabular-nums; } td.name { word-break: break-all; }
"""


def check_plotting() -> None:
    """Refuse to begin without matplotlib.

    Raises
    ------
    OnnxQatError
        It is not installed.
    """
    try:
        found = importlib.util.find_spec("matplotlib")
        package = Path((found and found.origin) or "").parent
        # it reads a matplotlibrc of the current folder first; this one has matplotlib's own
        with chdir(package / "mpl-data"):
            import matplotlib.figure  # noqa: F401
    except (ImportError, ValueError, OSError) as error:
        message = "A report needs matplotlib. Run pip install 'onnxqat[report]'."
        raise OnnxQatError(message) from error


def write_report(
    path: str | Path, events: Sequence[Event], *, title: str, force: bool = False
) -> None:
    """Write the page, whole or not at all.

    Parameters
    ----------
    path : str or Path
        An HTML file.
    events : sequence of Event
        As `onnxqat.train.read_log` returns them.
    title : str
        Heading of the page.
    force : bool
        Replace an existing file.

    Raises
    ------
    OnnxQatError
        matplotlib is not installed, or the file cannot be written.
    """
    check_plotting()
    steps = [e for e in events if isinstance(e, Step)]
    # once: its end is logged again where a run goes on from the last step of an epoch
    epochs = list({e.step: e for e in events if isinstance(e, Epoch)}.values())
    parts = [f"<h1>{escape(title)}</h1>", _summary(epochs, events)]
    for name, (unit, curves) in _figures(steps, epochs).items():
        if any(curves.values()):
            drawn = _svg(name, unit, curves)
            parts.append(f"<h2>{escape(name)}</h2>\n<figure>{drawn}</figure>")
    parts.append(_points(epochs))
    page = '<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8">'
    page += f"<title>{escape(title)}</title>\n<style>{STYLE}</style></head>\n<body>\n"
    write_text(path, page + "\n".join(parts) + "\n</body>\n</html>\n", force=force)


def _figures(
    steps: Sequence[Step], epochs: Sequence[Epoch]
) -> dict[str, tuple[str, dict[str, Curve]]]:
    """Return the unit and the curves of each figure, by title."""
    losses = {e.step: e.loss for e in epochs} | {e.step: e.loss for e in steps}
    metrics = _series((e.step, e.metrics) for e in epochs)
    figures: dict[str, tuple[str, dict[str, Curve]]] = {
        "Loss": ("", {"loss": sorted(losses.items())})
    }
    shares = {name: metrics.pop(name) for name in SHARES if name in metrics}
    figures["Held-out data"] = ("fraction", shares)
    for name, curve in metrics.items():
        figures[f"Held-out data: {name}"] = ("", {name: curve})
    rates = {
        "lr": [(e.step, e.lr) for e in steps],
        "scale_lr": [(e.step, e.scale_lr) for e in steps],
    }
    figures["Learning rates"] = ("", rates)
    drift = _furthest(_series((e.step, e.scale_drift) for e in epochs))
    figures["Scale drift"] = ("log2 of the ratio to the start", drift)
    clipped = _furthest(_series((e.step, e.clipped) for e in epochs))
    figures["Clipped values"] = ("fraction", clipped)
    return figures


def _series(rows: Iterable[tuple[int, Mapping[str, float | None]]]) -> dict[str, Curve]:
    found: dict[str, Curve] = {}
    for step, values in rows:
        for name, value in values.items():
            if value is not None:
                found.setdefault(name, []).append((step, value))
    return found


def _furthest(curves: dict[str, Curve]) -> dict[str, Curve]:
    names = sorted(curves, key=lambda name: -abs(curves[name][-1][1]))
    return {name: curves[name] for name in names[:DRAWN]}


def _svg(title: str, unit: str, curves: Mapping[str, Curve]) -> str:
    """Draw the curves over the steps; each is a group whose id names the figure and the curve."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    settings = {
        "path.simplify": False,  # every value is drawn
        "svg.fonttype": "none",  # text stays text
        "svg.hashsalt": "onnxqat",  # the same log gives the same bytes
        "text.parse_math": False,  # a name may hold dollars
    }
    with mpl.rc_context(), warnings.catch_warnings():
        mpl.rcdefaults()
        mpl.rcParams.update(settings)
        warnings.simplefilter("ignore")  # of letters that the font to measure with does not have
        figure = Figure(figsize=(9, 3.5), layout="constrained")
        axes = figure.add_subplot(xlabel="step", ylabel=unit)
        axes.grid(visible=True, alpha=0.3)
        for name, curve in curves.items():
            # a label that begins with an underscore would be left out
            marker = "." if len(curve) < 100 else None
            (line,) = axes.plot(*zip(*curve, strict=True), marker=marker, label=f" {_short(name)}")
            line.set_gid(f"{title}/{name}")
        if len(curves) > 1:
            axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small", frameon=False)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    return re.sub(r"^.*?(?=<svg)", "", text.getvalue(), flags=re.DOTALL)


def _short(name: str) -> str:
    return name if len(name) <= NAME else f"…{name[-NAME:]}"


def _summary(epochs: Sequence[Epoch], events: Sequence[Event]) -> str:
    """Return how far the run came, what was noted, and the figures of every epoch."""
    notes = [f"<p>{escape(e.note)} (step {e.step})</p>" for e in events if isinstance(e, Note)]
    parts = [f"<p>{events[-1].step} steps, {len(epochs)} epochs</p>", *notes]
    if epochs:
        names = list(epochs[0].metrics)
        figures = ([e.loss, *(e.metrics.get(name) for name in names)] for e in epochs)
        body = [(str(e.epoch), row) for e, row in zip(epochs, figures, strict=True)]
        parts.append(_table("epochs", ["epoch", "loss", *names], body))
    return "\n".join(parts)


def _points(epochs: Sequence[Epoch]) -> str:
    """Return the table of all points at the end, those whose scale moved furthest first."""
    if not epochs:
        return ""
    drift, clipped = epochs[-1].scale_drift, epochs[-1].clipped
    names = sorted({*drift, *clipped}, key=lambda n: (-abs(drift.get(n, 0.0)), n))
    body = [(n, [drift.get(n), clipped.get(n)]) for n in names]
    header = ["point", "scale drift (log2)", "clipped values"]
    return "<h2>Points at the end</h2>\n" + _table("points", header, body)


def _table(
    name: str, header: Sequence[str], body: Sequence[tuple[str, Sequence[float | None]]]
) -> str:
    head = "".join(f"<th>{escape(text)}</th>" for text in header)
    rows = []
    for first, numbers in body:
        cells = "".join(f'<td class="n">{"" if n is None else f"{n:.6g}"}</td>' for n in numbers)
        rows.append(f'<tr><td class="name">{escape(first)}</td>{cells}</tr>')
    return f'<table id="{name}"><tr>{head}</tr>\n' + "\n".join(rows) + "</table>"
