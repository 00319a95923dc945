"""Search a mixed precision: a width for each weight, within a budget."""

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
    """The result of a search.

    Attributes
    ----------
    search : Search
        The widths and the measurements.
    ranking : Ranking
        The cost of each weight.
    samples, val_samples : int
        The number of samples that ranked the weights, and on which models were measured.
    models : int
        The number of models that were made.
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
        A calibrated model that is not fine-tuned.
    data : path, arrays or DataSet
        The samples, with labels if the metric needs them.
    max_loss : float, optional
        Find the fewest bits whose cost is at most this many points (hundredths of the metric).
        Give either this or ``bits``.
    bits : float, optional
        Find the smallest cost with at most this average width, over the elements of all quantized
        weights.
    widths : iterable of int, optional
        The widths to choose from (default: those of the rule's chip).
    metric : str or callable
        The cost of a model: ``error``, the name of a metric, or your own function or its name; see
        `onnxqat.analysis.sensitivity`.
    decode : str, optional
        How outputs are decoded to boxes, see `onnxqat.evaluation.decoders` (default: chosen by
        their shapes).
    val_data : path, arrays or DataSet, optional
        Samples on which models are measured (default: those of ``data`` that do not rank weights).
    against : str, Path or Model, optional
        The float model (default: the one inside the file).
    rules : str, Path or HardwareRule, optional
        The rule that the model was made with (default: the bundled rule of that name).
    samples, val_samples : int
        The most samples that rank the weights, and on which models are measured.
    seed : int
        The seed of the choice of samples.
    settings : Settings
        How data become model inputs, for settings that the model does not store.
    batch_size : int, optional
        Samples per batch (default: the model's fixed batch size, or 32).
    threads : int
        The number of threads (0: all cores).
    listener : Listener
        Gets messages and progress.

    Raises
    ------
    OnnxQatError
        A file cannot be read, an argument is wrong, no model is within the budget, the data do not
        fit the model, or the model does not run.
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
               beside=reference, labels=labels, splits=TO_CHOOSE) as held,
    ):  # fmt: skip
        chosen, kept = _parts(found, None if held is found else held, samples, val_samples, seed)
        size = found.batch_size(batch_size)
        warn_if_unlike_training(loaded, found, batch_size=size, threads=threads)
        passes = analysis.ranking_passes(choices)
        most = analysis.verifying_passes(choices, by_loss=bits is None)
        listener.note(
            f"{passes} models on {len(chosen)} samples rank {len(choices.free)} weights; then at "
            f"most {most} models are measured on {len(kept)} other samples."
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
    """Return the samples that rank weights (at most half), and those on which models are measured.

    Raises
    ------
    DataError
        There is only one sample.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(data))
    if held is not None:
        others = rng.permutation(len(held))[:val_samples]
        return np.sort(order[:samples]), np.sort(others)
    if len(data) < 2:
        raise DataError(
            f"{data.name}: one sample cannot both rank weights and measure models. Give --val-data."
        )
    count = min(samples, len(data) // 2)
    return np.sort(order[:count]), np.sort(order[count : count + val_samples])
