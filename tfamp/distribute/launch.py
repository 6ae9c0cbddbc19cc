"""Starts a recipe on several workers of this machine.

    python -m tfamp.launch --workers=2 recipes.image_classification -- --seed=1

Each worker is a process with a TF_CONFIG of its own, over 127.0.0.1. Flags
after `--` go to the recipe, with `--strategy=multi_worker` added where they
name no strategy. Each line that a worker prints is passed on at once, with the
worker's number before it.

Exit status: 0 when all workers end with 0; else that of the first one that
did not (128 + N where signal N ended it); 2 for bad input. When one fails, the
others have `--grace` seconds to notice and end; then they are ended. SIGINT
and SIGTERM are passed on to every worker, which then have the grace too; a
second one ends them at once.

No process outlives the launcher, also when it is killed: see
`tfamp.distribute.process_tree`.
"""

import argparse
import functools
import importlib.util
import json
import os
import pathlib
import socket
import sys
from collections.abc import Mapping, Sequence
from typing import NoReturn

from tfamp.distribute.job import run_job
from tfamp.distribute.process_tree import run_guarded
from tfamp.errors import InputError

_EXIT_BAD_INPUT = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the launcher.

    Args:
        argv: the arguments after the program's name; `sys.argv[1:]` if None.

    Returns:
        The exit status, see the module's docstring.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        args = _parse(argv)
        command = _recipe_command(args.recipe) + _with_strategy(args.flags)
    except InputError as error:
        print(f"tfamp: {error}", file=sys.stderr)
        return _EXIT_BAD_INPUT
    reserved = reserve_ports(args.workers)
    try:
        environments = worker_environments(
            [sock.getsockname()[1] for sock in reserved], os.environ
        )
        return run_guarded(
            functools.partial(
                run_job,
                command=command,
                environments=environments,
                grace_seconds=args.grace,
                restarts=args.restarts,
            )
        )
    finally:
        for sock in reserved:
            sock.close()


def reserve_ports(count: int) -> list[socket.socket]:
    """Sockets that keep free ports of 127.0.0.1 until they are closed.

    Bound and not listening, each lets TensorFlow's server on its port (both
    reuse addresses) and no one else: the system gives the port to no other
    program that asks for any free one.
    """
    sockets = []
    for _ in range(count):
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("127.0.0.1", 0))
        sockets.append(sock)
    return sockets


def worker_environments(
    ports: Sequence[int], environment: Mapping[str, str]
) -> list[dict[str, str]]:
    """The environment of each worker: TF_CONFIG, and no buffered output."""
    cluster = {"worker": [f"127.0.0.1:{port}" for port in ports]}
    return [
        {
            **environment,
            "TF_CONFIG": json.dumps(
                {"cluster": cluster, "task": {"type": "worker", "index": index}}
            ),
            "PYTHONUNBUFFERED": "1",
        }
        for index in range(len(ports))
    ]


class _Parser(argparse.ArgumentParser):
    """Reports a usage error in one line instead of a usage page."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see `{self.prog} --help`.")


def _parse(argv):
    parser = _Parser(
        prog="python -m tfamp.launch",
        usage="%(prog)s --workers=N [options] RECIPE [-- --FLAG=VALUE ...]",
        description="Starts a recipe on several workers of this machine.",
        allow_abbrev=False,
    )
    parser.add_argument("--workers", type=int, required=True, help="how many")
    parser.add_argument(
        "--restarts",
        type=int,
        default=0,
        help="how often to start all workers again when one failed (default 0)",
    )
    parser.add_argument(
        "--grace",
        type=float,
        default=30.0,
        help="seconds that the others have to end by themselves (default 30)",
    )
    parser.add_argument(
        "recipe", help="a module (recipes.NAME) or a file (my/recipe.py)"
    )
    # argparse would take a recipe's flags for the launcher's own.
    end = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:end])
    args.flags = argv[end + 1 :]
    if args.workers < 1:
        raise InputError(f"--workers={args.workers} must be at least 1.")
    if args.restarts < 0:
        raise InputError(f"--restarts={args.restarts} must be at least 0.")
    if not 0 <= args.grace < float("inf"):
        raise InputError(f"--grace={args.grace} must be 0 or more seconds.")
    return args


def _recipe_command(recipe):
    if recipe.endswith(".py") or os.sep in recipe:
        if not pathlib.Path(recipe).is_file():
            raise InputError(f"There is no recipe file {recipe!r}.")
        return [sys.executable, recipe]
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = importlib.util.find_spec(recipe)
    except (ModuleNotFoundError, ValueError):
        found = None
    if found is None:
        raise InputError(
            f"There is no recipe {recipe!r}; expected a module such as "
            "recipes.image_classification, or a file such as my/recipe.py."
        )
    return [sys.executable, "-m", recipe]


def _with_strategy(flags):
    named = any(
        flag.lstrip("-").partition("=")[0] == "strategy"
        for flag in flags
        if flag.startswith("-")
    )
    return flags if named else [*flags, "--strategy=multi_worker"]
