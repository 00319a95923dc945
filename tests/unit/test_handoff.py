"""What calls the vendor's compiler: words, numbers, and what an earlier model left."""

from __future__ import annotations

import ast
import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnxqat import export
from onnxqat.deploy import write_deployment
from onnxqat.handoff import HANDOFF_FILES, HANDOFFS, facts_of, to_tflite
from onnxqat.rules import bundled_rules, load_rule
from onnxqat.settings import Settings, settle
from tests.networks import W4A4, _Graph, attention, convnet, quantized, samples
from tests.oracles import run_ort

MEAN, SCALE = (123.675, 116.28, 103.53), (0.0171248, 0.017507, 0.0174292)
RULES = [n for n in bundled_rules() if load_rule(n).table in HANDOFFS]
TOOL = '#!/bin/sh\nprintf "%s\\n" "$0" "$@" >> words.txt\n'


def deployed(folder, rule, **settings):
    """Strip a small network; return the texts of the hand-off, and the words of its commands."""
    _, model = quantized(convnet(), rule)
    settle(model, Settings(mean=MEAN, scale=SCALE, **settings))
    files = write_deployment(model, folder).files
    return {n: path.read_text() for n, path in files.items() if n in HANDOFF_FILES}


def words(text, tool):
    """Return the words of the command that begins with ``tool``."""
    lines = text.replace("\\\n", " ").splitlines()
    return shlex.split(next(line for line in lines if line.startswith(tool)))


def test_the_script_calls_the_compiler_with_what_the_model_was_trained_with(tmp_path):
    deployed(tmp_path / "chip", "sophgo-bm1684x", pixel_format="bgr")
    for name in ("model_transform.py", "model_deploy.py"):
        (tmp_path / name).write_text(TOOL)
        (tmp_path / name).chmod(0o755)
    script = ["bash", str(tmp_path / "chip/compile.sh"), "--debug"]
    subprocess.run(script, check=True, env={"PATH": f"{tmp_path}:/usr/bin:/bin"})

    text = (tmp_path / "chip/words.txt").read_text()
    first, second = (part.split("\n") for part in text.split(f"{tmp_path}/model_deploy.py\n"))
    options = dict(zip(first[1::2], first[2::2], strict=False))
    assert options["--model_def"] == "model.onnx"
    assert json.loads(options["--input_shapes"]) == [[1, 3, 8, 8]]
    assert tuple(map(float, options["--mean"].split(","))) == MEAN
    assert tuple(map(float, options["--scale"].split(","))) == SCALE
    assert options["--pixel_format"] == "bgr"
    options = dict(zip(second[0::2], second[1::2], strict=False))
    assert options["--processor"] == "bm1684x"
    assert (tmp_path / "chip" / options["--calibration_table"]).exists()
    assert second[-2] == "--debug"


RKNN = """
class RKNN:
    def __getattr__(self, name):
        def call(*values, **named):
            with open("calls.txt", "a") as file:
                print((name, values, named), file=file)
            return -1 if name == FAILING else 0
        return call
"""


def calls_of(folder, *words, failing=None):
    """Run compile.py with a module that writes down how it is called."""
    (folder / "rknn").mkdir(exist_ok=True)
    (folder / "rknn" / "api.py").write_text(f"FAILING = {failing!r}\n{RKNN}")
    script = [sys.executable, str(folder / "chip/compile.py"), *words]
    done = subprocess.run(
        script, cwd=folder, env={"PYTHONPATH": str(folder)}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    lines = (folder / "calls.txt").read_text().splitlines()
    (folder / "calls.txt").unlink()
    return done, {name: (values, named) for name, values, named in map(ast.literal_eval, lines)}


def test_rockchip_compiles_the_quantized_model_as_it_is(tmp_path):
    deployed(tmp_path / "chip", "rockchip-rk3588", pixel_format="bgr")
    done, calls = calls_of(tmp_path)

    assert done.returncode == 0, done.stderr
    assert list(calls) == ["config", "load_onnx", "build", "export_rknn", "release"]
    _, config = calls["config"]
    assert (config["target_platform"], config["optimization_level"]) == ("rk3588", 2)
    assert config["mean_values"] == [list(MEAN)]
    np.testing.assert_allclose(np.divide(1, config["std_values"][0]), SCALE, rtol=1e-15)
    _, load = calls["load_onnx"]
    assert (load["inputs"], load["input_size_list"]) == (["input"], [[1, 3, 8, 8]])
    onnx.checker.check_model(onnx.load(load["model"]))
    assert calls["build"] == ((), {"do_quantization": False})
    assert calls["export_rknn"] == ((str(tmp_path / "chip/model_rk3588.rknn"),), {})
    assert "pixels: bgr" in (tmp_path / "chip/compile.py").read_text()


def test_rockchips_script_stops_where_the_toolkit_fails(tmp_path):
    deployed(tmp_path / "chip", "rockchip-rv1106")
    done, calls = calls_of(tmp_path, "rv1103", failing="build")

    assert (done.returncode, done.stderr) == (1, "build failed\n")
    assert "export_rknn" not in calls
    assert calls["config"][1]["target_platform"] == "rv1103"


@pytest.mark.parametrize("rule", RULES)
def test_only_a_script_that_was_run_says_nothing_of_it(rule, tmp_path):
    found = deployed(tmp_path, rule)

    scripts = [name for name in found if name.endswith((".sh", ".py"))]
    run = {"sophgo": ["compile.sh"], "rockchip": ["compile.py"]}
    assert scripts == run.get(rule.partition("-")[0], [])
    assert all("not run by us" in text.splitlines()[0] for n, text in found.items()
               if n not in scripts and not n.endswith(".json"))  # fmt: skip
    assert found


def test_litert_is_converted_by_the_python_that_is_named(tmp_path):
    found = deployed(tmp_path / "chip", "tflite", pixel_format="bgr")
    (tmp_path / "python").write_text(TOOL)
    (tmp_path / "python").chmod(0o755)
    script = ["bash", str(tmp_path / "chip/compile.sh")]
    environment = {"PYTHON": str(tmp_path / "python"), "PATH": "/usr/bin:/bin"}
    subprocess.run(script, check=True, env=environment)

    _, name, model, table, target = (tmp_path / "chip/words.txt").read_text().split()
    assert all((tmp_path / "chip" / file).is_file() for file in (name, model, table))
    assert target == "model.tflite"
    assert found[name] == Path(to_tflite.__file__).read_text(encoding="utf-8")
    assert "bgr" in found["compile.sh"]
    assert str(MEAN[0]) in found["compile.sh"]


def test_a_table_that_several_tools_read_names_no_tool(tmp_path):
    assert deployed(tmp_path / "esp", "esp32-p4") == {}
    _, model = quantized(convnet(), "tflite")
    written = write_deployment(model, tmp_path / "none", table="none").files
    assert written.keys() == {"model"}


def test_axera_takes_divisors(tmp_path):
    found = deployed(tmp_path, "axera-ax650")
    text, config = found["compile.txt"], json.loads(found["model_pulsar2.json"])
    (one,) = config["input_processors"]

    np.testing.assert_allclose(np.divide(1, one["std"]), SCALE, rtol=1e-15)
    assert tuple(one["mean"]) == MEAN
    assert (one["tensor_format"], one["tensor_layout"]) == ("RGB", "NCHW")
    assert "--target_hardware=AX650" in words(text, "pulsar2")[2:]
    for option in words(text, "pulsar2")[2:]:
        name, _, value = option.partition("=")
        assert name not in ("--input", "--config") or (tmp_path / value).exists()
    assert config["model_type"] == "QuantONNX"
    assert config["quant"]["conv_bias_data_type"] == "FP32"
    assert "layer_configs" not in config["quant"]


def test_pulsar2_is_told_of_16_bits(tmp_path):
    _, model = quantized(convnet(opset=21), "axera-ax650", ("tensor:r2.bits=16",))
    config = json.loads(write_deployment(model, tmp_path).files["model_pulsar2.json"].read_text())

    assert {"layer_name": "n_c3", "data_type": "U16"} in config["quant"]["layer_configs"]


def test_onnxruntime_fuses_the_exported_model_to_integer_kernels(tmp_path):
    # with 7 bits, no sum of two products saturates on a CPU without VNNI
    _, model = quantized(convnet(), "onnxruntime-cpu", ("weight.bits=7",))
    settle(model, Settings(mean=MEAN, scale=SCALE))
    script = write_deployment(model, tmp_path).files["compile.py"]
    early = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    export(model, format_name="onnxruntime").save(tmp_path / "model.int8.onnx")
    subprocess.run([sys.executable, script], check=True)
    fused = onnx.load(tmp_path / "model.fused.onnx")
    feeds = {"input": samples(convnet(), 4)}
    (found,), (expected,) = (
        run_ort(onnx.load(tmp_path / f"model.{name}.onnx"), feeds) for name in ("fused", "int8")
    )

    assert early.returncode == 1
    assert early.stderr.startswith("model.int8.onnx is missing. Write it with: onnxqat export")
    assert "QLinearConv" in {node.op_type for node in fused.graph.node}
    assert np.abs(found - expected).max() < 0.03 * np.ptp(expected)  # about a level of each layer
    assert "mean 123.675,116.28,103.53" in script.read_text()


def test_openvino_is_given_the_preprocessing_of_bytes(tmp_path):
    text = deployed(tmp_path, "openvino", pixel_format="bgr")["compile.py"]
    calls = {
        node.func.attr: [ast.literal_eval(one) for one in node.args]
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in ("mean", "scale", "reshape", "input")
    }

    assert calls["mean"] == [list(MEAN)]
    np.testing.assert_allclose(np.divide(1, calls["scale"][0]), SCALE, rtol=1e-15)
    assert (calls["input"], calls["reshape"]) == (["input"], [{"input": [1, 3, 8, 8]}])
    assert "bytes of images in NHWC: bgr" in text


def test_horizon_takes_mean_and_scale_by_spaces(tmp_path):
    lines = deployed(tmp_path, "horizon-bernoulli2")["hb_mapper.yaml"].splitlines()
    entries = dict(line.strip().split(": ", 1) for line in lines if line.startswith("  "))

    assert json.loads(entries["march"]) == "bernoulli2"
    assert tuple(map(float, json.loads(entries["mean_value"]).split())) == MEAN
    assert tuple(map(float, json.loads(entries["scale_value"]).split())) == SCALE
    assert json.loads(entries["input_shape"]) == "1x3x8x8"


def test_cambricon_takes_the_variance(tmp_path):
    text = deployed(tmp_path, "cambricon-mlu")["compile.txt"]
    found, catch = (json.loads(line) for line in text.splitlines() if line.startswith("{"))

    first = found["insert_bn_before_firstnode"]["0"]
    np.testing.assert_allclose(1 / np.sqrt(first["var"]), SCALE, rtol=1e-15)
    np.testing.assert_allclose(np.multiply(catch["mean"], 255), MEAN, rtol=1e-15)
    np.testing.assert_allclose(1 / np.multiply(catch["std"], 255), SCALE, rtol=1e-15)
    assert catch["firstconv"] is True


def test_ascend_subtracts_the_mean_where_it_may_have_a_fraction(tmp_path):
    text = deployed(tmp_path, "ascend")["aipp.cfg"]

    assert "  min_chn_2: 103.53\n  var_reci_chn_2: 0.0174292\n" in text
    assert "src_image_size_w: 8" in text


@pytest.mark.parametrize("rule", RULES)
def test_a_model_without_images_has_no_preprocessing(rule):
    _, model = quantized(attention(), rule)
    files = dict.fromkeys(("model", "table", "config", "ranges"), "t")
    facts = facts_of(model, model.floats, rule=None, files=files)
    text = "".join(HANDOFFS[load_rule(rule).table](facts).values())

    assert facts.images == []
    for word in ("mean", "scale_value", "aipp", "pixel"):
        assert word not in text.lower().replace("pixel_", "")


def test_names_are_one_word_each_and_free_lengths_are_for_the_user():
    g = _Graph(0)
    g.node("Conv", ["input", g.weight("w", 4, 3, 1, 1)], "output")
    shapes = ["N", 3, "height", "width"], ["N", 4, "height", "width"]
    _, model = quantized(g.model(*shapes), "tensorrt")
    model.floats.graph.inputs[0].name = "a b$(x)"
    facts = facts_of(model, model.floats, rule=None, files={"model": "m", "table": "t"})
    found = words(HANDOFFS["tensorrt"](facts)["compile.txt"], "trtexec")

    assert "--shapes=a b$(x):1x3xHEIGHTxWIDTH" in found


def test_what_an_earlier_model_left_is_taken_away(tmp_path):
    deployed(tmp_path, "horizon-bernoulli2")
    _, model = quantized(convnet(), "sophgo-bm1684x")
    write_deployment(model, tmp_path, force=True)

    assert {p.name for p in tmp_path.iterdir()} & set(HANDOFF_FILES) == {"compile.sh"}


def test_the_script_has_the_batch_that_is_fixed(tmp_path):
    _, model = quantized(convnet(), "sophgo-bm1684x")
    write_deployment(model, tmp_path, batch=2)

    assert "--input_shapes '[[2,3,8,8]]'" in (tmp_path / "compile.sh").read_text()
    graph = onnx.load(tmp_path / "model.onnx").graph
    for value in (*graph.input, *graph.output):
        assert value.type.tensor_type.shape.dim[0].dim_value == 2


@pytest.mark.parametrize(
    ("rule", "overrides", "option"),
    [
        ("sophgo-bm1684x", (), "--quantize INT8 \\"),
        ("sophgo-bm1684x", load_rule("sophgo-bm1684x").asymmetric, "--quantize INT8 --asymmetric"),
        ("sophgo-bm1688", W4A4, "--quantize INT4 --tolerance"),
        ("sophgo-bm1684x", W4A4, "--quantize INT8 \\"),  # the chip has no 4 bits
    ],
)
def test_the_script_asks_for_the_mode_of_the_table(rule, overrides, option, tmp_path):
    _, model = quantized(convnet(), rule, overrides)
    script = write_deployment(model, tmp_path).files["compile.sh"].read_text()

    assert option in script
    assert ("--quantize_table model_qtable" in script) == ("INT4" in option)


def test_mindspore_is_told_the_widths(tmp_path):
    _, model = quantized(convnet(), "mindspore", ("weight.bits=7", "last.bits=8"))
    text = write_deployment(model, tmp_path).files["compile.txt"].read_text()

    assert "QuantDtype.INT8 for activations, QuantDtype.INT7 or QuantDtype.INT8 for weights" in text
