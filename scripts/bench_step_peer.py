"""The peer of `bench_step.py`: PyTorch's training step.

    python bench_step_peer.py NAME SIZE BATCH export FILE
    python bench_step_peer.py NAME SIZE BATCH float|qat

`bench_step.py` starts it with the Python of an environment that has torch, torchvision and onnx.
``qat`` is FX graph-mode QAT with learnable fake-quantize (torch.ao.quantization), 8 bits,
per-tensor.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable

import encoders
import torch
from architectures import _torchvision_models
from step_server import serve
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


def quantized(model: nn.Module, inputs: torch.Tensor) -> nn.Module:
    qconfig = QConfig(
        activation=learnable(0, 255, torch.quint8), weight=learnable(-128, 127, torch.qint8)
    )
    # an embedding only takes weights with a scale per row
    mapping = QConfigMapping().set_global(qconfig).set_object_type(nn.Embedding, None)
    model = prepare_qat_fx(model, mapping, example_inputs=(inputs,))
    for module in model.modules():
        if isinstance(module, _LearnableFakeQuantize):
            module.enable_param_learning()
    return model


def main() -> None:
    warnings.simplefilter("ignore")
    name, size, batch, kind = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    torch.manual_seed(0)
    torch.set_num_threads(2)
    inputs, labels = torch.randn(batch, 3, size, size), torch.randint(0, 1000, (batch,))
    if hasattr(encoders, name):
        model = getattr(encoders, name)(size)
    else:
        model = getattr(_torchvision_models(), name)(weights=None, num_classes=1000)
    if name == "bert_mini":
        inputs = torch.randint(0, encoders.WORDS, (batch, size))
    if kind == "export":
        torch.onnx.export(model.eval(), (inputs,), sys.argv[5], dynamo=False, opset_version=17,
                          input_names=["input"], output_names=["output"])  # fmt: skip
        return
    model = model.train()
    serve(step_of(model if kind == "float" else quantized(model, inputs), inputs, labels))


if __name__ == "__main__":
    main()
