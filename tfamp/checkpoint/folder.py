"""The files of checkpoints: which are whole, which are left over, which stay.

TensorFlow writes a checkpoint `ckpt-7` under `ckpt-7_temp/`, moves the tensors
to `ckpt-7.data-...`, and writes `ckpt-7.index` last: what has no index was
killed while it was saved. The file `checkpoint` only repeats what the others
say, so it is written and never believed.
"""

import contextlib
import os
import re

import tensorflow as tf

from tfamp.checkpoint import place
from tfamp.distribute import vigil
from tfamp.errors import InputError, SaveError

# As they are counted here; who renames files may come to others.
_NUMBER = r"ckpt-(0|[1-9]\d{0,17})"
_INDEX = re.compile(rf"{_NUMBER}\.index")
_FILES = re.compile(rf"{_NUMBER}(\.index\S*|\.data-\S+|_temp)/?")
_STATE = re.compile(r"checkpoint(\.tmp\w*)?")


class Folder:
    """One directory of numbered checkpoints.

    Args:
        directory: made with the first save.
        checkpoint: what is saved.
        keep: how many of the newest to keep.
        is_chief: whether to write at all.

    Raises:
        InputError: for a directory that holds other files and no checkpoint.
    """

    def __init__(
        self,
        directory: str,
        checkpoint: tf.train.Checkpoint,
        keep: int,
        is_chief: bool,
    ):
        self.directory = directory
        self._alias = place.Alias(directory)
        self.is_chief = is_chief
        self._checkpoint = checkpoint
        self._keep = keep
        self._manager: tf.train.CheckpointManager | None = None
        self._check()

    def path(self, name: str) -> str:
        return os.path.join(self.directory, name)

    def prefix(self, number: int) -> str:
        """Path of a checkpoint without its suffixes, as TensorFlow takes it."""
        return os.path.join(self._alias.path, f"ckpt-{number}")

    def shown(self, text: str) -> str:
        """A message with paths as the user knows them."""
        return self._alias.shown(text)

    def numbers(self) -> list[int]:
        """Of the checkpoints that were saved to the end, in order."""
        matches = map(_INDEX.fullmatch, self._names())
        return sorted(int(match[1]) for match in matches if match)

    def has_lost_files(self) -> bool:
        """Whether TensorFlow recorded a checkpoint and none has an index."""
        return "checkpoint" in self._names() and not self.numbers()

    def check_writable(self) -> None:
        """Makes the directory, and a file in it for a moment.

        Raises:
            InputError: where that fails.
            SaveError: where it may not, another time.
        """
        # Named as what a killed save leaves: deleted if this is killed.
        probe = self.path("checkpoint.tmp")
        with place.told_in_one_line(self.directory, begins=True):
            tf.io.gfile.makedirs(self.directory)
            place.write_text(probe, "")
            place.remove(probe)

    def save(self) -> None:
        """Saves a new one, and deletes those that are too many then.

        Raises:
            InputError: where the directory cannot be written.
            SaveError: where it can be, another time.
        """
        try:
            with vigil.alone(), place.told_in_one_line(self.directory):
                if self._manager is None:
                    self._manager = self._managed()
                # Never a number in use: a kill would leave half of either.
                number = max(self.numbers(), default=0) + 1
                self._manager.save(checkpoint_number=number)
        except (InputError, SaveError):
            self._manager = None
            with contextlib.suppress(tf.errors.OpError, OSError):
                self._clean()
            raise

    def _managed(self) -> tf.train.CheckpointManager:
        tf.io.gfile.makedirs(self.directory)
        self._clean()
        self._record()
        return tf.train.CheckpointManager(
            self._checkpoint, self._alias.path, max_to_keep=self._keep
        )

    def _names(self) -> list[str]:
        if not tf.io.gfile.isdir(self.directory):
            return []
        return tf.io.gfile.listdir(self.directory)

    def _check(self) -> None:
        """Finds what cannot be a directory of checkpoints."""
        if tf.io.gfile.exists(self.directory) and not tf.io.gfile.isdir(
            self.directory
        ):
            raise InputError(
                f"{self.directory} is a file; give a directory for checkpoints."
            )
        strangers = [
            name
            for name in sorted(self._names())
            if not (
                _FILES.fullmatch(name)
                or _STATE.fullmatch(name)
                or name.rstrip("/") == "best"
                or name.startswith(".")
            )
        ]
        if strangers and not self.numbers():
            raise InputError(
                f"Directory {self.directory} holds {strangers[0]!r} and no "
                "checkpoint; give an empty or a new one."
            )

    def _clean(self) -> None:
        """Deletes what saves that were killed have left."""
        whole = set(self.numbers())
        for name in self._names():
            files, state = _FILES.fullmatch(name), _STATE.fullmatch(name)
            is_temporary = (files and files[2] == "_temp") or (
                state and state[1]
            )
            if is_temporary or (files and int(files[1]) not in whole):
                place.remove(self.path(name).rstrip("/"))

    def _record(self) -> None:
        """Tells TensorFlow which there are; its own record may be torn."""
        names = [f"ckpt-{number}" for number in self.numbers()]
        if not names:
            return
        lines = [f'model_checkpoint_path: "{names[-1]}"']
        for time, name in enumerate(names, start=1):
            lines.append(f'all_model_checkpoint_paths: "{name}"')
            # It forgets those without a time; any that grows will do.
            lines.append(f"all_model_checkpoint_timestamps: {time}.0")
        lines.append("last_preserved_timestamp: 0.0")
        place.write_text(self.path("checkpoint.tmp"), "\n".join(lines) + "\n")
        tf.io.gfile.rename(
            self.path("checkpoint.tmp"), self.path("checkpoint"), overwrite=True
        )
