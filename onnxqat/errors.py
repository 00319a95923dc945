"""The errors that a user can cause.

::

    OnnxQatError
    ├── RuleError       a hardware rule file, or an override of it, is wrong
    ├── ModelError      the model lacks or contains something that onnxqat cannot process
    ├── PlanError       a plan disagrees with the model or with its parameters
    ├── DataError       the data directory, file, array or label is wrong
    ├── FormatError     a calibration table is wrong
    ├── JobError        a job file is wrong, or a model does not fit its job
    ├── OptionError     an argument is not one of the allowed values
    └── TrainingError   training diverged, or cannot be continued

A message has the form ``where: what is wrong, values quoted. The next step.`` Any other exception
that reaches the user is a defect of onnxqat.
"""

from __future__ import annotations

__all__ = [
    "DataError",
    "FormatError",
    "JobError",
    "ModelError",
    "OnnxQatError",
    "OptionError",
    "PlanError",
    "RuleError",
    "TrainingError",
]


class OnnxQatError(Exception):
    """Base class of all errors that a user can cause."""


class RuleError(OnnxQatError):
    """A hardware rule file, or an override of it, is wrong."""


class ModelError(OnnxQatError):
    """The model lacks or contains something that onnxqat cannot process."""


class PlanError(OnnxQatError):
    """A plan disagrees with the model or with its parameters."""


class DataError(OnnxQatError):
    """The data directory, file, array or label is wrong."""


class FormatError(OnnxQatError):
    """A calibration table is wrong."""


class JobError(OnnxQatError):
    """A job file is wrong, or a model does not fit its job."""


class OptionError(OnnxQatError):
    """An argument is not one of the allowed values."""


class TrainingError(OnnxQatError):
    """Training diverged, or cannot be continued."""
