"""Parse an HTML page for tests: tables by caption, charts and texts."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from html.parser import HTMLParser

import numpy as np

VOID = {"meta", "link", "img", "br", "hr", "input"}


@dataclass
class Chart:
    """An SVG picture: its title, its elements with attributes, and its texts."""

    title: str = ""
    label: str = ""
    shapes: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)

    def curves(self, kind="main"):
        """Return the coordinates of the points of each curve, in units of the picture."""
        paths = [
            a["d"] for tag, a in self.shapes if tag == "path" and f"curve {kind}" in a["class"]
        ]
        return [np.array(re.findall(r"([\d.-]+) ([\d.-]+)", d), float) for d in paths]

    def of_class(self, name):
        return [a for _, a in self.shapes if name in a.get("class", "").split()]


class Page(HTMLParser):
    """The parsed content of a page.

    Attributes
    ----------
    tables : dict of str to list of list of str
        Rows of cells, with the heading first, by caption.
    charts : list of Chart
        The charts inside figures.
    tags, attributes : set, list
        The tags and attributes of the page.
    text : str
        All visible text.
    """

    def __init__(self, text):
        super().__init__()
        self.tables, self.charts, self.tags, self.attributes = {}, [], set(), []
        self.text, self.commands, self.open, self.marked = "", [], [], []
        self._rows = self._cell = self._chart = None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs
        found = dict(attrs)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self._rows = []
        elif tag == "tr":
            self._rows.append([])
            if found.get("class") == "marked":
                self.marked.append(self._rows[-1])
        elif tag in ("td", "th", "caption"):
            self._cell = ""
        elif tag == "svg" and "figure" in self.open:
            self._chart = Chart(label=found["aria-label"])
            self.charts.append(self._chart)
        elif tag == "code" and "pre" in self.open:
            self.commands.append("")
        if self._chart and tag != "svg":
            self._chart.shapes.append((tag, found))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag in ("td", "th"):
            self._rows[-1].append(self._cell)
        elif tag == "caption":
            self.tables[self._cell] = self._rows
        if tag in ("td", "th", "caption"):
            self._cell = None
        if tag == "svg":
            self._chart = None

    def handle_data(self, data):
        inside = self.open[-1] if self.open else ""
        if inside == "style":
            return
        self.text += data
        if self._cell is not None:
            self._cell += data
        if inside == "code" and "pre" in self.open:
            self.commands[-1] += data
        if self._chart:
            if inside == "title":
                self._chart.title = data
            elif inside == "text":
                self._chart.texts.append(data)

    def table(self, start):
        """Return the table whose caption begins with ``start``."""
        (found,) = [rows for caption, rows in self.tables.items() if caption.startswith(start)]
        return found

    def chart(self, start):
        """Return the chart whose title begins with ``start``."""
        (found,) = [chart for chart in self.charts if chart.title.startswith(start)]
        return found
