"""Dumps of tensors, and how much two of them differ."""

from __future__ import annotations

import io
import json
import math
import zipfile

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

import onnxqat as oq
from onnxqat.analysis.dumps import key_of, write_sample
from onnxqat.errors import DataError, ModelError, OnnxQatError, OptionError
from onnxqat.evaluation import evaluate
from onnxqat.model import from_proto
from onnxqat.qparams import dequantize, quantize
from tests.networks import convnet, quantized, samples


@pytest.fixture(scope="module")
def model():
    return quantized(convnet(), "sophgo-bm1684x")[1]


@pytest.fixture(scope="module")
def x():
    return samples(convnet(), 3)


def arrays(folder, index=0):
    with np.load(folder / f"{index:04}" / "tensors.npz", allow_pickle=False) as found:
        return dict(found)


def test_a_float_dump_has_every_tensor_of_the_users_file(tmp_path, x):
    proto = convnet()
    count = oq.dump(from_proto(proto), {"input": x}, tmp_path / "d", mode="float", samples=2)
    names = ["input", *(name for node in proto.graph.node for name in node.output)]
    every = onnx.ModelProto.FromString(proto.SerializeToString())
    del every.graph.output[:]
    every.graph.output.extend(helper.make_tensor_value_info(n, 1, None) for n in names[1:])

    assert count == 2
    for index in range(2):
        found = arrays(tmp_path / "d", index)
        sample = x[index : index + 1]
        expected = ReferenceEvaluator(every).run(None, {"input": sample})
        assert list(found) == names
        for name, values in zip(names, [sample, *expected], strict=True):
            np.testing.assert_allclose(found[name], values, rtol=1e-4, atol=1e-5)
    assert not (tmp_path / "d" / "0002").exists()


def test_a_qdq_dump_has_what_the_integers_stand_for(tmp_path, model, x):
    oq.dump(model, {"input": x}, tmp_path / "d")
    oq.dump(model.floats, {"input": x}, tmp_path / "f")
    found, floats = arrays(tmp_path / "d"), arrays(tmp_path / "f")
    points = {p.tensor: p for p in model.plan.grid_points() if p.role == "activation"}

    assert list(found) == list(floats)
    assert {*points} & {*found} == {*points}
    for name, point in points.items():
        params = model.params[point.parameters]
        on_grid = dequantize(quantize(found[name], params, point.spec), params, point.spec)
        np.testing.assert_array_equal(on_grid, found[name])
    first = model.params[points["input"].parameters]
    expected = dequantize(
        quantize(floats["input"], first, points["input"].spec), first, points["input"].spec
    )
    np.testing.assert_array_equal(found["input"], expected)
    assert any(not np.array_equal(found[n], floats[n]) for n in ("output",))


def test_an_integer_dump_ends_in_what_evaluation_gives(tmp_path, model, x):
    oq.dump(model, {"input": x}, tmp_path / "i", mode="integer", samples=3)
    oq.dump(model, {"input": x}, tmp_path / "q", samples=3)
    found = [arrays(tmp_path / "i", index) for index in range(3)]
    differences = [
        float(np.abs(a["output"] - arrays(tmp_path / "q", i)["output"]).max())
        for i, a in enumerate(found)
    ]
    batch = oq.Batch(inputs={"input": x}, labels=None, indices=np.arange(3), size=3)
    result = evaluate(model, [batch], mode="integer", against=model)

    assert max(differences) == pytest.approx(result.max_abs_diff, rel=1e-6)
    assert {"input", "output"} <= set(found[0])
    assert set(found[0]) <= set(arrays(tmp_path / "q"))


def test_levels_write_first_values_and_sums(tmp_path, model, x):
    for level in (0, 1, 2):
        oq.dump(model, {"input": x}, tmp_path / str(level), level=level)
    first, sums, whole = (arrays(tmp_path / str(level)) for level in (0, 1, 2))

    assert list(first) == list(sums) == list(whole)
    for name, values in whole.items():
        np.testing.assert_array_equal(first[name], values.reshape(-1)[:10])
        total, magnitude = values.sum(dtype=np.float64), np.abs(values).sum(dtype=np.float64)
        np.testing.assert_allclose(sums[name], [total, magnitude], rtol=1e-12)
    assert json.loads((tmp_path / "1" / "dump.json").read_text())["level"] == 1


def test_a_model_of_a_fixed_batch_gives_one_sample_each(tmp_path, x):
    proto = convnet()
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 4
    oq.dump(from_proto(proto), {"input": x}, tmp_path / "d", samples=9)

    assert [len(arrays(tmp_path / "d", i)["output"]) for i in range(3)] == [1, 1, 1]
    np.testing.assert_array_equal(arrays(tmp_path / "d", 2)["input"], x[2:])


HOSTILE = ("../../escape", "..", "a\x00b", "c\\..\\d", "x", "x.npy", "%2E%2E", "größe", "/abs/name")


def test_hostile_names_stay_in_the_archive(tmp_path):
    """Each name has a key of its own, which leads nowhere when the archive is unpacked."""
    values = {name: np.full(2, i, np.float32) for i, name in enumerate(HOSTILE)}
    write_sample(tmp_path, 0, values, 2)
    found = arrays(tmp_path)
    with zipfile.ZipFile(tmp_path / "0000" / "tensors.npz") as archive:
        members = archive.namelist()

    assert len({*members}) == len(HOSTILE)
    assert all(".." not in m.split("/") and "\\" not in m and "\0" not in m for m in members)
    assert {found[key_of(name)][0] for name in HOSTILE} == set(range(len(HOSTILE)))
    assert found["/abs/name"][0] == 8
    assert [p.name for p in tmp_path.iterdir()] == ["0000"]
    with pytest.raises(ModelError, match=r"cannot be a name in a \.npz file"):
        key_of("n" * 70_000)


def two(tmp_path, ours, reference):
    for name, tensors in (("a", ours), ("b", reference)):
        np.savez(tmp_path / f"{name}.npz", **tensors)
    return tmp_path / "a.npz", tmp_path / "b.npz"


def test_figures_of_a_comparison_are_those_of_numpy(tmp_path):
    rng = np.random.default_rng(0)
    r = rng.normal(size=(2, 3, 5)).astype(np.float32)
    a = r + rng.normal(scale=0.1, size=r.shape).astype(np.float32)
    found = oq.compare_dumps(*two(tmp_path, {"x": a, "extra": a}, {"x": r, "gone": r}))
    (one,) = found.tensors
    a, r = a.astype(np.float64), r.astype(np.float64)

    assert (found.missing, found.more) == (("gone",), ("extra",))
    assert one.cosine == pytest.approx((a * r).sum() / np.sqrt((a**2).sum() * (r**2).sum()))
    assert one.sqnr == pytest.approx(10 * np.log10((r**2).sum() / ((a - r) ** 2).sum()))
    assert one.max_abs_diff == np.abs(a - r).max()
    assert one.passed


@pytest.mark.parametrize(
    ("tolerance", "least"),
    [({"min_cosine": 0.9}, 0.999), ({"min_sqnr": 10.0}, 30.0), ({"max_diff": 1.0}, 0.01)],
)
def test_each_tolerance_fails_what_is_past_it(tmp_path, tolerance, least):
    r = np.arange(1, 9, dtype=np.float32)
    paths = two(tmp_path, {"x": r + np.float32(0.5) * (-1) ** np.arange(8)}, {"x": r})
    within = {"min_cosine": None, **tolerance}

    assert oq.compare_dumps(*paths, **within).passed
    assert not oq.compare_dumps(*paths, **{**within, next(iter(tolerance)): least}).passed


def test_what_is_no_number_and_other_shapes_fail(tmp_path):
    r = np.ones(4, np.float32)
    broken = r.copy()
    broken[2] = np.nan
    found = oq.compare_dumps(*two(tmp_path, {"x": broken, "y": r[:3]}, {"x": r, "y": r}),
                             min_cosine=None, max_diff=9.0)  # fmt: skip

    assert [one.passed for one in found.tensors] == [False, False]
    assert math.isnan(found.tensors[0].max_abs_diff)
    assert found.tensors[1].shapes == ((3,), (4,))


def test_all_samples_count(tmp_path):
    r = np.array([3.0, 4.0])
    for name, second in (("a", r + 1), ("b", r)):
        (tmp_path / name).mkdir()
        write_sample(tmp_path / name, 0, {"x": r}, 2)
        write_sample(tmp_path / name, 1, {"x": second}, 2)
        note = {"schema": "onnxqat.dump/1", "model": "m", "mode": "float", "level": 2, "samples": 2}
        (tmp_path / name / "dump.json").write_text(json.dumps(note))
    found = oq.compare_dumps(tmp_path / "a", tmp_path / "b")

    assert found.samples == 2
    assert found.tensors[0].sqnr == pytest.approx(10 * math.log10(50 / 2))
    (tmp_path / "a" / "0001" / "tensors.npz").unlink()
    with pytest.raises(DataError, match="no such file"):
        oq.compare_dumps(tmp_path / "a", tmp_path / "b")


def test_dumps_that_cannot_be_compared_are_refused(tmp_path, model, x):
    for level in (0, 2):
        oq.dump(model, {"input": x}, tmp_path / str(level), level=level)
    with pytest.raises(DataError, match=r"0 at level 0.* has 0 at level 2"):
        oq.compare_dumps(tmp_path / "0", tmp_path / "2")
    with pytest.raises(DataError, match="has no tensor in common with"):
        oq.compare_dumps(*two(tmp_path, {"x": x}, {"y": x}))
    with pytest.raises(DataError, match="never unpickled"):
        oq.compare_dumps(*two(tmp_path, {"x": np.array([{}])}, {"x": x}))
    (tmp_path / "0" / "dump.json").write_text('{"schema": "other"}')
    with pytest.raises(DataError, match=r"dump\.json: cannot be read"):
        oq.compare_dumps(tmp_path / "0", tmp_path / "2")


def test_a_dump_is_whole_or_absent_and_replaces_dumps_alone(tmp_path, model, x):
    data, folder = {"input": x}, tmp_path / "d"
    with pytest.raises(OnnxQatError):
        oq.dump(model.floats, data, folder, mode="integer")
    assert list(tmp_path.iterdir()) == []
    oq.dump(model, data, folder, samples=2)
    with pytest.raises(OnnxQatError, match=r"already exists\. Pass --force"):
        oq.dump(model, data, folder)
    oq.dump(model, data, folder, level=0, force=True)
    assert sorted(p.name for p in folder.rglob("*")) == ["0000", "dump.json", "tensors.npz"]
    (folder / "mine.txt").write_text("")
    with pytest.raises(OnnxQatError, match=r"holds .mine\.txt., which is not part of a dump"):
        oq.dump(model, data, folder, force=True)
    (tmp_path / "link").symlink_to(folder)
    for name in ("link", "d/mine.txt"):
        with pytest.raises(OnnxQatError, match="is not a folder"):
            oq.dump(model, data, tmp_path / name, force=True)
    with pytest.raises(OnnxQatError, match="does not exist"):
        oq.dump(model, data, tmp_path / "none" / "d")
    assert (folder / "mine.txt").exists()


def test_wrong_arguments_are_refused(tmp_path, model, x):
    for given in ({"level": 3}, {"samples": 0}, {"rules": "ncnn"}, {"mode": "intger"}):
        with pytest.raises(OptionError):
            oq.dump(model, {"input": x}, tmp_path / "d", **given)


def test_what_is_no_array_of_numbers_is_left_out(tmp_path):
    nodes = [
        helper.make_node("SequenceConstruct", ["input"], ["sequence"], name="s"),
        helper.make_node("SequenceAt", ["sequence", "zero"], ["output"], name="a"),
    ]
    ends = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", 2]) for n in ("input", "output")
    ]
    zero = helper.make_tensor("zero", TensorProto.INT64, [], [0])
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], [zero])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    data = io.BytesIO()
    np.savez(data, input=np.ones((1, 2), np.float32))
    oq.dump(from_proto(proto), {"input": np.ones((1, 2), np.float32)}, tmp_path / "d")

    assert list(arrays(tmp_path / "d")) == ["input", "output"]
