"""Gradients clipped while they are scaled: steps 65,536 times too small.

The mistake: a `train_step` that scales the loss, clips the gradients to a norm
of 1, and hands them to an optimizer that unscales them. Scaled by 65,536 every
gradient exceeds the threshold, and what is left of it after unscaling has a
norm of 1 / 65,536. Nothing overflows, nothing is NaN; SGD just stands still.
(Adam, which divides by the size of the gradients, would hide it.)

The fix: the threshold belongs to the optimizer inside the wrapper,
`tfamp.wrap_optimizer(keras.optimizers.SGD(..., global_clipnorm=1.0))`, where
the gradients are unscaled and, on several replicas, summed.

Measured: the last training loss of 10 epochs, and the test accuracy. On a CPU
with AVX512-BF16, TensorFlow 2.21.0, Keras 3.15.1:

    seed   mistake         mended          float32         bfloat16, mistake
    0      2.340  0.100    0.064  0.958    0.067  0.969    0.041  0.967
    1      2.348  0.136    0.045  0.978    0.053  0.956    0.044  0.967
    2      2.337  0.125    0.039  0.972    0.054  0.961    0.053  0.958
"""

import keras
import tensorflow as tf
from keras import layers

import tfamp
from recipes.failures import task

MAX_NORM = 1.0


class ClipsScaledGradients(keras.Model):
    """Scales the loss and clips what comes of it."""

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            outputs = self(x, training=True)
            loss = self.compute_loss(x, y, outputs)
            scaled_loss = self.optimizer.scale_loss(loss)
        variables = self.trainable_variables
        gradients = tape.gradient(scaled_loss, [v.value for v in variables])
        gradients, _ = tf.clip_by_global_norm(gradients, MAX_NORM)
        self.optimizer.apply(gradients, variables)
        for metric in self.metrics:
            if metric.name == "loss":
                metric.update_state(loss)
        return self.compute_metrics(x, y, outputs)


def build_model(healed: bool) -> keras.Model:
    """A classifier; the mended one leaves clipping to the optimizer."""
    pixels = keras.Input([64])
    x = layers.Dense(64, "relu", name="first")(pixels)
    x = layers.Dense(64, "relu", name="second")(x)
    model_class = keras.Model if healed else ClipsScaledGradients
    model = model_class(
        pixels, layers.Dense(task.NUM_CLASSES, name="logits")(x)
    )
    tfamp.keep_float32(model)
    optimizer = keras.optimizers.SGD(
        0.1, momentum=0.9, global_clipnorm=MAX_NORM if healed else None
    )
    model.compile(
        optimizer=tfamp.wrap_optimizer(optimizer),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        auto_scale_loss=False,
        jit_compile=False,
    )
    return model


FAILURE = task.Failure(
    "gradients clipped while they are scaled", build_model, task.flat_pixels
)
