"""What a recipe module must hold, and how it becomes a program.

A recipe is one Python file with these names:

*   `Config`: a frozen dataclass. Each field becomes a flag, and its default
    is written there and nowhere else. `RECIPE_FIELDS` must be among them;
    `RunConfig` has all of these but `dataset`.
*   `make_datasets(config) -> (train, eval)`: two batched `tf.data.Dataset`s.
*   `build_model(config) -> keras.Model`: compiled, built in the caller's
    strategy scope.
*   `train(config) -> dict`: trains, and returns the final metrics.

It ends with

    if __name__ == "__main__":
        tfamp.recipe.main(train, Config)
"""

import dataclasses
import importlib
import importlib.util
import logging
import os
import pathlib
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from tfamp.errors import (
    INPUT_ERROR_MARK,
    InputError,
    JobError,
    LossScaleError,
    Preempted,
    SaveError,
    WorkerLostError,
    did_you_mean,
)
from tfamp.files.standard_error import start_tensorflow_quietly
from tfamp.recipe import saved_model
from tfamp.recipe.flags import parse_flags

RECIPE_NAMES = ("Config", "make_datasets", "build_model", "train")
RECIPE_FIELDS = (
    "precision",
    "strategy",
    "dataset",
    "data_dir",
    "batch_size",
    "epochs",
    "seed",
    "output_dir",
)

_EXIT_FAILED = 1
_EXIT_BAD_INPUT = 2
_EXIT_INTERRUPTED = 130  # As shells report a process that SIGINT ended.


def main(
    train: Callable[[Any], Mapping[str, float]],
    config_class: type,
    argv: Sequence[str] | None = None,
) -> NoReturn:
    """Runs a recipe as a program: flags in, metrics and an exit status out.

    Bad input ends in one line on stderr and exit status 2, training that
    cannot go on in one line and 1, Ctrl-C in 130; any other exception is a
    bug and keeps its traceback. `run.json`, where training had begun, says
    which it was.

    `absl.app.run` is not used: it prints several lines and exits with 1 for
    a bad flag, and its flags are global, so that two recipes in one process
    would collide. Here they live in a `FlagValues` of their own.

    Args:
        train: The recipe's `train`. Its module's docstring is the help text.
        config_class: The recipe's `Config`.
        argv: The program's name and arguments; `sys.argv` by default.
    """
    sys.exit(_run(train, config_class, sys.argv if argv is None else argv))


def load_recipe(name_or_path: str) -> types.ModuleType:
    """Imports a recipe by module name or by file, and checks what it holds.

    The working directory, and a file's own, go on `sys.path`, as they would
    for `python -m`.

    Args:
        name_or_path: `recipes.image_classification` or `my/recipe.py`.

    Raises:
        InputError: There is no such recipe, it needs a package that is not
            installed, it lacks a name or field that a recipe must hold, or
            it is a saved model.
    """
    if name_or_path.endswith(saved_model.SUFFIX):
        raise saved_model.refuse(name_or_path)
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    if name_or_path.endswith(".py") or os.sep in name_or_path:
        recipe = _import_file(name_or_path)
    else:
        recipe = _import_module(name_or_path)
    missing = [name for name in RECIPE_NAMES if not hasattr(recipe, name)]
    config_class = getattr(recipe, "Config", None)
    if config_class is not None:
        if not dataclasses.is_dataclass(config_class):
            raise InputError(
                f"Recipe {name_or_path!r}: Config is not a dataclass; decorate "
                "it with @dataclasses.dataclass(frozen=True)."
            )
        fields = {field.name for field in dataclasses.fields(config_class)}
        missing += [f"Config.{n}" for n in RECIPE_FIELDS if n not in fields]
    if missing:
        raise InputError(f"Recipe {name_or_path!r} lacks {', '.join(missing)}.")
    return recipe


def shipped_recipes() -> list[str]:
    """The recipes that came with tfamp, by the names that commands take."""
    package = importlib.util.find_spec("recipes")
    folders = (package and package.submodule_search_locations) or ()
    # Other modules there are what recipes have in common.
    return [
        f"recipes.{path.stem}"
        for folder in folders
        for path in sorted(pathlib.Path(folder).glob("*.py"))
        if "recipe.main(" in path.read_text(encoding="utf-8")
    ]


def describe_exit(error: BaseException) -> tuple[str, int] | None:
    """One line for the user and the exit status; None for a bug.

    Shared by recipes and by the commands of `tfamp`.
    """
    error = _lost_by(error) or error
    text = str(error)
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", _EXIT_INTERRUPTED
    if isinstance(error, (JobError, LossScaleError)):
        return _one_line(text), _EXIT_FAILED
    if isinstance(error, (Preempted, SaveError, WorkerLostError)):
        return _one_line(text), Preempted.STATUS
    if isinstance(error, InputError):
        return _one_line(text), _EXIT_BAD_INPUT
    if INPUT_ERROR_MARK in text:
        # In a graph the message is "assertion failed: [MESSAGE] [OPERAND]...",
        # and eagerly its own line.
        message = text.split(INPUT_ERROR_MARK, 1)[1]
        return message.split("\n")[0].split("] [")[0], _EXIT_BAD_INPUT
    return None


def report_exit(error: BaseException) -> int:
    """Says on stderr, in one line, what ended the program.

    Returns:
        The exit status. A bug is no such end, and is raised again.
    """
    described = describe_exit(error)
    if described is None:
        _add_hint(error)
        raise error
    line, status = described
    print(f"tfamp: {line}", file=sys.stderr)
    return status


def _add_hint(error: BaseException) -> None:
    # Looks through the known issues, which few programs need.
    from tfamp.recipe.hints import add_hint

    add_hint(error)


def _lost_by(error: BaseException) -> WorkerLostError | None:
    """A lost worker that was found outside of fit: where a model is built."""
    if not type(error).__module__.startswith("tensorflow."):
        return None
    from tfamp.distribute.workers import lost_by

    return lost_by(error)


def quiet_tensorflow() -> None:
    """Keeps TensorFlow's informational messages off the screen.

    The C++ side reads its threshold once, when TensorFlow is imported, so
    that half works only for a program that calls this before. What it says
    while it is imported is kept, and shown where something fails. Warnings of
    Keras and tfamp go through other loggers and stay.
    """
    if "tensorflow" not in sys.modules:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
        start_tensorflow_quietly()
    logging.getLogger("tensorflow").setLevel(logging.ERROR)


def _run(train, config_class, argv):
    quiet_tensorflow()
    try:
        flags_help, config = parse_flags(config_class, argv[1:])
    except InputError as error:
        return report_exit(error)
    if config is None:
        print(_help(train, argv[0], flags_help))
        return 0

    # They import TensorFlow, which a bad flag need not wait for.
    from tfamp.files import output
    from tfamp.training import callbacks, run_record

    started = output.utc_now()

    def end_record(reason, metrics=None):
        if getattr(config, "output_dir", ""):
            run_record.end_run(config.output_dir, reason, metrics, started)
            run_record.end_phases(config.output_dir, reason, started)

    try:
        metrics = train(config)
    except (Exception, KeyboardInterrupt, Preempted) as error:
        described = describe_exit(error)
        if described is None:
            end_record(_one_line(f"{type(error).__name__}: {error}"))
            _add_hint(error)
            raise
        end_record(described[0])
        return report_exit(error)
    end_record("finished", metrics)
    print(f"final  {callbacks.format_figures(metrics)}")
    return 0


def _help(train, script, flags_text):
    module = sys.modules[train.__module__]
    # `python -m` leaves the module's name in its spec, `python FILE` does not.
    program = f"-m {module.__spec__.name}" if module.__spec__ else script
    usage = f"Usage: python {program} [--FLAG=VALUE ...]"
    return f"{(module.__doc__ or '').strip()}\n\n{usage}\n\n{flags_text}"


def _import_module(name):
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and f"{name}.".startswith(f"{error.name}."):
            raise InputError(
                f"There is no recipe {name!r}; expected a module such as "
                "recipes.image_classification, or a file such as my/recipe.py."
                f"{_suggested_recipe(name)}"
            ) from None
        raise _missing_package(name, error) from None


def _import_file(name):
    path = pathlib.Path(name).absolute()
    if not path.is_file():
        known = [file.name for file in path.parent.glob("*.py")]
        folder = name.removesuffix(path.name)
        raise InputError(
            f"There is no recipe file {name!r}."
            f"{did_you_mean(path.name, known, folder)}"
        )
    # Last, so that a file beside the recipe shadows no installed package.
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    # The prefix keeps a recipe called `random.py` from taking that name. An
    # annotation is looked up through `sys.modules`, so it must be there.
    module_name = f"tfamp_recipe_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise InputError(f"Recipe {name!r} is no Python file; expected .py.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[module_name]
        if isinstance(error, ModuleNotFoundError):
            raise _missing_package(name, error) from None
        raise
    return module


def _suggested_recipe(name):
    """What the shipped recipe with a name like this one is called."""
    given = name if name.startswith("recipes.") else f"recipes.{name}"
    return did_you_mean(given, shipped_recipes(), likeness=0.8)


def _missing_package(name, error):
    return InputError(
        f"Recipe {name!r} imports {error.name!r}, which is not installed here."
    )


def _one_line(text):
    return " ".join(text.split())
