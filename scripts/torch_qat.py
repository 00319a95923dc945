"""PyTorch's FX graph-mode QAT with learnable fake-quantize: 8 bits, per-tensor."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.ao.quantization import MovingAverageMinMaxObserver, QConfig, QConfigMapping
from torch.ao.quantization._learnable_fake_quantize import _LearnableFakeQuantize
from torch.ao.quantization.quantize_fx import prepare_qat_fx

__all__ = ["quantized"]


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


def quantized(model: nn.Module, inputs: torch.Tensor) -> nn.Module:
    qconfig = QConfig(
        activation=learnable(0, 255, torch.quint8), weight=learnable(-128, 127, torch.qint8)
    )
    # for an embedding, PyTorch supports only per-row weights
    mapping = QConfigMapping().set_global(qconfig).set_object_type(nn.Embedding, None)
    model = prepare_qat_fx(model, mapping, example_inputs=(inputs,))
    for module in model.modules():
        if isinstance(module, _LearnableFakeQuantize):
            module.enable_param_learning()
    return model
