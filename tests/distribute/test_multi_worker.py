"""Two and three worker processes, over loopback.

Each job is started by hand as a scheduler would start it, so that a test sees
how each worker ended, and when. One start runs many scenarios, since a start
costs more than most of them.
"""

import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from typing import NamedTuple

import keras
import numpy as np
import pytest

import tfamp
from tests import multi_worker_program as program
from tests.conftest import FLOAT32_ROUNDING, ROOT, mostly_long
from tests.distribute import reduction_cases
from tests.overflow import test_blame
from tests.recipes import test_lora
from tests.training import test_matrix, test_wire
from tfamp.distribute.launch import reserve_ports, worker_environments
from tfamp.distribute.workers import WORKER_LOST_SECONDS
from tfamp.errors import Preempted

# What a test waits at most for a job that should end by itself.
JOB_SECONDS = 240
# float16 products of the same pieces are the same; float32 sums of gradients
# differ in their order, by 1e-7. Where such a last bit makes the float16 copy
# of a weight round to the other neighbour, that copy is off by 2**-11, and the
# next gradients with it: 2e-5 was measured, in one weight of a hundred.
SAME_PIECES = {"rtol": 0, "atol": 1e-4}
# A gradient that is rounded in other pieces is off by 2**-11 of its size in
# each step: 5e-4 was measured after ten, of weights that move by 0.5.
OTHER_PIECES = {"rtol": 0, "atol": 2e-3}
# Beyond the stated time, for the process to end on a busy machine.
MARGIN_SECONDS = 10

# Jobs, by how many workers they have and the mark of their tests.
SCENARIOS = {
    (2, ""): ("small", "overflow"),
    (2, "slow"): (
        *("blame", "stop", "files", "sharded", "prediction", "reduction"),
        *("evaluation", "parting"),
    ),
    (2, "long"): (
        *("shards", "wire", "recipe", "low_rank", "matrix", "resumable"),
    ),
    (3, "long"): ("small", "evaluation", "recipe"),
}


class Ended(NamedTuple):
    """How a worker ended: None where it had to be killed."""

    status: int | None
    seconds: float
    output: str


def run_job(workers, folder, *scenarios):
    """Runs the program on that many workers, and leaves none behind."""
    reserved = reserve_ports(workers)
    ports = [sock.getsockname()[1] for sock in reserved]
    environments = worker_environments(ports, os.environ)
    command = [sys.executable, "-m", program.__name__, folder, *scenarios]
    logs = [folder / f"output-{i}.txt" for i in range(workers)]
    processes, ends = [], {}
    begin = time.monotonic()
    try:
        for environment, log in zip(environments, logs, strict=True):
            with open(log, "wb") as file:
                processes.append(
                    subprocess.Popen(
                        command,
                        cwd=ROOT,
                        env=environment,
                        stdout=file,
                        stderr=subprocess.STDOUT,
                    )
                )
        while len(ends) < workers and time.monotonic() < begin + JOB_SECONDS:
            time.sleep(0.05)
            for i, process in enumerate(processes):
                if process.poll() is not None:
                    ends.setdefault(i, time.monotonic() - begin)
    finally:
        for process in processes:
            process.kill()
            process.wait()
        for sock in reserved:
            sock.close()
    return [
        Ended(
            process.returncode if i in ends else None,
            ends.get(i, JOB_SECONDS),
            logs[i].read_text(errors="replace"),
        )
        for i, process in enumerate(processes)
    ]


def results_of(folder, scenario, ended):
    """What each worker's scenario left; the same bits on all of them."""
    results = []
    for worker, end in enumerate(ended):
        path = folder / f"{scenario}-{worker}.npz"
        assert path.exists(), f"status {end.status}: {end.output[-4000:]}"
        results.append(dict(np.load(path)))
    for other in results[1:]:
        assert_same_bits(other, results[0])
    return results[0]


def assert_same_bits(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.dtype == other[name].dtype
        np.testing.assert_array_equal(value, other[name], err_msg=name)


def parts(results, prefix):
    """The results whose names begin so, by the rest of their names."""
    return {
        name.removeprefix(prefix): value
        for name, value in results.items()
        if name.startswith(prefix)
    }


def one_process(scenario, **arguments):
    """The same scenario in this process, on one device."""
    strategy = tfamp.get_strategy("one_device")
    keras.utils.set_random_seed(0)
    return scenario(strategy, **arguments)


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """The results of a scenario on so many workers, which start once."""

    @functools.cache
    def start_all(workers, mark):
        folder = tmp_path_factory.mktemp(f"workers-{workers}")
        scenarios = SCENARIOS[workers, mark]
        return folder, run_job(workers, folder, *scenarios)

    def start(workers, scenario):
        (mark,) = (
            mark
            for (count, mark), scenarios in SCENARIOS.items()
            if count == workers and scenario in scenarios
        )
        return start_all(workers, mark)

    def results(workers, scenario):
        folder, ended = start(workers, scenario)
        return results_of(folder, scenario, ended)

    results.start = start
    return results


@pytest.mark.parametrize("workers", mostly_long((2, 3), always=[2]))
def test_workers_train_a_small_model_as_one_process_does(job, workers):
    """In as many microbatches, and the whole batch at once.

    At once a gradient is rounded to float16 once, and not once a worker.
    """
    results = job(workers, "small")
    assert results["iterations"] == 10
    assert results["skipped"] == 0

    in_pieces = one_process(program.small, microbatches=workers)
    at_once = one_process(program.small)

    for name, value in results.items():
        for expected, tolerance in (
            (in_pieces, SAME_PIECES),
            (at_once, OTHER_PIECES),
        ):
            np.testing.assert_allclose(
                value, expected[name], **tolerance, err_msg=name
            )


@pytest.mark.long
@pytest.mark.parametrize("workers", [2, 3])
def test_workers_train_the_image_recipe_as_one_process_does(job, workers):
    """In as many microbatches: batch normalization sees the same pieces.

    Trainable weights are compared. The moving statistics of several replicas
    are the mean over them; those of one move once for each microbatch.
    """
    results = job(workers, "recipe")
    assert results["iterations"] == program.RECIPE_STEPS
    assert results["skipped"] == 0

    expected = one_process(program.recipe, microbatches=workers)

    ours, theirs = (
        np.concatenate([w.ravel() for w in parts(each, "weight").values()])
        for each in (results, expected)
    )
    np.testing.assert_allclose(ours, theirs, **SAME_PIECES)
    assert np.isclose(ours, theirs, **FLOAT32_ROUNDING).mean() > 0.99


@pytest.mark.slow
@pytest.mark.parametrize("workers", mostly_long((2, 3), always=[2]))
def test_each_example_counts_once_in_uneven_last_batches(job, workers):
    results = job(workers, "evaluation")

    assert list(results["history_rows"]) == [13, 13]
    assert list(results["history_val_rows"]) == [25, 25]
    assert results["evaluate_rows"] == 37
    expected = one_process(program.evaluation)
    assert results.keys() == expected.keys()
    for name, value in results.items():
        np.testing.assert_allclose(
            value, expected[name], **FLOAT32_ROUNDING, err_msg=name
        )


@pytest.mark.slow
def test_each_worker_gets_the_outputs_of_all_rows_in_order(job):
    outputs = job(2, "prediction")
    rows = np.arange(13, dtype="float32")[:, None]
    for size in (4, 3):
        for name, expected in (
            ("double", 2 * rows),
            ("same", rows),
            ("less", rows - 1),
        ):
            found = outputs[f"{name} {size}"]
            assert found.dtype == "float32"
            np.testing.assert_array_equal(found, expected)


@pytest.mark.slow
def test_workers_decode_their_rows_and_have_the_numbers_of_one_process(job):
    results = job(2, "sharded")

    expected = one_process(program.sharded)

    assert expected.pop("decoded") == 2 * 13
    # 3, 3 and 1 of 6, 6 and 1 rows, twice.
    assert results.pop("decoded") == 2 * 7
    assert results.keys() == expected.keys()
    for name, value in results.items():
        np.testing.assert_allclose(
            value, expected[name], **FLOAT32_ROUNDING, err_msg=name
        )


def test_overflow_on_any_worker_skips_the_step_on_all(job):
    results = job(2, "overflow")

    scale, steps = 2.0**16, 1
    for i, where in enumerate(("worker 0", "worker 1", "both workers")):
        before = parts(results, f"clean{i}_")
        skipped = parts(results, f"poisoned{i}_")
        after = parts(results, f"clean{i + 1}_")
        assert_same_bits(parts(skipped, "state"), parts(before, "state"))
        assert skipped["scale"] == scale / 2, where
        assert skipped["skipped"] == i + 1, where
        assert skipped["consecutive"] == 1
        assert skipped["iterations"] == steps

        assert after["scale"] == scale / 2
        assert after["skipped"] == i + 1
        assert after["consecutive"] == 0
        assert after["iterations"] == steps + 1
        assert all(np.isfinite(value).all() for value in after.values())
        assert (after["state0"] != before["state0"]).any()
        scale, steps = scale / 2, steps + 1


@pytest.mark.slow
def test_each_dtype_crosses_between_workers(job):
    """And a variable of any dtype begins as the chief's on all workers."""
    results = job(2, "reduction")

    reduction_cases.check(results, replicas=2, local=1)
    drawn = np.random.default_rng(0).integers(0, 2, (3, 5))
    for name in ("bfloat16", "int8", "float16", "bool", "uint8", "float32"):
        value = reduction_cases.read(results, f"variable/{name}/0")
        assert value.dtype == reduction_cases.numpy_dtype(name)
        np.testing.assert_array_equal(value.astype("int64"), drawn)


@pytest.mark.long
@pytest.mark.parametrize("base_dtype", ["bfloat16", "int8"])
def test_workers_train_beside_a_narrow_base(job, base_dtype):
    results = parts(job(2, "low_rank"), f"{base_dtype}_")

    test_lora.check_training(results, base_dtype)


@pytest.mark.slow
def test_what_overflowed_first_is_named_with_its_worker(job):
    said = job(2, "blame")["said"]

    plants = test_blame.PLANTS[:3] + test_blame.PLANTS[-2:]
    for line, plant in zip(said, plants, strict=True):
        worker = plant.row // 4
        assert f"on replica {worker} (worker {worker})" in line
        assert plant.at_fault in line
        assert (
            plant.layer is None
            or f"layer {plant.layer} on" in line
            or (f"{plant.layer}/" in line)
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("callback", "epochs", "steps"),
    [
        ("step_on_0", 1, 2),
        ("step_on_1", 1, 2),
        ("epoch_on_1", 2, 6),
        ("early", 3, 9),
    ],
)
def test_a_callback_on_one_worker_stops_all(job, callback, epochs, steps):
    results = job(2, "stop")

    assert results[f"{callback}_epochs"] == epochs
    assert results[f"{callback}_iterations"] == steps


@pytest.mark.slow
def test_no_worker_goes_on_while_another_may_still_read_of_it(job):
    ended = job(2, "parting")

    assert all(ended[name] for name in ("fit", "evaluate", "predict"))


@pytest.mark.slow
def test_the_chief_alone_writes_files_and_reports(job):
    job(2, "files")

    folder, ended = job.start(2, "files")
    written = {path.name for path in (folder / "files-0").iterdir()}
    assert written == {"log.csv", "model.keras", "run"}
    run = {path.name for path in (folder / "files-0" / "run").iterdir()}
    assert run >= {
        *("metrics.csv", "metrics.jsonl", "run.json", "scale.jsonl"),
        "tensorboard",
    }
    assert not list((folder / "files-1").iterdir())
    chief, other = ("epoch 1/2" in end.output for end in ended)
    assert chief
    assert not other


@pytest.mark.long
@pytest.mark.parametrize(
    ("index", "combination"),
    [
        pytest.param(index, combination, id="-".join(map(str, combination)))
        for index, combination in enumerate(program.MATRIX_ROW)
    ],
)
def test_every_choice_trains_on_workers_as_float32_on_one_device(
    job, index, combination
):
    results = parts(job(2, "matrix"), f"{index}_")

    test_matrix.check(results, precision=combination[0])


@pytest.mark.long
def test_shards_change_no_bit_on_workers(job):
    results = job(2, "shards")
    whole, sharded = parts(results, "False_"), parts(results, "True_")
    assert whole["pieces_skipped"] >= 2
    assert_same_bits(whole, sharded)


@pytest.mark.long
@pytest.mark.parametrize("factor", program.WIRE_FACTORS)
def test_gradients_of_any_size_cross_in_float16(job, factor):
    results = job(2, "wire")
    weight = results[f"{factor:g}_weight"]
    np.testing.assert_allclose(weight, -factor, rtol=2**-11)
    # What makes it right: the sum was one of float16 numbers.
    assert not np.array_equal(weight, np.full((4, 1), -np.float32(factor)))
    forward = test_wire.ROWS @ weight
    np.testing.assert_array_equal(results[f"{factor:g}_forward"], forward)


def steps_of(end):
    return [int(n) for n in re.findall(r"^step (\d+)$", end.output, re.M)]


@pytest.mark.long
def test_an_interrupted_job_ends_as_one_that_was_not(job, tmp_path):
    def start(number, worker, epoch):
        what = {"number": number, "worker": worker, "epoch": epoch}
        return run_job(2, tmp_path, f"interrupted:{json.dumps(what)}")

    # SIGTERM to one: both save and end.
    ended = start(signal.SIGTERM, worker=1, epoch=1)
    saved = [
        re.findall(r"^tfamp: SIGTERM: saved after (.*);", end.output, re.M)
        for end in ended
    ]
    assert [end.status for end in ended] == [Preempted.STATUS] * 2, ended
    assert saved[0] == saved[1]
    epoch, step = map(int, re.findall(r"\d+", saved[0][0]))
    position = program.EPOCH_STEPS * epoch + step
    assert position % program.EPOCH_STEPS

    # SIGKILL to one, the chief or not: the other ends by itself.
    for killed, epoch in ((1, 2), (0, 3)):
        ended = start(signal.SIGKILL, worker=killed, epoch=epoch)
        survivor = ended[1 - killed]
        assert ended[killed].status == -signal.SIGKILL
        assert survivor.status == Preempted.STATUS, survivor.output
        lines = re.findall(r"^tfamp: .*", survivor.output, re.M)
        assert len(lines) == 1
        assert f"worker {killed} stopped answering" in lines[0]
        assert "Traceback" not in survivor.output
        seconds = survivor.seconds - ended[killed].seconds
        assert 0 < seconds < WORKER_LOST_SECONDS + MARGIN_SECONDS
        assert steps_of(survivor)[0] == position + 1
        # Saved at the end of each epoch.
        last = steps_of(survivor)[-1]
        position = last // program.EPOCH_STEPS * program.EPOCH_STEPS
        assert last > position

    ended = start(signal.SIGTERM, worker=0, epoch=program.EPOCHS)
    assert [end.status for end in ended] == [0, 0], ended
    for end in ended:
        assert steps_of(end)[0] == position + 1
    results = results_of(tmp_path, "interrupted", ended)
    assert_same_bits(results, job(2, "resumable"))
