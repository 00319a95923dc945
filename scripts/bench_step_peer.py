"""The peer of `bench_step.py`: PyTorch's training steps, one for each word on stdin.

Started by that script with the Python of an environment that has torch, torchvision and onnx. It
exports the network, then answers ``float`` and ``qat`` with the seconds of one step. ``qat`` is FX
graph-mode QAT with learnable fake-quantize (torch.ao.quantization), 8 bits, per-tensor.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable

import torch
from architectures import _torchvision_models
from torch import nn
from torch.ao.quantization import MovingAverageMinMaxObserver, QConfig, QConfigMapping
from torch.ao.quantization._learnable_fake_quantize import _LearnableFakeQuantize
from torch.ao.quantization.quantize_fx import prepare_qat_fx


def learnable(low: int, high: int, dtype: torch.dtype) -> Callable[[], nn.Module]:
    return _LearnableFakeQuantize.with_args(
        observer=MovingAverageMinMaxObserver,
        quant_min=low,
        quant_max=high,
        dtype=dtype,
        qscheme=torch.per_tensor_affine,
        scale=0.1,
        zero_point=0.0,
        use_grad_scaling=True,
    )


def step_of(model: nn.Module, inputs: torch.Tensor, labels: torch.Tensor) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    loss = nn.CrossEntropyLoss()

    def step() -> None:
        optimizer.zero_grad()
        loss(model(inputs), labels).backward()
        optimizer.step()

    return step


def main() -> None:
    warnings.simplefilter("ignore")
    name, size, batch, path = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    torch.manual_seed(0)
    torch.set_num_threads(2)
    make = getattr(_torchvision_models(), name)
    model = make(weights=None, num_classes=1000).eval()
    inputs, labels = torch.randn(batch, 3, size, size), torch.randint(0, 1000, (batch,))
    torch.onnx.export(model, (inputs,), path, dynamo=False, opset_version=17,
                      input_names=["input"], output_names=["output"])  # fmt: skip
    qconfig = QConfig(
        activation=learnable(0, 255, torch.quint8), weight=learnable(-128, 127, torch.qint8)
    )
    quantized = make(weights=None, num_classes=1000).train()
    mapping = QConfigMapping().set_global(qconfig)
    quantized = prepare_qat_fx(quantized, mapping, example_inputs=(inputs,))
    for module in quantized.modules():
        if isinstance(module, _LearnableFakeQuantize):
            module.enable_param_learning()
    steps = {
        "float": step_of(model.train(), inputs, labels),
        "qat": step_of(quantized, inputs, labels),
    }
    print("ready", flush=True)
    for word in sys.stdin:
        start = time.perf_counter()
        steps[word.strip()]()
        print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    main()
