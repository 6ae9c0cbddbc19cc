"""Every notebook runs from top to bottom, in a kernel of its own, on a CPU."""

import pathlib
import re
import resource
import sys

import nbclient
import nbformat
import pytest
import traitlets.config

from colab import generate

# Of a processor: what else the machine does meanwhile does not count.
SECONDS = 180
# In which a cell must have answered, on any machine.
CELL_SECONDS = 600

# TensorFlow's, of its import: no setting silences them.
CHATTER = re.compile(
    r"WARNING: All log messages before absl::InitializeLog\(\) is called |"
    r"[IWE]0000 [\d:. ]+ (port|cudart_stub|cuda_platform)\.cc:"
)
# What `tfamp.fit` says of steps that it skipped: in a notebook that is about
# them it is what is to be seen.
SKIPPED = re.compile(r"WARNING:absl:epoch \d+, step \d+: ")

# Sockets in files: another user of the machine cannot connect to them.
OVER_FILES = traitlets.config.Config({"KernelManager": {"transport": "ipc"}})


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Where the notebooks prepare the data that come with packages."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture
def kernel_environment(monkeypatch, tmp_path, data_dir):
    """What a kernel inherits; the folder tells its processes from others."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("TFDS_DATA_DIR", str(data_dir))
    monkeypatch.delenv("PYTHONWARNINGS", raising=False)
    # The kernel's sockets are files where it is, and where its client is.
    monkeypatch.chdir(generate.FOLDER)
    return f"TMPDIR={tmp_path}"


def printed_on_stderr(notebook):
    return [
        line
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output.output_type == "stream" and output.name == "stderr"
        for line in output.text.splitlines()
        if line
    ]


def processes_with(entry):
    """Command lines of the processes with that in their environment."""
    found = []
    for process in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            if entry.encode() in (process / "environ").read_bytes().split(
                b"\0"
            ):
                found.append((process / "cmdline").read_text())
        except OSError:
            continue  # Another user's, or gone.
    return found


def processor_seconds():
    """Of all kernels that have ended, and of what they waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def problems(path, kernel_environment):
    """Runs a notebook; what is wrong with it, in lines."""
    notebook = nbformat.reads(generate.notebook_text(path), as_version=4)
    client = nbclient.NotebookClient(
        notebook,
        timeout=CELL_SECONDS,
        resources={"metadata": {"path": str(generate.FOLDER)}},
        config=OVER_FILES,
    )
    started = processor_seconds()
    try:
        client.execute()
    except nbclient.exceptions.CellExecutionError as error:
        return [str(error)]
    seconds = processor_seconds() - started
    found = [f"took {seconds:.0f} s"] if seconds > SECONDS else []
    found += [
        f"left {process}" for process in processes_with(kernel_environment)
    ]
    about_skips = 'on_overflow="blame"' in path.read_text()
    return found + [
        line
        for line in printed_on_stderr(notebook)
        if not CHATTER.match(line) and not (about_skips and SKIPPED.match(line))
    ]


@pytest.mark.parametrize(
    "path",
    [
        # It starts no process of its own.
        pytest.param(
            path,
            marks=pytest.mark.slow
            if path.stem == "quickstart_gpu"
            else pytest.mark.long,
        )
        for path in generate.sources()
    ],
    ids=lambda path: path.stem,
)
def test_runs_without_error_or_warning_and_leaves_no_process(
    path, kernel_environment
):
    assert problems(path, kernel_environment) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("1 / 0", "ZeroDivisionError"),
        ("import warnings; warnings.warn('odd')", "UserWarning: odd"),
        (
            "from absl import logging; logging.warning('epoch 1, step 2: x')",
            "WARNING:absl:epoch 1, step 2: x",
        ),
        (
            "import subprocess; child = subprocess.Popen("
            "['sleep', '5'], start_new_session=True)",
            "left sleep",
        ),
        ("while time.process_time() < 3: pass", "took "),
    ],
)
def test_what_is_wrong_with_a_notebook_is_found(
    code, problem, tmp_path, monkeypatch, kernel_environment
):
    # Without the setup cell, which starts no kernel faster.
    monkeypatch.setattr(generate, "setup_cell", lambda: "import time")
    monkeypatch.setattr(sys.modules[__name__], "SECONDS", 2)
    path = tmp_path / "wrong.py"
    path.write_text(
        "# %% [markdown]\n# # Wrong\n#\n# - **What you will see:** it.\n"
        "# - **How long it takes:** a second.\n# - **Which runtime:** CPU.\n\n"
        f"# %%\n{code}\n"
    )

    assert problem in "\n".join(problems(path, kernel_environment))
