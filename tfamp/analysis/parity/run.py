"""One run of `tfamp parity`: a recipe, one precision, one seed.

    python -m tfamp.analysis.parity.run RECIPE --precision=mixed_bfloat16
        --seed=0 [--config.FIELD=VALUE ...] --result=PATH

What the recipe leaves in its `output_dir` is in `output`, beside PATH. PATH
gets this JSON, numbers that are not finite as null:

*   `schema`: "tfamp.parity_run/1".
*   `precision`, `seed`.
*   `status`: "finished"; or "failed", where the training could not go on, and
    `reason` is the line that says why.
*   `seconds`: that the training took, evaluation and tracing included.
*   `metrics`: what the recipe's `train` returned, arrays left out.
*   `steps` and `losses`: of each step of the training.
*   `scale_changes`: pairs of a step and the loss scale from there on.
*   `evaluations`: the metrics of the trained weights, by the precision that
    they were evaluated in; or null, and `evaluations_reason` says why.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import shutil
import sys
import time
import types
from collections.abc import Mapping, Sequence
from typing import Any

from tfamp.errors import InputError, LossScaleError
from tfamp.recipe import load_recipe, quiet_tensorflow, report_exit
from tfamp.recipe.flags import check_not_reserved, configure, split_settings

SCHEMA = "tfamp.parity_run/1"

# Set for each run by the command: they cannot be set with `--config`.
RESERVED = ("precision", "seed", "output_dir", "checkpoint_dir")


def main(argv: Sequence[str] | None = None) -> int:
    """Does the run, and writes its result.

    Args:
        argv: the arguments after the program's name; `sys.argv[1:]` if None.

    Returns:
        The exit status, as a recipe's own.
    """
    quiet_tensorflow()
    args, settings = _parse(sys.argv[1:] if argv is None else argv)
    try:
        recipe = load_recipe(args.recipe)
        # What a run that was killed left would be taken for this one's.
        output = args.result.absolute().parent / "output"
        shutil.rmtree(output, ignore_errors=True)
        result = measure(
            recipe,
            run_config(
                recipe.Config, settings, args.precision, args.seed, output
            ),
        )
    except (Exception, KeyboardInterrupt) as error:
        return report_exit(error)
    from tfamp.files.output import write_atomically

    write_atomically(args.result, json.dumps(result, allow_nan=False) + "\n")
    return 0


def run_config(
    config_class: type,
    settings: Mapping[str, str],
    precision: str,
    seed: int,
    output_dir: str | os.PathLike,
) -> Any:
    """The config of one run.

    Args:
        config_class: the recipe's `Config`.
        settings: field and text of each that the user sets.
        precision: the run's.
        seed: the run's.
        output_dir: where the recipe may leave its own files.

    Raises:
        InputError: a setting is one of `RESERVED`, or does not fit.
    """
    check_not_reserved(settings, RESERVED, ("precisions", "seeds"))
    own = {
        "precision": precision,
        "seed": str(seed),
        "output_dir": os.fspath(output_dir),
    }
    if any(
        f.name == "checkpoint_dir" for f in dataclasses.fields(config_class)
    ):
        # In a folder that runs share, the second would go on from the first.
        own["checkpoint_dir"] = ""
    return configure(config_class, {**settings, **own})


def measure(recipe: types.ModuleType, config: Any) -> dict[str, Any]:
    """Trains a recipe, and says what came of it, ready for JSON.

    Args:
        recipe: as `tfamp.recipe.load_recipe` gives it.
        config: an instance of its `Config`.

    Raises:
        InputError: and whatever else the recipe raises, but for a
            `LossScaleError`, which is a result.
    """
    from tfamp.analysis.parity.step_losses import StepLosses
    from tfamp.training.observers import Observer, observing

    recorder = StepLosses()
    begin = time.monotonic()
    metrics, status, reason = {}, "finished", None
    try:
        with observing(Observer([recorder])):
            metrics = recipe.train(config)
    except LossScaleError as error:
        status, reason = "failed", " ".join(str(error).split())
    seconds = time.monotonic() - begin
    evaluations, evaluations_reason = None, reason
    if status == "finished":
        evaluations, evaluations_reason = _evaluations(recipe, config, recorder)
    return {
        "schema": SCHEMA,
        "precision": config.precision,
        "seed": config.seed,
        "status": status,
        "reason": reason,
        "seconds": round(seconds, 3),
        "metrics": _scalars(metrics),
        "steps": list(recorder.losses),
        "losses": list(recorder.losses.values()),
        "scale_changes": recorder.scale_changes,
        "evaluations": evaluations,
        "evaluations_reason": evaluations_reason,
    }


def _evaluations(recipe, config, recorder):
    """By precision, or None; and why there are none."""
    import numpy as np

    from tfamp import keras_internals
    from tfamp.precision.policy import PRECISIONS, precision_scope
    from tfamp.training.fit import evaluate

    if not recorder.losses:
        return None, "the recipe trains without tfamp.fit"
    model = recorder.model
    # Other precisions have no scales of 8-bit numbers.
    weights = [
        np.asarray(variable)
        for variable in model.weights
        if not keras_internals.overwrites_with_gradient(variable)
    ]
    strategy = model.distribute_strategy
    evaluations = {}
    for precision in dict.fromkeys((*PRECISIONS, config.precision)):
        here = dataclasses.replace(config, precision=precision)
        try:
            with precision_scope(precision):
                if precision in PRECISIONS:
                    found = _evaluate(recipe, here, strategy, weights)
                else:
                    _, batches = recipe.make_datasets(here)
                    found = _scalars(evaluate(model, batches))
                evaluations[precision] = found
        except InputError as error:
            # Such as float16 on a TPU.
            print(f"not evaluated in {precision}: {error}")
        except Exception as error:
            # The training is done: what fails in this extra look at it must
            # not cost its result.
            first_line = (str(error).splitlines() or [""])[0]
            return None, f"{type(error).__name__}: {first_line}"
    return evaluations, None


def _evaluate(recipe, config, strategy, weights):
    from tfamp import keras_internals
    from tfamp.training.fit import evaluate

    _, batches = recipe.make_datasets(config)
    with strategy.scope():
        model = recipe.build_model(config)
        keras_internals.build_everything(model, batches.element_spec)
    model.set_weights(weights)
    return _scalars(evaluate(model, batches))


def _scalars(metrics: Mapping[str, Any]) -> dict[str, float | None]:
    import numpy as np

    from tfamp.files.output import json_numbers

    return json_numbers({n: v for n, v in metrics.items() if not np.ndim(v)})


def _parse(argv) -> tuple[argparse.Namespace, dict[str, str]]:
    parser = argparse.ArgumentParser(prog="tfamp.analysis.parity.run")
    parser.add_argument("recipe")
    parser.add_argument("--precision", required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--result", type=pathlib.Path, required=True)
    settings, argv = split_settings(argv)
    return parser.parse_args(argv), settings


if __name__ == "__main__":
    sys.exit(main())
