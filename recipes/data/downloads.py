"""What to do where a data set cannot be downloaded, said in one line."""

import os

import requests
import tensorflow_datasets as tfds

from tfamp.errors import InputError

_CONNECT_TIMEOUT_SECONDS = 10


def check_can_be_had(name: str, builder: tfds.core.DatasetBuilder) -> None:
    """Fails at once where tfds would fail, or retry for minutes.

    Args:
      name: of the data set, as the user wrote it.
      builder: of the data set, which is not prepared yet.

    Raises:
      InputError: its files must be fetched by hand and are not there, or
        nothing reaches their host.
    """
    instructions = builder.MANUAL_DOWNLOAD_INSTRUCTIONS
    if instructions:
        folder = _manual_folder(builder)
        if os.path.isdir(folder) and os.listdir(folder):
            return  # tfds knows whether they are the right files.
        raise InputError(
            f"Data set {name!r} must be downloaded by hand; put the files into "
            f"{folder}: {one_line(instructions)}"
        )
    if os.path.isdir(os.path.join(_downloads(builder), builder.name)):
        return  # What an earlier run downloaded may suffice.
    infos = builder.url_infos or {}
    urls = [url for url in infos if url.startswith("http")]
    if not urls or not _missing_files(builder):
        return
    try:
        requests.head(urls[0], timeout=_CONNECT_TIMEOUT_SECONDS)
    except requests.ConnectionError as error:
        raise InputError(
            f"Data set {name!r} cannot be downloaded here: no connection to "
            f"{urls[0]}. {advice(builder, error)}"
        ) from error
    except requests.RequestException:
        return  # Slow or odd answers: tfds may still succeed.


def advice(builder: tfds.core.DatasetBuilder, error: Exception) -> str:
    """What the user can do after preparing a data set has failed.

    Args:
      builder: of the data set.
      error: what preparing it raised.
    """
    choices = (
        "Point --data_dir to a writable folder or to one that holds a prepared "
        "copy"
    )
    folder = _manual_folder(builder)
    if builder.MANUAL_DOWNLOAD_INSTRUCTIONS:
        instructions = one_line(builder.MANUAL_DOWNLOAD_INSTRUCTIONS)
        return f"{choices}, or mend the files in {folder}: {instructions}"
    # An OSError that is not of the network is one of the disk.
    is_download = not isinstance(error, OSError) or isinstance(
        error, requests.RequestException
    )
    if is_download and _missing_files(builder):
        return (
            f"{choices}, or fetch its files in another way and put them into "
            f"{folder}: {', '.join(_missing_files(builder))}."
        )
    return f"{choices}."


def one_line(text: object) -> str:
    """The text on one line that ends as a sentence does."""
    line = " ".join(str(text).split())
    return line if line.endswith(".") else line + "."


def _missing_files(builder) -> list[str]:
    """Those of its files that are not where tfds looks before it downloads."""
    infos = (builder.url_infos or {}).values()
    names = [info.filename for info in infos if info.filename]
    folder = _manual_folder(builder)
    return [n for n in names if not os.path.exists(os.path.join(folder, n))]


def _manual_folder(builder) -> str:
    return os.path.join(_downloads(builder), "manual")


def _downloads(builder) -> str:
    return os.path.join(builder.data_dir_root, "downloads")
