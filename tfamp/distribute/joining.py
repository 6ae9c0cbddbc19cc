"""A bound on the call in which TensorFlow joins a cluster.

That call holds the interpreter: meanwhile no thread of Python runs and no
signal is handled. Where another worker dies just then, it may not return.
"""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator

# It ends with what it watches, or when it is told to.
_WATCH = """
import os, select, signal, sys
seconds, process, line = sys.argv[1:]
if not select.select([sys.stdin], [], [], float(seconds))[0]:
    print(line, file=sys.stderr, flush=True)
    os.kill(int(process), signal.SIGKILL)
"""


@contextlib.contextmanager
def killed_after(seconds: float, line: str) -> Iterator[None]:
    """Within it, this process lives so long at most.

    Args:
        seconds: After them another process writes the line and kills this one
            with SIGKILL, which alone reaches it.
        line: for stderr.
    """
    if os.name != "posix":
        yield
        return
    command = [sys.executable, "-I", "-S", "-c", _WATCH]
    watch = subprocess.Popen(
        [*command, str(seconds), str(os.getpid()), line],
        stdin=subprocess.PIPE,
        # Ctrl-C is for the process that is watched.
        start_new_session=True,
    )
    try:
        yield
    finally:
        watch.communicate()
