"""The documentation site: every page is in its navigation, every link leads somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest

import onnxqat
from onnxqat.cli import main
from scripts import reference_pages

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
OF_OTHERS = {  # options of scripts and of other tools that pages name
    *("--compressionParamsFile", "--fast_test", "--grid", "--images", "--logdir", "--markdown"),
    *("--minutes", "--model", "--models", "--no-deps", "--only", "--other", "--peer", "--python"),
    *("--plan", "--seeds"),
    *("--pre_eval_and_export", "--small", "--steps", "--strict", "--tolerance", "--work"),
    *("--anchors", "--asymmetric", "--count", "--include", "--opset", "--quantize"),
    "--update-golden",
}
LINK = re.compile(r"\]\(([^)\s]+)\)")


def text_of(page: Path) -> str:
    """Return a page without its blocks of code."""
    return re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Return what a link to a heading may end in, as Markdown's table of contents makes it."""
    headings = re.findall(r"^#+ (.+)$", text_of(page), flags=re.MULTILINE)
    words = (re.sub(r"[^\w\s-]", "", heading.lower()).strip() for heading in headings)
    return {re.sub(r"[-\s]+", "-", word) for word in words}


def test_every_page_is_in_the_navigation_once():
    named = re.findall(r": ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), flags=re.MULTILINE)

    assert sorted(named) == sorted(page.relative_to(DOCS).as_posix() for page in PAGES)


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda p: p.stem)
def test_links_of_a_page_lead_somewhere(page):
    for link in LINK.findall(text_of(page)):
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page

        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link
        # the site holds the pages, and nothing beside them
        assert page.parent == ROOT or target.is_relative_to(DOCS), link


def test_options_that_pages_name_exist():
    params = (param for _, command in reference_pages.commands() for param in command.params)
    ours = {opt for param in params if isinstance(param, click.Option) for opt in param.opts}
    unknown = {
        f"{page.name}: {option}"
        for page in (ROOT / "README.md", *PAGES)
        for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", page.read_text(encoding="utf-8"))
        if option not in ours | OF_OTHERS | {"--help", "--version"}
    }

    assert unknown == set()


def test_the_page_of_commands_has_every_option():
    text = reference_pages.on_page_markdown((DOCS / "commands.md").read_text(encoding="utf-8"))
    for name, command in reference_pages.commands():
        section = text.split(f"\n## {name}\n")[1].split("\n## ")[0]
        options = [one for one in command.params if isinstance(one, click.Option)]

        assert all(f"{option.opts[-1]}" in section for option in options)
    assert {name.split()[0] for name, _ in reference_pages.commands()} == main.commands.keys()


def test_the_page_of_python_has_every_public_name():
    text = reference_pages.on_page_markdown((DOCS / "python.md").read_text(encoding="utf-8"))

    assert set(re.findall(r"^### (\w+)$", text, flags=re.MULTILINE)) == set(onnxqat.__all__)
    assert "- `epochs` (int" in text.split("### Config")[1]  # sections of docstrings are lists


def test_the_page_of_changes_is_the_changelog():
    text = reference_pages.on_page_markdown((DOCS / "changelog.md").read_text(encoding="utf-8"))

    assert "## 0.2.0" in text
    assert text.count("# Changelog\n") == 1
