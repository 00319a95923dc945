"""YOLOv5's parts, and the whole (ultralytics/yolov5, models/common.py, models/yolo.py)."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor, nn

__all__ = ["ANCHORS", "Anchors", "Bottleneck", "ConvSiLU", "Detect", "YoloV5"]

# By map and anchor: width and height in pixels.
Anchors: TypeAlias = tuple[tuple[tuple[int, int], ...], ...]
ANCHORS: Anchors = (((10, 13), (16, 30), (33, 23)), ((30, 61), (62, 45), (59, 119)),
                    ((116, 90), (156, 198), (373, 326)))  # fmt: skip


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

    def __init__(
        self, channels: list[int], classes: int, size: int, anchors: Anchors = ANCHORS
    ) -> None:
        super().__init__()
        self.values = classes + 5
        self.convs = nn.ModuleList(nn.Conv2d(c, 3 * self.values, 1) for c in channels)
        self.strides = (8, 16, 32)
        for level, stride in enumerate(self.strides):
            side = torch.arange(size // stride, dtype=torch.float32)
            y, x = torch.meshgrid(side, side, indexing="ij")
            self.register_buffer(f"grid{level}", torch.stack((x, y), 2)[None, None] - 0.5)
            sides = torch.tensor(anchors[level], dtype=torch.float32)
            self.register_buffer(f"anchor{level}", sides.view(1, 3, 1, 1, 2))

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
