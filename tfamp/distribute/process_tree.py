"""Runs work in a process of its own, and leaves no process of it behind.

Two processes watch over each other. The caller waits; a fork of it does the
work and starts further processes. On Linux both adopt the orphans below them
(PR_SET_CHILD_SUBREAPER), so that a descendant cannot slip away by starting a
session of its own or by losing its parent. When the work ends, or its process
is killed, the caller kills what is left; when the caller is killed, the pipe
between them breaks, and the fork kills what it started. Only SIGKILL to both
at once goes unnoticed. Elsewhere than on Linux none of this is there: work
must end its own processes, and they live on when both are killed.
"""

import contextlib
import ctypes
import os
import pathlib
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable

_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
_PASSED_ON = (signal.SIGINT, signal.SIGTERM)


def run_guarded(work: Callable[[queue.SimpleQueue], int]) -> int:
    """Calls `work` in a forked process, and passes SIGINT and SIGTERM on.

    To be called from the main thread, before there are others.

    Args:
        work: gets a queue that receives the signals as `signal.Signals`, and
            returns an exit status.

    Returns:
        That status; 128 + N where signal N ended the forked process.
    """
    adopt_orphans()
    # A signal that comes before the handlers are there waits.
    signal.pthread_sigmask(signal.SIG_BLOCK, _PASSED_ON)
    lifeline, held_end = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(held_end)
        _work_and_exit(work, lifeline)
    os.close(lifeline)

    def pass_on(number, _frame):
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, number)

    before = {number: signal.signal(number, pass_on) for number in _PASSED_ON}
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _PASSED_ON)
    try:
        _, status = os.waitpid(child, 0)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        kill_descendants()
        os.close(held_end)
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def adopt_orphans() -> None:
    """Makes this process the parent of all that lose theirs below it."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def kill_descendants() -> None:
    """Kills all processes below this one with SIGKILL, and waits for them."""
    while True:
        alive = _descendants()
        for pid in alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        # A process that forked meanwhile leaves an orphan, which is ours now.
        if not alive:
            return
        time.sleep(0.01)


def _work_and_exit(work, lifeline):
    status = 1
    try:
        # Out of the terminal's foreground group: Ctrl-C comes once, passed on.
        os.setsid()
        adopt_orphans()
        threading.Thread(
            target=_die_with_caller, args=(lifeline,), daemon=True
        ).start()
        events: queue.SimpleQueue = queue.SimpleQueue()
        for number in _PASSED_ON:
            signal.signal(number, lambda n, _: events.put(signal.Signals(n)))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _PASSED_ON)
        status = work(events)
    except BaseException:
        # Nothing above this frame may run twice, once in each process.
        sys.excepthook(*sys.exc_info())
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(status)


def _die_with_caller(lifeline):
    os.read(lifeline, 1)  # Nothing is ever written: this is its end.
    kill_descendants()
    os._exit(1)


def _descendants():
    """The processes below this one, zombies apart; [] elsewhere than Linux."""
    children: dict[int, list[int]] = {}
    for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # The name stands in parentheses, and may hold any character.
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
            if state not in "ZX":
                children.setdefault(int(parent), []).append(
                    int(path.parent.name)
                )
    found, pending = [], [os.getpid()]
    while pending:
        below = children.get(pending.pop(), [])
        found += below
        pending += below
    return found
