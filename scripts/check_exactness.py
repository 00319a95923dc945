"""Compare training form, saved Q/DQ file and rebuilt table bit for bit on real images.

    python scripts/check_exactness.py QDQ DATA [QDQ DATA ...]

Run each Q/DQ file in onnxruntime with optimizations off, on the first 256 samples. Compare with it
the forward pass of the training form, and (if the rule has a Sophgo table) the model rebuilt from
the stripped float model and its table. Exits with 1 if any value differs.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from vendor_check import feeds_of

from onnxqat.deploy import read_table, write_deployment
from onnxqat.errors import FormatError
from onnxqat.model import Model
from onnxqat.overrides import parse_override
from onnxqat.plan import make_plan
from onnxqat.preparation import prepare
from onnxqat.quantized import insert_pairs, load_model
from onnxqat.rules import load_rule
from onnxqat.runtime import open_session
from onnxqat.train.engine import forward_session
from onnxqat.train.form import training_form

SAMPLES, BATCH = 256, 32


def rebuilt(model: Model) -> Model | None:
    """Return the Q/DQ model that is rebuilt from the stripped model and its table."""
    plan = model.plan
    with tempfile.TemporaryDirectory() as folder:
        try:
            files = write_deployment(model, folder, table="sophgo").files
        except FormatError:
            return None  # it has zero points, so the rule is not a Sophgo rule
        floats = prepare(load_model(files["model"]))
        overrides = [parse_override(text) for text in plan.overrides]
        again, params = read_table(
            files["table"],
            floats,
            make_plan(floats.graph, load_rule(plan.rule), overrides),
            table="sophgo",
        )
    return insert_pairs(floats, again, params, state="calibrated")


def check(path: str, source: str) -> bool:
    model = load_model(path)
    feeds = feeds_of(model, source, SAMPLES)
    form = training_form(model)
    training, saved = forward_session(form), open_session(model.to_proto(), optimization="none")
    other = rebuilt(model)
    table = open_session(other.to_proto(), optimization="none") if other else None
    differing = {"training form": 0, "table": 0}
    count = 0
    for start in range(0, len(next(iter(feeds.values()))), BATCH):
        batch = {name: values[start : start + BATCH] for name, values in feeds.items()}
        expected = saved.run(None, batch)
        pairs = {"training form": training.run(None, batch | form.parameters)}
        if table:
            pairs["table"] = table.run(None, batch)
        count += sum(e.size for e in expected)
        for name, outputs in pairs.items():
            differing[name] += sum(
                int((a != b).sum()) for a, b in zip(outputs, expected, strict=True)
            )
    table_text = f"{differing['table']} differ" if table else "no Sophgo table"
    print(f"{Path(path).name}: {count} values; training form {differing['training form']} differ; "
          f"rebuilt from table: {table_text}")  # fmt: skip
    return not any(differing.values())


def main() -> None:
    arguments = sys.argv[1:]
    if not arguments or len(arguments) % 2:
        sys.exit(__doc__)
    results = [check(*pair) for pair in zip(arguments[::2], arguments[1::2], strict=True)]
    sys.exit(0 if all(results) else 1)


if __name__ == "__main__":
    main()
