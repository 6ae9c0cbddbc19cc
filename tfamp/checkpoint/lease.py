"""One job at a time in a folder: a file says whose it is, and is renewed.

Whether a job of this machine lives, the system tells. One of another machine
shows that it lives by changing the file, on any file system that
`tf.io.gfile` knows, and by nothing else: clocks of machines differ.
"""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

import tensorflow as tf
from absl import logging

from tfamp.checkpoint import place
from tfamp.errors import InputError, Preempted

FILE_NAME = ".tfamp-lease"
RENEWAL_SECONDS = 5.0
# Without a sign of life for so long, a job of another machine counts as dead.
STALE_SECONDS = 30.0

_POLL_SECONDS = 0.2
# Whoever writes last has it: two that write at once both look again after it.
_SETTLE_SECONDS = 0.3
# Renewals write over the same bytes, which a full disk has room for.
_BYTES = 512


class Lease:
    """This job's hold on a folder.

    Args:
        directory: the folder, which exists.
        is_ended: whether this process was told to end; asked while it waits.
    """

    def __init__(
        self, directory: str, is_ended: Callable[[], bool] = lambda: False
    ):
        self._directory = directory
        self._path = os.path.join(directory, FILE_NAME)
        self._is_ended = is_ended
        self._own = (
            _machine() | _process(os.getpid()) | {"id": uuid.uuid4().hex}
        )
        self._renewals = 0
        self._is_released = threading.Event()
        self._lock = threading.Lock()

    def take(self) -> None:
        """Returns when the folder is this job's.

        Raises:
            InputError: where it is another's, which lives.
            Preempted: where this process was told to end meanwhile.
        """
        found = self._read()
        if found is not None:
            self._check_dead(found)
        if not self._create(found is None):
            self._write()
            time.sleep(_SETTLE_SECONDS)
        # Another may have taken it at the same moment.
        now = self._read()
        if now is None or now.get("id") != self._own["id"]:
            raise self._in_use(now or {})
        threading.Thread(target=self._renew, daemon=True).start()

    def check(self) -> None:
        """Call it before anything is written.

        Raises:
            InputError: where another job took the folder over meanwhile.
        """
        with self._lock:
            found = self._read()
            if found is None:
                # The folder was emptied; whoever did it is gone.
                self._write()
            elif not tf.io.gfile.isdir(self._directory):
                raise InputError(
                    f"{self._directory} is no directory any more; give "
                    "another checkpoint_dir."
                )
            elif found.get("id") != self._own["id"]:
                raise InputError(
                    f"{_described(found)} took over {self._directory} while "
                    "this job stood still; this one ends and leaves it alone."
                )

    def release(self) -> None:
        """Lets others have it; safe to call at any time."""
        self._is_released.set()
        with self._lock, contextlib.suppress(tf.errors.OpError, OSError):
            if (self._read() or {}).get("id") == self._own["id"]:
                place.remove(self._path)

    def _check_dead(self, found: dict[str, Any]) -> None:
        if all(found.get(key) == self._own[key] for key in _machine()):
            if _process(found.get("pid", -1)) == {
                key: found.get(key) for key in ("pid", "started")
            }:
                raise self._in_use(found)
            return
        logging.warning(
            "%s used %s; waiting %.0f s for a sign that it lives.",
            _described(found),
            self._directory,
            STALE_SECONDS,
        )
        begin = time.monotonic()
        while time.monotonic() - begin < STALE_SECONDS:
            if self._is_ended():
                raise Preempted(
                    "SIGTERM: nothing was trained yet; start the same command "
                    "again to go on."
                )
            time.sleep(_POLL_SECONDS)
            now = self._read()
            if now is None:
                return
            if now != found:
                raise self._in_use(now)

    def _in_use(self, found: dict[str, Any]) -> InputError:
        return InputError(
            f"{_described(found)} uses {self._directory}; wait until it has "
            "ended, or choose another checkpoint_dir."
        )

    def _create(self, is_free: bool) -> bool:
        """Whether nobody else can have made the file at the same time."""
        if not is_free or not place.is_local(self._path):
            return False
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
            descriptor = os.open(self._path, flags, 0o666)
        except FileExistsError:
            return False
        with os.fdopen(descriptor, "w") as file:
            file.write(self._text())
        return True

    def _write(self) -> None:
        if place.is_local(self._path) and not place.is_link(self._path):
            with contextlib.suppress(FileNotFoundError):
                with open(self._path, "r+", encoding="utf-8") as file:
                    file.write(self._text())
                return
        place.write_text(self._path, self._text())

    def _text(self) -> str:
        own = self._own | {"renewals": self._renewals}
        return json.dumps(own).ljust(_BYTES)

    def _read(self) -> dict[str, Any] | None:
        """What the file says; None where there is no file."""
        for _ in range(5):
            try:
                with tf.io.gfile.GFile(self._path) as file:
                    found = json.loads(file.read())
            except tf.errors.NotFoundError:
                return None
            except (ValueError, tf.errors.FailedPreconditionError):
                # It is being written, or was, by a process that was killed.
                time.sleep(_POLL_SECONDS / 4)
                continue
            return found if isinstance(found, dict) else {}
        return {}

    def _renew(self) -> None:
        while not self._is_released.wait(RENEWAL_SECONDS):
            # A file system that is away for a moment is no reason to stop.
            with self._lock, contextlib.suppress(tf.errors.OpError, OSError):
                found = self._read()
                if self._is_released.is_set() or found is None:
                    continue
                if found.get("id") != self._own["id"]:
                    return
                self._renewals += 1
                self._write()


def _described(found: dict[str, Any]) -> str:
    if "pid" not in found:
        return "Another job"
    return f"Another job (process {found['pid']} on {found.get('host')})"


def _machine() -> dict[str, Any]:
    """What tells whether a process number means something here."""
    names = {
        "boot": lambda: _text_in("/proc/sys/kernel/random/boot_id"),
        "namespace": lambda: os.readlink("/proc/self/ns/pid"),
    }
    machine: dict[str, Any] = {"host": socket.gethostname()}
    for key, value in names.items():
        machine[key] = None
        with contextlib.suppress(OSError):
            machine[key] = value()
    return machine


def _process(number: int) -> dict[str, Any]:
    """The process of this number here, and when it began; {} for none."""
    try:
        fields = _text_in(f"/proc/{number}/stat").rpartition(")")[2].split()
    except OSError:
        if os.path.isdir("/proc/self"):
            return {}
        with contextlib.suppress(OSError, TypeError):
            os.kill(number, 0)
            return {"pid": number, "started": None}
        return {}
    # Dead, and not yet asked for its status.
    is_dead = fields[0] in "ZX"
    return {} if is_dead else {"pid": number, "started": fields[19]}


def _text_in(path: str) -> str:
    with open(path, encoding="utf-8") as file:
        return file.read().strip()
