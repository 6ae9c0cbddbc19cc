"""What a choice of layers costs: error as it runs, time, matrix products."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfamp.analysis.bench import flops
from tfamp.analysis.probe import steps as probe_steps
from tfamp.analysis.tune.gradient import Gradients
from tfamp.precision.computing import computing_in, layers_in_16_bits

_ROUNDS = 5

Cost = dict[str, float]


def costs_of(
    gradients: Gradients,
    precision: str,
    *,
    everything: Sequence[keras.layers.Layer],
    tuned: Sequence[keras.layers.Layer],
    eight_bits: Collection[keras.layers.Layer],
    scale: float,
) -> dict[str, Cost]:
    """Error and time of the model as it is, without a switch in it.

    Args:
        gradients: of the model.
        precision: the policy of what is in 16 bits.
        everything: the layers of all units.
        tuned: those that are not put back.
        eight_bits: of them, those that multiply 8-bit numbers.
        scale: the loss scale.

    Returns:
        For "float32", "all" and "tuned", `error` and `milliseconds`, of a
        forward and a backward pass. Where nothing is put back, "tuned" is
        "all", measured once.
    """

    def step(layers):
        multiply_8_bits = [e for e in layers if e in eight_bits]
        return gradients.plain(layers, precision, multiply_8_bits)

    steps = {
        "float32": gradients.plain((), "float32"),
        "all": step(everything),
    }
    # One model would seem two, by what its times differ from run to run.
    is_one = len(tuned) == len(everything)
    if not is_one:
        steps["tuned"] = step(tuned)
    # The first run traces.
    costs = {name: {"error": each.error(scale)} for name, each in steps.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(_ROUNDS):
        for name, each in steps.items():
            times[name].append(each.milliseconds())
    for name, found in times.items():
        costs[name]["milliseconds"] = float(np.median(found))
    if is_one:
        costs["tuned"] = dict(costs["all"])
    return costs


def narrow_shares(
    model: keras.Model,
    dataset: tf.data.Dataset,
    precision: str,
    chosen: Mapping[str, Sequence[keras.layers.Layer]],
) -> dict[str, float] | None:
    """The share of the products' operations that are in 16 bits.

    Args:
        model: prepared.
        dataset: global batches.
        precision: of what is in 16 bits.
        chosen: by name, layers that are.

    Returns:
        By name; None where products cannot be counted.
    """
    rows = _rows(next(iter(dataset)))
    layers = layers_in_16_bits(model)
    shares: dict[str, float] = {}
    for name, narrow in chosen.items():
        with (
            computing_in("float32", layers),
            computing_in(precision, list(narrow)),
            probe_steps.one_optimizer_for_all(model),
        ):
            try:
                products = flops.products_of_step(
                    model, dataset.element_spec, rows
                )
            except flops.UncountableError:
                return None
        in_16_bits = [each for each in products if each.is_16_bit]
        shares[name] = flops.total(in_16_bits) / max(flops.total(products), 1)
    return shares


def _rows(batch: Any) -> int:
    return int(tf.nest.flatten(batch)[0].shape[0])


def ratio(costs: Mapping[str, Cost], name: str) -> float:
    """The time of a choice, as a share of that of float32."""
    whole = costs["float32"]["milliseconds"]
    return costs[name]["milliseconds"] / whole
