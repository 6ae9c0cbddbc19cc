"""The errors that tfamp raises on purpose.

Everything else that escapes is a bug and keeps its traceback.
"""

import difflib
from collections.abc import Iterable

# An assertion in a tf.data pipeline or a graph cannot raise InputError. One
# whose message starts so becomes one.
INPUT_ERROR_MARK = "tfamp input: "


class InputError(ValueError):
    """What the caller gave cannot be used; the message says what can.

    One line: what came, what is allowed, and the fix if there is one. The
    command line prints it without a traceback and exits with status 2.
    """


class LossScaleError(RuntimeError):
    """Training cannot go on: the scale is at its floor and still overflows."""


class JobError(RuntimeError):
    """A process that was started for its result failed.

    Attributes:
        status: its exit status, 128 + N where signal N ended it; None where
            it took too long and was killed.
        last_line: the last line of its output.
    """

    def __init__(self, message: str, status: int | None, last_line: str):
        super().__init__(message)
        self.status = status
        self.last_line = last_line


class WorkerLostError(RuntimeError):
    """Another worker stopped answering, or never came; this one must stop.

    One line, which names that worker. The job can be started again: with a
    checkpoint folder it resumes.
    """


class SaveError(RuntimeError):
    """The run cannot be saved: a disk is full, a folder is gone.

    One line. What was saved before is whole, and a job that is started again
    goes on from it where the trouble has passed; recipes end with status 75.
    """


class Preempted(SystemExit):
    """SIGTERM came; the run is saved and goes on when it is started again.

    A `SystemExit`: uncaught, it ends the process with status 75 (EX_TEMPFAIL
    of sysexits.h, "try again later"), on which schedulers restart.
    """

    STATUS = 75

    def __init__(self, message: str):
        super().__init__(self.STATUS)
        self.message = message

    def __str__(self) -> str:
        return self.message


def did_you_mean(
    given: str, known: Iterable[str], prefix: str = "", likeness: float = 0.6
) -> str:
    """The end of a message: the known name that is like the one that came.

    Args:
        given: what came.
        known: what is allowed.
        prefix: stands before the name, as it is typed.
        likeness: from 0 to 1; below it nothing is suggested.

    Returns:
        A sentence with a blank before it; empty where no name is near.
    """
    close = difflib.get_close_matches(str(given), list(known), 1, likeness)
    return f" Did you mean {prefix}{close[0]}?" if close else ""
