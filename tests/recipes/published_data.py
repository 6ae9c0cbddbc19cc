"""Published data sets without a download: what mocks need on disk."""

import os

import tensorflow_datasets as tfds

# Of a mocked data set; two batches of six.
EXAMPLES = 12


def write_metadata(name, folder, splits, examples=EXAMPLES):
    """What tfds needs on disk so that `mock_data` knows the splits."""
    builder = tfds.builder(name, data_dir=folder)
    template = tfds.core.ShardedFileTemplate(
        data_dir=builder.data_dir,
        dataset_name=builder.name,
        filetype_suffix="tfrecord",
    )
    builder.info.set_splits(
        tfds.core.SplitDict(
            [
                tfds.core.SplitInfo(
                    name=split,
                    shard_lengths=[examples] if examples else [],
                    num_bytes=1000,
                    filename_template=template.replace(split=split),
                )
                for split in splits
            ]
        )
    )
    os.makedirs(builder.data_dir)
    builder.info.write_to_directory(builder.data_dir)
