"""The chaos runs draw the same jobs again, and damage what they say."""

import os
import random
import subprocess
import sys

import pytest

from benchmarks.chaos.disturbances import Disturbed
from benchmarks.chaos.job import draw
from tests.conftest import ROOT


def test_a_seed_draws_the_same_jobs_and_only_ones_that_can_be():
    jobs = [draw(random.Random(seed), 1) for seed in range(64)]
    assert jobs == [draw(random.Random(seed), 1) for seed in range(64)]
    assert len(set(jobs)) > 32
    for job in jobs:
        assert job.averages or not job.swap
        assert not (job.schedule and job.plateau)


@pytest.mark.parametrize("kind", ["torn file", "flipped bit", "SIGKILL"])
def test_only_the_newest_file_is_damaged(tmp_path, kind):
    before = {}
    for number in (1, 2):
        path = tmp_path / f"ckpt-{number}.index"
        path.write_bytes(bytes(range(100)))
        os.utime(path, ns=(number, number))
        before[path.name] = path.read_bytes()
    Disturbed(kind, tmp_path, random.Random(0), 0.0).aftermath()
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    changed = [name for name in before if before[name] != after[name]]
    assert changed == ([] if kind == "SIGKILL" else ["ckpt-2.index"])
    if kind == "flipped bit":
        pairs = zip(before["ckpt-2.index"], after["ckpt-2.index"], strict=True)
        assert sum((a ^ b).bit_count() for a, b in pairs) == 1


@pytest.mark.long
def test_disturbed_runs_end_as_undisturbed_ones(tmp_path):
    result = subprocess.run(
        [
            *(sys.executable, "-m", "benchmarks.chaos", "--runs=4"),
            *("--stop_seconds=1", f"--output_dir={tmp_path / 'chaos'}"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
        check=True,
    )
    lines = result.stdout.splitlines()
    assert len([line for line in lines if line.startswith("same: ")]) == 4
