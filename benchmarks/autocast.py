"""Which operations are in float32 beside `torch.autocast`, and why.

    python -m benchmarks.autocast [--output=FILE.md]

Ten small networks are written in Keras and in PyTorch. The Keras ones are kept
by `tfamp.keep_float32`, traced, and their operations read from the graph; the
PyTorch ones run under autocast as on a GPU, on tensors without numbers, and
their operations are read as they are dispatched. Nothing is computed.
"""

import collections
import contextlib
import dataclasses
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import ops

from benchmarks import program
from tfamp.precision.keep_float32 import keep_float32

# What both call an operation, by the name that each has for it.
_TENSORFLOW = {
    "BatchMatMulV2": "product",
    "BatchMatMulV3": "product",
    "Conv2D": "product",
    "Cumsum": "cumsum",
    "Cos": "cos",
    "Erf": "gelu",
    "Exp": "exp",
    "FusedBatchNormV3": "batch norm",
    "Log": "log",
    "LogSoftmax": "log_softmax",
    "MatMul": "product",
    "Mean": "mean",
    "Pow": "power",
    "Prod": "prod",
    "RealDiv": "divide",
    "Relu": "relu",
    "Rsqrt": "rsqrt",
    "Sigmoid": "sigmoid",
    "Sin": "sin",
    "Softmax": "softmax",
    "Softplus": "softplus",
    "Sqrt": "sqrt",
    "Square": "power",
    "Sum": "sum",
    "Tanh": "tanh",
    "UnsortedSegmentSum": "segment sum",
}
_TORCH = {
    "_log_softmax": "log_softmax",
    "_softmax": "softmax",
    "addmm": "product",
    "bmm": "product",
    "convolution": "product",
    "cos": "cos",
    "cumsum": "cumsum",
    "div": "divide",
    "exp": "exp",
    "gelu": "gelu",
    "index_add": "segment sum",
    "log": "log",
    "mean": "mean",
    "mm": "product",
    "native_batch_norm": "batch norm",
    "_native_batch_norm_legit": "batch norm",
    "cudnn_batch_norm": "batch norm",
    "_batch_norm_with_update": "batch norm",
    "pow": "power",
    "prod": "prod",
    "relu": "relu",
    "rsqrt": "rsqrt",
    "sigmoid": "sigmoid",
    "sin": "sin",
    "softplus": "softplus",
    "sqrt": "sqrt",
    "sum": "sum",
    "tanh": "tanh",
}
# Why one of them is float32 here and of 16 bits there.
REASONS = {
    "cos": "PyTorch has no rule for angles: beyond one turn, a rounding of the"
    " angle is larger than a turn",
    "divide": "PyTorch takes the operands' dtype; a quotient by a small number"
    " overflows, one by an epsilon is infinite",
    "gelu": "PyTorch's kernel takes 16 bits and computes in float32 inside;"
    " TensorFlow composes it of operations",
    "mean": "PyTorch's kernel takes 16 bits and adds in float32 inside, and"
    " rounds the mean",
    "segment sum": "PyTorch adds in the operands' dtype, which stops at 256 in"
    " bfloat16",
    "sigmoid": "takes what a sum before it returned, which stays float32 here"
    " up to the next product",
    "sin": "as cos",
    "sqrt": "PyTorch takes the operands' dtype: a root of a float32 sum is"
    " float32, any other is rounded",
    "tanh": "as sigmoid",
}


@dataclasses.dataclass(frozen=True)
class Network:
    """One network, twice.

    Attributes:
        name: what it stands for.
        in_keras: from a batch, 4 rows of 16, and a square weight.
        in_torch: the same of PyTorch: takes `torch` first.
    """

    name: str
    in_keras: Callable[[Any, Any], Any]
    in_torch: Callable[[Any, Any, Any], Any]


def _classifier(x, w):
    hidden = ops.relu(ops.matmul(x, w))
    return ops.sum(ops.log_softmax(ops.matmul(hidden, w)), -1)


def _classifier_torch(torch, x, w):
    hidden = torch.relu(x @ w)
    return torch.log_softmax(hidden @ w, -1).sum(-1)


def _attention(x, w):
    query, key, value = (ops.matmul(x, w) for _ in range(3))
    scores = ops.softmax(ops.matmul(query, ops.transpose(key)) * 0.25)
    mixed = ops.matmul(scores, value)
    return ops.matmul(ops.gelu(mixed, approximate=False), w)


def _attention_torch(torch, x, w):
    query, key, value = (x @ w for _ in range(3))
    scores = torch.softmax(query @ key.T * 0.25, -1)
    return torch.nn.functional.gelu(scores @ value) @ w


def _rms_norm(x, w):
    h = ops.matmul(x, w)
    mean_square = ops.mean(ops.square(h), -1, keepdims=True)
    return ops.matmul(h * ops.rsqrt(mean_square + 1e-6), w)


def _rms_norm_torch(torch, x, w):
    h = x @ w
    mean_square = h.square().mean(-1, keepdim=True)
    return (h * torch.rsqrt(mean_square + 1e-6)) @ w


def _cosine(x, w):
    h = ops.matmul(x, w)
    h = h / ops.sqrt(ops.sum(ops.square(h), -1, keepdims=True))
    return ops.softmax(ops.matmul(h, ops.transpose(h)) * 10)


def _cosine_torch(torch, x, w):
    h = x @ w
    h = h / torch.sqrt(h.square().sum(-1, keepdim=True))
    return torch.softmax(h @ h.T * 10, -1)


def _variational(x, w):
    mean, log_variance = ops.matmul(x, w), ops.matmul(x, w)
    divergence = ops.sum(
        ops.exp(log_variance) + ops.square(mean) - 1 - log_variance, -1
    )
    code = mean + ops.exp(0.5 * log_variance)
    return ops.matmul(code, w) + divergence[:, None]


def _variational_torch(torch, x, w):
    mean, log_variance = x @ w, x @ w
    divergence = (
        torch.exp(log_variance) + mean.square() - 1 - log_variance
    ).sum(-1)
    code = mean + torch.exp(0.5 * log_variance)
    return code @ w + divergence.unsqueeze(-1)


def _rotary(x, w):
    h = ops.matmul(x, w)
    angle = h * 100
    return ops.matmul(h * ops.cos(angle) + h * ops.sin(angle), w)


def _rotary_torch(torch, x, w):
    h = x @ w
    angle = h * 100
    return (h * torch.cos(angle) + h * torch.sin(angle)) @ w


def _linear_attention(x, w):
    key, value = ops.exp(ops.matmul(x, w)), ops.matmul(x, w)
    return ops.cumsum(key * value, 0) / (ops.cumsum(key, 0) + 1e-6)


def _linear_attention_torch(torch, x, w):
    key, value = torch.exp(x @ w), x @ w
    return (key * value).cumsum(0) / (key.cumsum(0) + 1e-6)


def _graph(x, w):
    h = ops.matmul(x, w)
    totals = ops.segment_sum(h, np.array([0, 0, 1, 1]), num_segments=2)
    return ops.matmul(ops.sigmoid(totals), w)


def _graph_torch(torch, x, w):
    h = x @ w
    zeros = torch.zeros(2, 16, device=x.device, dtype=h.dtype)
    edges = torch.zeros(4, device=x.device, dtype=torch.int64)
    return torch.sigmoid(zeros.index_add(0, edges, h)) @ w


def _mixture(x, w):
    h = ops.matmul(x, w)
    scale = ops.softplus(h)
    return ops.log(ops.sum(ops.exp(h), -1)) + ops.prod(scale, -1)


def _mixture_torch(torch, x, w):
    h = x @ w
    scale = torch.nn.functional.softplus(h)
    return torch.log(torch.exp(h).sum(-1)) + scale.prod(-1)


def _convolution(x, w):
    image = ops.reshape(x, [4, 4, 4, 1])
    h = ops.conv(image, ops.reshape(w, [4, 4, 1, 16]), padding="valid")
    h = ops.relu(h)
    return ops.tanh(ops.mean(h, [1, 2]))


def _convolution_torch(torch, x, w):
    h = torch.conv2d(x.reshape(4, 1, 4, 4), w.reshape(16, 1, 4, 4))
    return torch.tanh(torch.relu(h).mean([2, 3]))


NETWORKS = (
    Network("classifier", _classifier, _classifier_torch),
    Network("attention", _attention, _attention_torch),
    Network("RMS norm", _rms_norm, _rms_norm_torch),
    Network("cosine similarity", _cosine, _cosine_torch),
    Network("variational", _variational, _variational_torch),
    Network("rotary angles", _rotary, _rotary_torch),
    Network("linear attention", _linear_attention, _linear_attention_torch),
    Network("graph sums", _graph, _graph_torch),
    Network("mixture", _mixture, _mixture_torch),
    Network("convolution", _convolution, _convolution_torch),
)


def in_keras(network: Network, dtype: str) -> dict[str, set[str]]:
    """The dtypes of each operation of a network that tfamp keeps."""

    class Code(keras.layers.Layer):
        def build(self, shape):
            self.w = self.add_weight(shape=(16, 16))

        def call(self, x):
            return network.in_keras(x, self.w)

    inputs = keras.Input([16], batch_size=4)
    layer = Code(dtype=f"mixed_{dtype}")
    model = keras.Model(inputs, layer(inputs))
    keep_float32(model, outputs=False)
    graph = tf.function(model).get_concrete_function(tf.zeros([4, 16])).graph
    found = collections.defaultdict(set)
    for node in graph.as_graph_def().node:
        if node.op in _TENSORFLOW and "T" in node.attr:
            seen = tf.as_dtype(node.attr["T"].type).name
            found[_TENSORFLOW[node.op]].add(seen)
    return dict(found)


def in_torch(network: Network, dtype: str) -> dict[str, set[str]]:
    """The same under `torch.autocast`, as on a GPU."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils import _python_dispatch, _pytree

    found = collections.defaultdict(set)

    class Seen(_python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            name = function.overloadpacket.__name__
            floats = [
                str(leaf.dtype).removeprefix("torch.")
                for leaf in _pytree.tree_leaves((args, kwargs))
                if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()
            ]
            asked = (kwargs or {}).get("dtype")
            if asked is None and "softmax" in name and args[2]:
                asked = torch.float32
            if asked is not None and floats:
                # The kernel is asked to compute in float32 inside, and to
                # return it, of an operand of 16 bits.
                floats[0] = str(asked).removeprefix("torch.")
            if name in _TORCH and floats:
                found[_TORCH[name]].add(floats[0])
            return function(*args, **(kwargs or {}))

    with FakeTensorMode():
        x = torch.empty(4, 16, device="cuda")
        w = torch.empty(16, 16, device="cuda")
        with _autocast(torch, getattr(torch, dtype)), Seen():
            network.in_torch(torch, x, w)
    return dict(found)


@contextlib.contextmanager
def _autocast(torch, dtype) -> Iterator[None]:
    """`torch.autocast("cuda")`, which refuses where there is no GPU."""
    former = torch.is_autocast_enabled("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", dtype)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", former)
        torch.clear_autocast_cache()


@dataclasses.dataclass(frozen=True)
class Row:
    """One operation of a network, beside the same of PyTorch."""

    network: str
    operation: str
    tfamp: tuple[str, ...]
    torch: tuple[str, ...]

    @property
    def reason(self) -> str:
        """Why they differ; empty where they do not."""
        if self.tfamp == self.torch:
            return ""
        return REASONS[self.operation]


def compare(dtype: str) -> list[Row]:
    """What both have of each network."""
    rows = []
    for network in NETWORKS:
        ours, theirs = in_keras(network, dtype), in_torch(network, dtype)
        for name in sorted(set(ours) & set(theirs)):
            rows.append(
                Row(
                    network.name,
                    name,
                    tuple(sorted(ours[name])),
                    tuple(sorted(theirs[name])),
                )
            )
    return rows


@dataclasses.dataclass(frozen=True)
class Config:
    """What to compare, and where to write it."""

    dtype: str = "bfloat16"
    output: str = ""


def measure(config: Config) -> None:
    """Writes the table, on the screen or into a file."""
    lines = [
        "| network | operation | tfamp | torch.autocast | why they differ |",
        "|:--|:--|:--|:--|:--|",
    ]
    for row in compare(config.dtype):
        ours, theirs = ", ".join(row.tfamp), ", ".join(row.torch)
        lines.append(
            f"| {row.network} | {row.operation} | {ours} | {theirs} |"
            f" {row.reason} |"
        )
    text = "\n".join(lines)
    print(text)
    if config.output:
        pathlib.Path(config.output).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(program.run(Config, measure, __doc__ or "", sys.argv[1:]))
