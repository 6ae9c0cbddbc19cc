"""What one worker decodes, and what that costs, of batches that workers share.

    python -m benchmarks.worker_input

One worker of 1, 2, 4 and 8 is asked for its rows of photographs in JPEG, with
batches that come decoded, and with `tfamp.sharded`. It needs no cluster: a
worker's input is what `distribute_batches` makes for it. Printed are encoded
bytes that went through the decoder, and CPU seconds of the process.
"""

import dataclasses
import sys
import time
from collections.abc import Iterator, Sequence

import numpy as np
import tensorflow as tf

import tfamp
from benchmarks.program import run
from tfamp.distribute.strategy import distribute_batches
from tfamp.recipe.flags import check_ranges, flag


@dataclasses.dataclass(frozen=True)
class Config:
    """The flags of this benchmark."""

    photographs: int = flag(512, "of them, in one epoch", minimum=1)
    pixels: int = flag(256, "a side of a photograph", minimum=8)
    batch_size: int = flag(64, "rows of a global batch", minimum=8)

    def __post_init__(self):
        check_ranges(self)


class OneOf:
    """In a strategy's place: the input of one among so many workers.

    Args:
        workers: how many.
        worker: which.
    """

    def __init__(self, workers: int, worker: int = 0):
        self.num_replicas_in_sync = workers
        self.extended = tf.distribute.get_strategy().extended
        self._worker = worker

    def distribute_datasets_from_function(self, make) -> tf.data.Dataset:
        workers = self.num_replicas_in_sync
        return make(tf.distribute.InputContext(workers, self._worker, workers))


class Photographs:
    """Noise in JPEG, and a decoder that counts what goes through it.

    Args:
        count: photographs.
        pixels: a side of them.
        batch_size: rows of a batch.
    """

    def __init__(self, count: int, pixels: int, batch_size: int):
        noise = np.random.default_rng(0).integers(0, 256, (pixels, pixels, 3))
        encoded = tf.io.encode_jpeg(noise.astype("uint8"))
        self.decoded_bytes = tf.Variable(0, dtype=tf.int64, trainable=False)
        self._size = pixels * 7 // 8
        self._batch_size = batch_size
        self._records = tf.data.Dataset.from_tensors(encoded).repeat(count)

    def decoded(self) -> tf.data.Dataset:
        """Batches that come decoded."""
        examples = self._records.map(
            self._decode, tf.data.AUTOTUNE, deterministic=True
        )
        return examples.batch(self._batch_size, drop_remainder=True)

    def sharded(self) -> tf.data.Dataset:
        """The same batches, of which a worker decodes its rows."""
        return tfamp.sharded(
            self._records, self._decode, self._batch_size, drop_remainder=True
        )

    def _decode(self, encoded: tf.Tensor) -> tf.Tensor:
        length = tf.cast(tf.strings.length(encoded), tf.int64)
        with tf.control_dependencies([self.decoded_bytes.assign_add(length)]):
            pixels = tf.io.decode_jpeg(encoded, channels=3)
        pixels = tf.cast(pixels, tf.float32) / 255.0
        return tf.image.resize(pixels, [self._size, self._size])


def measure(config: Config) -> list[dict[str, float]]:
    """Prints a table, and returns its rows."""
    rows = list(_rows(config))
    print("| workers | input | rows | MB decoded | CPU s | of one worker's |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['workers']} | {row['input']} | {row['rows']} | "
            f"{row['decoded_bytes'] / 1e6:.1f} | {row['cpu_seconds']:.2f} | "
            f"{row['cpu_seconds'] / rows[0]['cpu_seconds']:.2f} |"
        )
    return rows


def _rows(config: Config) -> Iterator[dict]:
    data = Photographs(config.photographs, config.pixels, config.batch_size)
    kinds = {"decoded": data.decoded(), "tfamp.sharded": data.sharded()}
    for workers in (1, 2, 4, 8):
        for kind, batches in kinds.items():
            shares = distribute_batches(OneOf(workers), batches)
            data.decoded_bytes.assign(0)
            # Tracing is over, once for all epochs.
            begin = time.process_time()
            rows = sum(int(share.rows) for share in shares)
            yield {
                "workers": workers,
                "input": kind,
                "rows": rows,
                "decoded_bytes": int(data.decoded_bytes.numpy()),
                "cpu_seconds": time.process_time() - begin,
            }


def main(argv: Sequence[str]) -> int:
    """The program: flags in, a table and an exit status out."""
    return run(Config, measure, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
