"""What 0.1.0 wrote, under the names that its classes had then, goes on."""

import pathlib
import shutil

import keras
import numpy as np
import pytest

import tfamp
from tests.saving.former_run import EPOCHS_BEFORE, build_model, make_dataset

FORMER = pathlib.Path(__file__).with_name("written_by_0_1_0")


def former_weights():
    with np.load(FORMER / "weights.npz") as weights:
        return list(weights.values())


def steps_of(optimizer):
    """Applied and skipped."""
    return int(optimizer.iterations) + int(optimizer.skipped_steps)


# Names of optimizers are in it too: "adamw" was "adam_w" before.
of_3_15 = pytest.mark.skipif(
    keras.__version__.startswith(("3.10", "3.11", "3.12", "3.13", "3.14")),
    reason="Keras 3.15 wrote it, and earlier ones do not read all it writes",
)


@pytest.mark.slow
@of_3_15
def test_a_model_file_of_0_1_0_loads_and_trains_on():
    model = tfamp.load_model(FORMER / "model.keras")
    for weight, former in zip(
        model.get_weights(), former_weights(), strict=True
    ):
        np.testing.assert_array_equal(weight, former)
    assert type(model.optimizer) is tfamp.LossScaleOptimizer
    assert steps_of(model.optimizer) == EPOCHS_BEFORE * 4
    tfamp.fit(model, make_dataset(), epochs=1, verbose=0)
    assert steps_of(model.optimizer) == (EPOCHS_BEFORE + 1) * 4


@pytest.mark.slow
@of_3_15
def test_a_run_of_0_1_0_is_resumed_where_it_was(tmp_path):
    shutil.copytree(FORMER / "checkpoints", tmp_path / "checkpoints")
    with tfamp.precision_scope("mixed_float16"):
        model = build_model()
        done = tfamp.fit(
            model,
            make_dataset(),
            epochs=EPOCHS_BEFORE,
            verbose=0,
            checkpoint_dir=tmp_path / "checkpoints",
        )
        assert done.epoch == []
        for weight, former in zip(
            model.get_weights(), former_weights(), strict=True
        ):
            np.testing.assert_array_equal(weight, former)
        more = tfamp.fit(
            model,
            make_dataset(),
            epochs=EPOCHS_BEFORE + 2,
            verbose=0,
            checkpoint_dir=tmp_path / "checkpoints",
        )
    assert more.epoch == [EPOCHS_BEFORE, EPOCHS_BEFORE + 1]
