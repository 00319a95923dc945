"""LSTM, GRU and RNN in numpy, at any precision, as ONNX's pages define them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


FUNCTIONS: dict[str, Callable[..., Array]] = {
    "Affine": lambda x, alpha, beta: alpha * x + beta,
    "HardSigmoid": lambda x, alpha, beta: np.clip(alpha * x + beta, 0, 1),
    "ScaledTanh": lambda x, alpha, beta: alpha * np.tanh(beta * x),
    "Sigmoid": sigmoid,
    "Tanh": np.tanh,
}
USUAL = {"GRU": ["Sigmoid", "Tanh"], "LSTM": ["Sigmoid", "Tanh", "Tanh"], "RNN": ["Tanh"]}


def layer(op: str, feeds: Mapping[str, Array], attributes: Mapping[str, Any]) -> list[Array]:
    """Return Y, Y_h and, of an LSTM, Y_c.

    Parameters
    ----------
    feeds : mapping of str to array
        x, w, r; and b, lengths, h, c, p where they are given.
    """
    directions = len(feeds["w"])
    names = attributes.get("activations") or USUAL[op] * directions
    factors = {k: list(attributes.get(f"activation_{k}", [])) for k in ("alpha", "beta")}
    functions = []
    for name in names:
        takes = ("alpha", "beta") if name in ("Affine", "HardSigmoid", "ScaledTanh") else ()
        given = [factors[key].pop(0) for key in takes]
        functions.append(lambda x, f=FUNCTIONS[name], g=given: f(x, *g))
    backwards = {"forward": [False], "reverse": [True]}.get(
        attributes.get("direction", "forward"), [False, True]
    )
    each = len(functions) // directions
    found = [
        _direction(op, feeds, attributes, functions[d * each : (d + 1) * each], d, backwards[d])
        for d in range(directions)
    ]
    return [
        np.stack([f[i] for f in found], axis=1 if i == 0 else 0)
        for i in range(3 if op == "LSTM" else 2)
    ]


def _direction(op, feeds, attributes, functions, d, backwards):
    x, r = feeds["x"], feeds["r"][d]
    units, (steps, samples) = r.shape[1], x.shape[:2]
    none = np.zeros((samples, units), x.dtype)
    h = feeds["h"][d] if "h" in feeds else none
    c = feeds["c"][d] if "c" in feeds else none
    lengths = feeds.get("lengths", np.full(samples, steps))
    written = np.zeros((steps, samples, units), x.dtype)
    for t in range(steps)[:: -1 if backwards else 1]:
        step = {"LSTM": _lstm, "GRU": _gru, "RNN": _rnn}[op]
        new_h, new_c = step(feeds, attributes, functions, d, x[t], h, c)
        going = (t < lengths)[:, None]
        h, c = np.where(going, new_h, h), np.where(going, new_c, c)
        written[t] = np.where(going, new_h, 0)
    return written, h, c


def _parts(array, count):
    return np.split(array, count, axis=-1)


def _clipped(attributes, x):
    limit = attributes.get("clip")
    return x if limit is None else np.clip(x, -limit, limit)


def _bias(feeds, d, gates, units):
    if "b" not in feeds:
        return [[0.0] * gates] * 2
    return [_parts(half, gates) for half in _parts(feeds["b"][d], 2)]


def _lstm(feeds, attributes, functions, d, x, h, c):
    f, g, out = functions
    units = c.shape[-1]
    wb, rb = _bias(feeds, d, 4, units)
    products = x @ feeds["w"][d].T + h @ feeds["r"][d].T
    i, o, forget, new = (p + a + b for p, a, b in zip(_parts(products, 4), wb, rb, strict=True))
    pi, po, pf = _parts(feeds["p"][d], 3) if "p" in feeds else (0.0, 0.0, 0.0)
    i = f(_clipped(attributes, i + pi * c))
    forget = 1 - i if attributes.get("input_forget") else f(_clipped(attributes, forget + pf * c))
    c = forget * c + i * g(_clipped(attributes, new))
    return f(_clipped(attributes, o + po * c)) * out(c), c


def _gru(feeds, attributes, functions, d, x, h, c):
    f, g = functions
    (wz, wr, wh), (rz, rr, rh) = (np.split(feeds[k][d], 3) for k in "wr")
    (wbz, wbr, wbh), (rbz, rbr, rbh) = _bias(feeds, d, 3, h.shape[-1])
    z = f(_clipped(attributes, x @ wz.T + h @ rz.T + wbz + rbz))
    r = f(_clipped(attributes, x @ wr.T + h @ rr.T + wbr + rbr))
    if attributes.get("linear_before_reset"):
        inner = r * (h @ rh.T + rbh) + wbh
    else:
        inner = (r * h) @ rh.T + rbh + wbh
    return (1 - z) * g(_clipped(attributes, x @ wh.T + inner)) + z * h, c


def _rnn(feeds, attributes, functions, d, x, h, c):
    (wb,), (rb,) = _bias(feeds, d, 1, h.shape[-1])
    products = x @ feeds["w"][d].T + h @ feeds["r"][d].T
    return functions[0](_clipped(attributes, products + wb + rb)), c
