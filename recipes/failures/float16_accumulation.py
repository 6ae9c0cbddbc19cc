"""float16 sums of microbatches: unscaled gradients vanish in them.

The mistake: a `train_step` that adds up the gradients of 8 microbatches in
float16, to save the memory of a float32 sum. The loss is scaled as it should
be, and the gradients are unscaled before they are added, as one must where the
scale may change between two microbatches. But unscaled they are as small as
they are, and divided by 8 smaller still. Lint does not see the sums, and takes
the scaling by hand for none; probe finds the gradients of two layers too small.

The fix: `tfamp.fit(model, batches, microbatches=8)`, which adds in float32. It
would add the sums of such a step in float32 too, but for
`keep_float32(operations=False)` here; `Model.fit` does not.

Measured: the last training loss of the image, of 10 epochs. On a CPU with
AVX512-BF16, TensorFlow 2.21.0, Keras 3.15.1:

    seed   mistake   mended   float32   bfloat16, with the mistake
    0      0.143     0.062    0.062     0.062
    1      0.207     0.064    0.063     0.063
    2      0.170     0.064    0.063     0.063
"""

import keras
import tensorflow as tf

import tfamp
from recipes.failures import task
from recipes.failures.two_heads import (
    compile_two_heads,
    two_heads,
    two_targets,
)

MICROBATCHES = 8
LOSS_SCALE = 2.0**16


class SumsInComputeDtype(keras.Model):
    """Adds up microbatches in the dtype that its layers compute in."""

    def train_step(self, data):
        inputs, targets = data
        variables = self.trainable_variables
        sums = [tf.zeros(v.shape, self.compute_dtype) for v in variables]
        for piece in range(MICROBATCHES):
            x = inputs[piece::MICROBATCHES]
            y = {k: v[piece::MICROBATCHES] for k, v in targets.items()}
            with tf.GradientTape() as tape:
                outputs = self(x, training=True)
                loss = self.compute_loss(x, y, outputs)
                scaled_loss = loss * LOSS_SCALE / MICROBATCHES
            logs = self.compute_metrics(x, y, outputs)
            scaled = tape.gradient(scaled_loss, [v.value for v in variables])
            sums = [
                total + tf.cast(gradient / LOSS_SCALE, total.dtype)
                for total, gradient in zip(sums, scaled, strict=True)
            ]
        gradients = [tf.cast(total, tf.float32) for total in sums]
        self.optimizer.apply(gradients, variables)
        return logs


def build_model(healed: bool) -> keras.Model:
    """The two heads; the mended ones leave the sums to `tfamp.fit`."""
    model = two_heads(keras.Model if healed else SumsInComputeDtype)
    optimizer = keras.optimizers.Adam(3e-3)
    if healed:
        tfamp.keep_float32(model)
        optimizer = tfamp.wrap_optimizer(optimizer)
    else:
        # Else fit has the sums of the model's own step in float32.
        tfamp.keep_float32(model, outputs=False, operations=False)
    compile_two_heads(model, optimizer)
    return model


FAILURE = task.Failure(
    "microbatches added up in float16",
    build_model,
    two_targets,
    "image_loss",
    MICROBATCHES,
)
