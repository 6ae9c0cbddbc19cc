"""What is built before the first step, and the symbolic run that builds it."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras


def build_everything(model: keras.Model, element_spec) -> None:
    """Creates all variables of a model, its metrics, loss and optimizer.

    Inside a traced distributed step it is too late for that. Keras does the
    same before its own first step. Call it in the strategy's scope.

    A model without a `call`, as a GAN whose `train_step` calls its parts, has
    nothing to be built by: it must be built already.

    Args:
        model: a compiled model.
        element_spec: specs of one batch, `(x, y, sample_weight)` or less.
    """
    if type(model).call is not keras.Model.call:
        model._symbolic_build(
            data_batch=keras.tree.map_structure(
                # The spec of a None has no shape; Keras takes the None.
                lambda spec: spec if hasattr(spec, "shape") else None,
                element_spec,
            )
        )


def build_layers(model: keras.Model, element_spec: Any) -> None:
    """Creates the variables of a model's layers, where they are missing."""
    if all(layer.built for layer in model._flatten_layers()):
        return
    x, _, _ = keras.utils.unpack_x_y_sample_weight(symbolic_batch(element_spec))
    keras.src.backend.compute_output_spec(model, x, training=False)


def build_optimizer(model: keras.Model) -> None:
    """Creates the variables of a model's optimizer, where they are missing."""
    if model.optimizer is not None and not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)


def symbolic_batch(element_spec: Any) -> Any:
    """Placeholders of a batch, for `run_symbolically`."""
    return keras.tree.map_structure(
        lambda spec: (
            keras.KerasTensor(
                spec.shape, keras.backend.standardize_dtype(spec.dtype)
            )
            if hasattr(spec, "shape")
            else None
        ),
        element_spec,
    )


def run_symbolically(function: Callable, *args, **kwargs) -> None:
    """Calls a function on placeholders in place of its `KerasTensor`s.

    Layers run their real `call`, so that tensors have the dtypes they will
    have in training; `compute_output_spec` of a functional model instead
    repeats the dtypes of the day it was built. Variables and seeds keep their
    values.
    """
    keras.src.backend.compute_output_spec(function, *args, **kwargs)


def called_shapes(model: keras.Model) -> Any:
    """The shapes of the first argument that a model was built with, or None."""
    shapes = getattr(model, "_build_shapes_dict", None)
    return next(iter(shapes.values())) if shapes else None


@contextlib.contextmanager
def build_state_kept(layers: Sequence[keras.layers.Layer]) -> Iterator[None]:
    """Gives back what layers say of having been built and called."""
    names = ("built", "_called", "_build_shapes_dict")
    before = [
        {name: vars(each)[name] for name in names if name in vars(each)}
        for each in layers
    ]
    try:
        yield
    finally:
        for each, values in zip(layers, before, strict=True):
            for name in names:
                vars(each).pop(name, None)
            vars(each).update(values)
