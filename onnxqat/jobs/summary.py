"""The summary of a run of jobs: JSON for scripts, Markdown and HTML for people."""

from __future__ import annotations

import html
import importlib.metadata
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from onnxqat.files import write_text
from onnxqat.jobs.board import value_text
from onnxqat.jobs.outcome import Outcome, variants_of
from onnxqat.terminal import shown

__all__ = ["document_of", "rows_of", "write_summary"]

STYLE = (
    "body{font-family:sans-serif;margin:2em}table{border-collapse:collapse}"
    "td,th{border:1px solid #ccc;padding:.3em .6em;text-align:left}"
    ".failed,.missed{color:#b00}.done{color:#060}"
)


def document_of(outcomes: Sequence[Outcome], *, fast: bool) -> dict[str, Any]:
    """Return the summary as a JSON document."""
    return {
        "schema": "onnxqat.run/1",
        "version": importlib.metadata.version("onnxqat"),
        "fast_test": fast,
        "jobs": [_job(one) for one in outcomes],
    }


def _job(one: Outcome) -> dict[str, Any]:
    chip = one.folder / "chip"
    return {
        "name": one.name,
        "file": one.file,
        "status": one.status,
        "message": one.message,
        "seconds": round(one.seconds, 1),
        "figures": one.figures,
        "tolerances": [
            {
                "variant": verdict.variant,
                "figure": verdict.figure,
                "limit": verdict.limit,
                "value": verdict.value,
                "held": verdict.held,
            }
            for verdict in one.verdicts
        ],
        "notes": one.notes,
        "folder": str(one.folder),
        "chip": str(chip) if chip.is_dir() and one.status in ("done", "missed") else None,
        "steps": [
            {"name": step.name, "state": step.state, "seconds": step.seconds}
            for step in one.steps.values()
        ],
    }


def rows_of(outcomes: Sequence[Outcome]) -> list[tuple[str, ...]]:
    """Return a table with a row for each job, headings first."""
    variants = variants_of(outcomes)
    rows: list[tuple[str, ...]] = [("job", "status", "figure", *variants)]
    for one in outcomes:
        figure = one.figure
        values = (one.figures.get(variant, {}).get(figure or "") for variant in variants)
        cells = (value_text(figure, value) for value in values)
        rows.append((one.name, one.status, figure or "-", *cells))
    return rows


def _remarks(outcomes: Sequence[Outcome]) -> Iterator[tuple[str, str]]:
    """Yield the message, tolerances and notes of each job, with the job's name."""
    for one in outcomes:
        yield from ((one.name, text) for text in (one.message,) if text)
        yield from ((one.name, str(verdict)) for verdict in one.verdicts)
        yield from ((one.name, note) for note in one.notes)


def write_summary(root: Path, outcomes: Sequence[Outcome], *, fast: bool) -> list[Path]:
    """Write ``summary.json``, ``summary.md`` and ``summary.html``; return their paths."""
    document = json.dumps(document_of(outcomes, fast=fast), indent=2, allow_nan=False)
    texts = {
        "summary.json": document + "\n",
        "summary.md": _markdown(outcomes),
        "summary.html": _html(outcomes),
    }
    for name, text in texts.items():
        write_text(root / name, text, force=True)
    return [root / name for name in texts]


def _markdown(outcomes: Sequence[Outcome]) -> str:
    heads, *rows = rows_of(outcomes)
    lines = ["# onnxqat run", "", _line(heads), _line(["---"] * len(heads)), *map(_line, rows)]
    remarks = [f"- {_cell(name)}: {_cell(text)}" for name, text in _remarks(outcomes)]
    return "\n".join([*lines, *(["", *remarks] if remarks else [])]) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(_cell, cells))} |"


def _cell(text: str) -> str:
    """Escape a text for a Markdown cell: names may contain Markdown or HTML characters."""
    return html.escape(shown(text), quote=False).replace("|", "\\|").replace("`", "\\`")


def _html(outcomes: Sequence[Outcome]) -> str:
    heads, *rows = rows_of(outcomes)
    body = "".join(
        f'<tr class="{html.escape(row[1])}">{"".join(f"<td>{_text(c)}</td>" for c in row)}</tr>\n'
        for row in rows
    )
    remarks = "".join(f"<li>{_text(f'{n}: {text}')}</li>\n" for n, text in _remarks(outcomes))
    top = "".join(f"<th>{_text(head)}</th>" for head in heads)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>onnxqat run</title>'
        f"<style>{STYLE}</style></head><body>\n<h1>onnxqat run</h1>\n"
        f"<table>\n<tr>{top}</tr>\n{body}</table>\n<ul>\n{remarks}</ul>\n</body></html>\n"
    )


def _text(text: str) -> str:
    return html.escape(shown(text))
