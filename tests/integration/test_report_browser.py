"""A report in Debian's Chromium: every chart drawn, no errors, narrow, wide and dark."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

import onnxqat as oq
from onnxqat.reporting import make_report
from tests.digits import MODELS
from tests.networks import convnet, quantized
from tests.unit.test_report import ESCAPED, HOSTILE, hostile

pytestmark = pytest.mark.slow
CHROMIUM = shutil.which("chromium")
SETTINGS = oq.Settings(mean=(128.0,), scale=(1 / 128,))

# What stands beyond the page's width, but for tables that scroll by themselves.
TOO_WIDE = """() => [...document.querySelectorAll('body *')].filter(e =>
    !e.closest('.scroll') && e.getBoundingClientRect().right > innerWidth + 1).length"""
# The shapes of each chart that have a place of their own on the page.
SHAPES = """() => [...document.querySelectorAll('figure svg')].map(svg =>
    [...svg.querySelectorAll('path, rect, circle, text')].filter(e => {
        const place = e.getBoundingClientRect();
        return place.width + place.height > 0;
    }).length)"""
# Of each text in a chart: whether it lies within the picture, and its size on the screen.
TEXTS = """() => [...document.querySelectorAll('figure svg text')].map(text => {
    const inner = text.getBoundingClientRect(), outer = text.closest('svg').getBoundingClientRect();
    return [inner.left >= outer.left - 1 && inner.right <= outer.right + 1, inner.height];
})"""
LIGHTNESS = """() => ['backgroundColor', 'color'].map(name =>
    getComputedStyle(document.body)[name].match(/[0-9]+/g).slice(0, 3)
        .reduce((sum, one) => sum + Number(one), 0) / 765)"""


def digits(name, count):
    with np.load(MODELS / f"digits-{name}.npz") as arrays:
        return {key: array[:count] for key, array in arrays.items()}


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A report with all that it can have."""
    folder = tmp_path_factory.mktemp("browser")
    data, test = (digits(name, count) for name, count in (("train", 480), ("test", 160)))
    log, sets = folder / "run.jsonl", ["weight.bits=4", "activation.bits=4", "weight.axis=none"]
    how = {"rules": "sophgo-bm1684x", "overrides": sets, "data": data, "settings": SETTINGS}
    plain = oq.insert(MODELS / "mobilenet-digits.onnx", **how)
    repaired = oq.insert(MODELS / "mobilenet-digits.onnx", equalize=True, **how)
    config, logs = oq.Config(epochs=2), oq.TrainingLogs(path=log, every=5)
    teacher = MODELS / "mobilenet-digits.onnx"
    tuned = oq.finetune(repaired, data, teacher=teacher, config=config, logs=logs).model
    found = oq.analyze(tuned, test, samples=32)
    beside = [plain, repaired]
    made = oq.report(tuned, test, against=teacher, beside=beside, log=log, analysis=found)
    path = folder / "report.html"
    made.save(path)
    return path


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="needs: pip install -e '.[browser]'")
    if CHROMIUM is None:
        pytest.skip("needs a browser: apt-get install chromium")
    with api.sync_playwright() as running:
        opened = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.mark.parametrize("width", [400, 900, 1600])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_report_is_drawn(browser, page, width, scheme):
    view = {"width": width, "height": 900}
    context = browser.new_context(viewport=view, color_scheme=scheme)
    opened, said, asked = context.new_page(), [], []
    opened.on("console", lambda message: said.append(message.text))
    opened.on("pageerror", lambda problem: said.append(str(problem)))
    opened.on("request", lambda request: asked.append(request.url))
    opened.goto(page.as_uri())
    shapes = opened.evaluate(SHAPES)
    texts = opened.evaluate(TEXTS)
    background, text = opened.evaluate(LIGHTNESS)

    assert said == []
    assert asked == [page.as_uri()]
    assert len(shapes) >= 10
    assert min(shapes) >= 8
    assert all(inside for inside, _ in texts)
    assert min(height for _, height in texts) >= 10
    assert opened.evaluate("document.documentElement.scrollWidth") <= width
    assert opened.evaluate(TOO_WIDE) == 0
    assert (background > 0.9, text < 0.3) == ((True,) * 2 if scheme == "light" else (False,) * 2)
    assert abs(background - text) > 0.6
    context.close()


def test_names_of_a_file_act_on_nothing(browser, tmp_path):
    path = tmp_path / "hostile.html"
    make_report(hostile(quantized(convnet())[1]), repairs=[HOSTILE]).save(path)
    context = browser.new_context()
    opened, said, asked = context.new_page(), [], []
    opened.on("console", lambda message: said.append(message.text))
    opened.on("dialog", lambda dialog: said.append(dialog.message))
    opened.on("request", lambda request: asked.append(request.url))
    opened.goto(path.as_uri())

    assert (said, asked) == ([], [path.as_uri()])
    assert opened.evaluate("document.querySelectorAll('script, img').length") == 0
    assert ESCAPED in opened.inner_text("h1")
    context.close()
