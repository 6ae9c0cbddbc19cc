"""A product of two tensors in 8 bits, and its gradients in 8 bits.

Inputs and kernel are E4M3, the gradient that comes back is E5M2. The scale of
each follows from the largest magnitudes of the steps before (delayed), or from
the tensor itself (current).

A history travels as the "gradient" of its variable, which is its next value:
so it is one of a step that was applied, and replicas and microbatches agree by
maximum. Its first number counts the products of the step that gave one, since
gradients of several add up; such a sum is no history, and the tensor's own
magnitude takes its place, as it does before the first step.
"""

from collections.abc import Callable
from typing import NamedTuple

import tensorflow as tf

from tfamp.layers.float8_numbers import (
    E4M3,
    E5M2,
    amax_of,
    quantize_dequantize,
    scale_of,
)
from tfamp.scaling.backward import current_scale


class Recipe(NamedTuple):
    """How scales follow from magnitudes.

    delayed: from those of the steps before; else from the tensor's own.
    margin: powers of two that stay free.
    power_of_two: scales are powers of two.
    """

    delayed: bool
    margin: int
    power_of_two: bool


class Histories(NamedTuple):
    """Of the largest magnitudes, one for each tensor of a product.

    float32 [1 + steps]: how many products gave the newest, the newest, and
    those before. Of the gradient: of the true one, without the loss scale.
    """

    inputs: tf.Tensor
    kernel: tf.Tensor
    gradient: tf.Tensor


_Product = Callable[[tf.Tensor, tf.Tensor], tf.Tensor]


def float8_product(
    product: _Product,
    inputs: tf.Tensor,
    kernel: tf.Tensor,
    histories: Histories | None,
    recipe: Recipe,
) -> tf.Tensor:
    """`product(inputs, kernel)`, of 8-bit numbers.

    Args:
        product: bilinear, such as a matrix product or a convolution.
        inputs: in the dtype of the result.
        kernel: as it is stored, so that it is rounded once.
        histories: for delayed scales; None for current ones.
        recipe: how scales follow.

    Returns:
        The product, in the dtype of the inputs.
    """
    own = inputs.dtype
    # There the numbers are exact: 16 bits hold the 4 of a power of two times
    # 8 bits. Others are multiplied in float32.
    is_exact = recipe.power_of_two and own == tf.bfloat16
    dtype = own if is_exact else tf.float32

    def quantized(x, known_amax, own_amax, format_name):
        amax = own_amax
        if known_amax is not None:
            amax = tf.where(known_amax > 0, known_amax, own_amax)
        scale, reciprocal = scale_of(
            amax, format_name, recipe.margin, recipe.power_of_two
        )
        return quantize_dequantize(x, scale, reciprocal, format_name, dtype)

    def known(history):
        return known_amax(history) if recipe.delayed else None

    def multiply(inputs, kernel, *states):
        states = Histories(*states) if states else _NO_HISTORIES
        amax_inputs, amax_kernel = amax_of(inputs), amax_of(kernel)
        inputs_8 = quantized(inputs, known(states.inputs), amax_inputs, E4M3)
        kernel_8 = quantized(kernel, known(states.kernel), amax_kernel, E4M3)

        def gradient(upstream):
            loss_scale = current_scale()
            amax = amax_of(upstream)
            amax_before = known(states.gradient)
            true_amax = amax
            if loss_scale is not None:
                true_amax = amax / loss_scale
                if amax_before is not None:
                    amax_before = amax_before * loss_scale
            upstream_8 = quantized(upstream, amax_before, amax, E5M2)
            with tf.GradientTape() as tape:
                tape.watch([inputs_8, kernel_8])
                # Not computed again where it is traced: its gradients need
                # its factors alone.
                outputs = product(inputs_8, kernel_8)
            gradients = tape.gradient(
                outputs,
                [inputs_8, kernel_8],
                output_gradients=tf.cast(upstream_8, outputs.dtype),
            )
            gradients = [
                tf.cast(each, x.dtype)
                for each, x in zip(gradients, (inputs, kernel), strict=True)
            ]
            if not recipe.delayed:
                return tuple(gradients)
            return (
                *gradients,
                next_history(states.inputs, amax_inputs),
                next_history(states.kernel, amax_kernel),
                next_history(states.gradient, true_amax),
            )

        return tf.cast(product(inputs_8, kernel_8), own), gradient

    arguments = (inputs, kernel, *((histories or ()) if recipe.delayed else ()))
    return tf.custom_gradient(multiply)(*arguments)


def known_amax(history: tf.Tensor) -> tf.Tensor:
    """The largest magnitude of a history: a scalar; 0 where there is none."""
    is_one = history[0] <= 1
    return tf.where(is_one, tf.reduce_max(history[1:]), 0.0)


def next_history(history: tf.Tensor, amax: tf.Tensor) -> tf.Tensor:
    """The history after a step of that largest magnitude."""
    before = tf.where(history[0] <= 1, history[1:-1], 0.0)
    return tf.concat([[1.0], [amax], before], axis=0)


_NO_HISTORIES = Histories(None, None, None)
