"""What Keras does around the steps of `fit`, tfamp can do."""

import keras
import numpy as np
import tensorflow as tf

from tests.keras_internals.trainees import compiled_model
from tfamp import keras_internals


def test_data_adapters_make_batches_of_arrays():
    (x, y, weight), (x_val, *_) = keras_internals.train_validation_split(
        (np.zeros((10, 2)), np.zeros(10), None), 0.2
    )
    assert (len(x), len(x_val), weight) == (8, 2, None)
    adapter = keras_internals.data_adapter(
        x, y, None, batch_size=3, steps=None, shuffle=False, class_weight=None
    )
    assert keras_internals.is_array_adapter(adapter)
    assert adapter.num_batches == 3
    assert [len(x) for x, _ in adapter.get_tf_dataset()] == [3, 3, 2]
    adapter.on_epoch_begin()
    adapter.on_epoch_end()


def test_the_epoch_to_begin_with_is_what_a_backup_found(tmp_path):
    model = compiled_model()
    model.build((None, 3))
    model.optimizer.build(model.trainable_variables)
    assert keras_internals.initial_epoch(model) == 0
    backup = keras.callbacks.BackupAndRestore(tmp_path)
    backup.set_model(model)
    backup.on_epoch_end(3)
    backup.on_train_begin()
    assert keras_internals.initial_epoch(model) == 4
    keras_internals.forget_initial_epoch(model)
    assert keras_internals.initial_epoch(model) == 0


def test_an_execution_counts_as_whole_where_there_are_some():
    model = compiled_model()
    assert keras_internals.last_of_execution(model, 3, 4) == 3
    model.steps_per_execution = 3
    assert keras_internals.last_of_execution(model, 3, 4) == 5


def test_a_tensorboard_callback_that_profiles_is_known(tmp_path):
    board = keras.callbacks.TensorBoard
    assert not keras_internals.profiles_batches(board(tmp_path))
    profiling = board(tmp_path)
    profiling._start_batch = 2
    assert keras_internals.profiles_batches(profiling)


def test_outputs_of_batches_are_put_together():
    whole = keras_internals.concatenate_outputs(
        [tf.ones((2, 3)), tf.ones((1, 3))]
    )
    assert isinstance(whole, np.ndarray)
    assert whole.shape == (3, 3)
