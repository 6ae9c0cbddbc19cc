"""The flags that recipes share, and what they do: the same for the same things.

A recipe's `Config` derives from `RunConfig`, adds its own fields, and repeats
one of these to give it another default. `start` and `fit` take these fields
where a config has them; a recipe that needs less may leave them out.
"""

import dataclasses
from typing import TYPE_CHECKING, Any, Literal

from tfamp.errors import InputError
from tfamp.recipe.flags import check_ranges, flag

_JIT: dict[str, bool | str] = {"auto": "auto", "on": True, "off": False}

if TYPE_CHECKING:
    import keras
    import tensorflow as tf

_STRATEGY_FIELDS = (
    "num_devices",
    "tpu",
    "cluster",
    "workers",
    "worker_index",
    "num_workers",
)


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Where a recipe runs, in which precision, and what it leaves."""

    precision: str = flag(
        "auto", "auto, float32, mixed_bfloat16, mixed_float16 or float8"
    )
    precision_map: str = flag(
        "", "tune.json, which says each layer's precision; none if empty"
    )
    strategy: str = flag(
        "auto", "auto, one_device, mirrored, multi_worker or tpu"
    )
    num_devices: int | None = flag(
        None, "devices of this host; none for all GPUs. On a CPU: logical ones"
    )
    tpu: str = flag("", "name or address of a TPU; that of this machine")
    cluster: Literal["auto", "tf_config", "slurm", "kubernetes"] = flag(
        "auto", "who describes the workers; auto: --workers or TF_CONFIG"
    )
    workers: tuple[str, ...] = flag((), "host:port of each worker")
    worker_index: int | None = flag(None, "which of --workers this is")
    num_workers: int | None = flag(None, "how many, for --cluster=kubernetes")
    data_dir: str = flag("", "folder of prepared data sets; default of tfds")
    batch_size: int = flag(
        64, "examples in a step, over all devices", minimum=1
    )
    microbatches: int = flag(
        1, "pieces that a device's batch is split into", minimum=1
    )
    epochs: int = flag(1, "passes over the training data", minimum=1)
    steps_per_loop: int = flag(
        0, "steps in one graph call; 0: automatic", minimum=0
    )
    jit: Literal["auto", "on", "off"] = flag("auto", "XLA; auto: GPU and TPU")
    all_reduce_dtype: Literal["own", "float16", "bfloat16"] = flag(
        "own", "in which gradients cross between replicas"
    )
    shard: Literal["off", "on"] = flag(
        "off", "on: replicas share float32 masters and moments"
    )
    on_overflow: Literal["log", "ignore", "blame", "stop"] = flag(
        "log", "a step is not finite: blame names the layer that was first"
    )
    seed: int = flag(0, "of weights, order and augmentation", minimum=0)
    output_dir: str = flag("", "folder for logs; none if empty")
    checkpoint_dir: str = flag(
        "", "folder to save in, and to resume from; none if empty"
    )

    def __post_init__(self):
        check_ranges(self)


def start(config: Any) -> "tf.distribute.Strategy":
    """Begins a run: its devices, its seed, its precision.

    Call it before anything else that uses TensorFlow: logical devices are
    fixed by the first use.

    Args:
        config: with the fields of `tfamp.recipe.RECIPE_FIELDS`, and any of
            `RunConfig`.

    Returns:
        The strategy to build the model in.

    Raises:
        InputError: for a precision, strategy or cluster that cannot be.
    """
    import keras

    from tfamp import keras_internals
    from tfamp.distribute.strategy import get_strategy
    from tfamp.precision.policy import resolve_precision, set_precision

    options = {
        name: getattr(config, name)
        for name in _STRATEGY_FIELDS
        if hasattr(config, name)
    }
    strategy = get_strategy(config.strategy, **options)
    # Keras up to 3.12 would go on drawing after the seed before.
    keras_internals.forget_global_seed_generator()
    keras.utils.set_random_seed(config.seed)
    path = getattr(config, "precision_map", "")
    if path and config.precision not in ("auto", resolve_precision(path)):
        raise InputError(
            f"precision={config.precision} is not that of {path!r}, "
            f"{resolve_precision(path)}; leave one of them out."
        )
    print(f"precision {set_precision(path or config.precision)}")
    return strategy


def fit(
    model: "keras.Model",
    train_batches: "tf.data.Dataset",
    eval_batches: "tf.data.Dataset | None",
    config: RunConfig,
    *,
    checkpoint_frozen: bool = True,
) -> "keras.callbacks.History":
    """`tfamp.fit` with the flags of a recipe.

    Args:
        model: compiled.
        train_batches: as for `tfamp.fit`.
        eval_batches: to evaluate on after each epoch; None for no evaluation.
        config: of the recipe.
        checkpoint_frozen: as for `tfamp.fit`.

    Returns:
        What `tfamp.fit` returns.

    Raises:
        InputError: and the other errors of `tfamp.fit`.
    """
    from tfamp.training import fit as training

    return training.fit(
        model,
        train_batches,
        epochs=config.epochs,
        validation_data=eval_batches,
        callbacks=run_callbacks(config),
        microbatches=config.microbatches,
        steps_per_loop=config.steps_per_loop or "auto",
        jit=_JIT[config.jit],
        all_reduce_dtype=_none_if(config.all_reduce_dtype, "own"),
        checkpoint_dir=_none_if(config.checkpoint_dir, ""),
        checkpoint_frozen=checkpoint_frozen,
        on_overflow=config.on_overflow,
    )


def run_callbacks(config: Any) -> list:
    """The callbacks that write `config.output_dir`; none where it is ''.

    Raises:
        InputError: The folder cannot be written.
    """
    if not config.output_dir:
        return []
    from tfamp.training import callbacks

    return [
        callbacks.RunRecord(config.output_dir, config),
        callbacks.MetricsLog(config.output_dir),
        callbacks.ScaleTimeline(config.output_dir),
        callbacks.TensorBoardScalars(config.output_dir),
    ]


def print_float32_layers(model: "keras.Model") -> None:
    """Says how many layers compute in float32, by reason."""
    import collections

    from tfamp.precision.keep_float32 import keep_float32

    # A second call changes nothing, and tells what the first one did.
    reasons = collections.Counter(each.reason for each in keep_float32(model))
    for reason, count in reasons.items():
        print(f"  float32 in {count} layers: {reason}")


def final_metrics(
    model: "keras.Model", eval_batches: "tf.data.Dataset"
) -> dict[str, float]:
    """What `tfamp.evaluate` finds, the scale at the end, and all skips."""
    from tfamp.training.fit import evaluate

    return evaluate(model, eval_batches) | {
        "skipped_steps": int(model.optimizer.skipped_steps.numpy()),
        "loss_scale": float(model.optimizer.dynamic_scale.numpy()),
    }


def _none_if(value, empty):
    return None if value == empty else value
