"""The first values of variables on several workers.

MultiWorkerMirroredStrategy broadcasts them from the chief by an operation that
takes float32, float16, float64, int32, int64 and bool only: a variable in
bfloat16 or int8 cannot be made. Their bits can travel as int64.
"""

import tensorflow as tf

from tfamp.distribute import reduction

# What tf.raw_ops.CollectiveBcastSendV2 takes.
_BROADCAST = (
    *(tf.bool, tf.float16, tf.float32, tf.float64),
    *(tf.int32, tf.int64),
)


def broadcast_in_any_dtype(
    strategy: tf.distribute.MultiWorkerMirroredStrategy,
) -> None:
    """From here on, variables of any dtype can be made in its scope.

    TensorFlow has no public place for it: the private method that says what a
    replica's variable begins with is replaced on this one strategy.
    """
    extended = strategy.extended
    original = extended._get_variable_creator_initial_value

    def creator_initial_value(replica_id, device, primary_var, **kwargs):
        def of_first_replica():
            with tf.device(device):
                value = kwargs["initial_value"]
                value = value() if callable(value) else value
                # What a checkpoint is restored into at its creation.
                value = getattr(value, "wrapped_value", value)
                value = tf.convert_to_tensor(value, kwargs.get("dtype"))
                if value.dtype in _BROADCAST:
                    sent, dtype = value, value.dtype
                else:
                    sent, dtype = reduction.to_words(value), tf.int64
                received = original(
                    replica_id,
                    device,
                    primary_var,
                    **kwargs | {"initial_value": sent, "dtype": dtype},
                )()
                if value.dtype in _BROADCAST:
                    return received
                numbers = reduction.from_words(
                    received, value.shape.num_elements(), value.dtype
                )
                return tf.reshape(numbers, value.shape)

        if replica_id == 0:
            return of_first_replica
        return original(replica_id, device, primary_var, **kwargs)

    extended._get_variable_creator_initial_value = creator_initial_value
