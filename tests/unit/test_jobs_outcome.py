"""What a run of jobs says: verdicts on tolerances, the summary and the live table."""

from __future__ import annotations

import io
import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from onnxqat.jobs.board import Board
from onnxqat.jobs.outcome import Outcome
from onnxqat.jobs.summary import document_of, write_summary

FLOAT = {"top1": 0.9, "top5": 1.0}
TUNED = {"top1": 0.88, "top5": 1.0, "agreement": 0.97, "error": 0.25}


def outcome(name: str = "job", **options) -> Outcome:
    one = Outcome(name=name, file="job.toml", folder=Path("runs") / name, **options)
    one.begin()
    one.take({"step": "finetune.tuned", "state": "waiting"})
    for variant, figures in (("float", FLOAT), ("tuned", TUNED)):
        step = {"step": f"evaluate.{variant}", "state": "done", "seconds": 1.0}
        one.take({**step, "figures": figures, "notes": ["a note"]})
    return one


@pytest.mark.parametrize(
    ("variant", "figure", "limit", "held"),
    [
        ("tuned", "top1", 0.03, True),
        ("tuned", "top1", 0.01, False),
        ("tuned", "agreement", 0.031, True),
        ("tuned", "agreement", 0.029, False),
        ("tuned", "error", 0.25, True),
        ("tuned", "error", 0.24, False),
        ("integer", "top1", 1.0, False),  # was not measured
        ("tuned", "map", 1.0, False),
    ],
)
def test_a_tolerance_is_how_far_a_figure_may_fall(variant, figure, limit, held):
    one = outcome(tolerance={variant: {figure: limit}})
    one.take({"status": "done", "message": ""})

    assert one.status == ("done" if held else "missed")
    assert [verdict.held for verdict in one.verdicts] == [held]


def test_a_fast_test_judges_nothing_and_a_failure_stays_one():
    fast = outcome(tolerance={"tuned": {"top1": 0.0}}, judged=False)
    fast.take({"status": "done", "message": ""})
    failed = outcome(tolerance={"tuned": {"top1": 1.0}})
    failed.take({"status": "failed", "message": "why"})

    assert (fast.status, failed.status, failed.message) == ("done", "failed", "why")


def test_a_step_of_an_earlier_run_stays_one():
    one = outcome()
    one.take({"step": "check", "state": "cached"})
    one.take({"step": "check", "state": "done", "seconds": 3.0, "figures": {}, "notes": []})

    assert (one.steps["check"].state, one.steps["check"].seconds) == ("cached", 3.0)


class _Text(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag, _attrs):
        self.tags.add(tag)

    def handle_data(self, data):
        self.text += data


def test_the_summary_is_whole_json_and_takes_no_marks_from_names(tmp_path):
    one = outcome(tolerance={"tuned": {"top1": 0.01}})
    one.take({"status": "failed", "message": "'<script>x</script>|`a`\x1b[31m'"})
    write_summary(tmp_path, [one], fast=False)
    parser = _Text()
    parser.feed((tmp_path / "summary.html").read_text())
    markdown = (tmp_path / "summary.md").read_text()

    assert json.loads((tmp_path / "summary.json").read_text()) == document_of([one], fast=False)
    assert "script" not in parser.tags
    assert "<script>x</script>|`a`\\x1b[31m" in parser.text
    assert "<script>" not in markdown
    assert "\\|\\`a\\`" in markdown
    assert "| job | failed | top1 | 90.00 % | - | - | 88.00 % | - |" in markdown
    (job,) = document_of([one], fast=False)["jobs"]
    assert job["tolerances"][0]["held"] is False
    assert job["figures"]["tuned"] == TUNED
    assert job["notes"] == ["a note"]


def test_the_table_shows_what_runs_and_how_long_it_will_take():
    now = [0.0]
    running, ended, waiting = outcome("a"), outcome("b"), Outcome("c", "job.toml", Path("c"))
    board = Board([ended, running, waiting], 1, clock=lambda: now[0])
    ended.take({"status": "done", "message": ""})
    ended.seconds = 8.0
    for done, when in ((10, 0.0), (20, 5.0)):  # a training that went on from its tenth step
        now[0] = when
        step = {"step": "finetune.tuned", "state": "running", "title": "training"}
        board.hear(running, running.take({**step, "done": done, "total": 40}))
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(board.table())
    lines = console.export_text().splitlines()
    (row,) = (line for line in lines if " a " in line)

    assert "finetune.tuned training: 20 of 40, 5 s, about 10 s left" in row
    assert "90.00 %" in row
    assert "1 of 3 jobs ended, about 16 s left" in lines[-1]
    assert lines.index(row) < next(i for i, line in enumerate(lines) if " b " in line)


def test_lines_tell_the_end_of_steps_and_jobs(capsys):
    one = outcome("a")
    board = Board([one], 1)
    done = {"step": "check", "state": "done", "seconds": 2.0, "figures": {}, "notes": []}
    board.hear(one, one.take({"step": "check", "state": "running"}))
    board.hear(one, one.take(done))
    one.take({"status": "failed", "message": "why"})
    board.hear(one, None)

    assert capsys.readouterr().err == "a: check done in 2.0 s\na: failed why\n"
