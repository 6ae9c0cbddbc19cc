"""Rules for single layers: their weights, their sizes, frozen statistics."""

from collections.abc import Iterator

import keras
import numpy as np

from tfamp import keras_internals
from tfamp.analysis.lint.findings import (
    DTYPES_16,
    ERROR,
    INFO,
    WARNING,
    Finding,
    Rule,
)
from tfamp.analysis.lint.graph import Graph
from tfamp.analysis.lint.ops import ARITHMETIC, MOVES, PRODUCTS
from tfamp.analysis.lint.trace import ForwardTrace
from tfamp.analysis.lint.view import View
from tfamp.checkpoint.frozen import frozen_weights
from tfamp.formats import FORMATS
from tfamp.precision.heads import has_products_only
from tfamp.precision.layer_paths import Place

WEIGHTS_IN_16_BITS = Rule(
    "weights-in-16-bits",
    "Weights have 16 bits themselves: an update smaller than half their "
    "spacing is lost.",
)
UNALIGNED_SIZE = Rule(
    "unaligned-size",
    "A size inside the model is no multiple of 8: matrix units pad it, or are "
    "not used.",
)
FROZEN_BATCH_NORM = Rule(
    "frozen-batch-norm",
    "A frozen batch normalization in float16 divides by a variance that is "
    "not that of its input, and so no longer bounds what it returns.",
)
ROUNDED_INPUTS = Rule(
    "rounded-inputs",
    "Raw inputs are rounded to 16 bits before a layer that needs them exact: "
    "one that normalizes them, or an embedding of ids in a Sequential without "
    "an Input.",
)
RULES = (WEIGHTS_IN_16_BITS, UNALIGNED_SIZE, FROZEN_BATCH_NORM, ROUNDED_INPUTS)

_MULTIPLE = 8
_SIZES = (
    (keras.layers.Dense, ("units",)),
    (
        (
            keras.layers.Conv1D,
            keras.layers.Conv1DTranspose,
            keras.layers.Conv2D,
            keras.layers.Conv2DTranspose,
            keras.layers.Conv3D,
            keras.layers.Conv3DTranspose,
            keras.layers.SeparableConv1D,
            keras.layers.SeparableConv2D,
        ),
        ("filters",),
    ),
    (keras.layers.MultiHeadAttention, ("key_dim", "value_dim")),
    (keras.layers.GroupQueryAttention, ("head_dim",)),
)
_ATTENTION = (keras.layers.MultiHeadAttention, keras.layers.GroupQueryAttention)
# Between the last product and an output.
_AFTER_PRODUCT = (
    MOVES
    | ARITHMETIC
    | {
        "BiasAdd",
        "Elu",
        "Exp",
        "Log",
        "LogSoftmax",
        "Relu",
        "Relu6",
        "Sigmoid",
        "Softmax",
        "Softplus",
        "Tanh",
    }
)


def check(view: View) -> Iterator[Finding]:
    """Findings about single layers."""
    yield from _check_weights(view)
    yield from _check_sizes(view)
    yield from _check_doors(view)
    for place in view.places:
        if (
            isinstance(place.layer, keras.layers.Normalization)
            and place.layer.compute_dtype in DTYPES_16
        ):
            yield Finding(
                ROUNDED_INPUTS.name,
                WARNING,
                place.path,
                "Raw inputs, mean and variance are rounded to "
                f"{place.layer.compute_dtype} before they are subtracted, and "
                "Keras's adapt(dataset) fails in 16 bits.",
                'normalization = keras.layers.Normalization(dtype="float32")',
            )
        if (
            isinstance(place.layer, keras.layers.BatchNormalization)
            and place.layer.compute_dtype == "float16"
            and not place.layer.trainable
        ):
            yield from _check_frozen(view, place)


def _check_doors(view: View) -> Iterator[Finding]:
    inner = [(place.layer, place.path) for place in view.places]
    for model, path in [(view.model, view.model.name), *inner]:
        dtype = keras_internals.input_dtype(model)
        if dtype not in DTYPES_16:
            continue
        first = model.layers[0]
        takes_ids = isinstance(first, keras.layers.Embedding)
        # Within a model its inputs may have 16 bits already.
        if not takes_ids and (
            model is not view.model or has_products_only(first)
        ):
            continue
        exact = 2 ** (FORMATS[dtype].mantissa_bits + 1)
        yield Finding(
            ROUNDED_INPUTS.name,
            ERROR if takes_ids else WARNING,
            path,
            f"A Sequential without an Input rounds what it takes to {dtype}, "
            f"which knows each whole number up to {exact}: "
            f"{'ids' if takes_ids else 'inputs'} beyond are others.",
            "kept = tfamp.keep_float32(model)",
        )


def _check_weights(view: View) -> Iterator[Finding]:
    # What never changes loses no update.
    found, seen = [], {id(weight) for weight in frozen_weights(view.model)}
    # Inner layers come after those that hold them.
    for place in reversed(view.places):
        own = [w for w in place.layer.weights if id(w) not in seen]
        seen.update(map(id, own))
        rounded = [w for w in own if w.dtype in DTYPES_16]
        if rounded:
            found.append((place, rounded))
    for place, rounded in reversed(found):
        dtype = rounded[0].dtype
        is_trained = any(weight.trainable for weight in rounded)
        yield Finding(
            WEIGHTS_IN_16_BITS.name,
            ERROR if is_trained else WARNING,
            place.path,
            f"{len(rounded)} weights are {dtype}: an update below "
            f"{'1/2048' if dtype == 'float16' else '1/256'} of a weight is "
            "lost.",
            f'keras.config.set_dtype_policy("mixed_{dtype}")',
        )


def _check_sizes(view: View) -> Iterator[Finding]:
    heads = {path for trace in view.passes for path in _output_places(trace)}
    for place in view.places:
        layer = place.layer
        # The projections of an attention have its sizes.
        if isinstance(place.owner, _ATTENTION) or place.path in heads:
            continue
        if layer.compute_dtype not in DTYPES_16:
            continue
        for classes, names in _SIZES:
            if isinstance(layer, classes):
                yield from _check_layer_sizes(place, names)


def _check_layer_sizes(place: Place, names) -> Iterator[Finding]:
    for name in names:
        size = getattr(place.layer, name, None)
        # One number per position, such as a score, has no other size.
        if size in (None, 1) or size % _MULTIPLE == 0:
            continue
        # Which is key_dim where nothing else was said.
        if name == "value_dim" and size == place.layer.key_dim:
            continue
        rounded = -(-size // _MULTIPLE) * _MULTIPLE
        yield Finding(
            UNALIGNED_SIZE.name,
            INFO,
            place.path,
            f"{name}={size} is no multiple of {_MULTIPLE}: matrix units pad "
            "it, or are not used.",
            f"{name} = {rounded}",
        )


def _output_places(trace: ForwardTrace) -> Iterator[str]:
    """The layers whose products make the outputs: classes are as many."""
    graph = trace.graph
    for node in graph.upstream(trace.outputs, lambda n: n.op in _AFTER_PRODUCT):
        if node.op in PRODUCTS:
            yield node.place


def _check_frozen(view: View, place: Place) -> Iterator[Finding]:
    layer = place.layer
    trained = {
        path
        for trace in view.passes[:1]
        for path in _trained_before(view, trace.graph, place)
    }
    is_initial = bool(
        np.all(keras.ops.convert_to_numpy(layer.moving_mean) == 0)
        and np.all(keras.ops.convert_to_numpy(layer.moving_variance) == 1)
    )
    if not (is_initial or trained):
        return
    reason = (
        "its statistics are those that it was made with, and it normalizes "
        "nothing"
        if is_initial
        else f"its statistics are fixed while {min(trained)} before it trains"
    )
    yield Finding(
        FROZEN_BATCH_NORM.name,
        WARNING,
        place.path,
        f"Frozen, and {reason}: what it returns is not bounded, and can leave "
        "float16's range.",
        f"{_access(view, place)}.trainable = True",
    )


def _trained_before(view: View, graph: Graph, place: Place) -> Iterator[str]:
    own = [n for n in graph.forward() if n.place == place.path]
    for node in graph.upstream(own, lambda n: True):
        if node.op == "ReadVariableOp" and node.place != place.path:
            layer = view.layer_at(node.place)
            if layer is not view.model and layer.trainable_weights:
                yield node.place


def _access(view: View, place: Place) -> str:
    """Code that gets the layer, as far as `get_layer` reaches."""
    owner, names = view.model, []
    for name in place.path.split("/"):
        if not isinstance(owner, keras.Model):
            return "layer"
        names.append(name)
        owner = owner.get_layer(name)
    return "model" + "".join(f".get_layer({name!r})" for name in names)
