"""Write a first job file from a model and its data; mark guesses by comments."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from onnxqat.data.splits import splits_in
from onnxqat.data.yaml_entries import YAML_SUFFIXES
from onnxqat.errors import JobError, OnnxQatError
from onnxqat.files import check_writable, write_text
from onnxqat.model import Model
from onnxqat.settings import Settings
from onnxqat.verbs import DataSource, Listener, check, evaluate
from onnxqat.verbs.models import float_model

__all__ = ["FirstJob", "write_first_job"]

MEASURED = 200  # samples on which preprocessings are compared
SPLITS = {
    "train": ("train", "training"),
    "validation": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
# Usual normalizations of pixels from 0 to 255: x = (pixel - mean) * scale.
PREPROCESSINGS = {
    "none": Settings(),
    "0 to 1": Settings(scale=(1 / 255,)),
    "-1 to 1": Settings(mean=(127.5,), scale=(1 / 127.5,)),
    "-1 to 1 by 128": Settings(mean=(128.0,), scale=(1 / 128,)),
}
# ImageNet normalization from the documentation of torchvision's models, times 255
IMAGENET = Settings(mean=(123.675, 116.28, 103.53), scale=(1 / 58.395, 1 / 57.12, 1 / 57.375))


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


@dataclass(frozen=True)
class _Pixels:
    """Preprocessing settings, and how they were found."""

    settings: Settings
    comment: str
    labelled: bool
    written: bool = True


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
    pixels = _pixels(loaded, splits["train"], listener)
    writer = _Writer(Path(output).absolute().parent)
    writer.header(loaded, str(model), found.passed)
    writer.data(splits, doubt, pixels)
    writer.stages(rules, equalize=bool(found.advice), labelled=pixels.labelled)
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


def _pixels(model: Model, data: Path, listener: Listener) -> _Pixels:
    """Choose the preprocessing with the best top-1 accuracy of the float model."""
    tried: dict[str, float] = {}
    problem = ""
    for name, settings in _candidates(model).items():
        try:
            with _quiet():
                result = evaluate(
                    model,
                    DataSource(source=data, samples=MEASURED),
                    mode="float",
                    settings=settings,
                    listener=listener,
                )
        except OnnxQatError as error:
            problem = problem or str(error)
            continue
        if "top1" not in result.metrics:
            return _Pixels(IMAGENET, "without labels, preprocessings cannot be compared", False,
                           written=False)  # fmt: skip
        tried[name] = result.metrics["top1"]
    if not tried:
        return _Pixels(IMAGENET, f"the data could not be read: {problem}", False, written=False)
    best = max(tried, key=lambda name: tried[name])
    others = ", ".join(f"{n}: {100 * v:.1f} %" for n, v in tried.items() if n != best)
    comment = f"top-1 of the float model on up to {MEASURED} samples: {100 * tried[best]:.1f} %"
    return _Pixels(_candidates(model)[best], comment + (f" ({others})" if others else ""), True)


def _candidates(model: Model) -> dict[str, Settings]:
    shapes = [list(t.shape or ()) for t in model.graph.inputs if str(t.dtype).startswith("float")]
    images = [shape for shape in shapes if len(shape) == 4]
    if not images:
        return {"none": Settings()}
    colour = any(3 in shape[1:] for shape in images)
    return PREPROCESSINGS | ({"ImageNet": IMAGENET} if colour else {})


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress warnings about preprocessings that turn out to be wrong."""
    logger = logging.getLogger("onnxqat")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


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

    def data(self, splits: dict[str, Path], doubt: str, pixels: _Pixels) -> None:
        """Write the paths of the data, and their preprocessing."""
        self._lines += ["", "[data]"]
        self.guess("splits", doubt)
        self._lines += [f"{name} = {self._path(path)}" for name, path in splits.items()]
        self.guess("preprocessing", pixels.comment)
        mark = "" if pixels.written else "# "
        for name in ("mean", "scale"):
            values = getattr(pixels.settings, name)
            if values is not None:
                numbers = ", ".join(f"{value!r}" for value in values)
                self._lines.append(f"{mark}{name} = [{numbers}]")
        if pixels.written and pixels.settings == Settings():
            self._lines.append("# no mean and scale: the model takes the data unchanged")

    def stages(self, rules: str, *, equalize: bool, labelled: bool) -> None:
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
        figure, limit = ("top1", 0.01) if labelled else ("agreement", 0.05)
        self._lines += ["", "[tolerance.tuned]"]
        self.guess(
            "tolerance", "what the tuned model may lose against the float model, as a fraction"
        )
        self._lines.append(f"{figure} = {limit}")

    def _path(self, path: Path) -> str:
        return _quoted(os.path.relpath(path.absolute(), self._folder))


def _quoted(text: str) -> str:
    """Return a text as a basic string of TOML."""
    if not text.isprintable():
        raise JobError(f"{text!r}: cannot be written into a job file. Rename it.")
    return json.dumps(text, ensure_ascii=False)


def _one_line(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)
