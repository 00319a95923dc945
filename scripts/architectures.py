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


class ConvSiLU(nn.Sequential):
    """Convolution, normalization, SiLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1) -> None:
        conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        super().__init__(conv, nn.BatchNorm2d(outputs, eps=1e-3), nn.SiLU())


class Bottleneck(nn.Module):
    """Two convolutions, with a residual if asked."""

    def __init__(self, channels: int, *, shortcut: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(ConvSiLU(channels, channels), ConvSiLU(channels, channels, 3))
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.shortcut else self.body(x)


class C3(nn.Module):
    """YOLOv5's cross-stage partial block."""

    def __init__(self, inputs: int, outputs: int, depth: int, *, shortcut: bool = True) -> None:
        super().__init__()
        half = outputs // 2
        self.main, self.side = ConvSiLU(inputs, half), ConvSiLU(inputs, half)
        blocks = (Bottleneck(half, shortcut=shortcut) for _ in range(depth))
        self.blocks = nn.Sequential(*blocks)
        self.merge = ConvSiLU(outputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.merge(torch.cat((self.blocks(self.main(x)), self.side(x)), 1))


class SPPF(nn.Module):
    """YOLOv5's fast spatial pyramid pooling."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.enter = ConvSiLU(channels, channels // 2)
        self.leave = ConvSiLU(channels * 2, channels)
        self.pool = nn.MaxPool2d(5, stride=1, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        found = [self.enter(x)]
        for _ in range(3):
            found.append(self.pool(found[-1]))
        return self.leave(torch.cat(found, 1))


class Detect(nn.Module):
    """YOLOv5's head: three anchors per position, boxes decoded inside of the graph."""

    ANCHORS = (((10, 13), (16, 30), (33, 23)), ((30, 61), (62, 45), (59, 119)),
               ((116, 90), (156, 198), (373, 326)))  # fmt: skip

    def __init__(self, channels: list[int], classes: int, size: int) -> None:
        super().__init__()
        self.values = classes + 5
        self.convs = nn.ModuleList(nn.Conv2d(c, 3 * self.values, 1) for c in channels)
        self.strides = (8, 16, 32)
        for level, stride in enumerate(self.strides):
            side = torch.arange(size // stride, dtype=torch.float32)
            y, x = torch.meshgrid(side, side, indexing="ij")
            self.register_buffer(f"grid{level}", torch.stack((x, y), 2)[None, None] - 0.5)
            anchors = torch.tensor(self.ANCHORS[level], dtype=torch.float32)
            self.register_buffer(f"anchor{level}", anchors.view(1, 3, 1, 1, 2))

    def forward(self, *features: Tensor) -> Tensor:
        found = []
        for level, x in enumerate(features):
            x = self.convs[level](x)
            _, _, height, width = x.shape
            x = x.view(-1, 3, self.values, height, width).permute(0, 1, 3, 4, 2)
            xy, wh, scores = x.sigmoid().split((2, 2, self.values - 4), 4)
            xy = (xy * 2 + getattr(self, f"grid{level}")) * self.strides[level]
            wh = (wh * 2) ** 2 * getattr(self, f"anchor{level}")
            found.append(torch.cat((xy, wh, scores), 4).view(-1, 3 * height * width, self.values))
        return torch.cat(found, 1)


class YoloV5(nn.Module):
    """YOLOv5 (ultralytics/yolov5, models/yolov5n.yaml at width 16 and depth 1)."""

    def __init__(self, width: int, classes: int, size: int) -> None:
        super().__init__()
        c1, c2, c3, c4, c5 = (width << level for level in range(5))
        self.stem = nn.Sequential(ConvSiLU(3, c1, 6, 2), ConvSiLU(c1, c2, 3, 2), C3(c2, c2, 1))
        self.stem[0][0].padding = (2, 2)  # the kernel size is even
        self.stage3 = nn.Sequential(ConvSiLU(c2, c3, 3, 2), C3(c3, c3, 2))
        self.stage4 = nn.Sequential(ConvSiLU(c3, c4, 3, 2), C3(c4, c4, 3))
        self.stage5 = nn.Sequential(ConvSiLU(c4, c5, 3, 2), C3(c5, c5, 1), SPPF(c5))
        self.lateral5, self.lateral4 = ConvSiLU(c5, c4), ConvSiLU(c4, c3)
        self.upsample = nn.Upsample(scale_factor=2, mode="nearest")
        self.top4 = C3(2 * c4, c4, 1, shortcut=False)
        self.top3 = C3(2 * c3, c3, 1, shortcut=False)
        self.down3, self.down4 = ConvSiLU(c3, c3, 3, 2), ConvSiLU(c4, c4, 3, 2)
        self.bottom4 = C3(2 * c3, c4, 1, shortcut=False)
        self.bottom5 = C3(2 * c4, c5, 1, shortcut=False)
        self.detect = Detect([c3, c4, c5], classes, size)

    def forward(self, x: Tensor) -> Tensor:
        p3 = self.stage3(self.stem(x))
        p4 = self.stage4(p3)
        lateral5 = self.lateral5(self.stage5(p4))
        lateral4 = self.lateral4(self.top4(torch.cat((self.upsample(lateral5), p4), 1)))
        n3 = self.top3(torch.cat((self.upsample(lateral4), p3), 1))
        n4 = self.bottom4(torch.cat((self.down3(n3), lateral4), 1))
        n5 = self.bottom5(torch.cat((self.down4(n4), lateral5), 1))
        return self.detect(n3, n4, n5)


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
