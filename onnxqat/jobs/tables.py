"""Tables of a job file, whose keys are options of the command line.

The options come from `onnxqat.options`. Their types define the structs that a table is checked
with. click parses the values, so that a key means exactly the same as the option.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Literal, TypeAlias

import click
import msgspec
from msgspec import UNSET, Meta, UnsetType

from onnxqat.choices import nearest
from onnxqat.errors import JobError
from onnxqat.help_text import Command

__all__ = ["OptionTable", "converted", "key_of", "params_of"]

Options: TypeAlias = Callable[[Command], Command]
Scalar: TypeAlias = str | int | float


def params_of(options: Iterable[Options], *, without: Iterable[str] = ()) -> list[click.Option]:
    """Return the options that decorators add to a command, except the keys ``without``."""

    def nothing() -> None:
        pass

    command = nothing
    for decorate in options:
        decorate(command)
    # a decorator with several options adds the last one first
    found = list(getattr(command, "__click_params__", ()))
    return [param for param in found if key_of(param) not in without]


def key_of(param: click.Parameter) -> str:
    """Return the key of an option: its long name, without the dashes."""
    return max(param.opts, key=len).removeprefix("--")


class OptionTable:
    """A table whose keys are options.

    Parameters
    ----------
    name : str
        Name of the table in the file.
    params : sequence of click.Option
        The options, see `params_of`.
    more : mapping of str to type
        Further keys that are not options.

    Attributes
    ----------
    kind : type
        The struct of the table.
    """

    def __init__(
        self, name: str, params: Iterable[click.Option], more: Mapping[str, Any] | None = None
    ) -> None:
        self.name, self.params, self.more = name, tuple(params), dict(more or {})
        kinds = self.more | {key_of(param): _type_of(param) for param in self.params}
        self.kind = msgspec.defstruct(
            f"{name.title()}Table",
            [(key.replace("-", "_"), kind | UnsetType, UNSET) for key, kind in kinds.items()],
            rename="kebab",
            frozen=True,
            kw_only=True,
            forbid_unknown_fields=True,
        )

    @property
    def keys(self) -> tuple[str, ...]:
        """The permitted keys."""
        return (*self.more, *map(key_of, self.params))

    def parse(
        self, given: Mapping[str, Any], where: str, defaults: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return the values as a command receives them, by parameter name.

        Parameters
        ----------
        given : mapping
            The table in the file.
        where : str
            Path of the file, for messages.
        defaults : mapping, optional
            Values for options that the table does not set.

        Raises
        ------
        JobError
            A key is unknown, or the option does not accept a value.
        """
        where = f"{where}: [{self.name}]"
        table = converted(given, self.kind, self.keys, where)
        own = {key: value for key, value in table.items() if key not in self.more}
        known = set(map(key_of, self.params))
        usual = {k: v for k, v in (defaults or {}).items() if k in known}
        words = self._words(usual | own)
        # no option is required, since the whole table is optional; the stage checks what it needs
        command = click.Command(self.name, params=list(self.params))
        try:
            with command.make_context(self.name, words) as context:
                parsed = dict(context.params)
        except click.ClickException as error:
            raise JobError(f"{where} {_wrong(error)}") from error
        return parsed | {key: table[key] for key in self.more if key in table}

    def _words(self, values: Mapping[str, Any]) -> list[str]:
        by_key = {key_of(param): param for param in self.params}
        return [word for key, value in values.items() for word in _words_of(by_key[key], value)]


def converted(
    given: Any, kind: type[msgspec.Struct], keys: Iterable[str], where: str
) -> dict[str, Any]:
    """Check a table against a struct; return the keys that it sets.

    Raises
    ------
    JobError
        It is not a table, a key is unknown (the message suggests the nearest known one), or a value
        has the wrong type.
    """
    if not isinstance(given, Mapping):
        raise JobError(f"{where} is {given!r}. Write a table.")
    for key in given:
        if key not in keys:
            raise JobError(f"{where} has no key '{key}'. {nearest(key, keys)}")
    try:
        found: dict[str, Any] = msgspec.to_builtins(msgspec.convert(given, kind))
    except msgspec.ValidationError as error:
        raise JobError(f"{where} {_explained(error)}") from error
    return found


def _explained(error: msgspec.ValidationError) -> str:
    """Return msgspec's message, with the key in front of it."""
    text, _, place = str(error).partition(" - at `$")
    key = place.strip("`.")
    text = text.replace("`", "'").replace("|", " or ")
    return f"'{key}': {text[:1].lower()}{text[1:]}." if key else f"{text}."


def _wrong(error: click.ClickException) -> str:
    param = getattr(error, "param", None)
    text = " ".join(error.message.split()).rstrip(".")
    return f"'{key_of(param)}': {text}." if param is not None else f"{text}."


def _type_of(param: click.Option) -> Any:
    """Return the type of an option's value in a file, with the option's help as description."""
    kind, described = param.type, Meta(description=param.help or "")
    if param.is_flag:
        return Annotated[bool, described]
    if param.multiple:
        return Annotated[str | tuple[str, ...], described]
    if isinstance(kind, click.Choice):
        return Annotated[Literal[tuple(map(str, kind.choices))], described]
    if isinstance(kind, click.IntRange | click.FloatRange):
        number: Any = int if isinstance(kind, click.IntRange) else float
        return Annotated[number, _range(kind), described]
    plain = {click.INT: int, click.FLOAT: float}.get(kind)
    if plain is not None:
        return Annotated[plain, described]
    if param.callback is not None:  # the option parses a text itself, such as 1,2,3
        return Annotated[Scalar | tuple[Scalar, ...], described]
    return Annotated[str, described]


def _range(kind: click.IntRange | click.FloatRange) -> Meta:
    low, high = ("gt" if kind.min_open else "ge"), ("lt" if kind.max_open else "le")
    limits: dict[str, Any] = {low: kind.min, high: kind.max}
    return Meta(**{name: limit for name, limit in limits.items() if limit is not None})


def _words_of(param: click.Option, value: Any) -> list[str]:
    """Return a value as words of a command line."""
    option = f"--{key_of(param)}"
    if param.is_flag:
        return [option] if value else []
    if param.multiple:
        values = [value] if isinstance(value, str) else value
        return [f"{option}={one}" for one in values]
    text = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return [f"{option}={text}"]
