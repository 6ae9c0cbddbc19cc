"""What is saved comes back whole, or is told to be something else."""

import functools
import os
import pathlib
import random
import re
import shutil

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfamp
from tests.conftest import mostly_long, mostly_slow
from tests.resumable_run import (
    assert_same_bits,
    build_model,
    run,
    state_of,
)
from tfamp import keras_internals
from tfamp.checkpoint.random_state import get_random_state, set_random_state
from tfamp.checkpoint.store import Checkpoints, Position


def files_of(directory, number):
    return sorted(pathlib.Path(directory).glob(f"ckpt-{number}.*"))


def variables_of(model):
    return [
        *model.variables,
        *model.optimizer.variables,
        *model.metrics_variables,
    ]


@functools.cache
def trained_values():
    """Of all variables, after a few steps."""
    model, _ = run(None, epochs=1, stop_after=2)
    return [variable.numpy() for variable in variables_of(model)]


def saved_run(directory, saves=2):
    """A model that trained a few steps, saved that often; its checkpoints."""
    model = build_model()
    for variable, value in zip(
        variables_of(model), trained_values(), strict=True
    ):
        variable.assign(value)
    checkpoints = Checkpoints(model, directory)
    for epoch in range(saves):
        model.optimizer.inner_optimizer.iterations.assign(100 + epoch)
        checkpoints.save(Position(epoch))
    return model, checkpoints


class TestRestore:
    @pytest.mark.slow
    def test_replicas_of_another_number_take_it_over(self, mirrored, tmp_path):
        """What they count is the same sum; averages are the replicas' mean."""

        def results(model):
            return {
                name: float(value)
                for name, value in model.get_metrics_result().items()
            }

        strategy = mirrored(2)
        model, _ = run(None, strategy=strategy, stop_after=4)
        Checkpoints(model, tmp_path).save(Position(0, 4))
        statistics = model.layers[1].moving_mean.value
        one, other = strategy.experimental_local_results(statistics)
        assert (one.numpy() != other.numpy()).any()
        expected = results(model)
        assert expected["loss"] > 0
        for replicas in (4, 1, 2):
            with mirrored(replicas).scope():
                other = build_model()
            checkpoints = Checkpoints(other, tmp_path)
            assert checkpoints.restore() == Position(0, 4)
            assert results(other) == pytest.approx(expected, rel=1e-6)
            for path, here, there in zip(
                [
                    v.path
                    for v in (*other.variables, *other.optimizer.variables)
                ],
                state_of(other),
                state_of(model),
                strict=True,
            ):
                assert len(here) == replicas
                for row in here:
                    if "moving" in path:
                        mean = there.mean(axis=0)
                        np.testing.assert_allclose(row, mean, rtol=1e-6)
                    else:
                        np.testing.assert_array_equal(row, there[0])
            # On from here with what that strategy made of it.
            checkpoints.save(Position(0, 4))
            model = other

    @pytest.mark.slow
    def test_random_numbers_of_the_process_go_on(self, tmp_path):
        def draw():
            return (
                random.gauss(0, 1),
                np.random.normal(),
                keras.random.normal((1,)).numpy().tolist(),
            )

        model, checkpoints = saved_run(tmp_path, saves=1)
        draw()
        checkpoints.save(Position(1))
        expected = [draw(), draw()]
        keras.utils.set_random_seed(9)
        restored = Checkpoints(model, tmp_path)
        restored.restore()
        restored.restore_random_state()
        assert [draw(), draw()] == expected

    def test_random_state_is_right_before_anything_drew(self):
        # Keras up to 3.12 keeps what drew before the seed.
        keras_internals.forget_global_seed_generator()
        keras.utils.set_random_seed(4)
        state = get_random_state()
        assert state["keras"] is None
        set_random_state(state)
        assert get_random_state() == state

    def test_of_a_model_with_several_optimizers(self, tmp_path):
        class Gan(keras.Model):
            def __init__(self):
                super().__init__()
                self.parts = [keras.layers.Dense(2), keras.layers.Dense(1)]
                self.one = tfamp.wrap_optimizer("adam", "mixed_float16")
                self.other = tfamp.wrap_optimizer("sgd", "mixed_float16")
                for part, optimizer in zip(
                    self.parts, (self.one, self.other), strict=True
                ):
                    part.build((None, 3))
                    optimizer.build(part.trainable_variables)

        model, other = Gan(), Gan()
        model.one.dynamic_scale.assign(8.0)
        model.other.skipped_steps.assign(5)
        Checkpoints(model, tmp_path).save(Position(1, 2, {"seen": [1.5]}))
        position = Checkpoints(other, tmp_path).restore()
        assert position == Position(1, 2, {"seen": [1.5]})
        assert float(other.one.dynamic_scale.numpy()) == 8.0
        assert int(other.other.skipped_steps.numpy()) == 5
        assert_same_bits(
            [v.numpy() for v in other.variables],
            [v.numpy() for v in model.variables],
        )

    def test_of_a_directory_that_does_not_exist_begins_anew(self, tmp_path):
        assert Checkpoints(build_model(), tmp_path / "new").restore() is None
        assert not (tmp_path / "new").exists()


class TestAnotherPrecision:
    @pytest.mark.slow
    def test_keeps_all_but_the_scale(self, tmp_path):
        model, _ = run(None, stop_after=4)
        skipped = int(model.optimizer.skipped_steps.numpy())
        assert skipped > 0
        for precision, scale in (
            ("mixed_bfloat16", 1.0),
            ("float32", 1.0),
            ("mixed_float16", 2.0**16),
        ):
            Checkpoints(model, tmp_path).save(Position(0, 4))
            other = build_model(precision=precision)
            other.optimizer.step_counter.assign(3)
            assert Checkpoints(other, tmp_path).restore() == Position(0, 4)
            assert_same_bits(
                state_of(other)[-len(other.optimizer.variables) + 5 :],
                state_of(model)[-len(model.optimizer.variables) + 5 :],
            )
            assert_same_bits(
                [v.numpy() for v in other.variables],
                [v.numpy() for v in model.variables],
            )
            optimizer = other.optimizer
            assert float(optimizer.dynamic_scale.numpy()) == scale
            assert int(optimizer.skipped_steps.numpy()) == skipped
            if optimizer.dynamic != model.optimizer.dynamic:
                assert int(optimizer.step_counter.numpy()) == 0
            model = other

    def test_a_dynamic_scale_goes_on_in_a_dynamic_run(self, tmp_path):
        model, checkpoints = saved_run(tmp_path, saves=0)
        model.optimizer.dynamic_scale.assign(32.0)
        model.optimizer.step_counter.assign(4)
        checkpoints.save(Position(1))
        other = build_model()
        Checkpoints(other, tmp_path).restore()
        assert float(other.optimizer.dynamic_scale.numpy()) == 32.0
        assert int(other.optimizer.step_counter.numpy()) == 4


class TestAnotherModel:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (
                {"units": 9},
                r"sequential/dense/kernel is \(4, 8\) float32 there, in "
                r"whose place the model has sequential/dense/kernel \(4, 9\)",
            ),
            (
                {"inner": keras.optimizers.SGD(0.1)},
                r"it lacks (?i:sgd)/iteration \(\) int",
            ),
        ],
    )
    def test_is_told_in_one_line_what_differs(self, options, message, tmp_path):
        saved_run(tmp_path)
        other = build_model(**options)
        before = state_of(other)
        with pytest.raises(tfamp.InputError, match=message) as raised:
            Checkpoints(other, tmp_path).restore()
        assert "\n" not in str(raised.value)
        assert_same_bits(state_of(other), before)

    def test_that_lacks_a_variable_is_told_which(self, tmp_path):
        model, _ = saved_run(tmp_path)
        model.add_metric_later = keras.metrics.Mean(name="later")
        Checkpoints(model, tmp_path).save(Position(0))
        with pytest.raises(
            tfamp.InputError,
            match=r"the model lacks its later/total \(\) float32",
        ):
            Checkpoints(build_model(), tmp_path).restore()

    def test_with_an_optimizer_that_is_not_built_is_refused(self, tmp_path):
        model = build_model()
        model.second = keras.optimizers.Adam(name="late")
        with pytest.raises(tfamp.InputError, match="'late' is not built"):
            Checkpoints(model, tmp_path)

    def test_saved_by_something_else_is_refused(self, tmp_path):
        tf.train.Checkpoint(v=tf.Variable(1.0)).save(str(tmp_path / "ckpt"))
        with pytest.raises(
            tfamp.InputError, match=r"no checkpoint of tfamp\.fit"
        ):
            Checkpoints(build_model(), tmp_path).restore()


def cut_data(directory):
    file = files_of(directory, 2)[0]
    file.write_bytes(file.read_bytes()[:1000])


def cut_index(directory):
    file = files_of(directory, 2)[1]
    file.write_bytes(file.read_bytes()[:1000])


def empty_index(directory):
    files_of(directory, 2)[1].write_bytes(b"")


def lose_data(directory):
    files_of(directory, 2)[0].unlink()


def flip_a_bit(directory):
    file = files_of(directory, 2)[0]
    content = bytearray(file.read_bytes())
    content[200] ^= 4
    file.write_bytes(content)


def spoil_all_bytes(directory):
    for file in files_of(directory, 2):
        file.write_bytes(b"\xff" * len(file.read_bytes()))


def zero_bytes(directory):
    file = files_of(directory, 2)[0]
    content = bytearray(file.read_bytes())
    content[40:104] = bytes(64)
    file.write_bytes(content)


def older_data(directory):
    shutil.copy(files_of(directory, 1)[0], files_of(directory, 2)[0])


def data_is_a_folder(directory):
    file = files_of(directory, 2)[0]
    file.unlink()
    file.mkdir()


def index_is_a_folder(directory):
    file = files_of(directory, 2)[1]
    file.unlink()
    file.mkdir()


DAMAGE = [cut_data, cut_index, empty_index, lose_data, flip_a_bit]
RARE_DAMAGE = [zero_bytes, older_data, data_is_a_folder, index_is_a_folder]


def lose_index(directory):
    files_of(directory, 2)[1].unlink()


def huge_number(directory):
    for file in files_of(directory, 2):
        file.rename(str(file).replace("ckpt-2", f"ckpt-{10**20}"))


def zeros_before(directory):
    for file in files_of(directory, 2):
        file.rename(str(file).replace("ckpt-2", "ckpt-002"))


class TestDamage:
    @pytest.mark.parametrize(
        "damage",
        mostly_slow(
            [*DAMAGE, spoil_all_bytes, *RARE_DAMAGE],
            always=[*DAMAGE, spoil_all_bytes],
        ),
    )
    def test_of_the_newest_is_reported_and_the_one_before_used(
        self, damage, tmp_path, warnings_of_absl
    ):
        model, _ = saved_run(tmp_path)
        damage(tmp_path)
        checkpoints = Checkpoints(model, tmp_path)
        assert checkpoints.restore() == Position(0)
        assert int(model.optimizer.inner_optimizer.iterations.numpy()) == 100
        (line,) = warnings_of_absl
        assert re.search(
            r"ckpt-2 cannot be read and is passed over \(.+\)", line
        )
        assert "\n" not in line
        # The next save does not write over what is left of it.
        checkpoints.save(Position(5))
        assert len(files_of(tmp_path, 3)) == 2
        assert Checkpoints(model, tmp_path).restore() == Position(5)

    @pytest.mark.parametrize(
        "lose",
        mostly_slow(
            [lose_index, huge_number, zeros_before], always=[huge_number]
        ),
    )
    def test_what_is_no_save_by_its_name_is_none(self, lose, tmp_path):
        model, _ = saved_run(tmp_path)
        lose(tmp_path)
        checkpoints = Checkpoints(model, tmp_path)
        assert checkpoints.restore() == Position(0)
        checkpoints.save(Position(5))
        assert Checkpoints(model, tmp_path).restore() == Position(5)

    def test_of_the_best_is_no_reason_to_stop(self, tmp_path):
        model, checkpoints = saved_run(tmp_path)
        checkpoints.save(Position(2), {"loss": 1.0})
        for file in (tmp_path / "best").glob("ckpt-*"):
            file.write_bytes(b"")
        checkpoints = Checkpoints(model, tmp_path)
        assert checkpoints.restore() == Position(2)
        checkpoints.save(Position(3), {"loss": 2.0})
        assert Checkpoints(model, tmp_path).restore_best() == Position(3)

    @pytest.mark.parametrize("content", [None, b"", b"\x00garbage: {"])
    def test_of_tensorflows_record_is_harmless(self, content, tmp_path):
        model, _ = saved_run(tmp_path, saves=3)
        record = tmp_path / "checkpoint"
        record.unlink()
        if content is not None:
            record.write_bytes(content)
        checkpoints = Checkpoints(model, tmp_path)
        assert checkpoints.restore() == Position(2)
        checkpoints.save(Position(3))
        names = [f.stem for f in sorted(tmp_path.glob("*.index"))]
        assert names == ["ckpt-2", "ckpt-3", "ckpt-4"]

    def test_of_all_stops_the_run(self, tmp_path):
        model, _ = saved_run(tmp_path, saves=1)
        for file in files_of(tmp_path, 1):
            file.write_bytes(b"")
        with pytest.raises(tfamp.InputError, match="None of the checkpoints"):
            Checkpoints(model, tmp_path).restore()

    def test_a_lost_index_stops_the_run(self, tmp_path):
        model, _ = saved_run(tmp_path, saves=1)
        (tmp_path / "ckpt-1.index").unlink()
        with pytest.raises(tfamp.InputError, match="None of the checkpoints"):
            Checkpoints(model, tmp_path).restore()
        assert files_of(tmp_path, 1)

    def test_leftovers_of_killed_saves_are_removed(self, tmp_path):
        model, _ = saved_run(tmp_path)
        (tmp_path / "ckpt-3_temp").mkdir()
        (tmp_path / "ckpt-3_temp" / "part-0").write_text("half")
        (tmp_path / "ckpt-3.data-00000-of-00001").write_text("half")
        (tmp_path / "checkpoint.tmp123abc").write_text("half")
        (tmp_path / "notes.txt").write_text("mine")
        checkpoints = Checkpoints(model, tmp_path)
        assert checkpoints.restore() == Position(1)
        checkpoints.save(Position(2))
        assert sorted(f.name for f in tmp_path.iterdir()) == [
            "checkpoint",
            *(f.name for n in (1, 2, 3) for f in files_of(tmp_path, n)),
            "notes.txt",
        ]
        assert Checkpoints(model, tmp_path).restore() == Position(2)

    def test_links_in_the_place_of_leftovers_lose_nothing(self, tmp_path):
        model, _ = saved_run(tmp_path / "saves")
        mine = tmp_path / "mine"
        mine.mkdir()
        (mine / "file").write_text("precious")
        (tmp_path / "saves" / "ckpt-3_temp").symlink_to(mine)
        (tmp_path / "saves" / "checkpoint.tmp").symlink_to(mine / "file")
        checkpoints = Checkpoints(model, tmp_path / "saves")
        checkpoints.restore()
        checkpoints.save(Position(2))
        assert (mine / "file").read_text() == "precious"
        assert os.listdir(mine) == ["file"]
        assert not (tmp_path / "saves" / "ckpt-3_temp").is_symlink()


class TestDirectory:
    def test_that_is_a_link_is_the_folder_that_it_leads_to(self, tmp_path):
        model, _ = saved_run(tmp_path / "real")
        (tmp_path / "link").symlink_to(tmp_path / "real")
        checkpoints = Checkpoints(model, tmp_path / "link")
        assert checkpoints.restore() == Position(1)
        checkpoints.save(Position(2))
        assert Checkpoints(model, tmp_path / "real").restore() == Position(2)

    def test_with_other_files_is_refused(self, tmp_path):
        (tmp_path / "thesis.txt").write_text("mine")
        with pytest.raises(tfamp.InputError, match=r"holds 'thesis\.txt'"):
            Checkpoints(build_model(), tmp_path)
        assert (tmp_path / "thesis.txt").read_text() == "mine"

    def test_that_is_a_file_is_refused(self, tmp_path):
        file = tmp_path / "file"
        file.write_text("mine")
        with pytest.raises(tfamp.InputError, match="is a file"):
            Checkpoints(build_model(), file)

    def test_that_cannot_be_made_is_told_in_one_line(self, tmp_path):
        (tmp_path / "file").write_text("mine")
        checkpoints = Checkpoints(build_model(), tmp_path / "file" / "deeper")
        with pytest.raises(tfamp.InputError, match="Cannot save") as raised:
            checkpoints.save(Position(0))
        assert "\n" not in str(raised.value)


class TestRetention:
    def test_keeps_the_newest_and_the_best(self, tmp_path):
        model, checkpoints = saved_run(tmp_path, saves=0)
        losses = [5.0, 2.0, 3.0, float("nan"), 4.0]
        for epoch, loss in enumerate(losses, start=1):
            model.optimizer.inner_optimizer.iterations.assign(epoch)
            logs = {"loss": -epoch, "val_loss": loss}
            checkpoints.save(Position(epoch), logs)
            checkpoints.save(Position(epoch, 1))
        names = [f.stem for f in sorted(tmp_path.glob("*.index"))]
        assert names == ["ckpt-10", "ckpt-8", "ckpt-9"]
        other = Checkpoints(build_model(), tmp_path)
        assert other.restore_best() == Position(2)
        assert len(list((tmp_path / "best").glob("*.index"))) == 1

    def test_remembers_the_best_in_the_next_process(self, tmp_path):
        model, checkpoints = saved_run(tmp_path, saves=0)
        options = {"monitor": "accuracy", "mode": "max"}
        checkpoints = Checkpoints(model, tmp_path, **options)
        checkpoints.save(Position(1), {"accuracy": 0.9})
        again = Checkpoints(model, tmp_path, **options)
        again.restore()
        again.save(Position(2), {"accuracy": 0.8})
        assert again.restore_best() == Position(1)
        again.save(Position(3), {"accuracy": 0.95})
        assert again.restore_best() == Position(3)
        # What was best by another rule says nothing about this one.
        by_loss = Checkpoints(model, tmp_path)
        by_loss.restore()
        by_loss.save(Position(4), {"loss": 7.0})
        assert by_loss.restore_best() == Position(4)

    @pytest.mark.parametrize(
        "options",
        [{"monitor": "f1"}, {"mode": "max"}, {"monitor": "a", "mode": "?"}],
    )
    def test_refuses_a_rule_that_is_not_one(self, options, tmp_path):
        with pytest.raises(tfamp.InputError, match="expected 'min' or 'max'"):
            Checkpoints(build_model(), tmp_path, **options)

    def test_names_the_metrics_that_there_are(self, tmp_path):
        model, _ = saved_run(tmp_path, saves=0)
        checkpoints = Checkpoints(model, tmp_path, monitor="f1", mode="max")
        with pytest.raises(tfamp.InputError, match="the logs have loss, mae"):
            checkpoints.save(Position(1), {"mae": 1.0, "loss": 2.0})


@pytest.mark.parametrize("copies", mostly_long((3, 20), always=[3]))
def test_copies_of_a_save_cut_anywhere_fall_back(tmp_path, copies):
    """What a kill or a full disk can leave of the newest, at many places."""
    model, _ = saved_run(tmp_path / "whole")
    generator = random.Random(1)
    for _ in range(copies):
        copy = tmp_path / "copy"
        shutil.copytree(tmp_path / "whole", copy)
        data, index = files_of(copy, 2)
        file = generator.choice((data, index))
        content = file.read_bytes()
        file.write_bytes(content[: generator.randrange(len(content))])
        assert Checkpoints(model, copy).restore() == Position(0)
        shutil.rmtree(copy)
