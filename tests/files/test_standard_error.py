"""What TensorFlow says while it starts is seen where something fails."""

import os
import subprocess
import sys

import pytest

# Instead of TensorFlow, to know what it says: code that writes to the
# descriptor, as its C++ code does.
MODULE = """
import os, sys, types
os.write(2, b"port.cc: oneDNN\\n")
if os.environ.get("BROKEN"):
    raise ImportError("no such symbol")
def list_physical_devices():
    os.write(2, b"cuda_platform.cc: no GPU\\n")
config = types.SimpleNamespace(list_physical_devices=list_physical_devices)
"""
PROGRAM = """
from tfamp.files import standard_error
standard_error.start_tensorflow_quietly()
standard_error.start_tensorflow_quietly()
import tensorflow
import os
os.write(2, b"later\\n")
assert type(tensorflow.__loader__).__name__ == "SourceFileLoader"
assert tensorflow.__spec__.loader is tensorflow.__loader__
"""


@pytest.fixture
def run(tmp_path):
    (tmp_path / "tensorflow.py").write_text(MODULE)

    def start(program, **environment):
        done = subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"PYTHONPATH": f"{tmp_path}:."} | environment,
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stderr

    return start


def test_what_starts_well_says_nothing(run):
    assert run(PROGRAM) == (0, "later\n")


def test_a_later_failure_is_preceded_by_what_was_said(run):
    status, text = run(f"{PROGRAM}\nraise RuntimeError('late')")
    assert status == 1
    said = "port.cc: oneDNN\ncuda_platform.cc: no GPU\nTraceback"
    assert text.startswith(f"later\n{said}")
    assert text.endswith("RuntimeError: late\n")


def test_a_start_that_fails_is_seen_whole(run):
    status, text = run(PROGRAM, BROKEN="1")
    assert status == 1
    assert text.startswith("port.cc: oneDNN\nTraceback")
    assert text.count("port.cc") == 1
    assert text.endswith("ImportError: no such symbol\n")


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ("-m", "tfamp", "lint", "recipes.base_model"),
        ("-m", "recipes.base_model", "--epochs=1"),
    ],
)
def test_programs_leave_stderr_to_what_they_say_themselves(arguments, tmp_path):
    environment = {
        name: value
        for name, value in os.environ.items()
        if name != "TF_CPP_MIN_LOG_LEVEL"
    }
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, env=environment
    )
    assert b"port.cc" not in done.stderr
    assert b"absl::InitializeLog" not in done.stderr
