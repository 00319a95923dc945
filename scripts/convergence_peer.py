"""The peer of `convergence.py`: PyTorch's FX graph-mode QAT with learnable fake-quantize.

    TORCH_PYTHON scripts/convergence_peer.py JOB.json

`convergence.py` starts it with the Python of an environment that has torch, torchvision, onnx and
onnx2torch. It converts the ONNX file to torch, reports its float top-1, and fine-tunes it:

- Convolutions, linear layers (a MatMul with a constant and its Add become one), additions,
  concatenations, pooling and the two products of attention are quantized. Weights are symmetric,
  per-tensor or with a scale for each output channel; activations are per-tensor and asymmetric.
  BatchNormalization is fused for QAT; its averages are fixed, its scale and offset are trained.
  With 4 bits, the weights and inputs of the first and the last layer have 8 bits.
- `HistogramObserver`s with as many bins as the grid has levels set the scales on the calibration
  images; per-channel scales come from minimum and maximum. Then scales and zero points are learned
  (`_LearnableFakeQuantize`).
- FX quantizes the output of a Reshape, Transpose, Split or Pad again, with a scale of its own.
  These are removed, as in the other tool: the values are on a grid already.
- AdamW without weight decay, 5 % warm-up, cosine. The learning rate is that of the weights. It
  would not suit scales, which are small: their rate is relative to their size after calibration,
  and the rate of zero points is relative to the grid.

These settings were chosen by held-out figures at 4 bits. Histograms for weights and activations
were the best of four pairs before training on ResNet-20 and ShuffleNetV2 (for ResNet-8's weights,
minimum and maximum were 5 points better). Moving averages gave ResNet-20 a larger loss.
"""

from __future__ import annotations

import copy
import json
import math
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnx2torch import convert
from onnx2torch.node_converters.expand import OnnxExpand
from onnx2torch.node_converters.matmul import OnnxMatMul
from torch import fx, nn
from torch.ao.nn.intrinsic.qat import freeze_bn_stats
from torch.ao.quantization import (
    HistogramObserver,
    PerChannelMinMaxObserver,
    QConfig,
    QConfigMapping,
)
from torch.ao.quantization._learnable_fake_quantize import _LearnableFakeQuantize
from torch.ao.quantization.fx.custom_config import PrepareCustomConfig
from torch.ao.quantization.quantize_fx import prepare_qat_fx
from torch.nn import functional
from torch.nn.utils import parametrize

CALIBRATION_BATCH, TEST_BATCH = 128, 200
PASSING = {"reshape", "permute", "split", "getitem", "pad", "flatten", "transpose"}
PASSING_MODULES = (nn.Flatten, nn.MaxPool2d)


class Data:
    """Images of an .npz file, normalized batch by batch."""

    def __init__(self, path: str, mean: list[float], scale: list[float]) -> None:
        with np.load(path) as arrays:
            self.images, self.labels = arrays["images"], torch.tensor(arrays["label"])
        self.mean, self.scale = np.float32(mean), np.float32(scale)

    def batches(self, size: int, order: Any = None) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        order = np.arange(len(self.labels)) if order is None else order
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            values = (self.images[chosen] - self.mean) * self.scale
            yield torch.tensor(values.transpose(0, 3, 1, 2).copy()), self.labels[chosen]


def learnable(bits: int, *, weight: bool, channels: int = -1) -> Callable[..., nn.Module]:
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if weight else (0, 2**bits - 1)
    symmetric = torch.per_tensor_symmetric if channels < 0 else torch.per_channel_symmetric
    return _LearnableFakeQuantize.with_args(
        observer=HistogramObserver if channels < 0 else PerChannelMinMaxObserver,
        quant_min=low,
        quant_max=high,
        dtype=torch.qint8 if weight else torch.quint8,
        qscheme=symmetric if weight else torch.per_tensor_affine,
        scale=0.1,
        zero_point=0.0,
        channel_len=channels,
        use_grad_scaling=True,
    )


class Relative(nn.Module):
    """Parametrizes a scale as a multiple of its initial value, so that one rate suits all."""

    def __init__(self, size: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("size", size.clone())

    def forward(self, multiple: torch.Tensor) -> torch.Tensor:
        return self.size * multiple

    def right_inverse(self, scale: torch.Tensor) -> torch.Tensor:
        return scale / self.size


class ExpandToBatch(nn.Module):
    """Repeats a tensor for every image; a module of its own, so that FX sees one operation."""

    def forward(self, token: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        return token.expand(images.shape[0], -1, -1)


def read(path: str) -> fx.GraphModule:
    """Return the network as a module that FX can trace, with linear layers."""
    model = convert(path)
    modules = dict(model.named_modules())
    for node in list(model.graph.nodes):
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, OnnxExpand):  # of one token to the batch
            images = next(n for n in model.graph.nodes if n.op == "placeholder")
            model.add_submodule(str(node.target), ExpandToBatch())
            node.args = (node.args[0], images)
        if isinstance(module, OnnxMatMul) and node.args[1].op == "get_attr":
            _make_linear(model, node)
    model.graph.eliminate_dead_code()
    model.recompile()
    return model


def _make_linear(model: fx.GraphModule, product: fx.Node) -> None:
    weight = _value(model, product.args[1])
    (add,) = product.users
    bias = next(_value(model, a) for a in add.args if a is not product)
    layer = nn.Linear(*weight.shape)
    layer.weight.data, layer.bias.data = weight.T.clone(), bias.clone()
    model.add_submodule(str(product.target), layer)
    product.args = product.args[:1]
    add.replace_all_uses_with(product)


def _value(model: fx.GraphModule, node: fx.Node) -> torch.Tensor:
    value: Any = model
    for name in str(node.target).split("."):
        value = getattr(value, name)
    return value.detach()


def quantize(
    model: fx.GraphModule, example: torch.Tensor, bits: int, *, per_channel: bool
) -> fx.GraphModule:
    """Return the model prepared for QAT, the first and the last layer with 8 bits."""
    config = QConfig(activation=learnable(bits, weight=False), weight=learnable(bits, weight=True))
    mapping = QConfigMapping().set_global(config)
    opaque = PrepareCustomConfig().set_non_traceable_module_classes([ExpandToBatch])
    quantized = prepare_qat_fx(model.train(), mapping, (example,), opaque)
    _take_out_passed_on(quantized)
    layers = [
        n for n in quantized.graph.nodes if hasattr(_module(quantized, n), "weight_fake_quant")
    ]
    for layer in layers:
        ends = layer in (layers[0], layers[-1])
        module = _module(quantized, layer)
        module.weight_fake_quant = learnable(
            8 if ends else bits, weight=True, channels=len(module.weight) if per_channel else -1
        )()
    for layer in (layers[0], layers[-1]):
        source = str(_source(quantized, layer).target)
        quantized.set_submodule(source, learnable(8, weight=False)())
    return quantized


def _module(model: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    return model.get_submodule(str(node.target)) if node.op == "call_module" else None


def _source(model: fx.GraphModule, node: fx.Node) -> fx.Node:
    """Return what a node reads, before all that passes values on."""
    source = node.args[0]
    return _source(model, source) if _passes(model, source) else source


def _passes(model: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        return isinstance(_module(model, node), PASSING_MODULES)
    name = node.target if isinstance(node.target, str) else node.target.__name__
    return node.op.startswith("call") and name in PASSING


def _take_out_passed_on(model: fx.GraphModule) -> None:
    """Remove fake-quantization of what lies on a grid already."""
    for node in list(model.graph.nodes):
        if isinstance(_module(model, node), _LearnableFakeQuantize) and isinstance(
            _module(model, _source(model, node)), _LearnableFakeQuantize
        ):
            node.replace_all_uses_with(node.args[0])
            model.graph.erase_node(node)
    model.recompile()
    model.delete_all_unused_submodules()


def top1(model: nn.Module, data: Data) -> float:
    model.eval()
    with torch.no_grad():
        right = sum(int((model(x).argmax(1) == y).sum()) for x, y in data.batches(TEST_BATCH))
    return right / len(data.labels)


class Training:
    """Runs that start alike: what is trained, on what, by which loss."""

    def __init__(self, job: dict) -> None:
        self.job = job
        self.teacher = read(job["model"]).eval()
        self.data = {
            name: Data(job[name], job["mean"], job["scale"])
            for name in ("calibration", "train", "held", "test")
        }
        example = next(self.data["calibration"].batches(2))[0]
        self.model = quantize(
            read(job["model"]), example, job["bits"], per_channel=job["per_channel"]
        )
        self._calibrate()
        self.start = copy.deepcopy(self.model.state_dict())

    def _calibrate(self) -> None:
        learned = [m for m in self.model.modules() if isinstance(m, _LearnableFakeQuantize)]
        for module in learned:
            levels = module.quant_max - module.quant_min + 1
            module.activation_post_process.dst_nbins = levels  # of a HistogramObserver
        self.model.eval()
        with torch.no_grad():
            for inputs, _ in self.data["calibration"].batches(CALIBRATION_BATCH):
                self.model(inputs)
        for module in learned:
            module.enable_param_learning()
            parametrize.register_parametrization(module, "scale", Relative(module.scale.detach()))

    def loss(self, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        output = self.model(inputs)
        if self.job["loss"] == "cross-entropy":
            return functional.cross_entropy(output, labels)
        with torch.no_grad():
            taught = self.teacher(inputs).log_softmax(1)
        student = output.log_softmax(1)
        return functional.kl_div(student, taught, reduction="batchmean", log_target=True)

    def held_loss(self) -> float:
        self.model.eval()
        with torch.no_grad():
            batches = self.data["held"].batches(self.job["batch"])
            losses = [self.loss(*b).item() for b in batches if len(b[1]) == self.job["batch"]]
        return float(np.mean(losses))

    def run(self, rate: float, seed: int) -> None:
        """Train from the start."""
        self.model.load_state_dict(self.start)
        train, size, epochs = self.data["train"], self.job["batch"], self.job["epochs"]
        count = len(train.labels) // size * size
        optimizer = optimizer_of(self.model, rate, self.job["scale_rate"])
        rng = np.random.default_rng(seed)
        steps = count // size * epochs
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: factor(i, steps))
        self.model.train()
        self.model.apply(freeze_bn_stats)
        for _ in range(epochs):
            for inputs, labels in train.batches(size, rng.permutation(len(train.labels))[:count]):
                optimizer.zero_grad()
                self.loss(inputs, labels).backward()
                optimizer.step()
                schedule.step()


def optimizer_of(model: nn.Module, rate: float, scale_rate: float) -> torch.optim.Optimizer:
    groups, grids = [], set()
    for module in model.modules():
        if isinstance(module, _LearnableFakeQuantize):
            levels = module.quant_max - module.quant_min
            scale = module.parametrizations.scale.original
            groups += [
                {"params": [scale], "lr": scale_rate, "eps": 1e-12},
                {"params": [module.zero_point], "lr": scale_rate * levels, "eps": 1e-12},
            ]
            grids |= {scale, module.zero_point}
    others = [p for p in model.parameters() if p not in grids]
    return torch.optim.AdamW([{"params": others}, *groups], lr=rate, weight_decay=0.0)


def factor(step: int, steps: int) -> float:
    warmup = max(1, round(0.05 * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))


def main() -> None:
    warnings.simplefilter("ignore")
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(job["threads"])
    training = Training(job)
    test = training.data["test"]
    result = {"float": top1(training.teacher, test), "start": top1(training.model, test)}
    held, tuned = {}, {}
    for rate in job["rates"]:
        training.run(rate, job["seeds"][0])
        held[rate] = training.held_loss()
        if held[rate] <= min(held.values()):  # the best so far
            tuned = {"lr": rate, "tuned": [top1(training.model, test)]}
    for seed in job["seeds"][1:]:
        training.run(tuned["lr"], seed)
        tuned["tuned"].append(top1(training.model, test))
    print(json.dumps(result | {"held_loss": held} | tuned))


if __name__ == "__main__":
    main()
