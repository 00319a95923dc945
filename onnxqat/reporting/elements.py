"""HTML and SVG as a tree, so that whatever a file says stands in a page as text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeAlias
from xml.etree.ElementTree import Element, tostring

from onnxqat.terminal import shown

__all__ = ["Child", "command_line", "details", "element", "section", "table", "written"]

Child: TypeAlias = Element | str | None
LONGEST = 2000  # characters of a text: a file may have names of megabytes


def element(tag: str, *children: Child, **attributes: object) -> Element:
    """Return an element; ``class_`` and ``aria_label`` are ``class`` and ``aria-label``.

    What cannot be printed is shown as its escape. Children and attributes of None are left out.
    """
    found = Element(tag)
    for name, value in attributes.items():
        if value is not None:
            found.set(name.rstrip("_").replace("_", "-"), shown(str(value)))
    for child in children:
        _append(found, child)
    return found


def _append(parent: Element, child: Child) -> None:
    if isinstance(child, Element):
        parent.append(child)
    elif child is not None:
        text, last = shown(_short(child)), parent[-1] if len(parent) else None
        if last is None:
            parent.text = (parent.text or "") + text
        else:
            last.tail = (last.tail or "") + text


def _short(text: str) -> str:
    """Return a text without its middle where no person wrote it."""
    half = LONGEST // 2
    return text if len(text) <= LONGEST else f"{text[:half]}…{text[-half:]}"


def section(title: str, *children: Child) -> Element:
    """Return a part of the page under a heading."""
    name = title.lower().replace(" ", "-")
    heading = element("h2", title, id=name)
    return element("section", heading, *children, aria_labelledby=name)


def details(summary: str, *children: Child) -> Element:
    """Return what is shown on demand."""
    return element("details", element("summary", summary), *children)


def command_line(text: str) -> Element:
    """Return a command as it is typed."""
    return element("pre", element("code", text))


def table(
    caption: str,
    heads: Sequence[str],
    rows: Iterable[Sequence[Child]],
    *,
    numbers: Sequence[int] = (),
    marked: Sequence[int] = (),
) -> Element:
    """Return a table which scrolls by itself where the page is narrow.

    Parameters
    ----------
    heads : sequence of str
        Of the columns.
    rows : iterable of sequence of child
        The first cell of each is its head.
    numbers : sequence of int
        Columns of numbers.
    marked : sequence of int
        Rows that stand out.
    """
    kinds = ["number" if i in numbers else None for i in range(len(heads))]
    head = element(
        "tr",
        *(element("th", h, scope="col", class_=k) for h, k in zip(heads, kinds, strict=True)),
    )
    body = element("tbody")
    for index, row in enumerate(rows):
        line = element("tr", class_="marked" if index in marked else None)
        for column, cell in enumerate(row):
            tag = "td" if column else "th"
            scope = None if column else "row"
            line.append(element(tag, cell, class_=kinds[column], scope=scope))
        body.append(line)
    made = element("table", element("caption", caption), element("thead", head), body)
    return element("div", made, class_="scroll", role="region", aria_label=caption, tabindex=0)


def written(page: Element) -> str:
    """Return a page as text: a line for each element of its blocks."""
    for block in page.iter():
        if block.tag in ("section", "figure", "table", "tr", "p", "h1", "h2", "h3", "li", "meta"):
            block.tail = (block.tail or "") + "\n"
    return f"<!doctype html>\n{tostring(page, encoding='unicode', method='html')}\n"
