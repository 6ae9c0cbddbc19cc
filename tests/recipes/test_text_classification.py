import contextlib
import dataclasses
import io
import json

import keras
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

import tfamp
from recipes import shown_text
from recipes import text_classification as recipe
from recipes.data import labelled_text, passages, subwords, text
from recipes.data.masked_tokens import Masking, hide_tokens, mask_tokens
from recipes.data.tokens import ByteTokenizer, make_tokenizer
from tests import matmul_dtypes
from tests.conftest import first_always, mostly_slow
from tests.recipes.published_data import EXAMPLES, write_metadata
from tfamp.files.output import utc_now
from tfamp.precision.policy import PRECISIONS
from tfamp.training.observers import Observer, observing

SIZE = {
    "vocabulary_size": 512,
    "sequence_length": 16,
    "truncate": True,
    "num_layers": 1,
    "width": 16,
    "num_heads": 2,
    "batch_size": 400,
    "pretrain_epochs": 1,
    "epochs": 1,
}


@pytest.fixture(scope="module")
def passages_dir(tmp_path_factory):
    """A folder with the prepared passages."""
    folder = str(tmp_path_factory.mktemp("data"))
    text.load("passages", folder)
    return folder


@pytest.fixture(scope="module")
def module_config(passages_dir):
    """Two steps in each phase of a tiny transformer."""
    return recipe.Config(precision="float32", data_dir=passages_dir, **SIZE)


@pytest.fixture
def config(module_config):
    return module_config


class Interrupter(keras.callbacks.Callback):
    """Notes the epochs that begin, and is a Ctrl-C in one of them."""

    def __init__(self, interrupted=None):
        super().__init__()
        self.trained, self.begun = [], []
        self._interrupted = interrupted

    def on_train_begin(self, logs=None):
        self.trained.append(self.model.name)

    def on_epoch_begin(self, epoch, logs=None):
        self.begun.append((self.model.name, epoch))
        if self.begun[-1] == self._interrupted:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def finished_run(module_config, tmp_path_factory):
    """Two epochs of each phase: metrics, what was printed and written."""
    output = tmp_path_factory.mktemp("run") / "out"
    config = dataclasses.replace(
        module_config, pretrain_epochs=2, epochs=2, output_dir=str(output)
    )
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        metrics = recipe.train(config)
    return config, metrics, printed.getvalue(), output


def check_metrics(metrics, precision):
    assert set(metrics) == {"loss", "accuracy", "skipped_steps", "loss_scale"}
    assert np.isfinite(metrics["loss"])
    assert 0 <= metrics["accuracy"] <= 1
    assert metrics["skipped_steps"] == 0
    scale = 2.0**16 if precision == "mixed_float16" else 1.0
    assert metrics["loss_scale"] == scale


@pytest.mark.slow
def test_both_phases_train_in_float32(finished_run):
    _, metrics, *_ = finished_run
    check_metrics(metrics, "float32")


@pytest.mark.slow
def test_both_phases_train_in_float16_on_two_replicas(config):
    config = dataclasses.replace(
        config, precision="mixed_float16", num_devices=2
    )
    check_metrics(recipe.train(config), "mixed_float16")


@pytest.mark.slow
def test_both_phases_train_in_bfloat16_and_beat_the_most_frequent_class(config):
    config = dataclasses.replace(
        config,
        precision="mixed_bfloat16",
        sequence_length=32,
        width=32,
        batch_size=64,
        epochs=4,
        learning_rate=1e-2,
    )
    metrics = recipe.train(config)
    check_metrics(metrics, "mixed_bfloat16")
    majority = recipe._load(config).majority_accuracy()
    assert metrics["accuracy"] > majority + 0.15


@pytest.mark.long
def test_a_run_killed_in_either_phase_goes_on_there_and_ends_the_same(
    finished_run, tmp_path
):
    config, expected, *_ = finished_run
    config = dataclasses.replace(
        config, output_dir="", checkpoint_dir=str(tmp_path / "saved")
    )
    masked, classifier = "masked_model", "classifier"
    kills = [(masked, 1), (classifier, 1), None]
    trained, begun = [], []
    for kill in kills:
        keras.utils.set_random_seed(99)
        interrupter = Interrupter(kill)
        with observing(Observer([interrupter])):
            if kill is None:
                metrics = recipe.train(config)
            else:
                with pytest.raises(KeyboardInterrupt):
                    recipe.train(config)
        trained.append(interrupter.trained)
        begun.append(interrupter.begun)
    assert trained == [[masked], [masked, classifier], [classifier]]
    assert begun == [
        [(masked, 0), (masked, 1)],
        [(masked, 1), (classifier, 0), (classifier, 1)],
        [(classifier, 1)],
    ]
    assert metrics == expected


@pytest.mark.slow
def test_the_phases_leave_their_logs_side_by_side(finished_run):
    _, metrics, _, output = finished_run
    for folder, epochs in ((output, 2), (output / "pretraining", 2)):
        rows = (folder / "metrics.jsonl").read_text().splitlines()
        assert len(rows) == epochs
        assert json.loads((folder / "run.json").read_text())["exit_reason"]
    last = json.loads(rows[-1])
    assert "val_masked_accuracy" in last
    rows = (output / "metrics.jsonl").read_text().splitlines()
    assert json.loads(rows[-1])["val_accuracy"] == metrics["accuracy"]


@pytest.mark.slow
def test_a_run_shows_what_was_predicted_and_filled_in(finished_run):
    _, _, printed, output = finished_run
    for name, mark in (
        ("predictions.txt", "predicted"),
        ("filled_in.txt", "|"),
    ):
        texts = (output / name).read_text().split(f"\n{'=' * 80}\n")
        assert len(texts) == 20
        assert all(mark in text for text in texts)
        assert " ".join(texts[0].split()) in printed


@pytest.mark.slow
def test_a_run_leaves_a_model_and_its_subwords(finished_run, config):
    _, metrics, _, output = finished_run
    model = tfamp.load_model(output / "model.keras")
    loaded = recipe._load(config)
    batches = loaded.eval_batches()
    results = tfamp.evaluate(model, batches)
    assert results["accuracy"] == pytest.approx(metrics["accuracy"])
    tokenizer = make_tokenizer(str(output / "subwords.model"))
    phrase = "the loop ends"
    assert tokenizer.encode(phrase) == loaded.tokenizer.encode(phrase)


def test_a_failure_in_pretraining_is_in_its_record(tmp_path):
    def write(name, start_time):
        record = {
            "schema": "tfamp.run/1",
            "start_time": start_time,
            "exit_reason": None,
        }
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(json.dumps(record))

    def train(config):
        write("pretraining", utc_now())
        write("earlier", "2000-01-01T00:00:00Z")
        raise tfamp.InputError("a bad batch")

    with pytest.raises(SystemExit):
        tfamp.recipe.main(
            train, recipe.Config, ["", f"--output_dir={tmp_path}"]
        )

    def reason(name):
        record = json.loads((tmp_path / name / "run.json").read_text())
        return record["exit_reason"]

    assert reason("pretraining") == "a bad batch"
    assert reason("earlier") is None


def padded(tokens, length, padding):
    return tf.pad(
        tokens, [[0, 0], [0, length - tokens.shape[1]]], constant_values=padding
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "precision", mostly_slow(PRECISIONS, always=["mixed_float16"])
)
def test_padding_does_not_influence_the_result(config, precision):
    tfamp.set_precision(precision)
    loaded = recipe._load(config)
    model = recipe.build_model(config)
    longer_config = dataclasses.replace(config, sequence_length=40)
    longer = recipe.build_model(longer_config)
    longer.set_weights(model.get_weights())
    tokens = tf.constant(
        np.random.default_rng(0).integers(0, 512, [8, 11], dtype=np.int32)
    )
    logits = model(padded(tokens, 16, loaded.padding))
    np.testing.assert_allclose(
        logits, longer(padded(tokens, 40, loaded.padding)), rtol=1e-5, atol=1e-6
    )
    # Another token in its place would.
    other = model(padded(tokens, 16, 7)).numpy()
    assert np.all(np.max(np.abs(other - logits), axis=1) > 1e-3)


def test_pretrained_weights_reach_the_classifier_all_but_its_head(config):
    source, target = (
        recipe.build_masked_model(config),
        recipe.build_model(config),
    )
    before = {v.path: v.numpy() for v in target.trainable_variables}
    for variable in source.trainable_variables:
        variable.assign(variable + 1.0)
    recipe.copy_encoder(source, target)
    expected = {v.path: v.numpy() for v in source.trainable_variables}
    own = [path for path in before if path.startswith("logits/")]
    assert len(own) == 2
    for variable in target.trainable_variables:
        path = variable.path
        value = before[path] if path in own else expected[path]
        np.testing.assert_array_equal(variable, value)


CLASSIFIER = recipe.build_model, recipe.make_datasets
MASKED_MODEL = recipe.build_masked_model, recipe.make_masked_datasets


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "phase"),
    mostly_slow(
        [("mixed_bfloat16", MASKED_MODEL), ("mixed_float16", CLASSIFIER)],
        always=[("mixed_bfloat16", MASKED_MODEL)],
    ),
)
def test_products_are_in_16_bits_and_softmax_and_loss_in_float32(
    config, precision, phase
):
    tfamp.set_precision(precision)
    build, make = phase
    model = build(dataclasses.replace(config, qk_norm=True))
    x, y, *_ = next(iter(make(config)[0]))
    steps = matmul_dtypes.training_steps(model, model.loss, x, y)

    def dtypes(kind):
        return {step.dtype for step in steps if step.kind == kind}

    # The scores of a few classes are multiplied in float32, those of a
    # vocabulary in 16 bits.
    head = {"float32"} if phase is CLASSIFIER else set()
    assert dtypes("product") == {precision.removeprefix("mixed_")} | head
    assert dtypes("softmax or loss") == {"float32"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("phase", "qk_norm"),
    mostly_slow(
        [(CLASSIFIER, True), (MASKED_MODEL, False)], always=[(CLASSIFIER, True)]
    ),
)
def test_lint_finds_nothing(config, phase, qk_norm):
    tfamp.set_precision("mixed_float16")
    build, make = phase
    config = dataclasses.replace(config, qk_norm=qk_norm)
    assert tfamp.lint(build(config), next(iter(make(config)[0]))) == []


MASKING = Masking(share=0.25, mask=300, num_tokens=256, spared=(301, 0))


def texts_of(lengths, width=80):
    """Random bytes with a separator behind, and padding."""
    tokens = np.full([len(lengths), width], 301, np.int32)
    random = np.random.default_rng(0)
    for row, length in zip(tokens, lengths, strict=True):
        row[: length - 1] = random.integers(1, 256, length - 1)
        row[length - 1] = 0
    return tf.constant(tokens)


def test_a_share_of_each_text_is_chosen_and_most_of_it_hidden():
    lengths = [81 - i % 41 for i in range(400)]
    tokens = texts_of(lengths, 81)
    (hidden, positions), targets, weights = mask_tokens(tokens, [3, 4], MASKING)
    tokens, hidden = tokens.numpy(), hidden.numpy()
    is_chosen = weights.numpy() > 0
    expected = np.round(0.25 * (np.array(lengths) - 1))
    np.testing.assert_array_equal(is_chosen.sum(axis=1), expected)
    assert positions.shape == (400, 20)

    rows = np.nonzero(is_chosen)[0]
    places = positions.numpy()[is_chosen]
    true = tokens[rows, places]
    assert len(set(zip(rows, places, strict=True))) == len(rows)
    assert np.all((true > 0) & (true < 256))
    np.testing.assert_array_equal(targets.numpy()[is_chosen], true)
    # All over the text.
    relative = places / (np.array(lengths)[rows] - 1)
    np.testing.assert_allclose(
        np.quantile(relative, [0.25, 0.75]), [0.25, 0.75], atol=0.03
    )

    became = hidden[rows, places]
    shares = [np.mean(became == 300), np.mean(became == true)]
    np.testing.assert_allclose(shares, [0.8, 0.1], atol=0.02)
    assert len(np.unique(became[(became != 300) & (became != true)])) > 200
    hidden[rows, places] = true
    np.testing.assert_array_equal(hidden, tokens)


def test_the_weighted_loss_is_the_mean_over_the_chosen_of_the_whole_batch():
    tokens = texts_of([80, 9, 2, 1])
    (_, _), _, weights = mask_tokens(tokens, [0, 0], MASKING)
    # 20, 2 and 1 of 20 places, and none of a text that is only its end.
    count = np.count_nonzero(weights, axis=1)
    np.testing.assert_array_equal(count, [20, 2, 1, 0])
    np.testing.assert_allclose(weights.numpy().max(), 80 / 23, rtol=1e-6)
    losses = np.random.default_rng(0).random(weights.shape)
    # Each of two replicas divides by its own number of weights.
    halves = [np.mean((losses * weights)[i : i + 2]) for i in (0, 2)]
    expected = losses[weights.numpy() > 0].mean()
    np.testing.assert_allclose(np.mean(halves), expected, rtol=1e-6)


def test_hidden_tokens_are_as_many_as_their_share_and_spare_the_spared():
    tokens = texts_of([60] * 200)
    hidden = hide_tokens(tokens, [1, 2], MASKING).numpy()
    is_hidden = hidden == 300
    np.testing.assert_array_equal(
        hidden[~is_hidden], tokens.numpy()[~is_hidden]
    )
    assert not is_hidden[:, 59:].any()
    np.testing.assert_allclose(is_hidden[:, :59].mean(), 0.25, atol=0.02)


@pytest.mark.slow
def test_masks_follow_seed_and_epoch_and_those_of_evaluation_neither(config):
    def epochs(seed):
        train, evaluation = recipe.make_masked_datasets(
            dataclasses.replace(config, seed=seed)
        )
        inputs = [next(iter(train))[0][0].numpy() for _ in range(2)]
        return inputs, next(iter(evaluation))[0][0].numpy()

    (first, first_eval), (again, _), (other, other_eval) = map(
        epochs, (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first[0], first[1])
    assert not np.array_equal(first[0], other[0])
    np.testing.assert_array_equal(first_eval, other_eval)


def strings(data, split):
    return [
        (texts[0].decode(), int(label))
        for texts, label in data.read_labelled(split).as_numpy_iterator()
    ]


def test_passages_of_train_and_validation_are_other_parts(passages_dir):
    data = text.load("passages", passages_dir)
    train, validation = strings(data, "train"), strings(data, "validation")
    assert data.num_classes > 10
    for split in (train, validation):
        assert {label for _, label in split} == set(range(data.num_classes))
    counts = [len(passages._WORD.findall(t)) for t, _ in train + validation]
    assert max(counts) == 48
    assert np.mean(np.equal(counts, 48)) > 0.95
    seen = " ".join(" ".join(t.split()) for t, _ in train)
    assert not [t for t, _ in validation if " ".join(t.split()) in seen]
    assert 0.2 < len(validation) / len(train) < 0.5


def test_repeated_paragraphs_are_left_out_and_groups_shared_out():
    twice = "this paragraph stands in two sections, and tells of neither"
    words = [f"word{i}" for i in range(48 * 17)]
    sections = {"a": f"{twice}\n\n{' '.join(words)}", "b": twice}
    train, validation = passages.split_passages(sections)
    assert {name for name, _ in train + validation} == {"a"}
    # Groups of four passages; the third one of four is for validation.
    assert " ".join(t for _, t in validation).split() == words[8 * 48 : 12 * 48]
    assert [len(t.split()) for _, t in train] == [48] * 13


def test_passages_are_cut_behind_words_and_runs_of_signs():
    assert passages.cut("one, two.\n\n  f() ---- x", 3) == [
        "one, two",
        ".\n\n  f()",
        "---- x",
    ]


def test_subwords_are_made_anew_the_same_and_know_no_case():
    texts = ["The loop\nends. " * 9, "the LOOP begins. " * 9]
    model = subwords.train(texts, 285)
    assert model == subwords.train(texts, 285)
    tokenizer = subwords.load(model)
    assert tokenizer.size == 285
    assert tokenizer.encode("THE LOOP") == tokenizer.encode("the loop")
    assert len(tokenizer.encode("the loop")) < 8
    assert tokenizer.decode(tokenizer.encode("zebra €")) == "zebra €"


def one_batch(config):
    return next(iter(recipe.make_datasets(config)[1]))


@pytest.mark.slow
def test_texts_end_with_a_separator_and_are_padded_or_cut(config):
    config = dataclasses.replace(config, tokenizer="bytes", sequence_length=400)
    loaded = recipe._load(config)
    tokens, labels = one_batch(config)
    assert tokens.dtype == labels.dtype == tf.int32
    stored = strings(text.load("passages", config.data_dir), "validation")
    for row, label, (expected, true) in zip(
        tokens.numpy(), labels.numpy(), stored, strict=False
    ):
        codes = [*expected.encode(), 0][:400]
        assert row.tolist() == codes + [loaded.padding] * (400 - len(codes))
        assert label == true


def test_a_share_of_the_labels_is_from_all_over_the_text():
    texts = [np.full([i + 1], i, np.int32) for i in range(10)]
    split = labelled_text._make_split(texts, np.arange(10))
    few = split.share(0.3)
    np.testing.assert_array_equal(few.labels, [3, 6, 9])
    np.testing.assert_array_equal(few.row_splits, [0, 4, 11, 21])
    np.testing.assert_array_equal(np.unique(few.tokens), [3, 6, 9])
    assert len(split.share(0.01).labels) == 0
    np.testing.assert_array_equal(split.share(1.0).tokens, split.tokens)


@pytest.mark.slow
def test_few_labels_leave_all_texts_to_pretrain_on(config):
    config = dataclasses.replace(config, batch_size=10, label_share=0.1)
    loaded = recipe._load(config)
    assert loaded.steps(loaded.training) == 9
    assert loaded.steps(loaded.pretraining) == 97


def test_the_baselines_are_the_largest_class_and_token_frequencies(config):
    def split(texts, labels):
        tokens = np.array(list("".join(texts).encode()), np.int32)
        ends = np.cumsum([0, *map(len, texts)], dtype=np.int64)
        return labelled_text.Split(tokens, ends, np.array(labels, np.int32))

    train = split(["aab", "aba", "ab", "cc"], [0, 0, 0, 1])
    evaluation = split(["ccc", "c", "a", "cc"], [1, 1, 0, 0])
    data = labelled_text.LabelledText(
        ByteTokenizer(), b"", ("x", "y"), None, train, train, evaluation
    )
    assert data.majority_accuracy() == 0.5
    assert data.naive_bayes_accuracy() == 0.75


def test_shown_texts_name_labels_and_mark_what_was_chosen():
    data = labelled_text.LabelledText(
        ByteTokenizer(), b"", ("good", "bad"), None, None, None, None
    )
    tokens = np.array([[*b"one\0two\0", 256]], np.int32)
    (shown,) = shown_text.label_texts(
        data, tokens, np.array([1]), np.array([[0.75, 0.25]])
    )
    first, *rest = shown.splitlines()
    assert first == "wrong: bad, predicted good with probability 0.75"
    assert rest == ["", "one", "two"]
    (shown,) = shown_text.mark_texts(
        data,
        tokens,
        positions=np.array([[5, 1, 8]]),
        targets=np.array([[ord("w"), ord("n"), 0]]),
        weights=np.array([[1.0, 1.0, 0.0]]),
        found=np.array([[ord("w"), ord("x"), ord("y")]]),
    )
    assert shown == "o[n|x]e\nt[w|w]o"


PUBLISHED = {
    "imdb_reviews": ["train", "test", "unsupervised"],
    "glue/sst2": ["train", "validation", "test"],
    "glue/mrpc": ["train", "validation", "test"],
}


@pytest.fixture(scope="module")
def published_dir(tmp_path_factory):
    """What tfds knows of the published sets, without their examples."""
    folder = str(tmp_path_factory.mktemp("published"))
    for name, splits in PUBLISHED.items():
        write_metadata(name, folder, splits)
    return folder


@pytest.mark.parametrize(
    ("name", "num_texts"),
    first_always([("imdb_reviews", 1), ("glue/sst2", 1), ("glue/mrpc", 2)], 1),
)
def test_published_data_sets_become_batches_of_both_phases(
    config, published_dir, name, num_texts
):
    config = dataclasses.replace(
        config,
        dataset=name,
        data_dir=published_dir,
        tokenizer="bytes",
        truncate=False,
        sequence_length=128,
        batch_size=6,
        pretrain_split="unsupervised" if name == "imdb_reviews" else "",
    )
    with tfds.testing.mock_data(num_examples=EXAMPLES, data_dir=published_dir):
        tokens, labels = one_batch(config)
        ends = np.count_nonzero(tokens == 0, axis=1)
        np.testing.assert_array_equal(ends, [num_texts] * 6)
        assert set(labels.numpy()) <= {0, 1}
        assert recipe.build_model(config).output_shape == (None, 2)
        (hidden, positions), targets, weights = next(
            iter(recipe.make_masked_datasets(config)[0])
        )
        assert hidden.shape == (6, 128)
        assert positions.shape == targets.shape == weights.shape == (6, 38)


def test_withheld_labels_are_bad_input(config, published_dir):
    def as_dataset(self, *args, **kwargs):
        return tf.data.Dataset.range(EXAMPLES).map(
            lambda i: {"sentence": "fine", "label": tf.cast(-1, tf.int64)}
        )

    config = dataclasses.replace(
        config, dataset="glue/sst2", data_dir=published_dir
    )
    with (
        tfds.testing.mock_data(
            as_dataset_fn=as_dataset, data_dir=published_dir
        ),
        pytest.raises(
            tfamp.InputError, match="label -1, and its classes are 0"
        ),
    ):
        recipe.make_datasets(config)


def test_an_empty_split_is_bad_input(config, tmp_path):
    splits = PUBLISHED["glue/sst2"]
    write_metadata("glue/sst2", str(tmp_path), splits, examples=0)
    config = dataclasses.replace(
        config, dataset="glue/sst2", data_dir=str(tmp_path)
    )
    with pytest.raises(tfamp.InputError, match=r"'train' of .* is empty"):
        recipe.make_datasets(config)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"truncate": False},
            r"sequence_length=16 is less than the \d+ tokens of the longest",
        ),
        ({"dataset": "passage"}, "did you mean 'passages'"),
        ({"dataset": "topics"}, "'topics' has no class label"),
        ({"dataset": "digits"}, "'digits' has no text"),
        ({"eval_split": "test"}, "has no split 'test'"),
        ({"pretrain_split": "more"}, "has no split 'more'"),
        ({"vocabulary_size": 99_999}, "vocabulary_size=99999 does not suit"),
        ({"tokenizer": "no.model"}, "There is no tokenizer"),
        ({"label_share": 0.0}, r"batch_size=400 exceeds the 0 texts"),
        ({"label_share": 1.5}, "label_share=1.5; expected 1 or less"),
        ({"batch_size": 5000}, r"batch_size=5000 exceeds the \d+ texts"),
        ({"width": 18}, "width=18 is not divisible by num_heads=2"),
        ({"masked_share": 1.0}, "masked_share=1"),
        ({"sequence_length": 0}, "sequence_length=0"),
    ],
)
def test_bad_input_is_one_line(config, digits_dir, topics_dir, flags, message):
    folders = {"digits": digits_dir, "topics": topics_dir}
    folder = folders.get(flags.get("dataset"), config.data_dir)
    with pytest.raises(tfamp.InputError, match=message) as caught:
        recipe.make_datasets(
            dataclasses.replace(config, data_dir=folder, **flags)
        )
    assert "\n" not in str(caught.value)
