"""Which device a word names, and what is said where it cannot be used."""

from __future__ import annotations

from dataclasses import replace

import onnxruntime as ort
import pytest
from click.testing import CliRunner

from onnxqat import device as devices
from onnxqat.calibration import Calibration
from onnxqat.cli import main
from onnxqat.device import CPU, Device, find_device
from onnxqat.environment import runtime_distribution
from onnxqat.errors import OptionError, TrainingError
from onnxqat.train import Config

NAME = runtime_distribution().partition(" ")[0]
INSTALL = (
    rf"Run: pip uninstall -y {NAME} && pip install 'onnxruntime-gpu\[cuda,cudnn\]>=1.30' "
    r"\(for CUDA 13\), or 'onnxruntime-gpu\[cuda,cudnn\]<1.25'\.$"
)


@pytest.fixture(autouse=True)
def unknown():
    devices._problem.cache_clear()
    yield
    devices._problem.cache_clear()


@pytest.fixture
def usable(monkeypatch):
    """GPUs 0 to 3 can be used."""
    monkeypatch.setattr(devices, "_problem", lambda i: None if i < 4 else "it is not there")


def test_without_a_gpu_auto_is_the_cpu():
    assert find_device("auto") == find_device("cpu") == CPU
    assert CPU.providers == ["CPUExecutionProvider"]
    assert str(CPU) == "cpu (fp32)"


def test_a_package_without_cuda_is_told_with_what_to_install():
    said = rf"^--device cuda: {runtime_distribution()} computes on the CPU alone\. {INSTALL}"
    with pytest.raises(OptionError, match=said):
        find_device("cuda")


def test_a_gpu_that_cannot_be_used_is_told_with_what_to_look_at(monkeypatch):
    """As of the GPU's package on a machine without one: a session is given the CPU instead."""
    found = ["CUDAExecutionProvider", *ort.get_available_providers()]
    monkeypatch.setattr(ort, "get_available_providers", lambda: found)
    said = rf"^--device cuda:2: .* cannot use GPU 2 \(.*\)\. Run nvidia-smi: .* {INSTALL}"
    with pytest.raises(OptionError, match=said):
        find_device("cuda:2")
    assert find_device("auto") == CPU


def test_a_usable_gpu_keeps_what_is_trained(usable):
    found = find_device("cuda:1")
    assert found == Device(kind="cuda", index=1, precision="tf32", resident=True, captures=True)
    assert found.name == "cuda:1"
    assert str(found) == "cuda:1 (tf32)"
    (name, options), other = found.providers
    assert (name, other) == ("CUDAExecutionProvider", "CPUExecutionProvider")
    assert options["device_id"] == "1"
    assert options["use_tf32"] == "1"
    assert "enable_cuda_graph" not in options
    assert replace(found, captured=True).providers[0][1] == options | {"enable_cuda_graph": "1"}
    exact = find_device("auto", "fp32")
    assert exact.providers[0][1]["use_tf32"] == "0"
    assert exact.index == 0


def test_each_process_takes_a_gpu_of_its_own(usable, monkeypatch):
    assert [find_device("cuda", rank=r, size=4).index for r in range(4)] == [0, 1, 2, 3]
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_RANK", "1")  # the second of its machine
    assert find_device("cuda", rank=5, size=8).index == 1
    monkeypatch.delenv("OMPI_COMM_WORLD_LOCAL_RANK")
    with pytest.raises(OptionError, match="--device cuda: it is not there"):
        find_device("cuda", rank=4, size=5)
    with pytest.raises(OptionError, match="2 processes would share one GPU"):
        find_device("cuda:1", rank=0, size=2)


@pytest.mark.parametrize("word", ["gpu", "cuda:", "cuda:x", "cpu:0", ""])
def test_a_word_that_is_no_device_is_refused(word):
    with pytest.raises(OptionError, match="Give auto, cpu, cuda or cuda:N"):
        find_device(word)
    with pytest.raises(OptionError, match="Give auto, cpu, cuda or cuda:N"):
        Calibration(device=word)
    with pytest.raises(TrainingError, match="device"):
        Config(device=word)
    done = CliRunner().invoke(main, ["evaluate", "a.onnx", "b.npz", f"--device={word}"])
    assert done.exit_code == 2
    assert "is none of auto, cpu, cuda" in done.stderr


def test_the_cpu_has_one_precision():
    with pytest.raises(OptionError, match="--precision tf32: the CPU computes in fp32"):
        find_device("auto", "tf32")
    assert find_device("cpu", "fp32") == CPU
    with pytest.raises(OptionError, match="Give tf32 or fp32"):
        Calibration(precision="fp16")
