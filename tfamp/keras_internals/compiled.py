"""What `compile` was told, and what it left on the model."""

import contextlib
from collections.abc import Iterator
from typing import Any

import keras


def compile_arguments(model: keras.Model) -> dict[str, Any]:
    """What `compile` was called with, as objects, by argument."""
    return dict(model._compile_config.config)


def asked_to_jit(model: keras.Model) -> bool | None:
    """What `compile(jit_compile=...)` was told; None for "auto".

    Keras keeps only what "auto" became. Told the same, it is as if it had not
    been told; under a strategy "auto" becomes False.
    """
    resolved = model._resolve_auto_jit_compile() and not model.run_eagerly
    return None if model.jit_compile == resolved else bool(model.jit_compile)


def replace_optimizer(
    model: keras.Model,
    optimizer: keras.optimizers.Optimizer,
    saved: keras.optimizers.Optimizer | None = None,
) -> None:
    """Gives a compiled model another optimizer, also in what it saves.

    Args:
        model: the model.
        optimizer: the one that trains it.
        saved: the one that files name; None for the same.
    """
    model.optimizer = optimizer
    model._compile_config.config["optimizer"] = saved or optimizer


def loss_tracker(model: keras.Model) -> keras.metrics.Mean:
    """The mean that a compiled model reports as `loss`."""
    return model._loss_tracker


def metrics_are_kerass(model: keras.Model) -> bool:
    """Whether none of a compiled model's metrics runs anybody's own code.

    Keras's count what is no number as they count anything; those of others may
    assert that there is none.
    """
    metrics = [
        inner
        for metric in model.metrics
        for inner in [metric, *getattr(metric, "metrics", ())]
    ]
    codes = [*map(type, metrics)]
    codes += [each._fn for each in metrics if hasattr(each, "_fn")]
    return all(
        (getattr(code, "__module__", None) or "").split(".")[0] == "keras"
        for code in codes
    )


def count_in_metrics(
    model: keras.Model, y: Any, outputs: Any, sample_weight: Any
) -> None:
    """Has the metrics of a compiled model count a batch.

    `Model.compute_metrics` also computes their results, which no step reads:
    those of confusion matrices have operations that GPUs lack.
    """
    if model._compile_metrics is not None:
        model._compile_metrics.update_state(y, outputs, sample_weight)


def logs_in_order(model: keras.Model, logs: dict[str, Any]) -> Any:
    """The logs as `Model.evaluate` returns them without `return_dict`."""
    return model._flatten_metrics_in_order(logs)


@contextlib.contextmanager
def loss_and_metrics_unbuilt(model: keras.Model) -> Iterator[None]:
    """Within it, the first use of loss and metrics builds copies of them.

    Keras builds them from the first batch: metrics given by name come into
    being then. What looks at a model must not leave that behind.
    """
    arguments = compile_arguments(model)
    names = getattr(model, "output_names", None)
    module = keras.src.trainers.compile_utils
    copies = {}
    if model._compile_loss is not None and not model._compile_loss.built:
        copies["_compile_loss"] = module.CompileLoss(
            arguments["loss"], arguments["loss_weights"], output_names=names
        )
    metrics = model._compile_metrics
    if metrics is not None and not metrics.built:
        copies["_compile_metrics"] = module.CompileMetrics(
            arguments["metrics"],
            arguments["weighted_metrics"],
            output_names=names,
        )
    # Past Layer.__setattr__, which would track the copies.
    originals = {name: vars(model)[name] for name in copies}
    vars(model).update(copies)
    try:
        yield
    finally:
        vars(model).update(originals)
