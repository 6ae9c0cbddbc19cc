"""float16 without loss scaling: a part of the network stops learning.

The mistake: `compile(auto_scale_loss=False)` and an optimizer that nobody
wrapped. Stock Keras makes it too, silently, wherever the 16-bit layers come
from a DTypePolicyMap or from policies of their own.

The gradients of the second head are below what float16 holds. The loss shows
nothing, since that head counts 3e-5 in it; the image is never learned.

The fix: `tfamp.wrap_optimizer(optimizer)`.

Measured: the last training loss of the image, of 10 epochs. On a CPU with
AVX512-BF16, TensorFlow 2.21.0, Keras 3.15.1:

    seed   mistake   mended   float32   bfloat16, with the mistake
    0      0.925     0.062    0.062     0.062
    1      0.706     0.064    0.063     0.063
    2      0.662     0.064    0.063     0.063
"""

import keras

import tfamp
from recipes.failures import task
from recipes.failures.two_heads import (
    compile_two_heads,
    two_heads,
    two_targets,
)


def build_model(healed: bool) -> keras.Model:
    """The two heads; only the mended ones scale their loss."""
    model = two_heads()
    optimizer = keras.optimizers.Adam(3e-3)
    if healed:
        tfamp.keep_float32(model)
        optimizer = tfamp.wrap_optimizer(optimizer)
    compile_two_heads(model, optimizer)
    return model


FAILURE = task.Failure(
    "float16 without loss scaling", build_model, two_targets, "image_loss"
)
