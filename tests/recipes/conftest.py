"""Data sets on disk that the tests of the recipes share."""

import numpy as np
import pytest

from recipes.data import digits, loading


@pytest.fixture(scope="session")
def digits_dir(tmp_path_factory):
    """A folder with the prepared digits."""
    folder = tmp_path_factory.mktemp("data")
    loading.load("digits", str(folder))
    return str(folder)


@pytest.fixture(scope="session")
def few_digits_dir(tmp_path_factory):
    """A folder with 64 of the digits to train on and 32 to test on."""
    folder = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            digits,
            "split_by_class",
            lambda labels: (np.arange(64), np.arange(64, 96)),
        )
        loading.load("digits", str(folder))
    return str(folder)


@pytest.fixture(scope="session")
def topics_dir(tmp_path_factory):
    """A folder with the prepared documentation text."""
    folder = tmp_path_factory.mktemp("data")
    loading.prepare("topics", str(folder))
    return str(folder)
