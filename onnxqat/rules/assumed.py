"""The combinations of what a rule assumes of its chip's arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from math import prod

import msgspec

from onnxqat.rules.schema import Arithmetic

__all__ = ["MOST_VARIANTS", "assumptions", "variants", "wrong_assumptions"]

MOST_VARIANTS = 8  # each is a run of the whole network


def assumptions(arithmetic: Arithmetic) -> dict[str, tuple[str, ...]]:
    """Return the keys that are assumed, with their plausible values.

    A key with a single value counts as known, so a rule that extends this one can settle it.
    """
    return {name: values for name, values in arithmetic.assumed.items() if len(values) > 1}


def variants(arithmetic: Arithmetic) -> tuple[tuple[dict[str, str], Arithmetic], ...]:
    """Return each combination of the assumed values, and the arithmetic with it.

    The arithmetic as the rule states it comes first. Without assumptions it is the only one.

    Examples
    --------
    >>> rule = Arithmetic(requantize="float", assumed={"rounding": ("half-even", "half-up")})
    >>> [(values, one.rounding) for values, one in variants(rule)]
    [({'rounding': 'half-even'}, 'half-even'), ({'rounding': 'half-up'}, 'half-up')]
    """
    open_keys = assumptions(arithmetic)
    stated = {name: getattr(arithmetic, name) for name in open_keys}
    found = [dict(zip(open_keys, chosen, strict=True)) for chosen in product(*open_keys.values())]
    found.sort(key=lambda values: values != stated)
    return tuple((values, msgspec.structs.replace(arithmetic, **values)) for values in found)


def wrong_assumptions(arithmetic: Arithmetic) -> Iterator[str]:
    """Yield what is wrong with the table ``assumed`` of a rule."""
    fields = {f.encode_name: f for f in msgspec.structs.fields(Arithmetic)}
    for name, values in arithmetic.assumed.items():
        if not isinstance(getattr(arithmetic, name, None), str):
            texts = [n for n in fields if isinstance(getattr(arithmetic, n, None), str)]
            yield f"assumed.{name}: must be a key whose values are words. Use one of {texts}."
            continue
        stated = getattr(arithmetic, name)
        if stated not in values or len(set(values)) != len(values):
            yield (
                f"assumed.{name} = {list(values)}. List each value once, and also the rule's own, "
                f"'{stated}'."
            )
        for value in values:
            try:
                msgspec.convert(value, fields[name].type)
            except msgspec.ValidationError as error:
                yield f"assumed.{name}: {error}."
    count = prod(map(len, arithmetic.assumed.values()))
    if count > MOST_VARIANTS:
        yield f"assumed: gives {count} combinations. Leave at most {MOST_VARIANTS}."
