"""Probing sees what a model computes, and leaves it as it was."""

import json

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import tfamp
from tests.conftest import first_always
from tfamp import keras_internals
from tfamp.analysis.probe import part as probe_part
from tfamp.analysis.probe import steps
from tfamp.analysis.probe.counter import Step, optimizers_of
from tfamp.checkpoint.random_state import get_random_state


def functional():
    x = keras.Input([4])
    y = layers.Dense(6, name="wide")(x)
    y = layers.BatchNormalization(name="norm")(y)
    y = layers.Dropout(0.5, name="dropout")(layers.ReLU(name="relu")(y))
    model = keras.Model(x, layers.Dense(3, name="head")(y), name="functional")
    return compiled(model, tfamp.wrap_optimizer(keras.optimizers.Adam(0.01)))


def sequential():
    """Of which `tfamp.fit` wraps the optimizer."""
    model = keras.Sequential(
        [keras.Input([4]), layers.Dense(3, "tanh", name="head")],
        name="sequential",
    )
    return compiled(model, "adam")


class Embedded(layers.Layer):
    """Passes on the mask that a layer inside attached to its output."""

    def __init__(self):
        super().__init__(name="embedded")
        self.inner = layers.Embedding(5, 4, mask_zero=True, name="inner")

    def build(self, shape):
        self.inner.build(shape)

    def call(self, x):
        return self.inner(x)


class Masked(keras.Model):
    """A subclassed model with a mask, sparse gradients and a loop."""

    def __init__(self):
        super().__init__(name="masked")
        self.embedded = Embedded()
        self.recurrent = layers.LSTM(3, name="recurrent")

    def call(self, x):
        # Zeros are padding, if the mask arrives.
        return self.recurrent(self.embedded(tf.cast(tf.abs(x), tf.int32)))


class OwnStep(keras.Model):
    """A model with a training step of its own, which draws without a seed."""

    def __init__(self):
        super().__init__(name="own_step")
        self.dense = layers.Dense(3, name="head")

    def call(self, x):
        return self.dense(x)

    def train_step(self, data):
        x, y = data
        x += keras.random.normal(x.shape)
        loss, gradients = tfamp.value_and_gradients(
            lambda: tf.reduce_mean((self(x, training=True) - y) ** 2),
            self.trainable_variables,
            self.optimizer,
        )
        self.optimizer.apply(gradients, self.trainable_variables)
        return {"loss": loss}


def masked():
    return compiled(Masked(), "sgd")


def own_step():
    # Makes the generator that the step draws from.
    keras.random.normal([1])
    return compiled(OwnStep(), tfamp.wrap_optimizer("adam", "mixed_float16"))


def compiled(model, optimizer, **options):
    model.compile(
        optimizer,
        loss="mse",
        metrics=["mae"],
        auto_scale_loss=False,
        **options,
    )
    return model


def batches(count=3, rows=4):
    generator = np.random.default_rng(0)
    x = generator.normal(size=[count * rows, 4]).astype(np.float32)
    y = generator.normal(size=[count * rows, 3]).astype(np.float32)
    return tf.data.Dataset.from_tensor_slices((x, y)).batch(
        rows, drop_remainder=True
    )


def state(model):
    """All variables, as bytes."""
    variables = [*model.variables, *model.metrics_variables]
    for optimizer in optimizers_of(model):
        inner = getattr(optimizer, "inner_optimizer", optimizer)
        variables.extend(inner.variables)
    return [variable.numpy().tobytes() for variable in variables]


@pytest.mark.parametrize(
    "make", first_always([functional, sequential, masked, own_step], 2)
)
def test_a_probed_step_is_the_same_step_bit_for_bit(make):
    keras.utils.set_random_seed(1)
    probed = make()
    steps.prepare(probed, batches())
    with steps.counting(probed, Step()) as count:
        assert count(batches(), 3).steps == 3
    keras.utils.set_random_seed(1)
    trained = make()
    tfamp.fit(trained, batches(), verbose=0)
    assert state(probed) == state(trained)


@pytest.mark.slow
@pytest.mark.parametrize("make", [functional, sequential, own_step])
def test_training_after_a_probe_is_as_without_it(make):
    keras.utils.set_random_seed(1)
    plain = make()
    tfamp.fit(plain, batches(), verbose=0)
    keras.utils.set_random_seed(1)
    model = make()
    steps.prepare(model, batches())
    before, randomness = state(model), get_random_state()
    policies = [layer.dtype_policy for layer in model.layers]
    optimizer, attributes = model.optimizer, sorted(vars(model))
    report = tfamp.probe(model, batches(), steps=2)
    assert report.steps == 2
    assert state(model) == before
    assert get_random_state() == randomness
    assert model.optimizer is optimizer
    assert sorted(vars(model)) == attributes
    assert [layer.dtype_policy for layer in model.layers] == policies
    assert all("call" not in vars(layer) for layer in model.layers)
    assert not {"apply", "scale_loss"} & vars(optimizer).keys()
    tfamp.fit(model, batches(), verbose=0)
    assert state(model) == state(plain)


@pytest.mark.slow
def test_a_generator_that_only_probing_made_is_forgotten():
    model = own_step()
    keras_internals.forget_global_seed_generator()
    before = get_random_state()
    tfamp.probe(model, batches(), steps=1)
    assert get_random_state() == before
    assert before["keras"] is None


def test_a_probe_that_fails_leaves_the_model_as_it_was():
    def fails(y_true, y_pred):
        raise KeyError("in the loss")

    model = sequential()
    steps.prepare(model, batches())
    model.loss = None
    before, optimizer = state(model), model.optimizer
    model.compute_loss = fails
    with pytest.raises(TypeError):
        tfamp.probe(model, batches())
    assert state(model) == before
    assert model.optimizer is optimizer
    assert "call" not in vars(model.layers[0])


def test_every_tensor_of_every_layer_is_seen():
    report = tfamp.probe(functional(), batches(), steps=2)
    names = ["wide", "norm", "relu", "dropout", "head"]
    seen = {(t.layer, t.kind, t.name): t.histogram for t in report.tensors}
    assert set(seen) == {
        *((n, kind, "") for n in names for kind in ("activation",)),
        *((n, "activation_gradient", "") for n in names),
        *(
            (n, "gradient", w)
            for n in ("wide", "head")
            for w in ("kernel", "bias")
        ),
        ("norm", "gradient", "gamma"),
        ("norm", "gradient", "beta"),
    }
    # 2 steps of 4 rows.
    assert seen["wide", "activation", ""].values == 2 * 4 * 6
    assert seen["wide", "gradient", "kernel"].values == 2 * 4 * 6
    # ReLU sends back zeros.
    assert seen["norm", "activation_gradient", ""].zeros > 0
    assert report.unseen_layers == ()


@pytest.mark.slow
def test_what_runs_inside_of_a_loop_is_said_to_be_unseen():
    report = tfamp.probe(masked(), batches(), steps=1)
    assert report.unseen_layers == ("recurrent/lstm_cell",)
    seen = {(t.layer, t.kind, t.name) for t in report.tensors}
    assert ("embedded/inner", "gradient", "embeddings") in seen
    assert ("recurrent/lstm_cell", "gradient", "recurrent_kernel") in seen


def test_replicas_are_counted_together(mirrored):
    with mirrored(2).scope():
        model = sequential()
        steps.prepare(model, batches())
    before = state(model)
    split = tfamp.probe(model, batches(), steps=2)
    assert state(model) == before
    for tensor in split.tensors:
        replicas = 2 if tensor.kind == "gradient" else 1
        rows = {"gradient": 1, "activation": 4, "activation_gradient": 4}
        size = 3 if tensor.kind != "gradient" or tensor.name == "bias" else 12
        assert tensor.histogram.values == (
            2 * rows[tensor.kind] * size * replicas
        )


@pytest.mark.slow
def test_a_sum_over_rows_is_counted_as_that_on_replicas(mirrored):
    class Summed(keras.layers.Layer):
        def call(self, x):
            self.add_loss(keras.ops.sum(keras.ops.square(x)))
            return x

    def counted():
        keras.utils.set_random_seed(0)
        model = keras.Sequential(
            [keras.Input([4]), keras.layers.Dense(3, name="dense"), Summed()]
        )
        model.compile("sgd", "mse")
        x = np.ones((8, 4), "float32")
        data = tf.data.Dataset.from_tensor_slices((x, np.ones((8, 3)))).batch(4)
        report = tfamp.probe(model, data, steps=2)
        (back,) = (
            t.histogram.cells
            for t in report.tensors
            if (t.layer, t.kind) == ("dense", "activation_gradient")
        )
        return back

    one = counted()
    with mirrored(2).scope():
        two = counted()
    np.testing.assert_array_equal(one, two)


@pytest.mark.slow
def test_an_eager_model_is_counted_alike():
    graph = tfamp.probe(sequential(), batches(), steps=2)
    keras.utils.set_random_seed(0)
    model = sequential()
    model.run_eagerly = True
    eager = tfamp.probe(model, batches(), steps=2)
    assert [t.label for t in eager.tensors] == [t.label for t in graph.tensors]


def test_no_more_batches_are_taken_than_steps():
    taken = []

    def rows():
        for batch in batches(6).as_numpy_iterator():
            taken.append(1)
            yield batch

    data = tf.data.Dataset.from_generator(
        rows, output_signature=batches().element_spec
    )
    assert tfamp.probe(sequential(), data, steps=2).steps == 2
    assert len(taken) == 2


def test_fewer_batches_than_steps_are_enough_and_none_is_an_error():
    model = sequential()
    assert tfamp.probe(model, batches(2), steps=5).steps == 2
    with pytest.raises(tfamp.InputError, match="before the first batch"):
        tfamp.probe(model, batches(2).take(0))
    with pytest.raises(tfamp.InputError, match="steps=0"):
        tfamp.probe(model, batches(2), steps=0)


def test_an_optimizer_that_could_not_be_put_back_is_refused():
    class TwoOptimizers(OwnStep):
        def train_step(self, data):
            loss, gradients = tfamp.value_and_gradients(
                lambda: tf.reduce_mean(self(data[0])),
                self.trainable_variables,
                self.other,
            )
            self.other.apply(gradients, self.trainable_variables)
            return {"loss": loss}

    model = compiled(TwoOptimizers(), "sgd")
    model.other = keras.optimizers.SGD(name="other")
    with pytest.raises(tfamp.InputError, match="'other' is not built"):
        tfamp.probe(model, batches())


def test_a_quantized_layer_is_refused():
    model = functional()
    model.get_layer("wide").quantize("float8")
    with pytest.raises(tfamp.InputError, match=r"'wide' is quantized \(float8"):
        tfamp.probe(model, batches())


def large_outputs():
    """In mixed_float16, one layer's outputs near float16's end."""
    with tfamp.precision_scope("mixed_float16"):
        model = keras.Sequential(
            [
                keras.Input([4]),
                layers.Dense(3, name="first"),
                layers.Rescaling(1e6, name="huge"),
                layers.Rescaling(1e-6, name="small"),
                layers.Dense(3, name="head", dtype="float32"),
            ],
            name="large_outputs",
        )
        return compiled(model, tfamp.wrap_optimizer("sgd"))


@pytest.fixture(scope="module")
def report():
    keras.utils.set_random_seed(0)
    return tfamp.probe(large_outputs(), batches(), steps=2)


def test_a_layer_whose_outputs_overflow_is_to_be_kept_in_float32(report):
    assert report.recommended_precision == "mixed_float16"
    assert report.float32_layers == ("huge", "small")
    # Measured in float32, or it would be inf.
    (huge,) = [
        t
        for t in report.tensors
        if t.layer == "huge" and t.kind == "activation"
    ]
    assert huge.histogram.infinite == 0
    assert huge.losses("float16").overflow > 0.5
    assert huge.losses("bfloat16").overflow == 0


@pytest.mark.slow
def test_what_keras_gives_no_path_is_put_to_float32_by_tfamp(tmp_path):
    def build():
        keras.utils.set_random_seed(0)
        model = keras.Sequential(
            [
                keras.Input([4]),
                layers.Dense(3, name="first"),
                layers.Rescaling(1e6, name="huge"),
                layers.ReLU(name="relu"),
                layers.Rescaling(1e-6, name="small"),
            ],
            name="large_outputs",
        )
        return compiled(model, tfamp.wrap_optimizer("sgd"))

    found = tfamp.probe(build(), batches(), steps=2)
    assert found.float32_layers == ("huge", "relu", "small")
    assert found.unmapped_layers == ("relu",)
    assert None not in found.dtype_policy_map()
    found.save(tmp_path / "probe.json")
    tfamp.set_precision(tmp_path / "probe.json")
    model = build()
    tfamp.fit(model, batches(), verbose=0)
    assert model.get_layer("relu").compute_dtype == "float32"
    assert model.get_layer("first").compute_dtype == "float16"


def test_the_policy_map_rebuilds_the_model_as_advised(report):
    policy_map = report.dtype_policy_map()
    keras.config.set_dtype_policy(policy_map)
    built = keras.Sequential(
        [
            keras.Input([4]),
            layers.Dense(3, name="first"),
            layers.Rescaling(1e6, name="huge"),
            layers.Rescaling(1e-6, name="small"),
            layers.Dense(3, name="head"),
        ],
        name="large_outputs",
    )
    assert [layer.compute_dtype for layer in built.layers] == [
        "float16",
        "float32",
        # In float16 it would take the large output as inf.
        "float32",
        # As it was before.
        "float32",
    ]
    assert {layer.variable_dtype for layer in built.layers} == {"float32"}


def test_a_map_of_the_model_itself_is_put_back():
    policy_map = keras.dtype_policies.DTypePolicyMap(
        keras.dtype_policies.get("mixed_float16")
    )
    keras.config.set_dtype_policy(policy_map)
    model = sequential()
    tfamp.probe(model, batches(), steps=1)
    assert model.layers[0].dtype_policy is policy_map
    assert model.layers[0].compute_dtype == "float16"
    assert policy_map.get_config()["policy_map"] == {}


def test_the_report_is_saved_as_strict_json(report, tmp_path):
    path = tmp_path / "new" / "probe.json"
    report.save(path)
    record = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert record["schema"] == "tfamp.probe/1"
    assert record["float32_layers"] == ["huge", "small"]
    assert record["recommended_scale"] == report.recommended_scale
    (tensor,) = [
        t
        for t in record["tensors"]
        if (t["layer"], t["name"]) == ("head", "kernel")
    ]
    assert tensor["is_float32"]
    assert sum(tensor["histogram"]["counts"]) + tensor["zeros"] == 2 * 9
    assert len(tensor["losses"]["float16"]["zero"]) == len(record["scales"])


@pytest.mark.slow
def test_the_part_says_what_is_advised(report):
    part = probe_part.part(json.loads(json.dumps(report.record())))
    assert part.verdict.startswith("Use mixed_float16 at loss scale ")
    assert "with 2 layers in float32" in part.verdict
    assert all(plot.svg.startswith("<svg") for plot in part.plots)
    assert ("layers for float32", "huge, small") in part.tables[0].rows
    assert part.tables[1].rows[0][0] == "huge"


@pytest.mark.parametrize("suffix", first_always(["png", "svg", "pdf"], 1))
def test_the_overview_is_drawn(report, tmp_path, suffix):
    report.plot(tmp_path / f"probe.{suffix}")
    assert (tmp_path / f"probe.{suffix}").stat().st_size > 5000


def test_another_suffix_is_refused(report, tmp_path):
    with pytest.raises(tfamp.InputError, match=r"expected .* \.png, \.svg"):
        report.plot(tmp_path / "probe.txt")
    assert not [*tmp_path.iterdir()]
