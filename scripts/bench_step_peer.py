"""The peer of `bench_step.py`: PyTorch's training step.

    python bench_step_peer.py NAME SIZE BATCH export FILE
    python bench_step_peer.py NAME SIZE BATCH float|qat

Started by that script with the Python of an environment that has torch, torchvision and onnx.
``qat``: see `torch_qat`.
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
from torch_qat import quantized


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
