"""Write the tensors of a model on a few samples to files."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from onnxqat.analysis import DumpNote, Level, check_replaceable, run_of, write_sample
from onnxqat.choices import check_choice
from onnxqat.errors import DataError, OptionError
from onnxqat.evaluation.run import MODES, Mode
from onnxqat.files import atomic_folder
from onnxqat.settings import Settings
from onnxqat.verbs.listener import Listener
from onnxqat.verbs.models import AnySource, any_model
from onnxqat.verbs.opening import TO_MEASURE, AnyData, opened
from onnxqat.verbs.planning import AnyRule, rule_of

__all__ = ["dump"]


def dump(
    model: AnySource,
    data: AnyData,
    output: str | Path,
    *,
    mode: Mode = "qdq",
    level: Level = 2,
    samples: int = 1,
    rules: AnyRule | None = None,
    force: bool = False,
    settings: Settings = Settings(),  # noqa: B008 (frozen)
    threads: int = 0,
    listener: Listener = Listener(),  # noqa: B008 (without state)
) -> int:
    """Write the tensors of the first samples into a folder, see `onnxqat.analysis.dumps`.

    Only the tensors of one sample are in memory at a time.

    Parameters
    ----------
    model : str, Path, Model or QuantizedModel
        A model, float or with Q/DQ pairs.
    data : path, arrays or DataSet
        The data, whose first samples are run one at a time.
    output : str or Path
        The folder, which is created when all files are complete.
    mode : {"float", "qdq", "integer"}
        The arithmetic: float without Q/DQ, that of the file (unfused), or the chip's integers.
    level : {0, 1, 2}
        The content: first values, sums, or all values.
    samples : int
        The number of samples.
    rules : str, Path or HardwareRule, optional
        The rule for mode ``integer`` (default: the rule that the model was made with).
    force : bool
        Replace an earlier dump.
    settings : Settings
        How data become model inputs, for settings that the model does not store.
    threads : int
        The number of threads (0: all cores).
    listener : Listener
        Gets messages and progress.

    Returns
    -------
    int
        The number of samples that were written.

    Raises
    ------
    OnnxQatError
        A file cannot be read or written, an argument is wrong, the data do not fit the model, or
        the model cannot run in this mode.
    """
    check_choice("mode", mode, MODES)
    if level not in (0, 1, 2):
        raise OptionError(f"level {level}: give 0, 1 or 2.")
    if samples < 1:
        raise OptionError(f"samples {samples}: give 1 or more.")
    if rules is not None and mode != "integer":
        raise OptionError("rules: apply to mode 'integer' only. Leave them out.")
    loaded = any_model(model)
    with (
        opened(loaded, data, settings, listener, labels=False, splits=TO_MEASURE) as found,
        atomic_folder(output, force=force, check=check_replaceable) as folder,
    ):
        run = run_of(loaded, mode, rule=None if rules is None else rule_of(rules), threads=threads)
        size = found.fixed_batch or 1
        wanted, count = min(samples, len(found)), 0
        with listener.batches("dumping", wanted) as advance:
            for index in range(wanted):
                # empty if the sample cannot be read
                for batch in found.batches(size, indices=np.array([index])):
                    tensors = run(batch.inputs)
                    counting = {name: batch.counting(value) for name, value in tensors.items()}
                    write_sample(folder, count, counting, level)
                    count += 1
                advance()
        if not count:
            raise DataError(f"{found.name}: none of the first {wanted} samples can be read.")
        DumpNote(model=loaded.name, mode=mode, level=level, samples=count).write(folder)
    return count
