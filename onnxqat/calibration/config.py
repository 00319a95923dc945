"""What may be said about a calibration."""

from __future__ import annotations

import msgspec

from onnxqat.calibration.observers import OBSERVERS
from onnxqat.choices import check_choice
from onnxqat.errors import OptionError

__all__ = ["Calibration"]

BIAS_CORRECTIONS = ("empirical", "analytic")


class Calibration(msgspec.Struct, frozen=True, kw_only=True):
    """How ranges are measured, and on which samples.

    Attributes
    ----------
    observer : ObserverName
        How a clipping range is chosen, where neither the rule nor an override says; a name in
        `OBSERVERS`.
    samples : int
        How many samples calibrate: so many of the data, chosen at random, or all there are.
    batch_size : int or None
        Samples at a time. None: what the model is fixed to, and 32 where it takes any number.
    seed : int
        Seed of the choice of samples.
    threads : int
        0 takes all cores.
    bias_correction : {"empirical", "analytic"} or None
        Then take off each bias what quantization adds to the mean of its layer: measured on the
        data, or computed from what BatchNormalizations remember. None: not.

    Raises
    ------
    OptionError
        A value is out of its range.
    """

    observer: str = "mse"
    samples: int = 512
    batch_size: int | None = None
    seed: int = 0
    threads: int = 0
    bias_correction: str | None = None

    def __post_init__(self) -> None:
        check_choice("observer", self.observer, OBSERVERS)
        if self.bias_correction is not None:
            check_choice("bias_correction", self.bias_correction, BIAS_CORRECTIONS)
        least = {"samples": 1, "batch_size": 1, "seed": 0, "threads": 0}
        for name, lowest in least.items():
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int) and value >= lowest):
                raise OptionError(f"Calibration: {name} is {value!r}. Give {lowest} or more.")
