"""Losses as ONNX nodes behind the outputs of a training form.

The teacher's outputs, labels and arrays of the data are inputs of the training graph, so that any
model, or a file of recorded outputs, can be the teacher.
"""

from onnxqat.train.losses.add import add_loss
from onnxqat.train.losses.default import Key, Part, default_loss, pieces, variances
from onnxqat.train.losses.graph import tensor_read
from onnxqat.train.losses.terms import KINDS, Loss, Term, parse_loss, read_loss
from onnxqat.train.losses.values import LABELS, TENSOR, Arrays, array_input, array_of, teacher_input

__all__ = [
    "KINDS",
    "LABELS",
    "TENSOR",
    "Arrays",
    "Key",
    "Loss",
    "Part",
    "Term",
    "add_loss",
    "array_input",
    "array_of",
    "default_loss",
    "parse_loss",
    "pieces",
    "read_loss",
    "teacher_input",
    "tensor_read",
    "variances",
]
