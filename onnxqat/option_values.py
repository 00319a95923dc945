"""Convert the text of the commands' options to values; errors are errors of usage."""

from __future__ import annotations

import math
import re
from typing import Any

import click

from onnxqat.device import DEVICE

__all__ = [
    "AUGMENTATIONS",
    "read_augmentations",
    "read_device",
    "read_fields",
    "read_floats",
    "read_interval",
    "read_pairs",
    "read_scope",
    "read_shapes",
    "read_size",
    "read_widths",
    "use_preset",
]

AUGMENTATIONS = ("flip", "crop", "resized-crop", "jitter")
SCOPES = (("network",), ("blocks",), ("blocks", "network"))


def read_floats(_ctx: click.Context, _param: click.Parameter, value: str | None) -> Any:
    """Read ``1,2,3``."""
    if value is None:
        return None
    try:
        numbers = tuple(float(part) for part in value.split(","))
    except ValueError as error:
        raise click.BadParameter(f"'{value}' is not a list of numbers such as 1,2,3") from error
    if not all(math.isfinite(number) for number in numbers):
        raise click.BadParameter(f"'{value}' has a number that is not finite")
    return numbers


def use_preset(ctx: click.Context, _param: click.Parameter, value: str | None) -> None:
    """Use a preset's values as the defaults of options that are not given."""
    if value is not None:
        from onnxqat.errors import TrainingError
        from onnxqat.train.presets import preset

        try:
            ctx.default_map = {**(ctx.default_map or {}), **preset(value)}
        except TrainingError as error:
            raise click.BadParameter(str(error)) from error


def read_size(_ctx: click.Context, _param: click.Parameter, value: str | None) -> Any:
    """Read ``height,width``."""
    if value is None:
        return None
    try:
        height, width = (int(part) for part in value.split(","))
    except ValueError as error:
        raise click.BadParameter(f"'{value}' is not height,width such as 224,224") from error
    if min(height, width) < 1:
        raise click.BadParameter(f"'{value}' is not a size. Give height and width above 0")
    return height, width


def read_pairs(_ctx: click.Context, _param: click.Parameter, value: tuple[str, ...]) -> Any:
    """Read repeated ``NAME=ARRAY``; the name may contain a ``=``, the array may not."""
    pairs: dict[str, str] = {}
    for item in value:
        name, _, array = item.rpartition("=")
        if not (name and array):
            raise click.BadParameter(f"'{item}' is not of the form NAME=ARRAY")
        if pairs.setdefault(name, array) != array:
            raise click.BadParameter(f"'{name}' has two arrays: {pairs[name]} and {array}")
    return pairs or None


def read_shapes(_ctx: click.Context, _param: click.Parameter, value: tuple[str, ...]) -> Any:
    """Read repeated ``NAME:1,3,640,640``."""
    shapes = {}
    for item in value:
        name, _, text = item.rpartition(":")
        if not name or not re.fullmatch(r"[1-9]\d{0,8}(,[1-9]\d{0,8})*", text):
            raise click.BadParameter(f"'{item}' is not of the form NAME:1,3,640,640")
        shapes[name] = tuple(map(int, text.split(",")))
    return shapes or None


def read_augmentations(_ctx: click.Context, _param: click.Parameter, value: str | None) -> Any:
    """Read ``flip,crop``."""
    if value is None:
        return None
    chosen = tuple(part.strip() for part in value.split(","))
    for name in chosen:
        if name not in AUGMENTATIONS:
            raise click.BadParameter(f"'{name}' is not one of {', '.join(AUGMENTATIONS)}")
    return chosen


def read_fields(_ctx: click.Context, _param: click.Parameter, value: str | None) -> Any:
    """Read ``question,context``."""
    if value is None:
        return None
    names = tuple(part.strip() for part in value.split(","))
    if len(names) > 2 or not all(names):
        raise click.BadParameter(f"'{value}' is not one field, nor two such as question,context")
    return names


def read_widths(_ctx: click.Context, _param: click.Parameter, value: str | None) -> Any:
    """Read ``4,8``."""
    if value is None:
        return None
    try:
        return tuple(int(part) for part in value.split(","))
    except ValueError as error:
        raise click.BadParameter(f"'{value}' is not a list of widths such as 4,8") from error


def read_scope(_ctx: click.Context, _param: click.Parameter, value: str | None) -> Any:
    """Read ``blocks,network``."""
    if value is None:
        return None
    chosen = tuple(part.strip() for part in value.split(","))
    if chosen not in SCOPES:
        known = ", ".join(map(",".join, SCOPES[:-1]))
        raise click.BadParameter(f"'{value}' is not one of {known} and {','.join(SCOPES[-1])}")
    return chosen


def read_device(_ctx: click.Context, _param: click.Parameter, value: str) -> str:
    """Read ``auto``, ``cpu``, ``cuda`` or ``cuda:1``."""
    if not DEVICE.fullmatch(value):
        raise click.BadParameter(f"'{value}' is none of auto, cpu, cuda, cuda:0, cuda:1 and so on")
    return value


def read_interval(_ctx: click.Context, _param: click.Parameter, value: str) -> Any:
    """Read ``200steps``, ``5min`` or ``never`` as arguments of `onnxqat.train.Checkpoints`."""
    if value == "never":
        return None
    if re.fullmatch(r"[1-9]\d{0,8}steps", value):
        return {"steps": int(value.removesuffix("steps"))}
    if re.fullmatch(r"\d{1,6}(\.\d{1,6})?min", value):
        return {"minutes": float(value.removesuffix("min"))}
    raise click.BadParameter(f"'{value}' is not an interval such as 200steps, 5min or never")
