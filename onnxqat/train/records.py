"""What a fine-tuning tells on the way, remembers, and returns."""

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
    """Where a running fine-tuning stands; passed to the caller after every step and epoch.

    Attributes
    ----------
    step, steps, epoch, epochs : int
        Done and in all; counted from 1.
    loss : float
        Mean over the last steps.
    lr, scale_lr : float
        Learning rates of weights and scales at this step, of groups without their own.
    validation : Evaluation or None
        After an epoch,
    model : QuantizedModel or None
        and the Q/DQ model it is of.
    score : tuple of float
        After an epoch: what states are ordered by; that of the best one is the largest.
    note : str
        Something the user should read.
    before : Evaluation or None
        Figures of the start.
    part : {"epoch", "block"}
        What ``epoch`` counts. The steps of blocks are counted by themselves.
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
    """What became of one block.

    Attributes
    ----------
    layers : int
        How many of its nodes have a weight.
    outputs : tuple of str
        The tensors that it was taught.
    before, after : float or None
        Squared error of these on held-out samples, by their variance; None where it was not
        measured, or not finite.
    kept : bool
        Whether it holds what training found.
    note : str
        Why not.
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
            return f"stays as it was: {self.note}"
        after = "not finite" if self.after is None else f"{self.after:.3g}"
        kept = "" if self.kept else ", stays as it was"
        return f"error {self.before:.3g} -> {after}{kept}"


@dataclass(frozen=True, kw_only=True, repr=False)
class Finetuned:
    """The outcome.

    Attributes
    ----------
    model : QuantizedModel
        The best state by the validation metric; the start itself if nothing was better.
    before, after : Evaluation
        On the held-out data.
    epochs : int
        How many were run.
    best_epoch : int
        The one the model is of; 0 is the start.
    seconds : float
        Wall time of training, without loading.
    parts : tuple of Part
        What each output adds to the loss, where the loss was chosen by default.
    selection : Selection
        What the state was chosen by, and why.
    notes : tuple of str
        What was done about a rising loss, why it ended early, that the start was kept, and where
        loss and accuracy disagree.
    tried : tuple of (int, Evaluation)
        Each epoch and its figures; a start with a smaller rate comes back to epoch 1.
    blocks : tuple of BlockFigures
        Of block reconstruction.
    blocks_kept : bool
        Whether the model, or what the epochs began with, has the tuned blocks.
    waiting : float or None
        Share of their time that the steps of this process waited for data; None without steps.
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
    waiting: float | None = None

    @property
    def kept(self) -> str:
        """Which state the model is: ``epoch 3``, ``blocks`` or ``start``."""
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
        What the run had come to; its model is the last good state.
    """

    def __init__(self, message: str, outcome: Finetuned) -> None:
        super().__init__(message)
        self.outcome = outcome


class StoppedError(TrainingError):
    """The caller asked a run to stop; it can go on from its checkpoint, if it has one."""


class Record(msgspec.Struct, kw_only=True):
    """What a run has come to, besides its arrays.

    Attributes
    ----------
    before, best : Evaluation
        Figures of the start, and of the best state so far.
    best_epoch : int
        The epoch of the best state; 0 is the start.
    backoffs : int
        How often training started again at a quarter of the rate.
    step, epoch : int
        Steps taken and epochs validated since it last started.
    waited : int
        Epochs since the last better state.
    losses : LossHistory
        Since then.
    tried : list of (int, Evaluation)
        The epochs whose states were judged, and their figures; those of a start with another rate
        too.
    notes : list of str
        What was done about a rising loss, and why it ended early.
    seconds : float
        Wall time so far.
    finished : bool
        Whether the run is at its end.
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
    finished: bool = False
