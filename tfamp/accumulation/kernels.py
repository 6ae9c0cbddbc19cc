"""Which of TensorFlow's kernels add in the 16 bits of their tensors.

A sum in bfloat16 stalls at 256, in float16 at 2048: what is added then is less
than half of the last place. Whether a kernel keeps its running sum in float32
differs by operation, number format, device and compiler, and is documented
nowhere. Each kernel is therefore tried with a sum whose result is known.
"""

import functools

import tensorflow as tf

from tfamp.accumulation.trial import TERM
from tfamp.accumulation.trials import KERNELS

# Beyond any rounding of a result, which is 0.4 % in bfloat16, and far below
# what a stalled sum is off by.
_TOLERANCE = 0.02


def adds_in_16_bits(name: str, dtype: str, device: str, jit: bool) -> bool:
    """Whether a kernel keeps its running sum in 16 bits; tried once.

    Args:
        name: of `KERNELS`.
        dtype: "float16" or "bfloat16".
        device: "CPU" or "GPU".
        jit: whether XLA makes the kernel.
    """
    # A trace may be under way, of which the trial must not become a part.
    with tf.init_scope():
        return _adds_in_16_bits(name, dtype, device, jit)


@functools.cache
def _adds_in_16_bits(name: str, dtype: str, device: str, jit: bool) -> bool:
    trial = KERNELS[name].trial
    wanted: list[tuple[tuple[int, ...], float]] = []

    def wish(*shape: int, value: float = TERM) -> tf.Tensor:
        wanted.append((shape, value))
        return tf.fill(shape, value)

    with tf.Graph().as_default():
        trial(wish)

    def run(*tensors: tf.Tensor) -> tf.Tensor:
        given = iter(tensors)
        return trial(lambda *shape, value=TERM: next(given))

    def result(dtype: str) -> tf.Tensor:
        tensors = [tf.fill(s, tf.cast(v, dtype)) for s, v in wanted]
        kernel = run
        if jit:
            # Of arguments: XLA computes what it knows in another way.
            compiled = tf.function(run, jit_compile=True, autograph=False)
            kernel = compiled.get_concrete_function(*tensors)
        return tf.cast(kernel(*tensors), tf.float32)

    try:
        with tf.device(f"{device}:0"):
            narrow, wide = result(dtype), result("float32")
    except (tf.errors.OpError, TypeError, ValueError):
        # No such kernel in one of the formats: nothing can be changed.
        return False
    error = tf.reduce_max(tf.abs(narrow - wide))
    # Not `>`: of a sum that left the range nothing else is true.
    return not bool(error <= _TOLERANCE * tf.reduce_max(tf.abs(wide)))
