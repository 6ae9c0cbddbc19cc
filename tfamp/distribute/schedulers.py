"""Whom a scheduler started as workers: Slurm, Kubernetes.

TensorFlow's resolver reads Slurm's environment; what it gets wrong in
TensorFlow 2.21 is put right here, each with its reason.
"""

import re
import socket
import time

import tensorflow as tf

from tfamp.distribute.workers import START_TIMEOUT_SECONDS, split_address
from tfamp.errors import InputError

SLURM_PORT = 8888
KUBERNETES_PORT = 8470

_POD_LABEL = "job-name=tensorflow"
_POD_POLL_SECONDS = 2.0


def slurm_workers(port: int) -> tuple[list[str], int]:
    """The addresses of this job step's tasks, and which of them this is.

    Args:
        port: the port of the first task on each host; the next takes the next.

    Raises:
        InputError: this is no job step, or its tasks are not in block order.
    """
    try:
        # Which GPUs a task sees is Slurm's to say. The resolver wants to share
        # them out all the same, and fails where there are none.
        slurm = tf.distribute.cluster_resolver.SlurmClusterResolver(
            port_base=port,
            gpus_per_node=2**16,
            gpus_per_task=1,
            auto_set_gpu=False,
        )
        addresses = slurm.cluster_spec().job_tasks("worker")
    except (RuntimeError, ValueError, KeyError, IndexError) as error:
        raise InputError(
            f"Slurm's job step cannot be read ({error}); start the workers "
            "with srun."
        ) from None
    if slurm.task_id is None:
        raise InputError(
            f"SLURM_PROCID is beyond the {len(addresses)} tasks of the step."
        )
    # Slurm numbers n9 before n10; the resolver sorts them as strings.
    addresses.sort(key=_natural_order)
    host = split_address(addresses[slurm.task_id])[0]
    if _is_here(host) is False:
        raise InputError(
            f"Slurm task {slurm.task_id} belongs on {host}, and this is "
            f"{socket.gethostname()}; use srun --distribution=block."
        )
    return addresses, slurm.task_id


def kubernetes_workers(
    num_workers: int | None, worker_index: int | None, port: int
) -> tuple[list[str], int]:
    """The addresses of the pods labelled `job-name=tensorflow`, and this one.

    Args:
        num_workers: how many pods to wait for.
        worker_index: which this is; None to tell by the host's address.
        port: the port of every pod.

    Raises:
        InputError: this is no pod, there are other pods than expected, or
            which of them this is cannot be told.
    """
    try:
        import kubernetes
    except ImportError:
        raise InputError(
            "cluster='kubernetes' needs a package: pip install kubernetes"
        ) from None
    if num_workers is None:
        raise InputError("cluster='kubernetes' needs num_workers=N.")
    try:
        kubernetes.config.load_incluster_config()
        # Not by TensorFlow's resolver, which up to 2.19 looks for the settings
        # of a user's machine, which no pod has.
        pods = _wait_for_pods(kubernetes.client.CoreV1Api(), num_workers)
        addresses = [f"{pod.status.host_ip}:{port}" for pod in pods]
    except kubernetes.config.ConfigException as error:
        raise InputError(
            f"This is no pod of a Kubernetes cluster ({error}); use "
            "workers=host:port,host:port."
        ) from None
    except kubernetes.client.ApiException as error:
        raise InputError(
            f"Kubernetes refuses to list the pods ({error.reason}); allow the "
            "service account to list pods in all namespaces."
        ) from None
    if worker_index is None:
        here = [
            index
            for index, address in enumerate(addresses)
            if _is_here(split_address(address)[0])
        ]
        if len(here) != 1:
            raise InputError(
                f"None or several of the pods {', '.join(addresses)} are on "
                "this host; run one to a host with hostNetwork, or give "
                "worker_index."
            )
        worker_index = here[0]
    return addresses, worker_index


def _wait_for_pods(client, num_workers: int) -> list:
    """The pods that are to be workers, all of which run, by name."""
    deadline = time.monotonic() + START_TIMEOUT_SECONDS
    while True:
        found = client.list_pod_for_all_namespaces(label_selector=_POD_LABEL)
        pods = sorted(found.items, key=lambda pod: pod.metadata.name)
        running = [pod for pod in pods if pod.status.phase == "Running"]
        if len(running) == len(pods) == num_workers:
            return pods
        if len(running) > num_workers or time.monotonic() > deadline:
            others = "".join(
                f", {pod.metadata.name!r} is {pod.status.phase}"
                for pod in pods
                if pod not in running
            )
            raise InputError(
                f"Expected {num_workers} running pods with the label "
                f"{_POD_LABEL}: {len(running)} run{others}."
            )
        time.sleep(_POD_POLL_SECONDS)


def _natural_order(address):
    return [
        int(part) if part.isdigit() else part
        for part in re.split(r"(\d+)", address)
    ]


def _is_here(host):
    """Whether `host` is this machine; None where its name is not known."""
    try:
        address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
    except OSError:
        return None
    with socket.socket(address[0]) as sock:
        try:
            sock.bind(address[4])
        except OSError:
            return False
    return True
