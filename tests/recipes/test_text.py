"""Text data: the embedded documentation, published sets, tokens, batches."""

import dataclasses
import io
import math
from pydoc_data.topics import topics as sections

import keras
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

from recipes.data import corpus, text, tokens, topics
from tests.conftest import first_always
from tests.recipes.published_data import EXAMPLES, write_metadata
from tfamp import InputError

PUBLISHED = {
    "tiny_shakespeare": ["train", "validation", "test"],
    "wiki40b/en": ["train", "validation", "test"],
    "lm1b": ["train", "test"],
    "imdb_reviews": ["train", "test", "unsupervised"],
    "glue/sst2": ["train", "validation", "test"],
    "glue/mrpc": ["train", "validation", "test"],
}


def strings(dataset):
    return [value.decode() for value in dataset.as_numpy_iterator()]


def read_all(data):
    return {s: strings(data.read(s)) for s in ("train", "validation")}


@pytest.fixture(scope="module")
def documentation(topics_dir):
    return text.load("topics", topics_dir)


def one_line(paragraph):
    return " ".join(paragraph.split())


def test_the_splits_hold_whole_sections_each_once(documentation):
    stored = read_all(documentation)
    everything = stored["train"] + stored["validation"]
    assert len(set(everything)) == len(everything)
    assert set(everything) < set(sections.values())
    share = sum(map(len, stored["validation"])) / sum(map(len, everything))
    assert 0.05 < share < 0.25


def test_no_paragraph_of_validation_stands_in_the_training_text(documentation):
    stored = read_all(documentation)
    training_text = one_line("\n\n".join(stored["train"]))
    paragraphs = [
        one_line(paragraph)
        for section in stored["validation"]
        for paragraph in section.split("\n\n")
    ]
    telling = [p for p in paragraphs if len(p) >= 40]
    assert len(telling) > 50
    assert not [p for p in telling if p in training_text]


def test_every_section_that_was_left_out_stands_in_one_that_was_kept(
    documentation,
):
    stored = read_all(documentation)
    kept = one_line("\n\n".join(stored["train"] + stored["validation"]))
    left_out = set(sections.values()) - {*stored["train"]}
    left_out -= {*stored["validation"]}
    assert left_out
    for section in left_out:
        paragraphs = [one_line(p) for p in section.split("\n\n")]
        telling = [p for p in paragraphs if len(p) >= 40]
        found = [p for p in telling if p in kept]
        assert sum(map(len, found)) >= 0.75 * sum(map(len, telling))


def test_sections_are_split_by_size_without_excerpts_and_shared_paragraphs():
    def paragraph(name, size=80):
        return f"{name} " * (size // len(f"{name} "))

    own = {f"own{i}": paragraph(f"own{i}", 900 - 90 * i) for i in range(8)}
    whole = "\n\n".join([paragraph("a"), paragraph("b"), paragraph("c")])
    excerpt = f"Heading\n\n{paragraph('a')}\n\n{paragraph('b')}"
    related = f"{paragraph('c')}\n\n{paragraph('d', 200)}"
    train, validation = topics.split_by_section(
        own | {"whole": whole, "excerpt": excerpt, "related": related}
    )
    # The third of each five by size, of those that share nothing.
    assert validation == ["own2", "own7"]
    own = [f"own{i}" for i in (0, 1, 3, 4, 5, 6)]
    assert train == [*own, "related", "whole"]


@pytest.fixture(scope="module")
def published_dir(tmp_path_factory):
    """What tfds knows of the published sets, without their examples."""
    folder = str(tmp_path_factory.mktemp("published"))
    for name, splits in PUBLISHED.items():
        write_metadata(name, folder, splits)
    return folder


@pytest.fixture
def published(published_dir):
    """Makes tfds invent the examples of the published sets."""
    with tfds.testing.mock_data(num_examples=EXAMPLES, data_dir=published_dir):
        yield published_dir


@pytest.mark.parametrize(
    ("name", "eval_split", "num_classes"),
    [
        ("tiny_shakespeare", "validation", 0),
        ("wiki40b/en", "validation", 0),
        ("lm1b", "test", 0),
        ("imdb_reviews", "test", 2),
        ("glue/sst2", "validation", 2),
        ("glue/mrpc", "validation", 2),
    ],
)
def test_published_data_sets_yield_texts_and_labels(
    published, name, eval_split, num_classes
):
    data = text.load(name, published)
    assert data.eval_split == eval_split
    assert data.num_classes == num_classes
    assert data.num_examples("train") == EXAMPLES
    texts = strings(data.read("train", seed=0))
    assert len(texts) == EXAMPLES
    assert all(texts)
    if num_classes:
        pairs = list(data.read_labelled("train").as_numpy_iterator())
        assert {label for _, label in pairs} <= set(range(num_classes))
        joined = [b"\n".join(apart).decode() for apart, _ in pairs]
        assert sorted(joined) == sorted(texts)
    else:
        with pytest.raises(InputError, match="no class label"):
            data.read_labelled("train")


@pytest.mark.parametrize(
    "name", first_always(["tiny_shakespeare", "wiki40b/en", "lm1b"], 1)
)
def test_published_texts_become_batches(published, name):
    loaded = corpus.load(name, published, "auto", "bytes", corpus.Cut(8, 2))
    for batches in (loaded.train_batches(seed=0), loaded.eval_batches()):
        inputs, targets = next(iter(batches))
        assert inputs.shape == targets.shape == (2, 8)
        assert inputs.dtype == targets.dtype == tf.int32


def test_two_texts_of_an_example_come_as_one(published):
    data = text.load("glue/mrpc", published)
    assert data.text_keys == ("sentence1", "sentence2")
    assert all("\n" in each for each in strings(data.read("train")))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("digits", "has no text; its features are 'image', 'label'"),
        ("topic", "'topics'"),
    ],
)
def test_what_is_no_text_is_answered_with_what_there_is(
    digits_dir, name, message
):
    with pytest.raises(InputError, match=message):
        text.load(name, digits_dir)


def test_an_empty_split_is_bad_input(tmp_path):
    write_metadata("lm1b", str(tmp_path), ["train", "test"], examples=0)
    with pytest.raises(InputError, match="'train' of data set 'lm1b' is empty"):
        text.load("lm1b", str(tmp_path))


def dataset_of(*texts):
    return tf.data.Dataset.from_tensor_slices(list(texts))


BYTES = tokens.ByteTokenizer()


def windows(texts, length, seed=None):
    packed = tokens.pack(texts, BYTES, length, seed)
    return [bytes(w.tolist()) for w in packed.as_numpy_iterator()]


def test_windows_are_cut_from_all_texts_laid_end_to_end():
    texts = dataset_of("ab", "c", "defg")
    # The last two of the nine bytes do not fill a window.
    assert windows(texts.take(3), 3) == [b"ab\0", b"c\0d", b"efg"]
    assert windows(texts, 7) == [b"ab\0c\0de"]


def test_more_texts_than_a_group_holds_lose_nothing():
    many = dataset_of(*["abc"] * 200)
    assert b"".join(windows(many, 8)) == b"abc\0" * 200


@pytest.mark.slow
def test_windows_begin_at_another_place_in_each_epoch():
    source = bytes(range(1, 201))
    packed = tokens.pack(dataset_of(source.decode("latin1")), BYTES, 8, seed=3)
    starts = [int(next(iter(packed))[0]) for _ in range(20)]
    assert len(set(starts)) > 4
    assert max(starts) <= 8
    again = tokens.pack(dataset_of(source.decode("latin1")), BYTES, 8, seed=3)
    assert [int(next(iter(again))[0]) for _ in range(20)] == starts


def test_bytes_are_counted_with_a_separator_a_text():
    counts = tokens.count(dataset_of("aba", "", "é"), BYTES)
    expected = dict.fromkeys([ord("b"), *"é".encode()], 1)
    expected |= {ord("a"): 2, 0: 3}
    assert {int(i): int(counts[i]) for i in counts.nonzero()[0]} == expected
    assert text.count_bytes(dataset_of("aba", "", "é")) == 5


def test_the_unigram_loss_is_that_of_the_frequencies_plus_one():
    # 3 + 1 and 0 + 1 of 5; predicted are one of the first, three of the last.
    expected = -(math.log(4 / 5) + 3 * math.log(1 / 5)) / 4
    nats = tokens.unigram_nats(np.array([3, 0]), np.array([1, 3]))
    assert nats == pytest.approx(expected)


def test_bytes_decode_to_what_was_encoded_and_never_fail():
    assert BYTES.decode(BYTES.encode("naïve ∑")) == "naïve ∑"
    assert BYTES.decode([0xC3, ord("a"), 300]) == "\ufffda"


@pytest.fixture(scope="module")
def sentencepiece_file(tmp_path_factory):
    """A subword model of the documentation; small enough to train here."""
    sentencepiece = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sections["string-methods"].splitlines()),
        model_writer=model,
        vocab_size=500,
        model_type="bpe",
        byte_fallback=True,
        num_threads=1,
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("tokenizer") / "subwords.model"
    path.write_bytes(model.getvalue())
    return str(path)


def test_subwords_are_fewer_than_bytes_and_end_each_text(sentencepiece_file):
    tokenizer = tokens.make_tokenizer(sentencepiece_file)
    assert tokenizer.size == 500
    texts = ["the string is split", "as bytes"]
    ids = tokenizer.tokenize(tf.constant(texts)).numpy()
    assert ids.dtype == np.int32
    ends = np.flatnonzero(ids == tokenizer.separator)
    assert len(ends) == 2
    assert ends[-1] == len(ids) - 1
    assert len(ids) < sum(map(len, texts))
    assert tokenizer.decode(ids[: ends[0]].tolist()) == texts[0]
    assert tokenizer.encode(texts[0]) == ids[: ends[0]].tolist()


def test_bits_per_byte_do_not_depend_on_the_tokenizer(
    topics_dir, sentencepiece_file
):
    cut = corpus.Cut(16, 4)
    subwords = corpus.load(
        "topics", topics_dir, "auto", sentencepiece_file, cut
    )
    data = subwords.data
    size = sum(len(t.encode()) for t in strings(data.read(data.eval_split)))
    assert subwords.eval_bytes == size
    # One bit a token, and more than one byte a token.
    bits = subwords.bits_per_byte(math.log(2))
    assert bits == pytest.approx(subwords.eval_counts.sum() / size)
    assert bits < 0.6


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "There is no tokenizer"), (b"text", "no SentencePiece .model")],
)
def test_a_bad_tokenizer_file_is_bad_input(tmp_path, content, message):
    pytest.importorskip("sentencepiece")
    path = tmp_path / "file.model"
    if content:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        tokens.make_tokenizer(str(path))


@pytest.fixture
def loaded(topics_dir):
    return corpus.load(
        "topics", topics_dir, "auto", "bytes", corpus.Cut(64, 128)
    )


def test_targets_are_the_tokens_after_the_inputs(loaded):
    for batches in (loaded.train_batches(seed=0), loaded.eval_batches()):
        inputs, targets = next(iter(batches))
        np.testing.assert_array_equal(inputs[:, 1:], targets[:, :-1])
        assert np.any(inputs[:, 0] != targets[:, 0])


def test_an_epoch_has_as_many_batches_as_it_says_wherever_it_begins(loaded):
    batches = loaded.train_batches(seed=0)
    stated = int(batches.cardinality())
    assert stated == loaded.steps_per_epoch > 30
    total = loaded.train_counts.sum()
    assert total / 65 / 128 - 2 < stated <= total / 65 / 128
    for _ in range(3):
        shapes = [inputs.shape for inputs, _ in batches]
        assert shapes == [(128, 64)] * stated


def test_an_epoch_is_as_long_as_the_one_that_begins_latest(loaded):
    # 25 bytes and a separator; behind 4 of them left out are 4 windows of 5.
    texts = dataset_of("a" * 25)
    packed = tokens.pack(texts, BYTES, 5, seed=0)
    lengths = {sum(1 for _ in packed) for _ in range(20)}
    assert lengths == {4, 5}
    short = dataclasses.replace(
        loaded, cut=corpus.Cut(4, 1), train_counts=tokens.count(texts, BYTES)
    )
    assert short.num_windows == 4


def test_evaluation_reads_the_split_in_order_to_its_last_window(loaded):
    data = loaded.data
    stream = "".join(t + "\0" for t in strings(data.read(data.eval_split)))
    stream = np.frombuffer(stream.encode(), np.uint8)
    inputs = np.concatenate([x for x, _ in loaded.eval_batches()])
    count = len(stream) // 65
    expected = stream[: count * 65].reshape(count, 65)[:, :-1]
    np.testing.assert_array_equal(inputs, expected)


@pytest.mark.slow
def test_training_data_repeat_with_the_seed_and_change_by_epoch(loaded):
    def epochs(seed):
        keras.utils.set_random_seed(0)
        batches = loaded.train_batches(seed)
        return [next(iter(batches))[0].numpy() for _ in range(2)]

    first, again, other = epochs(0), epochs(0), epochs(1)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first[0], first[1])
    assert not np.array_equal(first[0], other[0])


@pytest.mark.slow
def test_limited_steps_repeat_a_short_text_and_cut_a_long_one(topics_dir):
    for steps in (2, 50):
        cut = corpus.Cut(64, 128, steps_per_epoch=steps, eval_steps=1)
        limited = corpus.load("topics", topics_dir, "auto", "bytes", cut)
        assert limited.steps_per_epoch == steps
        assert sum(1 for _ in limited.train_batches(seed=0)) == steps
        assert sum(1 for _ in limited.eval_batches()) == 1


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        (corpus.Cut(200_000, 1), "split 'train' of 'topics' has 3"),
        (corpus.Cut(100_000, 1), "split 'validation' of 'topics' has"),
        (corpus.Cut(64, 100_000), "batch_size=100000 exceeds the"),
    ],
)
def test_what_the_text_is_too_short_for_is_bad_input(topics_dir, cut, message):
    with pytest.raises(InputError, match=message):
        corpus.load("topics", topics_dir, "auto", "bytes", cut)
