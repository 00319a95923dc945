"""Build HTML and SVG as an element tree, so that text from files is always escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeAlias
from xml.etree.ElementTree import Element, tostring

from onnxqat.terminal import shown

__all__ = ["Child", "command_line", "details", "element", "section", "table", "written"]

Child: TypeAlias = Element | str | None
LONGEST = 2000  # characters of a text; a file can contain names of megabytes


def element(tag: str, *children: Child, **attributes: object) -> Element:
    """Return an element; ``class_`` and ``aria_label`` become ``class`` and ``aria-label``.

    Unprintable characters are escaped. Children and attributes that are None are left out.
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
    """Return a text, shortened in its middle if it is longer than `LONGEST`."""
    half = LONGEST // 2
    return text if len(text) <= LONGEST else f"{text[:half]}…{text[-half:]}"


def section(title: str, *children: Child) -> Element:
    """Return a section of the page with a heading."""
    name = title.lower().replace(" ", "-")
    heading = element("h2", title, id=name)
    return element("section", heading, *children, aria_labelledby=name)


def details(summary: str, *children: Child) -> Element:
    """Return content that the reader can unfold."""
    return element("details", element("summary", summary), *children)


def command_line(text: str) -> Element:
    """Return an element that shows a command."""
    return element("pre", element("code", text))


def table(
    caption: str,
    heads: Sequence[str],
    rows: Iterable[Sequence[Child]],
    *,
    numbers: Sequence[int] = (),
    marked: Sequence[int] = (),
) -> Element:
    """Return a table that scrolls horizontally on a narrow page.

    Parameters
    ----------
    heads : sequence of str
        The column headings.
    rows : iterable of sequence of child
        The rows; the first cell of each is its heading.
    numbers : sequence of int
        Indices of columns with numbers.
    marked : sequence of int
        Indices of highlighted rows.
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
    """Return a page as HTML text, with block elements on their own lines."""
    for block in page.iter():
        if block.tag in ("section", "figure", "table", "tr", "p", "h1", "h2", "h3", "li", "meta"):
            block.tail = (block.tail or "") + "\n"
    return f"<!doctype html>\n{tostring(page, encoding='unicode', method='html')}\n"
