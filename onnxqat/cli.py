"""The command line: the group of commands, its errors and its exit codes.

Results go to stdout, logs and progress to stderr. An error is one line on stderr. Exit code 1 is an
error or a failed check, 2 is wrong usage, and 130 is an interruption.
"""

from __future__ import annotations

import functools
import gc
import signal
from collections.abc import Callable
from typing import Any

import click

from onnxqat.commands import COMMANDS
from onnxqat.commands.outputs import ARGUMENTS
from onnxqat.commands.signals import noted_signals
from onnxqat.environment import check_environment, check_packages
from onnxqat.errors import OnnxQatError
from onnxqat.terminal import UsageLineError, guarded_streams, say, shown
from onnxqat.verbosity import shows_tracebacks, verbosity_options

__all__ = ["main"]

INTERRUPTED = 130  # 128 + SIGINT, as in shells
# A graph consists of hundreds of thousands of objects that stay alive. Searching them for garbage
# after every 700 allocations took a third of the time of `insert` on 5,000 nodes.
GARBAGE_THRESHOLD = 200_000


class CommandGroup(click.Group):
    """A group of commands that turns `OnnxQatError` into one line on stderr and an exit code."""

    def main(self, *args: Any, **options: Any) -> Any:
        """Run the command line."""
        with guarded_streams():
            return super().main(*args, **options)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Store the words of the command line, and parse them."""
        ctx.meta[ARGUMENTS] = tuple(args)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return self._run(ctx)
        except (Exception, KeyboardInterrupt) as error:
            if not _is_interruption(error):
                raise
            say("Interrupted. No partly written file is left.", err=True)
            ctx.exit(INTERRUPTED)

    def _run(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except OnnxQatError as error:
            if shows_tracebacks():
                raise
            raise click.ClickException(shown(str(error).strip())) from error
        except click.UsageError as error:
            # for 'onnxqat rules' without a command, click raises an exception too, to show the help
            if isinstance(error, getattr(click.exceptions, "NoArgsIsHelpError", ())):
                raise
            path = error.ctx.command_path if error.ctx else ctx.command_path
            message = f"{shown(_one_line(error.format_message()))} See '{path} --help'."
            raise UsageLineError(message) from error
        except click.ClickException as error:
            raise click.ClickException(shown(error.message)) from error
        except MemoryError as error:
            raise click.ClickException("Out of memory. Try a smaller --batch-size.") from error


def _is_interruption(error: BaseException | None) -> bool:
    """Return whether Ctrl-C caused an error, which callbacks may have replaced by another."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def _one_line(text: str) -> str:
    return " ".join(text.split())


@click.group(cls=CommandGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="onnxqat")
def main() -> None:
    """Quantization-aware training for an exported ONNX model."""
    gc.set_threshold(GARBAGE_THRESHOLD)


main.params += verbosity_options()


def _in_order(command: click.Command, check: Callable[[], None]) -> click.Command:
    """Make a command, or the commands of a group, check the environment first (not for help)."""
    if isinstance(command, click.Group):
        for inner in command.commands.values():
            _in_order(inner, check)
    elif command.callback:
        run = command.callback

        @functools.wraps(run)
        def checked(*args: Any, **options: Any) -> Any:
            _undisturbed(check)
            return run(*args, **options)

        command.callback = checked
    return command


def _undisturbed(check: Callable[[], None]) -> None:
    """Run a check, which imports packages, and handle signals only afterwards.

    If the import of a native package is interrupted, it crashes or looks broken.
    """
    with noted_signals() as received:
        check()
    for number in received:
        signal.raise_signal(number)


for command in COMMANDS:
    # commands that only read rules do not need the packages
    check = check_packages if command.name == "rules" else check_environment
    main.add_command(_in_order(command, check))
