"""Data from a function that the user names as ``module:function``, or from a caller in Python.

The function takes no arguments. The function or the caller gives either a mapping of arrays, whose
first axis is the samples, or a finite iterable of such mappings (batches). Arrays of a mapping are
used directly. Batches are written to temporary files once, so one batch is in memory at a time.
"""

from __future__ import annotations

import importlib
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from onnxqat.data.arrays import ArraySource, Header, MemoryPart, names, reason
from onnxqat.errors import DataError, OnnxQatError
from onnxqat.locks import Scratch

__all__ = ["FUNCTION", "call_function", "import_function", "open_arrays", "open_function"]

FUNCTION = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")


def open_function(name: str) -> ArraySource:
    """Import ``module:function`` (the current directory comes first), call it, keep its arrays.

    Raises
    ------
    DataError
        There is no such function, it raised, or its result is not arrays of numbers.
    """
    with _current_directory_importable():
        return open_arrays(_called(name, _imported(name)), name)


def open_arrays(given: object, name: str) -> ArraySource:
    """Return the arrays of a mapping, or of an iterable of mappings, as a source.

    Raises
    ------
    DataError
        ``given`` is neither, or contains something other than arrays of numbers.
    """
    scratch = Scratch()
    try:
        if isinstance(given, Mapping):
            arrays = _arrays(name, given)
        elif isinstance(given, Iterable) and not isinstance(given, np.ndarray | str):
            arrays = _spool(name, given, scratch)
        else:
            raise DataError(
                f"{name}: is of type '{type(given).__name__}'. "
                "Give a mapping of arrays, or an iterable of them."
            )
        return ArraySource(name, [MemoryPart(name, arrays)], scratch)
    except OSError as error:
        scratch.close()
        raise DataError(
            f"{name}: its batches cannot be kept in '{scratch.folder.parent}' ({reason(error)}). "
            "Set TMPDIR to a directory with more room."
        ) from error
    except BaseException:
        scratch.close()
        raise


@contextmanager
def _current_directory_importable() -> Iterator[None]:
    # first, as for 'python -m': the user's file takes precedence over an installed module
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        with suppress(ValueError):  # the user's code may have removed it
            sys.path.remove(folder)


def import_function(name: str) -> Callable[..., object]:
    """Return the function that ``module:function`` names; the current directory comes first.

    Raises
    ------
    DataError
        There is none, or importing it raised.
    """
    with _current_directory_importable():
        return _imported(name)


def call_function(name: str, function: Callable[..., object], *arguments: object) -> object:
    """Call a function of the user, which may import from the current directory; return its result.

    Raises
    ------
    DataError
        The function raised, or tried to end the process. An OnnxQatError passes unchanged.
    """
    with _current_directory_importable():
        return _called(name, function, *arguments)


def _imported(name: str) -> Callable[..., object]:
    module_name, _, attribute = name.partition(":")

    def found() -> object:
        function: Any = importlib.import_module(module_name)
        for step in attribute.split("."):
            function = getattr(function, step)
        return function

    function = _called(name, found)
    if not callable(function):
        raise DataError(f"{name}: is not a function. Name a callable.")
    return function


def _called(name: str, function: Callable[..., object], *arguments: object) -> object:
    try:
        return function(*arguments)
    except (OnnxQatError, KeyboardInterrupt):
        raise
    except BaseException as error:  # also SystemExit, which would end the command as a success
        raise _raised(name, error) from error


def _raised(name: str, error: BaseException) -> DataError:
    return DataError(
        f"{name}: raised {type(error).__name__} ({reason(error)}). Make it run in Python first."
    )


def _arrays(name: str, mapping: Mapping[Any, Any]) -> dict[str, NDArray[Any]]:
    arrays = {}
    for key, value in _guarded(name, _items(mapping)):
        try:
            array = np.asarray(value)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # ragged lists, or an error of an array-like object
            raise DataError(
                f"{name}: {key!r} is not an array ({reason(error)}). Return a numpy array."
            ) from error
        if array.dtype.kind not in "biuf":
            raise DataError(f"{name}: array {key!r} holds {array.dtype}. Return numbers.")
        arrays[str(key)] = array
    if not arrays:
        raise DataError(f"{name}: returned no arrays. Return at least the model's inputs.")
    return arrays


def _spool(name: str, batches: Iterable[Any], scratch: Scratch) -> dict[str, NDArray[Any]]:
    """Write batches to one raw file per array; return the files memory-mapped."""
    headers: dict[str, Header] = {}
    files: dict[str, IO[bytes]] = {}
    lengths: dict[str, int] = {}
    with ExitStack() as stack:
        for number, batch in enumerate(_guarded(name, batches)):
            where = f"{name}: batch {number}"
            if not isinstance(batch, Mapping):
                raise DataError(
                    f"{where} is of type '{type(batch).__name__}'. Yield mappings of arrays."
                )
            arrays = _arrays(where, batch)
            _check_alike(where, arrays, headers)
            for key, array in arrays.items():
                if key not in files:
                    files[key] = stack.enter_context(scratch.new_file().open("xb"))
                files[key].write(np.ascontiguousarray(array).data)
                lengths[key] = lengths.get(key, 0) + len(array)
    if not files:
        raise DataError(f"{name}: gave no batches. Yield at least one.")
    return {
        key: _mapped(Path(files[key].name), Header((lengths[key], *header.shape), header.dtype))
        for key, header in headers.items()
    }


def _items(mapping: Mapping[Any, Any]) -> Iterator[Any]:
    yield from mapping.items()


def _guarded(name: str, batches: Iterable[Any]) -> Iterator[Any]:
    try:
        yield from batches
    except (GeneratorExit, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise _raised(name, error) from error


def _check_alike(where: str, arrays: dict[str, NDArray[Any]], headers: dict[str, Header]) -> None:
    """Compare a batch with the headers of the first batch; for the first batch, record them."""
    for key, array in arrays.items():
        if array.ndim == 0:
            raise DataError(f"{where}: array {key!r} is a single number. Give it a first axis.")
    if len({len(array) for array in arrays.values()}) > 1:
        lengths = {key: len(array) for key, array in arrays.items()}
        raise DataError(
            f"{where}: the arrays have different lengths {lengths}. Yield one row per sample in "
            "each array."
        )
    found = {key: Header(array.shape[1:], array.dtype) for key, array in arrays.items()}
    if not headers:
        headers.update(found)
    if set(found) != set(headers):
        raise DataError(
            f"{where}: has the arrays {names(list(found))}, batch 0 had {names(list(headers))}. "
            "Yield the same arrays in every batch."
        )
    for key, header in found.items():
        if header != headers[key]:
            raise DataError(
                f"{where}: samples of array {key!r} are {header.dtype} of shape {header.shape}, "
                f"in batch 0 {headers[key].dtype} of shape {headers[key].shape}. Yield the same "
                "dtype and shape in every batch."
            )


def _mapped(path: Path, header: Header) -> NDArray[Any]:
    if math.prod(header.shape) == 0:  # an empty array cannot be mapped
        return np.zeros(header.shape, header.dtype)
    return np.memmap(path, dtype=header.dtype, mode="r", shape=header.shape)
