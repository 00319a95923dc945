"""Records of finished steps, so that a step is not run again on the same inputs.

The key of a step is a hash of onnxqat's version, the stage, its options, the contents of the files
that it reads, and the keys of the steps that it depends on. The number of threads is not part of
the key: it only changes the order of sums.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from onnxqat.data.sources import read_besides
from onnxqat.errors import JobError
from onnxqat.files import write_text
from onnxqat.rules import load_rule

if TYPE_CHECKING:
    from onnxqat.jobs.job import Job
    from onnxqat.jobs.rows import Step

__all__ = ["Record", "key_of_step", "read_record", "write_record"]

MAX_RECORD_BYTES = 2**22
NOT_KEYED = ("threads", "checkpoint_every", "log_every")  # these do not change results


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The record of a finished step.

    Attributes
    ----------
    key : str
        Key of the step, see the module's docstring.
    seconds : float
        Time that it took.
    figures : dict of str to float or None
        Measured figures.
    notes : tuple of str
        Remarks for the user.
    files : dict of str to str
        SHA-256 of each written file, by path relative to the job's folder.
    """

    schema: Literal["onnxqat.step/1"] = "onnxqat.step/1"
    key: str
    seconds: float
    figures: dict[str, float | None]
    notes: tuple[str, ...] = ()
    files: dict[str, str]


def key_of_step(job: Job, step: Step, keys: Mapping[str, str]) -> str:
    """Return the key of a step.

    Parameters
    ----------
    job : Job
        The job.
    step : Step
        The step.
    keys : mapping of str to str
        Keys of the earlier steps, by name.

    Raises
    ------
    OnnxQatError
        A file that the step reads is missing.
    """
    tables = {name: job.options[name] for name in (step.row.name, *step.row.also)}
    told: dict[str, Any] = {
        name: {key: value for key, value in table.items() if key not in NOT_KEYED}
        for name, table in tables.items()
    }
    told["data"] = {key: value for key, value in job.data.items() if key not in _splits(job)}
    document = {
        "version": importlib.metadata.version("onnxqat"),
        "stage": [step.row.name, step.variant],
        "told": told,
        "after": [keys[name] for name in step.after],
        "model": _digest(job, job.model),
        "rule": _rule(job),
        "files": [_digest(job, text) for text in _texts(told) if _is_file(job, text)],
        "folders": [
            _digest(job, job.data[name])
            for name in ("boxes", "masks")
            if job.data[name] and (job.base / job.data[name]).is_dir()
        ],
        "data": [_digest(job, job.split(name)) for name in _read(job, step)],
        "samples": job.samples,
    }
    text = json.dumps(document, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def _splits(job: Job) -> tuple[str, ...]:
    return tuple(
        name for name in ("train", "calibration", "validation", "test") if name in job.data
    )


def _read(job: Job, step: Step) -> tuple[str, ...]:
    """Return the splits that a step reads."""
    if step.row.reads is None or not step.row.reads_for(job, step.variant):
        return ()
    held_out = step.row.reads == "train" and "validation" in job.data
    return (step.row.reads, "validation") if held_out else (step.row.reads,)


def _rule(job: Job) -> str:
    name = job.options["insert"]["rules"]
    path = str(job.base / name) if name.endswith(".toml") else name
    return msgspec.json.encode(load_rule(path), order="deterministic").decode()


def _texts(told: Any) -> Iterator[str]:
    """Yield the strings in options, and the parts of sums such as ``kl+0.5*my-loss.onnx``."""
    if isinstance(told, dict):
        for value in told.values():
            yield from _texts(value)
    elif isinstance(told, list | tuple):
        for value in told:
            yield from _texts(value)
    elif isinstance(told, str):
        yield from dict.fromkeys((told, *re.split(r"[+*:=]", told)))


def _is_file(job: Job, text: str) -> bool:
    try:
        return bool(text) and (job.base / text).is_file()
    except (OSError, ValueError):  # the text cannot be a path
        return False


def _digest(job: Job, source: str) -> str:
    """Return a text that changes when a file, a folder or the module of a function changes."""
    path = job.base / source
    if path.is_dir():
        return "".join(map(_listing, (path, *read_besides(path))))
    if path.is_file():
        whole = "".join(map(file_digest, (path, *_data_of(path))))
        return whole + _statuses(path.parent, read_besides(path))
    module, colon, _ = source.partition(":")
    if colon:
        code = job.base / f"{module.replace('.', '/')}.py"
        return source + (file_digest(code) if code.is_file() else "")
    raise JobError(f"{path}: no such file.")


def _data_of(path: Path) -> list[Path]:
    """Return the files of external weights beside a model, by the usual names."""
    beside = path.parent.glob(f"{path.name}*.data") if path.suffix == ".onnx" else ()
    return sorted(beside)


def _listing(folder: Path) -> str:
    """Return a hash of the names, sizes and modification times of all files in a folder."""
    walked = sorted(os.walk(folder))
    return _statuses(
        folder, (Path(path, name) for path, _, names in walked for name in sorted(names))
    )


def _statuses(folder: Path, files: Iterable[Path]) -> str:
    """Return a hash of the names, sizes and modification times of files."""
    digest = hashlib.sha256()
    for file in files:
        with suppress(OSError, ValueError):  # a broken link, or not a path
            status = file.stat()
            name = os.path.relpath(file, folder)
            line = f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n"
            digest.update(os.fsencode(line))
    return digest.hexdigest()


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file; cached while its size and modification time stay the same."""
    status = path.stat()
    return _file_digest(path, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=4096)
def _file_digest(path: Path, size: int, time: int) -> str:
    del size, time
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _path(folder: Path, step: Step) -> Path:
    return folder / "steps" / f"{step.name}.json"


def read_record(folder: Path, step: Step, key: str) -> Record | None:
    """Return the record of a step if it has this key and its files are unchanged, else None."""
    path = _path(folder, step)
    try:
        if path.stat().st_size > MAX_RECORD_BYTES:
            return None
        record = msgspec.json.decode(path.read_bytes(), type=Record)
        whole = record.key == key and all(
            file_digest(folder / name) == digest for name, digest in record.files.items()
        )
    except (OSError, msgspec.MsgspecError, RecursionError):
        return None
    return record if whole else None


def write_record(folder: Path, step: Step, record: Record) -> None:
    """Write the record of a step, which marks it as finished."""
    path = _path(folder, step)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, msgspec.json.encode(record).decode(), force=True)
