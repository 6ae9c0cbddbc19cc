"""Models of keras-hub, which nobody here wrote: a sample of its zoo.

`pip install tfamp[hub]`; without it these are skipped.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfamp
from benchmarks import zoo
from tfamp.precision.keep_float32 import keep_float32

hub = pytest.importorskip(
    "keras_hub", reason="keras-hub is not installed: pip install tfamp[hub]"
)
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Layer .* was passed an input with a"),
    # Stock Keras, when it builds a mask of -1e9 in float16.
    pytest.mark.filterwarnings("ignore:overflow encountered in cast"),
]


def ids(length):
    return np.random.default_rng(0).integers(1, 50, (2, length)).astype("int32")


def t5():
    backbone = hub.models.T5Backbone(50, 1, 2, 16, 32, dropout=0.0)
    logits = backbone.token_embedding(
        backbone.output["decoder_sequence_output"], reverse=True
    )
    x = {
        "encoder_token_ids": ids(8),
        "encoder_padding_mask": np.ones([2, 8], "int32"),
        "decoder_token_ids": ids(4),
        "decoder_padding_mask": np.ones([2, 4], "int32"),
    }
    return keras.Model(backbone.input, logits), x, ids(4)


def swin():
    backbone = hub.models.SwinTransformerBackbone(
        (16, 16, 3), 8, [1], [1], 4, patch_size=2, drop_path=0.0
    )
    model = hub.models.SwinTransformerImageClassifier(
        backbone=backbone, num_classes=3, preprocessor=None
    )
    images = np.random.default_rng(0).normal(size=(2, 16, 16, 3))
    return model, images.astype("float32"), np.array([0, 2], "int32")


@pytest.mark.parametrize("build", [t5, swin])
def test_nothing_sensitive_is_left_in_float16_and_products_stay(build):
    keras.config.set_dtype_policy("mixed_float16")
    model, x, y = build()
    model.compile(
        tfamp.wrap_optimizer(keras.optimizers.SGD(1e-2)),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        auto_scale_loss=False,
    )
    step = zoo.plain_step(model)
    before = zoo.count(zoo.trace(step, (x, y)).graph).products
    heads = [str(k) for k in keep_float32(model) if "product" in k.reason]
    counted = zoo.count(zoo.trace(step, (x, y)).graph)
    assert counted.by_type() == {}
    products = counted.products
    # A head's product and its two gradients are all that became float32:
    # T5's with its tied embedding is so in stock Keras.
    in_float32 = [head for head in heads if "with its product" in head]
    moved = products.get("float32", 0) - before.get("float32", 0)
    assert moved <= 3 * len(in_float32)
    assert products["float16"] > products.get("float32", 0)


def test_t5_trains_finite_in_float16():
    keras.config.set_dtype_policy("mixed_float16")
    model, x, y = t5()
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(True))
    history = tfamp.fit(model, x, y, batch_size=2, epochs=2, verbose=0).history
    assert np.isfinite(history["loss"]).all()
    assert history["skipped_steps"] == [0, 0]


@pytest.mark.filterwarnings("ignore:Model .* overrides fit")
@pytest.mark.parametrize("precision", ["mixed_float16", "mixed_bfloat16"])
def test_a_mixture_of_experts_trains_which_stock_keras_cannot(precision):
    keras.config.set_dtype_policy(precision)
    backbone = hub.models.MixtralBackbone(50, 1, 2, 16, 32, 1, 4, 4)
    model = hub.models.MixtralCausalLM(backbone, preprocessor=None)
    x = {"token_ids": ids(8), "padding_mask": np.ones([2, 8], "int32")}
    with pytest.raises(tf.errors.InvalidArgumentError):
        model(x, training=True)
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(True))
    history = tfamp.fit(model, x, ids(8), batch_size=2, epochs=2, verbose=0)
    assert np.isfinite(history.history["loss"]).all()
    assert model(x).dtype == "float32"


def test_the_embedding_of_a_time_step_gets_it_unrounded():
    from keras_hub.src.models.stable_diffusion_3.mmdit import TimestepEmbedding

    keras.config.set_dtype_policy("mixed_bfloat16")
    inputs = keras.Input([1])
    outputs = TimestepEmbedding(8, name="time")(inputs)
    model = keras.Model(inputs, outputs)
    times = np.array([[777.3]], "float32")
    # Both are rounded to 776.
    np.testing.assert_array_equal(model(times), model(times - 1))
    keep_float32(model, outputs=False)
    assert np.abs(model(times) - model(times - 1)).max() > 0.01
