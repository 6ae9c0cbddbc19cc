"""The command that this process was started with, for who repeats it."""

import shlex
import sys
from collections.abc import Sequence


def written(argv: Sequence[str] | None = None) -> str:
    """A command as a shell takes it.

    Args:
        argv: program and arguments; those of this process if None.
    """
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    if argv is None and spec is not None:
        name = spec.name.removesuffix(".__main__")
        return shlex.join(["python", "-m", name, *sys.argv[1:]])
    program, *arguments = sys.argv if argv is None else argv
    # The folder that the program lies in says nothing to another reader.
    program = program.replace("\\", "/").rpartition("/")[2]
    start = ["python"] if program.endswith(".py") else []
    return shlex.join([*start, program, *arguments])
