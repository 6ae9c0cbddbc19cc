"""The first values of variables on several workers.

MultiWorkerMirroredStrategy broadcasts them from the chief by an operation that
takes float32, float16, float64, int32, int64 and bool only: a variable in
bfloat16 or int8 cannot be made. Their bits can travel as int64. And where a
worker makes another variable than the chief, that operation fails on one of
them and waits for ever on the other: what is made is told before.
"""

import weakref
from collections.abc import Mapping

import tensorflow as tf

from tfamp import tensorflow_internals
from tfamp.distribute import reduction

# What tf.raw_ops.CollectiveBcastSendV2 takes.
_BROADCAST = (
    *(tf.bool, tf.float16, tf.float32, tf.float64),
    *(tf.int32, tf.int64),
)
# The largest number of axes of a variable.
_MOST_AXES = 14

_unlike: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def numbers_unlike_the_chiefs(
    strategy: tf.distribute.Strategy,
) -> Mapping[str, float]:
    """What variables of one number were to begin with here, by their names.

    Those that the chief gave another number, as with another learning rate.
    """
    return _unlike.get(strategy.extended, {})


def broadcast_in_any_dtype(
    strategy: tf.distribute.MultiWorkerMirroredStrategy,
) -> None:
    """From here on, variables of any dtype can be made in its scope."""
    unlike = _unlike.setdefault(strategy.extended, {})

    def first_value(original, replica_id, device, primary_var, **kwargs):
        def broadcast(value):
            return original(
                replica_id,
                device,
                primary_var,
                **kwargs | {"initial_value": value, "dtype": value.dtype},
            )()

        def of_first_replica():
            with tf.device(device):
                value = kwargs["initial_value"]
                value = value() if callable(value) else value
                # What a checkpoint is restored into at its creation.
                value = getattr(value, "wrapped_value", value)
                value = tf.convert_to_tensor(value, kwargs.get("dtype"))
                dtype, shape = value.dtype, value.shape
                if tf.executing_eagerly():
                    dtype, shape = _read(broadcast(_described(value)))
                own, value = value, _fitted(value, dtype, shape)
                if dtype in _BROADCAST:
                    received = broadcast(value)
                else:
                    received = reduction.from_words(
                        broadcast(reduction.to_words(value)),
                        shape.num_elements(),
                        dtype,
                    )
                    received = tf.reshape(received, shape)
                if value is not own:
                    # Another model: this is found before it trains.
                    return own
                if tf.executing_eagerly() and _are_unlike(own, received):
                    unlike[str(kwargs.get("name"))] = float(own)
                return received

        if replica_id == 0:
            return of_first_replica
        return original(replica_id, device, primary_var, **kwargs)

    tensorflow_internals.replace_first_values(strategy, first_value)


def _described(value: tf.Tensor) -> tf.Tensor:
    """Dtype and shape, as many numbers whatever they are."""
    sizes = value.shape.as_list()
    padding = [0] * (_MOST_AXES - len(sizes))
    return tf.constant(
        [value.dtype.as_datatype_enum, len(sizes), *sizes, *padding], tf.int64
    )


def _read(described: tf.Tensor) -> tuple[tf.DType, tf.TensorShape]:
    dtype, rank, *sizes = described.numpy().tolist()
    return tf.as_dtype(dtype), tf.TensorShape(sizes[:rank])


def _fitted(
    value: tf.Tensor, dtype: tf.DType, shape: tf.TensorShape
) -> tf.Tensor:
    """The value, or one of this dtype and shape in its place."""
    if value.dtype == dtype and value.shape == shape:
        return value
    return tf.zeros(shape, dtype)


def _are_unlike(own: tf.Tensor, received: tf.Tensor) -> bool:
    is_number = own.shape.rank == 0 and own.dtype.is_floating
    return is_number and float(own) != float(received)
