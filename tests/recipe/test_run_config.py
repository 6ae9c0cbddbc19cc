"""The flags that recipes share: their ranges, and what they reach."""

import dataclasses

import keras
import pytest
import tensorflow as tf

import tfamp
from tfamp.recipe import RunConfig, configure, fit, flag, start
from tfamp.training import fit as training


@dataclasses.dataclass(frozen=True)
class Config(RunConfig):
    """As a recipe has it."""

    epochs: int = flag(7, "passes", minimum=1)
    width: int = flag(4, "units", minimum=1, below=9)


@dataclasses.dataclass(frozen=True)
class Least:
    """The fields that every recipe must have, and no other."""

    precision: str = "mixed_bfloat16"
    strategy: str = "one_device"
    seed: int = 3


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"width": "0"}, "width=0 is out of range"),
        ({"width": "9"}, r"\[1, 9\)"),
        ({"epochs": "0"}, "epochs=0"),
        ({"batch_size": "-4"}, "batch_size=-4"),
        ({"microbatches": "0"}, "microbatches=0"),
        ({"jit": "maybe"}, "one of auto, on, off"),
        ({"on_overflow": "panic"}, "one of log, ignore, blame, stop"),
    ],
)
def test_a_field_out_of_its_range_is_refused(settings, named):
    with pytest.raises(tfamp.InputError, match=named):
        configure(Config, settings)


def test_a_recipe_changes_a_default_and_keeps_the_rest():
    config = configure(Config, {})
    assert config.epochs == 7
    assert config.on_overflow == "log"


def test_start_sets_seed_and_precision_and_needs_few_fields(capsys):
    strategy = start(Least())
    first = keras.random.normal([3])
    assert keras.config.dtype_policy().name == "mixed_bfloat16"
    assert strategy.num_replicas_in_sync == 1
    start(Least())
    assert tf.reduce_all(first == keras.random.normal([3]))
    assert capsys.readouterr().out == "precision mixed_bfloat16\n" * 2


def test_every_flag_of_fit_reaches_it(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(
        training, "fit", lambda *args, **named: calls.append((args, named))
    )
    config = configure(
        Config,
        {
            "microbatches": "2",
            "steps_per_loop": "5",
            "jit": "off",
            "all_reduce_dtype": "bfloat16",
            "checkpoint_dir": str(tmp_path),
            "on_overflow": "stop",
        },
    )
    fit("model", "train", "eval", config, checkpoint_frozen=False)
    fit("model", "train", None, Config())
    assert calls[0] == (
        ("model", "train"),
        {
            "epochs": 7,
            "validation_data": "eval",
            "callbacks": [],
            "microbatches": 2,
            "steps_per_loop": 5,
            "jit": False,
            "all_reduce_dtype": "bfloat16",
            "checkpoint_dir": str(tmp_path),
            "checkpoint_frozen": False,
            "on_overflow": "stop",
        },
    )
    assert calls[1][1]["checkpoint_frozen"]
    assert calls[1][1]["steps_per_loop"] == "auto"
    assert calls[1][1]["jit"] == "auto"
    assert calls[1][1]["all_reduce_dtype"] is None
    assert calls[1][1]["checkpoint_dir"] is None
