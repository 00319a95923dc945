"""Networks that `bench_gpu.py` times, in plain torch: no torchvision is needed.

Each has a usual size and a tiny size, for trying the script on a CPU. Weights are random.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from encoders import ImageEncoder, vit_tiny
from torch import Tensor, nn

__all__ = ["NETWORKS", "Network"]


def conv(inputs: int, outputs: int, kernel: int, stride: int, act: type[nn.Module] | None,
         groups: int = 1) -> nn.Sequential:  # fmt: skip
    layers = [
        nn.Conv2d(inputs, outputs, kernel, stride, (kernel - 1) // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    ]
    return nn.Sequential(*layers, *([act()] if act else []))


class BasicBlock(nn.Module):
    """He et al. 2015, https://arxiv.org/abs/1512.03385, figure 5, left."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = conv(inputs, outputs, 3, stride, nn.ReLU)
        self.second = conv(outputs, outputs, 3, 1, None)
        same = stride == 1 and inputs == outputs
        self.short = nn.Identity() if same else conv(inputs, outputs, 1, stride, None)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.second(self.first(x)) + self.short(x))


def resnet18(width: int, classes: int) -> nn.Module:
    """Return the network of He et al. 2015, table 1; ``width`` is 64 there."""
    layers: list[nn.Module] = [conv(3, width, 7, 2, nn.ReLU), nn.MaxPool2d(3, 2, 1)]
    channels = width
    for stage in range(4):
        for block in range(2):
            stride = 2 if stage and not block else 1
            layers.append(BasicBlock(channels, width << stage, stride))
            channels = width << stage
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)
    )


class Inverted(nn.Module):
    """Sandler et al. 2018, https://arxiv.org/abs/1801.04381, table 1."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inputs * expansion
        grown = [conv(inputs, wide, 1, 1, nn.ReLU6)] if expansion > 1 else []
        self.layers = nn.Sequential(
            *grown, conv(wide, wide, 3, stride, nn.ReLU6, wide), conv(wide, outputs, 1, 1, None)
        )
        self.same = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.same else self.layers(x)


# expansion, channels, blocks, stride of the first: Sandler et al. 2018, table 2
STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1),
          (6, 160, 3, 2), (6, 320, 1, 1))  # fmt: skip


def mobilenet_v2(stages: int, last: int, classes: int) -> nn.Module:
    """Return the network of Sandler et al. 2018, table 2, with its first stages."""
    layers: list[nn.Module] = [conv(3, 32, 3, 2, nn.ReLU6)]
    channels = 32
    for expansion, outputs, blocks, stride in STAGES[:stages]:
        for block in range(blocks):
            layers.append(Inverted(channels, outputs, 1 if block else stride, expansion))
            channels = outputs
    layers += [conv(channels, last, 1, 1, nn.ReLU6), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(last, classes))


class Bottleneck(nn.Module):
    """A 1x1 and a 3x3 convolution with a shortcut, as in YOLOv5."""

    def __init__(self, channels: int, *, shortcut: bool) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            conv(channels, channels, 1, 1, nn.SiLU), conv(channels, channels, 3, 1, nn.SiLU)
        )
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.shortcut else self.layers(x)


class C3(nn.Module):
    """A cross-stage partial block (https://arxiv.org/abs/1911.11929), as in YOLOv5."""

    def __init__(self, inputs: int, outputs: int, blocks: int, *, shortcut: bool = True) -> None:
        super().__init__()
        half = outputs // 2
        self.left, self.right = (conv(inputs, half, 1, 1, nn.SiLU) for _ in range(2))
        self.blocks = nn.Sequential(*(Bottleneck(half, shortcut=shortcut) for _ in range(blocks)))
        self.out = conv(outputs, outputs, 1, 1, nn.SiLU)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.cat((self.blocks(self.left(x)), self.right(x)), 1))


class Pyramid(nn.Module):
    """Successive poolings whose outputs are concatenated, as in YOLOv5 (SPPF)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.narrow = conv(channels, channels // 2, 1, 1, nn.SiLU)
        self.pool = nn.MaxPool2d(5, 1, 2)
        self.out = conv(2 * channels, channels, 1, 1, nn.SiLU)

    def forward(self, x: Tensor) -> Tensor:
        x = self.narrow(x)
        a = self.pool(x)
        b = self.pool(a)
        return self.out(torch.cat((x, a, b, self.pool(b)), 1))


class Detector(nn.Module):
    """A network like YOLOv5s (https://github.com/ultralytics/yolov5, models/yolov5s.yaml).

    Three strides, each with an output of 255 channels; ``width`` is 32 there.
    """

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        w, silu = width, nn.SiLU
        self.stem = nn.Sequential(
            conv(3, w, 6, 2, silu), conv(w, 2 * w, 3, 2, silu), C3(2 * w, 2 * w, 1)
        )
        self.fine = nn.Sequential(conv(2 * w, 4 * w, 3, 2, silu), C3(4 * w, 4 * w, 2))
        self.middle = nn.Sequential(conv(4 * w, 8 * w, 3, 2, silu), C3(8 * w, 8 * w, 3))
        self.coarse = nn.Sequential(
            conv(8 * w, 16 * w, 3, 2, silu), C3(16 * w, 16 * w, 1), Pyramid(16 * w)
        )
        self.lateral5 = conv(16 * w, 8 * w, 1, 1, silu)
        self.lateral4 = conv(8 * w, 4 * w, 1, 1, silu)
        self.up = nn.Upsample(scale_factor=2.0, mode="nearest")
        self.down4 = C3(16 * w, 8 * w, 1, shortcut=False)
        self.out3 = C3(8 * w, 4 * w, 1, shortcut=False)
        self.step4 = conv(4 * w, 4 * w, 3, 2, silu)
        self.out4 = C3(8 * w, 8 * w, 1, shortcut=False)
        self.step5 = conv(8 * w, 8 * w, 3, 2, silu)
        self.out5 = C3(16 * w, 16 * w, 1, shortcut=False)
        self.heads = nn.ModuleList(nn.Conv2d(c * w, outputs, 1) for c in (4, 8, 16))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        fine = self.fine(self.stem(x))
        middle = self.middle(fine)
        top = self.lateral5(self.coarse(middle))
        inner = self.lateral4(self.down4(torch.cat((self.up(top), middle), 1)))
        low = self.out3(torch.cat((self.up(inner), fine), 1))
        mid = self.out4(torch.cat((self.step4(low), inner), 1))
        high = self.out5(torch.cat((self.step5(mid), top), 1))
        return self.heads[0](low), self.heads[1](mid), self.heads[2](high)


@dataclass(frozen=True)
class Network:
    """One network.

    Attributes
    ----------
    usual, tiny : callable
        Make it.
    size, tiny_size : int
        Height and width of its images.
    batch, tiny_batch : int
        Images of a step.
    outputs : tuple of str
        Their names; several are taught by targets of random numbers, one holds class scores.
    """

    usual: Callable[[], nn.Module]
    tiny: Callable[[], nn.Module]
    size: int
    tiny_size: int
    batch: int
    tiny_batch: int
    outputs: tuple[str, ...] = ("output",)


NETWORKS = {
    "resnet18": Network(
        lambda: resnet18(64, 1000), lambda: resnet18(8, 1000), 224, 64, 32, 4
    ),
    "mobilenet_v2": Network(
        lambda: mobilenet_v2(7, 1280, 1000), lambda: mobilenet_v2(3, 64, 1000), 224, 64, 32, 4
    ),
    "yolov5s_like": Network(
        lambda: Detector(32, 255), lambda: Detector(4, 21), 640, 64, 16, 2,
        ("fine", "middle", "coarse"),
    ),
    "vit_tiny": Network(
        lambda: vit_tiny(224),
        lambda: ImageEncoder(64, width=48, depth=2, heads=3, classes=1000),
        224, 64, 64, 4,
    ),
}  # fmt: skip
