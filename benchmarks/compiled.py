"""What XLA makes of each recipe's forward and backward pass, without a GPU.

    python -m benchmarks.compiled [RECIPE ...] [--keep=FOLDER]

XLA's operations are asked for, for a GPU: in which dtypes products and
convolutions are, how many conversions there are, and what calls the host.
With --keep they are left in a folder, serialized, for other compilers.
"""

import collections
import contextlib
import dataclasses
import importlib
import pathlib
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import keras
import tensorflow as tf

import tfamp
from benchmarks.audit import PRECISIONS, RECIPES, config_of
from tfamp.layers import row_products
from tfamp.scaling.optimizer import LossScaleOptimizer
from tfamp.step import losses
from tfamp.training import safe

_OPERATION = re.compile(
    r"^\s*(?:ROOT )?%?[\w.\-]+ = \(?(\w+)\[[^=]*? ([\w\-]+)\("
)
_OPERANDS = re.compile(r"(\w+)\[[\d,]*\]")
_PRODUCTS = ("dot", "convolution")
_HOST = re.compile(r'custom_call_target="([^"]*[Cc]allback[^"]*)"')
_NAME = re.compile(r'op_name="([^"]*)"')


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What is in the operations of a pass.

    Attributes:
        operations: how many.
        products: of matrix products and convolutions, by the dtypes of their
            operands: "bf16 bf16".
        converts: conversions between dtypes.
        host: calls of the host, and what is sent there.
        wide: the names of products of which an operand is float32 or wider.
    """

    operations: int
    products: dict[str, int]
    converts: int
    host: tuple[str, ...]
    wide: tuple[str, ...] = ()


def read(text: str) -> Compiled:
    """Reads XLA's operations in their text form."""
    products: dict[str, int] = collections.Counter()
    converts = operations = 0
    host = []
    wide = []
    for line in text.splitlines():
        match = _OPERATION.match(line)
        if not match:
            continue
        operations += 1
        name = match[2]
        if name in _PRODUCTS:
            operands = _OPERANDS.findall(line.split(f" {name}(", 1)[1])[:2]
            products[" ".join(operands)] += 1
            if {"f32", "f64"} & set(operands):
                wide += _NAME.findall(line) or ["?"]
        converts += name == "convert"
        if name in ("infeed", "outfeed", "send", "recv"):
            host.append(name)
        host += _HOST.findall(line)
    return Compiled(
        operations, dict(products), converts, tuple(host), tuple(wide)
    )


def beyond_heads(wide: Sequence[str], heads: Sequence[str]) -> list[str]:
    """Of the names of wide products, those that are of no head.

    A head whose result is not bounded multiplies in float32 by decision.
    """
    of_head = re.compile("|".join(rf"/{re.escape(h)}(_\d+)?/" for h in heads))
    return [each for each in wide if not (heads and of_head.search(each))]


class Passes:
    """The forward and backward pass of a compiled model on a batch.

    Args:
        model: compiled.
        batch: `(x, y)`, or with sample weights.
    """

    def __init__(self, model: keras.Model, batch: Any):
        self._model = model
        spec = tf.nest.map_structure(tf.type_spec_from_value, batch)
        is_custom = type(model).train_step is not keras.Model.train_step
        safe.build_layers(model, spec, is_custom)
        if not is_custom:
            safe.make_safe(model, "auto", 0)
        safe.build_rest(model, spec, is_custom)
        self._is_custom = is_custom
        self._batch = batch
        trained = model.trainable_variables
        others = [
            *model.non_trainable_variables,
            *model.metrics_variables,
            *(v for each in self._optimizers() for v in each.variables),
        ]
        taken = {id(variable) for variable in trained}
        others = [
            v for v in others if id(v) not in taken and not taken.add(id(v))
        ]
        self._variables = (trained, others)
        self._function = tf.function(
            self._run, jit_compile=True, autograph=False
        )

    @property
    def heads(self) -> list[str]:
        """The names of the layers that make outputs.

        Of the model, or of the networks of one that trains several.
        """
        networks = [
            each
            for each in (self._model, *vars(self._model).values())
            if isinstance(each, keras.Model)
        ]
        outputs = keras.tree.flatten(
            [getattr(each, "outputs", None) for each in networks]
        )
        histories = [getattr(each, "_keras_history", None) for each in outputs]
        return sorted({each.operation.name for each in histories if each})

    def hlo(self, stage: str = "hlo") -> Any:
        """XLA's operations for a GPU: text, or bytes of "hlo_serialized"."""
        values = [
            [tf.convert_to_tensor(each.value) for each in variables]
            for variables in self._variables
        ]
        with mock.patch.object(row_products, "is_faster", return_value=False):
            compiler = self._function.experimental_get_compiler_ir(
                *values, self._batch
            )
            return compiler(stage=stage, platform_name="GPU")

    def _optimizers(self) -> list[LossScaleOptimizer]:
        return [
            each
            for each in vars(self._model).values()
            if isinstance(each, LossScaleOptimizer)
        ]

    def _run(self, trained, others, batch) -> list[tf.Tensor]:
        variables = [*self._variables[0], *self._variables[1]]
        scope = keras.StatelessScope(
            state_mapping=list(zip(variables, [*trained, *others], strict=True))
        )
        gradients: list[tf.Tensor] = []
        with scope, self._collected(gradients), _watched(trained):
            results = self._step(batch)
        moved = [scope.get_current_value(each) for each in variables]
        return [
            *tf.nest.flatten(results),
            *(tf.convert_to_tensor(g) for g in gradients if g is not None),
            *(value for value in moved if value is not None),
        ]

    def _step(self, batch) -> Any:
        model = self._model
        if self._is_custom:
            return model.train_step(batch)
        x, y, weight = keras.utils.unpack_x_y_sample_weight(batch)
        variables = [each.value for each in model.trainable_variables]
        with tf.GradientTape() as tape:
            outputs = losses.call(model, x, training=True)
            loss = losses.compute_loss(model, x, y, outputs, weight)
            loss = tf.cast(loss, tf.float32)
            scaled = model.optimizer.scale_loss(loss)
        gradients = tape.gradient(scaled, variables)
        return loss, [each for each in gradients if each is not None]

    @contextlib.contextmanager
    def _collected(self, gradients: list[tf.Tensor]) -> Iterator[None]:
        """Within it optimizers apply nothing: what they get is collected."""
        with contextlib.ExitStack() as stack:
            for each in self._optimizers():
                stack.enter_context(
                    mock.patch.object(
                        type(each),
                        "apply",
                        lambda self, given, variables=None: gradients.extend(
                            given
                        ),
                    )
                )
            yield


@contextlib.contextmanager
def _watched(tensors: list[tf.Tensor]) -> Iterator[None]:
    """Every tape watches them, as it would the variables they stand for."""
    enter = tf.GradientTape.__enter__

    def enter_and_watch(tape):
        entered = enter(tape)
        for tensor in tensors:
            if tensor.dtype.is_floating:
                tape.watch(tensor)
        return entered

    with mock.patch.object(tf.GradientTape, "__enter__", enter_and_watch):
        yield


def passes_of(name: str, precision: str) -> Passes:
    """Those of a recipe, at small sizes: dtypes do not depend on them."""
    recipe = importlib.import_module(f"recipes.{name}")
    tfamp.set_precision(precision)
    keras.utils.set_random_seed(0)
    config = config_of(recipe.Config, precision)
    dataset, _ = recipe.make_datasets(config)
    return Passes(recipe.build_model(config), next(iter(dataset)))


def main(*arguments: str) -> int:
    """Prints a row for each recipe and precision; 1 where one falls short."""
    folders = [a.removeprefix("--keep=") for a in arguments if "--keep=" in a]
    names = [a for a in arguments if not a.startswith("--")]
    print("| recipe | precision | operations | products | converts | host |")
    print("|---|---|---|---|---|---|")
    status = 0
    for name in names or RECIPES:
        for precision in PRECISIONS:
            keras.backend.clear_session()
            passes = passes_of(name, precision)
            found = read(passes.hlo())
            products = ", ".join(
                f"{count} of {dtypes}"
                for dtypes, count in found.products.items()
            )
            print(
                f"| {name} | {precision} | {found.operations} | {products} | "
                f"{found.converts} | {', '.join(found.host) or '-'} |",
                flush=True,
            )
            is_wide = precision != "float32" and beyond_heads(
                found.wide, passes.heads
            )
            status = max(status, bool(is_wide or found.host))
            for folder in folders:
                path = pathlib.Path(folder) / f"{name}-{precision}.hlo"
                path.write_bytes(passes.hlo("hlo_serialized"))
    return status


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
