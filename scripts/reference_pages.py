"""Write the reference pages of the documentation site from the program itself.

mkdocs calls `on_page_markdown` for each page (`hooks` in mkdocs.yml). It replaces the marks below
by text: the commands from click's help, the Python functions and classes from their docstrings,
and the changelog from its file. These pages are therefore always up to date.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

import onnxqat
from onnxqat.cli import main

ROOT = Path(__file__).parents[1]
SECTIONS = ("Parameters", "Returns", "Yields", "Raises", "Attributes", "Examples", "Notes")
HEADING = re.compile(rf"^({'|'.join(SECTIONS)})\n-+\n", flags=re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Return a page's text with its marks replaced by generated text."""
    for mark, write in MARKS.items():
        if mark in markdown:
            markdown = markdown.replace(mark, write())
    return markdown


def write_commands() -> str:
    """Return a section for each command, with a table of options for each title."""
    return "\n\n".join(
        section for name, command in commands() for section in command_sections(name, command)
    )


def commands() -> Iterator[tuple[str, click.Command]]:
    """Yield the words that call each command, and the command; a group yields its commands."""
    for name, command in main.commands.items():
        if isinstance(command, click.Group):
            for inner, one in command.commands.items():
                yield f"{name} {inner}", one
        else:
            yield name, command


def command_sections(name: str, command: click.Command) -> Iterator[str]:
    """Yield the Markdown of one command: description, usage, options."""
    context = click.Context(command, info_name=f"onnxqat {name}")
    yield f"## {name}"
    yield inspect.cleandoc(command.help or "")
    yield f"```text\n{command.get_usage(context).removeprefix('Usage: ')}\n```"
    titles: dict[str, list[str]] = {}
    for option in command.get_params(context):
        record = option.get_help_record(context)
        if isinstance(option, click.Option) and record is not None:
            said, does = (cell.replace("|", "\\|").replace("<", "&lt;") for cell in record)
            row = f"| `{said}` | {does} |"
            titles.setdefault(getattr(option, "title", "Output"), []).append(row)
    for title, rows in titles.items():
        yield f"| {title} | |\n|---|---|\n" + "\n".join(rows)
    if command.epilog:
        yield f"Example:\n\n```sh\n{command.epilog}\n```"


def write_python() -> str:
    """Return the functions, then the classes of ``onnxqat``, each with its docstring."""
    public = {name: getattr(onnxqat, name) for name in onnxqat.__all__}
    functions = {name: one for name, one in public.items() if not inspect.isclass(one)}
    classes = {name: one for name, one in public.items() if inspect.isclass(one)}
    parts = ["## Functions"]
    parts += [
        f"### {name}\n\n{signature(one)}\n\n{described(one)}" for name, one in functions.items()
    ]
    parts.append("## Classes")
    parts += [f"### {name}\n\n{described(one)}{methods(one)}" for name, one in classes.items()]
    return "\n\n".join(parts)


def signature(function: Callable[..., Any]) -> str:
    """Return a function's signature as a block of code, with the defaults from its source."""
    source = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    assert isinstance(source, ast.FunctionDef)
    words = ast.unparse(source.args)
    lines = re.split(r", (?=\*|\w+:)", words) if len(words) > 60 else [words]
    inner = ",\n    ".join(lines)
    inner = f"\n    {inner},\n" if len(lines) > 1 else inner
    returns = f" -> {ast.unparse(source.returns)}" if source.returns else ""
    return f"```python\n{source.name}({inner}){returns}\n```"


def described(thing: Any) -> str:
    """Return a numpydoc docstring as Markdown: its text, then each section as a list."""
    text = (inspect.getdoc(thing) or "").replace("``", "`")
    opening, *sections = HEADING.split(text)
    parts = [opening.strip()]
    for title, body in zip(sections[::2], sections[1::2], strict=True):
        if title == "Examples":
            parts.append(f"```pycon\n{body.strip()}\n```")
        else:
            parts.append(f"**{title}**\n\n{entries(body)}")
    return "\n\n".join(parts)


def entries(body: str) -> str:
    """Return the entries of a docstring's section as a list: ``name : type``, then text."""
    found = []
    for entry in re.split(r"\n(?=\S)", body.strip()):
        head, _, text = entry.partition("\n")
        name, _, kind = head.partition(" : ")
        kind = f" ({kind})" if kind else ""
        text = " ".join(text.split())
        found.append(f"- `{name}`{kind}: {text}" if text else f"- {head}")
    return "\n".join(found)


def methods(thing: type) -> str:
    """Return the public methods and properties of a class, each with its first sentence."""
    kinds = (property, classmethod, staticmethod)
    rows = []
    for name, value in vars(thing).items():
        if not name.startswith("_") and (inspect.isfunction(value) or isinstance(value, kinds)):
            brackets = "" if isinstance(value, property) else "()"
            first = (inspect.getdoc(getattr(thing, name)) or "").partition("\n")[0]
            rows.append(f"- `{name}{brackets}`: {first.replace('``', '`')}")
    return "\n\n**Methods and properties**\n\n" + "\n".join(rows) if rows else ""


def write_changelog() -> str:
    """Return the changelog without its title, which the page has."""
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    return text.removeprefix("# Changelog\n").replace("](docs/", "](")


MARKS = {
    "<!-- commands -->": write_commands,
    "<!-- python -->": write_python,
    "<!-- changelog -->": write_changelog,
}
