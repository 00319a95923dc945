"""Format the ``--help`` of a command: options under titles, and an example at the end."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import click

from onnxqat.verbosity import verbosity_options

__all__ = ["Command", "GroupedCommand", "command", "under"]

Command = Callable[..., None]
LAST = "Output"  # the title of the last group of options


class GroupedOption(click.Option):
    """An option that ``--help`` lists under a title."""

    def __init__(self, *args: Any, title: str, **options: Any) -> None:
        super().__init__(*args, **options)
        self.title = title


class GroupedCommand(click.Command):
    """A command whose ``--help`` lists its options under titles, and ends with an example.

    It accepts ``-v`` and ``-q``, which can also stand before the command.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.params += verbosity_options()

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write each title once, in the order of the options' declarations."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if isinstance(param, click.Option) and record is not None:
                sections.setdefault(getattr(param, "title", LAST), []).append(record)
        for title in sorted(sections, key=LAST.__eq__):
            with formatter.section(title):
                formatter.write_dl(sections[title])

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """Write the example on its own line, so that it can be copied."""
        if self.epilog:
            with formatter.section("Example"):
                for line in self.epilog.splitlines():
                    formatter.write(f"{'':{formatter.current_indent}}{line}\n")


def command(name: str | None = None, *, example: str) -> Callable[[Command], click.Command]:
    """Return click's decorator for a command; ``--help`` ends with the example."""
    return click.command(name, cls=GroupedCommand, epilog=example)


def under(title: str) -> Callable[..., Callable[[Command], Command]]:
    """Return a variant of ``click.option`` whose options ``--help`` lists under ``title``."""
    return functools.partial(click.option, cls=GroupedOption, title=title)
