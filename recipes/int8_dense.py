"""A frozen product whose kernel is stored in int8."""

import keras
import numpy as np
from keras import layers, ops


@keras.saving.register_keras_serializable(package="recipes")
class Int8Dense(layers.Layer):
    """A product with a kernel of int8, which has one scale per output.

    The kernel is restored in float32, rounded to the compute dtype, and
    multiplied with inputs that are not quantized (as Dettmers et al., 2023,
    "QLoRA", do with 4 bits), so that gradients reach the inputs as through any
    kernel. Keras's own int8 layers round their inputs to int8 too, and refuse
    to compute in float16, which their sums of integers overflow.

    Args:
        units: outputs.
        use_bias: whether something is added to them.
        name: of the layer.
        dtype: policy of the layer.
        trainable: changes nothing: int8 cannot be trained.
    """

    def __init__(
        self,
        units: int,
        use_bias: bool = True,
        name=None,
        dtype=None,
        trainable=False,
    ):
        super().__init__(name=name, dtype=dtype, trainable=trainable)
        self.units = units
        self.use_bias = use_bias

    def build(self, input_shape):
        self.int8_kernel = self.add_weight(
            name="int8_kernel",
            shape=(input_shape[-1], self.units),
            initializer="zeros",
            dtype="int8",
            trainable=False,
        )
        # Not cast: 16 bits would round it before the kernel is restored.
        self.kernel_scale = self.add_weight(
            name="kernel_scale",
            shape=(self.units,),
            initializer="ones",
            dtype="float32",
            autocast=False,
            trainable=False,
        )
        self.bias = None
        if self.use_bias:
            self.bias = self.add_weight(
                name="bias",
                shape=(self.units,),
                initializer="zeros",
                trainable=False,
            )

    @property
    def kernel(self):
        """The kernel as it is stored, in float32: [inputs, units]."""
        return ops.cast(self.int8_kernel, "float32") / self.kernel_scale

    def set_kernel(self, kernel: np.ndarray) -> None:
        """Stores a kernel, to half a 127th of each output's largest weight."""
        int8_kernel, scale = keras.quantizers.abs_max_quantize(
            np.asarray(kernel, "float32"), axis=0, to_numpy=True
        )
        self.int8_kernel.assign(int8_kernel)
        self.kernel_scale.assign(scale[0])

    def call(self, inputs):
        x = ops.matmul(inputs, ops.cast(self.kernel, self.compute_dtype))
        return x if self.bias is None else ops.add(x, self.bias)

    def compute_output_shape(self, input_shape):
        return (*input_shape[:-1], self.units)

    def get_config(self) -> dict:
        return super().get_config() | {
            "units": self.units,
            "use_bias": self.use_bias,
        }
