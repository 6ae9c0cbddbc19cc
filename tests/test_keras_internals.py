"""Each private detail of Keras that tfamp leans on still does what it did."""

import functools
import gc
import logging
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from packaging.version import Version

from tfamp import keras_internals


def test_sublayers_are_the_layers_a_layer_holds_itself():
    attention = layers.MultiHeadAttention(1, 2)
    attention.build((1, 3, 2), (1, 3, 2))
    wrapper = layers.TimeDistributed(attention)
    assert keras_internals.sublayers(wrapper) == [attention]
    names = {each.name for each in keras_internals.sublayers(attention)}
    assert {"query", "key", "value", "attention_output"} < names


def test_a_symbolic_run_sees_real_dtypes_and_changes_no_variable():
    layer = layers.BatchNormalization(dtype="mixed_float16")
    layer.build((None, 2))
    # A functional model repeats the dtype of the day it was built.
    layer.dtype_policy = "mixed_bfloat16"
    dtypes = []

    def run(x):
        dtypes.append(layer(x, training=True).dtype.name)

    before = layer.moving_mean.numpy()
    keras_internals.run_symbolically(run, keras.KerasTensor((4, 2)))
    assert dtypes == ["bfloat16"]
    np.testing.assert_array_equal(layer.moving_mean.numpy(), before)


@pytest.mark.parametrize(
    ("cls", "method"),
    [
        (layers.Attention, "_apply_scores"),
        (layers.AdditiveAttention, "_apply_scores"),
    ],
)
def test_attention_calls_the_method_that_float32_layers_override(cls, method):
    called = []

    def apply_scores(self, scores, value, scores_mask=None, training=False):
        called.append((scores.shape, value.shape, scores_mask, training))
        return value, scores

    overridden = type("Overridden", (cls,), {method: apply_scores})
    overridden()([np.zeros((1, 2, 4)), np.zeros((1, 2, 4))], training=True)
    assert called[-1] == ((1, 2, 2), (1, 2, 4), None, True)


def several_optimizers():
    return keras.optimizers.MultiOptimizer(
        keras.optimizers.OptimizerMap(
            keras.optimizers.SGD(0.5, use_ema=True, ema_overwrite_frequency=3),
            {"absent": keras.optimizers.Adam(use_ema=True)},
        )
    )


@pytest.mark.parametrize(
    "make", [lambda: keras.optimizers.SGD(0.5), several_optimizers]
)
def test_reduced_gradients_are_not_summed_again(make, mirrored):
    with mirrored(2).scope():
        weight = keras.Variable([1.0], name="weight")
        optimizer = make()
        optimizer.build([weight])

    def step():
        with keras_internals.average_overwrite_deferred(optimizer):
            optimizer.apply([tf.constant([1.0])], [weight])

    mirrored(2).run(step)
    # Keras sums over the replicas.
    np.testing.assert_array_equal(weight.numpy(), [0.0])
    with keras_internals.gradients_already_reduced(optimizer):
        mirrored(2).run(step)
    np.testing.assert_array_equal(weight.numpy(), [-0.5])
    mirrored(2).run(step)
    np.testing.assert_array_equal(weight.numpy(), [-1.5])


def test_averages_and_their_frequencies_are_found_in_several_optimizers():
    optimizer = several_optimizers()
    weight = keras.Variable([1.0], name="weight")
    optimizer.build([weight])
    (averaging,) = keras_internals.averaging_optimizers(optimizer)
    with keras_internals.average_overwrite_deferred(optimizer) as frequencies:
        assert frequencies == [(averaging, 3)]
        assert averaging.ema_overwrite_frequency is None
    assert averaging.ema_overwrite_frequency == 3
    optimizer.apply([tf.constant([1.0])], [weight])
    ((variable, average),) = keras_internals.moving_averages(averaging)
    assert variable is weight
    np.testing.assert_array_equal(average.numpy(), weight.numpy())


def test_variables_that_float8_overwrites_are_known():
    keras.config.set_dtype_policy("mixed_bfloat16")
    layer = layers.Dense(2)
    layer.build((None, 2))
    layer.quantize("float8")
    overwritten = [
        keras_internals.overwrites_with_gradient(variable)
        for variable in layer.trainable_variables
    ]
    assert sorted(overwritten) == [False] * 2 + [True] * 6


def test_state_is_added_to_a_layer_that_is_built():
    model = keras.Sequential([keras.Input((2,)), layers.Dense(2, name="a")])
    state = keras_internals.add_state(model.layers[0], "state", (3,))
    assert state.path == f"{model.layers[0].path}/state"
    assert keras_internals.overwrites_with_gradient(state)
    assert any(each is state for each in model.trainable_variables)
    np.testing.assert_array_equal(state.numpy(), np.zeros(3))
    with pytest.raises(ValueError, match="cannot add new elements"):
        model.layers[0].add_weight(name="other", shape=(1,))


def compiled_model():
    model = keras.Sequential([layers.Dense(2)])
    model.compile("adam", loss="mse", metrics=["mae"])
    return model


def test_a_model_is_built_with_its_optimizer_metrics_and_loss():
    model = compiled_model()
    spec = tf.TensorSpec((None, 3)), tf.TensorSpec((None, 2))
    keras_internals.build_everything(model, spec)
    assert model.built
    assert model.optimizer.built
    assert "mae" in model.get_metrics_result()
    assert keras_internals.loss_tracker(model) is model.metrics[0]
    assert {model, *model.layers} < set(keras_internals.all_layers(model))


def test_a_none_in_a_batch_is_no_obstacle_to_building():
    model = keras.Sequential([layers.ActivityRegularization(l2=1.0)])
    model.compile("adam")
    data = tf.data.Dataset.from_tensors(tf.ones((4, 3)))
    data = data.map(lambda x: (x, None))
    keras_internals.build_everything(model, data.element_spec)
    assert model.built


def test_a_model_without_call_is_left_as_it_is():
    model = keras.Model()
    model.compile("adam")
    keras_internals.build_everything(model, tf.TensorSpec((None, 3)))
    assert not model.built


def test_another_optimizer_is_saved_with_the_model(tmp_path):
    model = compiled_model()
    model.build((None, 3))
    keras_internals.replace_optimizer(model, keras.optimizers.Lion(0.25))
    model.optimizer.build(model.trainable_variables)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert isinstance(loaded.optimizer, keras.optimizers.Lion)


def test_losses_of_layers_are_added_in_float32():
    inputs = keras.Input((3,), dtype="float16")
    model = keras.Sequential(
        [inputs, layers.ActivityRegularization(l2=1.0, dtype="float16")]
    )
    model.compile("adam", loss="mse")
    x = tf.ones((2, 3), "float16")
    with pytest.raises(tf.errors.InvalidArgumentError, match="half tensor"):
        model.compute_loss(x, x, model(x))
    with keras_internals.additional_losses_in_float32(model):
        loss = model.compute_loss(x, x, model(x))
    assert loss.dtype == tf.float32
    assert "_aggregate_additional_loss" not in vars(model)


def test_a_loss_before_its_reduction_is_weighted_and_not_yet_divided():
    outputs = tf.ones([2, 3, 1])
    keras_internals.attach_mask(
        outputs, tf.constant([[True, True, False], [False] * 3])
    )
    loss = keras.losses.MeanSquaredError()

    values, weights, mask, is_scalar = keras_internals.unreduced_loss(
        loss, tf.zeros([2, 3, 1]), outputs, tf.constant([[2.0], [5.0]])
    )

    assert values.numpy().tolist() == [[2, 2, 0], [0, 0, 0]]
    assert weights.numpy().tolist() == [[2, 2, 0], [0, 0, 0]]
    assert int(tf.reduce_sum(tf.cast(mask, tf.int32))) == 2
    assert not is_scalar
    assert keras_internals.is_loss_of_rows(loss)


def test_terms_of_a_loss_are_made_by_other_functions_and_put_back():
    inputs = keras.Input([1])
    layer = keras.layers.Dense(1, name="a", kernel_regularizer="l2")
    outputs = {"a": layer(inputs), "b": keras.layers.Identity()(inputs)}
    model = keras.Model(inputs, outputs)
    model.compile("sgd", loss={"a": "mse", "b": "mae"})
    ones = {"a": tf.ones([2, 1]), "b": tf.ones([2, 1])}
    before = float(model.compute_loss(None, ones, ones))
    counted = []

    with keras_internals.loss_terms_replaced(
        model,
        leaf=lambda loss, y, y_pred, weight: tf.constant(10.0),
        add=lambda loss: tf.constant(3.0),
        count=lambda metric, value: counted.append(float(value)),
    ):
        within = float(model.compute_loss(None, ones, ones))

    assert within == 23.0
    assert counted == [10.0, 10.0]
    assert float(model.compute_loss(None, ones, ones)) == before


def test_masks_move_from_one_tensor_to_another():
    mask = tf.constant([True, False])
    marked, plain = tf.ones((2, 1)), tf.ones((2, 1))
    assert keras_internals.mask_of(plain) is None
    keras_internals.attach_mask(plain, None)
    assert keras_internals.mask_of(plain) is None
    keras_internals.attach_mask(marked, mask)
    assert keras_internals.mask_of(marked) is mask
    # Keras looks for it in the same place.
    loss = keras.losses.MeanAbsoluteError()
    assert float(loss(tf.constant([[1.0], [9.0]]), marked)) == 0.0


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


def test_the_global_seed_generator_is_what_unseeded_draws_use():
    keras.utils.set_random_seed(1)
    assert keras_internals.global_seed_generator(create=False) is None
    keras.random.normal((1,))
    generator = keras_internals.global_seed_generator(create=False)
    before = generator.state.numpy()
    keras.random.normal((1,))
    assert (generator.state.numpy() != before).any()
    assert keras_internals.global_seed_generator(create=True) is generator


def test_additional_losses_are_kept_as_they_were():
    layer = layers.Dense(2, activity_regularizer="l2")
    layer(np.ones((1, 2)))
    before = [float(loss) for loss in layer.losses]
    with keras_internals.additional_losses_kept([layer]):
        layer(np.full((1, 2), 3.0))
        assert [float(loss) for loss in layer.losses] != before
    assert [float(loss) for loss in layer.losses] == before


def test_compile_arguments_are_the_callers_own_objects():
    model = keras.Sequential([keras.Input((2,)), layers.Dense(2)])
    loss = keras.losses.MeanSquaredError()
    model.compile("sgd", loss=loss, metrics=["mae"], weighted_metrics=["mse"])
    arguments = keras_internals.compile_arguments(model)
    assert arguments["loss"] is loss
    assert arguments["optimizer"] is model.optimizer
    assert arguments["metrics"] == ["mae"]
    assert arguments["weighted_metrics"] == ["mse"]


def test_loss_and_metrics_used_on_trial_stay_unbuilt():
    model = keras.Sequential([keras.Input((2,)), layers.Dense(2)])
    model.compile("sgd", loss="mse", metrics=["mae"])
    y = np.ones((1, 2), "float32")
    before = [metric.name for metric in model.metrics]
    with keras_internals.loss_and_metrics_unbuilt(model):
        assert float(model.compute_loss(None, y, y)) == 0.0
        model.compute_metrics(None, y, y)
    assert not model._compile_loss.built
    assert not model._compile_metrics.built
    assert [metric.name for metric in model.metrics] == before


def test_a_forgotten_global_seed_generator_is_made_anew():
    keras.random.normal((1,))
    assert keras_internals.global_seed_generator(create=False) is not None
    keras_internals.forget_global_seed_generator()
    assert keras_internals.global_seed_generator(create=False) is None


def test_a_replaced_policy_reaches_computation_and_is_put_back():
    shared = keras.dtype_policies.DTypePolicyMap(
        keras.dtype_policies.get("mixed_float16")
    )
    mapped = layers.Dense(1, dtype=shared, name="mapped")
    plain = layers.Dense(1, dtype="mixed_bfloat16")
    float32 = keras.dtype_policies.get("float32")
    for layer in (mapped, plain):
        layer.build((None, 2))
    with keras_internals.dtype_policy_replaced([mapped, plain], float32):
        assert mapped(tf.ones([1, 2])).dtype == tf.float32
        assert plain(tf.ones([1, 2])).dtype == tf.float32
    assert mapped(tf.ones([1, 2])).dtype == tf.float16
    assert plain(tf.ones([1, 2])).dtype == tf.bfloat16
    assert mapped.dtype_policy is shared
    assert "mapped" not in shared


def test_optimized_variables_are_those_it_was_built_with():
    variables = [keras.Variable([1.0]), keras.Variable([2.0])]
    optimizer = keras.optimizers.Adam()
    optimizer.build(variables)
    found = keras_internals.optimized_variables(optimizer)
    assert [id(each) for each in found] == [id(each) for each in variables]


def test_apply_clips_decays_and_updates_by_the_methods_that_are_replaced():
    weight = keras.Variable([8.0])
    optimizer = keras.optimizers.SGD(1.0, global_clipnorm=0.5, weight_decay=0.5)
    optimizer.build([weight])
    seen = []

    def update(gradient, variable, learning_rate):
        seen.append((float(gradient[0]), type(variable), float(learning_rate)))

    with (
        keras_internals.gradients_already_clipped(optimizer),
        keras_internals.update_replaced(optimizer, update),
    ):
        optimizer.apply([tf.constant([4.0])], [weight])
    ((gradient, cls, rate),) = seen
    assert (gradient, rate) == (4.0, 1.0)
    assert issubclass(cls, tf.Variable)
    assert weight.numpy() == 8.0
    # And Keras's own are back: 8 decays to 4, the gradient is clipped to 0.5.
    optimizer.apply([tf.constant([4.0])], [weight])
    assert weight.numpy() == 3.5


def test_the_global_norm_is_found_where_keras_would_clip_to_it():
    sgd = keras.optimizers.SGD
    found = [
        keras_internals.global_clip_norm(each)
        for each in (
            sgd(global_clipnorm=2.0),
            sgd(clipvalue=2.0),
            sgd(global_clipnorm=2.0, gradient_accumulation_steps=2),
            several_optimizers(),
        )
    ]
    assert found == [2.0, None, None, None]


def test_moments_and_decay_of_a_variable_are_found():
    kernel, bias = keras.Variable([1.0]), keras.Variable([1.0], name="bias")
    adam = keras.optimizers.AdamW(weight_decay=0.5)
    adam.exclude_from_weight_decay(var_names=["bias"])
    sgd = keras.optimizers.SGD(momentum=0.5)
    for optimizer in (adam, sgd):
        optimizer.build([kernel, bias])
        optimizer.apply([tf.constant([2.0]), tf.constant([0.0])])
    first, second = keras_internals.adam_moments(adam, kernel.value)
    np.testing.assert_allclose(first.numpy(), [0.2], rtol=1e-6)
    np.testing.assert_allclose(second.numpy(), [0.004], rtol=1e-6)
    momentum = keras_internals.sgd_momentum(sgd, kernel.value)
    np.testing.assert_allclose(momentum.numpy(), [-0.02], rtol=1e-6)
    assert keras_internals.decays(adam, kernel.value)
    assert not keras_internals.decays(adam, bias.value)
    assert not keras_internals.decays(sgd, kernel.value)
    assert keras_internals.updates_as(adam, keras.optimizers.Adam)
    assert not keras_internals.updates_as(sgd, keras.optimizers.Adam)


@pytest.mark.parametrize(
    ("told", "expected"),
    [("auto", None), (True, True), (False, None)],
)
def test_what_compile_was_told_of_xla_is_found(told, expected):
    """On a CPU "auto" becomes False: told the same, it is as if not told."""
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse", jit_compile=told)
    assert keras_internals.asked_to_jit(model) is expected


def test_the_functions_behind_keras_ops_are_where_they_are_replaced():
    modules = keras_internals.backend_modules()
    for name in ("exp", "softmax", "logsumexp", "norm", "cast", "dropout"):
        assert any(callable(vars(each).get(name)) for each in modules), name
    for owner, name in (
        *keras_internals.casts_of_keras(),
        *keras_internals.casts_of_users(),
        *keras_internals.gradient_functions(),
        *keras_internals.storing_functions(),
        *keras_internals.applying_functions(),
        keras_internals.TRACED_CALL,
    ):
        assert callable(vars(owner)[name]), name


def test_a_variable_is_read_as_it_is_stored_inside_a_16_bit_scope():
    variable = keras.Variable(1.0 + 2.0**-20)
    with keras_internals.autocast_scope("bfloat16"):
        assert variable.value.dtype == tf.bfloat16
        stored = keras_internals.uncast_value(variable)
    assert float(stored) == 1.0 + 2.0**-20


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


def test_a_seed_is_seen():
    keras.utils.set_random_seed(1)
    assert keras_internals.has_global_seed()


@pytest.mark.parametrize(
    ("make", "is_warned"),
    [(tf.function, True), (keras_internals.graph_function, False)],
)
def test_traces_of_one_code_are_counted_together(make, is_warned, caplog):
    def function_of(number):
        def function(x):
            return x + number

        return make(function)

    # A program that ran before may have made it say less.
    with caplog.at_level(logging.WARNING, logger="tensorflow"):
        sums = [int(function_of(i)(tf.constant(1))) for i in range(7)]
    assert sums == [1, 2, 3, 4, 5, 6, 7]
    assert ("retracing" in caplog.text) == is_warned


def test_outputs_of_batches_are_put_together():
    whole = keras_internals.concatenate_outputs(
        [tf.ones((2, 3)), tf.ones((1, 3))]
    )
    assert isinstance(whole, np.ndarray)
    assert whole.shape == (3, 3)


def test_a_tensorboard_callback_that_profiles_is_known(tmp_path):
    board = keras.callbacks.TensorBoard
    assert not keras_internals.profiles_batches(board(tmp_path))
    profiling = board(tmp_path)
    profiling._start_batch = 2
    assert keras_internals.profiles_batches(profiling)


def test_a_session_loses_its_mark_when_it_is_cleared():
    keras_internals.mark_session("here")
    assert keras_internals.session_mark() == "here"
    keras.backend.clear_session()
    assert keras_internals.session_mark() is None


def test_models_know_the_scope_that_they_were_made_in(mirrored):
    def build():
        return keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])

    assert not keras_internals.is_made_in_scope(build())
    with mirrored(2).scope():
        assert keras_internals.is_made_in_scope(build())


def test_layers_and_optimizer_are_built_by_specs():
    model = keras.Sequential([keras.layers.Dense(3)])
    model.compile("adam", "mse", metrics=["mae"])
    spec = (tf.TensorSpec((None, 2)), tf.TensorSpec((None, 3)))
    keras_internals.build_layers(model, spec)
    assert model.layers[0].kernel.shape == (2, 3)
    keras_internals.build_optimizer(model)
    assert model.optimizer.built
    logs = keras_internals.logs_in_order(model, {"loss": 1.0})
    assert logs == 1.0
    assert not keras_internals.is_marked(model, "seen")
    keras_internals.mark(model, "seen")
    assert keras_internals.is_marked(model, "seen")


def test_schedules_are_computed_on_the_host_and_put_back():
    schedule = keras.optimizers.schedules.CosineDecay(
        0.1, 10, warmup_target=0.2, warmup_steps=2
    )
    optimizer = keras.optimizers.SGD(schedule)
    optimizer.build([keras.Variable([1.0])])

    @tf.function
    def rate():
        with keras_internals.schedules_on_host(optimizer):
            return keras.ops.convert_to_tensor(optimizer.learning_rate)

    graph = rate.get_concrete_function().graph
    (branch,) = [op for op in graph.get_operations() if "If" in op.type]
    assert branch.device.endswith("CPU:0")
    assert "_get_current_learning_rate" not in vars(optimizer)


def test_metrics_of_others_are_told_from_keras_s_own():
    def own(y_true, y_pred):
        return y_pred - y_true

    class Own(keras.metrics.MeanSquaredError):
        pass

    for metrics, expected in (
        ([], True),
        (["mae", keras.metrics.AUC()], True),
        ([own], False),
        ([Own()], False),
    ):
        model = keras.Sequential([keras.Input((1,)), layers.Dense(1)])
        model.compile("sgd", "mse", metrics=metrics, run_eagerly=True)
        ones = np.ones((2, 1), "float32")
        model.train_on_batch(ones, ones)
        assert keras_internals.metrics_are_kerass(model) == expected


def test_metrics_count_as_compute_metrics_has_them_count():
    def compiled():
        model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
        model.compile(
            loss="mse", metrics=["mae"], weighted_metrics=["cosine_similarity"]
        )
        return model

    generator = np.random.default_rng(0)
    y, outputs = generator.random((2, 6, 2), "float32")
    weights = generator.random(6, "float32")
    model, other = compiled(), compiled()
    expected = model.compute_metrics(None, y, outputs, weights)
    keras_internals.count_in_metrics(other, y, outputs, weights)
    assert {"mae", "cosine_similarity"} < expected.keys()
    for name, value in other.get_metrics_result().items():
        assert float(value) == float(expected[name]), name


def test_renormalizing_batch_norm_is_told_from_any_other():
    assert not keras_internals.renormalizes(layers.BatchNormalization())
    if hasattr(layers.BatchNormalization(), "renorm"):
        layer = layers.BatchNormalization(renorm=True)
        assert keras_internals.renormalizes(layer)


def test_an_execution_counts_as_whole_where_there_are_some():
    model = compiled_model()
    assert keras_internals.last_of_execution(model, 3, 4) == 3
    model.steps_per_execution = 3
    assert keras_internals.last_of_execution(model, 3, 4) == 5


def test_optimizers_that_leave_averages_are_told_through_a_scaler():
    weight = keras.Variable([1.0])
    for use_ema in (False, True):
        inner = keras.optimizers.SGD(use_ema=use_ema)
        optimizer = keras.optimizers.LossScaleOptimizer(inner)
        optimizer.build([weight])
        assert keras_internals.leaves_averages(optimizer) is use_ema
        assert keras_internals.leaves_averages(inner) is use_ema


def test_inputs_and_values_are_of_another_dtype_for_a_while():
    inputs = keras.Input([2], dtype="float16", name="x")
    dense = keras.layers.Dense(2, dtype="bfloat16")
    model = keras.Sequential([inputs, dense])
    kernel = np.float32(dense.kernel)

    with (
        keras_internals.input_dtypes_replaced([model], {"float16": "float32"}),
        keras_internals.values_replaced([dense.kernel], "float32"),
    ):
        assert keras_internals.input_structure(model).dtype == "float32"
        assert dense.kernel.value.dtype == "float32"
        np.testing.assert_array_equal(dense.kernel, kernel)

    assert keras_internals.input_structure(model).dtype == "float16"
    assert dense.kernel.value.dtype == "bfloat16"


def test_what_a_model_takes():
    a, b = keras.Input([2], name="one"), keras.Input([3], name="two")
    total = keras.ops.sum(a, -1) + keras.ops.sum(b, -1)
    model = keras.Model({"one": a, "two": b}, total)
    structure = keras_internals.input_structure(model)
    assert structure["one"].shape == (None, 2)
    assert keras_internals.input_name(structure["two"]) == "two"
    assert isinstance(model, keras_internals.Functional)
    operations = keras_internals.graph_operations(model)
    assert "Sum" in {type(each).__name__ for each in operations}
    assert keras_internals.input_structure(keras.Sequential()) is None
    assert keras_internals.graph_inputs(model)["one"] is structure["one"]
    steps = keras_internals.graph_steps(model)
    assert len(steps) == 3
    assert keras.tree.flatten(steps[-1][1])[0] is total

    class Own(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = keras.layers.Dense(1)

        def call(self, x):
            return self.dense(x["rows"])

    own = Own()
    assert keras_internals.called_shapes(own) is None
    own({"rows": np.zeros([2, 3], "float32")})
    assert keras_internals.called_shapes(own)["rows"] == (2, 3)


def test_what_is_traced_for_xla_is_known():
    def ask(x):
        inner = tf.cond(
            x > 0,
            lambda: tf.constant(keras_internals.is_compiled_by_xla()),
            lambda: tf.constant(False),
        )
        return tf.logical_and(inner, keras_internals.is_compiled_by_xla())

    one = tf.constant(1.0)
    assert not ask(one)
    assert not tf.function(ask)(one)
    assert tf.function(ask, jit_compile=True)(one)
    assert tf.function(tf.function(ask, jit_compile=True))(one)


def test_variables_of_an_optimizer_are_made_by_another_function():
    weight, made = keras.Variable([[1.0, 2.0]], name="kernel"), []

    def make(reference, name, initializer):
        assert reference is weight
        made.append(name)
        return keras.Variable(tf.zeros([1]), name=f"part_{name}")

    optimizer = keras.optimizers.Adam(use_ema=True, name="own")
    with keras_internals.variables_made_by(optimizer, make):
        optimizer.build([weight])
    assert made == ["average", "momentum", "velocity"]
    parts = [v for v in optimizer.variables if "part_" in v.name]
    assert [v.path for v in parts] == [f"own/part_{name}" for name in made]
    assert "add_variable_from_reference" not in vars(optimizer)
    assert keras_internals.variable_index(optimizer, weight) == 0


def test_gradients_are_clipped_as_an_optimizer_would():
    optimizer = keras.optimizers.SGD(clipnorm=1.0)
    gradients = [tf.constant([3.0, 4.0]), None, tf.constant([0.5])]
    first, nothing, last = keras_internals.clipped(optimizer, gradients)
    np.testing.assert_allclose(first, [0.6, 0.8], rtol=1e-6)
    assert nothing is None
    np.testing.assert_array_equal(last, [0.5])


def test_a_variable_is_kept_in_another_dtype_and_put_back():
    class Doubled(keras.Variable):
        @property
        def value(self):
            return 2 * super().value

    weight = keras.Variable([3.0])
    wide, cls = keras_internals.stored(weight), type(weight)
    narrow = tf.Variable([5.0], dtype=tf.bfloat16)
    keras_internals.replace_value(weight, narrow, Doubled)
    assert weight.dtype == "float32"
    assert keras_internals.stored(weight) is narrow
    np.testing.assert_array_equal(tf.cast(weight.value, tf.float32), [10.0])
    keras_internals.replace_value(weight, wide, cls)
    np.testing.assert_array_equal(weight.numpy(), [3.0])


def test_reads_of_variables_are_noted_with_the_dtype_they_are_read_in():
    layer = layers.Dense(1, dtype="mixed_bfloat16")
    layer.build((None, 2))
    found = []

    def note(variable):
        found.append((variable.name, keras_internals.autocast_dtype()))

    with keras_internals.reads_noted(layer.trainable_variables, note):
        layer(np.zeros((1, 2), "float32"))
        tf.convert_to_tensor(layer.bias.value)
    assert sorted(found, key=str) == [
        ("bias", "bfloat16"),
        ("bias", None),
        ("kernel", "bfloat16"),
    ]
    layer(np.zeros((1, 2), "float32"))
    assert len(found) == 3


def test_a_scope_that_gives_variables_other_values_is_known():
    assert not keras_internals.in_stateless_scope()
    with keras.StatelessScope():
        assert keras_internals.in_stateless_scope()


def test_each_strategy_numbers_its_collectives_once_and_apart():
    strategies = [
        tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]) for _ in range(2)
    ]
    groups = []
    for strategy in strategies:
        keras_internals.separate_collectives(strategy)
        own = strategy.extended._collective_ops
        assert strategy.extended._cross_device_ops is own
        keras_internals.separate_collectives(strategy)
        assert strategy.extended._collective_ops is own
        groups.append(own._collective_keys._group_key)
    # Far enough for all groups that one of them has.
    assert abs(groups[0] - groups[1]) >= 1000

    to_one = tf.distribute.ReductionToOneDevice()
    chosen = tf.distribute.MirroredStrategy(["CPU:0"], to_one)
    keras_internals.separate_collectives(chosen)
    assert chosen.extended._cross_device_ops is to_one
    keras_internals.separate_collectives(tf.distribute.get_strategy())


def test_sums_of_gradients_go_through_another_function_and_back():
    weight = keras.Variable([1.0])
    optimizer = keras.optimizers.SGD(1.0)
    optimizer.build([weight])

    def doubled(own, by, pairs):
        assert by is optimizer
        return own(by, [(2 * gradient, v) for gradient, v in pairs])

    with keras_internals.gradient_sums_replaced(doubled):
        optimizer.apply([tf.constant([1.0])], [weight])
    np.testing.assert_array_equal(weight, [-1.0])
    optimizer.apply([tf.constant([1.0])], [weight])
    np.testing.assert_array_equal(weight, [-2.0])


def test_records_of_custom_gradients_go_with_the_trace_and_no_others():
    @tf.custom_gradient
    def tripled(x):
        return 3 * x, lambda upstream: 5 * upstream

    def gradient(x):
        def body(i, total):
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = tf.cond(x > 0, lambda: tripled(x), lambda: x)
            return i + 1, total + tape.gradient(y, x)

        return tf.while_loop(lambda i, _: i < 2, body, [0, 0.0])[1]

    def records():
        module = sys.modules["tensorflow.python.framework.ops"]
        found = module.gradient_registry._registry
        return {name for name in found if name.startswith("CustomGradient-")}

    inner = tf.function(tripled)
    before = records()
    kept = tf.function(lambda x: gradient(inner(x)))
    assert float(kept(tf.constant(1.0))) == 10.0
    of_others = records() - before
    assert len(of_others) >= 2

    @tf.function
    def dropping(x):
        with keras_internals.differentiated_within():
            return gradient(x) + gradient(inner(x))

    assert float(dropping(tf.constant(1.0))) == 20.0
    assert records() == before | of_others
    # That of a function within is there for whoever calls it next.
    with tf.GradientTape() as tape:
        x = tf.constant(1.0)
        tape.watch(x)
        y = inner(x)
    assert float(tape.gradient(y, x)) == 5.0


def test_records_are_dropped_while_garbage_collection_lets_others_add():
    registry = sys.modules[
        "tensorflow.python.framework.ops"
    ].gradient_registry._registry
    record = {"type": lambda: None, "location": ()}
    added, pairs = [], []

    def add(phase, info):
        added.append(f"CustomGradient-of-another-{len(added)}")
        registry[added[-1]] = record

    @tf.function(autograph=False)
    def dropping(x):
        with keras_internals.differentiated_within():
            y = x * 2
            # Python keeps some to use again, whose making collects nothing.
            pairs.extend((i, i) for i in range(10_000))
            gc.callbacks.append(add)
            gc.set_threshold(1)
            return y

    thresholds = gc.get_threshold()
    try:
        assert float(dropping(tf.constant(1.0))) == 2.0
    finally:
        gc.set_threshold(*thresholds)
        gc.callbacks.remove(add)
        for name in added:
            registry.pop(name, None)
    assert added


@pytest.mark.skipif(
    Version(keras.__version__) < Version("3.15"), reason="not tried with it"
)
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Layer InputLayer does not have")
def test_gptq_fits_kernels_to_data_and_is_saved_whole(tmp_path):
    draw = np.random.default_rng(0)
    # Of two numbers a row: errors in what they do not move are free.
    x = (draw.normal(size=(64, 2)) @ draw.normal(size=(2, 16))).astype(
        "float32"
    )
    kernel = draw.normal(size=(16, 3)).astype("float32")
    # Of one sign, as a kernel may be.
    kernel[:, 0] = 2 + np.arange(16) / 16
    errors = {}
    for kind in ("int4", "gptq"):
        model = keras.Sequential(
            [keras.Input([16]), layers.Dense(3, use_bias=False)]
        )
        model.set_weights([kernel])
        if kind == "int4":
            keras_internals.quantize(model, kind, [])
        else:
            run = functools.partial(model, x)
            keras_internals.quantize_with_gptq(model, [], run)
        errors[kind] = np.abs(model(x) - x @ kernel).max()
    assert 0 < errors["gptq"] < 0.7 * errors["int4"]

    with keras_internals.saved_whole(model):
        model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    np.testing.assert_array_equal(loaded(x), model(x))


@pytest.mark.filterwarnings("ignore:Layer .* does not have")
def test_what_a_file_would_load_as_it_was_quantized_is_known():
    @keras.saving.register_keras_serializable("test_keras_internals")
    class Making(layers.Layer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.dense = layers.Dense(2, name="dense")

        def build(self, shape):
            self.dense.build(shape)

        def call(self, x):
            return self.dense(x)

    inputs = keras.Input([3, 2])
    x = layers.MultiHeadAttention(1, 2)(inputs, inputs)
    model = keras.Model(inputs, layers.Dense(2)(Making(name="making")(x)))
    keras_internals.quantize(model, "int8", [])
    lost = keras_internals.lost_at_saving(model)
    every = keras_internals.all_layers(model)
    assert [every[i].path for i in lost] == ["making/dense"]
    assert sum(each.quantization_mode == "int8" for each in every) == 6


def test_a_sequential_without_an_input_rounds_to_its_first_layers_dtype(
    tmp_path,
):
    keras.config.set_dtype_policy("mixed_bfloat16")
    x = np.array([[257.0]], "float32")
    model = keras.Sequential([layers.Identity(dtype="mixed_bfloat16")])
    assert keras_internals.input_dtype(model) is None
    model(x)
    assert keras_internals.input_dtype(model) == "bfloat16"
    model.layers[0].dtype_policy = "float32"
    np.testing.assert_array_equal(model(x), [[256.0]])
    keras_internals.set_input_dtype(model, "float32")
    np.testing.assert_array_equal(model(x), x)
    model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    assert keras_internals.input_dtype(loaded) == "float32"
    own = keras.Sequential([keras.Input((1,)), layers.Dense(1)])
    assert keras_internals.input_dtype(own) == "float32"
    assert keras_internals.input_dtype(layers.Dense(1)) is None
