"""The other workers: waiting for the late, telling who was lost.

TensorFlow's coordination service watches over a running job. Every worker
sends the first one a heartbeat, from a thread of its own, so a worker that
computes, loads data or saves for long is not mistaken for a dead one.
"""

import contextlib
import errno
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence

import tensorflow as tf

from tfamp.distribute import vigil
from tfamp.distribute.loopback import is_loopback
from tfamp.errors import InputError, WorkerLostError

# TensorFlow calls a worker lost after 10 s without heartbeat. The first one is
# found missing by the others' next heartbeat, every 5 s, which itself may take
# 10 s to fail if that host no longer answers at all.
WORKER_LOST_SECONDS = 20
START_TIMEOUT_SECONDS = 3600.0
# From when all have come to where all have joined: TensorFlow starts there.
JOIN_SECONDS = 240

_POLL_SECONDS = 0.2
_NOTICE_SECONDS = 10.0

_LOST = (
    tf.errors.AbortedError,
    tf.errors.CancelledError,
    tf.errors.DeadlineExceededError,
    tf.errors.FailedPreconditionError,
    tf.errors.InternalError,
    tf.errors.UnavailableError,
    tf.errors.UnknownError,
)
# A file system or a data service can be unavailable too; these say that it
# was a worker.
_LOST_MARKS = re.compile(
    r"Collective ops is aborted|CoordinationService|coordination service"
    r"|tensorflow\.WorkerService|different incarnation",
    re.IGNORECASE,
)
# Workers that do different things abort each other too; that is a bug, and
# keeps its traceback.
_OUT_OF_STEP_MARKS = re.compile(r"expected (type|shape)|mismatch")
# The most certain first: the rest of a line, and the lines that list tasks.
_SEEN_DEAD = (
    re.compile(r"stopped sending heartbeats\)?:(\s*/job:\S+)+"),
    re.compile(r"remote target /job:\S+"),
)
_TASK = re.compile(r"/job:(\w+)/(?:replica:\d+/)?task:(\d+)")


@contextlib.contextmanager
def worker_errors() -> Iterator[None]:
    """Turns what TensorFlow raises when another worker is lost into one line.

    TensorFlow raises at the next all-reduce, at most `WORKER_LOST_SECONDS`
    after a worker died. It cannot go on afterwards in this process, which can
    save nothing that needs an all-reduce, but exits normally. Where it does not
    raise, `tfamp.distribute.vigil` ends the process within a minute and a half.

    Raises:
        WorkerLostError: instead of a `tf.errors.OpError` about a lost worker.
            Any other error passes unchanged.
    """
    try:
        with vigil.needs_all():
            yield
    except _LOST as error:
        found = lost_by(error)
        if found is None:
            raise
        raise found from error


def lost_by(error: BaseException) -> WorkerLostError | None:
    """What an error of TensorFlow says of other workers, if anything."""
    if not isinstance(error, _LOST):
        return None
    message = f"{error.message}"
    is_lost = _LOST_MARKS.search(message)
    if not is_lost or _OUT_OF_STEP_MARKS.search(message):
        return None
    return lost(_lost_workers(message))


def lost(names: str) -> WorkerLostError:
    """The error for workers that stopped answering."""
    return WorkerLostError(told_of_lost(names))


def told_of_lost(names: str) -> str:
    return (
        f"{names} stopped answering, and training cannot go on; the output of "
        "the first that ended says why. Restart the job: it resumes from its "
        "checkpoint_dir, if it has one."
    )


def wait_for_workers(
    addresses: Sequence[str],
    index: int,
    timeout_seconds: float = START_TIMEOUT_SECONDS,
) -> None:
    """Returns when every worker has come to this call, or runs already.

    TensorFlow waits too, for an hour, but inside one native call that holds
    the interpreter: Ctrl-C and SIGTERM do nothing then, and no one learns whom
    it waits for. So the waiting is done here, with a socket that listens on
    this worker's port until TensorFlow's server takes over.

    Args:
        addresses: "host:port" of all workers.
        index: which of them this process is.
        timeout_seconds: how long to wait.

    Raises:
        InputError: this worker's port is taken, or may not be used.
        WorkerLostError: some workers did not come in time.
    """
    host, port = split_address(addresses[index])
    missing = {i: a for i, a in enumerate(addresses) if i != index}
    start = time.monotonic()
    notice = _NOTICE_SECONDS
    with _listen(host, port, index):
        while True:
            missing = {i: a for i, a in missing.items() if not _answers(a)}
            waited = time.monotonic() - start
            if not missing:
                return
            names = ", ".join(f"{i} ({a})" for i, a in missing.items())
            if waited > timeout_seconds:
                raise WorkerLostError(
                    f"Waited {timeout_seconds:.0f} s for worker {names}; "
                    "start all workers, and check that their ports can be "
                    "reached from here."
                )
            if waited > notice:
                notice *= 2
                print(
                    f"tfamp: worker {index} waits for worker {names}",
                    file=sys.stderr,
                    flush=True,
                )
            time.sleep(_POLL_SECONDS)


@contextlib.contextmanager
def keep_signal_handlers() -> Iterator[None]:
    """Puts SIGTERM back to what it did before the block.

    TensorFlow's server takes SIGTERM for itself, as the notice of a
    preemption, and then nothing happens: the process neither ends nor runs
    the Python handler that was installed before.
    """
    try:
        yield
    finally:
        # Python keeps signals to the main thread. A handler from C is None.
        handler = signal.getsignal(signal.SIGTERM)
        in_main = threading.current_thread() is threading.main_thread()
        if in_main and handler is not None:
            signal.signal(signal.SIGTERM, handler)


def split_address(address: str) -> tuple[str, int]:
    """Host and port of "host:port" or "[IPv6]:port".

    Raises:
        InputError: it is neither.
    """
    match = re.fullmatch(
        r"([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]):(\d{1,5})", str(address)
    )
    if match is None or not 0 < int(match[2]) < 65536:
        raise InputError(
            f"Worker address {address!r} is not host:port, such as "
            "10.0.0.1:2222, with a port from 1 to 65535."
        )
    return match[1].strip("[]"), int(match[2])


def _listen(host, port, index):
    loopback = is_loopback(host)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family)
    try:
        # As TensorFlow's server does: connections of a former job that the
        # kernel still remembers do not count as a taken port.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host if loopback else "", port))
        sock.listen()
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            raise port_taken(port, index) from None
        raise InputError(
            f"Cannot listen on port {port} of worker {index}: "
            f"{error.strerror}; choose a free port above 1023."
        ) from None
    return sock


def port_taken(port: int, index: int) -> InputError:
    """The error for a port that another program listens on."""
    return InputError(
        f"Port {port} of worker {index} is taken on this host, perhaps by a "
        "worker that still runs; end that program or choose another port."
    )


def _answers(address):
    try:
        socket.create_connection(split_address(address), timeout=1.0).close()
    except OSError:
        return False
    return True


def _lost_workers(message):
    """The first that was lost, as far as the message tells.

    A worker that stops because of another is soon missed itself, and every
    worker is named where it reports what it saw.
    """
    for mark in _SEEN_DEAD:
        found = mark.search(message)
        tasks = sorted(set(_TASK.findall(found[0]))) if found else []
        if tasks:
            break
    else:
        tasks = sorted(set(_TASK.findall(message)))
    return " and ".join(f"{job} {number}" for job, number in tasks) or (
        "Another worker"
    )
