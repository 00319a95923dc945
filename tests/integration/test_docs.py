"""Every command in the README and the docs runs as it stands."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from onnxqat.calibration import OBSERVERS
from onnxqat.cli import main
from onnxqat.overrides import read_overrides
from onnxqat.rules import load_rule
from onnxqat.train.losses import read_loss
from tests.losses import check_loss

pytestmark = pytest.mark.usefixtures("one_core")
ROOT = Path(__file__).parents[2]
MODELS = ROOT / "models"
SAMPLES = {"digits-train.npz": 400}  # 22 steps of 16: more than the --quant-delay of a page
PAGES = ["README.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md"))]


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def commands(page: str) -> list[str]:
    lines = (line for block in blocks(page, "console") for line in block.splitlines())
    return [line.removeprefix("$ ") for line in lines]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The bundled models, with fewer samples: here the commands are tested, not what they reach."""
    folder = tmp_path_factory.mktemp("bundled") / "models"
    folder.mkdir()
    for path in MODELS.iterdir():
        if path.suffix == ".npz":
            count = SAMPLES.get(path.name, 128)
            with np.load(path) as arrays:
                np.savez(folder / path.name, **{name: a[:count] for name, a in arrays.items()})
        else:
            (folder / path.name).symlink_to(path)
    return folder


@pytest.fixture(scope="module")
def started(models, tmp_path_factory):
    """The folder in which the first page was followed; other pages go on from its files."""
    folder = tmp_path_factory.mktemp("started")
    shutil.copytree(models, folder / "models", symlinks=True)
    path = folder / "models/digits-train.npz"
    with np.load(path) as arrays:
        few = {name: array[:128] for name, array in arrays.items()}
    np.savez(path, **few)
    with contextlib.chdir(folder):
        run_commands("docs/index.md")
    return folder


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)])
def test_commands_of_a_page_run_in_order(page, models, started, tmp_path, monkeypatch):
    (tmp_path / "models").symlink_to(models)
    if page == "docs/index.md":
        assert (started / "chip/model.onnx").exists()
        return
    if " digits.qdq.onnx " in (ROOT / page).read_text(encoding="utf-8"):
        shutil.copy(started / "digits.qdq.onnx", tmp_path)
    shutil.copytree(ROOT / "scripts/examples", tmp_path / "scripts/examples")
    for text in blocks(page, "toml")[:1]:  # the rule file that the page writes
        (tmp_path / "my-chip.toml").write_text(text)
    if page == "docs/metrics.md":
        (tmp_path / "my_metrics.py").write_text(blocks(page, "python")[0])
    monkeypatch.chdir(tmp_path)
    if page == "docs/data.md":
        exec(blocks(page, "python")[0], {})
    run_commands(page)


def run_commands(page: str) -> None:
    for command in commands(page):
        program, *words = shlex.split(command)
        result = CliRunner().invoke(main, words)

        assert program == "onnxqat"
        assert result.exit_code == 0, f"{command}\n{result.output}\n{result.exception!r}"
        if "--json" in words:
            check_keys(json.loads(result.stdout))


def documented_keys() -> dict[str, set[str]]:
    """Return the keys of each JSON document, as its page lists them."""
    text = (ROOT / "docs/json.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(onnxqat\.[\w/-]+)` \|[^|]*\| (.*) \|$", text, flags=re.MULTILINE)
    return {schema: set(re.findall(r"`(\w+)`", keys)) for schema, keys in rows}


def check_keys(document: dict[str, Any]) -> None:
    assert document.keys() - {"schema"} <= documented_keys()[document["schema"]]


def test_every_json_document_is_on_its_page():
    schema = re.compile(r'"(onnxqat\.[\w-]+/\d+)"')
    sources = [*(ROOT / "onnxqat/commands").glob("*.py"), ROOT / "onnxqat/jobs/summary.py"]
    sources.append(ROOT / "onnxqat/analysis/document.py")
    written = {name for path in sources for name in schema.findall(path.read_text("utf-8"))}

    assert documented_keys().keys() == written


def test_every_observer_is_on_its_page_and_the_overrides_there_are_read(tmp_path):
    text = (ROOT / "docs/calibration.md").read_text(encoding="utf-8")
    path = tmp_path / "my-overrides.toml"
    path.write_text(blocks("docs/calibration.md", "toml")[0])

    named = re.findall(r"^\| `([\w-]+)`", text, flags=re.MULTILINE)
    assert named[: len(OBSERVERS)] == list(OBSERVERS)  # a table of measurements follows
    assert [o.key for o in read_overrides(path)] == ["observer", "observer", "range_factor"]


@pytest.mark.parametrize("page", ["docs/rules.md", "docs/add-a-chip.md"])
def test_rule_file_in_the_docs_loads(page, tmp_path):
    path = tmp_path / "my-chip.toml"
    path.write_text(blocks(page, "toml")[0])

    assert load_rule(str(path)).name == "my-chip"


def test_overrides_file_in_the_docs_is_read(tmp_path):
    path = tmp_path / "my-overrides.toml"
    path.write_text(blocks("docs/rules.md", "toml")[1])

    assert [str(o) for o in read_overrides(path)] == [
        "weight.bits=4",
        "name:/classifier/.*.quantize=false",
    ]


def test_the_loss_in_the_docs_is_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(blocks("docs/fine-tuning.md", "python")[0], {})
    rng = np.random.default_rng(0)
    grid, boxes = rng.normal(size=(2, 5, 3, 3)).astype(np.float32), rng.normal(size=(2, 4, 3, 3))
    there = rng.integers(0, 2, (2, 1, 3, 3))

    def expected(outputs):
        logit, found = outputs["grid"][:, :1], outputs["grid"][:, 1:]
        bce = np.log1p(np.exp(logit)) - logit * there
        return float(bce.mean() + (np.abs(found - boxes.astype(np.float32)) * there).mean())

    arrays = {"objectness": there, "boxes": boxes}
    check_loss(read_loss("my-loss.onnx"), expected, {"grid": grid}, arrays=arrays)
