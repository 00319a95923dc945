"""What a user can cause to go wrong.

::

    OnnxQatError
    ├── RuleError       a hardware rule file, or an override of it, is wrong
    ├── ModelError      the model lacks or holds something we cannot work with
    ├── PlanError       a plan and the model or the parameters disagree
    ├── DataError       the data directory, file, array or label is wrong
    ├── FormatError     a calibration table is wrong
    ├── JobError        a job file is wrong, or a model is not what its job needs
    ├── OptionError     an argument is none of the values there are
    └── TrainingError   training diverged, or cannot be continued

Message = ``where: what is wrong, values quoted. The next step.`` Anything else that
escapes to the user is a defect of ours.
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
    """Base of every error a user can cause."""


class RuleError(OnnxQatError):
    """A hardware rule file, or an override of it, is wrong."""


class ModelError(OnnxQatError):
    """The model lacks or holds something we cannot work with."""


class PlanError(OnnxQatError):
    """A plan and the model, or a plan and its parameters, disagree."""


class DataError(OnnxQatError):
    """The data directory, file, array or label is wrong."""


class FormatError(OnnxQatError):
    """A calibration table is wrong."""


class JobError(OnnxQatError):
    """A job file is wrong, or a model is not what its job needs."""


class OptionError(OnnxQatError):
    """An argument is none of the values there are."""


class TrainingError(OnnxQatError):
    """Training diverged, or cannot be continued."""
