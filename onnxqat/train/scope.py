"""What is trained: blocks, the network from end to end, or both, one after the other."""

from __future__ import annotations

from onnxqat.data import DataSet
from onnxqat.errors import TrainingError
from onnxqat.parallel import Workers
from onnxqat.train.config import Config, Scope

__all__ = ["check_scope", "chosen_scope"]

OF_NETWORK = ("augment", "ema", "epochs", "memory_budget", "minutes", "patience", "quant_delay")
FEW = 256  # training samples; with more, the network is trained from end to end


def chosen_scope(
    config: Config, training: DataSet, workers: Workers, *, own_teacher: bool
) -> tuple[tuple[Scope, ...], str]:
    """Return what is trained, and a line for the user about it; empty if the user chose.

    Parameters
    ----------
    config : Config
        Hyper-parameters; some of them ask for the network.
    training : DataSet
        What is trained on.
    workers : Workers
        The processes that train together.
    own_teacher : bool
        Whether the user names a float model, which may have other tensors between its blocks.
    """
    if config.scope is not None:
        return config.scope, ""
    learned = training.has_labels or config.loss is not None  # by the outputs of the network
    asked = own_teacher or config.optimizer == "sgd" or _of_network(config)
    if learned or asked or workers.size > 1 or len(training) > FEW:
        return ("network",), ""
    told = (
        f"trains one block after the other: {len(training)} samples without labels are few for "
        "training from end to end (--scope network does that)"
    )
    return ("blocks",), told


def _of_network(config: Config) -> list[str]:
    """Return the settings that were changed and that blocks would ignore."""
    usual = Config()
    return [name for name in OF_NETWORK if getattr(config, name) != getattr(usual, name)]


def check_scope(config: Config, scope: tuple[Scope, ...], workers: Workers) -> None:
    """Refuse settings that block reconstruction does not support or would ignore.

    Raises
    ------
    TrainingError
        There is such a setting.
    """
    if "blocks" not in scope:
        if config.rounding != "nearest":
            raise TrainingError(
                f"--rounding {config.rounding} applies to blocks only. Pass --scope blocks, or "
                "leave it out."
            )
        return
    if config.rounding != "nearest" and config.optimizer == "sgd":
        raise TrainingError(
            f"--rounding {config.rounding} needs --optimizer adamw or adam: the step of a rounding "
            "variable must not depend on the size of its gradient."
        )
    if workers.size > 1:
        raise TrainingError(
            "--scope blocks runs in one process only. Start it without mpirun, and then train the "
            "network in a second run."
        )
    given = _of_network(config)
    if given and "network" not in scope:
        option = given[0].replace("_", "-")
        raise TrainingError(
            f"--{option} applies to training from end to end. Leave it out, or pass --scope "
            "blocks,network."
        )
