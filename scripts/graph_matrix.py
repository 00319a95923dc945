"""Try every hardware rule on every graph, and print the results.

    python scripts/graph_matrix.py GRAPHS_DIR... [--rules R ...] [--markdown OUT] [--json OUT]

For each graph and rule the script reports: the number of points in the plan, and the nodes that
stay float; whether the model with Q/DQ passes ONNX's checker (``full_check``), and loads and runs
in onnxruntime; whether stripping it gives the prepared model again, byte for byte; whether every
node is accounted for; and the signal-to-quantization-noise ratio of the worst output in dB, on the
random inputs of the calibration. A node is accounted for if one of its inputs or outputs is a
point, if it is part of a chain, or if the plan names it as skipped.

Each graph runs in a process of its own, so that a crash costs only one cell. Exits with 1 if a
check fails. ``export_graphs.py`` makes graphs for this script.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from graph_trial import LOW_DB, GraphTrial, first_line

import onnxqat

LOW_LEGEND = (
    "The nodes are those of the rule with the lowest SQNR; two numbers are the SQNR in dB of a "
    "node's worst input and of its output."
)
SKIP_LEGEND = 'In each reason, "the op" stands for the name of the op.'


def try_graph(arguments: argparse.Namespace) -> None:
    """Print one JSON document for the graph, then one for every rule."""
    try:
        trial = GraphTrial(arguments.graphs[0], arguments.samples, arguments.observer)
    except Exception as error:  # whatever escapes is the finding
        print(json.dumps({"failure": first_line(error)}), flush=True)
        return
    print(json.dumps(trial.facts()), flush=True)
    for rule in arguments.rules:
        print(json.dumps(trial.cell(rule)), flush=True)


def run_graph(path: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Try one graph in a process of its own; if a rule kills it, start another for the rest."""
    row: dict[str, Any] = {"graph": path.stem, "path": str(path), "cells": {}}
    rules = list(arguments.rules)
    while rules:
        command = [sys.executable, __file__, str(path), "--one-graph", "--rules", *rules]
        command += ["--samples", str(arguments.samples), "--observer", arguments.observer]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            lines = (json.loads(line) for line in process.stdout or ())
            row |= next(lines, {"failure": "the process died"})
            if "failure" in row:
                break
            for cell in lines:
                row["cells"][cell["rule"]] = cell
                print(cell_line(row, cell), flush=True)
        rules = [rule for rule in rules if rule not in row["cells"]]
        if rules:
            killed = f"the process died with code {process.returncode}"
            cell = {"rule": rules[0], "checks": {"insert": killed}}
            row["cells"][rules.pop(0)] = cell
            print(cell_line(row, cell), flush=True)
    if "failure" in row:
        print(f"{row['graph']}: {row['failure']}", flush=True)
    return row


def failures(cell: dict[str, Any]) -> dict[str, str]:
    return {name: text for name, text in cell["checks"].items() if text}


def decibels(ratio: float | None) -> str:
    return "exact" if ratio is None else f"{ratio:.1f} dB"


def cell_decibels(cell: dict[str, Any]) -> str:
    return decibels(cell["sqnr_db"]) if "sqnr_db" in cell else "-"


def skips_by_op(cell: dict[str, Any]) -> Counter[str]:
    return Counter(op_type for _, op_type, _ in cell.get("skips", ()))


def cell_line(row: dict[str, Any], cell: dict[str, Any]) -> str:
    """Return the line of a cell."""
    where = f"{row['graph']:<28} {cell['rule']:<16}"
    if "refused" in cell:
        return f"{where} refused: {cell['refused']}"
    if "insert_seconds" not in cell:
        return f"{where} FAILED {failures(cell)}"
    skips = skips_by_op(cell)
    words = [
        f"{cell['points']:>5} points",
        f"{sum(skips.values()):>4} float",
        f"prepare {row['prepare_seconds']:.2f} s",
        f"plan {cell['plan_seconds']:.2f} s",
        f"insert {cell['insert_seconds']:.2f} s",
        f"{cell_decibels(cell):>8}",
        "  ".join(f"FAILED {name}: {text}" for name, text in failures(cell).items()) or "ok",
        " ".join(f"{op}:{count}" for op, count in skips.most_common()),
    ]
    return f"{where} {'  '.join(words)}".rstrip()


def markdown(rows: list[dict[str, Any]], rules: list[str], observer: str) -> str:
    """Return the table, then the failures, the low ratios and the nodes left float."""
    lines = [
        f"Points, and SQNR of the outputs (W8A8, observer `{observer}`, random inputs). Column",
        "prepared: SQNR of the prepared model against the original one, if outputs differ.",
        "",
        f"| graph | nodes | opset | prepare s | prepared | {' | '.join(rules)} |",
        f"|---|---|---|---|---|{'---|' * len(rules)}",
    ]
    for row in rows:
        if "failure" in row:
            lines.append(f"| {row['graph']} | - | - | - | - |{' failed |' * len(rules)}")
            continue
        facts = [row["graph"], row["nodes"], row["opset"], f"{row['prepare_seconds']:.2f}"]
        facts.append(decibels(row["prepared_sqnr_db"]))
        cells = [markdown_cell(row["cells"][rule]) for rule in rules]
        lines.append(f"| {' | '.join(map(str, facts + cells))} |")
    lines += ["", "## Failures", "", *failure_lines(rows)]
    lines += ["", "## Refused", "", *refused_lines(rows)]
    lines += ["", f"## Below {LOW_DB:.0f} dB", "", LOW_LEGEND, "", *low_lines(rows)]
    lines += ["", "## Nodes left float, over all graphs", "", SKIP_LEGEND, ""]
    lines += skip_lines(rows, rules)
    return "\n".join(lines) + "\n"


def markdown_cell(cell: dict[str, Any]) -> str:
    if "refused" in cell:
        return "refused"
    failed = ", ".join(failures(cell))
    words = [str(cell["points"]), cell_decibels(cell)] if "insert_seconds" in cell else []
    return ", ".join([*words, *([f"**{failed}**"] if failed else [])])


def failure_lines(rows: list[dict[str, Any]]) -> list[str]:
    lines = [f"- {row['graph']}: {row['failure']}" for row in rows if "failure" in row]
    for row in rows:
        by_text: dict[tuple[str, str], list[str]] = {}
        for rule, cell in row["cells"].items():
            for name, text in failures(cell).items():
                by_text.setdefault((name, text), []).append(rule)
        lines += [
            f"- {row['graph']}, {name} ({', '.join(rules)}): {text}"
            for (name, text), rules in by_text.items()
        ]
    return lines or ["None."]


def refused_lines(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        f"- {row['graph']}: {cell['refused']}"
        for row in rows
        for cell in row["cells"].values()
        if "refused" in cell
    ]
    return lines or ["None."]


def low_lines(rows: list[dict[str, Any]]) -> list[str]:
    """Return one line per graph: how many rules have low SQNR, and where the worst loses it."""
    lines = []
    for row in rows:
        found = [(cell["sqnr_db"], rule) for rule, cell in row["cells"].items() if is_low(cell)]
        if found:
            rule = min(found)[1]
            lost = [
                f"{name} ({op}) {before:.1f} -> {after:.1f}"
                for name, op, before, after in row["cells"][rule]["lost_in"]
            ]
            lines.append(f"- {row['graph']}: {_span(found)}; most is lost in {', '.join(lost)}")
    return lines or ["None."]


def _span(found: list[tuple[float, str]]) -> str:
    """Return how many rules have low SQNR, and the lowest and highest of these SQNR."""
    worst, rule = min(found)
    if len(found) == 1:
        return f"1 rule, {worst:.1f} dB ({rule})"
    return f"{len(found)} rules, from {worst:.1f} dB ({rule}) to {max(found)[0]:.1f} dB"


def is_low(cell: dict[str, Any]) -> bool:
    return cell.get("sqnr_db") is not None and cell["sqnr_db"] < LOW_DB


def skip_lines(rows: list[dict[str, Any]], rules: list[str]) -> list[str]:
    """Return one line per rule and reason, with the number of nodes of each op type."""
    lines = []
    for rule in rules:
        by_reason: dict[str, Counter[str]] = {}
        for row in rows:
            for _, op_type, reason in row["cells"].get(rule, {}).get("skips", ()):
                general = re.sub("'.*'", "'...'", reason)
                general = re.sub(rf"(this )?\b{op_type}\b", "the op", general)
                by_reason.setdefault(general, Counter())[op_type] += 1
        for reason, counts in by_reason.items():
            nodes = ", ".join(f"{op} {count}" for op, count in counts.most_common())
            lines.append(f"- `{rule}`: {reason}: {nodes}")
    return lines or ["None."]


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("graphs", type=Path, nargs="+", help="folders of .onnx files, or files")
    parser.add_argument("--rules", nargs="+", default=list(onnxqat.bundled_rules()))
    parser.add_argument("--samples", type=int, default=8, help="calibration samples (0: no SQNR)")
    parser.add_argument("--observer", default="minmax")
    parser.add_argument("--markdown", type=Path, metavar="OUT")
    parser.add_argument("--json", type=Path, metavar="OUT")
    parser.add_argument("--one-graph", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = parsed()
    if arguments.one_graph:
        try_graph(arguments)
        return
    paths = [
        path
        for given in arguments.graphs
        for path in (sorted(given.glob("*.onnx")) if given.is_dir() else [given])
    ]
    if not paths:
        sys.exit("These folders contain no .onnx file.")
    rows = [run_graph(path, arguments) for path in paths]
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))
    if arguments.markdown:
        arguments.markdown.write_text(markdown(rows, arguments.rules, arguments.observer))
    good = all(
        "failure" not in row and not any(map(failures, row["cells"].values())) for row in rows
    )
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
