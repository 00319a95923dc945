"""Checks on output paths: not an input of the command, not written by another run."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import click

__all__ = ["ARGUMENTS", "check_apart", "command_line", "hold"]

ARGUMENTS = "onnxqat.arguments"  # where a context keeps the words of the command line


def check_apart(outputs: Mapping[str, str | None]) -> None:
    """Refuse outputs that would overwrite an input of the command or another output.

    Parameters
    ----------
    outputs : mapping of str to str
        Paths by the name of their parameter, or by another word for the message.

    Raises
    ------
    OnnxQatError
        An output is the same file as an input or another output, even under another path.
    """
    from onnxqat.errors import OnnxQatError
    from onnxqat.locks import same_file

    ctx = click.get_current_context()
    others = list(_inputs(ctx, outputs))
    for name, text in outputs.items():
        if not text:
            continue
        path, option = Path(text), _label(ctx, name)
        for other, source in others:
            if same_file(path, source) or _is_sample(path, source):
                raise OnnxQatError(
                    f"{path}: {option} would overwrite {other} '{source}'. Choose another {option}."
                )
        others.append((option, path))


def hold(*paths: str | None) -> None:
    """Lock output paths against other runs until the command ends.

    Raises
    ------
    OnnxQatError
        Another run is writing one of them.
    """
    from onnxqat.locks import claimed

    for path in paths:
        if path:
            click.get_current_context().with_resource(claimed(path))


def command_line(*more: str) -> str:
    """Return the current command line with further options, quoted for a shell."""
    words: list[str] = list(click.get_current_context().meta.get(ARGUMENTS, ()))
    end = words.index("--") if "--" in words else len(words)
    words[end:end] = [option for option in more if option not in words]
    return shlex.join(("onnxqat", *words))


def _inputs(ctx: click.Context, outputs: Mapping[str, str | None]) -> Iterator[tuple[str, Path]]:
    """Yield a command's arguments that are existing files or folders, except the outputs."""
    for param in ctx.command.params:
        given = ctx.params.get(param.name or "")
        for value in given if isinstance(given, tuple) else (given,):
            if param.name not in outputs and isinstance(value, str):
                with suppress(OSError, ValueError):  # the value cannot be a path
                    if Path(value).exists():
                        yield _label(ctx, param.name or ""), Path(value)


def _label(ctx: click.Context, name: str) -> str:
    param = next((param for param in ctx.command.params if param.name == name), None)
    if param is None:
        return f"the {name}"
    return max(param.opts, key=len) if isinstance(param, click.Option) else name.upper()


def _is_sample(path: Path, folder: Path) -> bool:
    """Return whether a file is a sample (an image or an array) in a folder of data."""
    from onnxqat.data.sample_files import is_sample

    if not (path.is_file() and folder.is_dir() and path.resolve().is_relative_to(folder.resolve())):
        return False
    return is_sample(path) or path.suffix.lower() == ".npz"
