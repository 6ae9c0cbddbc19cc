"""Each recipe's model in other runtimes, and loaded in other precisions.

    python -m benchmarks.exports --recipes=gan,lora --output_dir=exports

Builds a recipe's model at small settings, trains it 6 steps of 8 examples,
exports it to each format and runs the file in its own runtime, beside the
model in float32. Saves it as `.keras`, loads that in each precision, and
trains 6 steps more. Prints two Markdown tables.
"""

import dataclasses
import importlib
import math
import pathlib
import sys
import tempfile
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import tfamp
from benchmarks import program
from benchmarks.audit import PRECISIONS, RECIPES
from tfamp.recipe import flag
from tfamp.saving.agreement import agreement

FORMATS = ("saved_model", "litert", "onnx")
_SUFFIXES = {"saved_model": "", "litert": ".tflite", "onnx": ".onnx"}
# As many as a loss scale needs to come down to one that counts.
_STEPS = 6
_STEPS_AFTER = 6
_EXAMPLES = 8
# Of those fields that a recipe has: every kind of its layers, and few of them.
_SMALL = {
    "batch_size": _EXAMPLES,
    "channels": (8, 16),
    "latent_size": 8,
    "line_width": 64,
    "max_characters": 4,
    "num_heads": 2,
    "num_layers": 1,
    "rank": 2,
    "sequence_length": 32,
    "width": 32,
    "widths": (8, 16),
}
# Texts of this recipe are not cut.
_LONGER = {"text_classification": {"sequence_length": 112}}


@dataclasses.dataclass(frozen=True)
class Config:
    """The flags of this benchmark."""

    recipes: tuple[str, ...] = flag(RECIPES, "whose models are tried")
    precisions: tuple[str, ...] = flag(PRECISIONS, "to train in")
    seed: int = flag(0, "of weights and order")
    output_dir: str = flag("", "folder for the files; left out, they go")
    data_dir: str = flag("", "where data sets are; as of the recipes")


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A file loaded in a precision.

    Attributes:
        outputs: of the network, on a batch, without training.
        same_weights: whether those of the file came back bit for bit, and the
            moments of its optimizers with them.
        steps: counted by an optimizer, before and after those that followed.
        skipped: of the steps that followed.
        loss: the mean of these.
        loss_scale: after them.
    """

    outputs: list[np.ndarray]
    same_weights: bool
    steps: tuple[int, int]
    skipped: int
    loss: float
    loss_scale: float


def trained(recipe: Any, config: Any) -> tuple[keras.Model, Any]:
    """A recipe's model after a few steps, and a batch to run it on."""
    tfamp.set_precision(config.precision)
    keras.utils.set_random_seed(config.seed)
    train_batches, eval_batches = recipe.make_datasets(config)
    model = recipe.build_model(config)
    tfamp.fit(model, train_batches.take(_STEPS), verbose=0)
    return model, inputs_of(model, next(iter(eval_batches)))


def inputs_of(model: keras.Model, batch: tuple[Any, ...]) -> Any:
    """What the network of a model takes of a batch, in float32."""
    # A generator makes images of the noise that comes with others.
    inputs = batch[1] if hasattr(model, "generator") else batch[0]

    def as_float32(x):
        x = x[:_EXAMPLES]
        return (tf.cast(x, tf.float32) if x.dtype.is_floating else x).numpy()

    return tf.nest.map_structure(as_float32, inputs)


def network_of(model: keras.Model) -> keras.Model:
    """What a user deploys: the model, or its generator."""
    return getattr(model, "generator", model)


def exported(
    model: keras.Model, inputs: Any, path: pathlib.Path
) -> list[float | str]:
    """For each format the largest difference, or why it holds no such model.

    Relative to the largest output, or to 1 where that is less.
    """
    found: list[float | str] = []
    for form in FORMATS:
        try:
            report = tfamp.export(
                network_of(model),
                path.with_name(f"{path.name}-{form}{_SUFFIXES[form]}"),
                form,
                batch=inputs,
            )
            found.append(report.relative_difference)
        except tfamp.InputError as error:
            found.append(str(error))
    return found


def loaded(
    path: pathlib.Path,
    model: keras.Model,
    recipe: Any,
    config: Any,
    inputs: Any,
) -> Loaded:
    """Loads a file in the precision of a config, and goes on with training.

    Args:
        path: of a `.keras` file.
        model: that was saved there.
        recipe: its module.
        config: of the recipe, with the precision to load in.
        inputs: a batch for the network.
    """
    again = tfamp.load_model(path, config.precision)
    tfamp.set_precision(config.precision)
    same = same_values(state_of(again), state_of(model))
    outputs = [
        np.asarray(tf.cast(x, tf.float32))
        for x in tf.nest.flatten(network_of(again)(inputs, training=False))
    ]
    before = steps_of(again)
    keras.utils.set_random_seed(config.seed)
    train_batches, _ = recipe.make_datasets(config)
    history = tfamp.fit(again, train_batches.take(_STEPS_AFTER), verbose=0)
    logs = {name: values[-1] for name, values in history.history.items()}
    after = steps_of(again)
    return Loaded(
        outputs=outputs,
        same_weights=same,
        steps=(before[0], after[0]),
        skipped=after[1] - before[1],
        loss=logs.get("loss", logs.get("generator_loss", math.nan)),
        loss_scale=min(
            float(getattr(each, "dynamic_scale", 1.0))
            for each in optimizers_of(again)
        ),
    )


def optimizers_of(model: keras.Model) -> list[keras.optimizers.Optimizer]:
    """A model's optimizers: its own, or those of two networks."""
    if hasattr(model, "generator"):
        return [model.generator_optimizer, model.discriminator_optimizer]
    return [model.optimizer]


def state_of(model: keras.Model) -> list[np.ndarray]:
    """Weights, then what optimizers keep; of a loss scale nothing."""
    inner = [
        getattr(each, "inner_optimizer", each) for each in optimizers_of(model)
    ]
    variables = [*model.weights, *(v for each in inner for v in each.variables)]
    return [variable.numpy() for variable in variables]


def same_values(found: list[np.ndarray], expected: list[np.ndarray]) -> bool:
    """Whether they are as many, of the same shapes, and equal.

    The same numbers in a wider dtype are equal.
    """
    return len(found) == len(expected) and all(
        a.shape == b.shape and np.array_equal(a, b)
        for a, b in zip(found, expected, strict=True)
    )


def steps_of(model: keras.Model) -> tuple[int, int]:
    """Steps that were made, and skipped ones, of the first optimizer."""
    first = optimizers_of(model)[0]
    inner = getattr(first, "inner_optimizer", first)
    return int(inner.iterations), int(getattr(first, "skipped_steps", 0))


def small_config(name: str, recipe: Any, config: Config, precision: str) -> Any:
    """A recipe's flags, small."""
    fields = {field.name for field in dataclasses.fields(recipe.Config)}
    options = _SMALL | _LONGER.get(name, {})
    options |= {"precision": precision, "seed": config.seed}
    if config.data_dir:
        options["data_dir"] = config.data_dir
    return recipe.Config(**{k: v for k, v in options.items() if k in fields})


def export_row(name: str, precision: str, found: list[float | str]) -> str:
    """A row of the first table."""
    cells = [x if isinstance(x, str) else f"{x:.1e}" for x in found]
    return f"| {name} | {short(precision)} | {' | '.join(cells)} |"


def load_row(name: str, precision: str, found: dict[str, Loaded] | str) -> str:
    """A row of the second table, of what was loaded in each precision.

    Of what was not, the reason.
    """
    if isinstance(found, str):
        return f"| {name} | {short(precision)} | {found} |"
    wide = found["float32"].outputs
    differences = [
        agreement(each.outputs, wide).relative_difference
        for loaded_in, each in found.items()
        if loaded_in != "float32"
    ]
    cells = [
        *(f"{difference:.1e}" for difference in differences),
        "yes" if all(each.same_weights for each in found.values()) else "NO",
        joined(f"{a} to {b}" for a, b in (x.steps for x in found.values())),
        joined(str(each.skipped) for each in found.values()),
        joined(f"{each.loss_scale:g}" for each in found.values()),
        ", ".join(f"{each.loss:.4g}" for each in found.values()),
    ]
    return f"| {name} | {short(precision)} | {' | '.join(cells)} |"


def joined(texts: Any) -> str:
    """Once what is the same in all."""
    texts = list(texts)
    return texts[0] if len(set(texts)) == 1 else ", ".join(texts)


def short(precision: str) -> str:
    """Without "mixed_"."""
    return precision.removeprefix("mixed_")


def measure(config: Config) -> None:
    """Prints both tables."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(config.output_dir or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        exports, loads = [], []
        for name in config.recipes:
            for precision in config.precisions:
                found, found_loaded = measure_one(
                    config, name, precision, folder
                )
                exports.append(export_row(name, precision, found))
                loads.append(load_row(name, precision, found_loaded))
                # What there is, should a later one fail.
                print(exports[-1], loads[-1], sep="\n", file=sys.stderr)
                keras.backend.clear_session()
    print("| recipe | trained in | SavedModel | LiteRT | ONNX |")
    print("|:--|:--|--:|--:|--:|")
    print("\n".join(exports), end="\n\n")
    print(
        "| recipe | saved in | in bfloat16 | in float16 | bit for bit "
        "| steps | skipped | loss scale | losses that followed |"
    )
    print("|:--|:--|--:|--:|:--|:--|--:|:--|:--|")
    print("\n".join(loads), flush=True)


def measure_one(
    config: Config, name: str, precision: str, folder: pathlib.Path
) -> tuple[list[float | str], dict[str, Loaded] | str]:
    """A recipe in a precision: exported, and loaded in each."""
    recipe = importlib.import_module(f"recipes.{name}")
    path = folder / f"{name}-{short(precision)}"
    small = small_config(name, recipe, config, precision)
    model, inputs = trained(recipe, small)
    found = exported(model, inputs, path)
    file = path.with_name(f"{path.name}.keras")
    model.save(file)
    try:
        return found, {
            other: loaded(
                file,
                model,
                recipe,
                dataclasses.replace(small, precision=other),
                inputs,
            )
            for other in PRECISIONS
        }
    except tfamp.InputError as error:
        return found, str(error)


if __name__ == "__main__":
    sys.exit(program.run(Config, measure, __doc__ or "", sys.argv[1:]))
