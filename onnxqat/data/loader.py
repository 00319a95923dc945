"""Open the data that the user names, and check them against the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike

from onnxqat.data.arrays import Source, names
from onnxqat.data.batching import batching, make_value
from onnxqat.data.classes import Classes, check_count, read_classes
from onnxqat.data.dataset import DataSet, Intake
from onnxqat.data.feeds import InputSpec, check_preprocessing, make_feed
from onnxqat.data.folders import LABEL_NAMES
from onnxqat.data.function import open_arrays
from onnxqat.data.preprocess import Preprocessing, Said
from onnxqat.data.request import Request, Tokenization
from onnxqat.data.sources import open_source
from onnxqat.errors import DataError

__all__ = ["open_data"]

Arrays: TypeAlias = Mapping[str, ArrayLike]

IN_PYTHON = "the data"  # what messages call data that have no name
NO_LABELS = "none"  # as a label's name, unless an array is called so


def open_data(
    source: str | Path | Arrays | Iterable[Arrays],
    inputs: Sequence[InputSpec],
    *,
    preprocessing: Preprocessing = Preprocessing(),  # noqa: B008 (frozen)
    label: str | None = None,
    input_map: Mapping[str, str] | None = None,
    labels: bool = True,
    classes: Mapping[str, int] | str | Path | None = None,
    class_count: int | None = None,
    skip_broken: bool = False,
    truth: Mapping[str, str] | None = None,
    boxes: str | Path | None = None,
    masks: str | Path | None = None,
    split: str | None = None,
    text: Tokenization | None = None,
) -> DataSet:
    """Open data for a model.

    Parameters
    ----------
    source : str, Path, mapping of str to array, or iterable of such mappings
        A path, see `onnxqat.data.sources`, or ``module:function`` (which is imported and called).
        Or arrays by name as an ``.npz`` file has them, whole or batch by batch; batches are written
        to temporary files once.
    inputs : sequence of InputSpec
        The model's inputs. Each takes the array of its name; a single input also takes the
        only array that is not the labels. Folders and lists of images have the arrays ``image``
        and ``label``, and those of `onnxqat.data.beside`; those of ``.npy`` files have ``array``.
    preprocessing : Preprocessing
        Preprocessing of image inputs (rank 4, float or uint8). Mean and scale apply to float inputs
        only.
    label : str, optional
        Name of the array of class indices (default: ``label``, ``labels`` or ``y``, if there is
        one); ``none`` for no labels.
    input_map : mapping of str to str, optional
        Name of the array for a model input, where the names differ.
    labels : bool
        Whether labels are needed. If not, class folders may have any names.
    classes : mapping of str to int, str or Path, optional
        Class index of each folder name, or a file with them, see `onnxqat.data.classes`.
    class_count : int, optional
        Number of the model's classes. If there are as many folders, they are numbered in sorted
        order.
    skip_broken : bool
        Log and skip images that cannot be read.
    truth : mapping of str to str, optional
        For metrics: name of the array with the true values, by output.
    boxes : str or Path, optional
        The objects in images, see `onnxqat.data.boxes`.
    masks : str or Path, optional
        Folder with the class of each pixel of images, see `onnxqat.data.masks`.
    split : str, optional
        Split of a folder to read: ``train``, ``val`` or ``test``, see `onnxqat.data.splits`.
    text : Tokenization, optional
        How the texts of a ``.jsonl`` file become numbers, see `onnxqat.data.text`.

    Raises
    ------
    DataError
        There are no such data, they are empty, or they do not fit the model.
    """
    known = read_classes(classes) if isinstance(classes, str | Path) else classes
    where = str(source) if isinstance(source, str | Path) else IN_PYTHON
    if known is not None:
        check_count(known, class_count, where)
    if not inputs:
        raise DataError(f"{where}: the model has no inputs to feed. Choose another model.")
    folders = Classes(known, class_count, labels) if label != NO_LABELS else None
    request = Request(
        inputs=inputs,
        preprocessing=preprocessing,
        classes=folders,
        input_map=input_map or {},
        skip_broken=skip_broken,
        boxes=None if boxes is None else Path(boxes),
        masks=None if masks is None else Path(masks),
        split=split,
        text=text,
    )
    opened = (
        open_source(where, request)
        if isinstance(source, str | Path)
        else open_arrays(source, where)
    )
    try:
        taken = {*(truth or {}).values(), *opened.extras}
        keys, label_key = _match_arrays(
            opened, inputs, label, input_map or {}, taken, labels=labels
        )
        intake, count = _intake(opened, inputs, keys, label_key, preprocessing)
        check_preprocessing(inputs, preprocessing, opened.name)
        if label_key is not None:
            _check_labels(opened, label_key)
    except BaseException:
        opened.close()
        raise
    said = Said(preprocessing=preprocessing, label=label, input_map=input_map, truth=truth)
    return DataSet(opened, intake, label_key, np.arange(count), owner=True, said=said)


def _intake(
    source: Source,
    inputs: Sequence[InputSpec],
    keys: Mapping[str, str],
    label_key: str | None,
    preprocessing: Preprocessing,
) -> tuple[Intake, int]:
    """Return the conversion of the arrays to model inputs, and the number of samples."""
    whole = {name: source.header(key) for name, key in keys.items()}
    labels = None if label_key is None else next(iter(source.header(label_key).shape), None)
    taken = batching(source.name, inputs, whole, labels)
    rows = [spec for spec in inputs if spec.name in taken.samples]
    values = (
        make_value(source.name, spec, key := keys[spec.name], source.parts(key), taken)
        for spec in inputs
        if spec not in rows
    )
    needed = [keys[spec.name] for spec in rows] + ([] if label_key is None else [label_key])
    count = source.count(list(dict.fromkeys(needed)))
    if count == 0:
        raise DataError(f"{source.name}: holds no samples. Check how it was saved.")
    feeds = (
        make_feed(
            spec,
            keys[spec.name],
            source.sample(keys[spec.name]),
            source.name,
            preprocessing,
            decoded=keys[spec.name] in source.decoded,
        )
        for spec in rows
    )
    return Intake(feeds=tuple(feeds), values=tuple(values), batching=taken), count


def _match_arrays(
    source: Source,
    inputs: Sequence[InputSpec],
    label: str | None,
    input_map: Mapping[str, str],
    taken: set[str],
    *,
    labels: bool,
) -> tuple[dict[str, str], str | None]:
    """Return the name of each input's array, and of the array of labels if they are needed.

    Arrays in ``taken`` are chosen only if the user names them.
    """
    wanted = [spec.name for spec in inputs]
    for name, key in input_map.items():
        if name not in wanted:
            raise DataError(f"--input: no model input {name!r}. The model has {names(wanted)}.")
        if key not in source.keys:
            raise DataError(f"{source.name}: no array {key!r}. It has {names(source.keys)}.")
    if label == NO_LABELS and label not in source.keys:
        label, labels = None, False
    used = {*wanted, *input_map.values(), *taken}
    label_key = _label_array(source, used, label) if labels else None
    chosen = {name: name for name in wanted if name in source.keys} | dict(input_map)
    not_inputs = {label_key} if labels else {label} if label else set(LABEL_NAMES)
    free = [key for key in source.keys if key not in not_inputs | taken]
    if not chosen and len(wanted) == len(free) == 1:
        chosen = {wanted[0]: free[0]}
    missing = [name for name in wanted if name not in chosen]
    if missing:
        raise DataError(
            f"{source.name}: no array for model input {names(missing)}. "
            f"It has {names(source.keys)}. Name one with --input INPUT=ARRAY."
        )
    return chosen, label_key


def _label_array(source: Source, taken: set[str], label: str | None) -> str | None:
    if label is not None:
        if label not in source.keys:
            raise DataError(
                f"{source.name}: no array {label!r} for the labels. It has {names(source.keys)}. "
                "Name one of them with --label."
            )
        return label
    found = [name for name in LABEL_NAMES if name in source.keys and name not in taken]
    if len(found) > 1:
        raise DataError(
            f"{source.name}: the arrays {names(found)} could all be labels. Choose with --label."
        )
    return found[0] if found else None


def _check_labels(source: Source, key: str) -> None:
    shape, dtype = source.sample(key)
    if shape or dtype.kind not in "iu":
        raise DataError(
            f"{source.name}: labels {key!r} are {dtype} with samples of shape {shape}. "
            "Store one integer class index per sample, or name other labels with --label, or none."
        )
