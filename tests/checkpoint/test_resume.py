"""A run that was stopped, by whatever, goes on as if it had not been."""

import itertools
import multiprocessing
import os
import pathlib
import random
import re
import signal
import time

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfamp
from tests.conftest import mostly_slow
from tests.resumable_run import (
    BATCH,
    ROWS,
    STEPS,
    assert_same_bits,
    build_model,
    make_dataset,
    program,
    run,
    state_of,
)
from tfamp.checkpoint.store import Checkpoints
from tfamp.errors import Preempted

# It imports TensorFlow once; each process is a fork of it.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["tests.resumable_run"])


class Program:
    """A run in a process of its own, started again after each end."""

    def __init__(self, folder):
        folder.mkdir(exist_ok=True)
        self.checkpoints = folder / "checkpoints"
        self.weights = folder / "weights.npz"
        self.errors = folder / "errors.txt"
        self.process = None

    def start(self, saves=True, epochs=8):
        flags = [f"--weights={self.weights}", f"--epochs={epochs}"]
        if saves:
            flags.append(f"--checkpoint_dir={self.checkpoints}")
        self.process = processes.Process(
            target=program, args=(flags, self.errors), daemon=True
        )
        self.process.start()

    def names(self):
        if not self.checkpoints.exists():
            return set()
        return set(os.listdir(self.checkpoints))

    def wait_for(self, is_time):
        """Returns when it is time, or the process has ended."""
        while self.process.is_alive() and not is_time(self.names()):
            time.sleep(0.0002)

    def end(self, signal_number=None):
        """Its exit status, after a signal, if any."""
        if signal_number is not None:
            os.kill(self.process.pid, signal_number)
        self.process.join(60)
        assert self.process.exitcode is not None
        return self.process.exitcode

    def lines(self):
        """What the user was told; TensorFlow has its own lines."""
        lines = self.errors.read_text().splitlines()
        return [line for line in lines if line.startswith("tfamp: ")]

    def result(self):
        with np.load(self.weights) as weights:
            return list(weights.values())


def saving(names):
    """Some tensors are written, and not all is done."""
    return any(name.endswith("_temp") for name in names)


def moved_without_index(names):
    return any(
        ".data" in name and name.split(".")[0] + ".index" not in names
        for name in names
    )


@pytest.fixture(scope="module")
def never_stopped(tmp_path_factory):
    """The variables at the end of a run that nothing happened to."""
    job = Program(tmp_path_factory.mktemp("whole"))
    job.start(saves=False)
    assert job.end() == 0, job.errors.read_text()
    return job.result()


@pytest.mark.parametrize(
    "kills",
    [
        pytest.param(4, marks=pytest.mark.slow),
        pytest.param(10, marks=pytest.mark.long),
    ],
)
def test_a_run_killed_again_and_again_ends_with_the_same_bits(
    never_stopped, tmp_path, kills
):
    job = Program(tmp_path)
    generator = random.Random(0)
    for kill in range(kills):
        before = job.names()
        job.start()
        if kill % 2:
            # Past the start, and then at any moment; most go into saving.
            job.wait_for(lambda names, seen=before: names != seen)
            time.sleep(generator.uniform(0.0, 0.15))
        else:
            job.wait_for((saving, moved_without_index)[kill // 2 % 2])
        assert job.end(signal.SIGKILL) == -signal.SIGKILL, "it ended too early"
    assert not job.weights.exists()
    job.start()
    assert job.end() == 0, job.errors.read_text()
    assert_same_bits(job.result(), never_stopped)
    # Nothing of the killed saves is left.
    assert not saving(job.names())
    assert not moved_without_index(job.names())


class TestSigterm:
    @pytest.mark.slow
    def test_saves_and_asks_to_be_started_again(self, never_stopped, tmp_path):
        job = Program(tmp_path)
        job.start()
        job.wait_for(lambda names: "ckpt-9.index" in names)
        assert job.end(signal.SIGTERM) == Preempted.STATUS == 75
        (line,) = job.lines()
        assert re.fullmatch(
            r"tfamp: SIGTERM: saved after epoch \d, step \d; start the same "
            "command again to go on.",
            line,
        )
        assert not job.weights.exists()
        job.start()
        assert job.end() == 0, job.errors.read_text()
        assert_same_bits(job.result(), never_stopped)

    @pytest.mark.slow
    @pytest.mark.parametrize("saves", [True, False])
    def test_is_handled_as_before_where_nothing_can_be_saved(
        self, saves, tmp_path
    ):
        """Without checkpoints, and when fit is over."""
        seen = []
        former = signal.signal(signal.SIGTERM, lambda *_: seen.append("mine"))

        class Terminate(keras.callbacks.Callback):
            def on_train_batch_end(self, batch, logs=None):
                os.kill(os.getpid(), signal.SIGTERM)

        try:
            if saves:
                with pytest.raises(Preempted, match="after epoch 0, step 1;"):
                    run(
                        tmp_path,
                        callbacks=[Terminate()],
                        seconds_between_saves=300,
                    )
                assert not seen
                checkpoints = Checkpoints(build_model(), tmp_path)
                position = checkpoints.restore()
                assert (position.epoch, position.step) == (0, 1)
                os.kill(os.getpid(), signal.SIGTERM)
                assert seen == ["mine"]
            else:
                run(None, epochs=1, callbacks=[Terminate()])
                assert seen == ["mine"] * STEPS
        finally:
            signal.signal(signal.SIGTERM, former)


class Steps(keras.callbacks.Callback):
    """Notes down what callbacks are told, and a random number each time."""

    def __init__(self):
        super().__init__()
        self.told = []

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_begin(self, batch, logs=None):
        self.begin = batch

    def on_train_batch_end(self, batch, logs=None):
        assert self.begin == batch
        figures = logs["loss"], logs["accuracy"], random.random()
        self.told.append((self.epoch, batch, *figures))

    def on_epoch_end(self, epoch, logs=None):
        self.told.append((epoch, logs["loss"], logs["skipped_steps"]))


def repeated():
    return make_dataset().repeat()


def of_unknown_length():
    """From Python, whose random order goes on from epoch to epoch."""
    inputs, labels = next(iter(make_dataset().unbatch().batch(ROWS)))

    def rows():
        order = np.random.permutation(ROWS)
        for i in order:
            yield inputs[i], labels[i]

    signature = (
        tf.TensorSpec((4,), tf.float32),
        tf.TensorSpec((), tf.int64),
    )
    dataset = tf.data.Dataset.from_generator(rows, output_signature=signature)
    return dataset.batch(BATCH)


class TestInAnEpoch:
    def check(self, directory, *, stop_after, replicas=None, **options):
        """Weights, logs of each epoch and what callbacks see are the same."""
        whole_steps, resumed_steps = Steps(), Steps()
        whole, history = run(
            None, strategy=replicas, callbacks=[whole_steps], **options
        )
        assert int(whole.optimizer.skipped_steps.numpy()) > 1
        run(
            directory,
            strategy=replicas,
            stop_after=stop_after,
            callbacks=[Steps()],
            **options,
        )
        resumed, again = run(
            directory, strategy=replicas, callbacks=[resumed_steps], **options
        )
        assert_same_bits(state_of(resumed), state_of(whole))
        epochs = len(again["loss"])
        assert epochs < 3
        assert again == {k: v[-epochs:] for k, v in history.items()}
        assert (
            resumed_steps.told == whole_steps.told[-len(resumed_steps.told) :]
        )
        # The step that was not saved is done again, and none before it.
        steps = len(resumed_steps.told) - epochs
        assert steps == 3 * STEPS - stop_after + 1

    @pytest.mark.parametrize("replicas", mostly_slow([1, 2], always=[1]))
    def test_all_goes_on_as_it_was(self, replicas, mirrored, tmp_path):
        self.check(tmp_path, stop_after=11, replicas=mirrored(replicas))

    @pytest.mark.slow
    def test_validation_is_the_same(self, tmp_path):
        fixed = make_dataset().cache()
        self.check(tmp_path, stop_after=11, validation_data=fixed)

    @pytest.mark.slow
    def test_data_without_end_go_on(self, tmp_path):
        self.check(
            tmp_path, stop_after=10, make_data=repeated, steps_per_epoch=STEPS
        )

    @pytest.mark.slow
    def test_data_of_unknown_length_go_on(self, tmp_path):
        self.check(tmp_path, stop_after=9, make_data=of_unknown_length)

    @pytest.mark.slow
    def test_after_its_last_step_only_its_end_is_left(
        self, tmp_path, monkeypatch
    ):
        """Killed when the last step was saved and the epoch's end was not."""
        whole, history = run(None, epochs=1)
        save = Checkpoints.save

        def save_no_end(self, position, logs=None):
            if logs is None:
                save(self, position, logs)

        with monkeypatch.context() as patch:
            patch.setattr(Checkpoints, "save", save_no_end)
            run(tmp_path, epochs=1)
        resumed, again = run(tmp_path, epochs=1)
        assert_same_bits(state_of(resumed), state_of(whole))
        assert again == history

    @pytest.mark.slow
    def test_skips_before_it_are_no_reason_to_stop(self, tmp_path):
        saved, _ = run(tmp_path, stop_after=11)
        skipped = int(saved.optimizer.skipped_steps.numpy())
        assert skipped > 0
        model = build_model()
        history = tfamp.fit(
            model,
            make_dataset().map(lambda x, y: (tf.clip_by_value(x, -1, 1), y)),
            epochs=3,
            checkpoint_dir=tmp_path,
            on_overflow="stop",
            verbose=0,
        )
        assert history.epoch == [1, 2]
        assert int(model.optimizer.skipped_steps.numpy()) == skipped


class TestAtTheEnd:
    @pytest.mark.slow
    def test_a_finished_run_gives_the_same_weights_again(self, tmp_path):
        model, _ = run(tmp_path, epochs=2)
        for _ in range(2):
            again, history = run(tmp_path, epochs=2)
            assert not history
            assert_same_bits(state_of(again), state_of(model))

    @pytest.mark.slow
    def test_a_finished_run_goes_on_to_more_epochs(self, tmp_path):
        """From its weights, not from the averages it ended with."""
        whole, history = run(None, epochs=3)
        run(tmp_path, epochs=2)
        more, last = run(tmp_path, epochs=3)
        assert_same_bits(state_of(more), state_of(whole))
        assert last == {k: v[2:] for k, v in history.items()}

    @pytest.mark.slow
    def test_a_finished_run_reads_no_data(self, tmp_path):
        reads = []

        def rows():
            reads.append(1)
            yield from make_dataset().unbatch().as_numpy_iterator()

        def from_python():
            signature = make_dataset().unbatch().element_spec
            return tf.data.Dataset.from_generator(
                rows, output_signature=signature
            ).batch(BATCH)

        run(tmp_path, epochs=2, make_data=from_python)
        assert len(reads) >= 2
        reads.clear()
        run(tmp_path, epochs=2, make_data=from_python)
        assert not reads

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("best", "last"),
        mostly_slow(
            itertools.product([False, True], repeat=2), always=[(True, True)]
        ),
    )
    def test_one_that_early_stopping_ended_stays_so(
        self, best, last, tmp_path, warnings_of_absl
    ):
        def stopping():
            return keras.callbacks.EarlyStopping(
                "loss",
                mode="max",
                min_delta=100.0,
                patience=2,
                restore_best_weights=best,
            )

        epochs = 3 if last else 6
        model, history = run(tmp_path, epochs=epochs, callbacks=[stopping()])
        assert len(history["loss"]) == 3
        assert not warnings_of_absl
        for _ in range(2):
            again, more = run(tmp_path, epochs=9, callbacks=[stopping()])
            assert not more
            assert_same_bits(state_of(again), state_of(model))
        assert warnings_of_absl == 2 * [
            "The run was stopped after epoch 3, and stays so; choose another "
            "checkpoint_dir to train on."
        ]

    @pytest.mark.slow
    def test_data_that_ended_begin_anew_where_they_would_have(self, tmp_path):
        """Epochs of 4 and 2 steps take turns, as 6 batches give them."""
        options = {"epochs": 4, "steps_per_epoch": 4}
        with pytest.warns(UserWarning, match="ended after 2 of 4 steps"):
            whole, _ = run(None, **options)
        with pytest.warns(UserWarning, match="ended after 2 of 4 steps"):
            run(tmp_path, stop_after=9, **options)
        with pytest.warns(UserWarning, match="ended after 2 of 4 steps"):
            resumed, _ = run(tmp_path, **options)
        assert_same_bits(state_of(resumed), state_of(whole))


class Restored(keras.callbacks.Callback):
    """What the model holds when training begins, right after the restore."""

    def on_train_begin(self, logs=None):
        optimizer = self.model.optimizer
        inner = optimizer.inner_optimizer
        self.inner = [v.numpy() for v in inner.variables]
        self.weights = [v.numpy() for v in self.model.variables]
        self.rate = float(inner.learning_rate.numpy())
        self.scale = float(optimizer.dynamic_scale.numpy())
        self.skipped = int(optimizer.skipped_steps.numpy())


class TestAnotherPrecision:
    @pytest.mark.slow
    def test_carries_all_but_the_scale_over(self, tmp_path):
        """To bfloat16 and float32 and back; each goes on with the step."""
        model, history = run(tmp_path, epochs=9, stop_after=STEPS + 4)
        losses = history["loss"]
        for precision, scale in (
            ("mixed_bfloat16", 1.0),
            ("float32", 1.0),
            ("mixed_float16", 2.0**16),
        ):
            saved = build_model(precision=model.dtype_policy.name)
            position = Checkpoints(saved, tmp_path).restore()
            assert position.step > 0
            restored = Restored()
            model, history = run(
                tmp_path,
                epochs=9,
                precision=precision,
                stop_after=2 * STEPS,
                callbacks=[restored],
            )
            inner = saved.optimizer.inner_optimizer
            assert_same_bits(
                restored.inner, [v.numpy() for v in inner.variables]
            )
            assert int(inner.iterations.numpy()) > 0
            assert restored.rate == float(inner.learning_rate.numpy())
            assert_same_bits(
                restored.weights, [v.numpy() for v in saved.variables]
            )
            assert restored.scale == scale
            assert restored.skipped == int(
                saved.optimizer.skipped_steps.numpy()
            )
            losses = losses + history["loss"]
        assert len(losses) == 7
        assert losses[-1] < losses[0]
        assert np.isfinite(losses).all()


def cut_short(directory, number=None):
    """Tears the newest checkpoint, or the one of that number."""
    indices = pathlib.Path(directory).glob("ckpt-*.index")
    numbers = sorted(int(f.stem.partition("-")[2]) for f in indices)
    number = numbers[-1] if number is None else number
    (file,) = pathlib.Path(directory).glob(f"ckpt-{number}.data*")
    file.write_bytes(file.read_bytes()[:100])
    return numbers


def contents(directory):
    files = [f for f in pathlib.Path(directory).rglob("*") if f.is_file()]
    return {f: f.read_bytes() for f in files}


class TestBadDirectory:
    @pytest.mark.slow
    def test_a_torn_newest_is_told_and_the_one_before_it_used(
        self, tmp_path, warnings_of_absl
    ):
        whole, _ = run(None)
        run(tmp_path, stop_after=9)
        number = cut_short(tmp_path)[-1]
        resumed, _ = run(tmp_path)
        # The callback that stops the run is not a state to go on from.
        (line,) = (each for each in warnings_of_absl if "StopAfter" not in each)
        assert f"ckpt-{number} cannot be read and is passed over" in line
        assert "\n" not in line
        assert_same_bits(state_of(resumed), state_of(whole))

    def test_nothing_but_torn_ones_end_the_program(self, tmp_path):
        job = Program(tmp_path)
        run(job.checkpoints, stop_after=9)
        for number in cut_short(job.checkpoints):
            cut_short(job.checkpoints, number)
        before = contents(job.checkpoints)
        job.start()
        assert job.end() == 2
        assert job.lines() == [
            f"tfamp: None of the checkpoints in {job.checkpoints} can be read; "
            "move them away to start anew."
        ]
        assert contents(job.checkpoints) == before

    @pytest.mark.parametrize("make", ["stranger", "file", "unwritable"])
    def test_one_that_cannot_be_used_ends_it_before_training(
        self, make, tmp_path
    ):
        (tmp_path / "thesis.txt").write_text("mine")
        directory, message = {
            "stranger": (tmp_path, r"holds 'thesis\.txt'"),
            "file": (tmp_path / "thesis.txt", "is a file"),
            "unwritable": (tmp_path / "thesis.txt" / "deep", "Cannot save"),
        }[make]
        steps = Steps()
        with pytest.raises(tfamp.InputError, match=message) as raised:
            run(directory, callbacks=[steps])
        assert "\n" not in str(raised.value)
        assert not steps.told
        assert contents(tmp_path) == {tmp_path / "thesis.txt": b"mine"}

    @pytest.mark.slow
    def test_a_checkpoint_of_another_model_is_refused(self, tmp_path):
        run(tmp_path, stop_after=3)
        before = contents(tmp_path)
        other = build_model(units=9)
        weights = state_of(other)
        with pytest.raises(
            tfamp.InputError, match=r"sequential/dense/kernel is \(4, 8\)"
        ) as raised:
            tfamp.fit(other, make_dataset(), checkpoint_dir=tmp_path, verbose=0)
        assert "\n" not in str(raised.value)
        assert_same_bits(state_of(other), weights)
        assert contents(tmp_path) == before


def test_a_fast_run_saves_at_each_epochs_end_only(tmp_path, monkeypatch):
    positions = []
    save = Checkpoints.save

    def noted(self, position, logs=None):
        positions.append((position.epoch, position.step))
        save(self, position, logs)

    monkeypatch.setattr(Checkpoints, "save", noted)
    tfamp.fit(
        build_model(),
        make_dataset(),
        epochs=2,
        checkpoint_dir=tmp_path,
        on_overflow="ignore",
        verbose=0,
    )
    assert positions == [(1, 0), (2, 0)]
