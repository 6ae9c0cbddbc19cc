import json
import os
import pathlib
import select
import signal
import socket
import subprocess
import sys
import textwrap
import time
import uuid

import pytest

from tests.conftest import ROOT
from tfamp.distribute import launch

LIMIT_SECONDS = 20

# What every script below starts with: who it is, and whom it may signal.
PROLOGUE = """
import json, os, pathlib, signal, subprocess, sys, time
config = json.loads(os.environ["TF_CONFIG"])
index = config["task"]["index"]
here = pathlib.Path(sys.argv[0]).parent

def wait_for(name):
    while not (here / name).exists():
        time.sleep(0.02)

def say_ready():
    print("ready", flush=True)
    (here / f"ready.{index}").touch()
"""


class Launched:
    """A running launcher, whose processes all carry one mark."""

    def __init__(self, folder, script, *options, flags=()):
        recipe = folder / "script.py"
        recipe.write_text(PROLOGUE + textwrap.dedent(script))
        self.folder = folder
        self.mark = f"TFAMP_TEST={uuid.uuid4()}"
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "tfamp.launch", "--workers=2"),
                *(*options, str(recipe), "--", *flags),
            ],
            cwd=ROOT,
            env={**os.environ, "TFAMP_TEST": self.mark.partition("=")[2]},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait_ready(self):
        wait_until(
            lambda: all((self.folder / f"ready.{i}").exists() for i in range(2))
        )

    def finish(self):
        """Exit status, lines of stdout, text of stderr."""
        out, err = self.process.communicate(timeout=LIMIT_SECONDS)
        return self.process.returncode, out.splitlines(), err

    def alive(self):
        """Processes with the mark, and the command of each."""
        found = {}
        for path in pathlib.Path("/proc").glob("[0-9]*"):
            try:
                if self.mark.encode() in (path / "environ").read_bytes():
                    state = (path / "stat").read_text().rpartition(")")[2]
                    if state.split()[0] != "Z":
                        command = (path / "cmdline").read_bytes()
                        found[int(path.name)] = command.decode()
            except OSError:
                continue
        return found


def wait_until(condition, seconds=LIMIT_SECONDS):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "took too long"
        time.sleep(0.02)


@pytest.fixture
def launched(tmp_path):
    started = []

    def start(script, *options, flags=()):
        started.append(Launched(tmp_path, script, *options, flags=flags))
        return started[-1]

    yield start
    for job in started:
        job.process.kill()
        job.process.communicate(timeout=LIMIT_SECONDS)
        for pid in job.alive():
            os.kill(pid, signal.SIGKILL)


def test_each_worker_gets_its_place_in_one_loopback_cluster(launched):
    status, lines, _ = launched("print(json.dumps(config))").finish()
    assert status == 0
    configs = {line[:3]: json.loads(line[4:]) for line in sorted(lines)}
    assert list(configs) == ["[0]", "[1]"]
    for index, config in enumerate(configs.values()):
        assert config["task"] == {"type": "worker", "index": index}
        assert config["cluster"] == configs["[0]"]["cluster"]
    addresses = configs["[0]"]["cluster"]["worker"]
    assert len(set(addresses)) == 2
    assert all(address.startswith("127.0.0.1:") for address in addresses)


@pytest.mark.parametrize(
    ("flags", "received"),
    [
        (["--epochs=3"], ["--epochs=3", "--strategy=multi_worker"]),
        (["--strategy=mirrored"], ["--strategy=mirrored"]),
        (["--strategy", "mirrored"], ["--strategy", "mirrored"]),
        (["strategy"], ["strategy", "--strategy=multi_worker"]),
        (["--", "--x"], ["--", "--x", "--strategy=multi_worker"]),
    ],
)
def test_recipe_flags_pass_through_and_the_strategy_is_added_once(
    launched, flags, received
):
    _, lines, _ = launched("print(sys.argv[1:])", flags=flags).finish()
    assert sorted(lines) == [f"[0] {received}", f"[1] {received}"]


def test_module_is_started_like_a_file(tmp_path):
    (tmp_path / "tiny_recipe.py").write_text("print(__name__, __spec__.name)")
    result = subprocess.run(
        [sys.executable, "-m", "tfamp.launch", "--workers=1", "tiny_recipe"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
    )
    assert result.stdout == "[0] __main__ tiny_recipe\n"


def test_lines_stay_whole_and_streams_apart(launched):
    status, lines, err = launched(
        """
        for number in range(2000):
            print(f"{index}:{number}:" + "x" * 200)
        print("no end of line", end="", file=sys.stderr)
        """
    ).finish()
    assert status == 0
    expected = [f"{n}:" + "x" * 200 for n in range(2000)]
    for index in "01":
        prefix = f"[{index}] {index}:"
        own = [line for line in lines if line.startswith(prefix)]
        assert [line.removeprefix(prefix) for line in own] == expected
    assert len(lines) == 4000
    assert sorted(err.splitlines()) == [
        "[0] no end of line",
        "[1] no end of line",
    ]


def test_output_comes_at_once_also_from_a_progress_bar(launched):
    job = launched(
        """
        print("50 %", end="\\r")
        wait_for("seen")
        """
    )
    seen = b""
    while seen.count(b"\r") < 2:
        # Python's text streams wait for what follows a carriage return.
        assert select.select([job.process.stdout], [], [], LIMIT_SECONDS)[0]
        seen += os.read(job.process.stdout.fileno(), 100)
    assert sorted(seen.split(b"\r")) == [b"", b"[0] 50 %", b"[1] 50 %"]
    (job.folder / "seen").touch()
    assert job.finish()[0] == 0


def test_status_is_of_the_first_that_failed(launched):
    status, _, err = launched(
        """
        if index == 1:
            (here / "failing").touch()
            sys.exit(7)
        wait_for("failing")
        time.sleep(0.5)
        sys.exit(9)
        """
    ).finish()
    assert status == 7
    assert "worker 1 ended with status 7; worker 0 still runs" in err


def test_status_of_a_killed_worker_names_the_signal(launched):
    status, _, _ = launched(
        "os.kill(os.getpid(), signal.SIGKILL if index else signal.SIGCONT)"
    ).finish()
    assert status == 128 + signal.SIGKILL


def test_others_are_killed_when_the_grace_is_over(launched):
    job = launched(
        """
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        say_ready()
        wait_for("ready.0"), wait_for("ready.1")
        sys.exit(5) if index else time.sleep(60)
        """,
        "--grace=1",
    )
    job.wait_ready()
    start = time.monotonic()
    status, _, err = job.finish()
    assert status == 5
    assert 0.9 < time.monotonic() - start < 10
    assert "worker 0 did not end in time: killed" in err


def test_worker_that_ends_well_leaves_the_other_all_its_time(launched):
    status, lines, _ = launched(
        """
        if index == 0:
            time.sleep(1)
            print("done")
        """,
        "--grace=0",
    ).finish()
    assert (status, lines) == (0, ["[0] done"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_reach_every_worker_which_may_end_well(launched, number):
    job = launched(
        f"""
        def stop(number, frame):
            print("got", signal.Signals(number).name)
            sys.exit(0)

        signal.signal({int(number)}, stop)
        say_ready()
        time.sleep(60)
        """,
        "--restarts=5",
    )
    job.wait_ready()
    job.process.send_signal(number)
    status, lines, _ = job.finish()
    assert status == 0
    got = [line for line in lines if "got" in line]
    assert sorted(got) == [f"[{i}] got {number.name}" for i in range(2)]
    assert not job.alive()


def test_signal_that_no_worker_handles_is_the_status(launched):
    job = launched("say_ready(); time.sleep(60)")
    job.wait_ready()
    job.process.send_signal(signal.SIGTERM)
    assert job.finish()[0] == 128 + signal.SIGTERM


def test_second_signal_ends_workers_that_ignore_the_first(launched):
    job = launched(
        """
        signal.signal(signal.SIGINT, lambda *_: print("ignored"))
        say_ready()
        while True:
            time.sleep(1)
        """,
        "--grace=60",
    )
    job.wait_ready()
    job.process.send_signal(signal.SIGINT)
    wait_until(lambda: "ignored" in job.process.stdout.readline())
    job.process.send_signal(signal.SIGINT)
    assert job.finish()[0] == 128 + signal.SIGKILL


# A grandchild that does all it can to get away: a session of its own, no
# parent, no common pipe, deaf to signals.
RUNAWAY = """
runaway = '''
import os, signal, sys, time
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
if os.fork():
    os._exit(0)
os.setsid()
if os.fork():
    os._exit(0)
open(sys.argv[1], "w").close()
time.sleep(60)
'''
subprocess.run(
    [sys.executable, "-c", runaway, str(here / f"away.{index}")],
    stdin=subprocess.DEVNULL,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
)
wait_for(f"away.{index}")
"""


def test_runaway_grandchildren_end_with_the_job(launched):
    job = launched(RUNAWAY + "print('end')")
    status, lines, _ = job.finish()
    assert (status, sorted(lines)) == (0, ["[0] end", "[1] end"])
    assert not job.alive()


def test_grandchild_that_holds_the_output_does_not_hold_the_job(launched):
    job = launched("subprocess.Popen(['sleep', '60']); print('end')")
    status, lines, _ = job.finish()
    assert (status, len(lines)) == (0, 2)
    assert not job.alive()


def test_nothing_is_left_when_the_launcher_is_killed(launched):
    job = launched(RUNAWAY + "say_ready(); time.sleep(60)")
    job.wait_ready()
    # Launcher and job, two workers, two runaways.
    assert len(job.alive()) == 6
    job.process.kill()
    wait_until(lambda: not job.alive(), 5)


def test_nothing_is_left_when_the_process_between_is_killed(launched):
    job = launched(RUNAWAY + "say_ready(); time.sleep(60)")
    job.wait_ready()
    (between,) = [
        int(pid)
        for pid in subprocess.run(
            ["pgrep", "-P", str(job.process.pid)],
            capture_output=True,
            text=True,
            timeout=LIMIT_SECONDS,
        ).stdout.split()
    ]
    os.kill(between, signal.SIGKILL)
    assert job.finish()[0] == 128 + signal.SIGKILL
    assert not job.alive()


def test_closed_output_ends_the_job(launched):
    job = launched(
        """
        say_ready()
        while True:
            print("more")
            time.sleep(0.05)
        """
    )
    job.wait_ready()
    job.process.stdout.close()
    assert job.process.wait(timeout=LIMIT_SECONDS) == 128 + signal.SIGPIPE
    assert not job.alive()


FAIL_ONCE = """
(here / f"start.{index}.{time.monotonic_ns()}").touch()
starts = len(list(here.glob(f"start.{index}.*")))
print(config["cluster"]["worker"])
sys.exit(4 if index == 1 and starts == 1 else 0)
"""


def test_failed_job_is_restarted_whole(launched):
    status, lines, err = launched(FAIL_ONCE, "--restarts=3").finish()
    assert status == 0
    assert err.count("restart 1 of 3") == 1
    assert "restart 2" not in err
    assert len(lines) == 4


def test_restarts_are_counted_and_the_last_status_kept(launched):
    status, lines, _ = launched(
        "print('x'); sys.exit(6)", "--restarts=2"
    ).finish()
    assert (status, len(lines)) == (6, 6)


def test_bad_input_is_not_tried_again(launched):
    status, lines, _ = launched(
        "print('x'); sys.exit(2)", "--restarts=2"
    ).finish()
    assert (status, len(lines)) == (2, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["recipe.py"], "--workers"),
        (["--workers=2"], "recipe"),
        (["--workers=two", "x"], "invalid int value: 'two'"),
        (["--workers=0", "x"], "--workers=0 must be at least 1"),
        (["--workers=2", "--restarts=-1", "x"], "--restarts=-1"),
        (["--workers=2", "--grace=-1", "x"], "--grace=-1.0"),
        (["--workers=2", "--grace=inf", "x"], "--grace=inf"),
        (["--workers=2", "no/such.py"], "There is no recipe file"),
        (["--workers=2", "no_such.module"], "There is no recipe 'no_such.mod"),
        (["--workers=2", "tfamp.no_such"], "There is no recipe 'tfamp.no_su"),
        (["--workers=2", "--epochs=3", "json"], "--epochs=3"),
        (["--work=2", "json"], "--workers"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, message, capsys):
    assert launch.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("tfamp: ")
    assert message in err


def test_reserved_ports_are_free_for_the_server_and_taken_for_others():
    reserved = launch.reserve_ports(3)
    try:
        ports = [sock.getsockname()[1] for sock in reserved]
        assert len(set(ports)) == 3
        with socket.socket(socket.AF_INET6) as server:
            # As TensorFlow's server does it.
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            server.bind(("::", ports[0]))
            server.listen()
        with (
            socket.socket() as other,
            pytest.raises(OSError, match="already in use"),
        ):
            other.bind(("127.0.0.1", ports[1]))
    finally:
        for sock in reserved:
            sock.close()


def test_launcher_is_light():
    result = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, tfamp.launch; print('tensorflow' in sys.modules)",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
    )
    assert result.stdout == "False\n"
