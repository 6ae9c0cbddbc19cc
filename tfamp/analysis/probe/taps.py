"""Taps: what sees the numbers of a training step as they pass.

A tap is the identity. Forward it counts a layer's output, backward the
gradient that arrives there; gradients of weights are counted where the
optimizer takes them. All of it is part of the step's graph: nothing waits for
the host.
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
        self._graph = tf.compat.v1.get_default_graph()

    @property
    def is_reachable(self) -> bool:
        """Whether the code being traced is that of the step itself.

        Tensors inside of a loop, a branch or a function of its own cannot
        leave it.
        """
        return tf.compat.v1.get_default_graph() is self._graph

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

    def made(self, path: str, output: tf.Tensor) -> None:
        """Remembers which layer returned a tensor."""
        if not tf.executing_eagerly():
            self._makers[output.op.name] = path

    def takes(self, path: str, inputs) -> None:
        """Notes which layers' outputs a layer takes, as they are or moved."""
        if tf.executing_eagerly():
            return
        pending = [t.op for t in keras.tree.flatten(inputs) if _is_floating(t)]
        seen = set()
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
        if not self.is_reachable or not values.dtype.is_floating:
            return
        self.dtypes[name] = values.dtype.name
        values = tf.cast(values, tf.float32)
        if factor is not None:
            values = values * factor
        counts = histogram.count(values)
        if name in self.counts:
            counts += self.counts[name]
        self.counts[name] = counts


class Taps:
    """Taps on a model, which count while a step is recorded.

    Args:
        model: built; its optimizers too.
        step: how its steps are to be run.
    """

    def __init__(self, model: keras.Model, step: Step):
        self._model = model
        self._step = step
        self._places = tapped_layers(model)
        self._owners = _owners(model)
        # Replicas are traced in threads of their own.
        self._thread = threading.local()

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Within it the model and its optimizers are tapped."""
        with contextlib.ExitStack() as stack:
            for path, layer in self._places.items():
                call = self._tapped_call(layer.call, path)
                stack.enter_context(_replaced(layer, "call", call))
            for optimizer in optimizers_of(self._model):
                for name, function in {
                    "scale_loss": self._tapped_scale_loss(optimizer),
                    "apply": self._tapped_apply(optimizer),
                }.items():
                    stack.enter_context(_replaced(optimizer, name, function))
            yield

    @contextlib.contextmanager
    def recording(self) -> Iterator[Recording]:
        """Within it, in replica context, what passes is counted."""
        self._thread.recording = Recording()
        try:
            yield self._thread.recording
        finally:
            self._thread.recording = None

    @property
    def _recording(self) -> Recording | None:
        return getattr(self._thread, "recording", None)

    def _tapped_call(self, original: Callable, path: str) -> Callable:
        @functools.wraps(original)
        def call(*args, **kwargs):
            recording = self._recording
            if recording is not None and recording.is_reachable:
                recording.takes(path, (args, kwargs))
            outputs = original(*args, **kwargs)
            if recording is None:
                return outputs
            if not recording.is_reachable:
                recording.hidden.add(path)
                return outputs
            several = len(keras.tree.flatten(outputs)) > 1
            number = iter(range(len(keras.tree.flatten(outputs))))

            def tapped(output):
                name = str(next(number)) if several else ""
                if not _is_floating(output):
                    return output
                return _tap(recording, path, name, output)

            return keras.tree.map_structure(tapped, outputs)

        return call

    def _tapped_scale_loss(self, optimizer) -> Callable:
        original = optimizer.scale_loss

        def scale_loss(loss):
            recording = self._recording
            if recording is None:
                return original(loss)
            if self._step.loss_scale is not None:
                return tf.cast(loss, tf.float32) * self._step.loss_scale
            return _mark_scaled(recording, original(loss), _unscale(original))

        return scale_loss

    def _tapped_apply(self, optimizer) -> Callable:
        original = optimizer.apply
        scale_loss = optimizer.scale_loss

        def apply(grads, trainable_variables=None):
            recording = self._recording
            if recording is None:
                return original(grads, trainable_variables)
            # What is built in the middle of a step cannot be put back.
            check_built(optimizer)
            variables = (
                keras_internals.optimized_variables(optimizer)
                if trainable_variables is None
                else list(trainable_variables)
            )
            grads = list(grads)
            factor = None
            if self._step.loss_scale is None:
                factor = _unscale(scale_loss)
            for gradient, variable in zip(grads, variables, strict=True):
                name = self._name_of(variable)
                is_next_value = keras_internals.overwrites_with_gradient(
                    variable
                )
                if gradient is not None and not is_next_value:
                    recording.add(name, gradient, factor)
            if self._step.applies:
                return original(grads, variables)
            return None

        return apply

    def _name_of(self, variable: keras.Variable) -> TensorName:
        owner = self._owners.get(id(variable), self._model.name)
        return TensorName(owner, "gradient", variable.name)


def tapped_layers(model: keras.Model) -> dict[str, keras.layers.Layer]:
    """The layers whose outputs are seen, by path.

    Models are not among them: what they return, their layers returned.
    """
    return {
        place.path: place.layer
        for place in walk(model)
        if not isinstance(place.layer, (keras.Model, keras.layers.InputLayer))
    }


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


def _tap(recording: Recording, path: str, name: str, output: tf.Tensor):
    recording.add(TensorName(path, "activation", name), output, None)
    arriving = TensorName(path, "activation_gradient", name)

    @tf.custom_gradient
    def identity(x):
        def backward(gradient):
            recording.add(arriving, gradient, recording.unscale)
            return gradient

        return tf.identity(x), backward

    tapped = identity(output)
    recording.made(path, tapped)
    keras_internals.attach_mask(tapped, keras_internals.mask_of(output))
    return tapped


def _mark_scaled(recording: Recording, loss: tf.Tensor, unscale):
    """The scaled loss; its backward pass begins by saying how it is scaled.

    A model with two optimizers has two scales, and each backward pass one.
    """

    @tf.custom_gradient
    def identity(x):
        def backward(gradient):
            recording.unscale = unscale
            return gradient

        return tf.identity(x), backward

    return identity(tf.convert_to_tensor(loss))


def _unscale(scale_loss: Callable) -> tf.Tensor | None:
    """The reciprocal of an optimizer's scale; None where it does not scale."""
    one = tf.ones([])
    scale = scale_loss(one)
    return None if scale is one else 1.0 / tf.cast(scale, tf.float32)


def _is_floating(tensor) -> bool:
    return isinstance(tensor, tf.Tensor) and tensor.dtype.is_floating


@contextlib.contextmanager
def _replaced(owner, name: str, value: Callable) -> Iterator[None]:
    # Past Keras's own __setattr__, which tracks what it is given.
    object.__setattr__(owner, name, value)
    try:
        yield
    finally:
        object.__delattr__(owner, name)
