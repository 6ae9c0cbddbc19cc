"""How fast the device here multiplies large matrices, measured."""

import time

import tensorflow as tf

# From what a core computes at once to what fills the largest accelerators.
_SIZES = (256, 512, 1024, 2048, 4096, 8192)
# In one graph call, so that starting it does not count.
_PRODUCTS = 8
_REPETITIONS = 3
# Long against the clock and against what else the machine does.
_LONG_SECONDS = 0.1


def product_rate(dtype: str) -> float:
    """Operations a second, in products of square matrices on one device.

    Matrices grow until eight products take a tenth of a second, or until
    they do not fit; the best of three calls counts.

    Args:
        dtype: of the matrices, such as "bfloat16".
    """
    rate = 0.0
    for size in _SIZES:
        try:
            seconds = _seconds(size, dtype)
        except tf.errors.ResourceExhaustedError:
            break
        rate = max(rate, _PRODUCTS * 2 * size**3 / seconds)
        if seconds > _LONG_SECONDS:
            break
    return rate


def _seconds(size: int, dtype: str) -> float:
    # Scaled so that products neither grow nor vanish: some processors take
    # longer over subnormal numbers.
    factor = tf.cast(tf.random.normal([size, size]) / size**0.5, dtype)

    @tf.function(autograph=False)
    def multiply(matrix):
        for _ in range(_PRODUCTS):
            matrix = tf.linalg.matmul(factor, matrix)
        return matrix

    def run() -> float:
        begin = time.perf_counter()
        # Reading one element waits for the device.
        multiply(factor)[0, 0].numpy()
        return time.perf_counter() - begin

    run()
    return min(run() for _ in range(_REPETITIONS))
