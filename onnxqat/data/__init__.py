"""Open the data that the user names, and turn them into batches for a model.

Independent of ONNX graphs: here a model is a list of `InputSpec`.
"""

from __future__ import annotations

from onnxqat.data.arrays import BrokenError
from onnxqat.data.augmentation import Augmentation, augment
from onnxqat.data.batch import Batch
from onnxqat.data.classes import check_count, read_classes
from onnxqat.data.dataset import DataSet
from onnxqat.data.division import split
from onnxqat.data.feeds import InputSpec, check_preprocessing
from onnxqat.data.loader import open_data
from onnxqat.data.preprocess import Preprocessing
from onnxqat.data.request import Tokenization

__all__ = [
    "Augmentation",
    "Batch",
    "BrokenError",
    "DataSet",
    "InputSpec",
    "Preprocessing",
    "Tokenization",
    "augment",
    "check_count",
    "check_preprocessing",
    "open_data",
    "read_classes",
    "split",
]
