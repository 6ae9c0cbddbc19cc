"""The histograms of a probe, for TensorBoard.

One for each tensor, over log2 of the values: each power of two is a bar, as in
`probe.json`. The tags are `gradient/LAYER/NAME`, `activation_gradient/LAYER`
and `activation/LAYER`.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from tfamp.analysis.probe.plots import label


def write_histograms(record: Mapping[str, Any], folder: pathlib.Path) -> None:
    """Writes an event file into a folder, which is made.

    Args:
        record: what `probe.json` holds.
        folder: to give to `tensorboard --logdir`.
    """
    # What tensorboard's own `histogram` would pass; without that package only
    # `tf.summary.write` works.
    metadata = tf.compat.v1.SummaryMetadata(
        plugin_data=tf.compat.v1.SummaryMetadata.PluginData(
            plugin_name="histograms"
        ),
        data_class="DATA_CLASS_TENSOR",
    )
    writer = tf.summary.create_file_writer(str(folder))
    with writer.as_default(step=0):
        for tensor in record["tensors"]:
            tag = f"{tensor['kind']}/{label(tensor)}"
            tf.summary.write(tag, bars(tensor["histogram"]), metadata=metadata)
    writer.close()


def bars(histogram: Mapping[str, Any]) -> np.ndarray:
    """float64 [powers, 3]: from, to, and how many values lie there."""
    counts = np.asarray(histogram["counts"], np.float64)
    begins = histogram["first_exponent"] + np.arange(len(counts))
    return np.stack([begins, begins + 1.0, counts], axis=1)
