"""Each rule of lint: a planted mistake that it finds, and its mended twin.

The twin is the planted model with the finding's own fix put in: the fix is
executed, as if it had been pasted.
"""

import functools
import types

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import tfamp
from tfamp.analysis.lint import own_losses, replicas
from tfamp.analysis.lint.check import RULES

WIDTH = 8
BATCH = (np.ones((4, WIDTH), "float32"), np.zeros((4, WIDTH), "float32"))


def paste(code, **names):
    """Executes code as it stands; returns the names afterwards."""
    names = {"keras": keras, "tfamp": tfamp} | names
    exec(code, names)
    return names


class Scripted(layers.Layer):
    """A layer of a user's own, whose code is a text.

    Args:
        before: code that begins with the input as `x`.
        code: the code in question.
        after: code that ends with the output as `y`.
    """

    def __init__(self, before, code, after, **kwargs):
        super().__init__(**kwargs)
        self.code = "\n".join([before, code, after])

    def call(self, x):
        return paste(self.code, x=x, self=self)["y"]


class OwnStep(keras.Model):
    """A model with a training step of its own, whose code is a text."""

    def __init__(self, code, **kwargs):
        super().__init__(**kwargs)
        self.dense = layers.Dense(WIDTH)
        self.code = code

    def call(self, x):
        return keras.ops.cast(self.dense(x), "float32")

    def train_step(self, data):
        x, y = data

        def loss_fn():
            return keras.ops.mean(keras.ops.square(y - self(x, training=True)))

        paste(
            self.code,
            tf=tf,
            loss_fn=loss_fn,
            variables=self.trainable_variables,
            optimizer=self.optimizer,
            second=getattr(self, "second", None),
        )
        return {}


def chain(*chained, width=WIDTH):
    inputs = x = keras.Input((width,), name="data")
    for layer in chained:
        x = layer(x)
    return keras.Model(inputs, x)


def head():
    return layers.Dense(WIDTH, dtype="float32")


def compiled(optimizer=None, model=None, **options):
    """A clean model but for what it is compiled with."""
    if model is None:
        model = chain(layers.Dense(WIDTH), head())
    if optimizer is None:
        optimizer = tfamp.wrap_optimizer("sgd", "mixed_float16")
    options = {"loss": "mse", "auto_scale_loss": False} | options
    model.compile(optimizer, **options)
    return model


def recompiled(model, optimizer, fix, strategy=None):
    """Pastes a fix that wraps the optimizer and compiles anew."""
    if fix:
        paste(
            fix,
            model=model,
            optimizer=optimizer,
            loss="mse",
            metrics=[],
            strategy=strategy,
        )
    return model


def sensitive_output(fix, _):
    model = chain(layers.Dense(WIDTH, activation="softmax"))
    paste(fix, model=model)
    return model


def rounded_output(fix, _):
    model = compiled(model=chain(layers.Dense(WIDTH)))
    paste(fix, model=model)
    return model


def attention_softmax(fix, _):
    x = keras.Input((4, WIDTH))
    model = keras.Model(x, layers.MultiHeadAttention(1, 8, dropout=0.1)(x, x))
    paste(fix, model=model)
    return model


def scripted(fix, *code, width=WIDTH):
    model = chain(Scripted(*code), width=width)
    paste(fix, model=model)
    return model


def hidden_softmax(fix, _):
    code = "weights = keras.ops.softmax(logits)"
    return scripted(fix, "logits = x", code, "y = x * weights")


def mask_constant(fix, _):
    code = fix or "scores = scores + (1 - keras.ops.cast(mask, x.dtype)) * -1e9"
    return chain(Scripted("scores, mask = x, x > 0", code, "y = scores"))


def small_epsilon(fix, _):
    before = "norm = keras.ops.max(keras.ops.abs(x))"
    return scripted(fix, before, "epsilon = 1e-8", "y = x / (norm + epsilon)")


def large_sum(fix, _):
    code = "total = keras.ops.sum(x, axis=1)"
    return scripted(fix, "", code, "y = total[:, None]", width=4096)


def rounded_equality(fix, _):
    code = "y = keras.ops.where(x == 2049.0, keras.ops.zeros_like(x), x)"
    return scripted(fix, "", code, "")


def input_range(fix, _):
    inputs = keras.Input((WIDTH,))
    x = paste(fix, x=inputs)["x"]
    model = keras.Model(inputs, layers.Dense(WIDTH)(x))
    return model, (1e5 * BATCH[0],)


def rounded_loss(fix, _):
    after = "self.add_loss(keras.ops.sum(x * x)); y = x"
    return chain(Scripted("", fix, after))


def rounded_metric(fix, _):
    code = fix or "metric = keras.metrics.MeanSquaredError(dtype='float16')"
    return compiled(metrics=[paste(code)["metric"]])


def no_loss_scaling(fix, _):
    optimizer = keras.optimizers.SGD()
    return recompiled(compiled(optimizer), optimizer, fix)


def float16_wire(fix, _):
    keras.config.set_dtype_policy("float32")
    optimizer = tfamp.wrap_optimizer("sgd")
    optimizer.all_reduce_dtype = "float16"
    return recompiled(compiled(optimizer), optimizer, fix)


def stock_float8(fix, _):
    keras.config.set_dtype_policy("mixed_bfloat16")

    def build_model():
        return chain(*(layers.Dense(WIDTH) for _ in range(3)), head())

    model = build_model()
    model.layers[2].quantize("float8")
    return paste(fix, build_model=build_model, model=model)["model"]


def stock_loss_scaling(fix, _):
    optimizer = keras.optimizers.SGD()
    model = compiled(optimizer, auto_scale_loss=True)
    return recompiled(model, optimizer, fix)


def double_loss_scaling(fix, _):
    once = tfamp.wrap_optimizer("sgd", "mixed_float16")
    optimizer = keras.optimizers.LossScaleOptimizer(once)
    return recompiled(compiled(optimizer), optimizer, fix)


UNSCALED_STEP = """
with tf.GradientTape() as tape:
    loss = loss_fn()
gradients = tape.gradient(loss, [v.value for v in variables])
optimizer.apply(gradients, variables)
"""


def unscaled_train_step(fix, _):
    model = OwnStep(fix or UNSCALED_STEP)
    model(BATCH[0])
    return compiled(model=model), BATCH


def clipped_scaled_gradients(fix, _):
    clip = "gradients, _ = tf.clip_by_global_norm(gradients, 1.0)"
    code = """
loss, gradients = tfamp.value_and_gradients(loss_fn, variables, optimizer)
# CLIP
optimizer.apply(gradients, variables)
"""
    optimizer = None
    if fix:
        optimizer = paste(fix, learning_rate=0.1)["optimizer"]
    model = OwnStep(code if fix else code.replace("# CLIP", clip))
    model(BATCH[0])
    return compiled(optimizer, model), BATCH


def clipping_before_reduction(fix, strategy):
    with strategy.scope():
        optimizer = keras.optimizers.SGD(global_clipnorm=1.0)
        model = compiled(optimizer, chain(layers.Dense(8, dtype="float32")))
    return recompiled(model, optimizer, fix, strategy)


def accumulation_on_replicas(fix, strategy):
    with strategy.scope():
        inner = keras.optimizers.SGD(gradient_accumulation_steps=4)
        optimizer = tfamp.wrap_optimizer(inner, "mixed_float16")
        model = compiled(optimizer)
    paste_with_fit(fix, {"microbatches": 4}, model, optimizer=optimizer)
    return model


def ema_overwrite_on_replicas(fix, strategy):
    with strategy.scope():
        optimizer = keras.optimizers.SGD(
            use_ema=True, ema_overwrite_frequency=2
        )
        model = compiled(optimizer, chain(layers.Dense(8, dtype="float32")))
    return recompiled(model, optimizer, fix, strategy)


def steps_per_execution_on_replicas(fix, strategy):
    with strategy.scope():
        model = compiled(steps_per_execution=3)
    paste_with_fit(fix, {"steps_per_loop": 3}, model)
    return model


def paste_with_fit(fix, expected, model, **names):
    """Pastes a fix that ends with `tfamp.fit`, which need not train here."""
    calls = []

    def fit(model, dataset, **options):
        calls.append(options)

    ours = types.SimpleNamespace(fit=fit)
    paste(fix, tfamp=ours, model=model, dataset=None, **names)
    assert calls == ([expected] if fix else [])


def float16_on_tpu(fix, _):
    paste(fix)
    optimizer = tfamp.wrap_optimizer("sgd")
    return compiled(optimizer)


def weights_in_16_bits(fix, _):
    keras.config.set_dtype_policy("float16")
    paste(fix)
    return chain(layers.Dense(WIDTH))


def unaligned_size(fix, _):
    units = paste(fix or "units = 10")["units"]
    return chain(layers.Dense(units), head())


def frozen_batch_norm(fix, _):
    frozen = layers.BatchNormalization(trainable=False, name="frozen")
    model = chain(layers.Dense(WIDTH), frozen, head())
    paste(fix, model=model)
    return model


def rounded_inputs(fix, _):
    code = fix or "normalization = keras.layers.Normalization()"
    normalization = paste(code)["normalization"]
    normalization.adapt(np.arange(2.0 * WIDTH).reshape(2, WIDTH))
    return chain(normalization, layers.Dense(WIDTH), head())


def not_traced(fix, _):
    code = UNSCALED_STEP.replace("loss_fn()", "optimizer.scale_loss(loss_fn())")
    model = OwnStep(code)
    model(BATCH[0])
    dataset = [BATCH]
    batch = None
    if fix:
        lint = types.SimpleNamespace(lint=lambda model, batch: batch)
        paste(f"found = {fix}", tfamp=lint, model=model, dataset=dataset)
        batch = BATCH
    return compiled(model=model), batch


PLANTS = {
    plant.__name__.replace("_", "-"): plant
    for plant in (
        sensitive_output,
        rounded_output,
        attention_softmax,
        hidden_softmax,
        mask_constant,
        small_epsilon,
        large_sum,
        input_range,
        rounded_equality,
        rounded_loss,
        rounded_metric,
        no_loss_scaling,
        float16_wire,
        stock_float8,
        stock_loss_scaling,
        double_loss_scaling,
        unscaled_train_step,
        clipped_scaled_gradients,
        clipping_before_reduction,
        accumulation_on_replicas,
        ema_overwrite_on_replicas,
        steps_per_execution_on_replicas,
        float16_on_tpu,
        weights_in_16_bits,
        unaligned_size,
        frozen_batch_norm,
        rounded_inputs,
        not_traced,
    )
}


REPLICATED = ("-on-replicas", "clipping-before-reduction")


def test_there_is_a_planted_mistake_for_every_rule():
    # Those of own losses are planted in test_own_losses.
    elsewhere = {rule.name for rule in own_losses.RULES}
    assert list(PLANTS) == [
        rule.name for rule in RULES if rule.name not in elsewhere
    ]


def lint(planted):
    model, batch = planted if isinstance(planted, tuple) else (planted, None)
    return tfamp.lint(model, batch)


# NumPy says so of the -1e9 when the planted model is built.
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("rule", PLANTS)
def test_a_planted_mistake_is_found_and_its_mended_twin_is_clean(
    rule, mirrored, monkeypatch
):
    if rule == "float16-on-tpu":
        monkeypatch.setattr(
            replicas, "devices_of", lambda strategy: ["/device:TPU:0"]
        )
    keras.config.set_dtype_policy("mixed_float16")
    strategy = mirrored(2) if rule.endswith(REPLICATED) else None
    findings = lint(PLANTS[rule]("", strategy))
    assert {each.rule for each in findings} == {rule}
    (finding,) = findings
    assert finding.severity in ("error", "warning", "info")
    keras.config.set_dtype_policy("mixed_float16")
    assert lint(PLANTS[rule](finding.fix, strategy)) == []


def rules_of(model, batch=None):
    return {each.rule for each in tfamp.lint(model, batch)}


@pytest.mark.parametrize(
    "code",
    [
        "y = keras.ops.sigmoid(x)",
        "y = keras.ops.log(keras.ops.abs(x) + 1)",
        "y = keras.ops.clip(keras.ops.softmax(x), 0.001, 0.999)",
        "y = keras.ops.reshape(keras.ops.softmax(x)[..., None], (-1, 8))",
        'y = keras.ops.cast(keras.ops.softmax(x), "float32")',
    ],
)
def test_an_output_is_recognized_behind_what_only_moves_or_clips_it(code):
    layer = Scripted("", code, "", dtype="mixed_float16")
    (finding,) = tfamp.lint(chain(layer))
    assert (finding.rule, finding.layer) == ("sensitive-output", layer.name)


@pytest.mark.parametrize(
    "code",
    [
        "y = tf.function(keras.ops.softmax)(x) * x",
        "y = tf.function(tf.function(keras.ops.softmax))(x) * x",
        "y = tf.cond(x[0, 0] > 0, lambda: tf.nn.softmax(x), lambda: x) * x",
        "y = keras.ops.map(keras.ops.softmax, x) * x",
    ],
)
def test_operations_inside_functions_branches_and_loops_are_seen(code):
    inputs = keras.Input((WIDTH,))
    layer = Scripted("import tensorflow as tf", code, "", dtype="mixed_float16")
    layer.compute_output_spec = lambda x: keras.KerasTensor(x.shape, x.dtype)
    model = keras.Model(inputs, layer(inputs))
    assert [(each.rule, each.layer) for each in tfamp.lint(model)] == [
        ("hidden-softmax", layer.name)
    ]


def test_the_layer_is_named_by_its_path_in_nested_models():
    keras.config.set_dtype_policy("mixed_float16")
    inner = chain(layers.Dense(10, name="odd"), layers.Dense(WIDTH))
    inner.name = "inner"
    model = chain(inner, head())
    assert [each.layer for each in tfamp.lint(model)] == ["inner/odd"]


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize(
    ("code", "severity"),
    [
        ("y = x + keras.ops.cast(x > 0, x.dtype) * -1e9", "error"),
        ("y = keras.ops.where(x > 0, x, -1e9)", "warning"),
        (
            "m = -1e9 * keras.ops.cast(x > 0, 'float32')\n"
            "y = x + keras.ops.cast(m, x.dtype)",
            "warning",
        ),
    ],
)
def test_a_mask_constant_is_found_however_it_reaches_float16(code, severity):
    layer = Scripted("", code, "", dtype="mixed_float16")
    (finding,) = tfamp.lint(chain(layer))
    assert (finding.rule, finding.severity) == ("mask-constant", severity)


def test_what_is_only_in_part_a_constant_is_no_epsilon():
    code = (
        "zeros = keras.ops.zeros((1, 8), x.dtype)\n"
        "y = x / (x + keras.ops.concatenate([zeros, x[1:]]))"
    )
    layer = Scripted("", code, "", dtype="mixed_float16")
    assert tfamp.lint(chain(layer)) == []


@pytest.mark.parametrize(
    "code",
    [
        "y = x + keras.ops.cast(x > 0, x.dtype) * -1e9",
        "y = x / (keras.ops.max(x) + 1e-8)",
    ],
)
def test_bfloat16_has_the_range_of_float32(code):
    layer = Scripted("", code, "", dtype="mixed_bfloat16")
    assert tfamp.lint(chain(layer)) == []


@pytest.mark.parametrize(
    ("policy", "count", "is_found"),
    [
        ("mixed_float16", 2048, True),
        ("mixed_float16", 2040, False),
        ("mixed_bfloat16", 256, True),
        ("mixed_bfloat16", 248, False),
        ("float32", 4096, False),
    ],
)
def test_a_sum_is_large_where_counting_by_ones_ends(policy, count, is_found):
    layer = Scripted("", "y = keras.ops.sum(x, axis=1)", "", dtype=policy)
    found = rules_of(chain(layer, width=count))
    assert found == ({"large-sum"} if is_found else set())


def test_a_router_is_no_attention():
    dense = "keras.ops.matmul(keras.ops.softmax(x), self.experts)"
    layer = Scripted("", f"y = {dense}", "", dtype="mixed_float16")
    layer.experts = layer.add_weight((WIDTH, WIDTH))
    assert rules_of(chain(layer)) == {"hidden-softmax"}


def test_attention_of_a_users_own_is_recognized_by_its_product():
    code = (
        "logits = keras.ops.matmul(x, keras.ops.transpose(x, (0, 2, 1)))\n"
        "weights = keras.ops.softmax(logits)\n"
        "y = keras.ops.matmul(weights, x)"
    )
    for policy, severity in (
        ("mixed_float16", "error"),
        ("mixed_bfloat16", "warning"),
    ):
        inputs = keras.Input((4, WIDTH))
        layer = Scripted("", code, "", dtype=policy)
        (finding,) = tfamp.lint(keras.Model(inputs, layer(inputs)))
        assert finding.rule == "attention-softmax"
        assert finding.severity == severity


@pytest.mark.parametrize("kind", ["map", "layer", "fixed"])
def test_float16_without_scaling_is_found_in_whatever_way_it_came(kind):
    hidden = "mixed_float16"
    if kind == "map":
        policies = {"hidden": keras.DTypePolicy("mixed_float16")}
        hidden = keras.dtype_policies.DTypePolicyMap("float32", policies)
    model = chain(layers.Dense(WIDTH, name="hidden", dtype=hidden), head())
    optimizer = keras.optimizers.SGD()
    if kind == "fixed":
        # The global policy, float32, was asked for the precision.
        optimizer = tfamp.wrap_optimizer(optimizer)
    compiled(optimizer, model, auto_scale_loss=True)
    (finding,) = tfamp.lint(model)
    assert (finding.rule, finding.layer) == ("no-loss-scaling", "hidden")


def test_a_factor_of_the_optimizer_is_a_loss_scale_too():
    keras.config.set_dtype_policy("mixed_float16")
    assert rules_of(compiled(keras.optimizers.SGD(loss_scale_factor=8))) == (
        set()
    )
    twice = tfamp.wrap_optimizer("sgd")
    twice.inner_optimizer.loss_scale_factor = 8
    model = compiled(twice)
    (finding,) = tfamp.lint(model)
    assert finding.rule == "double-loss-scaling"
    paste(finding.fix, optimizer=twice)
    assert tfamp.lint(model) == []


def test_on_several_replicas_stock_scaling_and_its_clipping_are_errors(
    mirrored,
):
    keras.config.set_dtype_policy("mixed_float16")
    with mirrored(2).scope():
        model = compiled(
            keras.optimizers.SGD(
                clipnorm=1, use_ema=True, ema_overwrite_frequency=2
            ),
            auto_scale_loss=True,
        )
    assert {(e.rule, e.severity) for e in tfamp.lint(model)} == {
        ("stock-loss-scaling", "error"),
        ("clipping-before-reduction", "error"),
        ("ema-overwrite-on-replicas", "error"),
    }


def test_pure_float16_divides_by_the_epsilon_of_its_optimizer():
    keras.config.set_dtype_policy("float16")
    model = chain(layers.Dense(WIDTH), layers.Activation("linear"))
    tfamp.keep_float32(model)
    compiled(tfamp.wrap_optimizer("adam", "mixed_float16"), model)
    assert {"small-epsilon", "weights-in-16-bits"} <= rules_of(model)


SCALED_LOSS = "optimizer.scale_loss(loss_fn())"
HAND_SCALED_STEP = """
with tf.GradientTape() as tape:
    loss = loss_fn() * keras.ops.convert_to_tensor(optimizer.dynamic_scale)
gradients = tape.gradient(loss, [v.value for v in variables])
optimizer.apply(gradients, variables)
"""
TWO_OPTIMIZERS_STEP = """
loss, gradients = tfamp.value_and_gradients(loss_fn, variables, optimizer)
optimizer.apply(gradients, variables)
with tf.GradientTape() as tape:
    loss = optimizer.scale_loss(loss_fn())
gradients = tape.gradient(loss, [v.value for v in variables])
second.apply(gradients, variables)
"""


FUNCTION_STEP = """
@tf.function(autograph=False)
def gradients_of():
    return tfamp.value_and_gradients(loss_fn, variables, optimizer)[1]
optimizer.apply(gradients_of(), variables)
@tf.function(autograph=False)
def apply():
    second.apply(gradients_of(), variables)
apply()
"""


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (HAND_SCALED_STEP, set()),
        (FUNCTION_STEP, set()),
        (TWO_OPTIMIZERS_STEP, {"unscaled-train-step"}),
        (
            TWO_OPTIMIZERS_STEP.replace("= optimizer.scale", "= second.scale"),
            set(),
        ),
        (
            UNSCALED_STEP.replace(
                "loss_fn()",
                'optimizer.scale_loss(keras.ops.cast(loss_fn(), "float16"))',
            ),
            {"rounded-loss"},
        ),
    ],
)
def test_each_optimizer_is_to_get_gradients_that_carry_its_scale(
    code, expected
):
    keras.config.set_dtype_policy("mixed_float16")
    model = OwnStep(code)
    model(BATCH[0])
    model.second = tfamp.wrap_optimizer("sgd")
    compiled(model=model)
    assert rules_of(model, BATCH) == expected


@pytest.mark.parametrize(
    "optimizer",
    [
        tfamp.LossScaleOptimizer,
        functools.partial(
            tfamp.LossScaleOptimizer, dynamic=False, initial_scale=1024
        ),
        # Not built, it has no variable for its scale yet.
        keras.optimizers.LossScaleOptimizer,
    ],
)
def test_a_scale_is_followed_whether_it_is_a_variable_or_a_number(optimizer):
    keras.config.set_dtype_policy("mixed_float16")
    for code, expected in (
        (UNSCALED_STEP, True),
        (UNSCALED_STEP.replace("loss_fn()", SCALED_LOSS), False),
    ):
        model = OwnStep(code)
        model(BATCH[0])
        compiled(optimizer(keras.optimizers.SGD()), model)
        assert ("unscaled-train-step" in rules_of(model, BATCH)) == expected


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_losses_of_16_bits_are_found_by_type_and_by_what_they_compute(dtype):
    by_type = keras.losses.MeanSquaredError(dtype=dtype)

    def by_code(y, y_pred):
        return keras.ops.mean(keras.ops.cast(y_pred, dtype) ** 2)

    for loss in (by_type, by_code):
        model = chain(layers.Dense(WIDTH))
        model.compile("sgd", loss=loss)
        assert rules_of(model, BATCH) == {"rounded-loss"}


def test_what_is_wrong_in_a_loss_is_told_of_no_layer():
    def loss(y, y_pred):
        y_pred = keras.ops.cast(y_pred, "float16")
        return keras.ops.mean(y_pred / (keras.ops.max(y_pred) + 1e-8))

    model = chain(layers.Dense(WIDTH))
    model.compile("sgd", loss=loss)
    assert {(e.rule, e.layer) for e in tfamp.lint(model, BATCH)} == {
        ("small-epsilon", ""),
        ("rounded-loss", ""),
    }


def test_metrics_of_16_bits_are_found_by_what_they_compute():
    class Mine(keras.metrics.Mean):
        def update_state(self, y, y_pred, sample_weight=None):
            total = keras.ops.sum(keras.ops.cast(y_pred, "bfloat16"))
            return super().update_state(total)

    model = chain(layers.Dense(WIDTH))
    model.compile("sgd", loss="mse", metrics=[Mine(name="mine")])
    assert rules_of(model, BATCH) == {"rounded-metric"}


def test_a_frozen_norm_whose_statistics_are_those_of_its_input_is_clean():
    keras.config.set_dtype_policy("mixed_float16")
    before = layers.Dense(WIDTH, name="before")
    norm = layers.BatchNormalization(name="norm")
    model = chain(before, norm, head())
    norm.moving_mean.assign(np.full(WIDTH, 0.5))
    model.trainable = False
    model.layers[-1].trainable = True
    assert tfamp.lint(model) == []
    before.trainable = True
    (finding,) = tfamp.lint(model)
    assert (finding.rule, finding.layer) == ("frozen-batch-norm", "norm")
    assert "before" in finding.message


@pytest.mark.parametrize(
    ("value", "dtype", "policy", "is_found"),
    [
        (1e5, "float32", "mixed_float16", True),
        (-1e5, "float32", "mixed_float16", True),
        (65504.0, "float32", "mixed_float16", False),
        (100_000, "int32", "mixed_float16", True),
        (np.inf, "float16", "mixed_float16", True),
        (1e5, "float32", "mixed_bfloat16", False),
        (1e5, "float32", "float32", False),
    ],
)
def test_the_range_of_the_data_matters_where_they_become_float16(
    value, dtype, policy, is_found
):
    keras.config.set_dtype_policy(policy)
    x = np.full((4, WIDTH), value, dtype)
    inputs = keras.Input((WIDTH,), dtype=dtype)
    model = keras.Model(inputs, layers.Dense(WIDTH)(inputs))
    assert rules_of(model, x) == ({"input-range"} if is_found else set())
