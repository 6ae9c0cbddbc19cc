"""From flags or the environment to a cluster, and from it to a strategy.

The environment is read by TensorFlow's own cluster resolvers. What they find
is checked here, before a server starts and other workers wait for it.

Workers trust each other: whoever reaches the port of one can run any graph in
it. Keep the ports inside a private network, or use `tfamp.launch`, which stays
on one machine.
"""

from collections.abc import Sequence

import tensorflow as tf

from tfamp import tensorflow_internals
from tfamp.distribute import vigil
from tfamp.distribute.initial_values import broadcast_in_any_dtype
from tfamp.distribute.joining import killed_after
from tfamp.distribute.loopback import accept_loopback_only, is_loopback
from tfamp.distribute.schedulers import (
    KUBERNETES_PORT,
    SLURM_PORT,
    kubernetes_workers,
    slurm_workers,
)
from tfamp.distribute.workers import (
    JOIN_SECONDS,
    START_TIMEOUT_SECONDS,
    keep_signal_handlers,
    port_taken,
    split_address,
    told_of_lost,
    wait_for_workers,
    worker_errors,
)
from tfamp.errors import InputError, WorkerLostError

__all__ = [
    "CLUSTERS",
    "multi_worker_strategy",
    "resolve_cluster",
    "tpu_strategy",
    "worker_errors",
]

CLUSTERS = ("auto", "tf_config", "slurm", "kubernetes")

# TensorFlow notices most of those that leave while it joins by itself.
_HELD_SECONDS = 30

_TRAINING_JOBS = ("chief", "worker")  # In the order TensorFlow numbers them.
_resolvers = tf.distribute.cluster_resolver


def resolve_cluster(
    cluster: str = "auto",
    workers: Sequence[str] = (),
    worker_index: int | None = None,
    *,
    num_workers: int | None = None,
    port: int | None = None,
) -> tf.distribute.cluster_resolver.ClusterResolver | None:
    """Finds out who the workers are, and which of them this process is.

    Args:
        cluster: "tf_config" reads TF_CONFIG. "slurm" reads the variables of
            the job step, one worker a task in block distribution; each uses
            all GPUs that Slurm lets it see. "kubernetes" asks for the pods
            labelled `job-name=tensorflow`, which must run on the network of
            their host, one to a host. "auto" takes `workers` where given, else
            TF_CONFIG where it is set, else nothing.
        workers: "host:port" of all workers, in the same order on each.
        worker_index: which of them this process is. Kubernetes workers find
            it out by themselves.
        num_workers: how many pods to wait for; for Kubernetes only, where a
            worker cannot tell a small cluster from one that is starting.
        port: for Slurm the first of a host's ports (8888), for Kubernetes the
            port of every pod (8470).

    Returns:
        The resolver, checked; None where "auto" finds no cluster.

    Raises:
        InputError: what was given, or what the environment holds, describes
            no cluster that can train.
    """
    if cluster not in CLUSTERS:
        raise InputError(
            f"Unknown cluster {cluster!r}; expected one of "
            f"{', '.join(CLUSTERS)}."
        )
    if workers and cluster != "auto":
        raise InputError(
            f"workers={','.join(workers)} contradicts cluster={cluster!r}; "
            "give one of the two."
        )
    if workers:
        return _from_flags(workers, worker_index)
    if worker_index is not None and cluster != "kubernetes":
        raise InputError(
            f"worker_index={worker_index} needs workers=host:port,host:port."
        )
    if num_workers is not None and cluster != "kubernetes":
        raise InputError(
            f"num_workers={num_workers} is for cluster='kubernetes' only."
        )
    if cluster == "slurm":
        return _checked_cluster(*slurm_workers(port or SLURM_PORT))
    if cluster == "kubernetes":
        return _checked_cluster(
            *kubernetes_workers(
                num_workers, worker_index, port or KUBERNETES_PORT
            )
        )
    return _from_tf_config(required=cluster == "tf_config")


def multi_worker_strategy(
    resolver: tf.distribute.cluster_resolver.ClusterResolver,
    *,
    start_timeout_seconds: float = START_TIMEOUT_SECONDS,
) -> tf.distribute.MultiWorkerMirroredStrategy:
    """Joins the cluster: starts this worker's server, waits for the others.

    To be called before any other TensorFlow call that makes a tensor or lists
    logical devices. A cluster whose addresses are all loopback answers no
    other machine (on Linux, see `tfamp.distribute.loopback`): the filter is
    on within about a second of the server's start, when this returns.

    Args:
        resolver: from `resolve_cluster`.
        start_timeout_seconds: how long to wait for workers that start late.

    Returns:
        The strategy. Its all-reduce runs over NCCL between GPUs, and in a
        ring over gRPC between CPUs. Variables of any dtype can be made in its
        scope. Run what uses it in `worker_errors()`.

    Raises:
        InputError: the port is taken, or TensorFlow has started already.
        WorkerLostError: a worker did not come in time, or left at once. Where
            TensorFlow does not notice, SIGKILL ends the process in its place.
    """
    addresses, index = _check(resolver)
    if len(addresses) > 1:
        wait_for_workers(addresses, index, start_timeout_seconds)
        spec = resolver.cluster_spec()
        tensorflow_internals.bound_joining(
            {
                job: spec.num_tasks(job)
                for job in _TRAINING_JOBS
                if job in spec.jobs
            },
            JOIN_SECONDS,
        )
    has_gpu = bool(tf.config.list_physical_devices("GPU"))
    implementations = tf.distribute.experimental.CommunicationImplementation
    options = tf.distribute.experimental.CommunicationOptions(
        # No time limit here: it would take a slow worker for a dead one.
        # AUTO means the ring over gRPC here, also between GPUs.
        implementation=implementations.NCCL if has_gpu else implementations.RING
    )
    port = split_address(addresses[index])[1]
    not_joined = (
        f"Not all workers had joined {JOIN_SECONDS} s after they had all been "
        "there; the output of the first that ended says why. Restart the job."
    )
    bound = killed_after(JOIN_SECONDS + _HELD_SECONDS, f"tfamp: {not_joined}")
    try:
        with bound, worker_errors(), keep_signal_handlers():
            strategy = tf.distribute.MultiWorkerMirroredStrategy(
                resolver, options
            )
    except tf.errors.UnknownError as error:
        if "Could not start gRPC server" not in str(error):
            raise
        raise port_taken(port, index) from None
    except tf.errors.DeadlineExceededError:
        raise WorkerLostError(not_joined) from None
    except RuntimeError as error:
        if "must be configured at program startup" not in str(error):
            raise
        raise InputError(
            "TensorFlow has started already; ask for the strategy "
            "'multi_worker' before any other TensorFlow call."
        ) from None
    if all(is_loopback(split_address(a)[0]) for a in addresses):
        accept_loopback_only(port)
    if len(addresses) > 1:
        vigil.begin(
            [split_address(a) for a in addresses],
            _tasks(resolver),
            index,
            told_of_lost,
        )
        broadcast_in_any_dtype(strategy)
    return strategy


def _tasks(resolver) -> list[tuple[str, int]]:
    spec = resolver.cluster_spec()
    return [
        (job, number)
        for job in _TRAINING_JOBS
        if job in spec.jobs
        for number in spec.task_indices(job)
    ]


def tpu_strategy(name: str = "") -> tf.distribute.TPUStrategy:
    """Connects to a TPU and starts it.

    Args:
        name: the TPU's name or "grpc://host:port"; empty or "local" for the
            TPU of this machine.

    Raises:
        InputError: there is no such TPU, or TensorFlow cannot use it.
    """
    try:
        resolver = _resolvers.TPUClusterResolver(tpu=name or "local")
        tf.config.experimental_connect_to_cluster(resolver)
        tf.tpu.experimental.initialize_tpu_system(resolver)
        return tf.distribute.TPUStrategy(resolver)
    # OSError: names are looked up over HTTP.
    except (tf.errors.OpError, ValueError, RuntimeError, OSError) as error:
        reason = str(error).strip().split("\n")[0][:200]
        raise InputError(
            f"No TPU {name or 'local'!r} answers ({reason}); give tpu=NAME or "
            "tpu=grpc://host:port, or choose another strategy."
        ) from error


def _from_flags(workers, worker_index):
    if worker_index is None:
        raise InputError(
            "workers needs worker_index: which of them this process is, "
            f"from 0 to {len(workers) - 1}."
        )
    return _checked_cluster(workers, worker_index)


def _from_tf_config(required):
    resolver = _resolvers.TFConfigClusterResolver()
    example = (
        '{"cluster": {"worker": ["host:port", "host:port"]}, '
        '"task": {"type": "worker", "index": 0}}'
    )
    try:
        jobs = resolver.cluster_spec().as_dict()
        task = resolver.task_type, resolver.task_id
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise InputError(
            f"TF_CONFIG cannot be read ({error}); expected {example}."
        ) from None
    if not jobs and task == (None, None):
        if not required:
            return None
        raise InputError(
            f"TF_CONFIG is not set, or names no cluster; expected {example}."
        )
    if not jobs or None in task:
        lacking = "task type and index" if jobs else "cluster"
        raise InputError(f"TF_CONFIG lacks the {lacking}; expected {example}.")
    _check(resolver)
    return resolver


def _checked_cluster(addresses, index):
    if not 0 <= index < len(addresses):
        raise InputError(
            f"Worker index {index} is not among the {len(addresses)} workers; "
            f"expected 0 to {len(addresses) - 1}."
        )
    resolver = _resolvers.SimpleClusterResolver(
        tf.train.ClusterSpec({"worker": list(addresses)}),
        task_type="worker",
        task_id=index,
        # Without it TensorFlow believes that there is none.
        num_accelerators={"GPU": len(tf.config.list_physical_devices("GPU"))},
        rpc_layer="grpc",
    )
    _check(resolver)
    return resolver


def _check(resolver):
    """The addresses of all workers, chief first, and this one's index."""
    spec = resolver.cluster_spec()
    job, task = resolver.task_type, resolver.task_id
    for name in {*spec.jobs, job} - set(_TRAINING_JOBS):
        raise InputError(
            f"The cluster has a {name!r} task; tfamp trains on workers that "
            "are all alike (type 'worker', the first may be 'chief'): Keras 3 "
            "supports no parameter servers, and evaluation is shared."
        )
    addresses: list[str] = []
    index = None
    for name in _TRAINING_JOBS:
        if name not in spec.jobs:
            continue
        for number in spec.task_indices(name):
            if (name, number) == (job, task):
                index = len(addresses)
            addresses.append(spec.task_address(name, number))
    if index is None:
        raise InputError(
            f"This process is {job} {task}, which the cluster of "
            f"{', '.join(addresses)} does not have."
        )
    if "chief" in spec.jobs and spec.num_tasks("chief") > 1:
        raise InputError("The cluster has several chiefs; one is allowed.")
    for address in addresses:
        split_address(address)
        if addresses.count(address) > 1:
            raise InputError(
                f"Worker address {address} stands twice in the cluster; each "
                "worker needs its own."
            )
    return addresses, index
