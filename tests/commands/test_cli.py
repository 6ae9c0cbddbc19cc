"""The commands as a user types them: what they print and how they exit."""

import builtins
import configparser
import dataclasses
import json
import subprocess
import sys

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from tests.conftest import ROOT
from tfamp import cli
from tfamp.commands import formats as formats_command
from tfamp.errors import InputError
from tfamp.files import console
from tfamp.formats import FORMATS
from tfamp.hardware.devices import KNOWN_HARDWARE, Hardware
from tfamp.hardware.known_issues import TRIED, known_issues


def run(capsys, *argv):
    """Runs one command; returns the exit status, stdout and stderr."""
    status = cli.main(argv)
    out, err = capsys.readouterr()
    return status, out, err


def rows(text):
    return [line.split() for line in text.splitlines() if line]


def test_formats_prints_one_row_for_each_format(capsys):
    status, out, err = run(capsys, "formats")
    assert (status, err) == (0, "")
    assert "float16 16 1+5+10 65504 6.1035e-05 5.9605e-08 0.00097656" in (
        " ".join(row) for row in rows(out)
    )
    assert [row[0] for row in rows(out)][2:-1] == list(FORMATS)


def test_formats_shows_what_scaling_saves(capsys):
    status, out, _ = run(capsys, "formats", "1e-8", "--scale=65536")
    assert status == 0
    table = rows(out)
    plain = table.index(["float16", "1", "0", "0", "zero", "1"])
    expected = ["65536", "0.000655174", "9.99717e-09", "rounded", "0.000283"]
    assert table[plain + 1] == expected


@pytest.mark.parametrize(
    ("text", "row"),
    [
        ("-1e-8", ["float16", "-0", "zero", "1"]),
        ("-70000", ["float16", "-inf", "overflow", "inf"]),
        ("inf", ["float8_e4m3fn", "nan", "overflow", "inf"]),
        ("-inf", ["float8_e5m2", "-inf", "exact", "0"]),
        ("nan", ["bfloat16", "nan", "exact", "0"]),
        ("6.5e4", ["float16", "64992", "rounded", "0.000123"]),
        ("-.5", ["float8_e4m3fn", "-0.5", "exact", "0"]),
    ],
)
def test_every_way_to_write_a_number_is_a_value(capsys, text, row):
    status, out, err = run(capsys, "formats", text)
    assert (status, err) == (0, "")
    assert row in rows(out)


def test_several_values_keep_their_order_with_negative_ones_among_them(capsys):
    status, out, _ = run(capsys, "formats", "1", "-2", "3", "--json")
    values = [c["value"] for c in json.loads(out)["conversions"]]
    assert status == 0
    assert values[:: len(FORMATS)] == [1.0, -2.0, 3.0]


def test_formats_json_is_strict_and_complete(capsys):
    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    _, out, _ = run(capsys, "formats", "7e4", "nan", "--scale=2", "--json")
    report = json.loads(out, parse_constant=refuse)
    assert report["schema"] == "tfamp.formats/1"
    assert [f["name"] for f in report["formats"]] == list(FORMATS)
    assert report["scale"] == 2
    float16 = report["conversions"][1]
    assert (float16["format"], float16["result"]) == ("float16", "inf")
    assert float16["scaled"]["scaled"]["value"] == 140000
    assert report["conversions"][5]["value"] == "nan"


def test_the_tables_fit_a_terminal_of_80_columns(capsys):
    for argv in (["formats"], ["formats", "-1.23456789e-41", "--scale=65536"]):
        _, out, _ = run(capsys, *argv)
        assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["nonsense"], ["nonsense", "doctor", "formats"]),
        (["formats", "abc"], ["'abc'", "1e-8"]),
        (["formats", "1,5"], ["'1,5'"]),
        (["formats", "1e400"], ["'1e400'", "float64"]),
        (["formats", "1e-400"], ["'1e-400'", "float64"]),
        (["formats", "snan"], ["'snan'"]),
        (["formats", "-x"], ["-x"]),
        (["formats", "1", "--scale=3"], ["3", "power of two"]),
        (["formats", "1", "--scale=0"], ["0", "power of two"]),
        (["formats", "1", "--scale=-2"], ["-2", "power of two"]),
        (["formats", "1", "--scale", "-2"], ["-2", "power of two"]),
        (["formats", "1", "--scale=nan"], ["nan", "power of two"]),
        (["formats", "1", "--scale=x"], ["'x'"]),
        (["formats", "1", "--scale=2", "--jso"], ["--jso"]),
        (["doctor", "--assume=FOO"], ["'FOO'", *KNOWN_HARDWARE]),
        (["doctor", "--assume=a\nb"], ["expected one of"]),
    ],
)
def test_bad_input_is_one_line_on_stderr_and_exit_2(capsys, argv, named):
    status, out, err = run(capsys, *argv)
    assert status == 2
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("tfamp: ")
    for word in named:
        assert word in err


def test_an_input_error_of_the_library_is_reported_in_one_line(
    capsys, monkeypatch
):
    def refuse(args):
        raise InputError("Bad\n  thing.")

    monkeypatch.setattr(formats_command, "_run", refuse)
    assert run(capsys, "formats") == (2, "", "tfamp: Bad thing.\n")


def test_a_bug_keeps_its_traceback(monkeypatch):
    def fail(args):
        raise ValueError("a bug")

    monkeypatch.setattr(formats_command, "_run", fail)
    with pytest.raises(ValueError, match="a bug"):
        cli.main(["formats"])


@pytest.mark.parametrize("argv", [["--help"], ["formats", "--help"]])
def test_help_exits_with_0(capsys, argv):
    with pytest.raises(SystemExit) as exit_:
        cli.main(argv)
    assert exit_.value.code == 0
    assert "formats" in capsys.readouterr().out


def test_the_bare_program_shows_its_commands(capsys):
    status, out, err = run(capsys)
    assert (status, err) == (0, "")
    assert "usage: tfamp" in out
    assert "parity" in out


def test_formats_imports_neither_tensorflow_nor_keras():
    code = (
        "import sys\n"
        "from tfamp.cli import main\n"
        "status = main(['formats', '1e-8', '-70000', '--scale=65536'])\n"
        "heavy = {'tensorflow', 'keras', 'tensorflow_datasets'}\n"
        "sys.exit(status or ','.join(heavy & set(sys.modules)) or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_reader_that_leaves_early_causes_no_traceback():
    code = (
        "import os, sys\n"
        "from tfamp.cli import main\n"
        "reader, writer = os.pipe()\n"
        "os.dup2(writer, 1)\n"
        "os.close(reader)\n"
        "sys.exit(main(['formats']))"
    )
    done = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.slow
def test_doctor_keeps_the_noise_of_tensorflow_off_stderr():
    done = subprocess.run(
        [sys.executable, "-c", "import tfamp.cli as c; c.main(['doctor'])"],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    for heading in ("Hardware", "Recommended", "Versions", "Known trouble"):
        assert f"\n{heading}" in f"\n{done.stdout}"
    assert not any(line.endswith(" ") for line in done.stdout.splitlines())


def test_doctor_json_reports_this_machine(capsys):
    status, out, _ = run(capsys, "doctor", "--json")
    report = json.loads(out)
    assert status == 0
    assert report["schema"] == "tfamp.doctor/1"
    assert report["assumed"] is False
    assert set(report["hardware"]) == set(Hardware.__dataclass_fields__)
    versions = report["versions"]
    import keras
    import tensorflow as tf

    assert versions["tensorflow"] == tf.__version__
    assert versions["keras"] == keras.__version__
    assert versions["python"] == sys.version.split()[0]


@pytest.mark.parametrize(
    ("name", "precision", "strategy"),
    [
        ("V100", "mixed_float16", "one_device"),
        ("t4", "mixed_float16", "one_device"),
        ("A100", "mixed_bfloat16", "one_device"),
        ("H100", "mixed_bfloat16", "one_device"),
        ("MI300", "mixed_bfloat16", "one_device"),
        ("TPU v5e", "mixed_bfloat16", "tpu"),
        ("tpu-v5e", "mixed_bfloat16", "tpu"),
    ],
)
def test_doctor_judges_a_device_that_is_not_here(
    capsys, name, precision, strategy
):
    _, out, _ = run(capsys, "doctor", f"--assume={name}", "--json")
    report = json.loads(out)
    assert report["assumed"] is True
    assert report["recommendation"]["precision"] == precision
    assert report["strategy"]["name"] == strategy


def test_doctor_says_when_the_device_is_assumed(capsys):
    _, out, _ = run(capsys, "doctor", "--assume=V100")
    assert "not this machine" in out
    assert "compute capability  7.0" in out
    assert "dynamic" in out


VERSIONS = {
    "keras": "3.15.1",
    "tensorflow": "2.21.0",
    "tensorflow-datasets": "4.9.10",
}
BUILD = {
    "cuda_compute_capabilities": ["sm_60", "sm_70", "sm_80", "compute_90"],
    "is_rocm_build": False,
}


def trouble(hardware, versions=VERSIONS):
    return "\n".join(
        issue["what"] for issue in known_issues(hardware, versions, BUILD)
    )


def test_known_issues_follow_the_installed_versions():
    cpu = Hardware("cpu", ("a CPU",))
    assert "MultiWorkerMirroredStrategy" in trouble(cpu)
    newer = {"keras": "3.16.0", "tensorflow": "2.22.0"}
    absent = {"keras": None, "tensorflow-datasets": None}
    assert trouble(cpu, newer).count("never tried with this version") == 2
    assert trouble(cpu, newer).count("\n") == 1
    assert trouble(cpu, absent) == ""


def test_what_was_tried_is_what_is_installed():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    pins = [
        Requirement(line)
        for line in setup["options"]["install_requires"].splitlines()
        if line and line[0] != "#"
    ]
    wanted = {pin.name: pin.specifier for pin in pins if pin.name in TRIED}
    wanted["python"] = SpecifierSet(setup["options"]["python_requires"])
    assert {n: SpecifierSet(s) for n, s in TRIED.items()} == wanted


def test_known_issues_follow_the_hardware():
    one_gpu, cpu = KNOWN_HARDWARE["A100"], Hardware("cpu", ("a CPU",))
    two_gpus = Hardware("gpu", ("a GPU",) * 2, 2, compute_capability=(8, 0))
    assert "steps_per_execution" not in trouble(one_gpu)
    assert "steps_per_execution" in trouble(two_gpus)
    assert "jit_compile" in trouble(cpu)
    assert "jit_compile" not in trouble(two_gpus)
    assert "tensorflow-tpu" in trouble(KNOWN_HARDWARE["TPU v5e"])
    assert "tensorflow-tpu" not in trouble(cpu)
    assert "AMD" in trouble(KNOWN_HARDWARE["MI300"])
    assert "DepthwiseConv1D" not in trouble(cpu)
    bfloat16_cpu = dataclasses.replace(cpu, cpu_bf16=("avx512_bf16",))
    assert "DepthwiseConv1D" in trouble(bfloat16_cpu)


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("T4", False),  # 7.5 runs the code for 7.0.
        ("L4", False),  # 8.9 runs the code for 8.0.
        ("H100", False),  # compute_90 brings code for 9.0 too.
        ("B200", True),
    ],
)
def test_a_gpu_newer_than_the_build_must_compile_first(name, missing):
    assert ("machine code" in trouble(KNOWN_HARDWARE[name])) is missing


def test_tfds_is_reported_only_where_its_dependency_is_missing(monkeypatch):
    import importlib.util

    cpu, find = Hardware("cpu", ("a CPU",)), importlib.util.find_spec
    for present in (True, False):
        monkeypatch.setattr(
            importlib.util,
            "find_spec",
            lambda name, p=present: find("json") if p else None,
        )
        assert ("importlib_resources" in trouble(cpu)) is not present


def test_a_notebook_gets_tables_as_printed_text(capsys, monkeypatch):
    # rich would show HTML of its own in a shell of this name.
    class ZMQInteractiveShell:
        pass

    _, expected, _ = run(capsys, "formats", "0.1")
    monkeypatch.setattr(
        builtins, "get_ipython", ZMQInteractiveShell, raising=False
    )
    assert run(capsys, "formats", "0.1") == (0, expected, "")
    # Folded between words: a notebook folds a longer line anywhere.
    console.print_text("sixteen bits " * 20)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert all(len(line) <= 100 for line in lines)
