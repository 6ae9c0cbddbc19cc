"""A training that uses all that shards must not change, for any strategy.

Clipping by norm, weight decay and its exclusions, averages that overwrite the
weights, a schedule, and a step that each replica spoils in its turn.
"""

import keras
import numpy as np

import tfamp

STEPS, BATCH, FEATURES = 20, 16, 6

CASES = {
    "plain": {},
    "float32": {"precision": "float32"},
    "float16": {"precision": "mixed_float16", "on_overflow": "blame"},
    "pieces": {
        "precision": "mixed_float16",
        "microbatches": 2,
        "steps_per_loop": 5,
    },
    "compiled": {"jit": True},
    "frozen": {"frozen": True, "microbatches": 2},
    "narrow_wire": {"all_reduce_dtype": "bfloat16"},
    "float16_wire": {"all_reduce_dtype": "float16", "precision": "float32"},
    "norm_of_each": {"clipping": {"clipnorm": 0.2}},
}


def data(replicas: int) -> tuple[np.ndarray, np.ndarray]:
    """Batches, of which each replica spoils one."""
    generator = np.random.default_rng(0)
    x = generator.standard_normal((STEPS, BATCH, FEATURES)).astype("float32")
    for replica in range(replicas):
        x[3 + 2 * replica, replica * BATCH // replicas, 0] = np.nan
    y = generator.integers(0, 3, STEPS * BATCH)
    return x.reshape(-1, FEATURES), y


def build(strategy, shard, clipping, frozen=False) -> keras.Model:
    """Weights that are kept in 16 bits, others, and some that stay."""
    keras.utils.set_random_seed(1)
    with strategy.scope():
        model = keras.Sequential(
            [
                keras.Input([FEATURES]),
                keras.layers.Dense(9, activation="tanh", name="narrow"),
                keras.layers.Dense(9, trainable=not frozen, name="middle"),
                keras.layers.LayerNormalization(name="norm"),
                keras.layers.Dense(3, dtype="float32", name="head"),
            ]
        )
        optimizer = keras.optimizers.AdamW(
            keras.optimizers.schedules.CosineDecay(1e-2, STEPS),
            weight_decay=0.1,
            use_ema=True,
            ema_momentum=0.9,
            ema_overwrite_frequency=7,
            **clipping,
        )
        optimizer.exclude_from_weight_decay(var_names=["bias", "gamma"])
        model.compile(
            tfamp.wrap_optimizer(optimizer, shard=shard),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            auto_scale_loss=False,
        )
    return model


def trained(
    strategy,
    shard: bool,
    *,
    precision: str = "mixed_bfloat16",
    frozen: bool = False,
    clipping: dict | None = None,
    **options,
) -> dict[str, np.ndarray]:
    """The weights after 20 steps, the losses, and what was counted."""
    tfamp.set_precision(precision)
    clipping = clipping or {"global_clipnorm": 0.5}
    model = build(strategy, shard, clipping, frozen)
    x, y = data(strategy.num_replicas_in_sync)
    history = tfamp.fit(
        model,
        x,
        y,
        batch_size=BATCH,
        shuffle=False,
        verbose=0,
        **({"on_overflow": "ignore"} | options),
    )
    optimizer = model.optimizer
    return {
        **{f"weight{i}": w.numpy() for i, w in enumerate(model.weights)},
        "loss": np.array(history.history["loss"]),
        "skipped": optimizer.skipped_steps.numpy(),
        "iterations": optimizer.iterations.numpy(),
        "scale": optimizer.dynamic_scale.numpy(),
    }
