"""From the name of a strategy to its replicas, and to their share of the data.

One flag takes a recipe from one device to several; the numbers stay those of
the global batch.
"""

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from tfamp.distribute.cluster import (
    multi_worker_strategy,
    resolve_cluster,
    tpu_strategy,
)
from tfamp.distribute.sharded import Sharded
from tfamp.errors import InputError, did_you_mean

STRATEGIES = ("auto", "one_device", "mirrored", "multi_worker", "tpu")

# To convert what splits a batch takes seconds, and it has nothing to convert.
_unconverted = tf.autograph.experimental.do_not_convert

# The last strategy of several replicas, until a model uses it.
_last: list[weakref.ref] = []


class Share(NamedTuple):
    """What one replica gets of one global batch.

    data: the replica's rows of the batch; one row at least, so that no layer
        ever sees an empty batch.
    rows: int64 scalar, how many of them count: 0 where the batch has fewer
        rows than there are replicas.
    batch_rows: int64 scalar, rows of the global batch.
    """

    data: Any
    rows: tf.Tensor
    batch_rows: tf.Tensor


def get_strategy(
    name: str = "auto",
    *,
    num_devices: int | None = None,
    tpu: str = "",
    cluster: str = "auto",
    workers: Sequence[str] = (),
    worker_index: int | None = None,
    num_workers: int | None = None,
) -> tf.distribute.Strategy:
    """The strategy of that name over the devices that are here.

    Call it before anything else that makes TensorFlow start.

    Args:
        name: "one_device"; "mirrored", which keeps a replica on each GPU (or
            on each of `num_devices` logical CPU devices, to try things out);
            "multi_worker", with replicas on the GPUs of several hosts; "tpu".
            "auto" takes a TPU that is here or named, else a cluster that is
            described to it, else all GPUs if there are several, else the one
            device that there is.
        num_devices: how many devices of this host; None for all GPUs, or for
            one CPU. For "mirrored" and "auto".
        tpu: name or address of a TPU; empty for that of this machine.
        cluster: who describes the workers: "tf_config", "slurm" or
            "kubernetes". "auto" asks `workers`, then TF_CONFIG.
        workers: "host:port" of each worker, in one order on all of them.
        worker_index: which of `workers` this process is.
        num_workers: how many there are, for "kubernetes": a pod cannot tell
            a small cluster from one that is still starting.

    Returns:
        A strategy. Build the model in its `scope()`.

    Raises:
        InputError: for an unknown name, more devices than there are, or a
            cluster or TPU that is not there.
        WorkerLostError: a worker did not come in time.
    """
    strategy = _strategy_of(
        name,
        num_devices=num_devices,
        tpu=tpu,
        cluster=cluster,
        workers=workers,
        worker_index=worker_index,
        num_workers=num_workers,
    )
    _last.clear()
    if strategy.num_replicas_in_sync > 1:
        _last.append(weakref.ref(strategy))
    return strategy


def last_strategy() -> tf.distribute.Strategy | None:
    """What `get_strategy` made last, while it is there and is of no use yet.

    None where it has one replica: no model needs its scope.
    """
    return _last[0]() if _last else None


def note_use(strategy: tf.distribute.Strategy) -> None:
    """A model was made in the strategy's scope."""
    if last_strategy() is strategy:
        _last.clear()


def _strategy_of(
    name: str,
    *,
    num_devices: int | None,
    tpu: str,
    cluster: str,
    workers: Sequence[str],
    worker_index: int | None,
    num_workers: int | None,
) -> tf.distribute.Strategy:
    if name not in STRATEGIES:
        hint = (
            " (Keras 3 does not support parameter servers)"
            if name == "parameter_server"
            else ""
        )
        raise InputError(
            f"Unknown strategy {name!r}{hint}; expected one of "
            f"{', '.join(STRATEGIES)}.{did_you_mean(name, STRATEGIES)}"
        )
    if num_devices is not None and num_devices < 1:
        raise InputError(f"num_devices={num_devices} must be at least 1.")
    if name == "tpu" or (name == "auto" and (tpu or _has_tpu())):
        return tpu_strategy(tpu)
    if name in ("auto", "multi_worker"):
        resolver = resolve_cluster(
            cluster, workers, worker_index, num_workers=num_workers
        )
        if resolver is not None:
            return multi_worker_strategy(resolver)
        if name == "multi_worker":
            raise InputError(
                "Strategy 'multi_worker' knows no workers; set TF_CONFIG, "
                "pass workers and worker_index, or cluster='slurm' or "
                "'kubernetes'."
            )
    gpus = tf.config.list_physical_devices("GPU")
    if name == "auto":
        wanted = num_devices or len(gpus)
        name = "mirrored" if wanted > 1 else "one_device"
    if name == "one_device":
        if num_devices not in (None, 1):
            raise InputError(
                f"num_devices={num_devices} contradicts strategy "
                "'one_device'; use 'mirrored'."
            )
        return tf.distribute.get_strategy()
    if not gpus:
        return _mirrored_on_cpu(num_devices or 1)
    wanted = num_devices or len(gpus)
    if wanted > len(gpus):
        raise InputError(
            f"num_devices={wanted}, but this machine has {len(gpus)} GPUs; "
            "pass that many or fewer."
        )
    return tf.distribute.MirroredStrategy([f"GPU:{i}" for i in range(wanted)])


def distribute_batches(
    strategy: tf.distribute.Strategy, dataset: tf.data.Dataset
) -> tf.data.Dataset | tf.distribute.DistributedDataset:
    """Gives every replica its share of each global batch.

    Replica r of R gets rows `r*N//R` to `(r+1)*N//R` of a batch of N rows, so
    that a batch is trained on whole by any number of replicas, a partial last
    one too. Each worker reads all batches, in one order, and keeps its rows:
    the numbers are then those of one process, at the price of reading what
    others train on.

    Args:
        strategy: the strategy that the shares are run with.
        dataset: global batches, in any structure that Keras models take; all
            tensors have the rows as their first dimension.

    Returns:
        A dataset to be iterated; its elements are `Share`s.

    Raises:
        InputError: on a TPU, where the batch size is known and the number of
            replicas does not divide it.
    """
    replicas = strategy.num_replicas_in_sync
    batch_size = static_rows(dataset.element_spec)
    is_on_tpu = isinstance(strategy, tf.distribute.TPUStrategy)
    if is_on_tpu and batch_size is not None and batch_size % replicas:
        raise InputError(
            f"The batch size {batch_size} is not divisible by {replicas} "
            f"replicas; use {max(batch_size // replicas, 1) * replicas}."
        )

    if replicas > 1:
        _check_can_split(dataset.element_spec, replicas)

    # One replica decodes all there is.
    parts = dataset if isinstance(dataset, Sharded) and replicas > 1 else None
    batches = dataset if parts is None else parts.undecoded
    # A dataset hands a tuple on as arguments, and a tuple of one is a tuple.
    is_tuple = type(batches.element_spec) is tuple

    def dataset_fn(context: tf.distribute.InputContext) -> tf.data.Dataset:
        # The replicas of this worker, in order.
        count = replicas // context.num_input_pipelines
        first = context.input_pipeline_id * count

        @_unconverted
        def share_of(replica, *batch) -> Share:
            batch = batch if is_tuple else batch[0]
            data, rows = split_evenly(batch, replica, replicas)
            return Share(data, rows, count_rows(batch))

        @_unconverted
        def shares_of(*batch) -> tf.data.Dataset:
            local = tf.data.Dataset.range(first, first + count)
            return local.map(
                _unconverted(lambda replica: share_of(replica, *batch))
            )

        if count == 1:
            # A dataset per batch takes longer than the step of a small model.
            shares = batches.map(
                _unconverted(lambda *batch: share_of(first, *batch))
            )
        else:
            shares = batches.flat_map(shares_of)
        if parts is not None:
            decode = parts.decode
            here = None if batch_size is None else batch_size // replicas
            shares = shares.map(
                lambda share: share._replace(data=decode(share.data, here)),
                tf.data.AUTOTUNE,
                deterministic=True,
            )
            # It breaks where decoding has a state, such as a lookup table.
            options = tf.data.Options()
            options.experimental_optimization.map_and_batch_fusion = False
            shares = shares.with_options(options)
        return shares.prefetch(tf.data.AUTOTUNE)

    shares = strategy.distribute_datasets_from_function(dataset_fn)
    # What is no dataset now, its strategy brings to its devices by itself.
    is_left_to_us = isinstance(shares, tf.data.Dataset)
    if is_left_to_us and replicas == 1 and computes_on_gpus(strategy):
        return _prefetched_to(devices_of(strategy)[0], shares)
    return shares


def before_devices(
    batches: tf.data.Dataset | tf.distribute.DistributedDataset,
) -> tf.data.Dataset | tf.distribute.DistributedDataset:
    """The same batches, from where they are before they go to a device.

    An iterator there begins to be one with its first batch: one that is made
    and not read leaves no mark on the pipeline, such as the order of a shuffle.
    """
    return getattr(batches, "tfamp_on_host", batches)


def split_evenly(batch: Any, index, count: int) -> tuple[Any, tf.Tensor]:
    """Piece `index` of `count` pieces of a batch, as even as rows allow.

    Args:
        batch: tensors of N rows each, in any structure.
        index: which piece; an integer, or an integer scalar tensor.
        count: into how many pieces.

    Returns:
        The rows of the piece, and how many they are: an int64 scalar. Where
        that is 0 there is one row all the same, which must not count.
    """
    if count == 1:
        return batch, count_rows(batch)
    index = tf.cast(index, tf.int64)
    rows = count_rows(batch)
    start, stop = index * rows // count, (index + 1) * rows // count
    first = tf.minimum(start, rows - 1)
    last = tf.maximum(stop, first + 1)

    def piece(tensor):
        if tensor is None:
            return None
        if isinstance(tensor, tf.SparseTensor):
            return _sparse_rows(tensor, first, last)
        taken = tensor[first:last]
        static = tensor.shape[0] if isinstance(tensor, tf.Tensor) else None
        if static is not None and static % count == 0:
            # XLA and TPUs want it static, and a slice forgets it.
            taken.set_shape([static // count, *tensor.shape[1:]])
        return taken

    return tf.nest.map_structure(piece, batch), stop - start


def count_rows(batch: Any) -> tf.Tensor:
    """The rows of a batch: an int64 scalar."""
    first = next(each for each in tf.nest.flatten(batch) if each is not None)
    if isinstance(first, tf.RaggedTensor):
        return tf.cast(first.nrows(), tf.int64)
    if isinstance(first, tf.SparseTensor):
        return first.dense_shape[0]
    return tf.shape(first, out_type=tf.int64)[0]


def _sparse_rows(tensor: tf.SparseTensor, first, last) -> tf.SparseTensor:
    shape = tensor.dense_shape
    begin = tf.concat([[first], tf.zeros_like(shape[1:])], 0)
    size = tf.concat([[last - first], shape[1:]], 0)
    return tf.sparse.slice(tensor, begin, size)


def static_rows(element_spec: Any) -> int | None:
    """The rows of every batch where the dataset's spec tells, else None."""
    shapes = [
        spec.shape
        for spec in tf.nest.flatten(element_spec)
        # The spec of a None has none.
        if hasattr(spec, "shape")
    ]
    if any(shape.rank == 0 for shape in shapes):
        raise InputError(
            "The dataset yields single examples; batch it: "
            "dataset.batch(64, drop_remainder=True)."
        )
    return None if shapes[0].rank is None else shapes[0][0]


def devices_of(strategy: tf.distribute.Strategy) -> list[str]:
    """The names of the devices that a strategy's replicas compute on."""
    try:
        return list(strategy.extended.worker_devices)
    except RuntimeError:
        # No strategy: TensorFlow computes on the first GPU it finds.
        gpus = tf.config.list_logical_devices("GPU")
        return [(gpus or tf.config.list_logical_devices("CPU"))[0].name]


def computes_on_gpus(strategy: tf.distribute.Strategy) -> bool:
    """Whether the host must not read what a step computes, lest it waits."""
    return any("GPU" in device for device in devices_of(strategy))


def _prefetched_to(device: str, shares: tf.data.Dataset) -> tf.data.Dataset:
    """The same, of which the next one is on the device before it is wanted.

    What is no plain array of numbers is left on the host.
    """
    specs = tf.nest.flatten(shares.element_spec)
    is_plain = all(
        isinstance(spec, tf.TensorSpec)
        and (
            spec.dtype.is_floating
            or spec.dtype.is_integer
            or spec.dtype.is_bool
        )
        for spec in specs
    )
    if not is_plain:
        return shares
    # One is used and one is ready: each more would take its memory there.
    prefetched = shares.apply(
        tf.data.experimental.prefetch_to_device(device, buffer_size=1)
    )
    prefetched.tfamp_on_host = shares
    return prefetched


def _has_tpu() -> bool:
    return bool(tf.config.list_physical_devices("TPU"))


def _check_can_split(element_spec: Any, replicas: int) -> None:
    for spec in tf.nest.flatten(element_spec):
        if not hasattr(spec, "shape"):
            raise InputError(
                f"The dataset yields a None, which TensorFlow cannot give to "
                f"{replicas} replicas; leave it out."
            )


def _mirrored_on_cpu(num_devices: int) -> tf.distribute.Strategy:
    cpu = tf.config.list_physical_devices("CPU")[0]
    configured = tf.config.get_logical_device_configuration(cpu)
    available = len(configured) if configured else 1
    if available < num_devices:
        try:
            tf.config.set_logical_device_configuration(
                cpu, [tf.config.LogicalDeviceConfiguration()] * num_devices
            )
        except RuntimeError:
            raise InputError(
                f"num_devices={num_devices}, but TensorFlow has started with "
                f"{available} CPU device(s); ask for the strategy before any "
                "other TensorFlow call."
            ) from None
    return tf.distribute.MirroredStrategy(
        [f"CPU:{i}" for i in range(num_devices)],
        # The default keeps one group of collectives per process, and aborts
        # when a second strategy has another number of devices.
        cross_device_ops=tf.distribute.ReductionToOneDevice(),
    )
