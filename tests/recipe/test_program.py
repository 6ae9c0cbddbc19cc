import dataclasses
import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
import time
from typing import Literal, Optional

import absl.logging
import pytest
import tensorflow as tf

import tfamp
from tests.conftest import ROOT, mostly_slow
from tfamp import recipe
from tfamp.recipe.flags import parse_flags, parse_value

# A whole recipe of the smallest size. `--behave` picks how it ends.
RECIPE = '''"""Adds numbers, to test recipes.

Command: python -m tiny
"""

import dataclasses
import sys
import time
from typing import Literal

from absl import flags
import keras
import numpy as np
import tensorflow as tf

import tfamp
from tfamp.recipe import flag


@dataclasses.dataclass(frozen=True)
class Config:
    precision: Literal["auto", "float32"] = flag("float32", "Compute dtype.")
    strategy: str = "auto"
    dataset: str = "ones"
    data_dir: str = ""
    batch_size: int = flag(4, "Examples per step.")
    epochs: int = 1
    seed: int = 0
    output_dir: str = ""
    shuffle: bool = True
    behave: str = "well"


def make_datasets(config):
    x, y = np.ones((8, 2), "float32"), np.ones((8, 1), "float32")
    train = tf.data.Dataset.from_tensor_slices((x, y))
    if config.behave == "bad label":
        def check(x, y):
            tf.debugging.assert_less(
                y, 1.0, message="tfamp input: label 1 is out of range."
            )
            return x, y
        train = train.map(check)
    train = train.batch(config.batch_size)
    return train, train


def build_model(config):
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    return model


class Misbehave(keras.callbacks.Callback):
    def __init__(self, how):
        super().__init__()
        self.how = how

    def on_epoch_end(self, epoch, logs=None):
        if self.how == "scale":
            raise tfamp.LossScaleError("the scale is at its floor:\\n1.0")
        if self.how == "bug":
            raise RuntimeError("a bug")
        if self.how == "wait":
            print("waiting", flush=True)
            time.sleep(60)


def train(config):
    if config.behave == "bad input":
        raise tfamp.InputError("dataset 'twos' is unknown;\\nexpected ones.")
    keras.utils.set_random_seed(config.seed)
    train_data, _ = make_datasets(config)
    model = build_model(config)
    model.fit(
        train_data, epochs=config.epochs, verbose=0,
        callbacks=[*tfamp.recipe.run_callbacks(config),
                   Misbehave(config.behave)],
    )
    return {"accuracy": 0.5, "batch": float(config.batch_size)}


if __name__ == "__main__":
    tfamp.recipe.main(train, Config)
'''


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A folder with `tiny.py`, which is the working directory."""
    folder = tmp_path / "recipes_here"
    folder.mkdir()
    (folder / "tiny.py").write_text(RECIPE)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    yield folder
    for name in ("tiny", "tfamp_recipe_tiny"):
        sys.modules.pop(name, None)


@pytest.fixture(autouse=True)
def fresh_tensorflow_log():
    """`main` ends a process; here it must leave TensorFlow's log as it was."""
    log = logging.getLogger("tensorflow")
    level = log.level
    yield
    log.setLevel(level)


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "tiny", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
    )


def own_lines(stderr):
    """What the program says, without TensorFlow's import messages."""
    return [line for line in stderr.splitlines() if line.startswith("tfamp")]


# The program


def test_a_recipe_trains_prints_its_metrics_and_records_the_run(tiny):
    done = run("--batch_size=2", "--noshuffle", "--output_dir=out")
    assert done.returncode == 0, done.stderr
    last_line = done.stdout.splitlines()[-1]
    assert last_line == "final  accuracy 0.5000  batch 2.0000"
    record = json.loads((tiny / "out" / "run.json").read_text())
    assert record["exit_reason"] == "finished"
    assert record["final_metrics"] == {"accuracy": 0.5, "batch": 2.0}
    assert record["config"]["batch_size"] == 2
    assert record["config"]["shuffle"] is False
    assert record["start_time"] < record["end_time"]


@pytest.mark.slow
def test_without_output_dir_nothing_is_written(tiny):
    before = sorted(tiny.iterdir())
    assert run("--seed=1").returncode == 0
    after = [path for path in tiny.iterdir() if path.name != "__pycache__"]
    assert sorted(after) == before


@pytest.mark.slow
def test_help_shows_the_docstring_and_each_flag_with_its_default(tiny):
    done = run("--help")
    assert done.returncode == 0
    assert done.stdout.startswith("Adds numbers, to test recipes.")
    assert "Usage: python -m tiny [--FLAG=VALUE ...]" in done.stdout
    assert "--batch_size: Examples per step.\n    (default: '4')" in done.stdout
    assert "(one of auto, float32)" in done.stdout
    assert "--[no]shuffle:" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("argument", "line"),
    mostly_slow(
        [
            (
                "--batchsize=8",
                "tfamp: Unknown flag --batchsize. Did you mean --batch_size? "
                "--help lists all flags.",
            ),
            (
                "--behave=bad input",
                "tfamp: dataset 'twos' is unknown; expected ones.",
            ),
            ("--behave=bad label", "tfamp: label 1 is out of range."),
            (
                "--output_dir=tiny.py/out",
                "tfamp: output_dir 'tiny.py/out' cannot be made: "
                "{folder}/tiny.py is not a folder.",
            ),
        ],
        always=[("--behave=bad label", "tfamp: label 1 is out of range.")],
    ),
)
def test_bad_input_is_one_line_and_exit_status_2(tiny, argument, line):
    done = run(argument)
    assert own_lines(done.stderr) == [line.format(folder=tiny)]
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("argument", "line"),
    [
        ("--step=8", "Unknown flag --step. Did you mean --steps? --help"),
        ("--zzz", "Unknown flag --zzz. --help lists all flags."),
        ("--steps=many", "flag --steps=many: expected an integer."),
        ("--mode=c", "flag --mode=c: expected one of a, b."),
        ("--steps", "Missing value for flag --steps."),
        ("fast", "Unexpected argument 'fast'; flags are written"),
        ("--flagfile=nowhere", "ERROR:: Unable to open flagfile:"),
    ],
)
def test_a_bad_flag_ends_the_program_before_it_trains(argument, line, capsys):
    with pytest.raises(SystemExit) as end:
        recipe.main(pytest.fail, Kinds, ["program", argument])
    assert end.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"tfamp: {line}")
    assert err.count("\n") == 1


@pytest.mark.slow
def test_bad_input_leaves_the_record_of_an_earlier_run_alone(tiny):
    assert run("--output_dir=out").returncode == 0
    before = (tiny / "out" / "run.json").read_bytes()
    assert run("--output_dir=out", "--behave=bad input").returncode == 2
    assert (tiny / "out" / "run.json").read_bytes() == before


@pytest.mark.slow
def test_a_lost_loss_scale_is_one_line_and_exit_status_1(tiny):
    done = run("--output_dir=out", "--behave=scale")
    assert own_lines(done.stderr) == ["tfamp: the scale is at its floor: 1.0"]
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    record = json.loads((tiny / "out" / "run.json").read_text())
    assert record["exit_reason"] == "the scale is at its floor: 1.0"
    assert record["end_time"] is not None


@pytest.mark.slow
def test_a_bug_keeps_its_traceback_and_is_recorded(tiny):
    done = run("--output_dir=out", "--behave=bug")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert done.stderr.strip().endswith("RuntimeError: a bug")
    record = json.loads((tiny / "out" / "run.json").read_text())
    assert record["exit_reason"] == "RuntimeError: a bug"


@pytest.mark.slow
def test_an_interrupt_is_exit_status_130_and_is_recorded(tiny):
    process = subprocess.Popen(
        [sys.executable, "-m", "tiny", "--output_dir=out", "--behave=wait"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout.readline() == "waiting\n"
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert own_lines(stderr) == ["tfamp: interrupted"]
    assert "Traceback" not in stderr
    record = json.loads((tiny / "out" / "run.json").read_text())
    assert record["exit_reason"] == "interrupted"


def test_a_recipe_without_tensorflow_asks_for_quiet_before_its_import(tiny):
    program = (
        "import os, sys, tfamp.recipe; assert 'tensorflow' not in sys.modules;"
        "tfamp.recipe.quiet_tensorflow();"
        "print(os.environ['TF_CPP_MIN_LOG_LEVEL'])"
    )
    environment = {**os.environ}
    environment.pop("TF_CPP_MIN_LOG_LEVEL", None)
    for level in ("2", "0"):
        out = subprocess.check_output(
            [sys.executable, "-c", program], text=True, env=environment
        )
        assert out.strip() == level
        # A level that the user set stays.
        environment["TF_CPP_MIN_LOG_LEVEL"] = "0"


def test_quiet_hides_tensorflows_warnings_and_keeps_tfamps(caplog):
    recipe.quiet_tensorflow()
    tf.get_logger().warning("not using nccl")
    absl.logging.warning("skipped 1 step")
    absl_said = [r.message for r in caplog.records if r.name == "absl"]
    assert absl_said == ["skipped 1 step"]
    assert not tf.get_logger().isEnabledFor(logging.WARNING)


# Marked errors of graphs and pipelines


def marked_error(is_graph):
    def check(label):
        tf.debugging.assert_less(
            label, 10, message="tfamp input: labels must be below 10."
        )
        return label

    try:
        (tf.function(check) if is_graph else check)(tf.constant([3, 10]))
    except tf.errors.InvalidArgumentError as error:
        return error
    raise AssertionError("the label passed")


@pytest.mark.parametrize("is_graph", [False, True], ids=["eager", "graph"])
def test_a_marked_assertion_is_told_like_bad_input(is_graph):
    line = "labels must be below 10."
    assert recipe.describe_exit(marked_error(is_graph)) == (line, 2)


def test_an_unmarked_error_of_tensorflow_is_a_bug():
    with pytest.raises(tf.errors.InvalidArgumentError) as error:
        tf.debugging.assert_less(tf.constant(2), 1)
    assert recipe.describe_exit(error.value) is None


# Flags and settings: one parser


@dataclasses.dataclass(frozen=True)
class Kinds:
    steps: int = recipe.flag(10, "Steps to train.")
    rate: float = 0.1
    nesterov: bool = False
    name: str = ""
    mode: Literal["a", "b"] = "a"
    order: Literal[1, 2] = 1
    limit: int | None = None
    warmup: Optional[float] = 0.5  # noqa: UP045
    layers: tuple[str, ...] = ()
    widths: tuple[int, ...] = (64, 128)


GOOD = [
    ("steps", "3", 3),
    ("steps", "-3", -3),
    ("rate", "3", 3.0),
    ("rate", "1e-3", 1e-3),
    ("nesterov", "true", True),
    ("nesterov", "False", False),
    ("name", "none", "none"),
    ("name", "", ""),
    ("mode", "b", "b"),
    ("order", "2", 2),
    ("limit", "7", 7),
    ("limit", "none", None),
    ("warmup", "None", None),
    ("layers", "a, b", ("a", "b")),
    ("layers", "", ()),
    ("widths", "1,2,3", (1, 2, 3)),
]
BAD = [
    ("steps", "1.5", "expected an integer"),
    ("steps", "", "expected an integer"),
    ("rate", "fast", "expected a number"),
    ("nesterov", "maybe", "expected true or false"),
    ("mode", "c", "expected one of a, b"),
    ("order", "3", "expected one of 1, 2"),
    ("limit", "x", "expected an integer, or none"),
    ("widths", "1,x", "expected a comma list, each item an integer"),
]


@pytest.mark.parametrize(("field", "text", "value"), GOOD)
def test_a_flag_and_a_setting_read_a_value_alike(field, text, value):
    configs = [
        parse_flags(Kinds, [f"--{field}={text}"])[1],
        recipe.configure(Kinds, {field: text}),
    ]
    for config in configs:
        assert config == Kinds(**{field: value})
        assert type(getattr(config, field)) is type(value)


@pytest.mark.parametrize(("field", "text", "message"), BAD)
def test_a_flag_and_a_setting_refuse_a_value_alike(field, text, message):
    with pytest.raises(tfamp.InputError) as flag_error:
        parse_flags(Kinds, [f"--{field}={text}"])
    with pytest.raises(tfamp.InputError) as setting_error:
        recipe.configure(Kinds, {field: text})
    end = f"{field}={text}: {message}."
    assert str(flag_error.value) == f"flag --{end}"
    assert str(setting_error.value) == f"--{end}"


def test_without_settings_the_defaults_of_the_class_hold():
    assert parse_flags(Kinds, [])[1] == Kinds()
    assert recipe.configure(Kinds, {}) == Kinds()


def test_a_bool_flag_may_stand_alone_or_behind_no():
    assert parse_flags(Kinds, ["--nesterov"])[1].nesterov is True
    assert parse_flags(Kinds, ["--nonesterov"])[1].nesterov is False
    with pytest.raises(tfamp.InputError, match="does not take an argument"):
        parse_flags(Kinds, ["--nonesterov=true"])


def test_help_lists_defaults_of_every_kind():
    text, config = parse_flags(Kinds, ["-h"])
    assert config is None
    assert "--steps: Steps to train." in text
    for default in ("'10'", "'0.1'", "'false'", "'a'", "'64,128'"):
        assert f"(default: {default})" in text


def test_an_unknown_setting_lists_the_fields():
    with pytest.raises(tfamp.InputError) as error:
        recipe.configure(Kinds, {"step": "1"})
    assert "Unknown flag --step. Did you mean --steps?" in str(error.value)
    assert "The recipe's are steps, rate, nesterov" in str(error.value)


def test_a_type_that_has_no_text_form_is_the_recipes_bug():
    with pytest.raises(TypeError, match="cannot have the type"):
        parse_value("1", dict)
    with pytest.raises(TypeError, match="cannot have the type"):
        parse_value("1", int | float | None)


def test_a_field_without_default_must_be_given():
    @dataclasses.dataclass(frozen=True)
    class Needy:
        path: str

    assert recipe.configure(Needy, {"path": "x"}).path == "x"
    assert parse_flags(Needy, ["--path=x"])[1].path == "x"
    with pytest.raises(tfamp.InputError, match="path must be given"):
        parse_flags(Needy, [])


def test_fields_may_bear_the_names_of_absl_flags_and_methods():
    @dataclasses.dataclass(frozen=True)
    class Config:
        verbosity: int = 3
        log_dir: str = "logs"
        append_flag_values: bool = False

    config = parse_flags(Config, ["--verbosity=1", "--log_dir=x"])[1]
    assert config == Config(1, "x", False)


def test_two_recipes_with_the_same_fields_run_in_one_process(capsys):
    seen = []

    def train(config):
        seen.append(config)
        return {"loss": 1.0}

    @dataclasses.dataclass(frozen=True)
    class First:
        steps: int = 1

    @dataclasses.dataclass(frozen=True)
    class Second:
        steps: str = "many"

    for config_class in (First, Second):
        with pytest.raises(SystemExit) as end:
            recipe.main(train, config_class, ["program", "--steps=5"])
        assert end.value.code == 0
    assert seen == [First(5), Second("5")]
    assert capsys.readouterr().out == "final  loss 1.0000\n" * 2


# Loading


def test_a_recipe_loads_by_module_and_by_file(tiny):
    by_module = recipe.load_recipe("tiny")
    by_file = recipe.load_recipe(str(tiny / "tiny.py"))
    for module in (by_module, by_file):
        config = recipe.configure(module.Config, {"batch_size": "2"})
        train, _ = module.make_datasets(config)
        assert len(train) == 4
        assert module.build_model(config).optimizer is not None


def test_a_recipe_file_may_import_its_neighbours(tiny, tmp_path, monkeypatch):
    (tiny / "neighbour_of_tiny.py").write_text("answer = 42\n")
    with open(tiny / "tiny.py", "a") as file:
        file.write("\nfrom neighbour_of_tiny import answer\n")
    monkeypatch.chdir(tmp_path)
    assert recipe.load_recipe("recipes_here/tiny.py").answer == 42


def test_a_recipe_file_takes_no_installed_modules_name(tiny):
    os.rename(tiny / "tiny.py", tiny / "json.py")
    loaded = recipe.load_recipe("./json.py")
    try:
        assert sys.modules["json"] is json
    finally:
        del sys.modules[loaded.__name__]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere.at_all", "There is no recipe 'nowhere.at_all'; expected"),
        ("tfamp.no_recipe", "There is no recipe 'tfamp.no_recipe'; expected"),
        ("my/recipe.py", "There is no recipe file 'my/recipe.py'"),
        ("keras", "Recipe 'keras' lacks Config, make_datasets, build_model"),
    ],
)
def test_a_recipe_that_is_none_is_refused(tiny, name, message):
    with pytest.raises(tfamp.InputError) as error:
        recipe.load_recipe(name)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_every_name_and_field_that_a_recipe_lacks_is_listed(tiny):
    (tiny / "half.py").write_text(
        textwrap.dedent("""
            import dataclasses

            @dataclasses.dataclass(frozen=True)
            class Config:
                precision: str = "auto"
                epochs: int = 1
                seed: int = 0
                output_dir: str = ""

            def train(config):
                pass
        """)
    )
    with pytest.raises(tfamp.InputError) as error:
        recipe.load_recipe("half.py")
    assert str(error.value) == (
        "Recipe 'half.py' lacks make_datasets, build_model, Config.strategy, "
        "Config.dataset, Config.data_dir, Config.batch_size."
    )
    del sys.modules["tfamp_recipe_half"]


def test_a_package_that_a_recipe_needs_is_named(tiny):
    (tiny / "needy.py").write_text("import package_nobody_has\n")
    for name in ("needy", "needy.py"):
        with pytest.raises(tfamp.InputError) as error:
            recipe.load_recipe(name)
        assert "'package_nobody_has', which is not installed" in str(
            error.value
        )
    assert "tfamp_recipe_needy" not in sys.modules


def test_a_bug_in_a_recipe_keeps_its_own_error(tiny):
    (tiny / "broken.py").write_text("1 / 0\n")
    with pytest.raises(ZeroDivisionError):
        recipe.load_recipe("broken.py")


def test_no_output_dir_means_no_callbacks(tmp_path):
    @dataclasses.dataclass(frozen=True)
    class Config:
        output_dir: str = ""

    assert recipe.run_callbacks(Config()) == []
    names = [
        type(part).__name__
        for part in recipe.run_callbacks(Config(str(tmp_path)))
    ]
    assert names == [
        "RunRecord",
        "MetricsLog",
        "ScaleTimeline",
        "TensorBoardScalars",
    ]
