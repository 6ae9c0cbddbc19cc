"""Lists in which dtype each step of a traced training step computes.

    python -m tests.matmul_dtypes [mixed_float16|mixed_bfloat16]

prints the list for two small models before and after `keep_float32`.
"""

import collections
import dataclasses
import sys

import keras
import tensorflow as tf
from keras import layers

PRODUCTS = (
    "BatchMatMul",
    "BatchMatMulV2",
    "BatchMatMulV3",
    "Conv2D",
    "Conv2DBackpropFilter",
    "Conv2DBackpropInput",
    "Einsum",
    "MatMul",
)
SOFTMAXES_AND_LOSSES = (
    "Log",
    "LogSoftmax",
    "Softmax",
    "SoftmaxCrossEntropyWithLogits",
    "SparseSoftmaxCrossEntropyWithLogits",
)
# These are statistics of a normalization where its layer's name is in theirs.
STATISTICS = ("Mean", "Rsqrt", "RsqrtGrad", "Square", "SquaredDifference")


@dataclasses.dataclass(frozen=True)
class Step:
    """One operation of a graph.

    Attributes:
        kind: "product", "softmax or loss", or "normalization".
        op: the operation's TensorFlow type.
        dtype: of its inputs.
        name: its name, which starts with the names of the layers around it.
    """

    kind: str
    op: str
    dtype: str
    name: str


def training_steps(model, loss, x, y) -> list[Step]:
    """The operations of one forward and backward pass, in graph order."""

    @tf.function
    def gradients(x, y):
        with tf.GradientTape() as tape:
            value = loss(y, model(x, training=True))
        return tape.gradient(
            value, [v.value for v in model.trainable_variables]
        )

    graph_def = gradients.get_concrete_function(x, y).graph.as_graph_def()
    nodes = list(graph_def.node)
    for function in graph_def.library.function:
        nodes.extend(function.node_def)
    found = [_step(node) for node in nodes]
    return [step for step in found if step is not None]


def as_table(steps: list[Step]) -> str:
    """How many operations of each type compute in each dtype."""
    counts = collections.Counter((s.kind, s.op, s.dtype) for s in steps)
    return "\n".join(
        f"{kind:16} {op:36} {dtype:9} {count:4}"
        for (kind, op, dtype), count in sorted(counts.items())
    )


def small_resnet():
    """Two residual blocks and a softmax head, and one batch for them."""
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(8, 3, padding="same", use_bias=False)(inputs)
    x = layers.BatchNormalization()(x)
    for _ in range(2):
        shortcut = x
        x = layers.Conv2D(8, 3, padding="same", use_bias=False)(x)
        x = layers.BatchNormalization()(x)
        x = layers.Activation("relu")(x)
        x = layers.Conv2D(8, 3, padding="same", use_bias=False)(x)
        x = layers.BatchNormalization()(x)
        x = layers.Activation("relu")(layers.Add()([x, shortcut]))
    x = layers.GlobalAveragePooling2D()(x)
    outputs = layers.Dense(4, activation="softmax")(x)
    model = keras.Model(inputs, outputs, name="resnet")
    loss = keras.losses.SparseCategoricalCrossentropy()
    return model, loss, tf.zeros((2, 8, 8, 3)), tf.zeros((2,), tf.int32)


def small_transformer():
    """A block with dropout, one without, a vocabulary head, and a batch."""
    tokens = keras.Input((6,), dtype="int32")
    x = layers.Embedding(16, 8)(tokens)
    for dropout, attention in (
        (0.1, layers.MultiHeadAttention(2, 4, dropout=0.1)),
        (0.0, layers.MultiHeadAttention(2, 4)),
        (0.1, layers.GroupQueryAttention(4, 2, 2, dropout=0.1)),
    ):
        y = layers.LayerNormalization()(x)
        x = layers.Add()([x, attention(y, y, use_causal_mask=True)])
        y = layers.RMSNormalization()(x)
        y = layers.Dense(16, activation="gelu")(y)
        y = layers.Dropout(dropout)(layers.Dense(8)(y))
        x = layers.Add()([x, y])
    x = layers.LayerNormalization()(x)
    logits = layers.Dense(16, use_bias=False, name="vocabulary")(x)
    model = keras.Model(tokens, logits, name="transformer")
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    token_ids = tf.zeros((2, 6), tf.int32)
    return model, loss, token_ids, token_ids


def _step(node) -> Step | None:
    if node.op in PRODUCTS:
        kind = "product"
    elif node.op in SOFTMAXES_AND_LOSSES:
        kind = "softmax or loss"
    elif node.op in STATISTICS and "normalization" in node.name:
        kind = "normalization"
    else:
        return None
    dtype = tf.dtypes.as_dtype(node.attr["T"].type)
    # A mean of integers is the arithmetic of a shape.
    return (
        Step(kind, node.op, dtype.name, node.name)
        if dtype.is_floating
        else None
    )


def main(precision: str) -> None:
    from tfamp.precision.keep_float32 import keep_float32

    keras.config.set_dtype_policy(precision)
    for build in (small_resnet, small_transformer):
        model, loss, x, y = build()
        print(f"{model.name}, {precision}, as Keras builds it")
        print(as_table(training_steps(model, loss, x, y)))
        kept = keep_float32(model)
        print("\n".join(f"  {layer}" for layer in kept if layer.changed))
        print(f"{model.name}, {precision}, after keep_float32")
        print(as_table(training_steps(model, loss, x, y)))


if __name__ == "__main__":
    main(*(sys.argv[1:] or ["mixed_float16"]))
