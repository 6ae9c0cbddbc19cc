"""What probe counts of a training step while its numbers pass.

Forward a layer's output, backward the gradient that arrives there; gradients
of weights where the optimizer takes them. All of it is part of the step's
graph: nothing waits for the host.
"""

import contextlib
import dataclasses
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import keras
import tensorflow as tf

from tfamp import keras_internals
from tfamp.analysis.lint.ops import MOVES
from tfamp.analysis.probe import histogram
from tfamp.errors import InputError
from tfamp.precision.layer_paths import walk
from tfamp.scaling.gradients import Present
from tfamp.taps.gates import gate
from tfamp.taps.parts import Part, Spot, Taps, layers_of
from tfamp.taps.passing import graph_now, with_gradient_seen

Kind = Literal["activation", "activation_gradient", "gradient"]


class TensorName(NamedTuple):
    """Which tensor of a model.

    layer: the layer's path, as `tfamp.keep_float32` takes it.
    kind: "activation" (the layer's output), "activation_gradient" (what
        arrives there) or "gradient" (of a weight).
    name: of the weight; of an output its number, where there are several.
    """

    layer: str
    kind: Kind
    name: str


@dataclasses.dataclass(frozen=True)
class Step:
    """How steps are run under taps.

    Attributes:
        loss_scale: multiplies the loss in the optimizer's place, and counted
            values stay multiplied by it; None leaves scaling to the optimizer
            and counts true gradients.
        applies: whether the optimizer gets to apply the gradients.
    """

    loss_scale: float | None = None
    applies: bool = True


class Recording:
    """What one step on one replica counts.

    Attributes:
        counts: the bins of `histogram.count`, summed over all times that the
            tensor passed; in the order in which tensors first passed.
        dtypes: of each tensor.
    """

    def __init__(self):
        self.counts: dict[TensorName, tf.Tensor] = {}
        self.dtypes: dict[TensorName, str] = {}
        # Layers called where nothing can be counted.
        self.hidden: set[str] = set()
        # Which layers take what a layer returns.
        self.fed: dict[str, set[str]] = {}
        self._makers: dict[str, str] = {}
        # Undoes the loss scale in the backward pass that is under way.
        self.unscale: tf.Tensor | None = None
        self._graph = graph_now()

    def seen(self) -> dict[TensorName, tf.Tensor]:
        """The counts, less those of layers that were not seen each time.

        A recurrent layer calls its cell once outside of its loop, to learn
        the shapes.
        """
        return {
            name: counts
            for name, counts in self.counts.items()
            if name.kind == "gradient" or name.layer not in self.hidden
        }

    def see(self, spot: Spot, value: tf.Tensor) -> tf.Tensor:
        """What taps are told."""
        path = spot.part.path
        if spot.side == "input":
            self._takes(path, value)
            return value
        name = str(spot.index) if spot.count > 1 else ""
        self.add(TensorName(path, "activation", name), value, None)
        arriving = TensorName(path, "activation_gradient", name)
        value = with_gradient_seen(
            value, lambda gradient: self.add(arriving, gradient, self.unscale)
        )
        if not tf.executing_eagerly():
            self._makers[value.op.name] = path
        return value

    def miss(self, part: Part) -> None:
        """What taps are told of a layer in a loop or a branch."""
        self.hidden.add(part.path)

    def _takes(self, path: str, value: tf.Tensor) -> None:
        """Notes whose outputs a layer takes, as they are or moved."""
        if tf.executing_eagerly():
            return
        pending, seen = [value.op], set()
        while pending:
            operation = pending.pop()
            maker = self._makers.get(operation.name)
            if maker is not None:
                self.fed.setdefault(maker, set()).add(path)
            elif operation.name not in seen and operation.type in MOVES:
                pending += [t.op for t in operation.inputs]
            seen.add(operation.name)

    def add(
        self, name: TensorName, values: Present, factor: tf.Tensor | None
    ) -> None:
        if isinstance(values, tf.IndexedSlices):
            values = values.values
        # Tensors of an inner graph cannot leave it.
        is_reachable = graph_now() is self._graph
        if not is_reachable or not values.dtype.is_floating:
            return
        self.dtypes[name] = values.dtype.name
        values = tf.cast(values, tf.float32)
        if factor is not None:
            values = values * factor
        counts = histogram.count(values)
        if name in self.counts:
            counts += self.counts[name]
        self.counts[name] = counts


class Counter:
    """Counts on a model while a step is recorded.

    Args:
        model: built; its optimizers too.
        step: how its steps are to be run.
    """

    def __init__(self, model: keras.Model, step: Step):
        self._model = model
        self._step = step
        self._taps = Taps(tapped_parts(model))
        self._owners = _owners(model)
        # Replicas are traced in threads of their own.
        self._thread = threading.local()

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Within it the model and its optimizers are tapped."""
        with self._taps.attached(), contextlib.ExitStack() as stack:
            for optimizer in optimizers_of(self._model):
                apply = functools.partial(
                    self._apply, optimizer, optimizer.scale_loss
                )
                stack.enter_context(gate(optimizer, "apply", apply))
                stack.enter_context(
                    gate(optimizer, "scale_loss", self._scale_loss)
                )
            yield

    @contextlib.contextmanager
    def recording(self) -> Iterator[Recording]:
        """Within it, in replica context, what passes is counted."""
        recording = self._thread.recording = Recording()
        try:
            with self._taps.watching(recording.see, recording.miss):
                yield recording
        finally:
            self._thread.recording = None

    @property
    def _recording(self) -> Recording | None:
        return getattr(self._thread, "recording", None)

    def _scale_loss(self, call, loss):
        if self._recording is None:
            return call(loss)
        if self._step.loss_scale is not None:
            return tf.cast(loss, tf.float32) * self._step.loss_scale
        return _mark_scaled(self._recording, call(loss), _unscale(call))

    def _apply(self, optimizer, scale_loss, call, grads, variables=None):
        recording = self._recording
        if recording is None:
            return call(grads, variables)
        # What is built in the middle of a step cannot be put back.
        check_built(optimizer)
        if variables is None:
            variables = keras_internals.optimized_variables(optimizer)
        grads, variables = list(grads), list(variables)
        factor = None
        if self._step.loss_scale is None:
            factor = _unscale(scale_loss)
        for gradient, variable in zip(grads, variables, strict=True):
            is_next_value = keras_internals.overwrites_with_gradient(variable)
            if gradient is not None and not is_next_value:
                recording.add(self._name_of(variable), gradient, factor)
        return call(grads, variables) if self._step.applies else None

    def _name_of(self, variable: keras.Variable) -> TensorName:
        owner = self._owners.get(id(variable), self._model.name)
        return TensorName(owner, "gradient", variable.name)


def tapped_parts(model: keras.Model) -> list[Part]:
    """The layers whose outputs are seen.

    Models are not among them: what they return, their layers returned.
    """
    return [
        part
        for part in layers_of(model)
        if not isinstance(part.owner, (keras.Model, keras.layers.InputLayer))
    ]


def optimizers_of(model: keras.Model) -> list[keras.optimizers.Optimizer]:
    """A model with a `train_step` of its own may hold several."""
    return [
        value
        for value in vars(model).values()
        if isinstance(value, keras.optimizers.Optimizer)
    ]


def check_built(optimizer: keras.optimizers.Optimizer) -> None:
    """Raises `InputError` for an optimizer without its variables."""
    if not optimizer.built:
        raise InputError(
            f"Optimizer {optimizer.name!r} is not built, so that its state "
            "could not be put back after probing; call its build(variables) "
            "first."
        )


def _owners(model: keras.Model) -> dict[int, str]:
    """By id of a variable, the path of the innermost layer that has it."""
    return {
        id(variable): place.path
        for place in walk(model)
        for variable in place.layer.trainable_variables
    }


def _mark_scaled(recording: Recording, loss: tf.Tensor, unscale):
    """The scaled loss; its backward pass begins by saying how it is scaled.

    A model with two optimizers has two scales, and each backward pass one.
    """

    def begin(gradient) -> None:
        recording.unscale = unscale

    return with_gradient_seen(tf.convert_to_tensor(loss), begin)


def _unscale(scale_loss: Callable) -> tf.Tensor | None:
    """The reciprocal of an optimizer's scale; None where it does not scale."""
    one = tf.ones([])
    scale = scale_loss(one)
    return None if scale is one else 1.0 / tf.cast(scale, tf.float32)
