"""That the contestants train one model: weights, operations, losses.

The first two are counted on either side before anything is measured; the
losses are those that each contestant itself had in its first epochs.
"""

import math
import pathlib
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from benchmarks.compare.cases import Case, make_batches
from benchmarks.compare.process import settle

# How far the losses of the first epochs may be from those of the reference,
# as a part of them. Rounding is all that differs.
LOSS_TOLERANCES = {
    "float32": 2e-3,
    "mixed_bfloat16": 3e-2,
    "mixed_float16": 1e-2,
}


def run(
    case: Case,
    weights: pathlib.Path,
    log: pathlib.Path,
    framework: str,
    threads: int,
    connection: Connection,
) -> None:
    """A process that counts; that of Keras writes the weights to begin with.

    One for each framework: TensorFlow and a PyTorch for GPUs bring an LLVM
    each, and two in one process end it.
    """
    settle(log, threads)
    connection.send(
        torch_facts(case)
        if framework == "torch"
        else keras_facts(case, weights)
    )


def keras_facts(case: Case, weights: pathlib.Path) -> dict[str, int]:
    """Builds the Keras model and writes its weights to a .npz file.

    Returns:
        `keras_parameters`, the trainable numbers, and `keras_flops`, the
        operations of a step's matrix products and convolutions.
    """
    import tensorflow as tf

    import tfamp
    from benchmarks.compare import keras_networks
    from tfamp.analysis.bench import flops

    tfamp.set_precision("float32")
    model = keras_networks.build(case.network)
    np.savez(weights, **keras_networks.named_weights(model))
    model.compile(
        optimizer=tfamp.wrap_optimizer(keras_networks.make_optimizer(case)),
        loss=keras_networks.make_loss(),
        auto_scale_loss=False,
    )
    model.optimizer.build(model.trainable_variables)
    spec = tuple(
        tf.TensorSpec([None, *each.shape[1:]], each.dtype)
        for each in make_batches(case)[0]
    )
    products = flops.products_of_step(model, spec, case.batch_size)
    return {
        "keras_parameters": sum(
            int(np.prod(v.shape)) for v in model.trainable_variables
        ),
        "keras_flops": flops.total(products),
    }


def torch_facts(case: Case) -> dict[str, int]:
    """The same of the PyTorch module, as `torch_parameters`, `torch_flops`."""
    import torch
    from torch.nn import functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from benchmarks.compare import torch_networks, torch_training

    torch.manual_seed(0)
    module = torch_networks.build(case.network)
    x, y = torch_training.tensors(case, "cpu")[0]
    # The fused kernel of CPUs is one that PyTorch does not count.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as count:
        F.cross_entropy(module(x), y).backward()
    return {
        "torch_parameters": sum(p.numel() for p in module.parameters()),
        "torch_flops": count.get_total_flops(),
    }


def loss_differences(
    starts: Sequence[Mapping[str, Any]],
) -> list[dict[str, Any]]:
    """How far the contestants' first losses are from each other.

    Args:
        starts: `contestant`, `precision` and `losses` of each, of one model.

    Returns:
        Of each `contestant` and `precision` the largest `difference` of a
        loss from the reference's as a part of it (None where one is not a
        number), its `limit`, and whether it `agrees`. The reference is the
        first in float32, or else the first.
    """
    if not starts:
        return []
    reference = min(starts, key=lambda start: start["precision"] != "float32")
    found = []
    for start in starts:
        ours, theirs = (
            np.array(each["losses"], dtype=float) for each in (start, reference)
        )
        difference = float(np.max(np.abs(ours - theirs) / np.abs(theirs)))
        limit = LOSS_TOLERANCES[start["precision"]]
        found.append(
            {
                "contestant": start["contestant"],
                "precision": start["precision"],
                # JSON has no NaN, which agrees with nothing.
                "difference": difference if math.isfinite(difference) else None,
                "limit": limit,
                "agrees": difference <= limit,
            }
        )
    return found
