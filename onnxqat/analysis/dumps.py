"""Dumps: the tensors of a few samples as files, and the comparison of two dumps.

A dump is a folder with ``dump.json``, which describes the run, and a folder ``0000``, ``0001`` ...
for each sample. The folder of a sample holds ``tensors.npz``, whose keys are the names of the
tensors in the order of the graph. tpu-mlir's tools can read it (sophgo/tpu-mlir,
python/numpy_helper/npz_compare.py).

=====  ===================================================================
level  what is written for a tensor
=====  ===================================================================
0      its first values, at most `FIRST`
1      two float64 sums: of all values, and of their magnitudes
2      all values
=====  ===================================================================
"""

from __future__ import annotations

import math
import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import msgspec
import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from onnxqat.data.npz import NpzPart
from onnxqat.errors import DataError, ModelError, OnnxQatError
from onnxqat.evaluation.similarity import Similarity
from onnxqat.files import check_readable
from onnxqat.locks import Scratch

__all__ = [
    "NOTE",
    "Comparison",
    "DumpNote",
    "Level",
    "TensorDifference",
    "check_replaceable",
    "compare_dumps",
    "key_of",
    "write_sample",
]

Array: TypeAlias = NDArray[Any]
Level = Literal[0, 1, 2]

FIRST = 10
NOTE, TENSORS = "dump.json", "tensors.npz"
SCHEMA = "onnxqat.dump/1"
MAX_NOTE_BYTES = 2**16
MAX_KEY_BYTES = 2**15  # a .npz stores the length of a name in 2 bytes


class DumpNote(msgspec.Struct, frozen=True, kw_only=True):
    """The contents of ``dump.json``.

    Attributes
    ----------
    schema : str
        `SCHEMA`.
    model : str
        Name of the model file that was run.
    mode : str
        ``float``, ``qdq`` or ``integer``.
    level : int
        Level of the dump, see the module's docstring.
    samples : int
        Number of samples.
    """

    schema: str = SCHEMA
    model: str
    mode: str
    level: int
    samples: int

    def write(self, folder: Path) -> None:
        """Write the note into the folder of a dump."""
        text = msgspec.json.format(msgspec.json.encode(self), indent=2)
        (folder / NOTE).write_bytes(text + b"\n")


def key_of(tensor: str) -> str:
    r"""Return the key of a tensor: its name, with all parts that are unsafe in a path as ``%XX``.

    Different names always have different keys.

    Raises
    ------
    ModelError
        The name is too long for a ``.npz`` file.

    Examples
    --------
    >>> key_of("/layer1/Conv_output_0")
    '/layer1/Conv_output_0'
    >>> key_of("../../a\\b.npy")
    '%2E%2E/%2E%2E/a%5Cb%2Enpy'
    """
    parts = ["%2E" * len(p) if p in (".", "..") else p for p in _escaped(tensor).split("/")]
    key = re.sub(r"\.npy$", "%2Enpy", "/".join(parts))
    if not key or len(key.encode()) > MAX_KEY_BYTES:
        raise ModelError(f"'{tensor[:60]}...': cannot be a name in a .npz file. Rename the tensor.")
    return key


def _escaped(tensor: str) -> str:
    return "".join(c if c.isprintable() and c not in "%\\" else _percent(c) for c in tensor)


def _percent(character: str) -> str:
    return "".join(f"%{byte:02X}" for byte in character.encode("utf-8", "surrogatepass"))


def write_sample(folder: Path, index: int, tensors: Mapping[str, Array], level: Level) -> None:
    """Write the tensors of one sample into a folder of its own.

    Parameters
    ----------
    folder : Path
        Folder of the dump.
    index : int
        Index of the sample.
    tensors : dict of str to array
        Tensors by name, in the order to write them.
    level : {0, 1, 2}
        Level of the dump, see the module's docstring.
    """
    place = folder / f"{index:04}"
    place.mkdir()
    with zipfile.ZipFile(place / TENSORS, "w") as archive:
        for name, values in tensors.items():
            with archive.open(f"{key_of(name)}.npy", "w", force_zip64=True) as file:
                npy.write_array(file, _part(values, level), allow_pickle=False)


def _part(values: Array, level: Level) -> Array:
    if level == 2:
        return np.asarray(values, order="C")
    if level == 0:
        return np.array(values.reshape(-1)[:FIRST])
    wide = values.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        return np.array([wide.sum(), np.abs(wide).sum()])


def check_replaceable(folder: Path) -> None:
    """Refuse a folder that holds anything but a dump.

    Raises
    ------
    OnnxQatError
        The folder holds something else.
    """
    for entry in sorted(folder.rglob("*")):
        name = entry.relative_to(folder).as_posix()
        if not re.fullmatch(rf"{NOTE}|\d{{4,}}|\d{{4,}}/{TENSORS}", name) or entry.is_symlink():
            raise OnnxQatError(
                f"{folder}: holds '{name}', which is not part of a dump. Choose another output."
            )


@dataclass(frozen=True, kw_only=True)
class TensorDifference:
    """Difference of one tensor between a dump (a) and the reference (r), over all samples.

    Attributes
    ----------
    tensor : str
        Key of the tensor.
    cosine, sqnr, max_abs_diff : float
        ``sum a r / sqrt(sum a^2 sum r^2)``; ``10 log10(sum r^2 / sum (a - r)^2)`` in dB, infinite
        if all values are equal; largest difference in the tensor's units. NaN if the shapes differ.
    shapes : tuple of tuple of int or None
        Both shapes if they differ, else None.
    passed : bool
        Whether the differences are within the tolerances.
    """

    tensor: str
    cosine: float
    sqnr: float
    max_abs_diff: float
    shapes: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    passed: bool


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Differences of a dump from a reference.

    Attributes
    ----------
    samples : int
        Number of samples compared.
    tensors : tuple of TensorDifference
        Differences of the tensors in both dumps, in the order of the reference.
    missing, more : tuple of str
        Keys that only the reference has, and keys that only the dump has.
    """

    samples: int
    tensors: tuple[TensorDifference, ...]
    missing: tuple[str, ...]
    more: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether every tensor is within the tolerances."""
        return all(one.passed for one in self.tensors)


class _Sums:
    """Running sums of one tensor."""

    def __init__(self) -> None:
        self.similarity, self.largest = Similarity(), 0.0
        self.shapes: tuple[tuple[int, ...], tuple[int, ...]] | None = None

    def add(self, ours: NpzPart, reference: NpzPart, key: str) -> None:
        first, second = ours.header(key).shape, reference.header(key).shape
        if first != second:
            self.shapes = self.shapes or (first, second)
            return
        x, y = (np.asarray(part.load(key), np.float64) for part in (reference, ours))
        self.similarity.add(x, y)
        with np.errstate(invalid="ignore"):
            self.largest = float(np.max([self.largest, np.abs(x - y).max(initial=0.0)]))

    def result(
        self, key: str, cosine: float | None, sqnr: float | None, max_diff: float | None
    ) -> TensorDifference:
        if self.shapes is not None:
            nan = dict.fromkeys(("cosine", "sqnr", "max_abs_diff"), math.nan)
            return TensorDifference(tensor=key, **nan, shapes=self.shapes, passed=False)
        found = self.similarity
        passed = (  # NaN never passes
            (cosine is None or found.cosine >= cosine)
            and (sqnr is None or found.sqnr >= sqnr)
            and (max_diff is None or self.largest <= max_diff)
        )
        return TensorDifference(
            tensor=key,
            cosine=found.cosine,
            sqnr=found.sqnr,
            max_abs_diff=self.largest,
            passed=passed,
        )


def compare_dumps(
    dump: str | Path,
    reference: str | Path,
    *,
    min_cosine: float | None = 0.99,
    min_sqnr: float | None = None,
    max_diff: float | None = None,
    progress: Callable[[], None] = lambda: None,
) -> Comparison:
    """Compare two dumps tensor by tensor; one tensor of each is in memory at a time.

    Parameters
    ----------
    dump, reference : str or Path
        Folder of a dump, or a ``.npz`` file.
    min_cosine, min_sqnr, max_diff : float, optional
        Tolerances that a tensor must meet to pass; None is no requirement. The default of the
        cosine is the one of tpu-mlir's tool.
    progress : callable
        Called after each sample.

    Raises
    ------
    DataError
        A dump cannot be read, their levels or samples differ, or they have no tensor in common.
    """
    ours, theirs = _paths(Path(dump)), _paths(Path(reference))
    if ours.keys() != theirs.keys():
        raise DataError(
            f"{dump}: has the samples {', '.join(ours)}, {reference} has {', '.join(theirs)}. "
            "Dump the same samples at the same level."
        )
    sums: dict[str, _Sums] = {}
    missing: dict[str, None] = {}
    more: dict[str, None] = {}
    for name, path in theirs.items():
        scratch = Scratch()
        try:
            first, second = NpzPart(ours[name], scratch), NpzPart(path, scratch)
            known = dict.fromkeys(first.keys)
            for key in second.keys:
                if key in known:
                    sums.setdefault(key, _Sums()).add(first, second, key)
            missing |= dict.fromkeys(key for key in second.keys if key not in known)
            more |= dict.fromkeys(known.keys() - {*second.keys})
        finally:
            scratch.close()
        progress()
    if not sums:
        raise DataError(
            f"{dump}: has no tensor in common with {reference}. Dump versions of the same model."
        )
    return Comparison(
        samples=len(theirs),
        tensors=tuple(s.result(k, min_cosine, min_sqnr, max_diff) for k, s in sums.items()),
        missing=tuple(missing),
        more=tuple(more),
    )


def _paths(source: Path) -> dict[str, Path]:
    """Return the ``.npz`` file of each sample, by sample and level, which two dumps must share.

    Raises
    ------
    DataError
        The source is neither a dump nor a file, or samples of it are missing.
    """
    if not source.is_dir():
        return {"0 at level 2": source}
    note = _note_of(source)
    paths = {
        f"{index} at level {note.level}": source / f"{index:04}" / TENSORS
        for index in range(note.samples)
    }
    for path in paths.values():
        check_readable(path, DataError)
    return paths


def _note_of(folder: Path) -> DumpNote:
    path = folder / NOTE
    check_readable(path, DataError)
    try:
        with path.open("rb") as file:
            note = msgspec.json.decode(file.read(MAX_NOTE_BYTES), type=DumpNote)
    except (OSError, msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read ({error}). Dump again.") from error
    if note.schema != SCHEMA or note.samples < 1:
        raise DataError(f"{path}: has schema '{note.schema}', not '{SCHEMA}'. Dump again.")
    return note
