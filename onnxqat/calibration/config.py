"""The settings of a calibration."""

from __future__ import annotations

import msgspec

from onnxqat.calibration.observers import OBSERVERS
from onnxqat.choices import check_choice
from onnxqat.device import check_device
from onnxqat.errors import OptionError

__all__ = ["Calibration"]

BIAS_CORRECTIONS = ("empirical", "analytic")


class Calibration(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of a calibration.

    Attributes
    ----------
    observer : ObserverName
        Observer that chooses clipping ranges, unless the rule or an override names one; a name in
        `OBSERVERS`.
    samples : int
        Number of samples, chosen at random; all samples if the data have fewer.
    batch_size : int or None
        Samples per batch (default: the model's fixed batch size, or 32 if it takes any).
    seed : int
        Seed of the random choice of samples.
    threads : int
        Number of threads; 0 uses all cores.
    device : str
        ``cpu``, ``cuda``, ``cuda:1`` and so on, or ``auto``: a usable GPU, else the CPU.
    precision : {"tf32", "fp32"} or None
        Precision of matrix products on a GPU, see `onnxqat.device.Device`. None: ``tf32``.
    bias_correction : {"empirical", "analytic"} or None
        Subtract from each bias the error that quantization adds to the mean of its layer. It is
        measured on the data (``empirical``), or computed from the statistics of
        BatchNormalizations (``analytic``). None: no correction.

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
    device: str = "auto"
    precision: str | None = None
    bias_correction: str | None = None

    def __post_init__(self) -> None:
        check_choice("observer", self.observer, OBSERVERS)
        if self.bias_correction is not None:
            check_choice("bias_correction", self.bias_correction, BIAS_CORRECTIONS)
        check_device("Calibration", self.device, self.precision)
        least = {"samples": 1, "batch_size": 1, "seed": 0, "threads": 0}
        for name, lowest in least.items():
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int) and value >= lowest):
                raise OptionError(f"Calibration: {name} is {value!r}. Give {lowest} or more.")
