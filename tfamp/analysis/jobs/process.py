"""The process between a job and who started it; it leaves nothing behind.

    python -m tfamp.analysis.jobs.process ARGUMENTS...

Runs Python with the arguments, and ends with its status (128 + N where signal
N ended it). Standard input is a pipe from the starter. Its end says that the
starter is gone or wants no more: the job and all processes below it are then
killed, as what a job left running is when it ends. On Linux none can slip
away; elsewhere only the job itself is killed.
"""

import os
import subprocess
import sys
import threading
from collections.abc import Sequence

from tfamp.distribute.process_tree import adopt_orphans, kill_descendants


def main(arguments: Sequence[str]) -> int:
    """Runs the job.

    Args:
        arguments: of the Python interpreter.

    Returns:
        The exit status.
    """
    adopt_orphans()
    job = subprocess.Popen(
        [sys.executable, *arguments], stdin=subprocess.DEVNULL
    )
    threading.Thread(target=_end_with_starter, args=[job], daemon=True).start()
    code = job.wait()
    kill_descendants()
    return code if code >= 0 else 128 - code


def _end_with_starter(job: subprocess.Popen) -> None:
    os.read(sys.stdin.fileno(), 1)
    job.kill()
    kill_descendants()
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
