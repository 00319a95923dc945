"""Write a first job file from a model and its data; mark guesses by comments."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from onnxqat.data.splits import splits_in
from onnxqat.data.yaml_entries import YAML_SUFFIXES
from onnxqat.errors import JobError
from onnxqat.files import check_writable, write_text
from onnxqat.jobs.measured import Found, Goal, find_preprocessing
from onnxqat.model import Model
from onnxqat.settings import Settings
from onnxqat.verbs import Listener, check
from onnxqat.verbs.models import float_model

__all__ = ["FirstJob", "write_first_job"]

SPLITS = {
    "train": ("train", "training"),
    "validation": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}


@dataclass(frozen=True)
class FirstJob:
    """A job file that was written.

    Attributes
    ----------
    path : Path
        The job file.
    guesses : tuple of str
        The guesses in it, which the user should check.
    """

    path: Path
    guesses: tuple[str, ...]


def write_first_job(
    model: str | Path,
    data: str | Path,
    *,
    rules: str,
    output: str | Path = "job.toml",
    force: bool = False,
    listener: Listener = Listener(),  # noqa: B008 (without state)
) -> FirstJob:
    """Write a job file for a model and its data, as ``onnxqat init`` does.

    Parameters
    ----------
    model : str or Path
        The float model.
    data : str or Path
        A file or a folder. Splits are found by the names of files beside it or folders in it.
    rules : str
        A bundled rule, or a ``.toml`` file.
    output : str or Path
        The job file.
    force : bool
        Replace an existing file.
    listener : Listener
        Receives messages and progress.

    Raises
    ------
    OnnxQatError
        The model or the rule cannot be read, there are no such data, or the file cannot be written.
    """
    check_writable(output, force=force)
    loaded, source = float_model(model), Path(data)
    if not source.exists():
        raise JobError(f"{source}: no such file or folder.")
    splits, doubt = _splits(source)
    found = check(loaded, rules=rules)
    pixels = find_preprocessing(loaded, splits["train"], listener)
    writer = _Writer(Path(output).absolute().parent)
    writer.header(loaded, str(model), found.passed)
    writer.data(splits, doubt, pixels)
    writer.stages(rules, equalize=bool(found.advice), goal=pixels.goal)
    write_text(output, writer.text(), force=force)
    return FirstJob(Path(output), tuple(writer.guesses))


def _splits(source: Path) -> tuple[dict[str, Path], str]:
    """Return the data of each split, and how they were found."""
    if source.suffix.lower() in YAML_SUFFIXES:
        return {"train": source, "test": source}, f"each stage reads its own split of {source.name}"
    found = _inside(source) if source.is_dir() else _beside(source)
    if "test" in found and "train" in found:
        return found, "by their names"
    if "train" in found and "validation" in found:
        found["test"] = found.pop("validation")
        return found, "no test data were found; the validation data are used as test data"
    return (
        {"train": source, "test": source},
        "training and test use the same data, so the figures are too good; name separate data",
    )


def _inside(folder: Path) -> dict[str, Path]:
    """Return the splits of a folder; without any, the files in it with the names of splits."""
    found = splits_in(folder)
    if found:
        return {"validation" if name == "val" else name: path for name, path in found.items()}
    named = {
        path.stem.lower(): path
        for path in sorted(folder.iterdir())
        if path.is_dir() or path.suffix in (".npz", ".npy", ".csv", ".txt", ".json", ".jsonl")
    }
    return {
        split: named[word] for split, words in SPLITS.items() for word in words if word in named
    }


def _beside(file: Path) -> dict[str, Path]:
    """Return the files beside a file whose names differ from it only by the split."""
    every = "|".join(word for words in SPLITS.values() for word in words)
    match = re.search(rf"(?i)(?<![a-z])({every})(?![a-z])", file.stem)
    if match is None:
        return {}
    found = {}
    for split, words in SPLITS.items():
        for word in words:
            stem = file.stem[: match.start()] + word + file.stem[match.end() :]
            if file.with_name(stem + file.suffix).is_file():
                found[split] = file.with_name(stem + file.suffix)
    return found


class _Writer:
    """Collects the lines of the file and its guesses."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._lines = folder, list[str]()
        self.guesses: list[str] = []

    def text(self) -> str:
        """Return the contents of the file."""
        return "\n".join(self._lines) + "\n"

    def guess(self, what: str, why: str) -> None:
        """Write a comment that marks the next lines as a guess."""
        self.guesses.append(f"{what}: {why}")
        self._lines.append(f"# guess: {_one_line(why)}")

    def header(self, model: Model, path: str, passed: bool) -> None:
        """Write the model and its inputs and outputs."""
        self._lines += ["# Written by onnxqat init. Run it with: onnxqat run THIS-FILE", "#"]
        for kind, tensors in (("input", model.graph.inputs), ("output", model.graph.outputs)):
            for tensor in tensors:
                shape = " x ".join(map(str, tensor.shape or ())) or "no known shape"
                self._lines.append(_one_line(f"# {kind} '{tensor.name}': {tensor.dtype}, {shape}"))
        if not passed:
            self._lines.append("# The chip cannot run the whole model: see 'onnxqat check'.")
        self._lines.append(f"model = {self._path(Path(path))}")

    def data(self, splits: dict[str, Path], doubt: str, pixels: Found) -> None:
        """Write the paths of the data, and their preprocessing."""
        self._lines += ["", "[data]"]
        self.guess("splits", doubt)
        self._lines += [f"{name} = {self._path(path)}" for name, path in splits.items()]
        if not pixels.measured and pixels.settings == Settings():
            return  # the model takes no images
        self.guess("preprocessing", pixels.comment)
        mark = "" if pixels.measured else "# "
        for name in pixels.settings.__struct_fields__:
            value = getattr(pixels.settings, name)
            if value is not None:
                self._lines.append(f"{mark}{name.replace('_', '-')} = {_written(value)}")
        if pixels.measured and pixels.settings == Settings():
            self._lines.append("# no mean and scale: the model takes the data unchanged")

    def stages(self, rules: str, *, equalize: bool, goal: Goal) -> None:
        """Write the stages, and the tolerance of the result."""
        rule = self._path(Path(rules)) if rules.endswith(".toml") else _quoted(rules)
        self._lines += ["", "[insert]", f"rules = {rule}"]
        if equalize:
            self.guess("equalize", "channels of some weights have very different ranges")
            self._lines.append("equalize = true")
        self._lines += ["", "[calibrate]", "# samples = 512", "# observer = 'mse'"]
        self._lines += [
            "",
            "[finetune]",
            "# epochs = 1     # default: about 2,000 steps, at most 10 epochs",
        ]
        if goal.metric is not None:
            self._lines += ["", "[evaluate]", f"metric = {_quoted(goal.metric)}"]
        self._lines += ["", "[tolerance.tuned]"]
        self.guess(
            "tolerance", "what the tuned model may lose against the float model, as a fraction"
        )
        self._lines.append(f"{goal.figure} = {goal.limit}")

    def _path(self, path: Path) -> str:
        return _quoted(os.path.relpath(path.absolute(), self._folder))


def _written(value: tuple[float, ...] | float | bool | str) -> str:
    """Return a setting as a value of TOML."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(repr, value))}]"
    return _quoted(value) if isinstance(value, str) else str(value).lower()


def _quoted(text: str) -> str:
    """Return a text as a basic string of TOML."""
    if not text.isprintable():
        raise JobError(f"{text!r}: cannot be written into a job file. Rename it.")
    return json.dumps(text, ensure_ascii=False)


def _one_line(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)
