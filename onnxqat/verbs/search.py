"""Mixed precision: a width for each weight, within a budget."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from onnxqat import analysis
from onnxqat.analysis import Probe, Ranking, Search, Widths, metrics_of
from onnxqat.data import DataSet
from onnxqat.errors import DataError
from onnxqat.evaluation import check_interface
from onnxqat.evaluation.metrics import AnyMetric, fitted
from onnxqat.model import Model
from onnxqat.preparation import prepare
from onnxqat.rules import load_rule
from onnxqat.settings import Settings
from onnxqat.verbs.listener import Listener
from onnxqat.verbs.models import AnySource, float_model, quantized_model
from onnxqat.verbs.opening import TO_CHOOSE, AnyData, opened, read_alike, warn_if_unlike_training
from onnxqat.verbs.planning import AnyRule, rule_of, warn_of_widths

__all__ = ["Searched", "search"]


@dataclass(frozen=True, kw_only=True)
class Searched:
    """What a search found, and on how many samples.

    Attributes
    ----------
    search : Search
        The widths, and what was measured.
    ranking : Ranking
        What each weight costs.
    samples, val_samples : int
        How many ranked the weights, and how many the models were measured on.
    models : int
        How many models were made.
    """

    search: Search
    ranking: Ranking
    samples: int
    val_samples: int
    models: int


def search(
    model: AnySource,
    data: AnyData,
    *,
    max_loss: float | None = None,
    bits: float | None = None,
    widths: Iterable[int] | None = None,
    metric: AnyMetric = "top1",
    decode: str | None = None,
    val_data: AnyData | None = None,
    against: AnySource | None = None,
    rules: AnyRule | None = None,
    samples: int = 64,
    val_samples: int = 1000,
    seed: int = 0,
    settings: Settings = Settings(),  # noqa: B008 (frozen)
    batch_size: int | None = None,
    threads: int = 0,
    listener: Listener = Listener(),  # noqa: B008 (without state)
) -> Searched:
    """Choose a width for each weight, within a budget of accuracy or of bits.

    Parameters
    ----------
    model : str, Path or QuantizedModel
        Calibrated, not fine-tuned.
    data : path, arrays or DataSet
        With labels where the metric needs them.
    max_loss : float, optional
        Find the fewest bits whose cost is at most this many points: hundredths of the metric.
        Either this or ``bits`` is given.
    bits : float, optional
        Find the least cost whose average width, over the elements of all quantized weights, is at
        most this.
    widths : iterable of int, optional
        To choose from; by default those that the rule's chip has.
    metric : str or callable
        What a model costs: ``error``, a metric by name, a function of yours or its name; see
        `onnxqat.analysis.sensitivity`.
    decode : str, optional
        How outputs become boxes, see `onnxqat.evaluation.decoders`; by default by their shapes.
    val_data : path, arrays or DataSet, optional
        What models are measured on; by default samples of ``data`` that do not rank the weights.
    against : str, Path or Model, optional
        The float model; by default the one inside of the file.
    rules : str, Path or HardwareRule, optional
        The rule that the model was made with; by default the bundled one of its name.
    samples, val_samples : int
        How many samples rank the weights, and how many the models are measured on, at most.
    seed : int
        Of the choice of samples.
    settings : Settings
        What becomes of the data, where the model does not remember it.
    batch_size : int, optional
        Samples at a time; those of the model where it is fixed, else 32.
    threads : int
        0 takes all cores.
    listener : Listener
        Is told what is done.

    Raises
    ------
    OnnxQatError
        A file cannot be read, an argument is wrong, no model is within the budget, the data do not
        fit the model, or it cannot be run.
    """
    wanted = metrics_of(metric)
    loaded = quantized_model(model)
    rule = load_rule(loaded.plan.rule) if rules is None else rule_of(rules)
    choices = Widths(loaded, rule, analysis.widths_of(rule) if widths is None else widths)
    limit = None if max_loss is None else max_loss / 100
    analysis.check_budget(choices, max_loss=limit, bits=bits)
    warn_of_widths(rule, "weight", choices.widths)
    reference = None if against is None else float_model(against)
    read_alike(loaded, reference, settings)
    floats = _floats(loaded.floats, reference)
    labels = any(one.needs in ("labels", "everything") for one in wanted)
    names = [tensor.name for tensor in loaded.floats.graph.outputs]
    with (
        opened(loaded, data, settings, listener, beside=reference, labels=labels) as found,
        opened(loaded, found if val_data is None else val_data,
               Settings() if val_data is None else settings, listener,
               beside=reference, labels=labels, parts=TO_CHOOSE) as held,
    ):  # fmt: skip
        chosen, kept = _parts(found, None if held is found else held, samples, val_samples, seed)
        size = found.batch_size(batch_size)
        warn_if_unlike_training(loaded, found, batch_size=size, threads=threads)
        passes = analysis.ranking_passes(choices)
        most = analysis.verifying_passes(choices, by_loss=bits is None)
        listener.note(
            f"{passes} models of {len(chosen)} samples rank {len(choices.free)} weights; then at "
            f"most {most} are measured on {len(kept)} others."
        )
        found, measured = fitted(found, wanted, names, decode=decode)
        held, _ = fitted(held, wanted, names, decode=decode)
        probe = partial(Probe, floats, metric=measured[0] if measured else metric, threads=threads)
        with listener.batches("ranking", passes * -(-len(chosen) // size)) as advance:
            batches = partial(found.batches, size, indices=chosen)
            ranking = analysis.rank(choices, probe(batches, progress=advance))
        with listener.batches("measuring", most * -(-len(kept) // size)) as advance:
            batches = partial(held.batches, size, indices=kept)
            result = analysis.search(
                choices, ranking, probe(batches, progress=advance), max_loss=limit, bits=bits
            )
    return Searched(
        search=result,
        ranking=ranking,
        samples=len(chosen),
        val_samples=len(kept),
        models=passes + result.measured,
    )


def _floats(own: Model, reference: Model | None) -> Model:
    if reference is None:
        return own
    check_interface(own, reference)
    return prepare(reference, opset=own.graph.opset)


def _parts(
    data: DataSet, held: DataSet | None, samples: int, val_samples: int, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return which samples rank, and which others measure; at most half of the data rank.

    Raises
    ------
    DataError
        One sample cannot be both.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(data))
    if held is not None:
        others = rng.permutation(len(held))[:val_samples]
        return np.sort(order[:samples]), np.sort(others)
    if len(data) < 2:
        raise DataError(f"{data.name}: one sample cannot rank and measure. Give --val-data.")
    count = min(samples, len(data) // 2)
    return np.sort(order[:count]), np.sort(order[count : count + val_samples])
