"""Weights in 16 bits, without float32 master weights.

The mistake: the policy "float16" where "mixed_float16" was meant. The weights
are then 16 bits themselves, and so is all that the optimizer keeps of them.
An update smaller than half the spacing of a weight is lost. In Adam more is
lost: the square of a gradient below 1.7e-4 is zero, and the step divides by
its root. With "bfloat16" the weights never move at all: 0.999, the decay of
the squares, rounds to 1, and Adam's correction for it to 0.

The fix: a mixed policy, `tfamp.set_precision("mixed_float16")`, and
`tfamp.wrap_optimizer(optimizer)`.

Measured: the last training loss of 10 epochs, and the test accuracy. On a CPU
with AVX512-BF16, TensorFlow 2.21.0, Keras 3.15.1:

    seed   mistake         mended          float32         bfloat16, mistake
    0      1.744  0.617    0.189  0.953    0.182  0.958    2.342  0.128
    1      3.612  0.558    0.176  0.958    0.171  0.950    2.344  0.061
    2      2.151  0.697    0.195  0.961    0.193  0.961    2.353  0.019
"""

import keras
from keras import layers

import tfamp
from recipes.failures import task


def build_model(healed: bool) -> keras.Model:
    """A classifier; only the mended one has float32 weights."""
    policy = keras.config.dtype_policy()
    dtype = policy if healed else policy.compute_dtype
    model = keras.Sequential(
        [
            keras.Input([64]),
            layers.Dense(64, "relu", dtype=dtype, name="first"),
            layers.Dense(64, "relu", dtype=dtype, name="second"),
            layers.Dense(task.NUM_CLASSES, dtype=dtype, name="logits"),
        ]
    )
    optimizer = keras.optimizers.Adam(1e-3)
    if healed:
        tfamp.keep_float32(model)
        optimizer = tfamp.wrap_optimizer(optimizer)
    model.compile(
        optimizer=optimizer,
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        auto_scale_loss=False,
        jit_compile=False,
    )
    return model


FAILURE = task.Failure(
    "weights in 16 bits without float32 masters", build_model, task.flat_pixels
)
