"""A module imports only from the rooms above it in the table of docs/architecture.md."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from onnxqat.formats import EXPORTS, FORMATS

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "onnxqat"


def documented_order() -> list[str]:
    """Return the rooms of docs/architecture.md: from row to row, and from left to right."""
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    table = text.split("| room |")[1].split("\n\n")[0]
    cells = [row.split("|")[1] for row in table.splitlines() if row.startswith("| `")]
    found = [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]
    return [name.removesuffix("/").removesuffix(".py") for name in found]


ORDER = documented_order()


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = [n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    names += [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
    return {n.split(".")[1] for n in names if n.startswith("onnxqat.")}


def test_every_room_is_documented_once():
    rooms = {room(path) for path in PACKAGE.rglob("*.py")} - {"__init__"}

    assert sorted(ORDER) == sorted(rooms)


def test_modules_import_only_from_above():
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        if path == PACKAGE / "__init__.py":
            continue
        here = ORDER.index(room(path))
        below = [other for other in imported_rooms(path) if ORDER.index(other) > here]
        wrong += [f"{path.relative_to(PACKAGE)} imports {other}" for other in below]

    assert wrong == []


def test_no_module_touches_what_onnxruntime_keeps_to_itself():
    users = {
        str(p.relative_to(PACKAGE))
        for p in PACKAGE.rglob("*.py")
        if "onnxruntime.capi" in p.read_text(encoding="utf-8")
    }

    assert users == set()


def test_chips_are_data():
    names = {p.stem for p in (PACKAGE / "rules").glob("*.toml")} - {"onnxruntime-cpu"}
    names -= FORMATS.keys() | EXPORTS.keys()  # a format may be called like its rule
    sources = {
        str(p.relative_to(PACKAGE)): p.read_text(encoding="utf-8") for p in PACKAGE.rglob("*.py")
    }
    users = [
        f"{path}: {name}" for path, text in sources.items() for name in names if f'"{name}"' in text
    ]

    assert users == []
    assert not [path for path, text in sources.items() if "rule ==" in text or ".rule in" in text]


def test_only_one_module_prints():
    """So that whatever is printed is escaped."""
    printing = re.compile(r"\b(click\.echo|click\.secho|print|console\.print|sys\.stdout\.write)\(")
    users = {
        str(p.relative_to(PACKAGE))
        for p in PACKAGE.rglob("*.py")
        if any(printing.search(line) for line in p.read_text(encoding="utf-8").splitlines())
    }

    apart = "handoff/to_tflite.py"  # runs beside the model, without onnxqat
    # progress.py escapes what it gives to rich
    assert users == {"terminal.py", "progress.py", apart}
