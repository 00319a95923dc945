"""What is asked of a path of data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from onnxqat.data.arrays import names
from onnxqat.data.classes import Classes
from onnxqat.data.feeds import InputSpec
from onnxqat.data.preprocess import Preprocessing
from onnxqat.errors import DataError

__all__ = ["Request", "Tokenization"]


@dataclass(frozen=True, kw_only=True)
class Tokenization:
    """How text becomes tokens, see `onnxqat.data.text`.

    Attributes
    ----------
    tokenizer : str or Path
        A ``tokenizer.json`` of the package tokenizers.
    fields : tuple of str
        The one or two fields that are the text (default: those of `onnxqat.data.text.PAIRS`).
    length : int or None
        Number of tokens of a sample. None: the model's own length if it is fixed, else that of the
        longest sample, at most 512.

    Raises
    ------
    DataError
        There are more than two fields, or the length is below 1.
    """

    tokenizer: str | Path
    fields: tuple[str, ...] = ()
    length: int | None = None

    def __post_init__(self) -> None:
        if len(self.fields) > 2:
            raise DataError(
                f"--text: {self.fields} are {len(self.fields)} fields. Give one or two."
            )
        if self.length is not None and self.length < 1:
            raise DataError(f"--max-tokens: {self.length} is too few. Give 1 or more.")


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked of a path; see `onnxqat.data.open_data`.

    Attributes
    ----------
    inputs : sequence of InputSpec
        Inputs of the model.
    preprocessing : Preprocessing
        Preprocessing of images.
    classes : Classes or None
        Classes of names; None: no labels are read.
    input_map : mapping of str to str
        Array by model input, where names differ.
    skip_broken : bool
        Log and skip files that cannot be read.
    boxes, masks : Path or None
        File or folder of boxes, folder of masks.
    split : str or None
        The split to read of a folder that has splits.
    text : Tokenization or None
        How text becomes tokens.
    """

    inputs: Sequence[InputSpec]
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    classes: Classes | None = None
    input_map: Mapping[str, str] = field(default_factory=dict)
    skip_broken: bool = False
    boxes: Path | None = None
    masks: Path | None = None
    split: str | None = None
    text: Tokenization | None = None

    def spec_of(self, key: str) -> InputSpec | None:
        """Return the model input that takes an array by its name; None without one."""
        keys = {spec.name: self.input_map.get(spec.name, spec.name) for spec in self.inputs}
        return next((spec for spec in self.inputs if keys[spec.name] == key), None)

    def only_input(self, where: str, what: str) -> InputSpec:
        """Return the only input of the model.

        Raises
        ------
        DataError
            There are several.
        """
        if len(self.inputs) != 1:
            raise DataError(
                f"{where}: {what} feed one input, but the model has "
                f"{names([spec.name for spec in self.inputs])}. Give .npz files."
            )
        return self.inputs[0]

    def refuse_beside(self, where: str) -> None:
        """Refuse boxes and masks for data that are not images.

        Raises
        ------
        DataError
            The user gave some.
        """
        for option, given in (("boxes", self.boxes), ("masks", self.masks)):
            if given is not None:
                raise DataError(
                    f"--{option}: belong to a folder of images or a list of them, but '{where}' is "
                    f"neither. Leave --{option} out."
                )
