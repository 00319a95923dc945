"""Open data with the settings stored in a model, and store new settings in it."""

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
from onnxqat.data import DataSet, Tokenization, open_data
from onnxqat.data.preprocess import Layout
from onnxqat.data.splits import usual_split
from onnxqat.data.yaml_entries import YAML_SUFFIXES
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

# The splits that a verb reads if the user names none, the best one first. The test data never
# choose anything.
TO_LEARN = ("train",)
TO_CHOOSE = ("val",)
TO_MEASURE = ("val", "test")
Arrays: TypeAlias = Mapping[str, ArrayLike]


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """Data with their own options, which are not stored in the model.

    Attributes
    ----------
    source : str, Path, mapping of str to array, or iterable of such mappings
        See `onnxqat.data.open_data`.
    layout : {"nchw", "nhwc"}, optional
        Layout of the data arrays, needed if their shape fits both.
    skip_broken : bool
        Skip images that cannot be read, and name each one.
    truth : mapping of str to str, optional
        For each output, the array of its true values, which metrics read.
    samples : int, optional
        The most samples that are read, spread evenly over the data.
    boxes : str or Path, optional
        The objects in images, see `onnxqat.data.boxes`.
    masks : str or Path, optional
        Folder with the class of each pixel of images, see `onnxqat.data.masks`.
    split : {"train", "val", "test"}, optional
        Split to read of a folder that has splits (default: what suits the verb).
    text : Tokenization, optional
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
    text: Tokenization | None = None


AnyData: TypeAlias = str | Path | Arrays | Iterable[Arrays] | DataSource | DataSet


def read_alike(model: AnyModel, reference: AnyModel | None, given: Settings) -> None:
    """Store the same data settings in a model and its reference, which read the same data.

    Raises
    ------
    DataError
        The models have different settings, or ``given`` contradicts them.
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
    splits: Sequence[str] = TO_LEARN,
) -> Iterator[DataSet]:
    """Yield the opened data for a model, and store the data settings in the model.

    Parameters
    ----------
    model : Model or QuantizedModel
        A model with its own metadata, see `onnxqat.verbs.models.any_model`.
    source : path, arrays, DataSource or DataSet
        The data. A `DataSet` stays open; the settings with which it was opened are stored.
    given : Settings
        The data settings; none may be given for a `DataSet`.
    beside : Model, optional
        Another model that runs on the same batches.
    labels : bool
        Whether labels are read.
    splits : sequence of str
        The splits that may be read if the user names none, in order of preference.

    Raises
    ------
    DataError
        The data do not exist, or do not fit the model or its stored settings.
    """
    if isinstance(source, DataSet):
        if given != Settings():
            raise OptionError(f"{source.name}: is already open. Pass the settings to open_data.")
        settle(model, settings_of(source))
        yield source
        return
    this = source if isinstance(source, DataSource) else DataSource(source=source)
    if this.split is None and (split := usual_split(this.source, splits)) is not None:
        listener.note(f"{this.source}: reading the split '{split}'.")
        this = replace(this, split=split)
    with _open(model, this, given, listener, beside, labels=labels) as data:
        yield _thinned(data, this.samples)


def _thinned(data: DataSet, samples: int | None) -> DataSet:
    """Return at most so many samples, spread evenly: the first may all belong to one class."""
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
            _tell_classes(this, data, listener)
    except BaseException:
        data.close()
        raise
    return data


def _tell_classes(this: DataSource, data: DataSet, listener: Listener) -> None:
    """Print the index of the first classes, because no list of classes was given."""
    first = ", ".join(
        f"{name} -> {index}" for name, index in list((data.classes or {}).items())[:3]
    )
    named = isinstance(this.source, str | Path) and Path(this.source).suffix in YAML_SUFFIXES
    what = "its names" if named else "the folders in sorted order"
    listener.note(f"{data.name}: {what} are the classes: {first}, ...")


def warn_if_unlike_training(
    model: AnyModel, data: DataSet, *, batch_size: int | None, threads: int
) -> None:
    """Warn if the network's inputs have another range than they had in its training."""
    found = unlike_training(model, data, batch_size=batch_size, threads=threads)
    if found is not None:
        logger.warning("%s: %s. Check --mean, --scale and --layout.", data.name, found)
