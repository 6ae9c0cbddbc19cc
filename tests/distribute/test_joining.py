"""A process that holds the interpreter is ended from outside."""

import signal
import subprocess
import sys

from tests.conftest import ROOT
from tfamp.distribute.joining import killed_after

# A pattern that takes for ever to fail, in C, with the interpreter held.
HELD = """
import re
from tfamp.distribute.joining import killed_after
with killed_after(1.0, "tfamp: too late"):
    re.match("(a*)*b", "a" * 64)
"""


def test_what_holds_the_interpreter_is_killed_with_a_line():
    ended = subprocess.run(
        [sys.executable, "-c", HELD],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == -signal.SIGKILL
    assert ended.stderr == "tfamp: too late\n"


def test_what_ends_in_time_leaves_no_process(monkeypatch, capfd):
    started = []

    class Recorded(subprocess.Popen):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Recorded)
    with killed_after(60.0, "tfamp: too late"):
        (watch,) = started
        assert watch.poll() is None
    assert watch.returncode == 0
    assert capfd.readouterr().err == ""
