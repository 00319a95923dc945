"""The reports, the internal record and the result of a fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import msgspec

from onnxqat.errors import TrainingError
from onnxqat.evaluation import Evaluation
from onnxqat.quantized import QuantizedModel
from onnxqat.train.losses import Part
from onnxqat.train.monitoring.divergence import LossHistory
from onnxqat.train.selection import Selection

__all__ = ["BlockFigures", "DivergedError", "Finetuned", "Progress", "Record", "StoppedError"]


@dataclass(frozen=True, kw_only=True)
class Progress:
    """The state of a running fine-tuning, reported after each step and each epoch.

    Attributes
    ----------
    step, steps, epoch, epochs : int
        The current number (from 1) and the total of steps and epochs.
    loss : float
        Mean over the last steps.
    lr, scale_lr : float
        Learning rates of weights and scales at this step, for groups without their own rates.
    validation : Evaluation or None
        After an epoch: its figures on the held-out data.
    model : QuantizedModel or None
        After an epoch: the Q/DQ model of its state.
    score : tuple of float
        After an epoch: the sort key of its state; the best state has the largest.
    note : str
        A message for the user.
    before : Evaluation or None
        Figures of the start.
    part : {"epoch", "block"}
        What ``epoch`` counts. The steps of blocks are counted separately.
    """

    step: int
    steps: int
    epoch: int
    epochs: int
    loss: float
    lr: float
    scale_lr: float
    validation: Evaluation | None = None
    model: QuantizedModel | None = None
    score: tuple[float, ...] = ()
    note: str = ""
    before: Evaluation | None = None
    part: Literal["epoch", "block"] = "epoch"


class BlockFigures(msgspec.Struct, frozen=True, kw_only=True):
    """The result of one block.

    Attributes
    ----------
    layers : int
        The number of its nodes with a weight.
    outputs : tuple of str
        The tensors that the block learned.
    before, after : float or None
        Squared error of these tensors on held-out samples, divided by their variance; None if not
        measured or not finite.
    kept : bool
        Whether the trained parameters were kept.
    note : str
        Why they were not kept.
    """

    layers: int
    outputs: tuple[str, ...]
    before: float | None = None
    after: float | None = None
    kept: bool = False
    note: str = ""

    def __str__(self) -> str:
        """In words."""
        if self.before is None:
            return f"unchanged: {self.note}"
        after = "not finite" if self.after is None else f"{self.after:.3g}"
        kept = "" if self.kept else ", unchanged"
        return f"error {self.before:.3g} -> {after}{kept}"


@dataclass(frozen=True, kw_only=True, repr=False)
class Finetuned:
    """The result of a fine-tuning.

    Attributes
    ----------
    model : QuantizedModel
        The best state by the selection figure; the start if no state was better.
    before, after : Evaluation
        The figures of the start and of ``model`` on the held-out data.
    epochs : int
        The number of epochs that were run.
    best_epoch : int
        The epoch of ``model``; 0 is the start.
    seconds : float
        Wall time of training, without loading.
    parts : tuple of Part
        The part of each output in a loss that was chosen by default.
    selection : Selection
        The figure that chose the state, and why.
    notes : tuple of str
        Messages on restarts after a rising loss, an early end, a start that was kept, and figures
        that would choose different states.
    tried : tuple of (int, Evaluation)
        Each epoch and its figures; after a restart with a smaller rate, epoch 1 follows again.
    blocks : tuple of BlockFigures
        The results of block reconstruction.
    blocks_kept : bool
        Whether the tuned blocks are in the model, or in the state from which the epochs started.
    waiting : float or None
        The share of the time of this process's steps spent waiting for data; None without steps.
    samples_per_second : float or None
        How fast the steps of the epochs were; None with fewer than two.
    device : str
        Where the steps ran, such as ``cuda:0 (tf32)``.
    """

    model: QuantizedModel
    before: Evaluation
    after: Evaluation
    epochs: int
    best_epoch: int
    seconds: float
    parts: tuple[Part, ...]
    selection: Selection
    notes: tuple[str, ...] = ()
    tried: tuple[tuple[int, Evaluation], ...] = ()
    blocks: tuple[BlockFigures, ...] = ()
    blocks_kept: bool = False
    samples_per_second: float | None = None
    waiting: float | None = None
    device: str = ""

    @property
    def kept(self) -> str:
        """The name of the model's state: ``epoch 3``, ``blocks`` or ``start``."""
        if self.best_epoch:
            return f"epoch {self.best_epoch}"
        return "blocks" if self.blocks_kept else "start"

    def __repr__(self) -> str:
        return (
            f"Finetuned('{self.model.name}', {self.epochs} epochs, {self.kept} kept, "
            f"before {self.before!r}, after {self.after!r})"
        )


class DivergedError(TrainingError):
    """The loss or a gradient became infinite or NaN.

    Attributes
    ----------
    outcome : Finetuned
        The result so far; its model is the last good state.
    """

    def __init__(self, message: str, outcome: Finetuned) -> None:
        super().__init__(message)
        self.outcome = outcome


class StoppedError(TrainingError):
    """The caller stopped a run; it can resume from its checkpoint, if it has one."""


class Record(msgspec.Struct, kw_only=True):
    """The state of a run, without its arrays.

    Attributes
    ----------
    before, best : Evaluation
        Figures of the start, and of the best state so far.
    best_epoch : int
        The epoch of the best state; 0 is the start.
    backoffs : int
        The number of restarts, each at a quarter of the rate.
    step, epoch : int
        Steps and epochs since the last restart.
    waited : int
        Epochs since the last better state.
    losses : LossHistory
        The losses since the last restart.
    tried : list of (int, Evaluation)
        The evaluated epochs and their figures, including those before a restart.
    notes : list of str
        Messages on restarts after a rising loss, and on an early end.
    seconds : float
        Wall time so far.
    epochs : int
        How many to run, where the time says it; 0 where it is not known yet.
    finished : bool
        Whether the run has finished.
    """

    before: Evaluation
    best: Evaluation
    losses: LossHistory
    best_epoch: int = 0
    backoffs: int = 0
    step: int = 0
    epoch: int = 0
    waited: int = 0
    tried: list[tuple[int, Evaluation]] = []
    notes: list[str] = []
    seconds: float = 0.0
    epochs: int = 0
    finished: bool = False
