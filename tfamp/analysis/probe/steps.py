"""Training steps that are counted and leave no trace in the model."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence

import keras
import tensorflow as tf

from tfamp import keras_internals, tensorflow_internals
from tfamp.analysis.lint.ops import MOVES
from tfamp.analysis.probe import histogram
from tfamp.analysis.probe.counter import (
    Counter,
    Step,
    TensorName,
    optimizers_of,
)
from tfamp.analysis.probe.histogram import Histogram
from tfamp.checkpoint.random_state import get_random_state, set_random_state
from tfamp.distribute.strategy import distribute_batches
from tfamp.errors import InputError
from tfamp.precision.layer_paths import choose, walk
from tfamp.scaling.optimizer import LossScaleOptimizer, wrap_optimizer
from tfamp.step import build
from tfamp.step.terms import Plan
from tfamp.step.trial import plan_of
from tfamp.training import preconditions, safe
from tfamp.training.evaluation import graph_calls


@dataclasses.dataclass(frozen=True)
class Counted:
    """What some steps counted, over all replicas.

    Attributes:
        steps: how many there were.
        histograms: by tensor, in the order of the step.
        dtypes: by tensor.
        fed: by layer, the layers that take what it returns.
        narrow: the types of the operations that computed in 16 bits.
    """

    steps: int
    histograms: dict[TensorName, Histogram]
    dtypes: dict[TensorName, str]
    fed: dict[str, set[str]]
    narrow: tuple[str, ...]


def prepare(model: keras.Model, dataset: tf.data.Dataset) -> None:
    """Checks model and data, and builds what is not built.

    Raises:
        InputError: for a model or data that cannot be trained, or that could
            not be put back after training.
    """
    preconditions.check_compiled(model)
    preconditions.check_dataset(dataset)
    preconditions.check_batches(dataset, model.distribute_strategy, 1)
    is_custom = type(model).train_step is not keras.Model.train_step
    with model.distribute_strategy.scope():
        safe.build_layers(model, dataset.element_spec, is_custom)
        safe.build_rest(model, dataset.element_spec, is_custom)
    if not model.trainable_variables:
        raise InputError(f"Model {model.name!r} has no trainable weights.")
    for layer in keras_internals.all_layers(model):
        if layer.quantization_mode is not None:
            raise InputError(
                f"Layer {layer.name!r} is quantized "
                f"({layer.quantization_mode}), and cannot be measured in "
                "float32; probe the model before model.quantize."
            )
        if layer is not model and not layer.built:
            raise InputError(
                f"Layer {layer.name!r} is not built; call the model once on a "
                "batch before."
            )


@contextlib.contextmanager
def counting(
    model: keras.Model, step: Step
) -> Iterator[Callable[[tf.data.Dataset, int], Counted]]:
    """Within it, a function runs training steps and counts what passes.

    It takes a dataset of global batches and how many to take at most, and
    raises `InputError` where there is none. The step is traced once.

    The model trains: use it within `unchanged`.

    Args:
        model: prepared.
        step: how to run the steps.
    """
    counter = Counter(model, step)
    with one_optimizer_for_all(model), counter.attached(), graph_calls(model):
        yield _counting(model, counter)


@contextlib.contextmanager
def unchanged(model: keras.Model) -> Iterator[None]:
    """Within it the model may train; after it, all is bit for bit as before.

    That is: weights, optimizers, metrics, seeds of layers, and the random
    state of the process.
    """
    strategy = model.distribute_strategy
    variables = [*model.variables, *model.metrics_variables]
    for optimizer in optimizers_of(model):
        variables.extend(optimizer.variables)
    # Replicas may hold values of their own.
    components = [
        component
        for variable in {id(v): v for v in variables}.values()
        for component in strategy.experimental_local_results(variable.value)
    ]
    before = [tf.identity(component) for component in components]
    random_state = get_random_state()
    try:
        yield
    finally:
        for component, value in zip(components, before, strict=True):
            component.assign(value)
        if random_state["keras"] is None:
            keras_internals.forget_global_seed_generator()
        set_random_state(random_state)


def _computing_in_16_bits() -> Iterator[str]:
    """Types of the operations of 16 bits in the graph that is being made."""
    for operation in tf.compat.v1.get_default_graph().get_operations():
        if operation.type not in MOVES and any(
            output.dtype in (tf.float16, tf.bfloat16)
            for output in operation.outputs
        ):
            yield operation.type


def layers_in_float32(model: keras.Model) -> list[keras.layers.Layer]:
    """The layers and models that compute in float32."""
    return [
        layer
        for layer in keras_internals.all_layers(model)
        if layer.compute_dtype == "float32"
    ]


def layers_at(
    model: keras.Model, paths: Sequence[str]
) -> list[keras.layers.Layer]:
    """The layers at these paths, and the layers in them.

    Raises:
        InputError: there is no layer at one of them.
    """
    return [
        layer
        for chosen in choose(walk(model), paths)
        for layer in (chosen, *(place.layer for place in walk(chosen)))
    ]


def plan_of_step(
    model: keras.Model, dataset: tf.data.Dataset, microbatches: int = 1
) -> Plan | None:
    """What the terms of the loss are, as `tfamp.fit` finds it.

    Args:
        model: prepared.
        dataset: global batches.
        microbatches: pieces of a replica's share.
    """

    def first():
        for batch in dataset:
            return batch
        raise InputError("The dataset ended before the first batch.")

    if type(model).train_step is not keras.Model.train_step:
        return None
    return plan_of(
        model,
        dataset.element_spec,
        first,
        model.distribute_strategy.num_replicas_in_sync * microbatches,
        training=True,
    )


def step_of(
    model: keras.Model, plan: Plan | None, microbatches: int = 1
) -> build.Step:
    """The step that `tfamp.fit` would run, for `strategy.run`."""
    if type(model).train_step is not keras.Model.train_step:
        return build.custom_train_step(model)
    return build.train_step(
        model, model.distribute_strategy, microbatches, jit=False, plan=plan
    )


def _counting(
    model: keras.Model, counter: Counter
) -> Callable[[tf.data.Dataset, int], Counted]:
    strategy = model.distribute_strategy
    dtypes: dict[TensorName, str] = {}
    fed: dict[str, set[str]] = {}
    narrow: set[str] = set()
    train_steps: list[build.Step] = []

    @tf.autograph.experimental.do_not_convert
    def counted_step(share) -> tf.Tensor:
        with counter.recording() as recording:
            train_steps[0](share)
        seen = recording.seen()
        dtypes.update({name: recording.dtypes[name] for name in seen})
        fed.update(recording.fed)
        if not tf.executing_eagerly():
            narrow.update(_computing_in_16_bits())
        # All bins in one tensor: one reduction and one addition a step.
        return tf.stack([*seen.values()])

    @tf.autograph.experimental.do_not_convert
    def one_step(iterator) -> tf.Tensor:
        with tensorflow_internals.differentiated_within():
            share = iterator.get_next()
            counts = strategy.run(counted_step, args=(share,))
            return strategy.reduce("SUM", counts, axis=None)

    if not model.run_eagerly:
        one_step = tf.function(one_step)

    def count(dataset: tf.data.Dataset, limit: int) -> Counted:
        if not train_steps:
            plan = plan_of_step(model, dataset)
            train_steps.append(step_of(model, plan))
        iterator = iter(distribute_batches(strategy, dataset.take(limit)))
        done, bins = 0, tf.zeros([], tf.int64)
        with contextlib.suppress(tf.errors.OutOfRangeError):
            while done < limit:
                # A tensor on the device: nothing waits for its value.
                bins += one_step(iterator)
                done += 1
        if not done:
            raise InputError("The dataset ended before the first batch.")
        histograms = map(histogram.from_bins, bins.numpy())
        return Counted(
            done,
            dict(zip(dtypes, histograms, strict=True)),
            dict(dtypes),
            dict(fed),
            tuple(sorted(narrow)),
        )

    return count


@contextlib.contextmanager
def one_optimizer_for_all(model: keras.Model) -> Iterator[None]:
    """Within it the optimizer is as `tfamp.fit` would make it.

    One that scales by itself, or not at all, is wrapped; the wrapper does not
    scale, since the steps that are measured compute in float32.
    """
    own = model.optimizer
    is_custom = type(model).train_step is not keras.Model.train_step
    if is_custom or isinstance(own, LossScaleOptimizer):
        yield
        return
    inner = getattr(own, "inner_optimizer", own)
    with model.distribute_strategy.scope():
        model.optimizer = wrap_optimizer(inner, "float32")
        model.optimizer.build(model.trainable_variables)
    try:
        yield
    finally:
        model.optimizer = own
