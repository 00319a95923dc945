"""Run a metric function in a thread of its own.

The function pulls batches from iterators, while the evaluation pushes them as the models compute
them. One batch is queued for the function while the models run the next one.
"""

from __future__ import annotations

import numbers
from collections.abc import Iterator, Mapping
from contextlib import suppress
from queue import Empty, Queue
from threading import Thread
from typing import Any

from onnxqat.data.function import call_function
from onnxqat.errors import DataError
from onnxqat.evaluation.metrics.batch import MetricBatch, Values
from onnxqat.evaluation.metrics.named import Metric

__all__ = ["Meter"]

_END = object()


class Meter:
    """Feeds a metric function batch by batch.

    Parameters
    ----------
    metric : Metric
        The metric. Its function starts at once, and waits for the first batch.
    """

    def __init__(self, metric: Metric) -> None:
        self.metric = metric
        self._stream = _Stream(metric.name)
        self._returned: object = None
        self._error: BaseException | None = None
        self._thread = Thread(target=self._run, name="onnxqat-metric", daemon=True)
        self._thread.start()

    def add(self, values: Values, batch: MetricBatch) -> None:
        """Queue one batch; wait until the function has taken the previous one.

        Raises
        ------
        DataError
            The function has raised.
        """
        self._check()
        self._stream.handed.put((values, batch))

    def result(self) -> dict[str, float]:
        """Signal the end of the batches, and return the figures.

        Raises
        ------
        DataError
            The function has raised, or did not return a dict of numbers by name.
        """
        self._stream.handed.put(_END)
        self._thread.join()
        self._check()
        return _figures(self.metric.name, self._returned)

    def close(self) -> None:
        """End the function; its figures are no longer needed."""
        with suppress(Empty):
            self._stream.handed.get_nowait()
        self._stream.handed.put(_END)

    def _run(self) -> None:
        stream = self._stream
        try:
            self._returned = call_function(
                self.metric.name, self.metric.function, stream.read(0), stream.read(1)
            )
        except BaseException as error:
            self._error = error
        while not stream.ended:  # a function may return before the last batch
            stream.advance()

    def _check(self) -> None:
        if self._error is not None:
            raise self._error


class _Stream:
    """The batches as two iterators, one of outputs and one of samples, read side by side."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.handed: Queue[Any] = Queue(maxsize=1)
        self.count, self.ended = 0, False
        self.current: Any = None

    def advance(self) -> None:
        """Wait for the next batch."""
        item = self.handed.get()
        if item is _END:
            self.ended = True
        else:
            self.current, self.count = item, self.count + 1

    def read(self, part: int) -> Iterator[Any]:
        """Yield one part of each batch."""
        done = 0
        while True:
            if done == self.count and not self.ended:
                self.advance()
            if done == self.count:
                return
            if done < self.count - 1:
                raise DataError(
                    f"{self.name}: batch {done} is no longer available. Read outputs and data side "
                    "by side: for values, batch in zip(outputs, data)."
                )
            done += 1
            yield self.current[part]


def _figures(name: str, returned: object) -> dict[str, float]:
    """Return the figures of a function as floats by name; check their types."""
    if not isinstance(returned, Mapping) or not returned:
        raise DataError(
            f"{name}: returned {type(returned).__name__}. Return a dict with at least one number, "
            "by name."
        )
    for key, value in returned.items():
        number = isinstance(value, numbers.Real) and not isinstance(value, bool)
        if not isinstance(key, str) or not number:
            raise DataError(
                f"{name}: returned {key!r} of type '{type(value).__name__}'. Return a number for "
                "each name, such as float(...)."
            )
    return {str(key): float(value) for key, value in returned.items()}
