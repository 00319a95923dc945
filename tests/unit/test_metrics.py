"""How metrics are named, given batches and believed; what each returns is in another file."""

from __future__ import annotations

import sys
import threading

import numpy as np
import pytest

from onnxqat.data import InputSpec, open_data
from onnxqat.errors import DataError, OptionError
from onnxqat.evaluation import evaluate
from onnxqat.evaluation.metrics import BUILT_IN, figure_text, fitted, read_metric
from tests.networks import convnet, quantized, samples
from tests.oracles import run_ort


@pytest.fixture(scope="module")
def model():
    return quantized(convnet(), "onnxruntime-cpu", ("weight.bits=4",))[1]


@pytest.fixture(scope="module")
def images():
    return samples(convnet(), 10)


def opened(x, **arrays):
    spec = InputSpec(name="input", shape=("n", *x.shape[1:]), dtype="float32")
    return open_data({"input": x, **arrays}, [spec])


def measured(model, data, *metrics, against=None, size=4):
    names = [tensor.name for tensor in model.floats.graph.outputs]
    wanted = [read_metric(metric) for metric in metrics]
    data, wanted = fitted(data, wanted, names, compared=against is not None)
    return evaluate(model, data.batches(size), metrics=wanted, against=against, threads=1)


def test_a_function_gets_every_batch_with_what_the_data_have(model, images):
    seen = []

    def score(outputs, data):
        for values, batch in zip(outputs, data, strict=True):
            seen.append((dict(values), batch))
        return {"batches": len(seen)}

    weights = np.arange(10, dtype=np.float32)
    labels = np.arange(10) % 5
    with opened(images, label=labels, weight=weights) as data:
        result = measured(model, data, score)
    expected = run_ort(model.to_proto(), {"input": images})[0]

    assert result.metrics["batches"] == 3
    assert result.first == {f"{__name__}:{score.__qualname__}": "batches"}
    for name, wanted in {"indices": np.arange(10), "labels": labels}.items():
        np.testing.assert_array_equal(np.concatenate([getattr(b, name) for _, b in seen]), wanted)
    np.testing.assert_array_equal(np.concatenate([b.inputs["input"] for _, b in seen]), images)
    np.testing.assert_array_equal(np.concatenate([b.arrays["weight"] for _, b in seen]), weights)
    assert [list(b.arrays) for _, b in seen] == [["weight"]] * 3
    assert [b.reference for _, b in seen] == [None] * 3
    found = np.concatenate([v["output"] for v, _ in seen])
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_samples_that_fill_a_batch_do_not_count(model, images):
    def count(outputs, data):
        pairs = [(len(v["output"]), len(b.inputs["input"]), len(b.arrays["weight"]))
                 for v, b in zip(outputs, data, strict=True)]  # fmt: skip
        assert pairs == [(4, 4, 4), (4, 4, 4), (2, 2, 2)]
        return {"samples": sum(pair[0] for pair in pairs)}

    spec = InputSpec(name="input", shape=(4, *images.shape[1:]), dtype="float32")
    arrays = {"input": images, "weight": np.arange(10)}
    with open_data(arrays, [spec]) as data:
        assert measured(model, data, count, size=None).metrics["samples"] == 10


def test_the_reference_is_measured_too(model, images):
    def mean(outputs, data):
        return {"mean": float(np.mean(np.concatenate([v["output"] for v in outputs])))}

    with opened(images) as data:
        result = measured(model, data, mean, "cosine", against=model.floats)
    theirs = run_ort(model.floats.to_proto(), {"input": images})[0]

    assert result.reference == {"mean": pytest.approx(theirs.mean(), rel=1e-5)}
    assert result.metrics["mean"] != result.reference["mean"]
    assert result.first["cosine"] == "cosine"


def test_outputs_may_be_read_alone_and_early_ends_are_fine(model, images):
    def first(outputs, data):
        return {"first": float(next(outputs)["output"][0, 0])}

    with opened(images) as data:
        result = measured(model, data, first, size=2)
    assert result.metrics["first"] == pytest.approx(
        run_ort(model.to_proto(), {"input": images[:2]})[0][0, 0], rel=1e-5
    )


def test_one_iterator_cannot_run_ahead(model, images):
    def behind(outputs, data):
        list(outputs)
        return {"n": len(list(data))}

    with (
        opened(images) as data,
        pytest.raises(DataError, match=r"batch 0 is no longer available.*zip\("),
    ):
        measured(model, data, behind)


def raises(outputs, data):
    raise KeyError("no\nsuch")


def ends(outputs, data):
    raise SystemExit(0)


def raises_late(outputs, data):
    for _ in outputs:
        pass
    return {"x": 1 / 0}


def nothing(outputs, data):
    return {}


def listed(outputs, data):
    return [1.0]


def text(outputs, data):
    return {"x": "1.0"}


def true(outputs, data):
    return {"x": True}


def numbered(outputs, data):
    return {1: 1.0}


def top1(outputs, data):
    return {"top1": 1.0}


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (raises, r"test_metrics:raises: raised KeyError \('no\\nsuch'\)"),
        (ends, "raised SystemExit"),
        (raises_late, "raised ZeroDivisionError"),
        (nothing, "returned dict. Return a dict with at least one"),
        (listed, "returned list"),
        (text, "returned 'x' of type 'str'"),
        (true, "returned 'x' of type 'bool'"),
        (numbered, "returned 1 of type 'float'"),
        (top1, "returned a figure 'top1', a name that is already taken"),
    ],
)
def test_what_a_function_does_wrong_is_one_line(model, images, function, said):
    with opened(images) as data, pytest.raises(DataError, match=said) as caught:
        measured(model, data, function, size=1)
    assert "\n" not in str(caught.value)


def test_no_thread_is_left(model, images):
    class Broken:
        def __iter__(self):
            yield from ()
            raise RuntimeError

    def patient(outputs, data):
        return {"n": len(list(outputs))}

    with pytest.raises(RuntimeError):
        evaluate(model, Broken(), metrics=[read_metric(patient)], threads=1)
    for thread in threading.enumerate():
        if thread.name == "onnxqat-metric":
            thread.join(timeout=10)
            assert not thread.is_alive()


def test_a_function_is_imported_from_the_current_directory(tmp_path, monkeypatch):
    (tmp_path / "my_scores.py").write_text(
        "def score(outputs, data):\n    import my_constants\n    return {'s': my_constants.ONE}\n"
    )
    (tmp_path / "my_constants.py").write_text("ONE = 1\n")
    monkeypatch.chdir(tmp_path)
    metric = read_metric("my_scores:score")
    network, x = quantized(convnet(), "onnxruntime-cpu")[1], samples(convnet(), 2)

    assert (metric.name, metric.needs, metric.built_in) == ("my_scores:score", "everything", False)
    with opened(x) as data:
        assert measured(network, data, metric).metrics == {"s": 1.0}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("topp1", "unknown. The nearest: 'top1'"),
        ("no such", "unknown"),
        ("json:nothing", "json:nothing: raised AttributeError"),
        ("no_such_module_1:f", "raised ModuleNotFoundError"),
        ("sys:path", "sys:path: is not a function"),
    ],
)
def test_names_that_are_none(name, said):
    with pytest.raises((OptionError, DataError), match=said):
        read_metric(name)


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_ones_are_functions_by_name(name):
    metric = read_metric(name)

    longer = {"map": "mean_average_precision"}
    assert metric.function.__name__ == longer.get(name, name.replace("-", "_"))
    assert metric.built_in


def test_what_the_data_lack_is_said_before_anything_runs(images):
    with opened(images, a=np.zeros(10), b=np.zeros(10)) as data:
        for metric, said in [
            ("top1", "--metric top1: needs class labels"),
            ("psnr", r"there are: 'a', 'b'. Give --truth output=ARRAY"),
        ]:
            with pytest.raises(DataError, match=said):
                fitted(data, [read_metric(metric)], ["output"])
        with pytest.raises(OptionError, match=r"--metric sqnr: needs a model to comp.*--against"):
            fitted(data, [read_metric("sqnr")], ["output"], compared=False)


@pytest.mark.parametrize(
    ("arrays", "outputs", "said", "truth"),
    [
        (("only",), ["a"], None, {"a": "only"}),
        (("a", "z"), ["x", "a"], None, {"a": "a"}),
        (("a", "z"), ["a"], {"a": "z"}, {"a": "z"}),
        (("label", "z"), ["a"], {"a": "label"}, {"a": "label"}),
    ],
)
def test_the_array_that_an_output_should_equal(images, arrays, outputs, said, truth):
    spec = InputSpec(name="input", shape=("n", *images.shape[1:]), dtype="float32")
    given = {"input": images} | {name: np.zeros((10, 2), np.int64) for name in arrays}
    with open_data(given, [spec], truth=said) as data:
        found, (metric,) = fitted(data, [read_metric("psnr")], outputs)
        batch = next(found.batches(4))

    assert metric.truth == truth
    assert set(batch.arrays) == set(truth.values())


@pytest.mark.parametrize(
    ("said", "error"),
    [({"z": "a"}, "--truth z=a: no output 'z'"), ({"output": "c"}, "no array 'c'")],
)
def test_a_truth_that_does_not_exist(images, said, error):
    spec = InputSpec(name="input", shape=("n", *images.shape[1:]), dtype="float32")
    with open_data({"input": images, "a": np.zeros(10)}, [spec], truth=said) as data:  # noqa: SIM117
        with pytest.raises((DataError, OptionError), match=error):
            fitted(data, [read_metric("psnr")], ["output"])


def test_figures_are_written_by_what_they_are():
    assert figure_text("map", 0.263) == "26.30 %"
    assert figure_text("sqnr", np.inf) == "exact"
    assert figure_text("mine", 26.3) == "26.3"


def test_boxes_need_their_array_and_a_package(images, monkeypatch):
    pytest.importorskip("pycocotools")
    with opened(images) as data:
        with pytest.raises(DataError, match=r"--metric map: .* has no boxes. Give --boxes"):
            fitted(data, [read_metric("map")], ["output"])
        with pytest.raises(OptionError, match="--decode 'no' is unknown"):
            fitted(data, [read_metric("map")], ["output"], decode="no")
        monkeypatch.setitem(sys.modules, "pycocotools", None)
        with pytest.raises(OptionError, match=r"needs pycocotools. Run pip install 'onnxqat\[det"):
            fitted(data, [read_metric("map")], ["output"])
