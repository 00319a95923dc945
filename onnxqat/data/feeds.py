"""Convert an array to a model input: checks, layout, preprocessing and dtype.

An *image input* has rank 4 and is float or uint8. Its layout follows from its shape: the channel
axis is axis 3 if only this axis has 1 or 3 entries, else axis 1 (channels-first, like ONNX's
operators). Every other input takes arrays unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from onnxqat.data.arrays import Header
from onnxqat.data.preprocess import (
    Layout,
    Preprocessing,
    normalize,
    output_size,
    resize_and_crop,
)
from onnxqat.errors import DataError

__all__ = [
    "Feed",
    "InputSpec",
    "check_dtype",
    "check_preprocessing",
    "fits",
    "layout_of_shape",
    "make_feed",
    "model_layout",
]

# Permutation of axes that converts a batch from the first layout to the second.
AXES = {("nhwc", "nchw"): (0, 3, 1, 2), ("nchw", "nhwc"): (0, 2, 3, 1)}
SAME = (0, 1, 2, 3)


class InputSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One input of a model.

    Attributes
    ----------
    name : str
        Name in the model.
    shape : tuple of int, str or None
        Shape; a name or None is a dynamic dimension. If the input takes samples, the first
        dimension is the batch.
    dtype : str
        Name of the numpy dtype.
    rows : int, optional
        If the values are indices of a table, its number of rows: values must lie from ``-rows`` to
        ``rows - 1``.
    """

    name: str
    shape: tuple[int | str | None, ...]
    dtype: str
    rows: int | None = None


def model_layout(spec: InputSpec) -> Layout | None:
    """Return the layout of an image input, None for any other.

    Examples
    --------
    >>> model_layout(InputSpec(name="x", shape=("n", 224, 224, 3), dtype="float32"))
    'nhwc'
    """
    if len(spec.shape) != 4 or 0 in spec.shape or not _is_image_dtype(spec.dtype):
        return None
    return layout_of_shape(spec.shape)


def layout_of_shape(shape: Sequence[int | str | None]) -> Layout:
    """Return the layout of a batch of images, or of the model input that takes it."""
    return "nhwc" if shape[3] in (1, 3) and shape[1] not in (1, 3) else "nchw"


def _is_image_dtype(dtype: str) -> bool:
    return dtype.startswith("float") or dtype == "uint8"


@dataclass(frozen=True, kw_only=True)
class Feed:
    """The conversion of an array to a model input.

    Attributes
    ----------
    spec : InputSpec
        The model input.
    key : str
        Name of the array.
    preprocessing : Preprocessing
        The preprocessing, without parts that do not apply to this input.
    data_layout : {"nchw", "nhwc"} or None
        Layout of the array; None if the input is not an image.
    """

    spec: InputSpec
    key: str
    preprocessing: Preprocessing
    data_layout: Layout | None

    def convert(self, rows: NDArray[Any], origin: Callable[[int], str]) -> NDArray[Any]:
        """Return samples ready to feed: in the model's layout and dtype, C-contiguous.

        Parameters
        ----------
        rows : array of shape (n, ...)
            Samples as read from the source.
        origin : callable
            Position in ``rows`` -> origin of the sample, for messages.

        Raises
        ------
        DataError
            A value is not finite, or does not fit into the model's dtype.
        """
        dtype = np.dtype(self.spec.dtype)
        layout = model_layout(self.spec)
        if layout is not None and self.data_layout is not None:
            rows = self._resized(rows)
            rows = rows.transpose(AXES.get((self.data_layout, layout), SAME))
            if self.preprocessing.changes_values:
                rows = normalize(rows, self.preprocessing, 1 if layout == "nchw" else 3)
        with np.errstate(over="ignore"):  # becomes infinite, which is refused below
            result = np.ascontiguousarray(rows, dtype=dtype)
        _check_values(rows, result, origin)
        self._check_indices(result, origin)
        return result

    def _check_indices(self, values: NDArray[Any], origin: Callable[[int], str]) -> None:
        limit = self.spec.rows
        if limit is None:
            return
        wrong = (values < -limit) | (values >= limit)
        if wrong.any():
            position = int(np.argwhere(wrong)[0][0])
            value = values[wrong].reshape(-1)[0]
            raise DataError(
                f"{origin(position)} holds {value}, but model input {self.spec.name!r} takes "
                f"indices of {limit} rows, 0 to {limit - 1}. Store indices in this range."
            )

    def _resized(self, rows: NDArray[Any]) -> NDArray[Any]:
        if not self.preprocessing.changes_size:
            return rows
        to_hwc, back = ((1, 2, 0), (2, 0, 1)) if self.data_layout == "nchw" else ((0, 1, 2),) * 2
        return np.stack(
            [
                resize_and_crop(row.transpose(to_hwc), self.preprocessing).transpose(back)
                for row in rows
            ]
        )


def _check_values(rows: NDArray[Any], result: NDArray[Any], origin: Callable[[int], str]) -> None:
    if result.dtype.kind == "f":
        good = np.isfinite(result)
        wrong, todo = "NaN or infinity", "Repair or remove this sample."
    elif np.can_cast(rows.dtype, result.dtype, "safe"):
        return
    else:
        good = result == rows
        wrong = f"a value outside {result.dtype}, the model's dtype"
        todo = "Store values in that range."
    if not good.all():
        position = int(np.argwhere(~good)[0][0])
        raise DataError(f"{origin(position)} holds {wrong}. {todo}")


def make_feed(
    spec: InputSpec,
    key: str,
    sample: Header,
    where: str,
    preprocessing: Preprocessing,
    *,
    decoded: bool,
) -> Feed:
    """Check an array against a model input, and return its conversion.

    Parameters
    ----------
    spec : InputSpec
        The model input.
    key : str
        Name of the array.
    sample : Header
        Shape and dtype of one sample of the array.
    where : str
        Name of the data, for messages.
    preprocessing : Preprocessing
        The user's preprocessing.
    decoded : bool
        Whether the array consists of decoded images: NHWC, already resized and cropped.

    Raises
    ------
    DataError
        Dtype or shape do not fit, or both layouts fit.
    """
    where = f"{where}: array {key!r}"
    layout = model_layout(spec)
    if decoded:
        preprocessing = msgspec.structs.replace(
            preprocessing, resize_dims=None, crop=None, layout="nhwc"
        )
    if layout is None:
        check_dtype(spec, sample, where)
        if not fits(sample.shape, spec.shape[1:]) or not spec.shape:
            raise _shape_error(where, sample, spec)
        return Feed(spec=spec, key=key, preprocessing=Preprocessing(), data_layout=None)
    if spec.dtype == "uint8":
        preprocessing = msgspec.structs.replace(preprocessing, mean=(0.0,), scale=(1.0,))
    check_dtype(spec, sample, where)
    data_layout = _data_layout(spec, layout, sample, where, preprocessing, decoded=decoded)
    channels = sample.shape[0 if data_layout == "nchw" else 2]
    _check_channels(where, channels, preprocessing, decoded=decoded)
    return Feed(spec=spec, key=key, preprocessing=preprocessing, data_layout=data_layout)


def check_dtype(spec: InputSpec, sample: Header, where: str) -> None:
    """Refuse an array whose dtype a model input cannot take.

    Raises
    ------
    DataError
        The conversion would lose values, or numpy does not have the input's dtype.
    """
    try:
        wanted = np.dtype(spec.dtype)
    except TypeError as error:
        raise DataError(
            f"{where}: model input {spec.name!r} has dtype '{spec.dtype}', which numpy lacks. "
            "Export the model with float32 inputs."
        ) from error
    if wanted.kind not in "biuf":
        raise DataError(
            f"{where}: model input {spec.name!r} takes text, but data must be numbers. Export the "
            "model without the step that reads text."
        )
    if not np.can_cast(sample.dtype, wanted, "same_kind"):
        raise DataError(
            f"{where} is {sample.dtype}, but model input {spec.name!r} is {wanted}. "
            f"Store it as {wanted}."
        )


def _data_layout(
    spec: InputSpec,
    layout: Layout,
    sample: Header,
    where: str,
    preprocessing: Preprocessing,
    *,
    decoded: bool,
) -> Layout:
    both: tuple[Layout, Layout] = ("nchw", "nhwc")
    candidates = both if preprocessing.layout is None else (preprocessing.layout,)
    fitting = [
        candidate
        for candidate in candidates
        if len(sample.shape) == 3
        and fits(_arranged(sample.shape, candidate, layout, preprocessing), spec.shape[1:])
    ]
    if not fitting:
        if decoded:
            raise _shape_error(where, sample, spec, todo="Change --resize-dims or --crop.")
        raise _shape_error(where, sample, spec, preprocessing)
    if len(fitting) == 2:
        raise DataError(
            f"{where}: samples of shape {sample.shape} fit model input {spec.name!r} (shape "
            f"{spec.shape}) both channels-first and channels-last. Give --layout nchw or nhwc."
        )
    return fitting[0]


def _arranged(
    shape: tuple[int, ...], data: Layout, layout: Layout, preprocessing: Preprocessing
) -> tuple[int, ...] | None:
    """Return the shape in the model of a sample with layout ``data``; None if the crop fails."""
    channels, height, width = shape if data == "nchw" else (shape[2], *shape[:2])
    size = output_size(height, width, preprocessing)
    if size is None:
        return None
    return (channels, *size) if layout == "nchw" else (*size, channels)


def fits(shape: tuple[int, ...] | None, wanted: tuple[int | str | None, ...]) -> bool:
    """Return whether an array of shape ``shape`` fits the model's shape ``wanted``."""
    return (
        shape is not None
        and len(shape) == len(wanted)
        and all(
            not isinstance(there, int) or here == there
            for here, there in zip(shape, wanted, strict=True)
        )
    )


def _shape_error(
    where: str,
    sample: Header,
    spec: InputSpec,
    preprocessing: Preprocessing = Preprocessing(),  # noqa: B008 (frozen)
    todo: str = "Store them in the model's shape.",
) -> DataError:
    given = {
        "--layout": preprocessing.layout,
        "--resize-dims": preprocessing.resize_dims,
        "--crop": preprocessing.crop,
    }
    options = [f"{option} {value}" for option, value in given.items() if value is not None]
    done = f" with {', '.join(options)}" if options else ""
    return DataError(
        f"{where}: samples of shape {sample.shape}{done} do not fit model input "
        f"{spec.name!r} of shape {spec.shape}, whose first dimension is the batch. {todo}"
    )


def _check_channels(
    where: str, channels: int, preprocessing: Preprocessing, *, decoded: bool
) -> None:
    wanted = {"gray": (1,), "bgr": (3,)}.get(preprocessing.pixel_format, (channels,))
    for name, values in (("mean", preprocessing.mean), ("scale", preprocessing.scale)):
        if len(values) not in (1, channels):
            raise DataError(
                f"{where} has {channels} channels, but --{name} has {len(values)} values. "
                "Give one value, or one per channel."
            )
    if not decoded and channels not in wanted:
        raise DataError(
            f"{where} has {channels} channels, but --pixel-format is "
            f"'{preprocessing.pixel_format}'. Give another --pixel-format."
        )


def check_preprocessing(
    inputs: Sequence[InputSpec], preprocessing: Preprocessing, where: str
) -> None:
    """Refuse preprocessing that applies to no input, or that does not fit an input.

    Raises
    ------
    DataError
        The message names the options.
    """
    images = [spec for spec in inputs if model_layout(spec) is not None]
    if preprocessing.changes_size and not images:
        raise DataError(
            f"{where}: --resize-dims and --crop need an image input (rank 4), which the model "
            "lacks. Leave them out."
        )
    if preprocessing.changes_values and all(spec.dtype == "uint8" for spec in images):
        raise DataError(
            f"{where}: --mean and --scale need a float image input (rank 4), which the model "
            "lacks. Leave them out."
        )
    for spec in images:
        channels = spec.shape[1 if model_layout(spec) == "nchw" else 3]
        if isinstance(channels, int):
            what = f"{where}: model input {spec.name!r}"
            _check_channels(what, channels, preprocessing, decoded=False)
