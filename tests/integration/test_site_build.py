"""The built documentation: without warnings, without the network, narrow and wide."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
CHROMIUM = shutil.which("chromium")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    if importlib.util.find_spec("mkdocs") is None:
        pytest.skip("needs: pip install -e '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder]
    result = subprocess.run(
        words,
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )

    assert result.returncode == 0, result.stderr
    return folder


@pytest.mark.parametrize("width", [400, 1400])
def test_pages_are_shown_without_the_network(site, width):
    api = pytest.importorskip("playwright.sync_api", reason="needs: pip install -e '.[browser]'")
    if CHROMIUM is None:
        pytest.skip("needs a browser: apt-get install chromium")
    with api.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_context(viewport={"width": width, "height": 900}).new_page()
        said, asked = [], []
        page.on("console", lambda message: said.append(message.text))
        page.on("request", lambda request: asked.append(request.url))
        for name in ("index.html", "usage.html", "commands.html", "how-to/detector.html"):
            page.goto((site / name).as_uri())

            assert page.evaluate("document.documentElement.scrollWidth") <= width
        browser.close()

    assert said == []
    assert [url for url in asked if not url.startswith("file:")] == []
