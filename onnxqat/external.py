"""Weights in files beside the model: mapped into memory for reading, streamed for writing.

A model above 2 GB does not fit into one protobuf message. Its large initializers are never in
memory twice: reading maps the file's pages, and writing goes tensor by tensor.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx.external_data_helper import ExternalDataInfo, load_external_data_for_tensor

from onnxqat.errors import ModelError
from onnxqat.files import check_readable
from onnxqat.preserve import stored_tensors

__all__ = ["read_external_data", "write_external_data"]

MAP_BYTES = 2**20  # smaller tensors are loaded, larger ones mapped
ALIGNMENT = 4096  # bytes of a page, so that runtimes can also map the tensors


def read_external_data(proto: onnx.ModelProto, path: Path) -> dict[str, NDArray[Any]]:
    """Load the external data of ``proto``; return its large initializers as read-only arrays.

    Small ones are loaded into ``proto``. The returned arrays are views of the mapped files.

    Raises
    ------
    ModelError
        A file is missing, too short, or outside of the model's folder.
    """
    folder = path.parent.resolve()
    read = {name for node in proto.graph.node for name in node.input}
    files: dict[Path, NDArray[np.uint8]] = {}
    mapped: dict[str, NDArray[Any]] = {}
    for tensor in proto.graph.initializer:
        if tensor.name in read and _can_map(tensor):
            target = _file_of(tensor, folder, path)
            if target not in files:
                files[target] = np.memmap(target, np.uint8, "r").view(np.ndarray)
            mapped[tensor.name] = _view(tensor, files[target], path)
            tensor.ClearField("data_location")
            del tensor.external_data[:]
    for tensor in stored_tensors(proto):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            _file_of(tensor, folder, path)
            try:
                load_external_data_for_tensor(tensor, str(folder))
            except _UNREADABLE as error:
                raise _unreadable(tensor, path, error) from error
            tensor.ClearField("data_location")  # writing the default would change the file's bytes
            del tensor.external_data[:]
    return mapped


def _dtype(tensor: onnx.TensorProto) -> np.dtype[Any]:
    return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))


def _size(tensor: onnx.TensorProto) -> int:
    size = _dtype(tensor).itemsize
    for length in tensor.dims:  # numpy's product could overflow
        size *= length
    return size


def _can_map(tensor: onnx.TensorProto) -> bool:
    return (
        tensor.data_location == onnx.TensorProto.EXTERNAL
        and tensor.data_type != onnx.TensorProto.STRING
        and _dtype(tensor).isbuiltin == 1
        and _size(tensor) >= MAP_BYTES
    )


def _file_of(tensor: onnx.TensorProto, folder: Path, path: Path) -> Path:
    """Return the file with a tensor's data, which must be a regular file beside the model."""
    try:
        location = next((e.value for e in tensor.external_data if e.key == "location"), "")
        target = (folder / location).resolve()
        missing = not target.exists()
    except (OSError, RuntimeError, ValueError) as error:  # not text, a NUL, a loop of links
        raise _unreadable(tensor, path, error) from error
    if not location or not target.is_relative_to(folder):
        raise ModelError(
            f"{path}: initializer '{tensor.name}' keeps its data at '{location}', outside of "
            "the model's folder. Move the file beside the model."
        )
    if missing:
        raise ModelError(
            f"{path}: external data file '{location}' is missing. Copy it beside the model."
        )
    try:
        check_readable(target, ModelError)
    except ModelError as error:
        raise ModelError(f"{path}: data of initializer '{tensor.name}': {error}") from error
    return target


# onnx's own checks of a file; its C++ part can also raise other errors.
_UNREADABLE = (
    *(KeyError, OSError, OverflowError, RuntimeError, ValueError),
    onnx.checker.ValidationError,
)


def _unreadable(tensor: onnx.TensorProto, path: Path, error: Exception) -> ModelError:
    text = " ".join(str(error).split())[:200]
    return ModelError(
        f"{path}: external data of initializer '{tensor.name}' cannot be read ({text}). "
        "Export again, with the weights."
    )


def _view(tensor: onnx.TensorProto, data: NDArray[np.uint8], path: Path) -> NDArray[Any]:
    size = _size(tensor)
    try:
        info = ExternalDataInfo(tensor)
        start, length = int(info.offset or 0), int(info.length or size)
    except _UNREADABLE as error:
        raise _unreadable(tensor, path, error) from error
    if length != size or start < 0 or start + size > data.size:
        raise ModelError(
            f"{path}: initializer '{tensor.name}' needs {size} bytes of '{info.location}' from "
            f"{start}, but the file has {data.size} bytes and the entry states {length}. Copy the "
            "file again."
        )
    values = data[start : start + size].view(_dtype(tensor))
    return values.reshape(tuple(tensor.dims))


def write_external_data(
    proto: onnx.ModelProto, values: Iterable[tuple[str, NDArray[Any]]], path: Path
) -> None:
    """Write initializers into one file, and make ``proto`` refer to it.

    The file name contains a hash of the data, so that a model never refers to the data of another
    one: ``<model>.<hash>.data``, see `onnxqat.locks.is_data`.

    Parameters
    ----------
    values : iterable of (str, array)
        Names and values of initializers that ``proto`` contains without data.
    path : Path
        The model's file; the data are written beside it.
    """
    digest, places = hashlib.blake2b(digest_size=8), []
    unnamed = path.with_name(f"{path.name}.data")
    with unnamed.open("wb") as file:
        for name, array in values:
            file.write(b"\0" * (-file.tell() % ALIGNMENT))
            places.append((name, file.tell(), array.nbytes))
            data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
            digest.update(data)
            file.write(data)
    named = unnamed.rename(path.with_name(f"{path.name}.{digest.hexdigest()}.data"))
    tensors = {tensor.name: tensor for tensor in proto.graph.initializer}
    for name, offset, length in places:
        tensors[name].data_location = onnx.TensorProto.EXTERNAL
        entries = {"location": named.name, "offset": str(offset), "length": str(length)}
        for key, value in entries.items():
            tensors[name].external_data.add(key=key, value=value)
