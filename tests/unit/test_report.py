"""A report holds what the history, the log and the analysis say, and nothing that acts."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import msgspec
import numpy as np
import pytest

import onnxqat as oq
from onnxqat.analysis import analysis_document
from onnxqat.errors import DataError, OnnxQatError, OptionError
from onnxqat.plan import Skip
from onnxqat.quantized import Stage
from onnxqat.reporting import make_report, typed_analysis
from onnxqat.reporting.charts import thinned, ticks
from onnxqat.train.monitoring.events import Epoch, Note, Start, Step
from tests.networks import convnet, quantized, samples
from tests.pages import Page

START = {"epoch": 0.0, "top1": 0.25, "agreement": 0.3, "loss": 2.0}
FIRST = {"epoch": 1.0, "top1": 0.45, "agreement": 0.5, "loss": 1.2}
SECOND = {"epoch": 2.0, "top1": 0.4612, "agreement": 0.6, "loss": 0.9}
THIRD = {"epoch": 3.0, "top1": 0.44, "agreement": 0.55, "loss": 1.0}
VERSIONS = {"onnxqat": "1.2", "numpy": "2.0"}


def when(name, entry):
    return {f"{name}.{k}": v for k, v in entry.items() if k != "epoch"}


def tuning(*entries, kept=2, **others):
    found = next(e for e in entries[::-1] if e["epoch"] == kept)
    figures = {"epochs": 3.0, "best_epoch": float(kept), "held_out": 500.0, "float.top1": 0.519}
    figures |= when("before", entries[0]) | when("after", found)
    return Stage(name="finetune", settings={"lr": 0.001}, figures=figures, epochs=entries, **others)


INSERT = Stage(
    name="insert",
    settings={"rules": "sophgo-bm1684x", "set": ["weight.bits=4"], "equalize": True},
    figures={"equalized": 3.0},
    inputs={"model": "net.onnx"},
    versions=VERSIONS,
)
CALIBRATE = Stage(
    name="calibrate",
    settings={"observer": "mse", "samples": 64, "seed": 0},
    figures={"samples": 64.0},
    inputs={"data": "train.npz"},
)
TUNED = tuning(START, FIRST, SECOND, THIRD, inputs={"data": "train.npz"}, notes=("a <note>",))


@pytest.fixture(scope="module")
def bare():
    """A calibrated model without a history."""
    model = quantized(convnet(), "sophgo-bm1684x", ("weight.bits=4",))[1]
    return replace(model, floats=replace(model.floats, name="net.qat.onnx"))


@pytest.fixture
def model(bare):
    return replace(bare, state="finetuned", history=(INSERT, CALIBRATE, TUNED))


def page(model, **what):
    return Page(make_report(model, **what).html)


def places(xs, ys, drawn):
    """Hold a curve to its values: the picture has units of its own, the same along an axis."""
    assert len(drawn) == len(xs)
    for values, found, sign in ((xs, drawn[:, 0], 1), (ys, drawn[:, 1], -1)):
        values = np.asarray(values, float)
        slope = (found[values.argmax()] - found[values.argmin()]) / np.ptp(values)
        assert slope * sign > 0
        np.testing.assert_allclose(
            found, found[values.argmin()] + slope * (values - values.min()), atol=0.02
        )


def test_models_stand_side_by_side_with_the_figures_of_the_history(model):
    rows = page(model).table("On 500 held-out samples")

    assert rows[0][2:] == ["top-1", "agreement", "loss"]
    assert [row[0] for row in rows[1:]] == ["floatthe teacher", "repairedthe start", "tunedepoch 2"]
    assert [row[2:] for row in rows[1:]] == [
        ["51.90 %", "–", "–"],  # noqa: RUF001
        ["25.00 %", "30.00 %", "2"],
        ["46.12 %", "60.00 %", "0.9"],
    ]


def test_curves_begin_with_the_start_and_mark_the_kept_epoch(model):
    chart = page(model).chart("top-1")
    places([0, 1, 2, 3], [0.25, 0.45, 0.4612, 0.44], chart.curves()[0])
    drawn = chart.curves()[0]
    start, kept = (chart.of_class(f"{name}")[0] for name in ("start", "kept"))

    assert [float(start[k]) for k in ("cx", "cy")] == pytest.approx(drawn[0], abs=0.01)
    assert [float(kept[k]) for k in ("cx", "cy")] == pytest.approx(drawn[2], abs=0.01)
    assert {"start 25.00 %", "kept: 46.12 %", "float 51.90 %"} <= set(chart.texts)
    assert drawn[0, 1] > drawn[2, 1]  # 25 -> 46 % rises
    assert {c.title for c in page(model).charts} == {
        f"{name} on the held-out samples" for name in ("top-1", "agreement", "loss")
    }


def test_the_table_beside_the_curves_has_every_epoch(model):
    found = page(model)
    rows = found.table("Figures on the held-out samples")

    assert [row[0] for row in rows[1:]] == ["start", "1", "2 (kept)", "3"]
    assert [row[1] for row in rows[1:]] == ["25.00 %", "45.00 %", "46.12 %", "44.00 %"]
    assert found.marked == [rows[3]]
    assert len(set(rows[0])) == len(rows[0])  # no two columns of one name


def test_one_epoch_is_drawn_from_the_start(bare):
    stage = tuning(START, FIRST, kept=1)
    found = page(replace(bare, state="finetuned", history=(stage,)))
    places([0, 1], [0.25, 0.45], found.chart("top-1").curves()[0])

    assert all(len(chart.curves()[0]) == 2 for chart in found.charts)


def test_a_start_that_was_kept_is_marked_and_said(bare):
    stage = tuning(SECOND | {"epoch": 0.0}, FIRST, kept=0)
    found = page(replace(bare, state="finetuned", history=(stage,)))

    assert "start 46.12 %, kept" in found.chart("top-1").texts
    assert "The start was kept" in found.text
    assert [r[0] for r in found.table("Figures on the held-out")[1:]] == ["start (kept)", "1"]


def test_blocks_that_were_kept_are_not_the_start(bare):
    figures = {"best_epoch": 0.0, "blocks_kept": 1.0, **when("before", START)}
    figures |= when("after", SECOND)
    stage = Stage(name="finetune", figures=figures, epochs=(START, FIRST))
    found = page(replace(bare, state="finetuned", history=(stage,)))

    assert {"start 25.00 %", "blocks, kept: 46.12 %"} <= set(found.chart("top-1").texts)
    assert "The start was kept" not in found.text


def test_a_start_with_a_smaller_rate_is_an_attempt_of_its_own(bare):
    worse = {"epoch": 1.0, "top1": 0.1, "agreement": 0.1, "loss": 9.0}
    stage = tuning(START, worse, FIRST, SECOND)
    chart = page(replace(bare, state="finetuned", history=(stage,))).chart("top-1")

    places([0, 1], [0.25, 0.1], chart.curves("earlier")[0])
    places([0, 1, 2], [0.25, 0.45, 0.4612], chart.curves()[0])


def test_a_history_of_an_earlier_version_has_its_two_ends(bare):
    stage = msgspec.structs.replace(TUNED, epochs=())
    chart = page(replace(bare, state="finetuned", history=(stage,))).chart("top-1")

    places([0, 2], [0.25, 0.4612], chart.curves()[0])


def test_figures_that_are_not_finite_are_left_out(bare):
    broken = {"epoch": 1.0, "top1": None, "agreement": 1e308, "loss": 1.2}
    stage = tuning(START, broken, SECOND)
    found = page(replace(bare, state="finetuned", history=(stage,)))

    places([0, 2], [0.25, 0.4612], found.chart("top-1").curves()[0])
    assert not {"nan", "inf"} & set(re.findall(r"\w+", found.text.lower()))


def test_a_history_that_lacks_its_epochs_is_shown_as_far_as_it_goes(bare):
    stages = (
        tuning({"top1": 0.5, "epoch": None}, {"loss": None}, {"epoch": 2.0}),
        Stage(name="finetune"),
        Stage(name="x"),
    )
    found = page(replace(bare, state="finetuned", history=stages))

    assert found.table("Stages")[0][0] == "stage"
    assert "Fine-tuning 2" in found.text


EVENTS = [
    Start(metrics={k: v for k, v in START.items() if k != "epoch"}),
    *(Step(step=s, epoch=1 + s // 8, loss=3 / s, lr=s * 1e-4, scale_lr=1e-3) for s in range(1, 25)),
    Note(step=9, note="again"),
    *(
        Epoch(
            step=8 * int(e["epoch"]),
            epoch=int(e["epoch"]),
            loss=1.0,
            metrics={k: v for k, v in e.items() if k != "epoch"},
            scale_drift={"conv1.weight": 1.5, "r1": -2.0, "input": 0.0},
            clipped={"r1": 0.25},
        )
        for e in (FIRST, SECOND, THIRD)
    ),
]


def logged(tmp_path, events):
    path = tmp_path / "run.jsonl"
    path.write_bytes(b"".join(msgspec.json.encode(event) + b"\n" for event in events))
    return path


def ordered(events):
    return sorted(events, key=lambda e: (e.step, isinstance(e, Epoch)))


def test_a_log_adds_curves_by_step_and_the_scales_that_moved(model, tmp_path):
    path = logged(tmp_path, [e for e in ordered(EVENTS) if not isinstance(e, Note)])
    found = Page(oq.report(model, log=path).html)
    steps = [e for e in EVENTS if isinstance(e, Step)]

    places([e.step for e in steps], [e.loss for e in steps],
           found.chart("training loss").curves()[0])  # fmt: skip
    places([e.step for e in steps], [e.lr for e in steps],
           found.chart("learning rate").curves("other")[0])  # fmt: skip
    rows = found.table("Scales that changed most in training, 2 of 3")
    assert [(row[0], *row[2:]) for row in rows[1:]] == [
        ("r1", "0.25", "25 %"),
        ("conv1.weight", "2.83", "–"),  # noqa: RUF001
    ]


def test_a_log_of_another_run_is_refused(model, tmp_path):
    other = [e for e in ordered(EVENTS) if not isinstance(e, Note)]
    changed = [
        msgspec.structs.replace(e, metrics=e.metrics | {"top1": 0.9})
        if isinstance(e, Epoch) and e.epoch == 2
        else e
        for e in other
    ]
    with pytest.raises(DataError, match=r"top1 after epoch 2 is 0.9 here, but 0.4612 in the"):
        oq.report(model, log=logged(tmp_path, changed))
    longer = [*other, msgspec.structs.replace(other[-1], epoch=4, step=32)]
    with pytest.raises(DataError, match="contains epoch 4, which the history of"):
        oq.report(model, log=logged(tmp_path, longer))


def test_a_log_is_drawn_while_training_goes_on(bare, tmp_path):
    path = logged(tmp_path, [e for e in ordered(EVENTS) if not isinstance(e, Note)][:13])
    found = Page(oq.report(bare, log=path).html)

    assert "does not contain the result of this run" in found.text
    places([0, 1], [0.25, 0.45], found.chart("top-1").curves()[0])
    assert len(found.chart("training loss").curves()[0]) == 11
    noted = logged(tmp_path, [*ordered(EVENTS)[:5], Note(step=1, note="<b>again</b>")])
    assert "step 1: <b>again</b>" in Page(oq.report(bare, log=noted).html).text


@pytest.fixture(scope="module")
def analyzed(bare):
    return oq.analyze(bare, {"input": 3 * samples(convnet(), 16)}, threads=1, samples=8)


def test_layers_and_tensors_are_those_of_the_analysis(bare, analyzed):
    found = Page(oq.report(bare, analysis=analyzed).html)
    layers = next(rows for caption, rows in found.tables.items() if "layers that cost" in caption)
    tensors = next(
        rows for caption, rows in found.tables.items() if "fit their grids worst" in caption
    )
    points = {p.tensor: p for p in analyzed.points}

    assert [row[0] for row in layers[1:]] == [
        one.layer.node + one.layer.op_type for one in analyzed.layers[:10]
    ]
    assert [row[2] for row in layers[1:]] == [
        f"{-10 * np.log10(one.alone):.1f} dB" for one in analyzed.layers[:10]
    ]
    for name, bits, alone, _, clipped, _, ends, values in tensors[1:]:
        point = points[name.removesuffix("weight").removesuffix("activation")
                       if name not in points else name]  # fmt: skip
        assert (bits, clipped) == (str(point.bits), f"{100 * point.clipped:.2f} %")
        assert alone == (f"{point.alone_sqnr:.1f} dB" if np.isfinite(point.alone_sqnr) else "exact")
        assert ends == " to ".join(f"{end:.4g}" for end in point.clipping_range)
        assert values == " to ".join(f"{end:.4g}" for end in point.values)


def test_histograms_are_those_of_the_analysis(bare, analyzed):
    found = Page(oq.report(bare, analysis=analyzed).html)
    points = {p.tensor: p for p in analyzed.points}
    drawn = [chart for chart in found.charts if chart.title in points]

    assert len(drawn) >= 3
    assert any(chart.of_class("clipped") for chart in drawn)
    for chart in drawn:
        histogram = points[chart.title].histogram
        bins = chart.of_class("bin")
        heights = [float(b["height"]) for b in bins]
        counts = [c for c in histogram.counts if c]
        expected = np.log10(1 + np.array(counts))
        np.testing.assert_allclose(heights, expected * max(heights) / expected.max(), atol=0.02)
        beyond = [c for i, c in enumerate(histogram.counts)
                  if c and not 8 <= i < len(histogram.counts) - 8]  # fmt: skip
        assert len(chart.of_class("clipped")) == len(beyond)
        limits = [float(a["x1"]) for tag, a in chart.shapes
                  if tag == "line" and "limit" in a["class"].split()]  # fmt: skip
        inside = [float(b["x"]) for b in bins if "clipped" not in b["class"]]
        assert limits[0] - 0.02 <= min(inside)
        assert max(inside) <= limits[1]


def test_an_analysis_of_another_state_is_refused(bare, analyzed, tmp_path):
    params = dict(bare.params)
    name = next(p.parameters for p in bare.plan.points if p.role == "weight")
    params[name] = replace(params[name], scale=params[name].scale * np.float32(1.5))
    other = bare.with_params(params, state="calibrated")
    with pytest.raises(
        DataError, match=f"belongs to another model .* range of '{re.escape(name)}' is"
    ):
        oq.report(other, analysis=analyzed)
    path = tmp_path / "a.json"
    for text, message in (
        ("", "is not an analysis"),
        ("[]", "is not an analysis"),
        ("[" * 9999, "is not an"),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=message):
            oq.report(bare, analysis=path)
    with pytest.raises(DataError, match="no such file"):
        oq.report(bare, analysis=tmp_path / "none.json")


HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&\x1b[31m\u202e</style>"
ESCAPED = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&\\x1b[31m\\u202e</style>"


def hostile(bare):
    """Return a model in which every text is hostile."""
    settings = {HOSTILE: HOSTILE, "set": [HOSTILE], "rules": HOSTILE, "x": {HOSTILE: [HOSTILE]}}
    stages = [
        Stage(name=HOSTILE, settings=settings, inputs={"model": HOSTILE, HOSTILE: HOSTILE},
              versions={HOSTILE: HOSTILE}),
        msgspec.structs.replace(TUNED, notes=(HOSTILE,), inputs={"data": HOSTILE},
                                epochs=(START | {HOSTILE: 1.0}, FIRST | {HOSTILE: 2.0}, SECOND)),
    ]  # fmt: skip
    points = [msgspec.structs.replace(p, reason=HOSTILE) for p in bare.plan.points]
    skips = [Skip(HOSTILE, HOSTILE, HOSTILE)]
    plan = msgspec.structs.replace(
        bare.plan, points=tuple(points), skips=tuple(skips), overrides=(HOSTILE,), rule=HOSTILE
    )
    return replace(bare, floats=replace(bare.floats, name=HOSTILE), plan=plan, state="finetuned",
                   history=tuple(stages))  # fmt: skip


def test_names_stand_in_a_report_as_text(bare):
    text = make_report(hostile(bare), repairs=[HOSTILE]).html
    found = Page(text)

    assert not found.tags & {"script", "img", "iframe", "object", "link", "a", "form"}
    assert not [name for name, _ in found.attributes if name.startswith("on")]
    assert found.text.count(ESCAPED) > 10
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "onerror" not in re.sub(r"<style>.*?</style>", "", text, flags=re.S).split("&lt;img")[0]


def test_names_in_an_analysis_are_text_too(bare, analyzed):
    document = json.loads(json.dumps(analysis_document(analyzed, bare)))
    for layer in document["layers"]:
        layer |= {"node": HOSTILE, "op_type": HOSTILE}
    document["advice"] |= {"layers": [HOSTILE], "overrides": [HOSTILE]}
    document["data"] = HOSTILE
    found = page(bare, analysis=typed_analysis(document, bare, "a.json"))

    assert not found.tags & {"script", "img"}
    assert found.text.count(ESCAPED) > 5


def test_a_report_refers_to_nothing_and_is_the_same_each_time(model, bare, analyzed, tmp_path):
    first, again = (oq.report(bare, analysis=analyzed) for _ in range(2))

    assert first.html == again.html
    for text in (first.html, make_report(model).html):
        assert not [n for n, _ in Page(text).attributes if n in ("src", "href", "srcset", "action")]
        assert not re.search(r"url\(|@import|https?:", text)
        assert "default-src 'none'" in text
        assert "prefers-color-scheme: dark" in text
    first.save(tmp_path / "r.html")
    with pytest.raises(OnnxQatError, match="already exists"):
        first.save(tmp_path / "r.html")


def test_charts_have_titles_descriptions_and_a_role(model, bare, analyzed):
    for text in (make_report(model).html, oq.report(bare, analysis=analyzed).html):
        found = Page(text)
        assert found.charts
        for chart in found.charts:
            assert chart.title
            assert chart.label.startswith(f"{chart.title}: ")
        assert ("role", "img") in found.attributes
        assert found.open == []
        assert all(rows[0] for rows in found.tables.values())


def test_what_is_not_there_is_said_with_the_command_that_gives_it(model, bare):
    commands = page(model).commands

    assert "onnxqat report net.qat.onnx DATA --against net.onnx" in commands
    assert "onnxqat report net.qat.onnx --log run.jsonl" in commands
    assert "onnxqat analyze net.qat.onnx DATA --json > analysis.json" in commands
    empty = page(replace(bare, state="uncalibrated"))
    assert empty.commands == ["onnxqat calibrate net.qat.onnx DATA"]
    assert "onnxqat finetune net.qat.onnx DATA" in page(bare).commands
    repaired = replace(bare, source="another", history=(INSERT,))
    command = "onnxqat finetune net.qat.onnx DATA --teacher net.onnx"
    assert command in page(repaired).commands


def test_the_plan_is_told_with_what_stays_float(model):
    found = page(model)
    rows = found.table("Quantized tensors")
    counts = dict.fromkeys(("weight", "activation", "bias"), 0)
    for role, _, number in rows[1:]:
        counts[role] += int(number)

    assert counts == {r: sum(p.role == r for p in model.plan.points) for r in counts}


def test_models_are_compared_on_data_only(bare):
    with pytest.raises(OptionError, match="models are compared on data"):
        oq.report(bare, beside=[bare])


def test_thinned_curves_keep_ends_and_extremes():
    rng = np.random.default_rng(0)
    points = [(float(i), float(v)) for i, v in enumerate(rng.normal(size=50_000))]
    points[31_234] = (31_234.0, 99.0)
    found = thinned(points)
    values = [v for _, v in points]

    assert len(found) <= 700
    assert set(found) <= set(points)
    assert found == sorted(found)
    assert {points[0], points[-1], (31_234.0, 99.0), points[int(np.argmin(values))]} <= set(found)


@pytest.mark.parametrize("low", [-3.0, 0.0, 0.46, 1e-9, 1e20])
@pytest.mark.parametrize("width", [1e-9, 0.013, 1.0, 7.0, 3e25])
def test_ticks_are_round_and_inside(low, width):
    high = low + width
    if not high > low * (1 + 1e-9):
        return
    found = ticks(low, high)
    room = 1e-6 * (high - low) + 1e-9 * abs(low)

    assert len(found) <= 6
    assert all(low - room <= value <= high + room for value in found)
