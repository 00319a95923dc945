"""Compare the layers that analyze ranks first with those that cost most top-1 on the test data.

    python scripts/brute_force.py QDQ TRAIN TEST --results FILE.json [--samples N]

QDQ is a calibrated model whose file stores its preprocessing. ``analyze`` ranks its layers on 64
samples of TRAIN. Brute force runs all samples of TEST, or the first N, through the float model and
through each model with one quantized layer. Figures are kept in FILE.json, so that a stopped run
can continue. CPU seconds count all threads of the process.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

import onnxqat as oq
from onnxqat.analysis import Variants
from onnxqat.evaluation import evaluate

WORST = 5
POINT = 0.01


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("train", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--samples", type=int)
    arguments = parser.parse_args()
    known = json.loads(arguments.results.read_text()) if arguments.results.exists() else {}

    def measured(name: str, run: Callable[[], object]) -> dict:
        """Return the result and its CPU seconds, from the file if it is there."""
        if name not in known:
            started = time.process_time()
            found = run()
            known[name] = {"found": found, "seconds": time.process_time() - started}
            arguments.results.write_text(json.dumps(known, indent=2))
            print(name, known[name], flush=True)
        return known[name]

    model = oq.load_model(arguments.model)
    variants = Variants(model, oq.load_rule(model.plan.rule))
    ranked = measured("analyze", lambda: ranking(model, arguments.train))
    test = oq.open_data(arguments.test, oq.input_specs(model), **settings(model))
    chosen = np.arange(len(test))[: arguments.samples]

    def top1(one: oq.Model | oq.QuantizedModel) -> float:
        return evaluate(one, test.batches(32, indices=chosen)).metrics["top1"]

    floats = measured("float", partial(top1, model.floats))
    layers = [layer.node for layer in variants.layers]
    alone = {
        layer.node: measured(layer.node, partial(top1, variants.only([layer])))
        for layer in variants.layers
    }
    lost = {node: floats["found"] - alone[node]["found"] for node in layers}
    worst = sorted(layers, key=lost.get, reverse=True)[:WORST]
    first = ranked["found"][:WORST]
    print(f"{len(chosen)} test samples, float {100 * floats['found']:.2f} %")
    for node in worst:
        place = ranked["found"].index(node) + 1
        print(f"{node}: {100 * lost[node]:.2f} points alone, place {place} of analyze")
    costly = sum(lost[node] > POINT for node in layers)
    print(f"{costly} layers cost over one point; {len({*first} & {*worst})} of {WORST} agree")
    brute = floats["seconds"] + sum(one["seconds"] for one in alone.values())
    print(f"CPU seconds: analyze {ranked['seconds']:.1f}, brute force {brute:.1f}")


def ranking(model: oq.QuantizedModel, train: Path) -> list[str]:
    """Return the names of the layers in the order of analyze."""
    return [one.layer.node for one in oq.analyze(model, train).layers]


def settings(model: oq.QuantizedModel) -> dict[str, object]:
    """Return the preprocessing stored in a model, as arguments for open_data."""
    from onnxqat.settings import settle

    stored = settle(model, oq.Settings())
    return {"preprocessing": stored.preprocessing(None), "label": stored.label,
            "input_map": stored.input_map, "classes": stored.classes}  # fmt: skip


if __name__ == "__main__":
    main()
