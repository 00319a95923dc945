"""Convert the options of the command line to the arguments of the verbs.

Each function removes the options that it needs from the parsed options (named in
`onnxqat.options`), and leaves the others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnxqat.calibration import Calibration
    from onnxqat.overrides import Override
    from onnxqat.settings import Settings
    from onnxqat.train import Config

__all__ = [
    "take_calibration",
    "take_config",
    "take_overrides",
    "take_settings",
    "take_source",
]

TEXT = ("tokenizer", "text_fields", "max_tokens")


# Said of the calibration and of the training together.
SHARED = ("batch_size", "seed", "threads", "device", "precision")


def take_settings(options: dict[str, Any]) -> Settings:
    """Take the data settings that a model file stores from a command's options."""
    from onnxqat.data import read_classes
    from onnxqat.settings import Settings

    names = [name for name in Settings.__struct_fields__ if name in options]
    taken = {name: options.pop(name) for name in names}
    if taken.get("classes") is not None:
        taken["classes"] = read_classes(taken["classes"])
    return Settings(**taken)


def take_source(source: str | None, options: dict[str, Any]) -> Any:
    """Take the data source, with the options that are not stored, from a command's options."""
    from onnxqat.data import Tokenization
    from onnxqat.errors import OptionError
    from onnxqat.verbs import DataSource

    names = ("layout", "skip_broken", "truth", "boxes", "masks", "split")
    said = {name: options.pop(name) for name in names if name in options}
    said["samples"] = options.pop("data_samples", None)
    tokenizer, fields, length = (options.pop(name, None) for name in TEXT)
    if tokenizer is not None:
        said["text"] = Tokenization(tokenizer=tokenizer, fields=fields or (), length=length)
    elif fields is not None or length is not None:
        raise OptionError("--text, --max-tokens: need --tokenizer.")
    return None if source is None else DataSource(source=source, **said)


def take_calibration(options: dict[str, Any]) -> Calibration:
    """Take the calibration settings from a command's options.

    Options that training also reads, with other defaults, stay in ``options``.
    """
    from onnxqat.calibration import Calibration

    taken = {name: options.pop(name) for name in ("observer", "samples")}
    shared = () if "epochs" in options else SHARED
    taken["bias_correction"] = options.pop("bias_correction", None)
    return Calibration(**taken, **{name: options.pop(name) for name in shared})


def take_overrides(options: dict[str, Any]) -> list[Override]:
    """Take the overrides from a command's options; ``--set`` overrides the file."""
    from onnxqat.overrides import parse_override, read_overrides

    file, texts = options.pop("overrides_file"), options.pop("overrides")
    return (read_overrides(file) if file else []) + [parse_override(text) for text in texts]


def take_config(options: dict[str, Any]) -> Config:
    """Return the training configuration from the remaining options of finetune.

    Options that were not given have their defaults.
    """
    from onnxqat.train import Config

    return Config(**{name: value for name, value in options.items() if value is not None})
