"""Read a file's history: the commands that reproduce the file, and each fine-tuning."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, Literal

import msgspec

from onnxqat.model import Model
from onnxqat.quantized import QuantizedModel, Stage, weights_hash
from onnxqat.repair import original
from onnxqat.reporting.numbers import finite
from onnxqat.settings import Settings, stored_settings

__all__ = [
    "Figures",
    "Kind",
    "Run",
    "commands_of",
    "floats_of",
    "given",
    "kind_of",
    "repaired",
    "runs_of",
    "source_of",
]

Figures = dict[str, float | None]
Kind = Literal["post-training", "repaired", "tuned"]

# The suffix of each stage's output file, and the arguments of each stage in order.
OUTPUTS = {"insert": "qdq", "calibrate": "calibrated", "finetune": "qat", "import-table": "qdq"}
ARGUMENTS = {"insert": ("model",), "import-table": ("table", "model")}
# Settings whose option has another name, is repeated for each value, or does not exist.
RENAMED = {"groups": "group", "input_map": "input"}
REPEATED = ("set", "groups", "input_map")
# What else equalization did, by the name of the figure in its stage.
CHANGES = {
    "relu6_replaced": "{:.0f} ReLU6 replaced",
    "migrated": "{:.0f} normalizations smoothed",
    "absorbed": "high biases of {:.0f} layers absorbed",
    "fitted": "{:.0f} activations fitted to powers of two",
}
NOT_OPTIONS = ("validation",)
FLAGS = {
    ("bias_correction", "empirical"): "--bias-correction",
    ("bias_correction", "analytic"): "--analytic-bias-correction",
}


@dataclass(frozen=True, kw_only=True)
class Run:
    """One fine-tuning.

    Attributes
    ----------
    stage : Stage
        The stage of the history.
    attempts : tuple of tuple of Figures
        The figures of the start and of each epoch, including ``epoch``. Each restart with a smaller
        rate is a separate attempt with the same start.
    kept : Figures
        The figures of the kept state.
    """

    stage: Stage
    attempts: tuple[tuple[Figures, ...], ...]
    kept: Figures

    @property
    def start(self) -> Figures:
        """The figures before training."""
        return self.attempts[0][0]

    @property
    def kept_name(self) -> str:
        """The name of the kept state: ``start``, ``blocks`` or ``epoch N``."""
        if epoch := int(self.kept.get("epoch") or 0):
            return f"epoch {epoch}"
        return "blocks" if self.stage.figures.get("blocks_kept") else "start"

    @property
    def floats(self) -> Figures:
        """The figures of the float model on the same samples."""
        return prefixed(self.stage.figures, "float.")

    @property
    def samples(self) -> int:
        """The number of held-out samples; 0 if the file does not record it."""
        return int(finite(self.stage.figures.get("held_out")) or 0)


def prefixed(figures: Mapping[str, float | None], prefix: str) -> Figures:
    """Return the figures whose names begin with a prefix, with the prefix removed."""
    return {
        name.removeprefix(prefix): finite(value)
        for name, value in figures.items()
        if name.startswith(prefix)
    }


def runs_of(model: QuantizedModel) -> list[Run]:
    """Return all fine-tunings in the history, oldest first."""
    return [_run(stage) for stage in model.history if stage.name == "finetune"]


def _run(stage: Stage) -> Run:
    before, after = (prefixed(stage.figures, f"{when}.") for when in ("before", "after"))
    best = finite(stage.figures.get("best_epoch")) or 0.0
    entries = [{n: finite(v) for n, v in one.items()} for one in stage.epochs]
    if not entries:  # older versions recorded only the start and the kept state
        entries = [{"epoch": 0.0, **before}]
        entries += [{"epoch": best, **after}] if best else []
    attempts = [[entries[0]]]
    for entry in entries[1:]:
        if (entry.get("epoch") or 0) <= (attempts[-1][-1].get("epoch") or 0):
            attempts.append([entries[0]])
        attempts[-1].append(entry)
    return Run(stage=stage, attempts=tuple(map(tuple, attempts)), kept={"epoch": best, **after})


def repaired(history: Sequence[Stage]) -> list[str]:
    """Return the repairs before training, in words."""
    found = []
    for stage in history:
        figures = stage.figures
        if stage.settings.get("equalize"):
            layers = finite(figures.get("equalized")) or 0
            found.append(f"{layers:.0f} layers equalized")
        for name, done in CHANGES.items():
            if count := finite(figures.get(name)):
                found.append(done.format(count))
        if stage.settings.get("bias_correction"):
            found.append(f"{finite(figures.get('corrected')) or 0:.0f} biases corrected")
    return found


def kind_of(model: QuantizedModel) -> Kind:
    """Return the kind of a calibrated model in a comparison."""
    if model.state == "finetuned":
        return "tuned"
    return "repaired" if repaired(model.history) else "post-training"


def given(model: QuantizedModel, argument: str) -> str | None:
    """Return the last file in the history for an argument such as ``data``, or None."""
    named = [stage.inputs[argument] for stage in model.history if argument in stage.inputs]
    return named[-1] if named else None


def source_of(model: QuantizedModel) -> str:
    """Return the name of the float file of the model; the model's own name if unknown."""
    return next((s.inputs["model"] for s in model.history if "model" in s.inputs), model.name)


def floats_of(model: QuantizedModel) -> Model | None:
    """Return the float model inside; None if training or repair changed what it computes."""
    floats = original(model.floats)
    return floats if weights_hash(floats.graph) == model.source else None


def commands_of(model: QuantizedModel) -> list[tuple[tuple[Stage, ...], list[str]]]:
    """Return the commands that reproduce the file: for each, its stages and its words.

    Files are named without their folders; the last output is the file itself.
    """
    current, made = source_of(model), []
    grouped = _grouped(model.history)
    for index, stages in enumerate(grouped):
        first, stored = stages[0], _data_settings(model) if index == 0 else {}
        words = ["onnxqat", first.name]
        words += [first.inputs.get(n, n.upper()) for n in ARGUMENTS.get(first.name, ())]
        if first.name not in ARGUMENTS:
            words += [current, first.inputs.get("data", "DATA")]
        elif len(stages) > 1:
            words += ["--data", first.inputs["data"]]
        told = {k: v for k, v in first.inputs.items() if k in ("val_data", "teacher")}
        for settings in (*(stage.settings for stage in stages), stored):
            told |= settings
        last = index == len(grouped) - 1
        current = model.name if last else f"{_stem(current)}.{OUTPUTS.get(first.name, 'qdq')}.onnx"
        made.append((stages, [*words, *_options(told), "-o", current]))
    return made


def _grouped(history: Sequence[Stage]) -> list[tuple[Stage, ...]]:
    """Return the stages of each command: an insert with data also calibrates."""
    found: list[tuple[Stage, ...]] = []
    for stage in history:
        before = found[-1] if found else ()
        inserted = len(before) == 1 and before[0].name == "insert" and "data" in before[0].inputs
        if inserted and stage.name == "calibrate":
            found[-1] = (*before, stage)
        else:
            found.append((stage,))
    return found


def _stem(name: str) -> str:
    stem = PurePath(name).stem
    return stem.removesuffix(".qdq").removesuffix(".calibrated")


def _data_settings(model: QuantizedModel) -> dict[str, Any]:
    """Return the data settings stored in the file; a list of classes becomes one file name."""
    stored = stored_settings(model)
    told = {n: v for n in Settings.__struct_fields__ if (v := getattr(stored, n)) is not None}
    return told | ({"classes": "CLASSES"} if "classes" in told else {})


def _options(settings: Mapping[str, Any]) -> list[str]:
    words: list[str] = []
    for name, value in settings.items():
        option = f"--{RENAMED.get(name, name).replace('_', '-')}"
        if name in NOT_OPTIONS or value is None or value is False:
            continue
        if value is True or (isinstance(value, str) and (name, value) in FLAGS):
            words.append(FLAGS.get((name, str(value)), option))
        elif name in REPEATED:
            for one in _each(value):
                words += [option, one]
        else:
            words += [option, _text(value)]
    return words


def _each(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [f"{name}={_text(one)}" for name, one in value.items()]
    return [_text(one) for one in value] if isinstance(value, list | tuple) else [_text(value)]


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ",".join(map(_text, value))
    return value if isinstance(value, str) else json.dumps(msgspec.to_builtins(value))
