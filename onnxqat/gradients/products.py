"""Gradients of matrix products.

With ``Y = A B``: ``dA = dY B^T`` and ``dB = A^T dY``, summed over the axes along which an operand
was broadcast (Giles 2008, "Collected matrix derivative results for forward and reverse mode
algorithmic differentiation", section 2.2.2).
"""

from __future__ import annotations

from collections.abc import Callable

from onnxqat.gradients.backward import Backward

__all__ = ["PRODUCTS"]

Found = dict[int, str]


def _matmul(b: Backward) -> Found:
    left, right = b.x, b.input(1)
    ranks = b.rank(left), b.rank(right)
    if ranks[1] == 1 or (ranks[0] == 1 and ranks[1] > 2):
        raise b.unsupported("a vector as right operand, or a vector times a batch of matrices")
    found = {}
    if ranks[0] == 1:
        if 0 in b.wanted:
            found[0] = b.op("MatMul", right, b.dy)
        if 1 in b.wanted:
            found[1] = b.op("Mul", b.unsqueeze(left, [1]), b.unsqueeze(b.dy, [0]))
        return found
    if 0 in b.wanted:
        found[0] = _summed(b, b.product(b.dy, right, trans_b=True), left, ranks)
    if 1 in b.wanted and ranks[1] == 2:  # one product for all matrices of the left operand
        rows = (b.op("Flatten", v, axis=-1) if ranks[0] > 2 else v for v in (left, b.dy))
        found[1] = b.product(*rows, trans_a=True)
    elif 1 in b.wanted:
        found[1] = _summed(b, b.product(left, b.dy, trans_a=True), right, ranks)
    return found


def _summed(b: Backward, terms: str, operand: str, ranks: tuple[int, int]) -> str:
    """Sum over the leading axes along which an operand was broadcast."""
    own, shape, result = b.rank(operand), b.shape(operand), b.shape(b.y)
    if own == max(ranks) == 2:
        return terms
    if shape is not None and result is not None and None not in (*shape, *result):
        goal = (*result[:-2], *shape[-2:])
        b.scope.shapes[terms] = goal
        return b.summed_to(terms, operand, terms)
    return b.summed_to(terms, operand, terms)


def _gemm(b: Backward) -> Found:
    """Return the gradients of ``Y = alpha * op(A) op(B) + beta * C``."""
    left, right = b.x, b.input(1)
    turned = b.attribute("transA", 0), b.attribute("transB", 0)
    alpha, beta = b.attribute("alpha", 1.0), b.attribute("beta", 1.0)
    found = {}
    if 0 in b.wanted and not turned[0]:
        found[0] = b.op("Gemm", b.dy, right, alpha=alpha, transB=1 - turned[1])
    elif 0 in b.wanted:
        found[0] = b.op("Gemm", right, b.dy, alpha=alpha, transA=turned[1], transB=1)
    if 1 in b.wanted and not turned[1]:
        found[1] = b.op("Gemm", left, b.dy, alpha=alpha, transA=1 - turned[0])
    elif 1 in b.wanted:
        found[1] = b.op("Gemm", b.dy, left, alpha=alpha, transA=1, transB=turned[0])
    if 2 in b.wanted:
        total = b.summed_to(b.dy, b.input(2))
        found[2] = total if beta == 1 else b.op("Mul", total, float(beta))
    return found


PRODUCTS: dict[str, Callable[[Backward], Found]] = {"Gemm": _gemm, "MatMul": _matmul}
