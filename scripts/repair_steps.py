"""The measurements of scripts/repair.py: each runs commands, and keeps the models they write."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import brute_force
from repair_cases import (
    BLOCKS,
    BOTH,
    CALIBRATION,
    NETWORKS,
    PLAIN,
    REPAIRS,
    SCOPES,
    STARTS,
    UNREPAIRED,
    Budget,
    Case,
)

JUDGED = 128  # training images on which the start of training is chosen
TRIAL = 16  # samples of everything in a trial, except training
ONNXQAT = [sys.executable, "-c", "from onnxqat.cli import main; main()"]
Document = dict[str, Any]


class StoppedError(Exception):
    """The time is up; a training has saved a checkpoint."""


class FailedError(Exception):
    """A command failed; it has printed why."""


class Steps:
    """Runs commands on the development models.

    Parameters
    ----------
    models, data, work : Path
        The folders of the models, of the data, and for results.
    deadline : float
        The value of `time.monotonic` at which training stops.
    trial : bool
        Whether to use a few samples and epochs only.
    threads : int
        The number of threads of each command, except those of brute force; 0: all cores.
    """

    def __init__(
        self, models: Path, data: Path, work: Path, *, deadline: float, trial: bool, threads: int
    ) -> None:
        self.models, self.data, self.work = models, data, work
        self.deadline, self.trial = deadline, trial
        self._shared = ["--threads", str(threads), "--json"]

    def unquantized(self, model: str, images: int) -> Document:
        """Return the figure of the float model on test images; 0: on all of them."""
        return self._figure(model, self._float_model(model), images)

    def repaired(self, case: Case, column: str, images: int) -> Document:
        """Return the figure of a calibrated model."""
        return self._figure(case.model, self._calibrated(case, column), images)

    def tuned(self, case: Case, column: str, seed: int) -> Document:
        """Return the figure of a trained model, and how it was trained."""
        path, document = self._trained(case, column, seed)
        found = self._figure(case.model, path, 0)
        found |= {key: document[key] for key in ("seconds", "kept", "loss")}
        return found | {"start": self._start(case, column)}

    def brute_force(self, case: Case, images: int) -> Document:
        """Compare the ranking of layers by analyze with that by quantizing each one alone."""
        path, (train, test) = self._calibrated(case, PLAIN), NETWORKS[case.model].data
        kept = path.with_suffix(".brute-force.json")
        return brute_force.compare(
            *(path, self.data / train, self.data / test),
            results=kept,
            samples=TRIAL if self.trial else images,
        )

    def searched(self, budget: Budget) -> Document:
        """Return the figures of searched widths, and of the same bits for all weights."""
        case, repair = budget.case, REPAIRS[budget.start]
        start, end = self._calibrated(case, budget.start), f"{budget.start}.{budget.bits}-bits"
        toml, mixed, uniform = (
            self._path(case, f"{end}.{word}") for word in ("toml", "mixed.onnx", "uniform.onnx")
        )
        few = [*self._few("--samples"), *self._few("--val-samples")]
        found = self._run("search", start, self._train(case), "--bits", budget.bits,
                          *budget.options, *few, "-o", toml, "--force")  # fmt: skip
        self._insert(case, [*repair, "--overrides", str(toml)], mixed)
        words = [*case.sets, "--set", f"weight.bits={budget.bits}"]
        self._insert(case, [*repair, *words], uniform)
        first, second = (self._figure(case.model, path, 0) for path in (mixed, uniform))
        return first | {"uniform": second["figure"], "bits": found["bits"]}

    # --- models -------------------------------------------------------------------------------

    def _float_model(self, model: str) -> Path:
        return self.models / f"{model}.onnx"

    def _train(self, case: Case) -> Path:
        return self.data / NETWORKS[case.model].data[0]

    def _path(self, case: Case, end: str) -> Path:
        name = f"{case.name}.{end}"
        for character in "/ ,+":
            name = name.replace(character, "_")
        return self.work / name

    def _calibrated(self, case: Case, column: str) -> Path:
        """Return the calibrated model of a column; make it if it is not there."""
        path = self._path(case, f"{column}.onnx")
        if not path.exists():
            self._insert(case, [*case.sets, *REPAIRS[column]], path)
        return path

    def _insert(self, case: Case, words: list[str], path: Path) -> None:
        samples = TRIAL if self.trial else CALIBRATION
        self._run("insert", self._float_model(case.model), "--rules", case.rule, *words,
                  *NETWORKS[case.model].preprocessing, "--data", self._train(case),
                  "--samples", samples, "-o", path, "--force")  # fmt: skip

    def _start(self, case: Case, column: str) -> str:
        """Return the column that the training of ``column`` starts from.

        If it may be repaired, it is the one whose outputs have the least error on training images:
        the mean over the outputs of the squared error, divided by the variance of the float model's
        values.
        """
        if column == UNREPAIRED:
            return PLAIN
        kept = self._path(case, "start.json")
        if not kept.exists():
            errors = {repair: self._error(case, repair) for repair in STARTS}
            kept.write_text(json.dumps(errors, indent=1))
        errors = json.loads(kept.read_text())
        return min(errors, key=errors.__getitem__)

    def _error(self, case: Case, column: str) -> float:
        samples = TRIAL if self.trial else JUDGED
        found = self._run("evaluate", self._calibrated(case, column), self._train(case),
                          "--against", self._float_model(case.model),
                          "--samples", samples)  # fmt: skip
        return sum(one["relative_error"] ** 2 for one in found["outputs"]) / len(found["outputs"])

    def _trained(self, case: Case, column: str, seed: int) -> tuple[Path, Document]:
        """Return a trained model, and what the command printed; train it if it is not there."""
        path = self._path(case, f"{column}.{seed}.onnx")
        printed = path.with_suffix(".json")
        if not printed.exists():
            words = [*case.training, "--scope", SCOPES[column], "--seed", seed]
            if column == BOTH:
                start, _ = self._trained(case, BLOCKS, seed)
                words += ["--teacher", self._float_model(case.model)]
            else:
                start = self._calibrated(case, self._start(case, column))
            if SCOPES[column] == "network":
                words += ["--epochs", 1] if self.trial else case.length
            elif self.trial:
                words += ["--block-epochs", 1]
            words += ["--train-samples", 3 * TRIAL] if self.trial else []
            document = self._finetune([start, self._train(case), *words, "-o", path])
            printed.write_text(json.dumps(document, indent=1))
        return path, json.loads(printed.read_text())

    # --- commands -----------------------------------------------------------------------------

    def _few(self, option: str) -> list[Any]:
        return [option, TRIAL] if self.trial else []

    def _figure(self, model: str, path: Path, images: int) -> Document:
        """Return top-1 or mAP in percent, with the file's Q/DQ, and the number of images."""
        network = NETWORKS[model]
        words = [word.format(data=self.data) for word in network.metric]
        if path == self._float_model(model):
            words += network.preprocessing  # a Q/DQ file stores it
        if self.trial or images:
            words += ["--samples", TRIAL if self.trial else images]
        found = self._run("evaluate", path, self.data / network.data[1], *words)
        return {"figure": 100 * found["metrics"][network.figure], "images": found["samples"]}

    def _run(self, *words: Any) -> Document:
        """Run a command of onnxqat, and return its JSON document."""
        command = [*ONNXQAT, *map(str, words), *self._shared]
        result = subprocess.run(command, stdout=subprocess.PIPE)
        return _document(words[0], result.returncode, result.stdout)

    def _finetune(self, words: list[Any]) -> Document:
        """Train, or resume training; stop with a checkpoint at the deadline."""
        resume = "--resume" if Path(f"{words[-1]}.checkpoint").exists() else "--force"
        command = [*ONNXQAT, "finetune", *map(str, words), resume, *self._shared]
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        try:
            printed, _ = process.communicate(timeout=max(self.deadline - time.monotonic(), 1))
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGINT)
            process.communicate()
            raise StoppedError from None
        return _document("finetune", process.returncode, printed)


def _document(command: str, code: int, printed: bytes) -> Document:
    """Return what a command printed."""
    if code:
        raise FailedError(f"onnxqat {command} ended with {code}")
    document: Document = json.loads(printed)
    return document
