"""Modules list operators for a reason of their own, or ask the table."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

from onnx import defs

from onnxqat.operators import OPERATORS

PACKAGE = Path(__file__).parents[2] / "onnxqat"
ONNX = {schema.name for schema in defs.get_all_schemas() if schema.domain == ""}

# Modules that list operators for what they do with them themselves, and what that is.
OWN_LISTS = {
    "plan/attention.py": "what Sophgo's compiler makes one op of",
    "evaluation/integer/build.py": "kernels of the integer evaluation",
    "foreign.py": "what other tools write around their pairs",
    "formats/mnn.py": "what MNN's converter fuses",
    "formats/ncnn.py": "names of ncnn's layers",
    "formats/rockchip.py": "attributes whose defaults RKNN-Toolkit2 does not know",
    "formats/sophgo_names.py": "what Sophgo's compiler changes or reads in its own way",
    "gradients/": "a gradient for each operator",
    "outputs.py": "what class scores end in",
    "plan/masks.py": "what masks are made of",
    "preparation/arithmetic.py": "an evaluator for each operator",
    "preparation/conversion.py": "operators that onnx's version converter has wrong",
    "preparation/movement.py": "an evaluator for each operator",
    "repair/absorption.py": "what passes a constant on, and what can write and read one",
    "repair/expectations.py": "a mean for each operator that has one",
    "repair/norms.py": "the normalizations whose scale can take a channel's",
    "runtime.py": "advice for failures of onnxruntime",
    "train/lowering/": "which gradients there are",
    "train/memory.py": "whose output is the memory of their input",
    "train/resident/replayable.py": "kernels that a CUDA graph cannot replay",
    "validate/": "what onnxruntime dies of, and shapes",
    "versions.py": "operators that opsets changed",
}
# What many stages build or take apart, and of which nothing but what it computes is asked.
PLAIN = {
    *("Add", "Cast", "Constant", "Div", "Mul", "Shape", "Sub"),
    *("QuantizeLinear", "DequantizeLinear"),
}
# Modules that build graphs, or pass over single operators.
BUILDERS = {
    "plan/patterns.py": "the formulas of patterns",
    "preparation/passthrough.py": "Dropout, which does nothing in inference",
    "train/engine.py": "the loss that the runtime has",
    "train/fake_quantize.py": "the arithmetic of fake quantization",
    "train/losses/": "the arithmetic of losses",
    "train/resident/": "the arithmetic of optimizers",
}


@cache
def sources():
    paths = {path.relative_to(PACKAGE).as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}
    return [
        (name, ast.parse(path.read_text(encoding="utf-8")))
        for name, path in paths.items()
        if name not in ("operators.py", "nodes.py")
    ]


def exported(tree):
    """Return the nodes of ``__all__``."""
    assigned = (node for node in ast.walk(tree) if isinstance(node, ast.Assign))
    lists = (node for node in assigned if getattr(node.targets[0], "id", "") == "__all__")
    return {id(inner) for found in lists for inner in ast.walk(found)}


def is_op(node):
    return isinstance(node, ast.Constant) and node.value in ONNX


def listed(tree):
    """Yield the operators of each literal tuple, list, set or dictionary of nothing else."""
    skipped = exported(tree)
    for node in ast.walk(tree):
        keys = node.keys if isinstance(node, ast.Dict) else getattr(node, "elts", [])
        if len(keys) > 1 and all(map(is_op, keys)) and id(node) not in skipped:
            yield {key.value for key in keys}


def among(name, modules):
    folders = tuple(module for module in modules if module[-1] == "/")
    return name in modules or name.startswith(folders)


def test_no_module_lists_operators_but_for_a_reason_of_its_own():
    pairs = [PLAIN, {*PLAIN, "Clip"}]  # a Q/DQ pair below 8 bits has a Clip
    found = {name for name, tree in sources()
             for ops in listed(tree) if not any(ops <= pair for pair in pairs)}  # fmt: skip

    assert [name for name in sorted(found) if not among(name, OWN_LISTS)] == []
    assert [m for m in OWN_LISTS if not any(among(name, [m]) for name in found)] == []


def test_every_operator_that_a_module_names_is_in_the_table_or_named_on_purpose():
    named = {}
    for name, tree in sources():
        skipped = exported(tree)
        ops = {n.value for n in ast.walk(tree) if is_op(n) and id(n) not in skipped}
        if others := ops - OPERATORS.keys() - PLAIN:
            named[name] = others

    assert {name: ops for name, ops in named.items() if not among(name, OWN_LISTS | BUILDERS)} == {}
    assert [m for m in BUILDERS if not any(among(name, [m]) for name in named)] == []
