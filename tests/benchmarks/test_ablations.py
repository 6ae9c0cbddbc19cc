"""What an ablation takes away is gone, and nothing else."""

import numpy as np
import pytest
import tensorflow as tf

from benchmarks import ablation_table, ablations

ARMS = {arm.name: arm for arm in ablations.ARMS}


@pytest.mark.slow
def test_float16_sums_stand_still_at_2048_and_float32_sums_do_not():
    # Between 2048 and 4096 float16 counts in steps of 2, and 2049 rounds to
    # the even 2048.
    a = tf.ones([1, 2100], tf.float16)
    b = tf.ones([2100, 1], tf.float16)
    assert ablations.matmul_with_float16_sums(a, b) == 2048
    assert tf.matmul(a, b) == 2100


def test_products_and_their_gradients_are_those_of_a_matrix_product():
    # Small integers: float16 holds every sum.
    a = tf.constant([[1, 2, 3], [4, 5, 6]], tf.float16)
    b = tf.constant([[1, -1], [0, 2], [3, 1]], tf.float16)
    upstream = tf.constant([[1, 2], [3, 4]], tf.float16)
    with tf.GradientTape() as tape:
        tape.watch((a, b))
        product = ablations.matmul_with_float16_sums(a, b)
    np.testing.assert_array_equal(product, [[10, 6], [22, 12]])
    by_a, by_b = tape.gradient(product, (a, b), output_gradients=upstream)
    np.testing.assert_array_equal(by_a, [[-1, 4, 5], [-1, 8, 13]])
    np.testing.assert_array_equal(by_b, [[13, 18], [17, 24], [21, 30]])


def test_a_product_is_rounded_once_with_its_sum():
    # (1 + 2^-10)^2 is 1 + 2^-9 + 2^-20, and 1 + 2^-9 in float16.
    a = tf.constant([[-1.0, 1 + 2**-10]], tf.float16)
    b = tf.constant([[1 + 2**-9], [1 + 2**-10]], tf.float16)
    assert ablations.matmul_with_float16_sums(a, b) == 2.0**-20


@pytest.mark.slow
def test_weights_without_masters_are_those_that_float16_holds(
    monkeypatch, digits_dir
):
    models = []
    build = ablations._classifier

    def build_and_keep(*arguments):
        models.append(build(*arguments))
        return models[-1]

    monkeypatch.setattr(ablations, "_classifier", build_and_keep)
    for name in ("without float32 master weights", "mixed precision"):
        found = ablations.train(ARMS[name], "digits", 1, 0, digits_dir)
        assert found["accuracy"] > 15
    rounded, masters = (
        [np.all(w == w.astype(np.float16)) for w in model.get_weights()]
        for model in models
    )
    assert all(rounded)
    assert not any(masters)


def test_the_table_says_what_differs_from_float32():
    float32 = {
        "accuracy": [95.0, 96.0],
        "two_heads_accuracy": [95.0, 96.0],
        "image_loss": [0.1, 0.2],
    }
    rows = [(name, dict(float32)) for name in ARMS]
    rows[4][1]["image_loss"] = [0.4, 0.5]
    rows[5][1]["accuracy"] = [92.0, 93.0]
    text = ablation_table.to_markdown(
        rows,
        seeds=2,
        epochs=1,
        minutes=1.0,
        environment=[("device", "an abacus")],
    )
    assert "- device: an abacus" in text
    assert "| **two heads, image loss** | 0.150 ± 0.071 | 0.450 ± 0.071" in text
    lines = {line.split(" | ")[0]: line for line in text.splitlines()}
    assert "image loss worse by 0.300" in lines["| without loss scaling"]
    assert "accuracy worse by 3.00" in lines["| without float32 master weights"]
    assert lines["| mixed precision"].endswith("as float32 |")


@pytest.fixture(scope="module")
def digits_dir(tmp_path_factory):
    """A folder with the prepared digits."""
    from recipes.data import loading

    folder = tmp_path_factory.mktemp("data")
    loading.load("digits", str(folder))
    return str(folder)
