"""Describe a hardware rule in words."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from onnxqat.rules.assumed import assumptions
from onnxqat.rules.schema import Arithmetic, HardwareRule, OpRule, RuleException, RuleSpec

__all__ = ["describe_rule"]

AXES = {
    "channel": "per output channel",
    "head": "per head of an attention block",
    "none": "per-tensor",
}


def describe_rule(rule: HardwareRule) -> str:
    """Return the content of a rule as lines of text, for a person to read."""
    return "\n".join(_lines(rule))


def _lines(rule: HardwareRule) -> Iterator[str]:
    yield f"{rule.name}: {rule.summary}"
    yield f"vendor: {rule.vendor}"
    yield f"weights: {_listed(rule.weight_bits)}"
    yield f"activations: {_listed(rule.activation_bits)}"
    bias = f"int{rule.bias_bits}, scale_x * scale_w" if rule.bias == "int32" else "float"
    yield f"bias: {bias}"
    yield f"graph outputs: {rule.graph_outputs}"
    yield f"calibration table: {rule.table or 'none'}"
    if rule.float_type != "F32":
        yield f"ops in float: {rule.float_type}"
    for mode in ("symmetric", "asymmetric"):
        if overrides := getattr(rule, mode):
            yield f"second mode, {mode} activations: {' '.join(overrides)}"
    yield from (f"note: {text}" for text in rule.notes)
    yield "specs:"
    yield from (f"  {name}: {_spec(spec)}" for name, spec in rule.specs.items())
    yield "ops:"
    yield from (f"  {', '.join(names)}: {table}" for table, names in _same_tables(rule).items())
    if rule.fuse:
        yield "run as one: " + ", ".join("+".join(chain) for chain in rule.fuse)
    if rule.split:
        yield "run node by node: " + ", ".join(rule.split)
    yield from (f"float: {op}: {why}" for op, why in rule.kept_float.items())
    yield from (f"unsupported: {op}: {why}" for op, why in rule.unsupported.items())
    yield from (f"exception: {_exception(e)}" for e in rule.exceptions)
    yield "every other op stays float"
    yield f"arithmetic: {_arithmetic(rule.arithmetic)}"
    yield from (f"source: {text}" for text in rule.sources)


def _listed(widths: tuple[int, ...]) -> str:
    return " or ".join(map(str, widths)) + " bits"


def _spec(spec: RuleSpec) -> str:
    kind = {"signed": "signed", "unsigned": "unsigned", "from_range": "signed or unsigned by range"}
    words = [f"{spec.bits} bits", kind[spec.signedness]]
    words.append("symmetric" if spec.symmetric else "asymmetric")
    words.append(AXES[spec.axis])
    words += ["narrow range"] if spec.narrow_range else []
    words += ["zero_point off the center"] if spec.off_center else []
    words += ["power-of-two scale"] if spec.power_of_two else []
    words += [f"scales at most {spec.scale_ratio:g} times apart"] if spec.scale_ratio else []
    words += [f"fixed range {list(spec.fixed_range)}"] if spec.fixed_range else []
    words += [f"calibrated by {spec.observer}"] if spec.observer else []
    words += [f"range times {spec.range_factor:g}"] if spec.range_factor != 1 else []
    words += [f"fine-tuned by {spec.method}"] if spec.method else []
    words += [f"range at least {spec.min_range:g} wide"] if spec.min_range > 1e-12 else []
    return ", ".join(words)


def _same_tables(rule: HardwareRule) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, op in rule.ops.items():
        found.setdefault(_op(op), []).append(name)
    return found


def _op(op: OpRule) -> str:
    words = [f"{k} {v}" for k in ("inputs", "weight", "outputs") if (v := getattr(op, k))]
    words += ["quantized on the skip side only"] if op.reads == "residual" else []
    words += [f"parameters {op.parameters}"] if op.parameters != "own" else []
    words += ["constant in the output's scale"] if op.constant_scale == "output" else []
    return ", ".join(words)


def _arithmetic(arithmetic: Arithmetic | None) -> str:
    if arithmetic is None or arithmetic.requantize == "unknown":
        return "unknown; no integer evaluation"
    words = [f"requantize by {arithmetic.requantize}, {arithmetic.rounding}"]
    if arithmetic.product_rounding:
        words.append(f"products {arithmetic.product_rounding}")
    words.append(f"bias {arithmetic.bias_rounding}")
    words.append(f"float to integer {arithmetic.float_rounding}")
    for key, name in (("integer", "integer"), ("table", "table"), ("kept_float", "float")):
        if ops := getattr(arithmetic, key):
            words.append(f"{name}: {' '.join(ops)}")
    for key, values in assumptions(arithmetic).items():
        words.append(f"not documented, assumed: {key} {' or '.join(values)}")
    return "; ".join(words)


def _exception(exception: RuleException) -> str:
    given = msgspec.structs.asdict(exception)
    ops = ", ".join(given.pop("op"))
    changes, kept_float = given.pop("changes"), given.pop("kept_float")
    unsupported = given.pop("unsupported")
    attributes, reads_float = given.pop("attributes"), given.pop("reads_float")
    where = [f"{k} {v}" for k, v in {**given, **attributes}.items() if v not in (None, ())]
    if changes is not None:
        fields = msgspec.structs.asdict(changes).items()
        effect = ", ".join(f"{k} {v}" for k, v in fields if v is not None)
    else:
        effect = f"float: {kept_float}" if kept_float else f"unsupported: {unsupported}"
        effect += "; its inputs stay float" if reads_float else ""
    return f"{ops} with {', '.join(where)}: {effect}"
