"""Set the verbosity on stderr: ``-v`` and ``-q`` of all commands, and an environment variable."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

import click

from onnxqat.terminal import LineFormatter, UsageLineError

__all__ = ["ALWAYS_SAID", "VARIABLE", "is_quiet", "shows_tracebacks", "verbosity_options"]

VARIABLE = "ONNXQAT_LOG"
LEVELS = ("error", "warning", "info", "debug")
USUAL = LEVELS.index("warning")
# Loggers whose info messages are printed without -v: the float model's accuracy on the labels.
ALWAYS_SAID = ("onnxqat.evaluation.decoders", "onnxqat.train.validation")


def verbosity_options() -> list[click.Option]:
    """Return ``-v`` and ``-q``, which can stand before or behind a command."""
    return [
        click.Option(
            ["-v", "--verbose"], count=True, expose_value=False, callback=_counted(1),
            help="Print more on stderr; twice adds details and tracebacks.",
        ),
        click.Option(
            ["-q", "--quiet"], count=True, expose_value=False, callback=_counted(-1),
            help="Print only errors on stderr.",
        ),
    ]  # fmt: skip


def _counted(sign: int) -> Callable[[click.Context, click.Parameter, int], None]:
    def count(ctx: click.Context, _param: click.Parameter, value: int) -> None:
        known = ctx.find_root().meta
        known[VARIABLE] = known.get(VARIABLE, 0) + sign * value
        _set_level(LEVELS[max(0, min(_usual() + known[VARIABLE], len(LEVELS) - 1))])

    return count


def _usual() -> int:
    """Return the level that the environment variable sets."""
    name = os.environ.get(VARIABLE, "").lower() or LEVELS[USUAL]
    if name not in LEVELS:
        raise UsageLineError(f"{VARIABLE}: '{name}' is not one of {', '.join(LEVELS)}.")
    return LEVELS.index(name)


def _set_level(name: str) -> None:
    level = logging.getLevelNamesMapping()[name.upper()]
    handler = logging.StreamHandler()
    handler.setFormatter(LineFormatter("%(message)s"))
    logging.basicConfig(handlers=[handler])
    logging.getLogger().setLevel(level)
    for logger in ALWAYS_SAID:
        logging.getLogger(logger).setLevel(level if is_quiet() else min(level, logging.INFO))


def is_quiet() -> bool:
    """Return whether only errors are printed."""
    return logging.getLogger().level >= logging.ERROR


def shows_tracebacks() -> bool:
    """Return whether errors are printed with their traceback."""
    return logging.getLogger().level <= logging.DEBUG
