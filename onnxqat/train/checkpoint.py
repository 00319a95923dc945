"""Save the state of a fine-tuning to a file, so that it can resume with the same result.

The file is an uncompressed ``.npz`` without pickle. It contains the arrays of the run and
``record``, a JSON document in UTF-8 with the identity of the run and the rest of its state.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from onnxqat.data import BrokenError, DataSet
from onnxqat.device import Device
from onnxqat.environment import runtime_distribution
from onnxqat.errors import OnnxQatError, TrainingError
from onnxqat.files import atomic_output
from onnxqat.quantized import AnyModel
from onnxqat.train.config import Config

__all__ = [
    "Checkpoints",
    "Identity",
    "data_identity",
    "model_identity",
    "place_identity",
    "settings_identity",
]

logger = logging.getLogger(__name__)

T = TypeVar("T")
SAMPLES = 64  # samples that are compared to recognize the data
RECORD = "record"  # the member of the file that is not an array of the run
PLACE = ("the engine", "--device", "--precision")
BLOCKS = "blocks/"  # prefix of the arrays at the end of block reconstruction

# The values that must be the same when a run resumes, by names that the user knows.
Identity = dict[str, Any]


class _Stage(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    identity: Identity
    record: dict[str, Any]


class _Document(_Stage, kw_only=True, forbid_unknown_fields=True):
    schema: Literal["onnxqat.checkpoint/1"] = "onnxqat.checkpoint/1"
    blocks: _Stage | None = None  # the end of block reconstruction, from which the epochs started


class Checkpoints:
    """The checkpoint of one run.

    Parameters
    ----------
    path : str or Path
        The file.
    steps : int, optional
        Write the file after this many steps,
    minutes : float, optional
        or after this time.
    resume : bool
        Whether the run resumes from the file, which must exist.
    elsewhere : bool
        Whether the run may resume on another device or with another onnxruntime.

    Attributes
    ----------
    written, finished : bool
        Whether the file was written by this run, and whether it contains the end of the run.
    behind_blocks : bool
        Whether the loaded file is from epochs after block reconstruction.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        steps: int | None = None,
        minutes: float | None = None,
        resume: bool = False,
        elsewhere: bool = False,
    ) -> None:
        self.path, self.resume, self.elsewhere = Path(path), resume, elsewhere
        self.steps, self.minutes = steps, minutes
        self.written = self.finished = self.behind_blocks = False
        self._blocks: _Stage | None = None
        self._block_arrays: dict[str, NDArray[Any]] = {}
        self._warned = False
        self._saved = time.monotonic()

    def due(self, step: int) -> bool:
        """Return whether a checkpoint is due after ``step`` steps."""
        if self.steps is not None and step % self.steps == 0:
            return True
        return self.minutes is not None and time.monotonic() - self._saved >= 60 * self.minutes

    def save(
        self,
        identity: Identity,
        record: msgspec.Struct,
        arrays: Mapping[str, NDArray[Any]],
        *,
        finished: bool = False,
    ) -> bool:
        """Replace the file by the current state, completely or not at all; return the success.

        If the file cannot be written, a warning is logged once and training continues.

        Parameters
        ----------
        finished : bool
            Whether the run has finished.
        """
        state = msgspec.to_builtins(record)
        document = _Document(identity=identity, record=state, blocks=self._blocks)
        text = np.frombuffer(json.dumps(msgspec.to_builtins(document)).encode(), np.uint8)
        members: dict[str, Any] = {RECORD: text, **arrays, **self._block_arrays}
        try:
            with atomic_output(self.path, force=True) as temporary, temporary.open("wb") as file:
                np.savez(file, **members)
        except OnnxQatError as error:
            if not self._warned:
                reason = str(error).removesuffix(" Choose another output.")
                logger.warning("%s Training continues without this checkpoint.", reason)
            self._warned = True
            return False
        finally:
            self._saved = time.monotonic()
        self.written, self.finished = True, finished
        return True

    def keep_blocks(
        self, identity: Identity, record: msgspec.Struct, arrays: Mapping[str, NDArray[Any]]
    ) -> None:
        """Add the end of block reconstruction to all later checkpoints."""
        self._blocks = _Stage(identity=identity, record=msgspec.to_builtins(record))
        self._block_arrays = {f"{BLOCKS}{name}": array.copy() for name, array in arrays.items()}

    def load_blocks(
        self, identity: Identity, kind: type[T], arrays: Mapping[str, NDArray[Any]]
    ) -> T:
        """Load the state of block reconstruction, finished or not; see `load`."""
        return self._load(identity, kind, arrays, of_blocks=True)

    def load(self, identity: Identity, kind: type[T], arrays: Mapping[str, NDArray[Any]]) -> T:
        """Fill ``arrays`` from the file and return the record.

        Raises
        ------
        TrainingError
            The file is missing or not a checkpoint, or it belongs to a run with other settings,
            another model or other data; the message names the first difference.
        """
        return self._load(identity, kind, arrays, of_blocks=False)

    def _load(
        self,
        identity: Identity,
        kind: type[T],
        arrays: Mapping[str, NDArray[Any]],
        *,
        of_blocks: bool,
    ) -> T:
        if not self.path.is_file():
            raise TrainingError(f"{self.path}: no such file. Leave out --resume to start.")
        try:
            with np.load(_uncompressed(self.path), allow_pickle=False) as stored:
                text = stored[RECORD].tobytes()
                document = msgspec.convert(json.loads(text), _Document)
                self.behind_blocks = document.blocks is not None
                stage: _Stage = document
                prefix = ""
                if of_blocks and document.blocks is not None:
                    stage, prefix = document.blocks, BLOCKS
                self._compare(stage.identity, identity)
                record = msgspec.convert(stage.record, kind)
                for name, array in arrays.items():
                    _fill(array, stored[f"{prefix}{name}"], name)
        except (OSError, ValueError, KeyError, RecursionError, zipfile.BadZipFile) as error:
            raise TrainingError(
                f"{self.path}: is not a checkpoint of this version ({error}). Leave out --resume "
                "and pass --force to start again."
            ) from error
        self.written, self.finished = True, bool(document.record.get("finished"))
        return record

    def _compare(self, theirs: Identity, ours: Identity) -> None:
        for name, value in ours.items():
            if theirs.get(name) != value:
                was, now = ("not given" if v is None else v for v in (theirs.get(name), value))
                if name in PLACE:
                    if self.elsewhere:
                        continue
                    raise TrainingError(
                        f"{self.path}: {name} was {was}, but is {now} now, which changes the last "
                        "bits of the result. Resume as at the start, or also pass --force to "
                        "resume here."
                    )
                raise TrainingError(
                    f"{self.path}: {name} was {was}, but is {now} now. Use the same options and "
                    "files as at the start, or leave out --resume and pass --force to start again."
                )

    def remove(self) -> None:
        """Delete the file."""
        with suppress(OSError):  # the result is already saved
            self.path.unlink(missing_ok=True)


def _uncompressed(path: Path) -> Path:
    with zipfile.ZipFile(path) as archive:  # ensures that no member is larger than the file
        if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
            raise ValueError("it is compressed")
    return path


def _fill(array: NDArray[Any], stored: NDArray[Any], name: str) -> None:
    if (stored.dtype, stored.shape) != (array.dtype, array.shape):
        raise ValueError(f"array '{name}' does not fit the model")
    array[...] = stored


def settings_identity(config: Config) -> Identity:
    """Return the hyper-parameters by the names of their options."""
    settings: dict[str, Any] = json.loads(msgspec.json.encode(config))
    settings["group"] = settings.pop("groups")
    # force_labels has no effect on a run that resumes; `place_identity` has the device in use
    for name in ("force_labels", "device", "precision"):
        del settings[name]
    return {f"--{name.replace('_', '-')}": value for name, value in settings.items()}


def place_identity(device: Device) -> Identity:
    """Return the onnxruntime package, the device and the precision of a run."""
    kept = " with its arrays" if device.resident and device.kind == "cpu" else ""
    found = (runtime_distribution(), f"{device.name}{kept}", device.precision)
    return dict(zip(PLACE, found, strict=True))


def model_identity(model: AnyModel) -> str:
    """Return the first digits of the SHA-256 of a model's file."""
    return hashlib.sha256(model.to_proto().SerializeToString(deterministic=True)).hexdigest()[:16]


def data_identity(data: DataSet) -> str:
    """Return the number of samples, and the first digits of the SHA-256 of some of them.

    The samples are hashed after preprocessing, so that its settings are compared, too.
    """
    digest = hashlib.sha256()
    chosen = np.unique(np.linspace(0, len(data) - 1, SAMPLES).astype(np.int64))
    for index in chosen.tolist():
        try:
            batch = data.sample(index)
        except BrokenError:
            continue
        for name in sorted(batch.inputs):
            digest.update(batch.inputs[name].tobytes())
        for name in sorted(batch.arrays):
            digest.update(batch.arrays[name].tobytes())
        digest.update(b"" if batch.labels is None else batch.labels.tobytes())
    return f"{len(data)} samples, {digest.hexdigest()[:16]}"
