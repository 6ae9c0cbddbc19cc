"""Data sets on disk that the tests of the recipes share."""

import pytest

from recipes.data import loading


@pytest.fixture(scope="session")
def digits_dir(tmp_path_factory):
    """A folder with the prepared digits."""
    folder = tmp_path_factory.mktemp("data")
    loading.load("digits", str(folder))
    return str(folder)


@pytest.fixture(scope="session")
def topics_dir(tmp_path_factory):
    """A folder with the prepared documentation text."""
    folder = tmp_path_factory.mktemp("data")
    loading.prepare("topics", str(folder))
    return str(folder)
