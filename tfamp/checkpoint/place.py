"""Where files lie: paths as users write them, links that are not followed,
and what a file system refuses, in one line.
"""

import contextlib
import errno
import os
import re
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from typing import Any

import tensorflow as tf

from tfamp.errors import InputError, SaveError

# TensorFlow takes a path to read a checkpoint from for a pattern.
_PATTERN = re.compile(r"[*?\[\]\\]")
# Of the system's reasons, those that may be gone when the job is restarted.
_PASSING = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENOENT),
    *(errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EMFILE, errno.ENFILE),
)
_LASTING_ERRORS = (
    tf.errors.FailedPreconditionError,
    tf.errors.InvalidArgumentError,
    tf.errors.PermissionDeniedError,
    tf.errors.UnimplementedError,
    tf.errors.UnauthenticatedError,
)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What TensorFlow files under errors of other kinds, and HDF5 under none.
_PASSING_TEXTS = ("no space left", "file too large", "quota exceeded")


def text_of(path: str | bytes | os.PathLike) -> str:
    """A path of any kind as text.

    Raises:
        InputError: for what is no path, or none that can be.
    """
    try:
        text = os.fsdecode(path)
    except TypeError:
        raise InputError(
            f"checkpoint_dir={path!r} is no path; pass a string or a "
            "pathlib.Path."
        ) from None
    if not text or "\0" in text:
        raise InputError(
            f"checkpoint_dir={text!r} names no directory; pass the path of "
            "one, without null characters."
        )
    return text


def is_local(path: str) -> bool:
    return "://" not in path


def is_link(path: str) -> bool:
    return is_local(path) and os.path.islink(path)


def remove(path: str) -> None:
    """Removes a file, or a folder with all that is in it, or a link only."""
    if not is_local(path):
        is_folder = tf.io.gfile.isdir(path)
        (tf.io.gfile.rmtree if is_folder else tf.io.gfile.remove)(path)
    elif os.path.isdir(path) and not os.path.islink(path):
        # TensorFlow's own goes through links that lie in there.
        shutil.rmtree(path)
    else:
        os.remove(path)


def write_text(path: str, text: str) -> None:
    """Writes a file anew; a link of that name goes, and not its target."""
    if is_link(path):
        os.remove(path)
    with tf.io.gfile.GFile(path, "w") as file:
        file.write(text)


class Alias:
    """A directory under a name that TensorFlow does not take for a pattern.

    Attributes:
        path: the directory itself where its name is plain, else a link to it.

    Raises:
        InputError: for a pattern on a file system that has no links.
    """

    def __init__(self, directory: str):
        self._directory = self.path = directory
        if not _PATTERN.search(directory):
            return
        if not is_local(directory):
            raise InputError(
                f"checkpoint_dir={directory!r} holds one of *?[]\\, which "
                "TensorFlow takes for a pattern there; choose another name."
            )
        folder = tempfile.mkdtemp(prefix="tfamp-")
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self.path = os.path.join(folder, "checkpoints")
        os.symlink(os.path.abspath(directory), self.path)

    def shown(self, text: str) -> str:
        """A message with the directory's own name."""
        return text.replace(self.path, self._directory)


@contextlib.contextmanager
def told_in_one_line(directory: str, *, begins: bool = False) -> Iterator[None]:
    """Says what a file system refuses, without TensorFlow's innards.

    Args:
        directory: where the checkpoints are.
        begins: whether nothing was written there yet: what is missing then
            was never there.

    Raises:
        SaveError: for what may be otherwise when the job is restarted.
        InputError: for what will not.
    """
    try:
        yield
    except (tf.errors.OpError, OSError) as error:
        reason, may_pass = _reason(error)
        is_missing = isinstance(
            error, (FileNotFoundError, tf.errors.NotFoundError)
        )
        may_pass = may_pass and not (begins and is_missing)
        kind: Any = SaveError if may_pass else InputError
        raise kind(
            f"Cannot save checkpoints in {directory}: {reason}."
        ) from None


@contextlib.contextmanager
def full_disks_told() -> Iterator[None]:
    """Says in one line that a callback's file found no room.

    Raises:
        SaveError: instead of the system's error.
    """
    try:
        yield
    except (OSError, RuntimeError, tf.errors.OpError) as error:
        text = str(error).lower()
        name = ""
        if isinstance(error, OSError) and error.errno in _FULL:
            reason = os.strerror(error.errno)
            name = f" {error.filename}" if error.filename else ""
        else:
            found = [each for each in _PASSING_TEXTS if each in text]
            if isinstance(error, SaveError) or not found:
                raise
            reason = found[0].capitalize()
        raise SaveError(f"A file{name} cannot be written: {reason}.") from None


def _reason(error: tf.errors.OpError | OSError) -> tuple[str, bool]:
    if isinstance(error, OSError):
        return f"{error.strerror or error}", error.errno in _PASSING
    text = re.sub(r"\[Op:\w+\].*|{{.*?}}", "", error.message or "")
    line = text.strip().partition("\n")[0].strip()
    # TensorFlow puts the system's own words last: "PATH; No such file".
    reason = line.rpartition("; ")[2].rstrip(". ") or type(error).__name__
    may_pass = any(each in text.lower() for each in _PASSING_TEXTS)
    return reason, may_pass or not isinstance(error, _LASTING_ERRORS)
