"""Whether data come again as they came: fingerprints of first batches."""

import hashlib
from typing import Any

import numpy as np
import tensorflow as tf
from absl import logging

from tfamp.distribute.sharded import Sharded

# Passes whose first batches are remembered.
_KEPT = 64


class FirstBatches:
    """Takes note of the first batch of each pass through the data.

    On the host, in the pipeline: no other batch is looked at, and none is
    read that training does not read.
    """

    def __init__(self) -> None:
        self._seen: list[str] = []
        self._of_run: str | None = None

    def watched(self, dataset: tf.data.Dataset) -> tf.data.Dataset:
        """The same batches, of which the first is noted in each pass.

        Where workers decode their own rows, that of the records.
        """
        if isinstance(dataset, Sharded):
            return dataset.with_records(self.watched)
        is_tuple = type(dataset.element_spec) is tuple

        @tf.autograph.experimental.do_not_convert
        def tap(index, batch):
            tensors = tf.nest.flatten(batch, expand_composites=True)
            noted = tf.cond(
                tf.equal(index, 0),
                lambda: tf.numpy_function(self._note, tensors, tf.int64),
                lambda: tf.constant(0, tf.int64),
            )
            with tf.control_dependencies([noted]):
                same = [tf.identity(tensor) for tensor in tensors]
            same = tf.nest.pack_sequence_as(batch, same, expand_composites=True)
            # A list would be stacked, a tuple is not.
            return tuple(same) if is_tuple else same

        return dataset.enumerate().map(tap)

    def notes(self) -> dict[str, str | None]:
        """What to save: of the run's first pass, and of the one now."""
        seen = self._seen
        return {
            "run": self._of_run or (seen[0] if seen else None),
            "pass": seen[-1] if seen else None,
        }

    def compare(
        self, saved: dict[str, str | None], *, passes: int, steps: int
    ) -> None:
        """Says so where the data that were read again are not the same.

        Args:
            saved: `notes` of the run that is resumed.
            passes: whole ones that were gone through before.
            steps: batches of the pass after them that were read again; where
                there are none, the first batch of the first pass was.
        """
        self._of_run = saved["run"]
        if not self._seen:
            # One replica decodes by itself, and no records are looked at.
            return
        is_same = True
        if steps and saved["pass"] is not None:
            # Pipelines that run ahead of several replicas may come later.
            is_same = saved["pass"] in self._seen
        elif passes and not steps and saved["run"] is not None:
            is_same = self._seen[:1] == [saved["run"]]
        if not is_same:
            logging.warning(
                "The data are not those that this run began with, or come in "
                "another order: the first batch is another. The run goes on, "
                "but not to the weights of one that was never stopped. "
                "shuffle(seed=...) or keras.utils.set_random_seed(seed) before "
                "it repeat an order."
            )

    def _note(self, *values: Any) -> np.int64:
        digest = hashlib.blake2b(digest_size=16)
        for value in values:
            array = np.asarray(value)
            digest.update(f"{array.dtype}{array.shape}".encode())
            if array.dtype == object:
                for text in array.ravel():
                    digest.update(len(text).to_bytes(8, "little") + text)
            else:
                digest.update(np.ascontiguousarray(array).tobytes())
        self._seen.append(digest.hexdigest())
        # The first counts, and the last ones.
        del self._seen[1:-_KEPT]
        return np.int64(1)
