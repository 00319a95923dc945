"""What a metric reads: the outputs of a batch, and the samples that they are of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from onnxqat.outputs import Output

__all__ = ["Array", "MetricBatch", "MetricFunction", "Values"]

Array: TypeAlias = NDArray[Any]
Values: TypeAlias = Mapping[str, Array]  # by the name of the output


@dataclass(frozen=True, kw_only=True, eq=False)
class MetricBatch:
    """The samples of one batch, without those that only fill it.

    Attributes
    ----------
    inputs : mapping of str to array
        What the model was fed, by its inputs.
    labels : int64 of shape (n,), or None
        Class indices.
    indices : int64 of shape (n,)
        Positions of the samples in the data.
    arrays : mapping of str to array
        The other arrays of the data, first axis n, as they are stored.
    truth : mapping of str to array
        Of them, what each output should be, by the name of the output.
    reference : mapping of str to array, or None
        Outputs of the model that is compared with; None without one.
    outputs : mapping of str to Output
        What the values of each output mean.
    """

    inputs: Mapping[str, Array]
    labels: NDArray[np.int64] | None
    indices: NDArray[np.int64]
    arrays: Mapping[str, Array] = field(default_factory=dict)
    truth: Mapping[str, Array] = field(default_factory=dict)
    reference: Values | None = None
    outputs: Mapping[str, Output] = field(default_factory=dict)


MetricFunction: TypeAlias = Callable[[Iterator[Values], Iterator[MetricBatch]], Any]
