"""Keras's layers of products, with 8-bit factors.

Each is Keras's own class but for its product: names, weights and settings
stay, and files of the one load into the other. The histories of scales are
state that a file may lack.
"""

import dataclasses
from typing import Any

import keras
import tensorflow as tf

from tfamp import keras_internals
from tfamp.errors import InputError
from tfamp.files.saved_models import say_how_to_load
from tfamp.layers.float8_product import Histories, Recipe, float8_product

SCALINGS = ("delayed", "current")
_TENSORS = ("inputs", "kernel", "gradient")
_PREFIX = "float8_"


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a layer scales its 8-bit numbers; as the arguments of `float8`.

    Raises:
        InputError: for what is not allowed.
    """

    scaling: str = "delayed"
    history: int = 1024
    margin: int = 0
    power_of_two: bool = True

    def __post_init__(self):
        if self.scaling not in SCALINGS:
            raise InputError(
                f"scaling={self.scaling!r}; expected one of "
                f"{', '.join(map(repr, SCALINGS))}."
            )
        for name, least in (("history", 1), ("margin", 0)):
            value = getattr(self, name)
            is_integer = isinstance(value, int) and not isinstance(value, bool)
            if not is_integer or value < least:
                raise InputError(
                    f"{name}={value!r}; expected an integer of at least "
                    f"{least}."
                )


class _Float8(keras.layers.Layer):
    """What the layers share: their settings, their histories, their files."""

    # Whether a `.keras` file describes the layer, as `float8` found.
    float8_saved = True

    def __init__(self, *args, float8: dict[str, Any] | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.float8_settings = Settings(**(float8 or {}))

    def build(self, input_shape):
        super().build(input_shape)
        self.add_histories()

    def add_histories(self) -> None:
        """Creates the state of delayed scaling, with nothing in it."""
        is_delayed = self.float8_settings.scaling == "delayed"
        shape = (1 + self.float8_settings.history,)
        self.float8_histories = [
            keras_internals.add_state(self, f"{_PREFIX}{name}", shape)
            for name in (_TENSORS if is_delayed else ())
        ]

    def float8_multiply(self, product, inputs, kernel):
        """A product in 8 bits, where the layer computes in 16."""
        if self.compute_dtype == "float32" or self.lora_enabled:
            return product(inputs, tf.convert_to_tensor(self.kernel))
        histories = [
            keras_internals.uncast_value(each) for each in self.float8_histories
        ]
        return float8_product(
            product,
            tf.convert_to_tensor(inputs),
            keras_internals.uncast_value(kernel),
            Histories(*histories) if histories else None,
            Recipe(
                self.float8_settings.scaling == "delayed",
                self.float8_settings.margin,
                self.float8_settings.power_of_two,
            ),
        )

    def save_own_variables(self, store):
        super().save_own_variables(store)
        if self.float8_saved:
            for history in self.float8_histories:
                store[history.name] = history

    def load_own_variables(self, store):
        histories = {each.name: each for each in self.float8_histories}
        found = store.keys()
        # Keras counts them, and takes those that have a number for a name.
        weights = dict.fromkeys(histories) | {
            key: store[key] for key in found - histories.keys()
        }
        super().load_own_variables(weights)
        for name, history in histories.items():
            value = store[name] if name in found else None
            fits = value is not None and tuple(value.shape) == history.shape
            history.assign(value if fits else tf.zeros(history.shape))

    def get_config(self) -> dict[str, Any]:
        say_how_to_load()
        chosen = dataclasses.asdict(self.float8_settings)
        return super().get_config() | {"float8": chosen}


@keras.saving.register_keras_serializable(package="tfamp", name="Float8Dense")
class Dense(_Float8, keras.layers.Dense):
    """Keras's layer; its product has 8-bit factors."""

    def call(self, inputs, training=None):
        outputs = self.float8_multiply(keras.ops.matmul, inputs, self._kernel)
        return _with_bias_and_activation(self, outputs)


@keras.saving.register_keras_serializable(
    package="tfamp", name="Float8EinsumDense"
)
class EinsumDense(_Float8, keras.layers.EinsumDense):
    """Keras's layer; its product has 8-bit factors."""

    def call(self, inputs, training=None):
        def product(inputs, kernel):
            return keras.ops.einsum(self.equation, inputs, kernel)

        outputs = self.float8_multiply(product, inputs, self._kernel)
        return _with_bias_and_activation(self, outputs)


class _Convolution(_Float8):
    def convolution_op(self, inputs, kernel):
        padding = self.padding
        if padding == "causal":
            before = self.dilation_rate[0] * (self.kernel_size[0] - 1)
            is_last = self.data_format == "channels_last"
            sides = [[before, 0], [0, 0]] if is_last else [[0, 0], [before, 0]]
            inputs, padding = keras.ops.pad(inputs, [[0, 0], *sides]), "valid"

        def product(inputs, kernel):
            if _is_pointwise(self):
                return _pointwise(inputs, kernel, self.strides)
            return keras.ops.conv(
                inputs,
                kernel,
                strides=list(self.strides),
                padding=padding,
                dilation_rate=self.dilation_rate,
                data_format=self.data_format,
            )

        return self.float8_multiply(product, inputs, kernel)


@keras.saving.register_keras_serializable(package="tfamp", name="Float8Conv1D")
class Conv1D(_Convolution, keras.layers.Conv1D):
    """Keras's layer; its product has 8-bit factors."""

    def call(self, inputs):
        # Keras's own convolves by itself, past `convolution_op`.
        return super(keras.layers.Conv1D, self).call(inputs)


@keras.saving.register_keras_serializable(package="tfamp", name="Float8Conv2D")
class Conv2D(_Convolution, keras.layers.Conv2D):
    """Keras's layer; its product has 8-bit factors."""


@keras.saving.register_keras_serializable(package="tfamp", name="Float8Conv3D")
class Conv3D(_Convolution, keras.layers.Conv3D):
    """Keras's layer; its product has 8-bit factors."""


LAYERS = (Dense, EinsumDense, Conv1D, Conv2D, Conv3D)


def is_history(variable: keras.Variable) -> bool:
    """Whether the variable is the history of a scale, which may be lacking."""
    return keras_internals.overwrites_with_gradient(
        variable
    ) and variable.name.startswith(_PREFIX)


def _with_bias_and_activation(layer, outputs):
    if layer.bias is not None:
        outputs = keras.ops.add(outputs, layer.bias)
    return outputs if layer.activation is None else layer.activation(outputs)


def _is_pointwise(layer) -> bool:
    return (
        set(layer.kernel_size) == {1}
        and layer.groups == 1
        and layer.data_format == "channels_last"
    )


def _pointwise(inputs, kernel, strides):
    """A convolution of 1 x 1 as the product of matrices that it is."""
    if set(strides) != {1}:
        inputs = inputs[(slice(None), *(slice(None, None, s) for s in strides))]
    matrix = tf.reshape(kernel, kernel.shape[-2:])
    return keras.ops.matmul(inputs, matrix)
