"""Trains a small network to tell three spirals apart.

    python NAME.py --precision=mixed_bfloat16

Put your own in three places, from top to bottom: your flags into `Config`,
your data into `make_datasets`, your network into `build_model`. `train` can
stay as it is. `python NAME.py --help` lists the flags, and

    tfamp lint NAME.py                     what 16 bits would spoil
    tfamp probe NAME.py --output_dir=DIR   what float16 would lose, by layer
    tfamp parity NAME.py --output_dir=DIR  whether 16 bits reach what 32 do
    tfamp bench NAME.py --output_dir=DIR   how much faster they are here
"""

# ruff: noqa: E402
import dataclasses

import tfamp

# Before TensorFlow is imported: it has much to say while it starts.
tfamp.recipe.quiet_tensorflow()

import keras
import numpy as np
import tensorflow as tf

from tfamp.recipe import flag

NUM_CLASSES = 3


# Each field is a flag, and has its default here and nowhere else. RunConfig
# brings --precision, --strategy, --seed, --output_dir and the others.
@dataclasses.dataclass(frozen=True)
class Config(tfamp.recipe.RunConfig):
    """The flags of this recipe."""

    dataset: str = flag("spirals", "yours may have several")
    epochs: int = flag(5, "passes over the training data", minimum=1)
    width: int = flag(64, "units of a hidden layer", minimum=1)
    learning_rate: float = flag(3e-3, "of AdamW, constant", minimum=0)


def make_datasets(config: Config) -> tuple[tf.data.Dataset, tf.data.Dataset]:
    """Batches of (inputs (B, 2), labels (B,)): to train on, to evaluate on."""
    train = _spirals(3000, config.seed)
    # Seeded: every worker reads the same order and takes its rows.
    train = train.shuffle(3000, seed=config.seed)
    # Steps of one shape compile once.
    train = train.batch(config.batch_size, drop_remainder=True)
    evaluation = _spirals(1000, config.seed + 1).batch(config.batch_size)
    return train.prefetch(tf.data.AUTOTUNE), evaluation


def build_model(config: Config) -> keras.Model:
    """The compiled network, with logits as its output."""
    model = keras.Sequential(
        [
            keras.Input([2]),
            keras.layers.Dense(config.width, activation="gelu"),
            keras.layers.LayerNormalization(),
            keras.layers.Dense(config.width, activation="gelu"),
            keras.layers.LayerNormalization(),
            keras.layers.Dense(NUM_CLASSES),
        ]
    )
    # Softmax, normalization and outputs in float32; products in 16 bits.
    tfamp.keep_float32(model)
    model.compile(
        # Scales the loss where the precision needs it, on all replicas alike.
        optimizer=tfamp.wrap_optimizer(
            keras.optimizers.AdamW(config.learning_rate),
            # --shard=on: replicas share its state.
            shard=config.shard == "on",
        ),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        auto_scale_loss=False,  # wrap_optimizer did
    )
    return model


def train(config: Config) -> dict[str, float]:
    """Trains, and returns the final metrics."""
    strategy = tfamp.recipe.start(config)
    train_batches, eval_batches = make_datasets(config)
    with strategy.scope():
        model = build_model(config)
    tfamp.recipe.fit(model, train_batches, eval_batches, config)
    return tfamp.recipe.final_metrics(model, eval_batches)


def _spirals(num_points: int, seed: int) -> tf.data.Dataset:
    """Points on three noisy arms: a stand-in for your data."""
    random = np.random.default_rng(seed)
    labels = random.integers(NUM_CLASSES, size=num_points)
    radius = random.uniform(0.1, 1.0, num_points)
    angle = 4 * radius + 2 * np.pi * labels / NUM_CLASSES
    angle += random.normal(0, 0.4, num_points)
    points = radius * np.stack([np.cos(angle), np.sin(angle)])
    return tf.data.Dataset.from_tensor_slices(
        (points.T.astype("float32"), labels)
    )


if __name__ == "__main__":
    tfamp.recipe.main(train, Config)
