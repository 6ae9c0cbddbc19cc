"""The benchmark for GPUs: rehearsed on a CPU, resumed, refused without one."""

import json
import subprocess
import sys

import pytest

from benchmarks import gpu, gpu_measurements, gpu_page
from tests.conftest import ROOT, mostly_long

DEVICE = {"kind": "gpu", "device_names": ["NVIDIA H100"], "count": 1}


def found(**changes):
    return {
        "part": "steps",
        "kind": "train",
        "case": "gpt",
        "contestant": "tfamp",
        "precision": "float32",
        "tf32": False,
        "status": "done",
        "step_milliseconds": 12.25,
        "peak_memory_bytes": 2**30,
        "seconds": 1.0,
    } | changes


@pytest.fixture
def on_a_gpu(monkeypatch):
    """What processes were asked; they find nothing, and are done."""
    asked = []

    def in_process(measurements, rehearse, deadline):
        asked.extend(measurements)
        return [{"status": "done", **each} for each in measurements]

    monkeypatch.setattr(gpu, "_environment", lambda _: {"hardware": DEVICE})
    monkeypatch.setattr(gpu, "_in_process", in_process)
    return asked


def record_of(folder):
    return json.loads((folder / "gpu.json").read_text())


def check_rehearsal(folder):
    record = record_of(folder)
    assert record["rehearsal"]
    for each in record["measurements"]:
        line = each.get("line", "")
        if each.get("contestant", "").startswith("torch"):
            # It is an extra, and compiles with g++.
            assert each["status"] in ("done", "not here", "failed"), line
        else:
            assert each["status"] == "done", line
    assert "A rehearsal" in (folder / "gpu.md").read_text()
    return {
        each.get("contestant") or each["kind"]: each
        for each in record["measurements"]
    }


@pytest.mark.parametrize("part", mostly_long(gpu.PARTS, always=["several"]))
def test_a_part_is_rehearsed(part, tmp_path, monkeypatch):
    """In this process, which has TensorFlow already."""

    def in_process(measurements, rehearse, deadline):
        path = tmp_path / "results"
        path.touch()
        gpu_measurements.main(
            [str(path), "cpu", "tiny", *map(json.dumps, measurements)]
        )
        return [json.loads(line) for line in path.read_text().splitlines()]

    monkeypatch.setattr(gpu, "_environment", lambda _: {"hardware": DEVICE})
    monkeypatch.setattr(gpu, "_in_process", in_process)

    status = gpu.main(
        ["--rehearse", f"--output_dir={tmp_path}", f"--part={part}"]
    )

    assert status == 0
    found = check_rehearsal(tmp_path)
    for name in ("tfamp", "keras", "recipe", "scaling"):
        if name in found:
            assert found[name]["step_milliseconds"] > 0
    if part == "several":
        assert found["scaling"]["replicas"] == found["reduce"]["replicas"] == 2


@pytest.mark.long
def test_a_rehearsal_runs_every_part(tmp_path):
    status = gpu.main(["--rehearse", f"--output_dir={tmp_path}"])

    assert status == 0
    found = check_rehearsal(tmp_path)
    assert {each["part"] for each in found.values()} == set(gpu.PARTS)
    assert 0 <= found["parity"]["metric"] <= 1


@pytest.mark.slow
def test_without_a_gpu_it_is_one_line():
    ended = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--output_dir=never"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 2
    (line,) = ended.stderr.strip().splitlines()
    assert line.startswith("tfamp: benchmarks.gpu needs a GPU")
    assert not (ROOT / "never").exists()


def test_the_same_command_goes_on_where_it_ended(
    on_a_gpu, tmp_path, monkeypatch
):
    folder = tmp_path / "out"
    gpu.main([f"--output_dir={folder}", "--part=several"])
    several = [m for m in gpu.plan() if m["part"] == "several"]
    assert on_a_gpu == several

    on_a_gpu.clear()
    gpu.main([f"--output_dir={folder}", "--part=several"])
    assert on_a_gpu == []

    # What failed is tried again, after what was not tried yet.
    record = record_of(folder)
    record["measurements"][0] |= {"status": "failed", "line": "late"}
    del record["measurements"][2]
    (folder / "gpu.json").write_text(json.dumps(record))
    gpu.main([f"--output_dir={folder}", "--part=several"])
    assert on_a_gpu == [several[2], several[0]]
    assert len(record_of(folder)["measurements"]) == len(several)


def test_a_part_ends_with_its_time(on_a_gpu, tmp_path, capsys):
    gpu.main([f"--output_dir={tmp_path}", "--part=steps", "--minutes=0"])

    assert on_a_gpu == []
    assert "steps: 16 left for the next call" in capsys.readouterr().out


def test_figures_of_another_device_are_not_mixed(
    on_a_gpu, tmp_path, monkeypatch, capsys
):
    gpu.main([f"--output_dir={tmp_path}", "--part=several"])
    monkeypatch.setattr(
        gpu,
        "_environment",
        lambda _: {"hardware": DEVICE | {"device_names": ["NVIDIA T4"]}},
    )

    status = gpu.main([f"--output_dir={tmp_path}", "--part=several"])

    assert status == 2
    assert "holds figures of NVIDIA H100" in capsys.readouterr().err


def test_a_process_that_takes_too_long_is_ended(monkeypatch):
    monkeypatch.setattr(gpu, "_LONGEST_SECONDS", 0.01)
    (asked, *_) = gpu.plan()

    (late,) = gpu._in_process([asked], rehearse=False, deadline=1e9)

    assert late["status"] == "failed"
    assert late["line"].startswith("not done within 0 s")


def test_every_measurement_has_a_key_of_its_own():
    keys = [gpu._key(asked) for asked in gpu.plan()]
    assert len(set(keys)) == len(keys) == 16 + 15 + 6 + 32 + 64


def test_the_page_says_what_was_found():
    runs = [
        found(
            part="parity", kind="parity", precision=p, seed=seed, metric=metric
        )
        for p, metrics in {
            "float32": (0.98, 0.97, 0.99),
            "mixed_bfloat16": (0.981, 0.971, 0.9901),
            "mixed_float16": (0.5, 0.6, 0.7),
        }.items()
        for seed, metric in enumerate(metrics)
    ]
    failed = found(contestant="torch", status="failed", line="a | b")
    page = gpu_page.to_markdown(
        {
            "rehearsal": False,
            "environment": {"hardware": DEVICE},
            "measurements": [found(), failed, *runs],
        }
    )
    assert "| gpt, tfamp | float32, TF32 off | 12.2 ms, 1.00 GiB |" in page
    assert "| failed: a / b |" in page
    assert "mixed_bfloat16 is equivalent to float32 within 0.01" in page
    assert "mixed_float16 is not shown equivalent" in page
