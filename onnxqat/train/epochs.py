"""Write the models of several epochs to files, so that they can be measured on the chip."""

from __future__ import annotations

from pathlib import Path

from onnxqat.errors import OnnxQatError
from onnxqat.train.records import Progress

__all__ = ["KeptEpochs"]


class KeptEpochs:
    """Writes the models of the best epochs so far; called with the report of each epoch.

    Parameters
    ----------
    target : str or Path
        The output file; the epochs of ``m.onnx`` are ``m.epoch1.onnx`` and so on.
    count : int
        The number of files to keep.
    force : bool
        Whether files of an earlier run are replaced.

    Raises
    ------
    OnnxQatError
        Such files exist, and ``force`` is not set.
    """

    def __init__(self, target: str | Path, count: int, *, force: bool = False) -> None:
        self.target, self.count = Path(target), count
        self._kept: dict[int, tuple[float, ...]] = {}
        there = sorted(self.target.parent.glob(f"{self.target.stem}.epoch*{self.target.suffix}"))
        if there and not force:
            raise OnnxQatError(
                f"{there[0]}: already exists. Pass --force to replace it, or choose another output."
            )

    def __call__(self, progress: Progress) -> None:
        """Write the state of an epoch, if it is one of the best."""
        if progress.model is None:
            return
        self._kept[progress.epoch] = progress.score
        best = sorted(self._kept, key=lambda epoch: (self._kept[epoch], -epoch), reverse=True)
        if progress.epoch in best[: self.count]:
            progress.model.save(self.path(progress.epoch), force=True)
        for epoch in best[self.count :]:
            del self._kept[epoch]
            self.path(epoch).unlink(missing_ok=True)

    def path(self, epoch: int) -> Path:
        """Return the file of an epoch."""
        return self.target.with_name(f"{self.target.stem}.epoch{epoch}{self.target.suffix}")

    @property
    def files(self) -> tuple[str, ...]:
        """The written files, best first."""
        best = sorted(self._kept, key=lambda epoch: (self._kept[epoch], -epoch), reverse=True)
        return tuple(str(self.path(epoch)) for epoch in best)
