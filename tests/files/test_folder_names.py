"""A folder for logs is a path of any kind, or told in one line."""

import os
import pathlib

import pytest

import tfamp
from tfamp.files.output import output_folder


@pytest.mark.parametrize("kind", [str, os.fsencode, pathlib.Path])
@pytest.mark.parametrize("name", ["a b", "[x]*?", "é%s\n"])
def test_any_kind_of_path_is_one(kind, name, tmp_path):
    assert output_folder(kind(str(tmp_path / name))) == tmp_path / name


@pytest.mark.parametrize("path", ["", b"", "a\0b", None, 5, ["a"], "s3://b/x"])
def test_what_is_no_path_is_refused_in_one_line(path):
    with pytest.raises(tfamp.InputError, match="output_dir") as raised:
        output_folder(path)
    assert "\n" not in str(raised.value)
