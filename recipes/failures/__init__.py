"""The classic failures of 16-bit training, made on purpose, and mended.

    python -m recipes.failures --failure=no_loss_scaling

prints what lint and probe say of a model beforehand, with the mistake and
mended, and then trains it three times, which takes seconds: with the mistake,
mended, and with the mistake in float32, where it is none. Each failure is a
module here; its docstring says what goes wrong, what mends it, and how the
training ends, measured.

    no_loss_scaling             a head whose gradients float16 rounds to zero
    sixteen_bit_weights         "float16" where "mixed_float16" was meant
    float16_accumulation        microbatches added up in float16
    attention_overflow          attention logits beyond 65504
    clipping_scaled_gradients   the threshold meets scaled gradients
    float16_softmax             log(p) of one's own on a float16 softmax
    float8_without_scales       gradients cast to E5M2 as they are

All train on the 1,797 digits of scikit-learn. The mistakes are trained by
stock `keras.Model.fit`, because `tfamp.fit` does not let one make most of them:
it wraps optimizers, and adds microbatches up in float32.
`tfamp lint recipes.failures --config.failure=NAME`, and `tfamp probe`, look at
the mistake; with `--config.healed=true` at the mended model.
"""

import dataclasses
from typing import Literal

import keras
import tensorflow as tf

import tfamp
from recipes.failures import (
    attention_overflow,
    clipping_scaled_gradients,
    float8_without_scales,
    float16_accumulation,
    float16_softmax,
    no_loss_scaling,
    sixteen_bit_weights,
    task,
)
from tfamp.recipe import flag
from tfamp.recipe.flags import check_ranges

FAILURES = {
    "no_loss_scaling": no_loss_scaling.FAILURE,
    "sixteen_bit_weights": sixteen_bit_weights.FAILURE,
    "float16_accumulation": float16_accumulation.FAILURE,
    "attention_overflow": attention_overflow.FAILURE,
    "clipping_scaled_gradients": clipping_scaled_gradients.FAILURE,
    "float16_softmax": float16_softmax.FAILURE,
    "float8_without_scales": float8_without_scales.FAILURE,
}


# Not a RunConfig: stock Keras trains the mistakes, and most flags of
# `tfamp.fit` would be ignored.
@dataclasses.dataclass(frozen=True)
class Config:
    """The flags of this recipe."""

    failure: Literal[
        "no_loss_scaling",
        "sixteen_bit_weights",
        "float16_accumulation",
        "attention_overflow",
        "clipping_scaled_gradients",
        "float16_softmax",
        "float8_without_scales",
    ] = flag("no_loss_scaling", "which mistake is made")
    healed: bool = flag(
        False, "for the commands of tfamp: the mended model; this shows both"
    )
    precision: str = flag(
        "mixed_float16", "mixed_float16, mixed_bfloat16 or float32"
    )
    strategy: Literal["one_device"] = flag("one_device", "no other")
    dataset: Literal["digits"] = flag("digits", "no other")
    data_dir: str = flag("", "folder of prepared data sets; default of tfds")
    batch_size: int = flag(64, "examples in a step", minimum=16, below=1438)
    epochs: int = flag(10, "passes over the training data", minimum=1)
    seed: int = flag(0, "of weights and order", minimum=0)
    output_dir: str = flag("", "folder for the picture; none if empty")

    def __post_init__(self):
        check_ranges(self)


def make_datasets(config: Config) -> tuple[tf.data.Dataset, tf.data.Dataset]:
    """Batches of what the failure's model takes, and of its targets."""
    return task.make_batches(
        FAILURES[config.failure].to_example,
        config.dataset,
        config.data_dir,
        config.batch_size,
        config.seed,
    )


def build_model(config: Config) -> keras.Model:
    """The compiled model, with the mistake or mended."""
    return FAILURES[config.failure].build_model(config.healed)


def train(config: Config) -> dict[str, float]:
    """Trains, with the mistake or mended; returns the metrics on test data."""
    strategy = tfamp.recipe.start(config)
    train_batches, eval_batches = make_datasets(config)
    with strategy.scope():
        model = build_model(config)
    fit(model, train_batches, config)
    return model.evaluate(eval_batches, verbose=0, return_dict=True)


def fit(
    model: keras.Model, train_batches: tf.data.Dataset, config: Config
) -> keras.callbacks.History:
    """Trains the mistake with stock Keras, the mended model with tfamp."""
    callbacks = tfamp.recipe.run_callbacks(config)
    if config.healed:
        return tfamp.fit(
            model,
            train_batches,
            epochs=config.epochs,
            callbacks=callbacks,
            microbatches=FAILURES[config.failure].microbatches,
            verbose=0,
        )
    return model.fit(
        train_batches,
        epochs=config.epochs,
        callbacks=callbacks,
        # The data shuffle themselves.
        shuffle=False,
        verbose=0,
    )
