"""Data for a model: opened as the model remembers, and what is said of them remembered in it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike

from onnxqat.calibration import unlike_training
from onnxqat.data import DataSet, Text, open_data
from onnxqat.data.preprocess import Layout
from onnxqat.data.splits import usual_part
from onnxqat.errors import OptionError
from onnxqat.quantized import AnyModel
from onnxqat.settings import Settings, adopt, class_count, input_specs, settings_of, settle
from onnxqat.verbs.listener import Listener

__all__ = [
    "TO_CHOOSE",
    "TO_LEARN",
    "TO_MEASURE",
    "AnyData",
    "DataSource",
    "opened",
    "read_alike",
    "warn_if_unlike_training",
]

logger = logging.getLogger(__name__)

# The parts of divided data that a verb reads where the user names none, the best first. What is
# measured on the test data chooses nothing.
TO_LEARN = ("train",)
TO_CHOOSE = ("val",)
TO_MEASURE = ("val", "test")
Arrays: TypeAlias = Mapping[str, ArrayLike]


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """Data, and what is said of these alone: no model remembers it.

    Attributes
    ----------
    source : str, Path, mapping of str to array, or iterable of such mappings
        See `onnxqat.data.open_data`.
    layout : {"nchw", "nhwc"}, optional
        Layout of the data arrays, needed where their shape fits both.
    skip_broken : bool
        Do without images that cannot be read, and name each.
    truth : mapping of str to str, optional
        Array that says what an output should be, by the name of the output; metrics read it.
    samples : int, optional
        Read so many at most, spread evenly over the data.
    boxes : str or Path, optional
        The objects in images, see `onnxqat.data.boxes`.
    masks : str or Path, optional
        Folder with the class of each pixel of images, see `onnxqat.data.masks`.
    split : {"train", "val", "test"}, optional
        Part to read of a folder that is divided; by default what suits the verb.
    text : Text, optional
        How the texts of a ``.jsonl`` file become numbers.
    """

    source: str | Path | Arrays | Iterable[Arrays]
    layout: Layout | None = None
    skip_broken: bool = False
    truth: Mapping[str, str] | None = None
    samples: int | None = None
    boxes: str | Path | None = None
    masks: str | Path | None = None
    split: str | None = None
    text: Text | None = None


AnyData: TypeAlias = str | Path | Arrays | Iterable[Arrays] | DataSource | DataSet


def read_alike(model: AnyModel, reference: AnyModel | None, given: Settings) -> None:
    """Let a model and its reference remember the same of the data that both read.

    Raises
    ------
    DataError
        They were made for different data, or ``given`` contradicts what they remember.
    """
    if reference is not None:  # a float model has nothing stored
        settle(model, given)
        adopt(model, reference)


@contextmanager
def opened(
    model: AnyModel,
    source: AnyData,
    given: Settings,
    listener: Listener,
    *,
    beside: AnyModel | None = None,
    labels: bool = True,
    parts: Sequence[str] = TO_LEARN,
) -> Iterator[DataSet]:
    """Yield data for a model, and store what was said about them in the model.

    Parameters
    ----------
    model : Model or QuantizedModel
        With metadata of its own, see `onnxqat.verbs.models.any_model`.
    source : path, arrays, DataSource or DataSet
        A `DataSet` stays open; what it was opened with is stored.
    given : Settings
        What is said about the data; nothing where they are a `DataSet`.
    beside : Model, optional
        What runs on the same batches.
    labels : bool
        Whether any are read.
    parts : sequence of str
        Which part to read of a folder that is divided, the best first.

    Raises
    ------
    DataError
        There is no such data, or they do not fit the model or what it remembers.
    """
    if isinstance(source, DataSet):
        if given != Settings():
            raise OptionError(f"{source.name}: is open. Give the settings to open_data.")
        settle(model, settings_of(source))
        yield source
        return
    this = source if isinstance(source, DataSource) else DataSource(source=source)
    if this.split is None and (part := usual_part(this.source, parts)) is not None:
        listener.note(f"{this.source}: is divided into parts; '{part}' is read.")
        this = replace(this, split=part)
    with _open(model, this, given, listener, beside, labels=labels) as data:
        yield _thinned(data, this.samples)


def _thinned(data: DataSet, samples: int | None) -> DataSet:
    """Return so many samples at most; not the first ones, which may all be of one class."""
    if samples is None or samples >= len(data):
        return data
    return data.subset(np.linspace(0, len(data) - 1, samples).astype(np.int64))


def _open(
    model: AnyModel,
    this: DataSource,
    given: Settings,
    listener: Listener,
    beside: AnyModel | None,
    *,
    labels: bool,
) -> DataSet:
    settings = settle(model, given)
    data = open_data(
        this.source,
        input_specs(model, beside),
        preprocessing=settings.preprocessing(this.layout),
        label=settings.label,
        input_map=settings.input_map,
        labels=labels,
        classes=settings.classes,
        class_count=class_count(model),
        skip_broken=this.skip_broken,
        truth=this.truth,
        boxes=this.boxes,
        masks=this.masks,
        split=this.split,
        text=this.text,
    )
    if data.classes is None:
        return data
    try:
        settle(model, Settings(classes=dict(data.classes)))
        if settings.classes is None:
            _tell_classes(data.name, data.classes, listener)
    except BaseException:
        data.close()
        raise
    return data


def _tell_classes(source: str, classes: Mapping[str, int], listener: Listener) -> None:
    """Say which class the first folders were taken for; nobody gave a list."""
    first = ", ".join(f"{name} -> {index}" for name, index in list(classes.items())[:3])
    listener.note(f"{source}: folders in sorted order are the classes: {first}, ...")


def warn_if_unlike_training(
    model: AnyModel, data: DataSet, *, batch_size: int | None, threads: int
) -> None:
    """Say if the data reach the network in another range than those it was trained with."""
    found = unlike_training(model, data, batch_size=batch_size, threads=threads)
    if found is not None:
        logger.warning("%s: %s. Check --mean, --scale and --layout.", data.name, found)
