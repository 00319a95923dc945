"""Measure what repair, training after it, sensitivities and searched widths reach.

    python scripts/repair.py --models DIR --data DIR --work DIR [--only TEXT,...] [--seeds N]
        [--images N] [--minutes N] [--threads N] [--plan] [--trial]

The models and data are those of the development set (six trained networks, CIFAR-10, ImageNet and
COCO images). NanoDet needs ``pip install pycocotools``. Every figure of accuracy comes from the
command line.

The script first prints what is left to measure, in order, with the estimated minutes; ``--plan``
stops there. Each result is written to WORK/repair.json as soon as it is known, and models are kept
in WORK. So a run can be interrupted and started again, and an interrupted training resumes from its
checkpoint. The tables of what is known are printed at the end, in Markdown. ``--trial`` runs
everything on a few samples in WORK/trial, to see that it works. Two runs with ``--threads 1``,
other parts and other folders can share two cores; docs/accuracy.md was measured so.

The order: the networks that will be trained, without training; their training from end to end with
seed 0; sensitivities and searched widths; the other networks without training, on ``--images`` test
images of CIFAR-10; all other training; analytic bias correction; all test images.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from accuracy import CIFAR
from repair_cases import (
    ANALYTIC,
    BRUTE_FORCE,
    BUDGETS,
    CALIBRATION,
    NETWORK,
    NETWORKS,
    OBSERVER,
    REPAIRED,
    REPAIRS,
    SCOPES,
    STARTS,
    TRAINED,
    Case,
)
from repair_steps import Document, FailedError, Steps, StoppedError

FLOAT, ALL = "float", "all test images"
Results = dict[str, Document]


class Task(NamedTuple):
    """Something to measure, and the estimated minutes."""

    name: str
    minutes: float
    measure: Callable[[], Document]


class Tasks:
    """What there is to measure, in the order of its value.

    Parameters
    ----------
    steps : Steps
        Measures.
    images : int
        The number of test images of CIFAR-10 for networks that are not trained; 0: all.
    seeds : int
        The number of trainings of each case.
    """

    def __init__(self, steps: Steps, *, images: int, seeds: int) -> None:
        self._steps, self._images, self._seeds = steps, images, range(seeds)

    def __iter__(self) -> Iterator[Task]:
        cases = [case for case in REPAIRED if case not in TRAINED]
        yield from self._untrained(TRAINED, STARTS, 0)
        yield from self._trained(self._seeds[:1], [NETWORK])
        yield from self._sensitivities()
        yield from self._untrained(cases, STARTS, self._images)
        yield from self._trained(self._seeds, SCOPES)
        yield from self._untrained(TRAINED, [ANALYTIC], 0)
        yield from self._untrained(cases, [ANALYTIC], self._images)
        if self._images:
            yield from self._untrained(cases, REPAIRS, 0, f"/{ALL}")

    def _untrained(
        self, cases: Iterable[Case], columns: Iterable[str], images: int, end: str = ""
    ) -> Iterator[Task]:
        for case in cases:
            network = NETWORKS[case.model]
            some = images if network.data == CIFAR else 0
            if end and network.data != CIFAR:
                continue
            minutes = network.testing * (some / 10_000 if some else 1)
            measure = partial(self._steps.unquantized, case.model, some)
            yield Task(f"{case.model}/{FLOAT}{end}", minutes, measure)
            for column in columns:
                measure = partial(self._steps.repaired, case, column, some)
                inserting = 0 if end else network.inserting * (1.5 if REPAIRS[column] else 1)
                yield Task(f"{case.name}/{column}{end}", minutes + inserting, measure)

    def _trained(self, seeds: Iterable[int], columns: Iterable[str]) -> Iterator[Task]:
        for seed in seeds:
            for column in columns:
                for case in TRAINED:
                    network = NETWORKS[case.model]
                    whole = SCOPES[column] == "network"
                    epochs = case.epochs if whole else 10 * network.of_blocks
                    minutes = epochs * network.epoch + network.testing + 0.5
                    measure = partial(self._steps.tuned, case, column, seed)
                    yield Task(f"{case.name}/{column}/{seed}", minutes, measure)

    def _sensitivities(self) -> Iterator[Task]:
        for case, images, minutes in BRUTE_FORCE:
            measure = partial(self._steps.brute_force, case, images)
            yield Task(f"brute force/{case.name}", minutes, measure)
        for budget in BUDGETS:
            yield Task(budget.name, budget.minutes, partial(self._steps.searched, budget))


class Run:
    """A run: measures what is not known yet, until the time is up."""

    def __init__(self, path: Path, tasks: Iterable[Task]) -> None:
        self._path = path
        self.results: Results = json.loads(path.read_text()) if path.exists() else {}
        unknown: dict[str, Task] = {}
        for task in tasks:
            if task.name not in self.results:
                unknown.setdefault(task.name, task)
        self._left = list(unknown.values())

    def announce(self) -> None:
        """Print what is left to measure."""
        pace, total = self._pace(), 0.0
        for task in self._left:
            total += task.minutes * pace
            say(f"{task.minutes * pace:6.1f} min, {total / 60:5.1f} h in all: {task.name}")

    def until(self, deadline: float) -> None:
        """Measure; stop at the deadline, a value of `time.monotonic`."""
        while self._left and (started := time.monotonic()) < deadline:
            task = self._left[0]
            try:
                result = task.measure()
            except StoppedError:
                return
            except FailedError as error:  # the others may still run
                say(f"{task.name}: not measured, {error}")
                del self._left[0]
                continue
            minutes = (time.monotonic() - started) / 60
            self._add(task.name, result | {"minutes": minutes, "estimate": task.minutes})
            del self._left[0]
            hours = sum(one.minutes for one in self._left) * self._pace() / 60
            figure = f" {result['figure']:.2f}," if "figure" in result else ""
            say(f"{task.name}:{figure} {minutes:.1f} min; about {hours:.1f} h left")

    def _add(self, name: str, result: Document) -> None:
        self.results[name] = result
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.results, indent=1, sort_keys=True))
        temporary.replace(self._path)

    def _pace(self) -> float:
        """Return how many times longer the known results took than estimated."""
        wanted = sum(one["estimate"] for one in self.results.values())
        return sum(one["minutes"] for one in self.results.values()) / wanted if wanted > 5 else 1.0


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# --- tables -----------------------------------------------------------------------------------


def tables(results: Results) -> Iterator[str]:
    """Yield the lines of the tables, in Markdown."""
    yield f"Observer `{OBSERVER}`, at most {CALIBRATION} calibration images, seed 0."
    yield "An asterisk: a part of the test images."
    yield from _table_of_repairs(results)
    yield from _table_of_training(results)
    yield from _table_of_layers(results)
    yield from _table_of_widths(results)


def _table_of_repairs(results: Results) -> Iterator[str]:
    yield from _header("network", "rule", "case", FLOAT, *REPAIRS)
    for case in [*REPAIRED, *(case for case in TRAINED if case not in REPAIRED)]:
        cells = [_figure(results, f"{case.name}/{column}", case) for column in REPAIRS]
        if any(cells):
            yield _line(*_names(case), _figure(results, f"{case.model}/{FLOAT}", case), *cells)


def _table_of_training(results: Results) -> Iterator[str]:
    yield from _header("network", "rule", "case", FLOAT, "start", *SCOPES, "minutes")
    for case in TRAINED:
        found = {column: _seeds(results, f"{case.name}/{column}") for column in SCOPES}
        runs = [run for column in found.values() for run in column]
        if runs:
            start = runs[-1]["start"]  # that of the repaired columns, if there are any
            first = f"{_figure(results, f'{case.name}/{start}', case)} ({start})"
            minutes = [_mean([run["seconds"] / 60 for run in found[c]]) for c in SCOPES]
            cells = [_spread([run["figure"] for run in found[column]]) for column in SCOPES]
            floats = _figure(results, f"{case.model}/{FLOAT}", case)
            yield _line(*_names(case), floats, first, *cells, " / ".join(minutes))


def _table_of_layers(results: Results) -> Iterator[str]:
    yield from _header("network", "rule", "case", "layers that cost over one point alone",
                       "of the five worst, both name", "CPU s of analyze",
                       "CPU s of brute force")  # fmt: skip
    for case, *_ in BRUTE_FORCE:
        if one := results.get(f"brute force/{case.name}"):
            seconds = (f"{one[key]:.0f}" for key in ("analyze", "brute"))
            yield _line(*_names(case), str(one["costly"]), str(one["agree"]), *seconds)


def _table_of_widths(results: Results) -> Iterator[str]:
    yield from _header("network", "rule", "case", "repair", "bits", "uniform", "bits", "searched")
    for budget in BUDGETS:
        if one := results.get(budget.name):
            uniform, searched = (f"{one[key]:.2f}" for key in ("uniform", "figure"))
            yield _line(*_names(budget.case), budget.start, str(budget.bits), uniform,
                        f"{one['bits']:.2f}", searched)  # fmt: skip


def _names(case: Case) -> tuple[str, str, str]:
    return case.model, f"`{case.rule}`", case.label


def _figure(results: Results, name: str, case: Case) -> str:
    """Return the figure on the most test images, with an asterisk if these are not all."""
    one = results.get(f"{name}/{ALL}") or results.get(name)
    if one is None:
        return ""
    part = NETWORKS[case.model].data == CIFAR and one["images"] < 10_000
    return f"{one['figure']:.2f}{'*' if part else ''}"


def _seeds(results: Results, name: str) -> list[Document]:
    return [one for key, one in sorted(results.items()) if key.rpartition("/")[0] == name]


def _mean(values: list[float]) -> str:
    return f"{statistics.mean(values):.1f}" if values else "-"


def _spread(values: list[float]) -> str:
    """Return the mean, and with several seeds the standard deviation and their number."""
    if not values:
        return ""
    mean = f"{statistics.mean(values):.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f} ({len(values)})" if values[1:] else mean


def _header(*names: str) -> Iterator[str]:
    yield from ("", _line(*names), "|---" * len(names) + "|")


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for folder in ("models", "data", "work"):
        parser.add_argument(f"--{folder}", type=Path, required=True)
    parser.add_argument("--only", default="", help="comma-separated parts of names, as printed")
    parser.add_argument("--seeds", type=int, default=3, help="number of trainings of each case")
    parser.add_argument("--images", type=int, default=2000,
                        help="CIFAR-10 test images at first (0: all)")  # fmt: skip
    parser.add_argument("--minutes", type=float, default=20_000, help="stop after this time")
    parser.add_argument("--threads", type=int, default=0,
                        help="threads of each command (0: all cores)")  # fmt: skip
    parser.add_argument("--plan", action="store_true", help="print what is left, measure nothing")
    parser.add_argument("--trial", action="store_true", help="run on a few samples")
    given = parser.parse_args()
    work = given.work / "trial" if given.trial else given.work
    work.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * given.minutes
    steps = Steps(given.models, given.data, work, deadline=deadline, trial=given.trial,
                  threads=given.threads)  # fmt: skip
    tasks = Tasks(steps, images=given.images, seeds=given.seeds)
    wanted = given.only.split(",")
    run = Run(work / "repair.json", (t for t in tasks if any(part in t.name for part in wanted)))
    run.announce()
    if not given.plan:
        run.until(deadline)
    print("\n".join(tables(run.results)))


if __name__ == "__main__":
    main()
