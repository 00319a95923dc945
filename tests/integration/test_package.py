"""Wheel and sdist: each installs into an empty environment, where the demo runs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


def run(*words, **options):
    result = subprocess.run(words, capture_output=True, text=True, check=False, **options)

    assert result.returncode == 0, f"{words}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The two files that a release has; the wheel is built from the sdist alone."""
    pytest.importorskip("build", reason="needs: pip install -e '.[package]'")
    folder = tmp_path_factory.mktemp("built")
    run(sys.executable, "-m", "build", "--outdir", folder / "dist", ROOT)
    shutil.unpack_archive(next((folder / "dist").glob("*.tar.gz")), folder / "source")
    return folder


@pytest.mark.parametrize("kind", ["*.whl", "*.tar.gz"])
def test_the_demo_runs_where_a_file_of_the_release_is_installed(built, kind, tmp_path):
    (file,) = (built / "dist").glob(kind)
    (source,) = (built / "source").iterdir()
    venv.create(tmp_path / "venv", with_pip=True)
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    run(tmp_path / "venv/bin/pip", "install", "--quiet", file, env=clean)
    demo = tmp_path / "demo"
    (demo / "scripts").mkdir(parents=True)
    shutil.copy(source / "scripts/demo", demo / "scripts")
    shutil.copytree(source / "models", demo / "models")
    # the demo's own environment would install the source; ours has the file of the release
    (demo / "scripts/environment").write_text(
        f'environment() {{ PATH="{tmp_path}/venv/bin:$PATH"; }}\n'
    )
    said = run(demo / "scripts/demo", cwd=demo, env=clean)

    assert "fine-tuned" in said
    assert (demo / "demo-output/chip/model_cali_table").exists()
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
        "version"
    ]
    assert run(tmp_path / "venv/bin/onnxqat", "--version", env=clean).split()[-1] == version
