import contextlib
import functools
import json
import os
import re
import socket
import subprocess
import sys
import textwrap
import threading
import time
import types

import pytest
import tensorflow as tf

from tests.conftest import ROOT, mostly_slow
from tfamp.distribute import cluster, launch, loopback, schedulers, workers
from tfamp.errors import InputError, WorkerLostError

LIMIT_SECONDS = 90

TWO = {"worker": ["127.0.0.1:2222", "127.0.0.1:2223"]}


def tf_config(jobs=TWO, **task):
    return json.dumps({"cluster": jobs, "task": task})


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch):
    """No cluster around the tests, whatever machine they run on."""
    for name in list(os.environ):
        if name == "TF_CONFIG" or name.startswith("SLURM_"):
            monkeypatch.delenv(name)


# --- Who the workers are ---------------------------------------------------


def test_auto_finds_no_cluster_without_flags_and_environment():
    assert cluster.resolve_cluster() is None


def test_flags_make_a_cluster():
    resolver = cluster.resolve_cluster(
        workers=("a.example:1", "[::1]:2"), worker_index=1
    )
    assert resolver.cluster_spec().as_dict() == {
        "worker": ["a.example:1", "[::1]:2"]
    }
    assert (resolver.task_type, resolver.task_id) == ("worker", 1)
    assert resolver.num_accelerators() == {"GPU": 0}


def test_flags_win_over_tf_config(monkeypatch):
    monkeypatch.setenv("TF_CONFIG", "not read")
    resolver = cluster.resolve_cluster(workers=("a:1",), worker_index=0)
    assert resolver.cluster_spec().as_dict() == {"worker": ["a:1"]}


@pytest.mark.parametrize("name", ["auto", "tf_config"])
def test_tf_config_makes_a_cluster(monkeypatch, name):
    monkeypatch.setenv("TF_CONFIG", tf_config(type="worker", index=1))
    resolver = cluster.resolve_cluster(name)
    assert resolver.cluster_spec().as_dict() == TWO
    assert (resolver.task_type, resolver.task_id) == ("worker", 1)


def test_chief_counts_as_the_first_worker(monkeypatch):
    jobs = {"worker": ["a:1"], "chief": ["b:1"]}
    monkeypatch.setenv("TF_CONFIG", tf_config(jobs, type="worker", index=0))
    resolver = cluster.resolve_cluster()
    assert cluster._check(resolver) == (["b:1", "a:1"], 1)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("{", "TF_CONFIG cannot be read"),
        ("[]", "TF_CONFIG is not set, or names no cluster"),
        ("[1]", "TF_CONFIG is not set"),
        ('"x"', "TF_CONFIG is not set"),
        ('{"cluster": 3, "task": {}}', "TF_CONFIG cannot be read"),
        ('{"cluster": {"worker": 3}}', "TF_CONFIG cannot be read"),
        ('{"task": {"type": "worker", "index": 0}}', "lacks the cluster"),
        (json.dumps({"cluster": TWO}), "lacks the task type and index"),
        (tf_config(type="worker"), "lacks the task type and index"),
        (tf_config(type="worker", index="x"), "TF_CONFIG cannot be read"),
        (tf_config(type="worker", index=2), "worker 2, which the cluster"),
        (tf_config(type="worker", index=-1), "worker -1, which the cluster"),
        (tf_config(type="chief", index=0), "chief 0, which the cluster"),
        (tf_config(type="evaluator", index=0), "has a 'evaluator' task"),
        (
            tf_config({**TWO, "ps": ["a:1"]}, type="worker", index=0),
            "has a 'ps' task",
        ),
        (
            tf_config({"chief": ["a:1", "b:1"]}, type="chief", index=0),
            "several chiefs",
        ),
        (
            tf_config({"worker": ["a:1", "a:1"]}, type="worker", index=0),
            "a:1 stands twice",
        ),
        (
            tf_config(
                {"chief": ["a:1"], "worker": ["a:1"]}, type="worker", index=0
            ),
            "a:1 stands twice",
        ),
    ],
)
def test_bad_tf_config_is_one_line(monkeypatch, value, message):
    monkeypatch.setenv("TF_CONFIG", value)
    with pytest.raises(InputError, match=re.escape(message)) as raised:
        cluster.resolve_cluster("tf_config")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "address",
    [
        *("", "a", "a:", ":1", "a:x", "a:0", "a:65536", "a:-1", "a b:1"),
        *("a:1:2", "http://a:1", "::1:1", "a:1 "),
    ],
)
def test_malformed_address_is_named(address):
    with pytest.raises(InputError, match="is not host:port") as raised:
        cluster.resolve_cluster(workers=("a:1", address), worker_index=0)
    assert repr(address) in str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cluster": "gce"}, "Unknown cluster 'gce'"),
        ({"worker_index": 0}, "worker_index=0 needs workers"),
        ({"workers": ("a:1",)}, "workers needs worker_index"),
        ({"workers": ("a:1",), "worker_index": 1}, "index 1 is not among"),
        ({"workers": ("a:1",), "worker_index": -1}, "index -1 is not among"),
        (
            {"workers": ("a:1", "a:1"), "worker_index": 0},
            "a:1 stands twice",
        ),
        (
            {"cluster": "slurm", "workers": ("a:1",), "worker_index": 0},
            "workers=a:1 contradicts cluster='slurm'",
        ),
        ({"num_workers": 2}, "num_workers=2 is for cluster='kubernetes'"),
        ({"cluster": "tf_config"}, "TF_CONFIG is not set"),
        ({"cluster": "slurm"}, "SLURM_PROCID not found"),
    ],
)
def test_bad_flags_are_one_line(arguments, message):
    with pytest.raises(InputError, match=re.escape(message)) as raised:
        cluster.resolve_cluster(**arguments)
    assert "\n" not in str(raised.value)


# --- Schedulers ------------------------------------------------------------


def set_slurm(monkeypatch, nodes, tasks_per_node, rank, count):
    for name, value in {
        "PROCID": rank,
        "STEP_NUM_TASKS": count,
        "STEP_NODELIST": nodes,
        "STEP_TASKS_PER_NODE": tasks_per_node,
    }.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_slurm_tasks_are_workers_in_the_order_of_their_ranks(monkeypatch, rank):
    # As strings node10.invalid would stand before node9.invalid.
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    set_slurm(monkeypatch, "node9.invalid,node10.invalid", "2,1", rank, 3)
    resolver = cluster.resolve_cluster("slurm", port=7000)
    assert resolver.cluster_spec().as_dict() == {
        "worker": [
            "node9.invalid:7000",
            "node9.invalid:7001",
            "node10.invalid:7000",
        ]
    }
    assert (resolver.task_type, resolver.task_id) == ("worker", rank)
    assert resolver.num_accelerators() == {"GPU": 0}
    assert "CUDA_VISIBLE_DEVICES" not in os.environ


def test_slurm_task_on_another_host_than_expected_is_told(monkeypatch):
    # 192.0.2.0/24 is for documentation; 203.0.113.0/24 too.
    set_slurm(monkeypatch, "203.0.113.1,203.0.113.2", "1,1", 0, 2)
    with pytest.raises(InputError, match="--distribution=block"):
        cluster.resolve_cluster("slurm")


@pytest.mark.parametrize(
    ("nodes", "tasks", "rank", "count"),
    [
        ("n[1-", "1", 0, 1),
        ("n1", "x", 0, 1),
        ("n1", "1", "x", 1),
        ("n1", "2", 0, 3),
        ("n1", "2", 2, 2),
    ],
)
def test_bad_slurm_environment_is_one_line(
    monkeypatch, nodes, tasks, rank, count
):
    set_slurm(monkeypatch, nodes, tasks, rank, count)
    with pytest.raises(InputError) as raised:
        cluster.resolve_cluster("slurm")
    assert "\n" not in str(raised.value)


def pod(name, host, phase="Running"):
    return types.SimpleNamespace(
        metadata=types.SimpleNamespace(name=name),
        status=types.SimpleNamespace(phase=phase, host_ip=host),
    )


@pytest.fixture
def kubernetes(monkeypatch):
    """A Kubernetes client; `.answers` are its lists of pods, one a question."""
    fake = types.ModuleType("kubernetes")
    fake.answers, fake.selectors = [], []

    class ConfigException(Exception):
        pass

    class ApiException(Exception):
        reason = "Forbidden"

    class CoreV1Api:
        def list_pod_for_all_namespaces(self, label_selector):
            fake.selectors.append(label_selector)
            answer = fake.answers.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return types.SimpleNamespace(items=answer)

    fake.config = types.SimpleNamespace(
        ConfigException=ConfigException, load_incluster_config=lambda: None
    )
    fake.client = types.SimpleNamespace(
        CoreV1Api=CoreV1Api, ApiException=ApiException
    )
    monkeypatch.setitem(sys.modules, "kubernetes", fake)
    monkeypatch.setattr(schedulers, "_POD_POLL_SECONDS", 0.0)
    return fake


def test_kubernetes_pods_are_workers_and_late_ones_are_waited_for(kubernetes):
    ready = [pod("b", "127.0.0.1"), pod("a", "203.0.113.1")]
    kubernetes.answers = [
        [],
        [pod("a", "203.0.113.1")],
        [pod("a", "203.0.113.1"), pod("b", None, "Pending")],
        ready,
    ]
    resolver = cluster.resolve_cluster("kubernetes", num_workers=2)
    assert resolver.cluster_spec().as_dict() == {
        "worker": ["203.0.113.1:8470", "127.0.0.1:8470"]
    }
    # The one whose address this machine has.
    assert (resolver.task_type, resolver.task_id) == ("worker", 1)
    assert kubernetes.selectors == ["job-name=tensorflow"] * 4


def test_kubernetes_worker_may_be_told_its_index(kubernetes):
    kubernetes.answers = [[pod("a", "203.0.113.1"), pod("b", "203.0.113.2")]]
    resolver = cluster.resolve_cluster(
        "kubernetes", num_workers=2, worker_index=1, port=9000
    )
    assert resolver.task_id == 1
    assert resolver.cluster_spec().task_address("worker", 1).endswith(":9000")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([pod("a", "203.0.113.1")] * 3, "Expected 2 running pods"),
        ([pod("a", "203.0.113.1"), pod("b", "203.0.113.2")], "None or several"),
        ([pod("a", "127.0.0.1"), pod("b", "127.0.0.1")], "None or several"),
        ("config", "This is no pod"),
        ("api", "refuses to list the pods (Forbidden)"),
    ],
)
def test_unusable_kubernetes_cluster_is_one_line(kubernetes, answer, message):
    errors = {
        "config": kubernetes.config.ConfigException("no token"),
        "api": kubernetes.client.ApiException("Reason:\nForbidden"),
    }
    kubernetes.answers = [errors[answer] if isinstance(answer, str) else answer]
    with pytest.raises(InputError, match=re.escape(message)) as raised:
        cluster.resolve_cluster("kubernetes", num_workers=2)
    assert "\n" not in str(raised.value)


def test_kubernetes_needs_the_number_of_workers(kubernetes):
    with pytest.raises(InputError, match="needs num_workers=N"):
        cluster.resolve_cluster("kubernetes")


def test_missing_kubernetes_package_names_the_pip_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "kubernetes", None)
    with pytest.raises(InputError, match="pip install kubernetes"):
        cluster.resolve_cluster("kubernetes", num_workers=2)


# --- Waiting for the others ------------------------------------------------


@contextlib.contextmanager
def free_addresses(count):
    reserved = launch.reserve_ports(count)
    yield [f"127.0.0.1:{sock.getsockname()[1]}" for sock in reserved]
    for sock in reserved:
        sock.close()


def test_workers_leave_together_whoever_comes_last():
    left = {}

    def arrive(index, delay):
        time.sleep(delay)
        workers.wait_for_workers(addresses, index, 20)
        left[index] = time.monotonic()
        # TensorFlow's server takes over: whoever is late still finds it.
        port = workers.split_address(addresses[index])[1]
        servers.append(socket.create_server(("127.0.0.1", port)))

    servers = []
    with free_addresses(3) as addresses:
        start = time.monotonic()
        threads = [
            threading.Thread(target=arrive, args=(index, delay))
            for index, delay in enumerate([0.0, 1.0, 0.2])
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
    for server in servers:
        server.close()
    assert sorted(left) == [0, 1, 2]
    assert min(left.values()) - start >= 1.0
    assert max(left.values()) - start < 3.0


def test_missing_worker_is_named_when_the_time_is_over(monkeypatch, capsys):
    monkeypatch.setattr(workers, "_NOTICE_SECONDS", 0.1)
    with free_addresses(2) as addresses:
        message = f"Waited 1 s for worker 1 ({addresses[1]})"
        with pytest.raises(WorkerLostError, match=re.escape(message)):
            workers.wait_for_workers(addresses, 0, 1)
    notices = capsys.readouterr().err.splitlines()
    assert notices
    assert set(notices) == {
        f"tfamp: worker 0 waits for worker 1 ({addresses[1]})"
    }


def test_taken_port_is_told_before_anyone_waits():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(InputError, match=f"Port {port} of worker 0 is ta"):
            workers.wait_for_workers([f"127.0.0.1:{port}", "127.0.0.1:1"], 0)


# --- Lost workers ----------------------------------------------------------

LOST = (
    "Collective ops is aborted by: Error reported from /job:worker/task:1: "
    "The following tasks are unhealthy (stopped sending heartbeats):\n"
    "/job:worker/replica:0/task:1"
)


@pytest.mark.parametrize(
    "error",
    [
        tf.errors.UnavailableError,
        tf.errors.AbortedError,
        tf.errors.InternalError,
        tf.errors.DeadlineExceededError,
    ],
)
def test_lost_worker_is_named_in_one_line(error):
    with (
        pytest.raises(WorkerLostError, match="worker 1 stopped ans") as raised,
        cluster.worker_errors(),
    ):
        raise error(None, None, LOST)
    assert "\n" not in str(raised.value)
    assert isinstance(raised.value.__cause__, error)


@pytest.mark.parametrize(
    "error",
    [
        tf.errors.UnavailableError(None, None, "Bucket is not available"),
        tf.errors.InvalidArgumentError(None, None, LOST),
        tf.errors.InternalError(
            None,
            None,
            "Collective ops is aborted by: Collective instance 212 expected "
            "type 0 and data_type 9 but got type 0 and data_type 1",
        ),
        ValueError(LOST),
    ],
)
def test_other_errors_pass_unchanged(error):
    with pytest.raises(type(error)) as raised, cluster.worker_errors():
        raise error
    assert raised.value is error


# --- TPU -------------------------------------------------------------------


@pytest.fixture
def tpu_calls(monkeypatch):
    calls = []
    monkeypatch.setattr(
        tf.distribute.cluster_resolver,
        "TPUClusterResolver",
        lambda tpu: calls.append(("resolve", tpu)) or "resolver",
    )
    for owner, name in (
        (tf.config, "experimental_connect_to_cluster"),
        (tf.tpu.experimental, "initialize_tpu_system"),
        (tf.distribute, "TPUStrategy"),
    ):
        monkeypatch.setattr(
            owner, name, lambda r, n=name: calls.append((n, r)) or n
        )
    return calls


@pytest.mark.parametrize(("name", "tpu"), [("", "local"), ("pod-1", "pod-1")])
def test_tpu_is_connected_then_started_then_used(tpu_calls, name, tpu):
    assert cluster.tpu_strategy(name) == "TPUStrategy"
    assert tpu_calls == [
        ("resolve", tpu),
        ("experimental_connect_to_cluster", "resolver"),
        ("initialize_tpu_system", "resolver"),
        ("TPUStrategy", "resolver"),
    ]


@pytest.mark.parametrize(
    "error",
    [
        tf.errors.NotFoundError(None, None, "TPUs not found\nin the cluster."),
        ValueError("Please provide a TPU Name to connect to."),
        OSError("Name or service not known"),
    ],
)
def test_missing_tpu_is_one_line(tpu_calls, monkeypatch, error):
    def fail(_):
        raise error

    monkeypatch.setattr(tf.tpu.experimental, "initialize_tpu_system", fail)
    with pytest.raises(InputError, match="No TPU 'pod-1' answers") as raised:
        cluster.tpu_strategy("pod-1")
    assert "\n" not in str(raised.value)


# --- Real processes --------------------------------------------------------

# How a worker of each job below behaves after the first all-reduces.
WORKER = """
import json, os, pathlib, signal, socket, sys, time
import tensorflow as tf
from tfamp.distribute import cluster
from tfamp.errors import InputError, WorkerLostError

folder, how = pathlib.Path(sys.argv[1]), sys.argv[2]
resolver = cluster.resolve_cluster()
index = resolver.task_id
if how == "well":
    signal.signal(signal.SIGTERM, lambda *_: say("handled SIGTERM"))
    time.sleep(3 * index)

def say(*words):
    print(*words, flush=True)

@tf.function
def total(steps):
    result = tf.zeros([])
    for _ in tf.range(steps):
        result += tf.reduce_sum(strategy.run(all_reduced))
    return result

def all_reduced():
    here = tf.fill([2], index + 1.0)
    return tf.distribute.get_replica_context().all_reduce("SUM", here)

try:
    with cluster.worker_errors():
        strategy = cluster.multi_worker_strategy(resolver)
        say("total", float(total(10)))
        (folder / f"ready.{index}").touch()
        if how == "well":
            # Longer than TensorFlow's 10 s without heartbeat.
            time.sleep(12 * index)
            say("total", float(total(10)))
            # The test that knocks at the ports may come late.
            while not (folder / "released").exists():
                time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGTERM)
        elif how == "raise" and index == 1:
            raise KeyError("a bug")
        else:
            while True:
                total(10)
except WorkerLostError as error:
    say("lost", time.time(), error)
    sys.exit(75)
"""


class ClusterJob:
    """Two workers on loopback, in processes of their own."""

    def __init__(self, folder, how):
        self.folder = folder
        self.reserved = launch.reserve_ports(2)
        self.ports = [sock.getsockname()[1] for sock in self.reserved]
        (folder / "worker.py").write_text(textwrap.dedent(WORKER))
        self.outputs = [folder / f"out.{index}" for index in range(2)]
        self.workers = []
        environments = launch.worker_environments(
            self.ports, {**os.environ, "PYTHONPATH": str(ROOT)}
        )
        for output, environment in zip(self.outputs, environments, strict=True):
            with output.open("w") as stream:
                self.workers.append(
                    subprocess.Popen(
                        [sys.executable, folder / "worker.py", folder, how],
                        env=environment,
                        stdout=stream,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )

    def wait_ready(self):
        deadline = time.monotonic() + LIMIT_SECONDS
        ready = [self.folder / f"ready.{index}" for index in range(2)]
        while not all(path.exists() for path in ready):
            assert time.monotonic() < deadline, self.text(0) + self.text(1)
            time.sleep(0.05)

    def release(self):
        """Lets the workers of a job that goes well come to their end."""
        (self.folder / "released").touch()

    def text(self, index):
        return self.outputs[index].read_text()

    def lines(self, index, word):
        return [
            line
            for line in self.text(index).splitlines()
            if line.startswith(f"{word} ")
        ]

    def close(self):
        for worker in self.workers:
            worker.kill()
            worker.wait()
        for sock in self.reserved:
            sock.close()


@pytest.fixture(scope="module")
def job_of(tmp_path_factory):
    """The job that ends that way, which starts once."""

    @functools.cache
    def start(how):
        started.append(ClusterJob(tmp_path_factory.mktemp(how), how))
        return started[-1]

    started = []
    yield start
    for job in started:
        job.close()


def assert_lost(job, index, other, since):
    assert job.workers[index].wait(timeout=LIMIT_SECONDS) == 75
    (line,) = job.lines(index, "lost")
    _, when, message = line.split(" ", 2)
    assert message.startswith(f"worker {other} stopped answering")
    assert float(when) - since <= workers.WORKER_LOST_SECONDS
    # It ended by itself, and soon.
    assert time.time() - float(when) < 10
    return float(when) - since


@pytest.mark.parametrize("victim", mostly_slow([0, 1], always=[0]))
def test_killed_worker_ends_the_other_within_the_stated_time(
    tmp_path, job_of, victim
):
    job = job_of("kill") if victim else ClusterJob(tmp_path, "kill")
    try:
        job.wait_ready()
        killed = time.time()
        job.workers[victim].kill()
        assert_lost(job, 1 - victim, victim, killed)
    finally:
        job.close()


@pytest.mark.slow
def test_worker_that_leaves_by_an_error_ends_the_other(job_of):
    job = job_of("raise")
    assert job.workers[1].wait(timeout=LIMIT_SECONDS) == 1
    left = time.time()
    assert "KeyError: 'a bug'" in job.text(1)
    assert_lost(job, 0, 1, left)


@pytest.mark.slow
def test_server_on_loopback_answers_no_other_address(job_of):
    outside = outside_address()
    if outside is None or not sys.platform.startswith("linux"):
        pytest.skip("this machine has no address but loopback")
    job = job_of("well")
    job.wait_ready()
    for port in job.ports:
        socket.create_connection(("127.0.0.1", port), 2).close()
        with pytest.raises(TimeoutError):
            socket.create_connection((outside, port), 1)


@pytest.mark.slow
def test_late_and_slow_workers_are_waited_for_and_sums_are_right(job_of):
    job = job_of("well")
    job.release()
    for index in range(2):
        status = job.workers[index].wait(timeout=LIMIT_SECONDS)
        assert status == 0, job.text(index)
        # Ten times two elements of 1.0 + 2.0.
        assert job.lines(index, "total") == ["total 60.0"] * 2


@pytest.mark.slow
def test_sigterm_still_reaches_the_handler_of_the_program(job_of):
    job = job_of("well")
    job.release()
    for index in range(2):
        assert job.workers[index].wait(timeout=LIMIT_SECONDS) == 0
        assert job.lines(index, "handled") == ["handled SIGTERM"]


def test_filter_spares_ipv6_loopback_and_ends_what_was_open_before():
    outside = outside_address()
    if outside is None or not sys.platform.startswith("linux"):
        pytest.skip("this machine has no address but loopback")
    with socket.socket(socket.AF_INET6) as server:
        server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        server.bind(("::", 0))
        server.listen()
        port = server.getsockname()[1]
        early = socket.create_connection((outside, port), 2)
        accepted, _ = server.accept()
        assert loopback.accept_loopback_only(port)
        with early, accepted:
            early.settimeout(2)
            assert early.recv(1) == b""
        for host in ("127.0.0.1", "127.1.2.3", "::1"):
            socket.create_connection((host, port), 2).close()
        with pytest.raises(TimeoutError):
            socket.create_connection((outside, port), 0.5)


def test_filter_says_when_there_is_nothing_to_filter():
    with free_addresses(1) as (address,):
        port = workers.split_address(address)[1]
        assert not loopback.accept_loopback_only(port)


def outside_address():
    """An address of this machine other than loopback, if it has one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            # Connecting a datagram socket sends nothing.
            sock.connect(("203.0.113.1", 9))
        except OSError:
            return None
        return sock.getsockname()[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setup", "message"),
    [
        (
            "tf.constant(0.0) + 1; tf.config.list_logical_devices()",
            "TensorFlow has started already",
        ),
        pytest.param(
            "server = socket.create_server(('', port))",
            "is taken on this host",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_strategy_that_cannot_start_is_one_line(setup, message):
    script = f"""
    import socket
    import tensorflow as tf
    from tfamp.distribute import cluster
    from tfamp.errors import InputError

    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    {setup}
    resolver = cluster.resolve_cluster(
        workers=(f"127.0.0.1:{{port}}",), worker_index=0
    )
    try:
        cluster.multi_worker_strategy(resolver)
    except InputError as error:
        print(error)
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
    )
    assert message in result.stdout, result.stderr
    assert result.stdout.count("\n") == 1


@pytest.mark.parametrize(("gpus", "expected"), [([], "RING"), (["0"], "NCCL")])
def test_workers_with_gpus_ask_for_nccl(monkeypatch, gpus, expected):
    """AUTO would mean a ring over gRPC."""
    resolver = cluster.resolve_cluster(workers=["127.0.0.1:1"], worker_index=0)
    asked = []
    monkeypatch.setattr(
        tf.config, "list_physical_devices", lambda kind=None: gpus
    )
    monkeypatch.setattr(
        tf.distribute,
        "MultiWorkerMirroredStrategy",
        lambda resolver, options: asked.append(options.implementation.value),
    )
    monkeypatch.setattr(cluster, "accept_loopback_only", lambda port: None)
    cluster.multi_worker_strategy(resolver)
    assert asked == [expected]
