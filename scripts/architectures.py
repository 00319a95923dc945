"""Networks that `export_graphs.py` exports, each in its usual size and in a tiny one.

The classifiers come from torchvision, BERT from transformers; U-Net and the detector are defined
here. Nothing is downloaded: weights are random, and `settle` makes them look trained.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from yolov5_network import YoloV5

__all__ = ["FAMILIES", "Family", "settle"]

SETTLING_BATCHES, SETTLING_SIZE = 3, 16  # batches for the statistics of batch normalization


def _torchvision_models() -> ModuleType:
    """Import torchvision with a torch that cannot load its compiled operators.

    The usual torchvision package is built for CUDA. With a CPU build of torch its operators (nms,
    roi_align) do not exist, and registering their fake kernels fails. Classifiers do not use them.
    """
    register = torch.library.register_fake

    def tolerant(name: Any, *arguments: Any, **options: Any) -> Any:
        if str(name).startswith("torchvision::"):
            return lambda function: function
        return register(name, *arguments, **options)

    with mock.patch.object(torch.library, "register_fake", tolerant):
        return importlib.import_module("torchvision.models")


models = _torchvision_models()


@dataclass(frozen=True, kw_only=True)
class Family:
    """One architecture.

    Attributes
    ----------
    full, small : callable
        Return the network, freshly initialized, in its usual and its tiny size.
    inputs : callable
        (batch size, whether for the small network) -> example inputs by name.
    outputs : tuple of str
        Names of the graph outputs.
    """

    full: Callable[[], nn.Module]
    small: Callable[[], nn.Module]
    inputs: Callable[[int, bool], dict[str, Tensor]]
    outputs: tuple[str, ...] = ("output",)


def settle(model: nn.Module, inputs: Callable[[int], dict[str, Tensor]]) -> None:
    """Make freshly initialized weights look trained, and put ``model`` into evaluation mode.

    Constant parameters (biases, scales of normalizations, zeroed heads) get noise, and batch
    normalization collects its statistics from a few random batches.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() > 1 and torch.all(parameter == parameter.flatten()[0]):
                parameter += torch.randn_like(parameter) * (0.1 if parameter.ndim < 2 else 0.02)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None  # the mean over all batches
        model.train()
        for _ in range(SETTLING_BATCHES):
            model(*inputs(SETTLING_SIZE).values())
    model.eval()


@contextmanager
def narrowed(factor: int) -> Iterator[None]:
    """Divide the channels of layers created inside by ``factor``, except images and classes."""

    def narrow(channels: int) -> int:
        return channels // factor if channels > 10 else channels

    def patched(kind: type[nn.Module], counts: int) -> Any:
        original = kind.__init__

        def initialize(self: nn.Module, *arguments: Any, **options: Any) -> None:
            options = {k: narrow(v) if k == "groups" else v for k, v in options.items()}
            sizes = map(narrow, arguments[:counts])
            original(self, *sizes, *arguments[counts:], **options)

        return mock.patch.object(kind, "__init__", initialize)

    with ExitStack() as stack:
        for kind, counts in ((nn.Conv2d, 2), (nn.BatchNorm2d, 1), (nn.Linear, 2)):
            stack.enter_context(patched(kind, counts))
        yield


def small_resnet(block: type[nn.Module]) -> nn.Module:
    with narrowed(8):
        return models.ResNet(block, [1, 1, 1, 1], num_classes=10)


def small_mobilenet_v2() -> nn.Module:
    settings = [[1, 16, 1, 1], [6, 24, 2, 2], [6, 32, 2, 1]]
    return models.MobileNetV2(10, width_mult=0.5, inverted_residual_setting=settings)


def small_mobilenet_v3() -> nn.Module:
    block = partial(models.mobilenetv3.InvertedResidualConfig, dilation=1, width_mult=0.5)
    settings = [
        block(16, 3, 16, 16, True, "RE", 2),
        block(16, 3, 72, 24, False, "RE", 2),
        block(24, 5, 96, 40, True, "HS", 2),
        block(40, 5, 120, 40, True, "HS", 1),
    ]
    return models.MobileNetV3(settings, last_channel=64, num_classes=10)


def small_efficientnet() -> nn.Module:
    block = partial(models.efficientnet.MBConvConfig, width_mult=0.5, depth_mult=0.5)
    settings = [
        block(1, 3, 1, 32, 16, 1),
        block(6, 3, 2, 16, 24, 2),
        block(6, 5, 2, 24, 40, 2),
    ]
    return models.EfficientNet(settings, dropout=0.2, last_channel=64, num_classes=10)


def small_vgg() -> nn.Module:
    with narrowed(16):
        model = models.vgg16_bn(num_classes=10)
    model.avgpool = nn.AdaptiveAvgPool2d(1)  # a small image has only one pixel here
    model.classifier = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Dropout(), nn.Linear(64, 10))
    return model


def inception(*, factor: int = 1) -> nn.Module:
    classes = 10 if factor > 1 else 1000
    with narrowed(factor):  # the auxiliary head is not exported, and needs 299 pixels
        return models.inception_v3(aux_logits=False, init_weights=False, num_classes=classes)


def small_convnext() -> nn.Module:
    block = models.convnext.CNBlockConfig
    settings = [block(16, 32, 1), block(32, 48, 1), block(48, None, 1)]
    return models.ConvNeXt(settings, layer_scale=0.1, num_classes=10)


def small_swin() -> nn.Module:
    return models.SwinTransformer([4, 4], 16, [2, 2], [1, 2], [4, 4], num_classes=10)


def bert(**sizes: int) -> nn.Module:
    transformers = importlib.import_module("transformers")
    config = transformers.BertConfig(return_dict=False, attn_implementation="eager", **sizes)
    return transformers.BertForQuestionAnswering(config)


def token_inputs(batch: int, small: bool) -> dict[str, Tensor]:
    length, words = (16, 100) if small else (128, 30522)
    shape = (batch, length)
    return {
        "input_ids": torch.randint(0, words, shape),
        "attention_mask": torch.ones(shape, dtype=torch.int64),
        "token_type_ids": torch.zeros(shape, dtype=torch.int64),
    }


class UNet(nn.Module):
    """Ronneberger et al. 2015, https://arxiv.org/abs/1505.04597, padded, with normalization."""

    def __init__(self, width: int, depth: int, classes: int = 2) -> None:
        super().__init__()
        widths = [width << level for level in range(depth)]
        self.down = nn.ModuleList(map(self._double, [3, *widths[:-1]], widths))
        self.pool = nn.MaxPool2d(2)
        pairs = list(zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.grow = nn.ModuleList(nn.ConvTranspose2d(i, o, 2, stride=2) for i, o in pairs)
        self.up = nn.ModuleList(self._double(2 * o, o) for _, o in pairs)
        self.head = nn.Conv2d(width, classes, 1)

    @staticmethod
    def _double(inputs: int, outputs: int) -> nn.Module:
        layers: list[nn.Module] = []
        for channels in (inputs, outputs):
            layers += [nn.Conv2d(channels, outputs, 3, padding=1, bias=False)]
            layers += [nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
        return nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        kept: list[Tensor] = []
        for level, block in enumerate(self.down):
            x = block(self.pool(x) if level else x)
            kept.append(x)
        kept.pop()
        for grow, block in zip(self.grow, self.up, strict=True):
            x = block(torch.cat([kept.pop(), grow(x)], dim=1))
        return self.head(x)


def _image(
    full: Callable[[], nn.Module],
    small: Callable[[], nn.Module],
    *,
    size: int = 224,
    small_size: int = 32,
) -> Family:
    """Return a family that reads one RGB image, NCHW, of ``size`` pixels per side."""

    def inputs(batch: int, is_small: bool) -> dict[str, Tensor]:
        side = small_size if is_small else size
        # each image has a colour cast: averages of random pixels alone would all be alike
        return {"input": torch.randn(batch, 3, side, side) + torch.randn(batch, 3, 1, 1)}

    return Family(full=full, small=small, inputs=inputs)


FAMILIES: dict[str, Family] = {
    "resnet18": _image(models.resnet18, lambda: small_resnet(models.resnet.BasicBlock)),
    "resnet50": _image(models.resnet50, lambda: small_resnet(models.resnet.Bottleneck)),
    "mobilenet_v2": _image(models.mobilenet_v2, small_mobilenet_v2),
    "mobilenet_v3": _image(models.mobilenet_v3_small, small_mobilenet_v3),
    "efficientnet_b0": _image(models.efficientnet_b0, small_efficientnet),
    "shufflenet_v2": _image(
        models.shufflenet_v2_x1_0,
        lambda: models.ShuffleNetV2([1, 2, 1], [8, 16, 32, 64, 64], num_classes=10),
    ),
    "densenet121": _image(
        models.densenet121,
        lambda: models.DenseNet(8, (2, 2, 2, 2), 16, num_classes=10),
        small_size=64,
    ),
    "inception_v3": _image(inception, lambda: inception(factor=16), size=299, small_size=80),
    "vgg16_bn": _image(models.vgg16_bn, small_vgg),
    "convnext_tiny": _image(partial(models.convnext_tiny, layer_scale=0.1), small_convnext),
    "vit_b_16": _image(
        models.vit_b_16, lambda: models.VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=10)
    ),
    "swin_t": _image(models.swin_t, small_swin),
    "unet": _image(lambda: UNet(32, 4), lambda: UNet(4, 3)),
    "yolov5": _image(
        lambda: YoloV5(16, 80, 320), lambda: YoloV5(4, 3, 64), size=320, small_size=64
    ),
    "bert_base": Family(
        full=bert,
        small=lambda: bert(
            vocab_size=100,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=32,
        ),
        inputs=token_inputs,
        outputs=("start_logits", "end_logits"),
    ),
}
