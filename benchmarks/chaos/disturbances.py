"""What happens to a process, and what happens to its files."""

import contextlib
import os
import pathlib
import random
import resource
import signal
import subprocess
import time

# Each but the last may end the process; the ones after it find it dead.
KINDS = (
    "SIGKILL",
    "SIGTERM",
    "SIGSTOP",
    "full disk",
    "torn file",
    "flipped bit",
    "read-only folder",
)

# What processes end with then: done, told to end or to be started again, or
# bad input. A worker that has lost another asks to be started again.
_AFTER = {
    "SIGKILL": (0, 75, -9),
    "SIGTERM": (0, 75),
    "SIGSTOP": (0, 75),
    "full disk": (0, 75),
    "torn file": (0, 75, -9),
    "flipped bit": (0, 75, -9),
    "read-only folder": (0, 2, 75),
}


def statuses_after(kind: str | None) -> tuple[int, ...]:
    """The exit statuses that are right; of None, where nothing happened."""
    return (0,) if kind is None else _AFTER[kind]


class Disturbed:
    """One disturbance of a running process.

    Args:
        kind: one of `KINDS`.
        checkpoints: the folder of its checkpoints.
        generator: of random choices.
        stop_seconds: how long SIGSTOP lasts.
    """

    def __init__(
        self,
        kind: str,
        checkpoints: pathlib.Path,
        generator: random.Random,
        stop_seconds: float,
    ):
        self._kind = kind
        self._checkpoints = checkpoints
        self._generator = generator
        self._stop_seconds = stop_seconds

    def strike(self, pid: int) -> None:
        """Disturbs the process, which may have ended by itself."""
        with contextlib.suppress(ProcessLookupError):
            match self._kind:
                case "SIGTERM":
                    os.kill(pid, signal.SIGTERM)
                case "SIGSTOP":
                    os.kill(pid, signal.SIGSTOP)
                    time.sleep(self._stop_seconds)
                    os.kill(pid, signal.SIGCONT)
                    # It goes on; the job is to end all the same.
                    os.kill(pid, signal.SIGTERM)
                case "full disk":
                    # For this process no file can grow beyond some bytes.
                    resource.prlimit(
                        pid,
                        resource.RLIMIT_FSIZE,
                        (600, resource.RLIM_INFINITY),
                    )
                case "read-only folder":
                    self._make_immutable("+i")
                case _:
                    os.kill(pid, signal.SIGKILL)

    def aftermath(self) -> None:
        """What is left of it for the next start."""
        if self._kind == "read-only folder":
            self._make_immutable("-i")
        files = sorted(
            path
            for path in self._checkpoints.glob("ckpt-*")
            if path.is_file() and path.stat().st_size
        )
        if self._kind not in ("torn file", "flipped bit") or not files:
            return
        newest = max(files, key=lambda path: path.stat().st_mtime_ns)
        content = bytearray(newest.read_bytes())
        place = self._generator.randrange(len(content))
        if self._kind == "torn file":
            content = content[:place]
        else:
            content[place] ^= 1 << self._generator.randrange(8)
        newest.write_bytes(content)

    def _make_immutable(self, flag: str) -> None:
        """As root, for whom permissions do not count; or by permissions."""
        if not self._checkpoints.exists():
            return
        if os.geteuid() == 0:
            subprocess.run(
                ["chattr", flag, str(self._checkpoints)],
                stderr=subprocess.DEVNULL,
                check=False,
            )
        else:
            self._checkpoints.chmod(0o555 if flag == "+i" else 0o755)
