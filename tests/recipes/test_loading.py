import os
import random
import subprocess
import sys

import pytest
import requests
import tensorflow as tf
import tensorflow_datasets as tfds

from recipes.data import loading
from tests.recipes.published_data import EXAMPLES, write_metadata
from tfamp import InputError


@pytest.mark.parametrize(
    ("name", "splits", "eval_split", "shape", "num_classes"),
    [
        ("mnist", ["train", "test"], "test", (28, 28, 1), 10),
        ("cifar10", ["train", "test"], "test", (32, 32, 3), 10),
        (
            "imagenet2012",
            ["train", "test", "validation"],
            "validation",
            (None, None, 3),
            1000,
        ),
    ],
)
def test_published_data_sets_yield_pairs_of_image_and_label(
    tmp_path, name, splits, eval_split, shape, num_classes
):
    write_metadata(name, str(tmp_path), splits)
    with tfds.testing.mock_data(num_examples=EXAMPLES, data_dir=str(tmp_path)):
        data = loading.load(name, str(tmp_path))
        assert data.eval_split == eval_split
        assert data.image_shape == shape
        assert data.num_classes == num_classes
        assert data.sizes_vary == (shape[0] is None)
        assert data.num_examples("train") == EXAMPLES
        pairs = list(data.read("train"))
    assert len(pairs) == EXAMPLES
    for encoded, label in pairs:
        image = data.decode(encoded)
        assert image.dtype == tf.uint8
        assert image.shape[-1] == shape[-1]
        assert 0 <= label < num_classes


def test_preparing_twice_leaves_the_files_of_the_first_time(tmp_path):
    def stamps():
        return {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}

    loading.load("digits", str(tmp_path))
    first = stamps()
    loading.load("digits", str(tmp_path))
    assert stamps() == first


def test_preparing_prints_nothing_and_leaves_pythons_random_state(
    tmp_path, capfd
):
    random.seed(5)
    state = random.getstate()
    loading.load("digits", str(tmp_path))
    assert random.getstate() == state
    assert capfd.readouterr().out == ""


def test_seeded_processes_draw_different_names_of_temporary_folders():
    draws = []
    for _ in range(2):
        random.seed(0)
        with loading._unseeded_random():
            draws.append(random.random())
    assert draws[0] != draws[1]


@pytest.mark.slow
def test_seeded_processes_prepare_one_folder_at_the_same_time(tmp_path):
    program = (
        "import random, sys; from recipes.data import loading\n"
        "sys.stdin.readline(); random.seed(0)\n"
        "data = loading.load('digits', sys.argv[1])\n"
        "print(len(list(data.read('train'))))"
    )
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for worker in workers:
        worker.stdin.write("go\n")
        worker.stdin.flush()
    for worker in workers:
        output, errors = worker.communicate(timeout=120)
        assert worker.returncode == 0, errors
        assert output == "1437\n"
    assert [p.name for p in (tmp_path / "digits").iterdir()] == ["1.0.0"]


def message_of(name, data_dir, **arguments):
    with pytest.raises(InputError) as error:
        loading.load(name, str(data_dir), **arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_an_unknown_name_is_answered_with_names_close_to_it(tmp_path):
    message = message_of("cifar1O", tmp_path)
    assert "'cifar1O'" in message
    assert "'cifar10'" in message
    assert "did you mean 'digits'" in message_of("digit", tmp_path)
    message_of("", tmp_path)


def test_an_unknown_config_is_answered_with_the_configs(tmp_path):
    message = message_of("lsun/bathroom", tmp_path)
    assert "'bathroom'" in message
    assert "'bedroom'" in message


def test_an_unknown_version_is_answered_with_the_versions(tmp_path):
    assert "3.0.1" in message_of("mnist:9.9.9", tmp_path)


def test_a_missing_split_is_answered_with_the_splits(digits_dir):
    message = message_of("digits", digits_dir, eval_split="validation")
    assert "'validation'" in message
    assert "'train'" in message
    assert "'test'" in message


def test_a_data_set_without_images_is_answered_with_its_features(tmp_path):
    write_metadata("imdb_reviews", str(tmp_path), ["train", "test"])
    message = message_of("imdb_reviews", tmp_path)
    assert "'text'" in message


def test_files_that_must_be_fetched_by_hand_are_named_with_their_place(
    tmp_path,
):
    message = message_of("imagenet2012", tmp_path)
    assert "ILSVRC2012_img_train.tar" in message
    assert os.path.join(tmp_path, "downloads", "manual") in message


def test_wrong_files_in_the_place_of_those_fetched_by_hand_are_told(tmp_path):
    folder = tmp_path / "downloads" / "manual"
    folder.mkdir(parents=True)
    assert "by hand; put the files" in message_of("imagenet2012", tmp_path)
    (folder / "img_align_celeba.zip").touch()
    message = message_of("imagenet2012", tmp_path)
    assert "cannot be prepared" in message
    assert "mend the files in" in message
    assert "ILSVRC2012_img_train.tar" in message


def test_images_without_labels_are_read_where_none_are_needed(tmp_path):
    write_metadata("celeb_a", str(tmp_path), ["train", "validation", "test"])
    assert "no image with a class label" in message_of("celeb_a", tmp_path)
    with tfds.testing.mock_data(num_examples=EXAMPLES, data_dir=str(tmp_path)):
        data = loading.load("celeb_a", str(tmp_path), needs_labels=False)
        pairs = list(data.read("train"))
    assert (data.num_classes, data.label_key) == (0, None)
    assert data.eval_split == "validation"
    assert len(pairs) == EXAMPLES
    for encoded, label in pairs:
        assert data.decode(encoded).shape == (218, 178, 3)
        assert label == 0


def test_a_refused_download_says_which_files_to_put_where(
    tmp_path, monkeypatch
):
    """As of drives that refuse what is asked for too often."""
    monkeypatch.setattr(requests, "head", lambda *args, **kwargs: None)

    def refused(*args, **kwargs):
        raise ValueError("Failed to obtain\nconfirmation link")

    monkeypatch.setattr(
        tfds.core.DatasetBuilder, "download_and_prepare", refused
    )
    folder = tmp_path / "downloads" / "manual"
    message = message_of("celeb_a", tmp_path, needs_labels=False)
    assert "obtain confirmation link" in message
    assert f"put them into {folder}: " in message
    for name in ("img_align_celeba.zip", "identity_CelebA.txt"):
        assert name in message
    # A file that is there already need not be fetched.
    folder.mkdir(parents=True)
    (folder / "img_align_celeba.zip").touch()
    message = message_of("celeb_a", tmp_path, needs_labels=False)
    assert "img_align_celeba.zip" not in message
    assert "identity_CelebA.txt" in message


def test_files_that_are_all_there_need_no_network(tmp_path, monkeypatch):
    def unreachable(*args, **kwargs):
        raise requests.ConnectionError("no route")

    prepared = []
    monkeypatch.setattr(requests, "head", unreachable)
    monkeypatch.setattr(
        tfds.core.DatasetBuilder,
        "download_and_prepare",
        lambda builder: prepared.append(builder.name),
    )
    folder = tmp_path / "downloads" / "manual"
    folder.mkdir(parents=True)
    (folder / "cifar-10-binary.tar.gz").touch()
    loading.prepare("cifar10", str(tmp_path))
    assert prepared == ["cifar10"]
    assert "no connection" in message_of("mnist", tmp_path)


def test_no_network_is_said_before_tfds_retries_for_minutes(
    tmp_path, monkeypatch
):
    def unreachable(*args, **kwargs):
        raise requests.ConnectionError("no route")

    monkeypatch.setattr(requests, "head", unreachable)
    message = message_of("mnist", tmp_path)
    assert "cannot be downloaded here" in message
    assert "--data_dir" in message


def test_a_download_that_fails_is_one_line_and_leaves_no_data_set(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(requests, "head", lambda *args, **kwargs: None)

    def broken(*args, **kwargs):
        raise requests.ConnectionError("broken\npipe")

    monkeypatch.setattr(
        tfds.core.DatasetBuilder, "download_and_prepare", broken
    )
    assert "broken pipe" in message_of("mnist", tmp_path)
    assert not (tmp_path / "mnist").exists()


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    assert str(file) in message_of("digits", file)
