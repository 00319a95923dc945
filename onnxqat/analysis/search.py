"""Mixed precision: choose the number of bits of each weight within a budget.

1. Rank. Give one weight at a time each narrower width, while all others have the widest. The cost
   is the error that this adds to the outputs. Errors of different layers are nearly independent, so
   costs add up (Zhou et al. 2018, https://arxiv.org/abs/1712.01048).
2. Order. Minimizing the total cost for a number of saved bits is a multiple-choice knapsack
   problem. Its Lagrangian relaxation narrows weights in the order of added cost per saved bit,
   along the lower convex hull of each weight's costs (Shoham and Gersho 1988,
   https://doi.org/10.1109/29.90373).
3. Verify. Measure whole models along this order, and the models with one width for all weights, on
   samples that were not used for ranking. Choose the best of the measured models.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from onnxqat.analysis.sensitivity import ERROR, Probe, cost_of, error_of
from onnxqat.analysis.widths import Weight, Widths
from onnxqat.errors import OptionError
from onnxqat.overrides import Override

__all__ = [
    "Found",
    "Move",
    "Ranking",
    "Search",
    "check_budget",
    "order_of",
    "rank",
    "ranking_passes",
    "search",
    "verifying_passes",
]

TRIES = 8  # single moves that are tried after the first model that loses too much
Costs = Mapping[int, float]


@dataclass(frozen=True, kw_only=True)
class Found:
    """A model that was measured.

    Attributes
    ----------
    bits : dict of str to int
        Width of each weight that has a choice.
    average : float
        Mean width over the elements of all quantized weights.
    cost : float
        Cost of the model, see `onnxqat.analysis.sensitivity`.
    """

    bits: Mapping[str, int]
    average: float
    cost: float


@dataclass(frozen=True, kw_only=True)
class Search:
    """The result of a search.

    Attributes
    ----------
    chosen : Found
        The best model within the budget.
    uniform : dict of int to Found
        For each width, the model in which all weights with a choice have it.
    weights : tuple of Weight
        All quantized weights, in the order of the plan.
    overrides : tuple of Override
        Overrides for ``insert``: the model's own, then those for the widths.
    measured : int
        Number of whole models that were measured.
    """

    chosen: Found
    uniform: Mapping[int, Found]
    weights: tuple[Weight, ...]
    overrides: tuple[Override, ...]
    measured: int


@dataclass(frozen=True, kw_only=True)
class Move:
    """A step of the order: one weight gets fewer bits."""

    tensor: str
    before: int
    bits: int
    slope: float  # added cost per saved bit


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """The cost of each weight at each width.

    Attributes
    ----------
    metric : str
        Name of the metric that defines the costs.
    costs : dict of str to dict of int to float
        By weight and width: the cost that the weight adds at this width. Without the widest width,
        and without weights that have no choice.
    """

    metric: str
    costs: Mapping[str, Costs]


def ranking_passes(widths: Widths) -> int:
    """Return the number of models that `rank` measures."""
    return 1 + len(widths.free) * (len(widths.widths) - 1)


def rank(widths: Widths, probe: Probe) -> Ranking:
    """Return the cost that each weight adds at each width, except the widest.

    The cost is the error of the outputs, because a few samples suffice to rank by it. The probe's
    metric is used only if no output has an error.
    """
    wide = widths.uniform(widths.widths[-1])
    first = probe.evaluation(widths.at(wide))
    metric = probe.measured if error_of(first) is None else None
    base = cost_of(first, metric)
    costs = {
        weight.tensor: {
            bits: cost_of(probe.evaluation(widths.at({**wide, weight.tensor: bits})), metric) - base
            for bits in widths.widths[:-1]
        }
        for weight in widths.free
    }
    return Ranking(metric=metric.name if metric else ERROR, costs=costs)


def order_of(widths: Widths, costs: Mapping[str, Costs]) -> list[Move]:
    """Return the moves from the widest to the narrowest model, cheapest per saved bit first."""
    moves = [m for weight in widths.free for m in _hull(weight, widths, costs[weight.tensor])]
    return sorted(moves, key=lambda move: move.slope)  # stable: ties in the order of the plan


def _hull(weight: Weight, widths: Widths, costs: Costs) -> Iterator[Move]:
    """Yield the moves of one weight along the lower convex hull of its costs.

    A narrower width that seems to cost less than a wider one does so by chance, so it gets the cost
    of the wider one.
    """
    known, least = {widths.widths[-1]: 0.0}, 0.0
    for bits in reversed(widths.widths[:-1]):
        if not math.isfinite(costs[bits]):
            break
        known[bits] = least = max(least, costs[bits])
    here = widths.widths[-1]
    while narrower := [bits for bits in known if bits < here]:

        def slope(bits: int, start: int = here) -> float:
            return (known[bits] - known[start]) / ((start - bits) * weight.elements)

        best = min(narrower, key=lambda bits: (slope(bits), bits))
        yield Move(tensor=weight.tensor, before=here, bits=best, slope=slope(best))
        here = best


def search(
    widths: Widths,
    ranking: Ranking,
    probe: Probe,
    *,
    max_loss: float | None = None,
    bits: float | None = None,
) -> Search:
    """Choose a width for each weight.

    Parameters
    ----------
    widths : Widths
        The model and its possible widths.
    ranking : Ranking
        The result of `rank`.
    probe : Probe
        Measures whole models; its samples must not be those of the ranking.
    max_loss : float
        Find the fewest bits with at most this cost. Give either ``max_loss`` or ``bits``.
    bits : float
        Find the least cost with at most this average width.

    Raises
    ------
    OptionError
        No model is within the budget.
    """
    check_budget(widths, max_loss=max_loss, bits=bits)
    moves = order_of(widths, ranking.costs)
    measured = _Measured(widths, probe)
    uniform = {width: measured(widths.uniform(width)) for width in widths.widths}
    if bits is not None:
        measured(_filled(widths, moves, bits))
        within = [found for found in measured.all if found.average <= bits]
        chosen = min(within, key=lambda found: (_worst(found.cost), found.average))
    else:
        assert max_loss is not None
        _check_reachable(uniform[widths.widths[-1]], widths, max_loss)
        _narrow(widths, moves, measured, max_loss)
        within = [found for found in measured.all if found.cost <= max_loss]
        chosen = min(within, key=lambda found: (found.average, found.cost))
    return Search(
        chosen=chosen,
        uniform=uniform,
        weights=widths.weights,
        overrides=widths.overrides(chosen.bits),
        measured=len(measured.all),
    )


def verifying_passes(widths: Widths, *, by_loss: bool) -> int:
    """Return the maximum number of whole models that a search measures."""
    moves = len(widths.free) * (len(widths.widths) - 1)
    return len(widths.widths) + (math.ceil(math.log2(moves + 1)) + TRIES if by_loss else 1)


class _Measured:
    """Measures models and keeps the results; each model is measured once."""

    def __init__(self, widths: Widths, probe: Probe) -> None:
        self._widths, self._probe = widths, probe
        self.all: list[Found] = []

    def __call__(self, choice: Mapping[str, int]) -> Found:
        for found in self.all:
            if found.bits == choice:
                return found
        cost = self._probe(self._widths.at(choice))
        average = self._widths.average(choice)
        self.all.append(Found(bits=dict(choice), average=average, cost=cost))
        return self.all[-1]


def _after(widths: Widths, moves: Sequence[Move]) -> dict[str, int]:
    """Return the widths after making these moves from the widest model."""
    return widths.uniform(widths.widths[-1]) | {move.tensor: move.bits for move in moves}


def _filled(widths: Widths, moves: Sequence[Move], bits: float) -> dict[str, int]:
    """Return the widths after the fewest moves that meet the average, minus superfluous moves.

    The last move may save more bits than needed. Earlier moves that the surplus allows are undone,
    the most expensive first.
    """
    choice, taken = widths.uniform(widths.widths[-1]), list[Move]()
    for move in moves:
        if widths.average(choice) <= bits:
            break
        choice[move.tensor] = move.bits
        taken.append(move)
    for move in reversed(taken):
        wider = {**choice, move.tensor: move.before}
        if choice[move.tensor] == move.bits and widths.average(wider) <= bits:
            choice = wider
    return choice


def _narrow(widths: Widths, moves: Sequence[Move], measured: _Measured, max_loss: float) -> None:
    """Measure models along the order: find the last one within the loss by bisection, then go on.

    After it, each further move is tried alone, and left out if the model loses too much.
    """
    low, high = 0, len(moves) + 1  # after `low` moves the loss is within, after `high` it is not
    while high - low > 1:
        middle = (low + high) // 2
        if measured(_after(widths, moves[:middle])).cost <= max_loss:
            low = middle
        else:
            high = middle
    choice, left_out = _after(widths, moves[:low]), set[str]()
    tries = 0
    for move in moves[low:]:
        if tries == TRIES:
            break
        if move.tensor in left_out:
            continue
        tries += 1
        narrower = {**choice, move.tensor: move.bits}
        if measured(narrower).cost <= max_loss:
            choice = narrower
        else:
            left_out.add(move.tensor)


def _worst(cost: float) -> float:
    """Return the cost, or infinity for NaN, so that NaN counts as the worst."""
    return math.inf if math.isnan(cost) else cost


def check_budget(widths: Widths, *, max_loss: float | None, bits: float | None) -> None:
    """Check a budget.

    Raises
    ------
    OptionError
        Not exactly one budget is given, it is not valid, or no choice of widths meets it.
    """
    if (max_loss is None) == (bits is None):
        raise OptionError("search: give either --max-loss or --bits.")
    if max_loss is not None and not 0 <= max_loss < math.inf:
        raise OptionError(f"--max-loss {100 * max_loss:g}: give 0 or more.")
    least = widths.average(widths.uniform(widths.widths[0]))
    if bits is not None and not bits >= least:
        raise OptionError(
            f"--bits {bits:g}: the average is at least {least:.2f} with the widths "
            f"{', '.join(map(str, widths.widths))}. Give more bits, or narrower --widths."
        )


def _check_reachable(wide: Found, widths: Widths, max_loss: float) -> None:
    if not wide.cost <= max_loss:
        raise OptionError(
            f"--max-loss {100 * max_loss:g}: even with {widths.widths[-1]} bits for all weights, "
            f"{100 * wide.cost:.2f} points are lost. Repair the model first (insert --equalize, "
            "another --observer), or allow a larger loss."
        )
