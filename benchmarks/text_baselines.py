"""What text costs without a neural network: the bar for recipes.language_model.

    python -m benchmarks.text_baselines

Counts, on the same split of the same text, the bits per byte of n-gram models
of bytes (interpolated as by Witten and Bell, 1991, down to uniform) and of
LZMA after it has read the training text.
"""

import collections
import dataclasses
import lzma
import math

from recipes.data import text
from tfamp.errors import InputError
from tfamp.recipe import flag, main

_BYTES = 256
# Between two texts, as the recipe's tokenizer sets them apart.
_SEPARATOR = b"\0"


@dataclasses.dataclass(frozen=True)
class Config:
    """The flags of this benchmark."""

    dataset: str = flag("topics", "as of recipes.language_model")
    data_dir: str = flag("", "folder of prepared data sets; default of tfds")
    eval_split: str = flag("auto", "split to evaluate on; validation or test")
    longest: int = flag(7, "bytes in an n-gram, at the most")


def measure(config: Config) -> dict[str, float]:
    """Prints bits per byte for each baseline, and returns them."""
    if config.longest < 1:
        raise InputError(f"longest={config.longest}; expected 1 or more.")
    data = text.load(
        config.dataset, config.data_dir, eval_split=config.eval_split
    )
    train, evaluation = (
        _SEPARATOR.join(data.read(split).as_numpy_iterator())
        for split in (data.train_split, data.eval_split)
    )
    print(f"{len(train):,} bytes to learn, {len(evaluation):,} to predict")
    bits = {
        f"{order}-gram": ngram_bits(train, evaluation, order)
        for order in range(1, config.longest + 1)
    }
    bits["xz -9e"] = compressed_bits(train, evaluation)
    for name, value in bits.items():
        print(f"{name:8} {value:.3f} bits per byte")
    return bits


def ngram_bits(train: bytes, evaluation: bytes, order: int) -> float:
    """Bits per byte that an n-gram model of bytes needs.

    Args:
        train: what the counts are taken from.
        evaluation: what is predicted, each byte from the `order` - 1 before.
        order: at least 1.
    """
    # By context, how often each byte follows it.
    followers = collections.defaultdict(collections.Counter)
    for length in range(order):
        for i in range(length, len(train)):
            followers[train[i - length : i]][train[i]] += 1
    totals = {context: each.total() for context, each in followers.items()}
    bits = 0.0
    for i, byte in enumerate(evaluation):
        probability = 1 / _BYTES
        for length in range(min(order, i + 1)):
            context = evaluation[i - length : i]
            if context not in totals:
                break
            counts, total = followers[context], totals[context]
            # As likely as the context has had new followers is another one.
            kinds = len(counts)
            probability = (counts[byte] + kinds * probability) / (total + kinds)
        bits -= math.log2(probability)
    return bits / len(evaluation)


def compressed_bits(train: bytes, evaluation: bytes) -> float:
    """Bits per byte that LZMA adds for a text after the training text."""

    def size(data: bytes) -> int:
        return len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))

    return 8 * (size(train + evaluation) - size(train)) / len(evaluation)


if __name__ == "__main__":
    main(measure, Config)
