"""Read a few entries of a YAML file: text, and flat lists and mappings of text.

PyYAML reads the file. Text stays text: ``no`` is not false, and ``1`` is not a number. Refused are
aliases, which can make a small file huge, and entries of any other form.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, TypeAlias

from onnxqat.errors import DataError
from onnxqat.toml_files import read_text

__all__ = ["YAML_SUFFIXES", "Value", "read_entries"]

YAML_SUFFIXES = (".yaml", ".yml")
MAX_DEPTH = 8  # PyYAML calls itself for each level
NULLS = ("", "~", "null", "Null", "NULL")

Value: TypeAlias = str | list[str] | dict[str, str] | None


def read_entries(path: Path, wanted: Collection[str]) -> dict[str, Value]:
    """Return the values of the entries that the file has.

    Parameters
    ----------
    path : Path
        The file.
    wanted : collection of str
        Names of the entries.

    Raises
    ------
    DataError
        The file cannot be read, is larger than 1 MiB, is not a mapping in YAML, has an alias or
        nests more than `MAX_DEPTH` levels, names an entry twice, or a wanted entry has another
        form than those above.
    """
    found: dict[str, Any] = {}
    for key, node in _nodes(path):
        if key in found:
            raise DataError(f"{path}: has the entry '{key}' twice. Remove one of them.")
        found[key] = node
    return {key: _value(path, key, found[key]) for key in wanted if key in found}


def _nodes(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the name and the node of each entry."""
    import yaml

    text = read_text(path, kind="a description of data", error=DataError)
    depth = 0
    try:
        for event in yaml.parse(text, Loader=yaml.BaseLoader):
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent) or depth > MAX_DEPTH:
                what = "nests too deep" if depth > MAX_DEPTH else f"has the alias '*{event.anchor}'"
                line = event.start_mark.line + 1
                raise DataError(f"{path}, line {line}: {what}. Write all values out.")
        node = yaml.compose(text, Loader=yaml.BaseLoader)
    except yaml.YAMLError as error:
        raise DataError(f"{path}: is not YAML ({' '.join(str(error).split())}).") from error
    if not isinstance(node, yaml.MappingNode):
        raise DataError(f"{path}: has no entries. Write entries such as 'train: x'.")
    for key, value in node.value:
        yield str(key.value), value


def _value(path: Path, key: str, node: Any) -> Value:
    """Return text, a list of text, or a mapping of text."""
    import yaml

    if isinstance(node, yaml.ScalarNode):
        return None if node.style is None and node.value in NULLS else _text(path, key, node)
    if isinstance(node, yaml.SequenceNode):
        return [_text(path, key, item) for item in node.value]
    names = [_text(path, key, name) for name, _ in node.value]
    if len(set(names)) < len(names):
        raise DataError(f"{path}: '{key}' has a name twice. Remove one of them.")
    texts = [_text(path, key, item) for _, item in node.value]
    return dict(zip(names, texts, strict=True))


def _text(path: Path, key: str, node: Any) -> str:
    if not isinstance(node.value, str):
        raise DataError(
            f"{path}, line {node.start_mark.line + 1}: '{key}' holds a list or a mapping "
            "in another. Write text, a list such as [a, b], or a mapping such as {0: a, 1: b}."
        )
    if not node.value.isprintable():
        raise DataError(f"{path}: '{key}' has {node.value[:80]!r}, which cannot be printed.")
    return node.value
