"""Compare the layers that analyze ranks first with those that cost most top-1 on the test data.

    python scripts/brute_force.py QDQ TRAIN TEST --results FILE.json [--samples N]

QDQ is a calibrated model whose file stores its preprocessing. ``analyze`` ranks its layers on 64
samples of TRAIN. Brute force runs all samples of TEST, or N spread evenly, through the float model
and through each model with one quantized layer. Figures are kept in FILE.json, so that a stopped
run can continue. CPU seconds count all threads of the process.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import onnxqat as oq
from onnxqat.analysis import Variants

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
    found = compare(arguments.model, arguments.train, arguments.test,
                    results=arguments.results, samples=arguments.samples)  # fmt: skip
    print(f"float {100 * found['float']:.2f} %")
    for node, (points, place) in found["worst"].items():
        print(f"{node}: {points:.2f} points alone, place {place} of analyze")
    print(f"{found['costly']} layers cost over one point; {found['agree']} of {WORST} agree")
    print(f"CPU seconds: analyze {found['analyze']:.1f}, brute force {found['brute']:.1f}")


def compare(
    path: Path, train: Path, test: Path, *, results: Path, samples: int | None
) -> dict[str, Any]:
    """Rank the layers of a model both ways.

    Returns
    -------
    dict
        ``worst``: of the layers that cost most alone, the points and the place in the order of
        analyze; ``costly``: the number of layers that cost over one point; ``agree``: how many of
        the worst layers are the same; ``float``: top-1 of the float model; ``analyze``, ``brute``:
        CPU seconds.
    """
    known = json.loads(results.read_text()) if results.exists() else {}

    def measured(name: str, run: Callable[[], object]) -> dict[str, Any]:
        """Return the result and its CPU seconds, from the file if it is there."""
        if name not in known:
            started = time.process_time()
            found = run()
            known[name] = {"found": found, "seconds": time.process_time() - started}
            results.write_text(json.dumps(known, indent=2))
        one: dict[str, Any] = known[name]
        return one

    model = oq.load_model(path)
    variants = Variants(model, oq.load_rule(model.plan.rule))
    ranked = measured(
        "analyze", lambda: [one.layer.node for one in oq.analyze(model, train).layers]
    )
    source = oq.DataSource(source=test, samples=samples)

    def top1(one: oq.QuantizedModel, mode: str) -> float:
        return oq.evaluate(one, source, mode=mode).metrics["top1"]

    floats = measured("float", partial(top1, model, "float"))
    alone = {
        layer.node: measured(layer.node, partial(top1, variants.only([layer]), "qdq"))
        for layer in variants.layers
    }
    lost = {node: floats["found"] - one["found"] for node, one in alone.items()}
    worst = sorted(lost, key=lost.__getitem__, reverse=True)[:WORST]
    return {
        "float": floats["found"],
        "worst": {node: (100 * lost[node], ranked["found"].index(node) + 1) for node in worst},
        "costly": sum(cost > POINT for cost in lost.values()),
        "agree": len({*ranked["found"][:WORST]} & {*worst}),
        "analyze": ranked["seconds"],
        "brute": floats["seconds"] + sum(one["seconds"] for one in alone.values()),
    }


if __name__ == "__main__":
    main()
