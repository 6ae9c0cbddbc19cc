import contextlib
import dataclasses
import io
import itertools
import json
import math
import re
from pydoc_data.topics import topics as sections

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfamp
from recipes import language_model, low_rank, low_rank_file
from recipes import lora as recipe
from recipes.data import text
from recipes.int8_dense import Int8Dense
from tests.conftest import first_always, mostly_long
from tests.resumable_run import StopAfter, Stopped, assert_same_bits
from tfamp import keras_internals
from tfamp.checkpoint.frozen import frozen_weights
from tfamp.checkpoint.run_state import read_metadata
from tfamp.checkpoint.store import Checkpoints
from tfamp.training.observers import Observer, observing

SIZE = {
    "sequence_length": 16,
    "num_layers": 1,
    "width": 16,
    "num_heads": 2,
    "base_steps_per_epoch": 2,
    "base_epochs": 1,
    "steps_per_epoch": 2,
    "eval_steps": 1,
    "batch_size": 8,
    "epochs": 1,
    "rank": 4,
    "sample_length": 0,
    "warmup_steps": 0,
}


@pytest.fixture(scope="module")
def base_file(tmp_path_factory):
    """A decoder of the size above that has learned nothing."""
    keras.utils.set_random_seed(3)
    path = tmp_path_factory.mktemp("base") / "base.keras"
    decoder().save(path)
    return str(path)


@pytest.fixture
def config(topics_dir, base_file):
    """Two steps on a tiny decoder."""
    return recipe.Config(
        precision="float32", data_dir=topics_dir, base=base_file, **SIZE
    )


def decoder(vocabulary_size=256, **options):
    size = {n: SIZE[n] for n in ("sequence_length", "width", "num_heads")}
    config = language_model.Config(**size | {"num_layers": 1} | options)
    return language_model.decoder(config, vocabulary_size)


def bytes_of(rows, length=16, seed=0):
    generator = np.random.default_rng(seed)
    return generator.integers(1, 128, (rows, length), dtype=np.int32)


def values(variables):
    return [variable.numpy() for variable in variables]


def with_updates(model, size=0.3):
    """Gives the branches something to add; returns the model."""
    generator = np.random.default_rng(1)
    for branch in low_rank.branches(model).values():
        branch["b"].assign(size * generator.normal(size=branch["b"].shape))
    return model


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "base_dtype", "num_devices"),
    mostly_long(
        [
            ("float32", "compute", 1),
            ("mixed_bfloat16", "compute", 1),
            ("mixed_float16", "compute", 2),
            ("mixed_float16", "int8", 1),
        ],
        always=[("mixed_float16", "int8", 1)],
    ),
)
def test_only_low_rank_weights_train_and_the_base_keeps_its_bits(
    config, precision, base_dtype, num_devices
):
    config = dataclasses.replace(
        config,
        precision=precision,
        base_dtype=base_dtype,
        num_devices=num_devices,
    )
    strategy = tfamp.recipe.start(config)
    batches, _ = recipe.make_datasets(config)
    with strategy.scope():
        model = recipe.build_model(config)
    frozen, trained = frozen_weights(model), model.trainable_weights
    branches = low_rank.branches(model)
    assert {id(v) for v in trained} == {
        id(b[part]) for b in branches.values() for part in ("a", "b")
    }
    assert len(branches) == 7
    # Moments, and the weights themselves.
    moved = [*trained, *model.optimizer.inner_optimizer.variables[2:]]
    assert {v.dtype for v in trained} == {"float32"}
    compute_dtype = precision.removeprefix("mixed_")
    assert model.get_layer("embedding").embeddings.dtype == compute_dtype
    kernels = {v.dtype for v in frozen if v.name.endswith("kernel")}
    assert kernels == {"int8" if base_dtype == "int8" else compute_dtype}

    frozen_before, before = values(frozen), values(moved)
    tfamp.fit(model, batches, verbose=0)
    assert int(model.optimizer.iterations.numpy()) == 2
    assert len(frozen) + len(trained) == len(model.weights)
    assert_same_bits(values(frozen), frozen_before)
    assert all(
        np.any(now != then)
        for now, then in zip(values(moved), before, strict=True)
    )


def test_without_updates_it_computes_what_its_base_does(config):
    model = recipe.build_model(config)
    base = tfamp.load_model(config.base)
    np.testing.assert_array_equal(model(bytes_of(2)), base(bytes_of(2)))
    with_updates(model)
    assert np.abs(model(bytes_of(2)) - base(bytes_of(2))).max() > 0.01


@pytest.mark.slow
def test_branches_begin_apart_and_alike_for_a_seed(config):
    def beginnings(seed):
        keras.utils.set_random_seed(seed)
        branches = low_rank.branches(recipe.build_model(config))
        return [np.asarray(b["a"]) for b in branches.values()]

    first = beginnings(1)
    assert len({a.tobytes() for a in first}) == len(first)
    assert_same_bits(first, beginnings(1))
    assert np.any(first[0] != beginnings(2)[0])
    # Uniform, of variance 1 / (3 inputs).
    assert max(np.abs(a).max() * math.sqrt(len(a)) for a in first) <= 1


def test_a_branch_adds_alpha_over_rank_times_b_a_inside_the_activation():
    inputs = keras.Input([2], dtype="int32")
    rows = keras.layers.Embedding(2, 2, name="table")(inputs)
    gate = keras.layers.Dense(2, activation="relu", name="a_mlp_gate")
    base = keras.Model(inputs, gate(rows))
    base.get_layer("table").embeddings.assign(np.eye(2))
    gate.set_weights([np.eye(2), np.array([0.0, -5.0])])
    model = low_rank.adapt(
        base, low_rank.LowRank(1, 3.0, 0.0, "mlp", "float32"), 2
    )
    ((name, branch),) = low_rank.branches(model).items()
    assert name == "a_mlp_gate"
    branch["a"].assign([[1.0], [2.0]])
    branch["b"].assign([[1.0, -1.0]])
    # W x + b is (1, -5) and (0, -4); 3 B A x is (3, -3) and (6, -6).
    np.testing.assert_array_equal(model(np.array([[0, 1]])), [[[4, 0], [6, 0]]])
    np.testing.assert_array_equal(
        low_rank.kernel_updates(model)["a_mlp_gate"], [[3, -3], [6, -6]]
    )


@pytest.mark.parametrize(
    ("precision", "base_dtype"),
    mostly_long(
        itertools.product(
            ["float32", "mixed_bfloat16"], ["compute", "float32", "int8"]
        ),
        always=[("float32", "int8")],
    ),
)
def test_the_merged_model_computes_what_the_adapted_one_does(
    config, precision, base_dtype
):
    tfamp.set_precision(precision)
    config = dataclasses.replace(config, base_dtype=base_dtype)
    base = recipe.read_base(config)
    model = with_updates(recipe.adapted(config, base))
    # It computes in float32, as its file does.
    merged = low_rank.merge(model, base)
    expected = np.asarray(model(bytes_of(4)))
    tolerance = 1e-5 if precision == "float32" else 0.1
    error = np.abs(merged(bytes_of(4)) - expected).max()
    assert error < tolerance * np.abs(expected).max()
    # More than that, were there no updates.
    unchanged = np.abs(base(bytes_of(4)) - expected).max()
    assert unchanged > 4 * tolerance * np.abs(expected).max()


def test_int8_is_near_the_kernel_and_its_gradient_that_of_what_is_stored():
    generator = np.random.default_rng(0)
    kernel = generator.normal(size=(64, 8)).astype("float32")
    kernel[:, 3] = 0
    x = tf.constant(generator.normal(size=(4, 64)), tf.float32)
    layer = Int8Dense(8, use_bias=False)
    layer.build([None, 64])
    layer.set_kernel(kernel)
    half_steps = np.abs(kernel).max(axis=0) / 127 / 2
    stored = np.asarray(layer.kernel)
    assert np.all(np.abs(stored - kernel) <= 1.001 * half_steps)
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = tf.reduce_sum(layer(x) ** 2)
    np.testing.assert_allclose(
        tape.gradient(y, x), 2 * (x @ stored) @ stored.T, rtol=1e-4, atol=1e-4
    )
    assert layer.trainable_weights == []


def test_int8_computes_in_float16_what_sums_of_integers_overflow():
    layer = Int8Dense(1, dtype="mixed_float16")
    layer.build([None, 16])
    # Each product of integers is 127**2, and float16 ends at 65504.
    layer.set_kernel(np.full([16, 1], 0.5))
    layer.bias.assign([1.0])
    assert float(layer(np.full([1, 16], 2.0))[0, 0]) == 17.0
    stock = keras.layers.Dense(1, dtype="float16")
    stock.build([None, 16])
    with pytest.raises(ValueError, match="float16"):
        stock.quantize("int8")


def test_small_updates_of_kernels_count_in_16_bits():
    keras.config.set_dtype_policy("mixed_bfloat16")
    inputs = keras.Input([2])
    base = keras.Model(inputs, keras.layers.Dense(1, use_bias=False)(inputs))
    kernel = base.layers[1].kernel
    kernel.assign([[1.0], [-1.0]])
    model = low_rank.adapt(
        base, low_rank.LowRank(1, 1.0, 0.0, "all", "compute"), 2
    )
    (branch,) = low_rank.branches(model).values()
    branch["a"].assign([[1.0], [1.0]])
    branch["b"].assign([[2.0**-10]])
    assert float(model(np.ones([1, 2]))[0, 0]) == 2.0**-9
    # Keras's own adds them to a kernel of 16 bits.
    stock = base.layers[1]
    stock.enable_lora(1)
    stock.lora_kernel_a.assign(branch["a"])
    stock.lora_kernel_b.assign(branch["b"])
    assert float(stock(np.ones([1, 2]))[0, 0]) == 0.0


def test_weight_decay_spares_b(config):
    config = dataclasses.replace(config, learning_rate=0.1, weight_decay=0.5)
    model = recipe.build_model(config)
    trained = model.trainable_variables
    for variable in trained:
        variable.assign(np.ones(variable.shape))
    model.optimizer.apply([tf.zeros(v.shape) for v in trained], trained)
    for branch in low_rank.branches(model).values():
        # A learning rate of 0.1 times a decay of 0.5 takes 5%.
        np.testing.assert_allclose(branch["a"], 0.95, rtol=1e-6)
        np.testing.assert_array_equal(branch["b"], 1.0)


def trained_on(strategy, base_dtype):
    """Weights and losses of a tiny adaptation in bfloat16, by name."""
    keras.utils.set_random_seed(0)
    tfamp.set_precision("mixed_bfloat16")
    config = recipe.Config(
        **SIZE | {"base_dtype": base_dtype, "learning_rate": 0.02}
    )
    rows = bytes_of(16, length=17)
    batches = tf.data.Dataset.from_tensor_slices((rows[:, :-1], rows[:, 1:]))
    with strategy.scope():
        model = recipe.adapted(config, decoder())
    before = values(model.trainable_variables)
    history = tfamp.fit(
        model,
        batches.batch(8, drop_remainder=True),
        epochs=2,
        verbose=0,
    )
    after = values(model.trainable_variables)
    moved = [(a != b).any() for a, b in zip(before, after, strict=True)]
    return {f"weight{i}": value for i, value in enumerate(after)} | {
        "loss": np.array(history.history["loss"]),
        "moved": np.array(moved),
        "stored": np.array(sorted({v.dtype for v in model.weights})),
    }


def check_training(results, base_dtype):
    """All low-rank weights moved, and the loss came down from a guess."""
    assert base_dtype in results["stored"]
    assert results["moved"].all()
    first, last = results["loss"]
    assert first == pytest.approx(math.log(256), abs=0.5)
    assert last < first


@pytest.mark.parametrize(
    "base_dtype", mostly_long(("bfloat16", "int8"), always=["bfloat16"])
)
@pytest.mark.slow
def test_two_replicas_with_collectives_train_on_a_narrow_base(
    base_dtype, mirrored
):
    stored = "int8" if base_dtype == "int8" else "compute"

    check_training(trained_on(mirrored(2), stored), base_dtype)


@pytest.mark.parametrize(
    ("targets", "count"),
    first_always([("attention", 4), ("mlp", 3), ("all", 7)], 1),
)
def test_targets_choose_the_kernels(config, targets, count):
    model = recipe.build_model(dataclasses.replace(config, targets=targets))
    assert len(low_rank.branches(model)) == count


@pytest.mark.slow
def test_rank_0_trains_the_base_itself(config):
    config = dataclasses.replace(config, rank=0)
    tfamp.set_precision("mixed_bfloat16")
    model = recipe.build_model(config)
    base = tfamp.load_model(config.base)
    assert model.count_params() == base.count_params()
    assert {v.dtype for v in model.trainable_weights} == {"float32"}
    assert frozen_weights(model) == []


@pytest.mark.slow
def test_lint_finds_nothing_in_float16(config):
    tfamp.set_precision("mixed_float16")
    model = recipe.build_model(dataclasses.replace(config, rank=8))
    assert model.get_layer("block0_query").kernel.dtype == "float16"
    batch = (bytes_of(2), bytes_of(2, seed=1))
    assert tfamp.lint(model, batch) == []


@pytest.mark.slow
def test_a_file_of_low_rank_weights_comes_back(config, tmp_path):
    model = with_updates(recipe.build_model(config))
    path = tmp_path / "low_rank.npz"
    low_rank_file.save(model, path)
    other = recipe.build_model(config)
    low_rank_file.load(other, path)
    assert_same_bits(
        values(other.trainable_weights), values(model.trainable_weights)
    )
    numbers = sum(math.prod(v.shape) for v in model.trainable_weights)
    assert path.stat().st_size < 4 * numbers + 8000
    for options, message in (
        (
            {"rank": 2},
            "block0_attention_output/a is 16 by 4 there, and 16 by 2",
        ),
        ({"alpha": 1.0}, "scale is 4 there, and 0.25 in the model"),
        ({"targets": "mlp"}, "16 by 4 there, and missing in the model"),
    ):
        other = recipe.build_model(dataclasses.replace(config, **options))
        with pytest.raises(tfamp.InputError, match=message) as raised:
            low_rank_file.load(other, path)
        assert "\n" not in str(raised.value)
    with pytest.raises(tfamp.InputError, match="is not there"):
        low_rank_file.load(model, tmp_path / "none.npz")


def test_the_two_manuals_share_the_documentation_out(topics_dir):
    parts = {
        (name, split): {
            line.decode() for line in data.read(split).as_numpy_iterator()
        }
        for name in ("topics", "manuals/language", "manuals/library")
        for data in [text.load(name, topics_dir)]
        for split in ("train", "validation")
    }
    for split in ("train", "validation"):
        language = parts["manuals/language", split]
        library = parts["manuals/library", split]
        assert language | library == parts["topics", split]
        assert not language & library
        assert min(map(len, (language, library))) >= 4
    library = parts["manuals/library", "train"]
    assert {sections["typesmapping"], sections["debugger"]} < library
    assert sections["types"] in parts["manuals/language", "train"]


def run(config, **changes):
    """Trains as a program would; what it printed."""
    printed = io.StringIO()
    config = dataclasses.replace(config, **changes)
    with contextlib.redirect_stdout(printed):
        recipe.train(config)
    return printed.getvalue()


@pytest.fixture(scope="module")
def runs(topics_dir, tmp_path_factory):
    """A run with a base of its own; the same, stopped and gone on."""
    folder = tmp_path_factory.mktemp("runs")
    config = recipe.Config(
        precision="mixed_float16",
        data_dir=topics_dir,
        checkpoint_dir=str(folder / "checkpoints"),
        **SIZE | {"epochs": 2, "targets": "attention"},
    )
    whole = run(
        config,
        checkpoint_dir="",
        output_dir=str(folder / "whole"),
        sample_length=2,
    )
    with (
        contextlib.suppress(Stopped),
        # In the second epoch of the fine-tuning.
        observing(Observer([StopAfter(3)])),
    ):
        run(config)
    resumed = run(config, output_dir=str(folder / "resumed"))
    keras.config.set_dtype_policy("float32")
    return folder, config, whole, resumed


@pytest.mark.slow
def test_a_run_that_was_stopped_ends_with_the_same_bits(runs):
    folder, _, whole, resumed = runs
    files = []
    for name in ("whole", "resumed"):
        with np.load(folder / name / "low_rank.npz") as file:
            files.append(dict(file))
    one, other = files
    assert one.keys() == other.keys()
    assert_same_bits(one.values(), other.values())
    assert any(np.any(v) for k, v in one.items() if k.endswith("/b"))
    # Two epochs after one of the base; then the second alone.
    assert len(re.findall(r"epoch \d/\d", whole)) == 3
    assert re.findall(r"epoch \d/\d", resumed) == ["epoch 2/2"]


@pytest.mark.slow
def test_the_checkpoint_holds_the_low_rank_weights_and_not_the_base(
    runs, base_file
):
    folder, config, _, _ = runs
    prefix = str(folder / "checkpoints" / "low_rank" / "ckpt-2")
    metadata = read_metadata(prefix)
    kernels = [
        (path, tuple(shape))
        for path, shape, _ in metadata["variables"]
        if path.endswith("/kernel")
    ]
    tfamp.set_precision(config.precision)
    model = recipe.build_model(dataclasses.replace(config, base=base_file))
    assert [shape for _, shape in kernels] == [
        tuple(v.shape) for v in model.trainable_weights
    ]
    assert all("_lora_" in path for path, _ in kernels)
    paths = [path for path, _, _ in metadata["variables"]]
    assert any("dynamic_scale" in path for path in paths)
    assert len(metadata["frozen"]) == len(frozen_weights(model))
    # Weights and two moments; the rest is small.
    trained = sum(math.prod(v.shape) for v in model.trainable_weights)
    saved = [
        math.prod(shape)
        for name, shape in tf.train.list_variables(prefix)
        if name.startswith("variables/")
    ]
    assert 3 * trained <= sum(saved) < 3 * trained + 100
    assert sum(saved) < 3 * sum(math.prod(v.shape) for v in model.weights)


@pytest.mark.slow
def test_another_base_is_refused_where_a_run_goes_on(runs, base_file):
    folder, config, _, _ = runs
    tfamp.set_precision(config.precision)
    model = recipe.build_model(dataclasses.replace(config, base=base_file))
    keras_internals.build_everything(
        model, recipe.make_datasets(config)[0].element_spec
    )
    with pytest.raises(
        tfamp.InputError, match="goes with other frozen weights"
    ) as raised:
        Checkpoints(
            model,
            folder / "checkpoints" / "low_rank",
            with_frozen=False,
        ).restore()
    assert "\n" not in str(raised.value)


@pytest.mark.slow
def test_a_run_leaves_samples_weights_and_a_model_that_loads(runs):
    folder, config, printed, _ = runs
    output = folder / "whole"
    rule = f"\n{'=' * 80}\n"
    parts = (output / "samples.txt").read_text().split(rule)
    assert len(parts) == 10
    assert (parts[0], parts[5]) == ("The base:", "Fine-tuned:")
    metrics = json.loads((output / "run.json").read_text())["final_metrics"]
    found = re.search(r"bits per byte of the base: ([\d.]+)", printed)
    # Nothing is learned yet: a byte costs 8 bits.
    assert float(found[1]) == pytest.approx(8, abs=0.2)
    assert re.search(r"trainable: 512 weights, 2,048 bytes", printed)
    assert re.search(r"frozen: \d,\d+ weights, .* in float16", printed)
    merged = tfamp.load_model(output / "model.keras")
    assert not merged.compiled
    batches = recipe.make_datasets(config)[1]
    merged.compile(
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    loss = tfamp.evaluate(merged, batches)["loss"]
    assert loss == pytest.approx(metrics["val_loss"], rel=1e-3)
    # It can be a base, as can the one that was trained first.
    for path in (output / "model.keras", output / "base" / "model.keras"):
        recipe.read_base(dataclasses.replace(config, base=str(path)))


def main(*flags):
    """The recipe as a program; its exit status."""
    with pytest.raises(SystemExit) as stopped:
        tfamp.recipe.main(recipe.train, recipe.Config, ["lora", *flags])
    return stopped.value.code


@pytest.fixture(scope="module")
def bad_bases(tmp_path_factory):
    """A folder of models that are no base for this text."""
    folder = tmp_path_factory.mktemp("bases")
    decoder(vocabulary_size=512).save(folder / "vocabulary.keras")
    image = keras.Input([8, 8, 1])
    classes = keras.layers.Dense(10)(keras.layers.Flatten()(image))
    keras.Model(image, classes).save(folder / "classifier.keras")
    quantized = decoder()
    quantized.get_layer("block0_query").quantize("int8")
    quantized.save(folder / "quantized.keras")
    tokens = keras.Input([16], dtype="int32")
    table = keras.layers.Embedding(256, 256)(tokens)
    keras.Model(tokens, table).save(folder / "table.keras")
    (folder / "text.keras").write_text("no model")
    return folder


@pytest.mark.parametrize(
    ("flags", "message"),
    first_always(
        [
            (["--base={bad}/none.keras"], "is not there"),
            (["--base={bad}/text.keras"], "is no .keras file"),
            (["--base={bad}/classifier.keras"], "[B, T, V]"),
            (["--base={bad}/vocabulary.keras"], "a vocabulary of 512"),
            (["--base={bad}/quantized.keras"], "block0_query to int8"),
            (["--base={bad}/table.keras"], "none among the 0 Dense layers"),
            (["--base={base}", "--sequence_length=17"], "use 16 or less"),
            (["--base={base}", "--rank=17"], "use 16 or less"),
            (["--base={base}", "--rank=0", "--base_dtype=int8"], "rank of 1"),
            (["--base={base}", "--base_dtype=int4"], "int4"),
            (["--base={base}", "--dataset=manuals/c"], "'manuals/library'"),
            (["--base_dataset=digits"], "has no text"),
        ],
        3,
    ),
)
def test_bad_input_ends_in_one_line_and_status_2(
    topics_dir, base_file, bad_bases, capsys, flags, message
):
    size = [f"--{name}={value}" for name, value in SIZE.items()]
    given = [flag.format(bad=bad_bases, base=base_file) for flag in flags]
    status = main(
        f"--data_dir={topics_dir}", "--precision=float32", *size, *given
    )
    assert status == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error


@pytest.mark.slow
def test_a_base_that_overflows_float16_is_refused(config):
    tfamp.set_precision("mixed_float16")
    base = recipe.read_base(config)
    base.get_layer("block0_query").kernel.assign(np.full((16, 16), 1e5))
    with pytest.raises(tfamp.InputError, match="not finite in float16") as told:
        recipe.adapted(config, base)
    assert "\n" not in str(told.value)
    recipe.adapted(dataclasses.replace(config, base_dtype="float32"), base)
