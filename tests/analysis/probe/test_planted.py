"""Planted gradients, whose fate in float16 is known without tfamp."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfamp
from tfamp.analysis.probe.advice import HEADROOM, SUBNORMAL_WEIGHT
from tfamp.analysis.probe.format_losses import SCALES
from tfamp.analysis.probe.observed import observe


def planted(gradient, optimizer="sgd"):
    """A model and data of which the gradient of the kernel is the input."""
    model = keras.Sequential(
        [
            keras.Input([gradient.size]),
            keras.layers.Dense(
                1, use_bias=False, kernel_initializer="zeros", name="linear"
            ),
        ],
        name="planted",
    )
    model.compile(optimizer, loss=lambda _, outputs: outputs)
    rows = gradient[None].astype(np.float32), np.zeros([1, 1], np.float32)
    return model, tf.data.Dataset.from_tensor_slices(rows).batch(1)


def found(report, kind="gradient"):
    """The one tensor of that kind."""
    (tensor,) = [t for t in report.tensors if t.kind == kind]
    return tensor


def powers(lowest, highest):
    return np.exp2(np.arange(lowest, highest + 1.0))


def log_uniform(lowest, highest, count=4096):
    """Values whose log2 are evenly spread between two bounds."""
    places = (np.arange(count) + 0.5) / count
    return np.exp2(lowest + (highest - lowest) * places)


def between(low, high, lowest, highest):
    """The share of [lowest, highest] that lies in [low, high]."""
    inside = np.clip([low, high], lowest, highest)
    return (inside[1] - inside[0]) / (highest - lowest)


def test_powers_of_two_are_lost_where_they_must_be():
    report = tfamp.probe(*planted(powers(-40, 5)), steps=1)
    gradient = found(report)
    for shift, scale in enumerate(SCALES):
        exponents = np.arange(-40, 6) + shift
        share = gradient.losses("float16", scale)
        # 2**-25 lies between 0 and 2**-24, and the tie goes to the even one.
        assert share.zero == np.mean(exponents <= -25)
        assert share.subnormal == np.mean((exponents > -25) & (exponents < -14))
        assert share.overflow == np.mean(exponents >= 16)


def test_log_uniform_gradients_are_lost_as_the_closed_form_says():
    low, high = -38.25, -6.5
    report = tfamp.probe(*planted(log_uniform(low, high)), steps=1)
    gradient = found(report)
    smallest_normal = np.log2(2.0**-14 * (1 - 2.0**-11))
    for shift, scale in enumerate(SCALES):
        bounds = low + shift, high + shift
        share = gradient.losses("float16", scale)
        assert share.zero == pytest.approx(
            between(-999, -25, *bounds), abs=0.0005
        )
        assert share.subnormal == pytest.approx(
            between(-25, smallest_normal, *bounds), abs=0.0005
        )
        assert share.overflow == pytest.approx(
            between(np.log2(65520), 999, *bounds), abs=0.0005
        )


@pytest.mark.parametrize(
    "values", [powers(-40, 5), powers(-24, -2), log_uniform(-38.25, -6.5)]
)
def test_the_advised_scale_is_the_best_one(values):
    """Against casts by NumPy, of every gradient at every scale."""
    report = tfamp.probe(*planted(values), steps=1)
    # The gradient that arrives at the output is 1.
    tensors = [values, np.ones(1)]
    costs = {}
    with np.errstate(over="ignore"):
        for scale in SCALES:
            halves = [(t * scale).astype(np.float16) for t in tensors]
            grown = [
                (t * scale * 2**HEADROOM).astype(np.float16) for t in tensors
            ]
            if np.isfinite(np.concatenate(grown)).all():
                costs[scale] = np.mean(
                    [
                        np.mean(h == 0)
                        + SUBNORMAL_WEIGHT
                        * np.mean((h != 0) & (h < np.float16(2.0**-14)))
                        for h in halves
                    ]
                )
    advised = report.advice.float16_scale
    assert costs[advised] == pytest.approx(min(costs.values()), abs=1e-9)


def test_gradients_are_true_ones_whatever_the_scale_of_the_optimizer():
    optimizer = tfamp.LossScaleOptimizer(
        keras.optimizers.SGD(), initial_scale=2.0**12
    )
    model, data = planted(powers(-30, 0), optimizer)
    report = tfamp.probe(model, data, steps=1)
    for kind, exponents in (
        ("gradient", range(-30, 1)),
        ("activation_gradient", [0]),
    ):
        counts = found(report, kind).histogram.by_exponent
        (held,) = np.nonzero(counts)
        assert list(held - 126) == list(exponents)


def test_observed_shares_are_those_predicted():
    """Powers of two that one product cannot round: to the last value."""
    with tfamp.precision_scope("mixed_float16"):
        model, data = planted(powers(-14, 12))
    ((x, y),) = data
    for scale in (1.0, 2.0**8):
        (gradient,) = [
            each
            for each in observe(model, (x * 2.0**-10, y), scale)
            if each.kind == "gradient"
        ]
        exponents = np.arange(-24, 3) + np.log2(scale)
        assert gradient.observed == gradient.predicted
        assert gradient.observed.subnormal == np.mean(exponents < -14)


def test_observed_overflow_is_that_predicted():
    with tfamp.precision_scope("mixed_float16"):
        model, data = planted(powers(-10, 12))
    (gradient,) = [
        each
        for each in observe(model, next(iter(data)), 2.0**8)
        if each.kind == "gradient"
    ]
    # 2**8 to 2**12, times 2**8.
    assert gradient.predicted.overflow == 5 / 23
    assert gradient.observed == gradient.predicted


class TwoScales(keras.Model):
    """Two losses, each with its optimizer and its own loss scale."""

    def __init__(self):
        super().__init__(name="two_scales")
        options = {"use_bias": False, "kernel_initializer": "zeros"}
        self.first = keras.layers.Dense(1, name="first", **options)
        self.second = keras.layers.Dense(1, name="second", **options)
        self.first_optimizer, self.second_optimizer = (
            tfamp.LossScaleOptimizer(
                keras.optimizers.SGD(), initial_scale=scale
            )
            for scale in (2.0**4, 2.0**10)
        )

    def call(self, x):
        return self.first(x) + self.second(x)

    def train_step(self, data):
        x, _ = data
        # Both scaled before either backward pass.
        with tf.GradientTape(persistent=True) as tape:
            losses = [
                optimizer.scale_loss(tf.reduce_sum(layer(x)))
                for layer, optimizer in self.parts()
            ]
        for loss, (layer, optimizer) in zip(losses, self.parts(), strict=True):
            weights = [layer.kernel]
            gradients = tape.gradient(loss, [w.value for w in weights])
            optimizer.apply(gradients, weights)
        return {}

    def parts(self):
        return [
            (self.first, self.first_optimizer),
            (self.second, self.second_optimizer),
        ]


def test_each_backward_pass_has_the_scale_of_its_loss():
    model = TwoScales()
    rows = np.ones([1, 2], np.float32), np.zeros([1, 1], np.float32)
    model(rows[0])
    for layer, optimizer in model.parts():
        optimizer.build([layer.kernel])
    model.compile()
    data = tf.data.Dataset.from_tensors(rows)
    report = tfamp.probe(model, data, steps=1)
    gradients = [t for t in report.tensors if t.is_scaled]
    assert len(gradients) == 4
    for tensor in gradients:
        assert np.nonzero(tensor.histogram.by_exponent)[0] == [126], tensor
