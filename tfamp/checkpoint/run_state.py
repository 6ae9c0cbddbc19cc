"""All of a run that a checkpoint holds, in one `tf.train.Checkpoint`.

The tensors, and a JSON text about them in the same files, so that a kill
cannot part the two; nothing that is read is unpickled. Variables are kept by
their place in a list, beside their paths, shapes and dtypes: the names that
Keras makes up differ from process to process.
"""

import base64
import collections
import json
import re
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfamp.checkpoint import plain_values
from tfamp.checkpoint.frozen import fingerprint, frozen_weights
from tfamp.checkpoint.random_state import get_random_state
from tfamp.checkpoint.replica_state import ReplicaState, is_read_together
from tfamp.checkpoint.whole_variables import WholeVariable, standing_for
from tfamp.errors import InputError
from tfamp.layers.float8_counterparts import is_history
from tfamp.precision.policy import precision_of
from tfamp.scaling.optimizer import LossScaleOptimizer

_SCHEMA = "tfamp.checkpoint/1"
_METADATA_KEY = "metadata/.ATTRIBUTES/py_state"

# Path, shape, dtype.
_Signature = tuple[str, tuple[int, ...], str]


class RunState:
    """The state of a model, its metrics and its optimizers.

    Args:
        model: compiled, its variables and its optimizers' all built.
        with_frozen: False leaves out the weights that never train, and keeps
            a fingerprint of each.

    Attributes:
        optimizers: of the model.
        checkpoint: what TensorFlow saves: the tensors and the text as it was
            at the last `capture`.

    Raises:
        InputError: for an optimizer that is not built.
    """

    def __init__(self, model: keras.Model, with_frozen: bool = True):
        self._model = model
        self.optimizers = _optimizers(model)
        frozen = [] if with_frozen else frozen_weights(model)
        frozen = [weight for weight in frozen if not is_history(weight)]
        self._frozen = [
            [*described, fingerprint(weight)]
            for described, weight in zip(
                _described(frozen), frozen, strict=True
            )
        ]
        left_out = {id(weight) for weight in frozen}
        every = _variables(model, self.optimizers)
        # Other precisions have none, and go on from this one all the same.
        self._histories = [each for each in every if is_history(each)]
        self._keras_variables = standing_for(
            [
                variable
                for variable in every
                if id(variable) not in left_out and not is_history(variable)
            ],
            self.optimizers,
        )
        self._wholes = [
            each
            for each in self._keras_variables
            if isinstance(each, WholeVariable)
        ]
        variables = [variable.value for variable in self._keras_variables]
        moving = {id(v.value) for v in _moved_by_replicas(model)}
        # By their place among all variables, the same in every process.
        self._local = [
            i
            for i, v in enumerate(variables)
            if is_read_together(v) or id(v) in moving
        ]
        self._replicas = ReplicaState(
            model.distribute_strategy, [variables[i] for i in self._local]
        )
        self._metadata = _Bytes()
        tensors = [v for v in variables if not is_read_together(v)]
        self.checkpoint = tf.train.Checkpoint(
            variables=tensors,
            metadata=self._metadata,
            **self._optional(),
        )
        self._without_histories = tf.train.Checkpoint(
            variables=tensors, metadata=self._metadata
        )
        # TensorFlow makes this variable on first use; all workers must.
        _ = self.checkpoint.save_counter

    def capture(
        self, notes: dict[str, Any], arrays: Sequence[np.ndarray] = ()
    ) -> None:
        """Reads what TensorFlow does not save by itself.

        All workers must call it together.

        Args:
            notes: what else to save, of JSON's types.
            arrays: what else to save.
        """
        rows = self._replicas.read()
        self._read_wholes()
        described, content = plain_values.pack(arrays)
        text = json.dumps(
            {
                "schema": _SCHEMA,
                "precision": precision_of(self._model),
                "variables": _described(self._keras_variables),
                "histories": _described(self._histories),
                "frozen": self._frozen,
                "dynamic_scales": [each.dynamic for each in self._scaling()],
                "replicas": {self._local[i]: _text(r) for i, r in rows.items()},
                "random_state": get_random_state(),
                "arrays": described,
                **notes,
            }
        )
        # JSON has no line breaks but those in its texts, which are escaped.
        self._metadata.content = b"\n".join([text.encode(), content])

    def restore(self, prefix: str) -> dict[str, Any]:
        """Restores a checkpoint, from any precision and number of replicas.

        A model of the same variables is restored whole; histories of 8-bit
        scales begin anew where it saved none, or others. Of loss scales, a
        dynamic one starts afresh after a fixed one, and a fixed one stays
        what it is; skipped steps count on.

        Returns:
            The checkpoint's metadata, with the notes of `capture`, and its
            arrays as "arrays".

        Raises:
            InputError: for a checkpoint of something else; nothing was
                restored then.
        """
        metadata = read_metadata(prefix)
        # Checkpoints from before this key hold all variables.
        _check_frozen(metadata.get("frozen", []), self._frozen, prefix)
        described = _described(self._keras_variables)
        _check_same(metadata["variables"], described, prefix)
        # Checkpoints from before this key have none.
        saved = metadata.get("histories", [])
        difference = _first_difference(
            *map(_without_numbers, (saved, _described(self._histories)))
        )
        if difference is None:
            status = self.checkpoint.restore(prefix)
        else:
            status = self._without_histories.restore(prefix)
            for history in self._histories:
                history.assign(tf.zeros(history.shape))
        status.assert_existing_objects_matched()
        for whole in self._wholes:
            whole.write()
        self._assign_rows(metadata["replicas"])
        self._adapt_scales(metadata["dynamic_scales"])
        return metadata

    def forget(self) -> None:
        """Lets go of what `capture` read, once it is saved."""
        for whole in self._wholes:
            whole.forget()

    def _read_wholes(self) -> None:
        for optimizer in self._scaling():
            if optimizer.shards is not None:
                optimizer.shards.follow_all()
        for whole in self._wholes:
            whole.read()
            if not self._model.distribute_strategy.extended.should_checkpoint:
                whole.forget()

    def _optional(self) -> dict[str, list[tf.Variable]]:
        values = [history.value for history in self._histories]
        return {"histories": values} if values else {}

    def _assign_rows(self, saved: dict[str, str]) -> None:
        places = {index: place for place, index in enumerate(self._local)}
        dtypes = [v.value.dtype for v in self._keras_variables]
        self._replicas.assign(
            {
                places[int(index)]: tf.io.parse_tensor(
                    base64.b64decode(text), dtypes[int(index)]
                )
                for index, text in saved.items()
            }
        )

    def _adapt_scales(self, were_dynamic: Sequence[bool]) -> None:
        """A scale that moved says nothing to one that stays, nor back."""
        for optimizer, was_dynamic in zip(
            self._scaling(), were_dynamic, strict=True
        ):
            if optimizer.dynamic != was_dynamic:
                optimizer.dynamic_scale.assign(optimizer.initial_scale)
                optimizer.step_counter.assign(0)
                optimizer.tolerance.assign(optimizer.rule.hysteresis)

    def _scaling(self) -> list[LossScaleOptimizer]:
        return [
            optimizer
            for optimizer in self.optimizers
            if isinstance(optimizer, LossScaleOptimizer)
        ]


def read_metadata(prefix: str) -> dict[str, Any]:
    """What a checkpoint says about itself.

    Raises:
        InputError: where it is not one of tfamp's, or of another version.
    """
    reader = tf.train.load_checkpoint(prefix)
    if not reader.has_tensor(_METADATA_KEY):
        raise InputError(
            f"{prefix} is no checkpoint of tfamp.fit; use another directory."
        )
    text, _, content = reader.get_tensor(_METADATA_KEY).partition(b"\n")
    metadata = json.loads(text)
    if metadata["schema"] != _SCHEMA:
        raise InputError(
            f"{prefix} has the schema {metadata['schema']!r}; this version of "
            f"tfamp reads {_SCHEMA!r}."
        )
    # Checkpoints from before this key have none.
    described = metadata.get("arrays", [])
    metadata["arrays"] = plain_values.unpack(described, content)
    return metadata


class _Bytes(tf.train.experimental.PythonState):
    """Bytes that are saved with the tensors."""

    def __init__(self):
        self.content = b""

    def serialize(self) -> bytes:
        return self.content

    def deserialize(self, string_value: bytes) -> None:
        self.content = string_value


def _text(tensor: tf.Tensor) -> str:
    return base64.b64encode(tf.io.serialize_tensor(tensor).numpy()).decode()


def _optimizers(model: keras.Model) -> list[keras.optimizers.Optimizer]:
    """A model with a `train_step` of its own may hold several."""
    optimizers = [
        value
        for value in vars(model).values()
        if isinstance(value, keras.optimizers.Optimizer)
    ]
    for optimizer in optimizers:
        if not optimizer.built:
            raise InputError(
                f"Optimizer {optimizer.name!r} is not built, so that its "
                "state cannot be restored; call its build(variables) first."
            )
    return optimizers


def _variables(model: keras.Model, optimizers) -> list[keras.Variable]:
    variables = [*model.variables, *model.metrics_variables]
    for optimizer in optimizers:
        variables.extend(optimizer.variables)
    return list({id(variable): variable for variable in variables}.values())


def _moved_by_replicas(model: keras.Model) -> list[keras.Variable]:
    """What forward passes may move on each replica by its own rows."""
    return [
        variable
        for variable in model.non_trainable_variables
        if keras.backend.is_float_dtype(variable.dtype)
    ]


def _described(variables: Sequence[keras.Variable]) -> list[list[Any]]:
    return [[v.path, list(v.shape), str(v.dtype)] for v in variables]


def _check_frozen(
    saved: list[list[Any]], here: list[list[Any]], prefix: str
) -> None:
    """Compares what each left out: path, shape, dtype, fingerprint."""
    if bool(saved) != bool(here):
        has, wanted = ("no", False) if saved else ("the", True)
        raise InputError(
            f"Checkpoint {prefix} holds {has} frozen weights; go on from it "
            f"with checkpoint_frozen={wanted}, or use another directory."
        )
    _check_same([row[:3] for row in saved], [row[:3] for row in here], prefix)
    for (path, _, _, before), (*_, now) in zip(saved, here, strict=True):
        if now != before:
            raise InputError(
                f"Checkpoint {prefix} goes with other frozen weights: the "
                f"values of {path} are not those here; load the weights that "
                "its run began with, or use another directory."
            )


def _check_same(
    saved: list[list[Any]], here: list[list[Any]], prefix: str
) -> None:
    """Compares what `_described` returned then and returns now."""
    difference = _first_difference(*map(_without_numbers, (saved, here)))
    if difference:
        raise InputError(
            f"Checkpoint {prefix} is of another model: {difference}; build "
            "model and optimizer as the run that saved it did, or use another "
            "directory."
        )


def _first_difference(
    saved: list[_Signature], here: list[_Signature]
) -> str | None:
    if len(saved) == len(here):
        for (path, shape, dtype), mine in zip(saved, here, strict=True):
            if (path, shape, dtype) != mine:
                return (
                    f"{path} is {shape} {dtype} there, in whose place the "
                    f"model has {mine[0]} {mine[1]} {mine[2]}"
                )
        return None
    lacking = collections.Counter(here) - collections.Counter(saved)
    for path, shape, dtype in lacking:
        return f"it lacks {path} {shape} {dtype} of the model"
    beyond = collections.Counter(saved) - collections.Counter(here)
    path, shape, dtype = next(iter(beyond))
    return f"the model lacks its {path} {shape} {dtype}"


def _without_numbers(described: list[list[Any]]) -> list[_Signature]:
    """Keras numbers names by how many of them the process made before."""
    return [
        (re.sub(r"_\d+(?=[/_]|$)", "", path), tuple(shape), dtype)
        for path, shape, dtype in described
    ]
