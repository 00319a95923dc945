from __future__ import annotations

import logging

import onnx
import pytest

from onnxqat.model import from_proto
from onnxqat.preparation import prepare


@pytest.mark.parametrize(
    ("rank", "shape", "batch"),
    [
        ("N,4,6", "1,24", 1),
        ("N,4,6", "3,24", 3),
        ("N,4,6", "2,2,12", 2),
        ("N,4,6", "-1,24", None),
        ("N,4,6", "0,24", None),
        ("N,4,6", "1,-1", None),  # the batch becomes part of the second axis
        ("N,4,6", "1,36", None),  # no number of samples has so many values
        ("N,4,H", "1,24", None),
        ("2,4,6", "2,24", None),
    ],
)
def test_a_reshape_that_holds_a_batch_is_named(
    rank: str, shape: str, batch: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    length = shape.count(",") + 1
    text = f"""<ir_version: 8, opset_import: ["": 17]> g (float[{rank}] x) => (float[A,B] y)
    <int64[{length}] s = {{{shape}}}> {{ a = Relu(x) y = Reshape(a, s) }}"""

    with caplog.at_level(logging.WARNING):
        prepare(from_proto(onnx.parser.parse_model(text), name="m.onnx"))

    expected = f"m.onnx: node 'Reshape_y' (Reshape) works only with batches of {batch}. "
    assert [expected in record.message for record in caplog.records] == [True] * (batch is not None)
