import contextlib
import dataclasses
import io
import json
import math
import os
import pathlib
import re
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfamp
from recipes import generation, transformer
from recipes import language_model as recipe
from tests import matmul_dtypes
from tests.conftest import first_always, mostly_long, mostly_slow
from tfamp.saving import load

ROOT = pathlib.Path(__file__).parent.parent.parent

# What a job of two tiny runs should stay far below, on a busy machine too.
JOB_SECONDS = 240

SIZE = {
    "sequence_length": 16,
    "num_layers": 1,
    "width": 16,
    "num_heads": 2,
    "steps_per_epoch": 2,
    "eval_steps": 1,
    "batch_size": 8,
    "epochs": 1,
    "sample_length": 0,
}


@pytest.fixture
def config(topics_dir):
    """Two steps of a tiny decoder."""
    return recipe.Config(precision="float32", data_dir=topics_dir, **SIZE)


def bytes_of(rows, length=16, seed=0):
    generator = np.random.default_rng(seed)
    return generator.integers(1, 128, (rows, length), dtype=np.int32)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "num_devices"),
    mostly_long(
        [("float32", 1), ("mixed_bfloat16", 1), ("mixed_float16", 2)],
        always=[("mixed_bfloat16", 1)],
    ),
)
def test_two_steps_train_in_every_precision_and_on_two_replicas(
    config, precision, num_devices
):
    config = dataclasses.replace(
        config,
        precision=precision,
        num_devices=num_devices,
        # Both kinds of gradients of the table, dense and sparse.
        tie_embeddings=num_devices == 1,
    )
    results = recipe.train(config)
    assert set(results) == {
        "loss",
        "bits_per_byte",
        "skipped_steps",
        "loss_scale",
    }
    # Nothing is learned yet: a byte costs 8 bits.
    assert results["bits_per_byte"] == pytest.approx(8, abs=0.2)
    assert results["skipped_steps"] == 0
    scale = 2.0**16 if precision == "mixed_float16" else 1.0
    assert results["loss_scale"] == scale


def test_a_position_sees_no_later_one(config):
    model = recipe.build_model(config)
    tokens = bytes_of(2)
    changed = tokens.copy()
    changed[:, 10:] += 1
    before, after = model(tokens).numpy(), model(changed).numpy()
    np.testing.assert_array_equal(before[:, :10], after[:, :10])
    assert np.all(np.any(before[:, 10:] != after[:, 10:], axis=-1))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "tie_embeddings"),
    mostly_slow(
        [("mixed_bfloat16", True), ("mixed_float16", False)],
        always=[("mixed_bfloat16", True)],
    ),
)
def test_products_are_in_16_bits_and_softmax_and_loss_in_float32(
    config, precision, tie_embeddings
):
    tfamp.set_precision(precision)
    model = recipe.build_model(
        dataclasses.replace(config, qk_norm=True, tie_embeddings=tie_embeddings)
    )
    steps = matmul_dtypes.training_steps(
        model, model.loss, bytes_of(2), bytes_of(2, seed=1)
    )

    def dtypes(kind):
        return {step.dtype for step in steps if step.kind == kind}

    assert dtypes("product") == {precision.removeprefix("mixed_")}
    assert dtypes("softmax or loss") == {"float32"}


def test_the_input_table_has_sparse_gradients_unless_it_is_the_output(config):
    for tie_embeddings, kind in ((True, tf.Tensor), (False, tf.IndexedSlices)):
        model = recipe.build_model(
            dataclasses.replace(config, tie_embeddings=tie_embeddings)
        )
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(model(bytes_of(2)) ** 2)
        table = model.get_layer("embedding").embeddings
        assert isinstance(tape.gradient(loss, table.value), kind)


def test_weight_decay_spares_norms_and_embeddings(config):
    config = dataclasses.replace(
        config,
        warmup_steps=0,
        learning_rate=0.1,
        weight_decay=0.5,
        qk_norm=True,
        tie_embeddings=False,
    )
    model = recipe.build_model(config)
    for variable in model.trainable_variables:
        variable.assign(np.ones(variable.shape))
    zeros = [tf.zeros(v.shape) for v in model.trainable_variables]
    model.optimizer.apply(zeros, model.trainable_variables)
    for variable in model.trainable_variables:
        # A learning rate of 0.1 times a decay of 0.5 takes 5%.
        expected = 0.95 if variable.name == "kernel" else 1.0
        np.testing.assert_allclose(variable, expected, rtol=1e-6)


def test_the_learning_rate_warms_up_and_decays_to_a_tenth(config):
    config = dataclasses.replace(
        config, epochs=2, steps_per_epoch=150, warmup_steps=100
    )
    optimizer = recipe.build_model(config).optimizer.inner_optimizer
    schedule = keras.optimizers.schedules.deserialize(
        optimizer.get_config()["learning_rate"]
    )
    np.testing.assert_allclose(
        [float(schedule(step)) for step in (0, 50, 100, 200, 300)],
        np.array([0, 0.5, 1, 0.55, 0.1]) * config.learning_rate,
        rtol=1e-5,
    )


@pytest.mark.slow
def test_a_gpt_of_512_by_4_has_the_weights_it_should(config):
    model = recipe.decoder(
        dataclasses.replace(config, num_layers=4, width=512, num_heads=8), 8192
    )
    # Of a block: four products of W by W, three of W by 8/3 W, which is 1344
    # in multiples of 64, and two norms.
    block = 4 * 512**2 + 3 * 512 * 1344 + 2 * 512
    assert model.count_params() == 8192 * 512 + 4 * block + 512


def test_positions_enter_by_their_distance_alone():
    query, key = np.random.default_rng(0).standard_normal((2, 1, 1, 1, 8))
    repeated = [np.repeat(x.astype("float32"), 12, 1) for x in (query, key)]
    q, k = (transformer.rotate(x).numpy()[0, :, 0] for x in repeated)
    products = q @ k.T
    for distance in range(-11, 12):
        diagonal = np.diagonal(products, distance)
        np.testing.assert_allclose(diagonal, diagonal[0], rtol=1e-4)
    by_distance = [np.diagonal(products, d)[0] for d in range(-11, 12)]
    assert np.ptp(by_distance) > 0.5
    np.testing.assert_array_equal(q[0], query[0, 0, 0].astype("float32"))
    # The first pair turns by one radian a position.
    first, second = query[0, 0, 0][[0, 4]]
    np.testing.assert_allclose(
        q[1][[0, 4]],
        [
            first * np.cos(1) - second * np.sin(1),
            second * np.cos(1) + first * np.sin(1),
        ],
        rtol=1e-5,
    )


@pytest.mark.parametrize("causal", [True, False])
def test_attention_is_the_softmax_of_rotated_queries_and_keys(causal):
    query, key, value = np.random.default_rng(0).standard_normal(
        (3, 2, 5, 1, 4), dtype="float32"
    )
    rotated = [transformer.rotate(x).numpy()[:, :, 0] for x in (query, key)]
    logits = np.einsum("bth,bsh->bts", *rotated) / 2
    if causal:
        logits = np.where(np.tri(5), logits, -np.inf)
    shares = np.exp(logits)
    shares /= shares.sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(
        transformer.RotaryAttention(causal)(query, key, value),
        np.einsum("bts,bsh->bth", shares, value[:, :, 0]),
        rtol=1e-4,
        atol=1e-6,
    )


def test_distant_positions_are_told_apart_in_16_bits():
    x = np.tile([1.0, 0.0], (1, 1000, 1, 1)).astype("float32")
    exact = transformer.rotate(x).numpy()
    for dtype in ("bfloat16", "float16"):
        rotated = transformer.rotate(tf.cast(x, dtype))
        assert rotated.dtype == dtype
        np.testing.assert_allclose(
            tf.cast(rotated, "float32"), exact, atol=2**-8
        )


def test_what_is_behind_a_padding_mask_is_not_seen():
    inputs = keras.Input([6, 8])
    padding_mask = keras.Input([6], dtype="bool")
    model = keras.Model(
        [inputs, padding_mask],
        transformer.block(
            inputs,
            "block",
            num_heads=2,
            num_blocks=1,
            causal=False,
            padding_mask=padding_mask,
        ),
    )
    x = np.random.default_rng(0).standard_normal((1, 6, 8)).astype("float32")
    changed = x.copy()
    changed[:, 4:] += 1.0
    seen = np.array([[True] * 4 + [False] * 2])
    np.testing.assert_array_equal(
        model([x, seen])[:, :4], model([changed, seen])[:, :4]
    )
    everything = np.ones_like(seen)
    assert np.all(
        np.any(
            model([x, everything])[:, :4].numpy()
            != model([changed, everything])[:, :4].numpy(),
            axis=-1,
        )
    )


@pytest.mark.slow
def test_normalized_queries_and_keys_bound_the_attention_logits(config):
    def spread(qk_norm):
        keras.utils.set_random_seed(0)
        model = recipe.build_model(dataclasses.replace(config, qk_norm=qk_norm))
        for role in ("query", "key"):
            kernel = model.get_layer(f"block0_{role}").kernel
            kernel.assign(1000.0 * kernel)
        names = ("query_norm", "query_heads")
        query = model.get_layer(f"block0_{names[0 if qk_norm else 1]}").output
        view = keras.Model(model.input, query)
        return np.abs(view(bytes_of(2))).max()

    # With H features of mean square 1 none exceeds sqrt(H).
    assert spread(qk_norm=True) <= math.sqrt(8) * 1.001
    assert spread(qk_norm=False) > 100


def test_generation_continues_as_the_model_would_one_by_one(config):
    config = dataclasses.replace(config, tie_embeddings=False)
    model = recipe.build_model(config)
    # Far from uniform, so that no two logits are close.
    table = model.get_layer("embedding").reverse_embeddings
    table.assign(50.0 * table)
    prompt = [7, 8, 9]
    drawn = generation.generate(
        model, [prompt] * 2, 20, sequence_length=16, temperature=0
    )
    expected = list(prompt)
    for _ in range(20):
        seen = expected[-16:]
        padded = np.array([seen + [99] * (16 - len(seen))], np.int32)
        logits = model(padded).numpy()[0, len(seen) - 1]
        expected.append(int(np.argmax(logits)))
    assert len(set(expected)) > 3
    np.testing.assert_array_equal(drawn, [expected] * 2)


@pytest.mark.slow
def test_samples_follow_the_temperature_and_the_seed(config):
    model = recipe.build_model(config)

    def draw(**options):
        return generation.generate(
            model, [[0]] * 8, 12, sequence_length=16, **options
        )

    first = draw(seed=1)
    np.testing.assert_array_equal(first, draw(seed=1))
    # All bytes are about as likely yet.
    assert len({tuple(row) for row in first}) == 8
    assert np.unique(first).size > 50
    few = draw(seed=2, vocabulary_size=3)
    assert set(few[:, 1:].flat) == {0, 1, 2}
    cold = draw(temperature=1e-4)
    assert len({tuple(row) for row in cold}) == 1


def run(*flags):
    """The recipe as a program; its exit status."""
    sizes = [f"--{name}={value}" for name, value in SIZE.items()]
    with pytest.raises(SystemExit) as stopped:
        tfamp.recipe.main(
            recipe.train, recipe.Config, ["language_model", *sizes, *flags]
        )
    return stopped.value.code


@pytest.fixture(scope="module")
def finished_run(topics_dir, tmp_path_factory):
    """What a run long enough to learn something printed and wrote."""
    output = tmp_path_factory.mktemp("run") / "out"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        status = run(
            f"--data_dir={topics_dir}",
            f"--output_dir={output}",
            "--precision=mixed_bfloat16",
            *("--steps_per_epoch=150", "--batch_size=32", "--eval_steps=20"),
            *("--width=32", "--learning_rate=1e-2", "--warmup_steps=20"),
            *("--prompt=The loop", "--sample_length=4"),
        )
    assert status == 0
    keras.config.set_dtype_policy("float32")
    record = json.loads((output / "run.json").read_text())
    return printed.getvalue(), output, record["final_metrics"]


@pytest.mark.slow
def test_training_learns_more_than_how_frequent_each_byte_is(finished_run):
    printed, _, metrics = finished_run
    line = re.search(r"without a model: ([\d.]+) .*, ([\d.]+) by", printed)
    uniform, unigram = map(float, line.groups())
    assert uniform == pytest.approx(8, abs=0.01)
    assert 4.5 < unigram < 5
    assert metrics["bits_per_byte"] < unigram - 0.3
    assert metrics["bits_per_byte"] == pytest.approx(
        metrics["loss"] / math.log(2), rel=1e-3
    )


@pytest.mark.slow
def test_a_run_writes_its_samples_and_shows_the_first(finished_run):
    printed, output, _ = finished_run
    samples = (output / "samples.txt").read_text().split(f"\n{'=' * 80}\n")
    assert len(samples) == 4
    assert all(sample.startswith("The loop") for sample in samples)
    assert f"  {samples[0].splitlines()[0]}" in printed


@pytest.mark.slow
def test_a_run_leaves_a_model_that_loads(finished_run, topics_dir):
    _, output, metrics = finished_run
    assert [p.name for p in output.glob("*.keras")] == ["model.keras"]
    model = load.load_model(output / "model.keras")
    config = recipe.Config(
        data_dir=topics_dir,
        **SIZE | {"batch_size": 32, "eval_steps": 20},
    )
    _, batches = recipe.make_datasets(config)
    found = tfamp.evaluate(model, batches)["loss"]
    assert found == pytest.approx(metrics["loss"], rel=1e-6)


@pytest.mark.parametrize(
    ("flag", "message"),
    first_always(
        [
            ("--dataset=digits", "has no text"),
            ("--tokenizer=no.model", "'bytes' or a SentencePiece"),
            ("--vocabulary_size=100", "256 or more"),
            ("--width=18", "width=18 is not divisible by num_heads=2"),
            ("--num_heads=3", "use 18"),
            ("--sequence_length=1000000", "use a shorter one"),
            ("--sequence_length=0", "sequence_length=0"),
            ("--dropout=1", "dropout=1"),
            ("--temperature=-1", "temperature=-1"),
            ("--eval_split=test", "no split 'test'"),
            ("--output_dir=/dev/null/out", "/dev/null/out"),
        ],
        3,
    ),
)
def test_a_bad_flag_ends_in_one_line_and_status_2(
    topics_dir, capsys, flag, message
):
    assert run(f"--data_dir={topics_dir}", "--precision=float32", flag) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error


def test_a_text_too_short_for_a_batch_is_bad_input(topics_dir, capsys):
    flags = ("--batch_size=100000", "--steps_per_epoch=0")
    assert run(f"--data_dir={topics_dir}", *flags) == 2
    assert "batch_size=100000 exceeds" in capsys.readouterr().err


@pytest.mark.long
def test_two_workers_with_microbatches_and_16_bit_reduction_train_as_one(
    topics_dir, tmp_path, config
):
    size = SIZE | {"batch_size": 16, "steps_per_epoch": 6, "warmup_steps": 0}
    flags = [f"--{name}={value}" for name, value in size.items()]
    flags += [
        "--microbatches=4",
        "--sample_length=4",
        "--precision=mixed_bfloat16",
        "--dropout=0",
    ]
    output = tmp_path / "out"
    job = subprocess.run(
        [
            *(sys.executable, "-m", "tfamp.launch", "--workers=2"),
            *("recipes.language_model", "--"),
            *(*flags, f"--data_dir={topics_dir}", f"--output_dir={output}"),
            "--all_reduce_dtype=bfloat16",
        ],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "-1"},
        capture_output=True,
        text=True,
        timeout=JOB_SECONDS,
    )
    assert job.returncode == 0, job.stderr[-4000:]
    # Both workers say what they ended with.
    finals = re.findall(r"final  .*", job.stdout)
    assert len(finals) == 2
    assert finals[0] == finals[1]
    assert len((output / "samples.txt").read_text().split("=" * 80)) == 4
    record = json.loads((output / "run.json").read_text())

    alone = recipe.train(
        dataclasses.replace(
            config, **size, precision="mixed_bfloat16", dropout=0.0
        )
    )
    untrained = 8 * math.log(2)
    assert alone["loss"] < untrained - 0.02
    # A gradient that is rounded to bfloat16 is off by 2**-9 of its size.
    assert record["final_metrics"]["loss"] == pytest.approx(
        alone["loss"], abs=5e-3
    )
